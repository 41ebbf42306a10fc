"""The emoji set, made from packages that the test writes itself: no network, no npm."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import stat
import tarfile

import numpy as np
import pytest

pytest.importorskip("resvg_py", reason="rendering needs resvg_py: pip install 'dalle-kernels[data]'")

from dalle.cli import data as command
from dalle.data import emoji, npm, open_dataset
from dalle.data.emoji import EmojiPackage, held_out_cells
from dalle.errors import UserError

CONCEPTS = [f"thing-{i}" for i in range(40)]
PACKAGES = [
    EmojiPackage("first", "1.0.0", "round"),
    EmojiPackage("second", "1.0.0", "square", categories_from="first"),
    EmojiPackage("third", "2.1.0", "wide"),
]


def tarball(path, files: dict[str, object], prefix="package/") -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            body = json.dumps(content).encode()
            member = tarfile.TarInfo(prefix + name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))


def drawing(number: int, style: int) -> str:
    return (
        f'<rect x="{number % 9}" y="{style}" width="{4 + number // 9}" height="5" fill="#{number * 5:02x}{style}0c0"/>'
    )


def package_files(style: int, categories: bool = True) -> dict[str, object]:
    icons = {name: {"body": drawing(number, style)} for number, name in enumerate(CONCEPTS)}
    icons["ghost"] = {"body": drawing(50, style), "hidden": True}
    icons["polar-bear-in-snow"] = {"body": '<rect width="16" height="16" fill="#ffffff"/>'}
    icons["waving-hand"] = {"body": drawing(51, style)}
    icons["spy"] = {"body": '<image href="file:///etc/passwd" width="16" height="16"/>'}
    icons["torn"] = {"body": "<g><rect"}
    sorted_keys = {
        "Animals & Nature": [*CONCEPTS, "polar-bear-in-snow", "ghost", "spy", "torn"],
        "People & Body": ["waving-hand"],
    }
    return {
        "icons.json": {
            "prefix": "x",
            "width": 16,
            "height": 16,
            "icons": icons,
            "aliases": {"same": {"parent": "thing-1"}},
        },
        "metadata.json": {"categories": sorted_keys} if categories else {},
        "info.json": {"author": {"name": f"Author {style}", "url": "https://example.org"}, "license": {"spdx": "MIT"}},
        "package.json": {"name": "x", "license": "MIT"},
    }


@pytest.fixture
def fetch(tmp_path):
    for style, package in enumerate(PACKAGES):
        tarball(tmp_path / f"{package.name}.tgz", package_files(style, categories=package.name != "second"))
    return lambda package: tmp_path / f"{package.name}.tgz"


def build(out, fetch, **options):
    return emoji.build(
        out, PACKAGES, **{"image_size": 16, "jobs": 1, "progress": False, "hold_out": 0.2, **options}, fetch=fetch
    )


def test_the_set_holds_what_the_packages_draw(tmp_path, fetch):
    manifest = build(tmp_path / "set", fetch)
    train, held_out = open_dataset(tmp_path / "set"), open_dataset(tmp_path / "set", "heldout")
    assert len(train) + len(held_out) == len(PACKAGES) * len(CONCEPTS) and not train.skipped and not held_out.skipped
    assert manifest["splits"]["train"]["samples"] == len(train)
    for package, described in zip(PACKAGES, manifest["packages"]):
        assert described["left_out"] == {"blank": 1, "hidden": 1, "not an object": 1, "unreadable": 1, "unsafe": 1}
        assert described["train"] + described["heldout"] == len(CONCEPTS)
        assert described["licence"] == "MIT" and described["author"].startswith("Author")
        assert described["sha256"] == hashlib.sha256(fetch(package).read_bytes()).hexdigest()
        assert described["style"] == package.style and described["version"] == package.version
    for dataset in (train, held_out):
        for index in range(len(dataset)):
            pixels, caption, metadata = dataset[index]
            assert pixels.shape == (16, 16, 3)
            assert caption == f"{metadata['concept']}, {metadata['style']} style" and "-" not in caption
            assert metadata["category"] == "Animals & Nature" and metadata["licence"] == "MIT"
            style = [package.style for package in PACKAGES].index(metadata["style"])
            number = CONCEPTS.index(metadata["concept"].replace(" ", "-"))
            # Inside the drawing its colour, outside of it white.
            assert tuple(pixels[style + 2, number % 9 + 1]) == (number * 5, style * 16, 0xC0)
            assert (pixels[-1] == 255).all()


def test_shards_match_their_hashes_and_repeat_byte_for_byte(tmp_path, fetch):
    manifest = build(tmp_path / "one", fetch)
    assert build(tmp_path / "two", fetch, jobs=2) == manifest
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            content = (tmp_path / "one" / shard["file"]).read_bytes()
            assert content == (tmp_path / "two" / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"] and len(content) == shard["bytes"]
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o755


def test_every_held_out_concept_and_style_is_trained_on_elsewhere(tmp_path, fetch):
    build(tmp_path / "set", fetch)
    train, held_out = (open_dataset(tmp_path / "set", split) for split in ("train", "heldout"))
    cells = {(sample.metadata["concept"], sample.metadata["style"]) for sample in train.samples}
    held_out_names = {(sample.metadata["concept"], sample.metadata["style"]) for sample in held_out.samples}
    assert held_out_names and not cells & held_out_names
    for concept, style in held_out_names:
        assert sum(other == concept for other, _ in cells) >= 2
        assert any(other == style for _, other in cells)


def test_held_out_cells_depend_on_names_alone_and_meet_the_fraction():
    cells = [(f"concept-{i}", f"style-{j}") for i in range(500) for j in range(5)]
    chosen = held_out_cells(cells, 0.1)
    # 2,500 cells at 0.1: 250 expected, standard deviation 15.
    assert abs(len(chosen) - 250) < 90
    assert held_out_cells(reversed(cells), 0.1) == chosen
    assert held_out_cells(cells, 0.0) == set()
    assert all(sum((concept, f"style-{j}") not in chosen for j in range(5)) >= 2 for concept, _ in cells)
    # Two styles a concept leave none to spare.
    assert held_out_cells([(f"c{i}", style) for i in range(500) for style in "ab"], 0.5) == set()
    # Nearly everything asked for: two styles of each concept stay all the same.
    greedy = held_out_cells(cells, 0.999)
    assert all(sum((concept, f"style-{j}") not in greedy for j in range(5)) >= 2 for concept, _ in cells)


def test_a_picture_drawn_under_two_names_is_not_held_out(tmp_path):
    for package in PACKAGES:
        icons = {name: {"body": drawing(7, 0)} for name in CONCEPTS}
        files = {
            "icons.json": {"width": 16, "height": 16, "icons": icons},
            "metadata.json": {"categories": {"Objects": CONCEPTS}},
        }
        tarball(tmp_path / f"{package.name}.tgz", files)
    manifest = build(tmp_path / "set", lambda package: tmp_path / f"{package.name}.tgz", hold_out=0.5)
    assert manifest["splits"]["heldout"] == {"samples": 0, "shards": []}


def test_all_categories_take_people_too(tmp_path, fetch):
    manifest = build(tmp_path / "set", fetch, categories="all", hold_out=0.0)
    assert manifest["splits"]["train"]["samples"] == len(PACKAGES) * (len(CONCEPTS) + 1)


def test_the_package_that_lends_its_categories_is_fetched_for_them_alone(tmp_path, fetch, monkeypatch):
    monkeypatch.setattr(emoji, "PACKAGES", {package.name: package for package in PACKAGES})
    sets = emoji.load_icon_sets(PACKAGES[1:2], "objects", fetch)
    assert [len(icon_set.icons) for icon_set in sets] == [len(CONCEPTS) + 2]


def test_icons_that_are_not_square_are_centred():
    png = emoji.render(emoji._svg_document({"body": '<rect width="8" height="16"/>', "width": 8}, {"height": 16}), 16)
    pixels = np.asarray(emoji.Image.open(io.BytesIO(png)))
    assert (pixels[:, 4:12] == 0).all() and (pixels[:, :4] == 255).all() and (pixels[:, 12:] == 255).all()


def test_nothing_is_lost_or_left_behind(tmp_path, fetch, monkeypatch):
    out = tmp_path / "made" / "set"
    build(out, fetch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="already exists and is not empty: pass --overwrite"):
        build(out, fetch)

    def fill_the_disk(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(emoji, "write_shards", fill_the_disk)
        with pytest.raises(UserError, match=r"could not write .*No space left on device"):
            build(out, fetch, overwrite=True)
        patch.setattr(emoji, "write_shards", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(out, fetch, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    build(out, fetch, overwrite=True, hold_out=0.0)
    assert not (out / "heldout-000000.tar").exists()
    assert [path.name for path in out.parent.iterdir()] == ["set"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty: choose another folder"):
        build(tmp_path / "thesis", fetch, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"image_size": 4}, "image size must lie in 8 .. 1024 pixels, got 4"),
        ({"hold_out": 1.0}, r"fraction must lie in \[0, 1\), got 1.0"),
        ({"categories": "cats"}, "'objects' or 'all', got 'cats'"),
        ({"jobs": 0}, "at least 1, got 0"),
    ],
)
def test_options_out_of_range(tmp_path, fetch, option, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "set", fetch, **option)
    assert not (tmp_path / "set").exists()


def test_a_missing_renderer_is_one_clear_sentence(tmp_path, fetch, monkeypatch):
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="needs the package resvg_py: pip install resvg_py"):
        build(tmp_path / "set", fetch)


def test_packages_are_chosen_by_name():
    assert [package.style for package in emoji.select_packages(["noto", "@iconify-json/noto-v1"])] == ["noto", "blob"]
    assert emoji.select_packages(["noto@1.2.8"])[0].sha256 is None
    assert emoji.select_packages(["noto@1.2.9"])[0].sha256 is not None
    for wrong, message in (
        (["comic-sans"], "unknown emoji package 'comic-sans': expected some of noto"),
        (["noto@latest"], "asks for version 'latest': expected a version such as 1.2.9"),
        (["noto", "noto"], "different emoji packages, got noto noto"),
    ):
        with pytest.raises(UserError, match=message):
            emoji.select_packages(wrong)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"name": "../../evil.json"}, "unsafe member '../../evil.json'"),
        ({"name": "/tmp/evil.json"}, "unsafe member '/tmp/evil.json'"),
        ({"name": "package/icons.json", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "unsafe member"),
        ({"name": "package/icons.json", "size": 2**40}, "unpacks to more than"),
    ],
)
def test_unsafe_archives_are_refused_whole(tmp_path, member, message):
    path = tmp_path / "evil.tgz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo()
        for field, value in member.items():
            setattr(info, field, value)
        tar.addfile(info)
    with pytest.raises(UserError, match=message):
        npm.read_json_members(path, ("icons.json",))
    assert list(tmp_path.iterdir()) == [path]


def test_broken_archives_are_one_clear_sentence(tmp_path):
    path = tmp_path / "package.tgz"
    tarball(path, package_files(0))
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"not an archive", b""):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a readable npm package"):
            npm.read_json_members(path, ("icons.json", "package.json"))
    tarball(path, {"icons.json": [1, 2]})
    with pytest.raises(UserError, match="not a JSON object"):
        npm.read_json_members(path, ("icons.json",))
    tarball(path, {"readme.json": {}})
    with pytest.raises(UserError, match="not an Iconify icon package"):
        emoji.load_icon_sets(PACKAGES[:1], "all", lambda _package: path)


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """A client on PATH that hands out ``served.tgz`` and notes each call, or refuses while that is missing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "npm"
    served = tmp_path / "served.tgz"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nfor last; do :; done\n'
        f'cp {served} "$last/it.tgz" 2>/dev/null || {{ echo "npm error 404 Not Found" >&2; exit 7; }}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return served


def test_fetch_downloads_once_and_checks_the_digest(tmp_path, fake_npm, monkeypatch):
    tarball(fake_npm, {"icons.json": {}})
    digest = hashlib.sha256(fake_npm.read_bytes()).hexdigest()
    path = npm.fetch("@scope/name", "1.2.3", tmp_path / "cache", digest)
    assert path.name == "scope-name-1.2.3.tgz" and path.read_bytes() == fake_npm.read_bytes()
    calls = (tmp_path / "calls").read_text()
    assert calls.startswith("pack @scope/name@1.2.3 --ignore-scripts")
    assert npm.fetch("@scope/name", "1.2.3", tmp_path / "cache", digest) == path
    monkeypatch.chdir(tmp_path)
    assert npm.fetch("@scope/name", "1.2.3", "cache", digest) == path
    assert (tmp_path / "calls").read_text() == calls
    assert npm.fetch("@scope/name", "1.2.3", "other", digest).parent == tmp_path / "other"

    path.write_bytes(b"damaged")
    assert npm.fetch("@scope/name", "1.2.3", tmp_path / "cache", digest).read_bytes() == fake_npm.read_bytes()
    with pytest.raises(UserError, match="does not serve the published package"):
        npm.fetch("@scope/name", "1.2.4", tmp_path / "cache", "0" * 64)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [path.name]


def test_npm_missing_or_refusing_is_one_clear_sentence(tmp_path, fake_npm, monkeypatch):
    with pytest.raises(UserError, match=r"npm could not fetch name@1\.2\.3 \(exit status 7\): npm error 404 Not Found"):
        npm.fetch("name", "1.2.3", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"npm client was not found on PATH: install Node\.js"):
        npm.fetch("name", "1.2.3", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the folder .*file/cache for downloads"):
        npm.fetch("name", "1.2.3", tmp_path / "file" / "cache")


def test_the_command_makes_and_checks_a_set(tmp_path, fetch, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "PACKAGES", {package.name: package for package in PACKAGES})
    monkeypatch.setattr(npm, "fetch", lambda package, *_: fetch(EmojiPackage(package.split("/")[1], "1.0.0", "")))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = str(tmp_path / "set")
    options = ["--size", "16", "--jobs", "1", "--packages", "first", "second", "third"]
    command.run(parser.parse_args(["emoji", out, *options]))
    assert "round style: " in (said := capsys.readouterr().out) and "1 blank" in said
    command.run(parser.parse_args(["check", out, "--list"]))
    assert "none skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        command.run(parser.parse_args(["emoji", out, *options]))
