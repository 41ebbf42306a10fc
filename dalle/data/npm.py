"""Fetch a pinned package with the npm client and read its JSON files without unpacking the archive."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from dalle.errors import UserError

MAX_ARCHIVE_BYTES = 128 * 2**20
MAX_UNPACKED_BYTES = 512 * 2**20
MAX_MEMBERS = 4096
TIMEOUT_SECONDS = 600


def default_cache() -> Path:
    """The folder that downloads are kept in: ``$XDG_CACHE_HOME/dalle/npm``, usually ``~/.cache/dalle/npm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle" / "npm"


def fetch(package: str, version: str, cache: str | Path, sha256: str | None = None) -> Path:
    """Path of the tarball of ``package@version``, downloaded by ``npm pack`` unless ``cache`` already holds it.

    The client takes the registry from the user's own npm settings. Nothing of the package is run. With ``sha256`` given
    the archive must have that digest, whether it comes from the cache or from the registry.

    Raises:
        UserError: npm is missing or refuses, or the archive is not the expected one.
    """
    cache = Path(cache).resolve()  # npm runs in another folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {cache} for downloads ({error.strerror}): choose another") from None
    target = cache / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if target.is_file() and (sha256 is None or sha256_of(target) == sha256):
        return target
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as folder:
        _npm_pack(f"{package}@{version}", folder)
        archives = list(Path(folder).glob("*.tgz"))
        if len(archives) != 1:
            raise UserError(f"npm pack {package}@{version} left {len(archives)} archives where one was expected")
        if sha256 is not None and sha256_of(archives[0]) != sha256:
            raise UserError(
                f"the archive of {package}@{version} has sha256 {sha256_of(archives[0])}, expected {sha256}: "
                "the registry does not serve the published package"
            )
        archives[0].replace(target)
    return target


def _npm_pack(specifier: str, folder: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("the npm client was not found on PATH: install Node.js (which brings npm) and run this again")
    command = [npm, "pack", specifier, "--ignore-scripts", "--loglevel=error", "--pack-destination", folder]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"npm pack {specifier} did not finish in {TIMEOUT_SECONDS} s: is there a network?") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-400:] or "no message"
        raise UserError(f"npm could not fetch {specifier} (exit status {done.returncode}): {said}")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_members(archive: str | Path, names: tuple[str, ...]) -> dict[str, dict]:
    """The JSON files ``package/<name>`` of an npm tarball, parsed; names that it lacks are left out.

    Nothing is written to disk. The whole archive is refused when any member is a link or a device, has an absolute path
    or one that climbs out with "..", or when the unpacked size or the number of members passes the bounds above.

    Raises:
        UserError: the archive is unreadable, unsafe or too large, or a file is not a JSON object.
    """
    archive = Path(archive)
    if archive.stat().st_size > MAX_ARCHIVE_BYTES:
        raise UserError(f"{archive} is larger than {MAX_ARCHIVE_BYTES} bytes, too large for an icon package")
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            total = 0
            for count, member in enumerate(tar, 1):
                total += member.size
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
                    raise UserError(f"{archive} holds the unsafe member {member.name!r}: the package is refused")
                if total > MAX_UNPACKED_BYTES or count > MAX_MEMBERS:
                    raise UserError(
                        f"{archive} unpacks to more than {MAX_UNPACKED_BYTES} bytes or {MAX_MEMBERS} files: refused"
                    )
                if path.parts[:1] == ("package",) and "/".join(path.parts[1:]) in names:
                    found[path.name] = json.loads(tar.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{archive} is not a readable npm package ({error}): delete it and run this again") from None
    for name, content in found.items():
        if not isinstance(content, dict):
            raise UserError(f"{name} in {archive} is not a JSON object")
    return found
