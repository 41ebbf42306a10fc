"""The AVX-512 builds of the CPU kernels on a processor without AVX-512.

``python tests/emulate.py [folder of simde/]`` (``make emulate SIMDE=...``) builds the CPU library with every AVX-512
intrinsic emulated by SIMDe (Debian's package libsimde-dev) into build/emulate, and runs the kernels' tests there under
avx512 and avx512_bf16. The same sources are then known to be right; how fast they are, only such a processor tells.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from sanitize import KERNELS, ROOT, find_tool

FOLDER = ROOT / "build" / "emulate"


def build(folder: Path, headers: Path) -> None:
    """Put a copy of ``dalle_kernels`` with an emulating library into ``folder``."""
    import pybind11

    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "DALLE_KERNELS_CUDA": "off",
        "DALLE_KERNELS_EMULATE": str(headers.resolve()),
        "CMAKE_CXX_COMPILER_LAUNCHER": shutil.which("ccache") or "",
    }
    cmake, package, work = find_tool("cmake"), folder / "dalle_kernels", folder / "cmake"
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(work), *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, [cmake, "--build", str(work)]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "dalle_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    subprocess.run([cmake, "--install", str(work), "--prefix", str(package)], check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    headers = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/include")
    if not (headers / "simde" / "x86" / "avx512.h").exists():
        print(f"emulate: expected SIMDe's headers in {headers}/simde (Debian: libsimde-dev); pass their folder")
        return 1
    build(FOLDER, headers)
    families = {path.parent.name for path in (ROOT / "csrc").glob("*/*_cpu.cpp")}
    tests = [path for family in sorted(families) for path in (ROOT / "tests").glob(f"test_{family}*.py")]
    failed = False
    for instruction_set in ("avx512", "avx512_bf16"):
        paths = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "DALLE_KERNELS_ISA": instruction_set}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", KERNELS, *map(str, tests)]
        print(f"{instruction_set}, emulated", flush=True)
        failed |= bool(subprocess.run(command, env=environment, cwd=FOLDER).returncode)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
