"""Loads the compiled libraries ``dalle_kernels._cpu`` and ``dalle_kernels._cuda``.

``import dalle_kernels`` succeeds without them; the first native use says what is missing. Environment variable
``DALLE_KERNELS_ISA`` (portable, avx2, avx512 or avx512_bf16) forces the CPU kernels' instruction set, which is
otherwise the widest one that is built and that this processor runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType

# Not only for the names used below: torch brings the OpenMP runtime whose threads the CPU library uses.
import torch

ISA_ENVIRONMENT_VARIABLE = "DALLE_KERNELS_ISA"

# csrc/common/dtype.h has the same numbers.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

_REBUILD = "reinstall dalle-kernels (`pip install .`, or `pip install -e .` in a checkout)"


class NativeError(RuntimeError):
    """The compiled library cannot be used; the message says why and how to mend it."""


@cache
def _load(name: str) -> ModuleType | str:
    """The compiled module, or why it cannot be loaded."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return "the compiled library needs a torch with DLPack's C exchange interface, 2.11 or newer"
    try:
        module = importlib.import_module(f"dalle_kernels.{name}")
        module.exchange_tensors(torch.Tensor, torch.nn.Parameter, exchange)
        return module
    except ModuleNotFoundError:
        if name == "_cuda":
            return (
                "the compiled CUDA library is not built; to build it, reinstall where nvcc and an NVIDIA driver are "
                "found, or with DALLE_KERNELS_CUDA=on"
            )
        return f"the compiled CPU library is not built; {_REBUILD}"
    except ImportError as error:
        return f"the compiled library dalle_kernels.{name} does not load ({error}); {_REBUILD}"


@cache
def _cpu() -> ModuleType | str:
    """The CPU module with its instruction set chosen, or why there is none.

    A forced instruction set that cannot run raises, since falling back would hide the mistake.
    """
    module = _load("_cpu")
    forced_isa = os.environ.get(ISA_ENVIRONMENT_VARIABLE)
    if isinstance(module, ModuleType) and forced_isa:
        available = module.instruction_sets_available()
        if forced_isa not in available:
            raise NativeError(
                f"expected {ISA_ENVIRONMENT_VARIABLE} to be one of {', '.join(available)}, which are built and "
                f"which this processor runs, got {forced_isa!r}; unset it to have the best one chosen"
            )
        module.force_instruction_set(forced_isa)
    return module


@cache
def _cuda() -> ModuleType | str:
    if torch.version.hip is not None:
        return "the compiled CUDA library needs an NVIDIA GPU, and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    module = _load("_cuda")
    reason = None if isinstance(module, str) else module.device_status()
    return f"the compiled CUDA library cannot run on this GPU ({reason})" if reason else module


def _module(device_type: str) -> ModuleType | str:
    if device_type == "cpu":
        return _cpu()
    if device_type == "cuda":
        return _cuda()
    return f"there is no compiled library for device type {device_type!r}"


def unavailable(device_type: str) -> str | None:
    """Why the compiled library cannot serve ``device_type`` ("cpu" or "cuda") here, or None when it can."""
    module = _module(device_type)
    return module if isinstance(module, str) else None


def unavailable_but_on_cpu(device_type: str) -> str | None:
    """As :func:`unavailable`, for a kernel that only the CPU library has."""
    if device_type != "cpu":
        return f"the compiled kernel runs on CPU tensors only, got device type {device_type!r}"
    return unavailable(device_type)


def library(device_type: str) -> ModuleType:
    """The compiled library for ``device_type`` ("cpu" or "cuda"); raises :class:`NativeError` where there is none."""
    module = _module(device_type)
    if isinstance(module, str):
        raise NativeError(module)
    return module


def instruction_sets() -> tuple[list[str], list[str], str]:
    """Instruction sets of the CPU library: those built, those this processor runs as well, and the one used."""
    module = library("cpu")
    return module.instruction_sets_built(), module.instruction_sets_available(), module.instruction_set_used()


@cache
def _kernel(device: torch.device, name: str) -> Callable:
    return getattr(library(device.type), name)


_CPU = torch.device("cpu")


def cpu_kernel(name: str) -> Callable:
    """The binding of a compiled CPU kernel, whose last argument is the number of threads."""
    return _kernel(_CPU, name)


def call(kernel: str, device: torch.device, *arguments, **named):
    """What a compiled kernel returns, run with torch's number of threads on CPU and on torch's stream on CUDA.

    The arguments are those of the kernel's binding, by their names there or, which saves 2 µs a call, in their order.
    A tensor is given as such where the binding takes one, and reads its address and strides; elsewhere by its address.
    """
    run = _kernel(device, kernel)
    if device == _CPU:
        if not named:
            return run(*arguments, torch.get_num_threads())
        return run(*arguments, **named, executor=torch.get_num_threads())
    with torch.cuda.device(device):
        return run(*arguments, **named, executor=torch.cuda.current_stream(device).cuda_stream)


@cache
def query(name: str, device: torch.device, *arguments):
    """What the compiled library for ``device`` says of it, asked once for the same arguments."""
    with torch.cuda.device(device):
        return getattr(library(device.type), name)(*arguments)
