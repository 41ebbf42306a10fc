"""CUDA kernels compiled for the CPU by the headers of tests/cuda_on_cpu."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++")
COMMON = [ROOT / "csrc" / name for name in ("common/device.cu", "common/tensor.cpp", "module_cuda.cpp")]


def compiled(family: str, folder: Path, *more: str) -> ModuleType:
    """The CUDA library's module, with this family alone, that runs on CPU tensors; skips where nothing compiles it.

    ``more`` are sources of other families that it needs.
    """
    pybind11 = pytest.importorskip("pybind11")
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    sources = [*sorted((ROOT / "csrc" / family).glob("*.cu")), ROOT / "csrc" / family / "bindings.cpp", *COMMON]
    sources += [ROOT / "csrc" / name for name in more]
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [ROOT / "tests/cuda_on_cpu", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-DDALLE_MODULE_CUDA"]
    options += [f"-I{include}" for include in includes]
    compiling, objects = [], []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        command = [COMPILER, *options, "-w", "-x", "c++", "-c", str(source), "-o", str(objects[-1])]
        compiling.append(subprocess.Popen(command))
    assert all(process.wait() == 0 for process in compiling)
    subprocess.run([COMPILER, "-shared", "-pthread", *map(str, objects), "-o", str(path)], check=True)
    spec = importlib.util.spec_from_file_location(f"{family}._cuda", path)  # pybind11 knows modules by their names
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.exchange_tensors(torch.Tensor, torch.nn.Parameter, torch.Tensor.__dlpack_c_exchange_api__)
    return module
