"""Whether Triton can serve here, its kernels, loaded at their first use, and what their launches need to know.

A family's kernels are in its ``triton_kernels.py``. Only these files, and what they alone import, import ``triton``,
which need not be installed and takes a second to import. Under ``TRITON_INTERPRET=1``, set before the first use,
kernels run on CPU tensors through Triton's interpreter: slow, for tests, and only where the provider is forced.

The functions of ``triton_kernels.py`` allocate with torch and launch; they ask :func:`architecture` and
:func:`multiprocessors` for the device, not torch. So the gates can run them on meta tensors and compile, for a chip
that is not there, exactly what would be launched on it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from dalle_kernels._dispatch import forced_provider

INTERPRETER_VARIABLE = "TRITON_INTERPRET"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What numbers most kernels take."""

_LEAST_CAPABILITY = (8, 0)
MEASURED_ON = 90
"""The architecture of the GPU, an H200, on which compiled CUDA kernels were timed beside Triton's."""


def interprets() -> bool:
    """Whether kernels run on CPU tensors, through Triton's interpreter."""
    return os.environ.get(INTERPRETER_VARIABLE, "0") not in ("", "0")


def version() -> str | None:
    """The installed Triton's, found without importing it; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.metadata.version("triton")


def unavailable(device_type: str) -> str | None:
    """Why Triton's kernels cannot serve ``device_type`` ("cpu" or "cuda") here, or None when they can."""
    if device_type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for device type {device_type!r}"
    if device_type == "cpu" and not interprets():
        return f"Triton's kernels run on a GPU; on CPU tensors only under {INTERPRETER_VARIABLE}=1, for tests"
    if version() is None:
        return "Triton is not installed; pip install 'dalle-kernels[triton]'"
    if device_type == "cpu":
        return None
    if torch.version.hip is not None:
        return "Triton's kernels are written for NVIDIA GPUs, and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    if interprets():
        return f"{INTERPRETER_VARIABLE} is set, and the interpreter reads CPU tensors; unset it"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return f"Triton's kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
    return None


def unsupported(*arguments) -> str | None:
    """Why kernels of float32, bfloat16 and float16, in any mixture, cannot serve a call, or None when they can."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.is_floating_point() and argument.dtype not in DTYPES:
            return f"the Triton kernels take float32, bfloat16 and float16, got {argument.dtype}"
    return None


@cache
def _function(family: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"dalle_kernels.{family}.triton_kernels"), name)


def launcher(family: str, name: str) -> Callable:
    """The function ``name`` of ``dalle_kernels.<family>.triton_kernels``, as a provider's ``run``.

    Triton launches on the current device: it is made that of the first tensor, which may be in a list.
    """

    def run(*args):
        function = _function(family, name)
        device = _device(args)
        if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return run


def _device(args: tuple) -> torch.device | None:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device
        if isinstance(arg, (list, tuple)):
            found = _device(arg)
            if found is not None:
                return found
    return None


_assumed: tuple[int, int] | None = None


@contextmanager
def assume(architecture: int, multiprocessors: int) -> Iterator[None]:
    """Within the block, every device is taken for such a chip: to compile for one that is not here, and for tests."""
    global _assumed
    previous, _assumed = _assumed, (architecture, multiprocessors)
    try:
        yield
    finally:
        _assumed = previous


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 0, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def architecture(device: torch.device) -> int:
    """The compute capability as one number, 90 for 9.0; 0 for what is no GPU."""
    return (_assumed or _chip(device))[0]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 for what is no GPU."""
    return (_assumed or _chip(device))[1]


_unavailable = cache(unavailable)


def left_to_triton(device: torch.device, ahead: bool) -> str | None:
    """Why Triton's kernel serves a call that the compiled CUDA kernel could serve too, or None where that one does.

    It does where a provider is forced, where there is no Triton, and where figures in ``bench/results`` have shown it
    ``ahead`` on such a GPU; a test holds what the ops take for that to the figures.
    """
    if forced_provider() is not None or (ahead and architecture(device) == MEASURED_ON):
        return None
    if _unavailable(device.type) is not None:
        return None
    return "no run on such a GPU has shown it ahead of Triton for such a call; dalle_kernels.use('native') takes it"


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Options of a launch whose kernel may start while the one before it ends (Hopper and later).

    Such a kernel has a constexpr parameter DEPENDENT, under which it waits for the one before itself.
    """
    return {"DEPENDENT": True, "launch_pdl": True} if architecture(device) >= 90 else {"DEPENDENT": False}
