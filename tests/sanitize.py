"""Compiled kernels under GCC's address and undefined-behaviour sanitizers.

``python tests/sanitize.py`` (``make sanitize``) builds the CPU library with them, for every instruction set that this
processor runs, into build/sanitize, and runs the families' tests and a long fuzz against it, each instruction set in
turn. The CUDA kernels' own tests follow, for which tests/on_cpu.py compiles these kernels for the CPU with the same
sanitizers. The sanitizers stop the process at the first access out of bounds and at the first undefined operation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import special_build
from special_build import ROOT

FOLDER = ROOT / "build" / "sanitize"

# Tests of what surrounds the kernels take long under a sanitizer and find nothing.
KERNELS = "not compile and not opcheck and not instruction_set and not triton and not cuda and not on_cpu"


def runtime() -> str | None:
    """The libraries that must be loaded before all else, or None where GCC has no sanitizers.

    They are the address sanitizer's and that of C++, whose exceptions the first must find when it starts.
    """
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return " ".join(paths) if all(map(os.path.isabs, paths)) else None


def instruction_sets() -> list[str]:
    """Those that the installed library was built for and this processor runs."""
    from dalle_kernels import _native

    return _native.instruction_sets()[1] if _native.unavailable("cpu") is None else []


def build(folder: Path, instruction_sets: list[str], optimization: str = "-O1") -> None:
    """Put a copy of ``dalle_kernels`` with a sanitized library into ``folder``.

    Without optimization, ``-O0``, it is built in half of the time and runs a few times slower.
    """
    options = {
        "CMAKE_BUILD_TYPE": "None",  # whose flags are those below and no others
        "CMAKE_CXX_COMPILER": shutil.which("g++"),
        "CMAKE_CXX_FLAGS": f"{optimization} -g1",
        "DALLE_KERNELS_SANITIZE": "on",
        "DALLE_KERNELS_INSTRUCTION_SETS": ";".join(instruction_sets),
    }
    special_build.build(folder / "dalle_kernels", folder / "cmake", options)


def environment(folder: Path, instruction_set: str) -> dict[str, str]:
    """What a process needs to run the sanitized library of ``folder`` with one instruction set."""
    return {**special_build.environment(folder, instruction_set), **settings()}


def settings() -> dict[str, str]:
    """Those of the sanitizers. Python itself never frees all of its memory, so leaks are not looked for."""
    return {"LD_PRELOAD": runtime(), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run_fuzz(folder: Path, instruction_set: str, seed: int, count: int) -> subprocess.CompletedProcess:
    """tests/fuzz.py in a process of its own; its output, errors too, is in ``stdout``."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--seed", str(seed), "--count", str(count)]
    return subprocess.run(
        command,
        env=environment(folder, instruction_set),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_tests(paths: list[Path], kept: str, environment: dict[str, str], folder: Path) -> bool:
    """Whether the tests of these files that ``kept`` selects pass."""
    # A sanitizer writes its report to the process's standard error, which pytest must not capture.
    options = ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-k", kept]
    command = [sys.executable, "-m", "pytest", *options, *map(str, paths)]
    return subprocess.run(command, env=environment, cwd=folder).returncode == 0


def main() -> int:
    if runtime() is None or not instruction_sets():
        print("sanitize: expected g++ with its sanitizers' libasan.so, and the compiled library; nothing was checked")
        return 1
    folder, failed = FOLDER / "full", False
    build(folder, instruction_sets())
    # Attention's decoding has test files of its own.
    families = {"decode"} | {path.parent.name for path in (ROOT / "csrc").glob("*/*_cpu.cpp")}
    tests = [path for family in sorted(families) for path in (ROOT / "tests").glob(f"test_{family}*.py")]
    for instruction_set in instruction_sets():
        fuzzed = run_fuzz(folder, instruction_set, seed=2, count=100)
        print(fuzzed.stdout, flush=True)
        passed = run_tests(tests, KERNELS, environment(folder, instruction_set), folder)
        failed |= bool(fuzzed.returncode) or not passed
    compiled = sorted((ROOT / "tests").glob("test_*_on_cpu.py"))
    failed |= not run_tests(compiled, "", {**os.environ, **settings(), "DALLE_ON_CPU_SANITIZE": "1"}, ROOT)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
