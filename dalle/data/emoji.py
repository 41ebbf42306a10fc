"""Real pictures with captions: emoji in several styles, rendered from icon packages and captioned by their names.

Each package draws many *concepts* ("roller coaster") in one *style* ("noto"), so a caption names both: "roller coaster,
noto style". Whole (concept, style) cells are held out whose concept and style are both trained on elsewhere: drawing
them is a zero-shot test of combining what was learned apart.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import multiprocessing
import re
import shutil
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dalle.data import npm
from dalle.data.shards import FORMAT, EncodedSample, read_manifest, write_manifest, write_shards
from dalle.errors import UserError

SCOPE = "@iconify-json/"
OBJECT_CATEGORIES = frozenset(
    {"activities", "animals nature", "food drink", "objects", "smileys emotion", "travel places"}
    | {"food", "nature", "travel"}  # emojione's names
)
BLANK_TOLERANCE = 8
MAX_ICON_CHARACTERS = 4 * 2**20


@dataclass(frozen=True)
class EmojiPackage:
    """One icon package on npm: ``@iconify-json/<name>`` at ``version``, drawing in ``style``, a word of the captions.

    ``categories_from`` names the package whose metadata sorts the icons of one that carries none. ``sha256`` is the
    digest of the published archive, checked when given.
    """

    name: str
    version: str
    style: str
    categories_from: str | None = None
    sha256: str | None = None


_PINNED = (
    # name, version, style, categories from, sha256 of the published archive
    ("noto", "1.2.9", "noto", None, "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    ("noto-v1", "1.2.5", "blob", None, "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    (
        "fluent-emoji",
        "1.2.7",
        "fluent",
        "fluent-emoji-flat",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    ("fluent-emoji-flat", "1.2.6", "flat", None, "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    ("twemoji", "1.2.5", "twemoji", None, "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    ("emojione", "1.2.3", "emojione", None, "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    ("openmoji", "1.2.29", "openmoji", None, "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
)
PACKAGES = {row[0]: EmojiPackage(*row) for row in _PINNED}
# The last three ask for attribution (CC-BY, CC-BY-SA), so they are taken only when named.
DEFAULT_PACKAGES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat")


def select_packages(specifiers: Sequence[str]) -> list[EmojiPackage]:
    """The known packages named by ``specifiers``: "noto", or "noto@1.2.8" for another version than the pinned one."""
    selected = []
    for specifier in specifiers:
        name, _, version = specifier.removeprefix(SCOPE).partition("@")
        if name not in PACKAGES:
            raise UserError(f"unknown emoji package {specifier!r}: expected some of {', '.join(PACKAGES)}")
        package = PACKAGES[name]
        if version and version != package.version:
            if not re.fullmatch(r"\d+\.\d+\.\d+", version):
                raise UserError(
                    f"{specifier!r} asks for version {version!r}: expected a version such as {package.version}"
                )
            package = EmojiPackage(name, version, package.style, package.categories_from)
        selected.append(package)
    if not selected or len({package.name for package in selected}) < len(selected):
        raise UserError(f"expected one or more different emoji packages, got {' '.join(specifiers) or 'none'}")
    return selected


@dataclass(frozen=True)
class Icon:
    """One drawing: ``concept`` (the icon's key) in the style of ``package``, as a complete SVG document."""

    package: EmojiPackage
    concept: str
    category: str
    svg: str

    @property
    def caption(self) -> str:
        return f"{self.concept.replace('-', ' ')}, {self.package.style} style"

    @property
    def key(self) -> str:
        return f"{self.package.name}/{self.concept}"


@dataclass
class IconSet:
    """What one package holds: the icons asked for, credits, and how many icons were left out and why."""

    package: EmojiPackage
    sha256: str
    licence: str
    author: str
    url: str
    icons: list[Icon] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


Fetch = Callable[[EmojiPackage], Path]


def load_icon_sets(packages: Sequence[EmojiPackage], categories: str, fetch: Fetch) -> list[IconSet]:
    """Read the packages and choose their icons: the object categories with "objects", everything with "all".

    A concept has one category, the first that a package in the given order gives it, so that every style draws the same
    concepts. Aliases are not drawn: they are other names of the same picture.
    """
    archives = {package.name: fetch(package) for package in packages}
    files = {name: _read_package(archive) for name, archive in archives.items()}
    category_of: dict[str, str] = {}
    for package in packages:
        metadata = files[package.name]["metadata.json"]
        source = package.categories_from
        if not metadata.get("categories") and source:
            if source not in files:
                files[source] = _read_package(fetch(PACKAGES[source]))
            metadata = files[source]["metadata.json"]
        for category, keys in metadata.get("categories", {}).items():
            for key in keys:
                category_of.setdefault(key, category)
    sets = []
    for package in packages:
        digest = npm.sha256_of(archives[package.name])
        sets.append(_icon_set(package, digest, files[package.name], category_of, categories))
    return sets


def _read_package(archive: Path) -> dict[str, dict]:
    files = npm.read_json_members(archive, ("icons.json", "metadata.json", "info.json", "package.json"))
    if not isinstance(files.get("icons.json", {}).get("icons"), dict):
        raise UserError(f"{archive} is not an Iconify icon package: expected an object 'icons' in its icons.json")
    return {"metadata.json": {}, "info.json": {}, "package.json": {}, **files}


def _icon_set(
    package: EmojiPackage, digest: str, files: dict[str, dict], category_of: dict[str, str], categories: str
) -> IconSet:
    information = files["info.json"]
    author = information.get("author", {})
    licence = information.get("license", {}).get("spdx") or files["package.json"].get("license") or "unknown"
    result = IconSet(package, digest, licence, author.get("name", "unknown"), author.get("url", ""))
    collection = files["icons.json"]
    for key, icon in sorted(collection["icons"].items()):
        category = category_of.get(key, "uncategorised")
        if icon.get("hidden"):
            result.left_out["hidden"] += 1
        elif categories == "objects" and not _is_object(category):
            result.left_out["not an object"] += 1
        elif not _is_safe(key, icon.get("body")):
            result.left_out["unsafe"] += 1
        else:
            result.icons.append(Icon(package, key, category, _svg_document(icon, collection)))
    return result


def _is_object(category: str) -> bool:
    return " ".join(category.lower().replace("&", " ").split()) in OBJECT_CATEGORIES


def _is_safe(key: str, body: object) -> bool:
    """Whether the key is plain and the body a drawing that reads nothing outside itself."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key) or not isinstance(body, str) or len(body) > MAX_ICON_CHARACTERS:
        return False
    return re.search(r"""href\s*=\s*["'](?!#)""", body) is None


def _svg_document(icon: dict, collection: dict) -> str:
    """The icon on a square canvas, centred where its own box is not square."""
    left, top, width, height = (
        float(icon.get(name, collection.get(name, default)))
        for name, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )


def render(svg: str, size: int) -> bytes | None:
    """PNG (RGB, ``size`` × ``size``, on white) of an SVG document; None when nothing can be seen on it.

    Raises:
        ValueError: the renderer refuses the document.
    """
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    image = Image.open(io.BytesIO(drawn)).convert("RGB")
    if 255 - int(np.asarray(image).min()) < BLANK_TOLERANCE:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def _render_icon(task: tuple[str, int]) -> tuple[str, bytes | None]:
    try:
        png = render(*task)
    except ValueError:
        return "unreadable", None
    return ("blank", None) if png is None else ("kept", png)


def _render_all(icons: Sequence[Icon], size: int, jobs: int, progress: bool) -> Iterator[tuple[str, bytes | None]]:
    from tqdm import tqdm

    tasks = ((icon.svg, size) for icon in icons)
    bar = tqdm(total=len(icons), desc="rendering", unit="image", dynamic_ncols=True, disable=not progress)
    with bar:
        if jobs == 1:
            results: Iterable = map(_render_icon, tasks)
        else:
            # Spawned, not forked: a caller may already run threads, and a fork would copy their locks.
            # Ctrl-C is for this process alone: it ends the others.
            pool = multiprocessing.get_context("spawn").Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN))
            results = pool.imap(_render_icon, tasks, chunksize=16)
        try:
            for result in results:
                bar.update()
                yield result
        finally:
            if jobs > 1:
                pool.terminate()


def held_out_cells(cells: Iterable[tuple[str, str]], fraction: float) -> set[tuple[str, str]]:
    """The (concept, style) cells to hold out: about ``fraction`` of those that can be.

    A cell is a candidate when a hash of its concept and style falls below ``fraction``, so the choice does not depend
    on the other cells, on order or on chance. A candidate is held out while its concept keeps at least two other styles
    in the training split, and its style at least one other concept.
    """
    styles_left, concepts_left, candidates = Counter(), Counter(), []
    for concept, style in set(cells):
        styles_left[concept] += 1
        concepts_left[style] += 1
        rank = _unit_hash(f"hold out\0{concept}\0{style}")
        if rank < fraction:
            candidates.append((rank, concept, style))
    chosen = set()
    for _, concept, style in sorted(candidates):
        if styles_left[concept] > 2 and concepts_left[style] > 1:
            styles_left[concept] -= 1
            concepts_left[style] -= 1
            chosen.add((concept, style))
    return chosen


def _unit_hash(text: str) -> float:
    """A number in [0, 1) fixed by ``text``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def build(
    out: str | Path,
    packages: Sequence[EmojiPackage] | None = None,
    *,
    image_size: int = 64,
    categories: str = "objects",
    hold_out: float = 0.05,
    cache: str | Path | None = None,
    jobs: int = 2,
    overwrite: bool = False,
    progress: bool = True,
    fetch: Fetch | None = None,
) -> dict:
    """Make the emoji data set in the folder ``out`` and return its manifest.

    Shards ``train-*.tar`` and ``heldout-*.tar`` and ``manifest.json`` appear together, when all is done: until then
    they lie in a temporary folder beside ``out``, which is removed on failure. The same packages and options give the
    same bytes. The encoded pictures are held in memory (about 4 kB each at 64 × 64).

    Raises:
        UserError: an option is out of range, npm fails, a package is unusable, or ``out`` holds something else.
    """
    packages = [PACKAGES[name] for name in DEFAULT_PACKAGES] if packages is None else packages
    if not 8 <= image_size <= 1024:
        raise UserError(f"the image size must lie in 8 .. 1024 pixels, got {image_size}")
    if categories not in ("objects", "all"):
        raise UserError(f"categories must be 'objects' or 'all', got {categories!r}")
    if not 0 <= hold_out < 1:
        raise UserError(f"the held-out fraction must lie in [0, 1), got {hold_out}")
    if jobs < 1:
        raise UserError(f"the number of jobs must be at least 1, got {jobs}")
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError("rendering needs the package resvg_py: pip install resvg_py")
    if fetch is None:
        folder = Path(cache) if cache is not None else npm.default_cache()

        def fetch(package: EmojiPackage) -> Path:
            return npm.fetch(SCOPE + package.name, package.version, folder, package.sha256)

    with _replaced_folder(Path(out), overwrite) as folder_in_the_making:
        sets = load_icon_sets(packages, categories, fetch)
        icons = [icon for icon_set in sets for icon in icon_set.icons]
        outcome = list(zip(icons, _render_all(icons, image_size, jobs, progress), strict=True))
        left_out = {icon_set.package.name: icon_set.left_out for icon_set in sets}
        kept = []
        for icon, (verdict, png) in outcome:
            if verdict == "kept":
                kept.append((icon, png))
            else:
                left_out[icon.package.name][verdict] += 1
        if not kept:
            raise UserError("the packages hold no picture of the categories asked for: nothing was written")
        options = {"image_size": image_size, "categories": categories, "hold_out": hold_out}
        manifest = _write(folder_in_the_making, sets, kept, options)
    return manifest


def _write(folder: Path, sets: list[IconSet], kept: list[tuple[Icon, bytes]], options: dict) -> dict:
    cells = {(icon.concept, icon.package.style): png for icon, png in kept}
    # A picture that also stands under another name could be seen in training: it is no test.
    times_drawn = Counter(png for _, png in kept)
    held_out = {cell for cell in held_out_cells(cells, options["hold_out"]) if times_drawn[cells[cell]] == 1}
    licence_of = {icon_set.package.name: icon_set.licence for icon_set in sets}
    splits: dict[str, list[EncodedSample]] = {"train": [], "heldout": []}
    counts: dict[str, Counter] = defaultdict(Counter)
    # Ordered by a hash of the key: a shard read in order is then already a fair mix of styles and concepts.
    for icon, png in sorted(kept, key=lambda pair: _unit_hash(pair[0].key)):
        split = "heldout" if (icon.concept, icon.package.style) in held_out else "train"
        counts[icon.package.name][split] += 1
        metadata = {
            "caption": icon.caption,
            "concept": icon.concept.replace("-", " "),
            "style": icon.package.style,
            "category": icon.category,
            "package": f"{SCOPE}{icon.package.name}@{icon.package.version}",
            "licence": licence_of[icon.package.name],
        }
        splits[split].append(EncodedSample(icon.key, png, "png", metadata))
    return write_manifest(
        folder,
        {
            "name": "emoji",
            **options,
            "image_format": "png",
            "splits": {
                split: {"samples": len(samples), "shards": write_shards(folder, split, samples)}
                for split, samples in splits.items()
            },
            "packages": [
                {
                    "name": SCOPE + icon_set.package.name,
                    "version": icon_set.package.version,
                    "sha256": icon_set.sha256,
                    "style": icon_set.package.style,
                    "licence": icon_set.licence,
                    "author": icon_set.author,
                    "url": icon_set.url,
                    "train": counts[icon_set.package.name]["train"],
                    "heldout": counts[icon_set.package.name]["heldout"],
                    "left_out": dict(sorted(icon_set.left_out.items())),
                }
                for icon_set in sets
            ],
        },
    )


@contextmanager
def _replaced_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the name ``out`` when the block ends well, and vanishes when it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        is_ours = out.is_dir() and (read_manifest(out) or {}).get("format") == FORMAT
        if not (overwrite and is_ours):
            hint = "pass --overwrite to replace it" if is_ours else "choose another folder"
            raise UserError(f"{out} already exists and is not empty: {hint}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write beside {out}: {error.strerror}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if out.exists():
            old = temporary.with_name(temporary.name + ".old")
            out.replace(old)
            temporary.replace(out)
            shutil.rmtree(old)
        else:
            temporary.replace(out)
    except OSError as error:
        raise UserError(f"could not write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
