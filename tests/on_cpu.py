"""CUDA kernels compiled for the CPU by the headers of tests/cuda_on_cpu."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "on_cpu"
COMPILER = shutil.which("c++") or shutil.which("g++")
COMMON = [ROOT / "csrc" / name for name in ("common/device.cu", "common/tensor.cpp", "module_cuda.cpp")]


def compiled(family: str, *more: str) -> ModuleType:
    """The CUDA library's module, with this family alone, that runs on CPU tensors; skips where nothing compiles it.

    ``more`` are sources of other families that it needs. What was compiled from the same sources before, by another
    test file say, serves again.
    """
    pytest.importorskip("pybind11")
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    sources = [*sorted((ROOT / "csrc" / family).glob("*.cu")), ROOT / "csrc" / family / "bindings.cpp", *COMMON]
    sources += [ROOT / "csrc" / name for name in more]
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = FOLDER / f"{family}-{_digest(sources)}"
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(FOLDER / f"{family}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for older in FOLDER.glob(f"{family}-*"):
                shutil.rmtree(older)
            folder.mkdir()
            _compile(sources, folder, path)
    spec = importlib.util.spec_from_file_location(f"{family}._cuda", path)  # pybind11 knows modules by their names
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.exchange_tensors(torch.Tensor, torch.nn.Parameter, torch.Tensor.__dlpack_c_exchange_api__)
    return module


def _digest(sources: list[Path]) -> str:
    """Of all that may go into a library of these sources."""
    headers = [path for folder in ("csrc", "tests/cuda_on_cpu") for path in sorted((ROOT / folder).rglob("*.h"))]
    digest = hashlib.sha256(f"{sys.version} {COMPILER}".encode())
    for path in (*sources, *headers, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(sources: list[Path], folder: Path, path: Path) -> None:
    import pybind11

    includes = [ROOT / "tests/cuda_on_cpu", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-DDALLE_MODULE_CUDA"]
    options += [f"-I{include}" for include in includes]
    compiling, objects = [], []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        command = [COMPILER, *options, "-w", "-x", "c++", "-c", str(source), "-o", str(objects[-1])]
        compiling.append(subprocess.Popen(command))
    statuses = [process.wait() for process in compiling]
    assert not any(statuses)
    whole = path.with_suffix(".part")
    subprocess.run([COMPILER, "-shared", "-pthread", *map(str, objects), "-o", str(whole)], check=True)
    whole.rename(path)
