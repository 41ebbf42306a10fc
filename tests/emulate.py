"""The AVX-512 builds of the CPU kernels on a processor without AVX-512.

``python tests/emulate.py FOLDER`` (``make emulate SIMDE=FOLDER``) builds the CPU library with every AVX-512 intrinsic
emulated by SIMDe, whose headers lie in FOLDER/simde (Debian's package libsimde-dev puts them into /usr/include), and
then, family by family, holds the kernels to the error rule on random calls (tests/fuzz.py) under avx512 and
avx512_bf16. The same sources are then known to be right; how fast they are, only such a processor tells.

Each family has a time limit. What has passed is noted in build/emulate/passed, and not run again until the library, the
calls or the code that draws them change: so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import special_build
from special_build import ROOT

# As deep as the folder that setup.py builds in, so that ccache knows what the two have in common.
FOLDER = ROOT / "build" / "emulate"
PASSED = FOLDER / "passed"
INSTRUCTION_SETS = ("avx512", "avx512_bf16")


def build(folder: Path, headers: Path) -> None:
    """Put a copy of ``dalle_kernels`` with an emulating library into ``folder``."""
    options = {"CMAKE_BUILD_TYPE": "Release", "DALLE_KERNELS_EMULATE": str(headers.resolve())}
    special_build.build(folder / "dalle_kernels", folder, options)


def families() -> dict[str, list[str]]:
    """The ops of each family that tests/fuzz_calls.py draws calls of."""
    from fuzz_calls import SAMPLERS

    found: dict[str, list[str]] = {}
    for op, sampler in SAMPLERS.items():
        found.setdefault(sampler.__name__.removesuffix("_call"), []).append(op)
    return found


def fingerprint(arguments: list[str]) -> str:
    """Of all that the outcome depends on."""
    digest = hashlib.sha256(repr(arguments).encode())
    sources = (FOLDER / "dalle_kernels").rglob("*.py"), (FOLDER / "dalle_kernels").glob("_cpu*.so")
    for path in (*sorted((ROOT / "tests").glob("fuzz*.py")), *sorted(path for paths in sources for path in paths)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(instruction_set: str, family: str, arguments: list[str], limit: float) -> str:
    """One family under one instruction set: what to say of it, which begins with "passed" if it passed."""
    note, wanted = PASSED / f"{instruction_set}-{family}", fingerprint(arguments)
    if note.exists() and note.read_text() == wanted:
        return "passed before"
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), *arguments]
    try:
        done = subprocess.run(
            command,
            env=special_build.environment(FOLDER, instruction_set),
            cwd=FOLDER,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        return f"NOT FINISHED in {limit:.0f} s\n{(error.stdout or b'').decode()}"
    if done.returncode or f"instruction set {instruction_set}, " not in done.stdout or str(FOLDER) not in done.stdout:
        return f"FAILED, status {done.returncode}\n{done.stdout}"
    PASSED.mkdir(exist_ok=True)
    note.write_text(wanted)
    return f"passed in {time.monotonic() - start:.0f} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("headers", nargs="?", type=Path, help="the folder that holds simde/")
    parser.add_argument("--family", action="append", choices=sorted(families()), help="(default: all)")
    parser.add_argument("--count", type=int, default=100, help="calls of each op (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the calls (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a family (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.headers is None or not (args.headers / "simde" / "x86" / "avx512.h").exists():
        print("emulate: name the folder of SIMDe's headers, on Debian libsimde-dev: make emulate SIMDE=/usr/include")
        return 1
    build(FOLDER, args.headers)
    failed = False
    for instruction_set in INSTRUCTION_SETS:
        for family in args.family or families():
            arguments = ["--seed", str(args.seed), "--count", str(args.count), *families()[family]]
            outcome = run(instruction_set, family, arguments, args.limit)
            print(f"{instruction_set} {family}: {outcome}", flush=True)
            failed |= not outcome.startswith("passed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
