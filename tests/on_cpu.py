"""CUDA kernels compiled for the CPU by the headers of tests/cuda_on_cpu.

Where the environment sets ``DALLE_ON_CPU_SANITIZE`` they are compiled with GCC's sanitizers: see tests/sanitize.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dalle_kernels import _native

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = "DALLE_ON_CPU_SANITIZE" in os.environ
FOLDER = ROOT / "build" / ("on_cpu_sanitized" if SANITIZE else "on_cpu")
COMPILER = shutil.which("g++" if SANITIZE else "c++") or shutil.which("g++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if SANITIZE else []


@cache
def library() -> ModuleType:
    """The CUDA library's module with all of its kernels, which run on CPU tensors; skips where nothing compiles it."""
    pytest.importorskip("pybind11")
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    kernels = sorted((ROOT / "csrc").glob("*/*.cu"))
    settings = ROOT / "tests/cuda_on_cpu/settings.cpp"
    bindings = [ROOT / "csrc/module_cuda.cpp", ROOT / "csrc/common/tensor.cpp"]
    bindings += sorted({kernel.parent / "bindings.cpp" for kernel in kernels} - {ROOT / "csrc/common/bindings.cpp"})
    with _alone():
        objects = _compiled([*([kernel] for kernel in kernels), bindings, [settings]])
        linked = hashlib.sha256("".join(path.stem for path in objects).encode()).hexdigest()[:16]
        path = FOLDER / linked / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            whole = path.with_suffix(".part")
            _run([*SANITIZERS, "-shared", "-pthread", *map(str, objects), "-o", str(whole)])
            whole.rename(path)
    spec = importlib.util.spec_from_file_location("on_cpu._cuda", path)
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


@contextmanager
def device(library: ModuleType, capability: int = 90, code: int = 90, shared: int = 227 << 10) -> Iterator[None]:
    """Within the block ``library`` finds a GPU of this compute capability, running kernels compiled for ``code``,
    whose blocks may have ``shared`` bytes of shared memory."""
    set_device = ctypes.CDLL(library.__file__).set_device
    set_device(*divmod(capability, 10), code, shared)
    try:
        yield
    finally:
        set_device(9, 0, 90, 227 << 10)


@contextmanager
def overtaking(library: ModuleType, which: int) -> Iterator[None]:
    """Within the block launches of even numbers, or by 1 odd ones, end only when the next one awaits them."""
    hold_back = ctypes.CDLL(library.__file__).hold_back
    hold_back(which)
    try:
        yield
    finally:
        hold_back(-1)


@contextmanager
def _alone() -> Iterator[None]:
    """While other processes wait that would compile the same."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compiled(units: list[list[Path]]) -> list[Path]:
    """An object of each unit's sources together; what was compiled of the same ones before serves again."""
    headers = [path for folder in ("csrc", "tests/cuda_on_cpu") for path in sorted((ROOT / folder).rglob("*.h"))]
    common = hashlib.sha256(f"{sys.version} {COMPILER} {_OPTIONS}".encode())
    for header in headers:
        common.update(header.read_bytes())
    objects = []
    for sources in units:
        digest = common.copy()
        for source in sources:
            digest.update(str(source).encode() + source.read_bytes())
        objects.append(FOLDER / f"{sources[0].stem}-{digest.hexdigest()[:16]}.o")
    missing = [(unit, path) for unit, path in zip(units, objects, strict=True) if not path.exists()]
    for older in set(FOLDER.glob("*.o")) - set(objects):
        older.unlink()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda item: _compile(*item), missing))
    return objects


_OPTIONS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-w"]
_OPTIONS += ["-DDALLE_MODULE_CUDA", "-DDALLE_BUILT_90A"]
_OPTIONS += [*SANITIZERS, "-g1", "-fno-omit-frame-pointer"] if SANITIZE else []


def _compile(sources: list[Path], to: Path) -> None:
    import pybind11

    includes = [ROOT / "tests/cuda_on_cpu", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    unit = "".join(f'#include "{source}"\n' for source in sources)
    part = to.with_suffix(".part")
    _run([*_OPTIONS, *(f"-I{include}" for include in includes), "-x", "c++", "-c", "-", "-o", str(part)], unit)
    part.rename(to)


def _run(arguments: list[str], source: str = "") -> None:
    """The compiler, without what a sanitizer's process loads before all else: it would take ten times as long."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run([COMPILER, *arguments], input=source, text=True, check=True, env=environment)
