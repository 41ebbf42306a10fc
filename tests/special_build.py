"""A CPU library built unlike the installed one, beside a copy of the package, for whole processes to use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find_tool(name: str) -> str | None:
    """A program on PATH or beside this Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def build(package: Path, work: Path, options: dict[str, str | None]) -> None:
    """Put a copy of ``dalle_kernels`` at ``package``, with a library built in ``work`` with these options of CMake.

    A second time only what has changed is built. Raises SystemExit with the end of the output where a build fails.
    """
    import pybind11

    options = {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "DALLE_KERNELS_CUDA": "off",
        "CMAKE_CXX_COMPILER_LAUNCHER": shutil.which("ccache") or "",
        **options,
    }
    cmake = find_tool("cmake")
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(work), *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, [cmake, "--build", str(work)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"building failed at {' '.join(command)}\n{done.stdout[-5000:]}")
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "dalle_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    subprocess.run([cmake, "--install", str(work), "--prefix", str(package)], check=True, stdout=subprocess.DEVNULL)


def environment(folder: Path, instruction_set: str) -> dict[str, str]:
    """What a process needs to take the package from ``folder`` and run one instruction set."""
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "DALLE_KERNELS_ISA": instruction_set}
