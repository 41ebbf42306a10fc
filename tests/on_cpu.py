"""CUDA kernels compiled for the CPU by the headers of tests/cuda_on_cpu."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dalle_kernels import _native

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "on_cpu"
COMPILER = shutil.which("c++") or shutil.which("g++")
COMMON = [ROOT / "csrc" / name for name in ("common/device.cu", "common/tensor.cpp", "module_cuda.cpp")]


def compiled(family: str, *more: str) -> ModuleType:
    """The CUDA library's module, with this family alone, that runs on CPU tensors; skips where nothing compiles it.

    ``more`` are sources of other families that it needs.
    """
    pytest.importorskip("pybind11")
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    sources = [*sorted((ROOT / "csrc" / family).glob("*.cu")), ROOT / "csrc" / family / "bindings.cpp"]
    objects = _objects(family, [*sources, *(ROOT / "csrc" / name for name in more)])
    objects += _objects("common", COMMON)
    path = objects[0].parent / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _alone(family):
        if not path.exists():
            whole = path.with_suffix(".part")
            subprocess.run([COMPILER, "-shared", "-pthread", *map(str, objects), "-o", str(whole)], check=True)
            whole.rename(path)
    spec = importlib.util.spec_from_file_location(f"{family}._cuda", path)  # pybind11 knows modules by their names
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.exchange_tensors(torch.Tensor, torch.nn.Parameter, torch.Tensor.__dlpack_c_exchange_api__)
    return module


def serve(monkeypatch: pytest.MonkeyPatch, library: ModuleType) -> None:
    """Have ``library`` run those compiled kernels that it holds, called by operators on CPU tensors."""
    otherwise = _native.call

    def call(name: str, device: torch.device, *arguments, **named):
        if not hasattr(library, name):
            return otherwise(name, device, *arguments, **named)
        kernel = getattr(library, name)
        return kernel(*arguments, **named, executor=0) if named else kernel(*arguments, 0)

    monkeypatch.setattr(_native, "call", call)
    monkeypatch.setattr(_native, "query", lambda name, _device, *arguments: getattr(library, name)(*arguments))


def _objects(name: str, sources: list[Path]) -> list[Path]:
    """The sources, compiled; what was compiled of the same ones before, by another test file say, serves again."""
    folder = FOLDER / f"{name}-{_digest(sources)}"
    objects = [folder / f"{source.stem}.o" for source in sources]
    with _alone(name):
        if not (folder / "complete").exists():
            for older in FOLDER.glob(f"{name}-*"):
                shutil.rmtree(older)
            folder.mkdir()
            _compile(sources, objects)
            (folder / "complete").touch()
    return objects


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """While other processes wait that would compile the same."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(sources: list[Path]) -> str:
    """Of all that may go into what is compiled of these sources."""
    headers = [path for folder in ("csrc", "tests/cuda_on_cpu") for path in sorted((ROOT / folder).rglob("*.h"))]
    digest = hashlib.sha256(f"{sys.version} {COMPILER}".encode())
    for path in (*sources, *headers, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(sources: list[Path], objects: list[Path]) -> None:
    import pybind11

    includes = [ROOT / "tests/cuda_on_cpu", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-DDALLE_MODULE_CUDA", "-w"]
    options += [f"-I{include}" for include in includes]
    compiling = [
        subprocess.Popen([COMPILER, *options, "-x", "c++", "-c", str(source), "-o", str(compiled)])
        for source, compiled in zip(sources, objects, strict=True)
    ]
    statuses = [process.wait() for process in compiling]
    assert not any(statuses)
