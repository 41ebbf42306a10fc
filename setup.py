"""Builds the compiled libraries with CMake; everything else about the package is in pyproject.toml.

Neither torch nor a GPU is needed here: the libraries take addresses, sizes and strides. Environment variables:

- ``DALLE_KERNELS_CUDA``: ``auto`` (the default: build the CUDA library where nvcc and an NVIDIA driver are found),
  ``on`` (nvcc alone suffices) or ``off``.
- ``DALLE_KERNELS_CUDA_ARCHITECTURES``: what to compile for, such as ``80;90a`` (the default) or ``89``.
- ``DALLE_KERNELS_WARNINGS_AS_ERRORS``: ``on`` or ``off`` (the default).
- ``CMAKE_BUILD_PARALLEL_LEVEL``: how many compilations run at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_LIBRARY = "dalle_kernels._cpu"
CUDA_LIBRARY = "dalle_kernels._cuda"


def find_tool(name: str) -> str:
    """The program from its Python package (a build requirement), which need not be on PATH, else from PATH."""
    beside_python = Path(sys.executable).parent / name
    found = shutil.which(name) or (str(beside_python) if beside_python.exists() else None)
    if found is None:
        raise SystemExit(f"dalle-kernels: expected the program {name!r} to build with, found none; pip install {name}")
    return found


def cached_tools_exist(cache: Path) -> bool:
    """Whether a build can go on from CMake's cache: the tools of an isolated build environment are gone afterwards."""
    if not cache.exists():
        return False
    tools = re.findall(r"^(?:CMAKE_COMMAND|CMAKE_MAKE_PROGRAM|pybind11_DIR):\w+=(.+)$", cache.read_text(), re.MULTILINE)
    return all(Path(tool).exists() for tool in tools)


class CleanBuild(build):
    """Start from an empty folder, or a module deleted since the last build would still be put into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configure, build and install both libraries at once; setuptools then sees them as two extensions."""

    def build_extension(self, extension: Extension) -> None:
        destination = Path(self.get_ext_fullpath(extension.name)).resolve()
        if extension.name == CPU_LIBRARY:
            self.run_cmake(destination.parent)

    def run_cmake(self, destination: Path) -> None:
        import pybind11

        cmake = find_tool("cmake")
        # Not setuptools' own temporary folder, which is new for every editable install: a second build is then short.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        # Always passed, or the value of an earlier build would be taken from CMake's cache.
        for name, default in (("DALLE_KERNELS_CUDA", "auto"), ("DALLE_KERNELS_CUDA_ARCHITECTURES", "80;90a")):
            options[name] = os.environ.get(name) or default
        options["CMAKE_COMPILE_WARNING_AS_ERROR"] = os.environ.get("DALLE_KERNELS_WARNINGS_AS_ERRORS") or "off"
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        if not cached_tools_exist(build / "CMakeCache.txt"):
            configure.append("--fresh")
        self.call([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        self.call([cmake, "--build", str(build)])
        destination.mkdir(parents=True, exist_ok=True)
        in_place = ROOT / "dalle_kernels" if self.inplace or self.editable_mode else destination
        for folder in {destination, in_place}:
            for stale in folder.glob("_cuda.*"):
                stale.unlink()
        self.call([cmake, "--install", str(build), "--prefix", str(destination)])

    def call(self, command: list[str]) -> None:
        result = subprocess.run(command, check=False)
        if result.returncode:
            raise SystemExit(f"dalle-kernels: building the compiled libraries failed at: {' '.join(command)}")


setup(
    # The CUDA library is optional: setuptools skips it where CMake did not build it.
    ext_modules=[Extension(CPU_LIBRARY, sources=[]), Extension(CUDA_LIBRARY, sources=[], optional=True)],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
