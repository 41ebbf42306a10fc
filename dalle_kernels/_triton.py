"""Whether Triton can serve here, and its kernels, which are loaded at their first use.

A family's kernels are in its ``triton_kernels.py``, the only files that import ``triton``, which need not be installed
and takes a second to import. Under ``TRITON_INTERPRET=1``, set before the first use, kernels run on CPU tensors through
Triton's interpreter: slow, for tests, and only where the provider is forced.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch

INTERPRETER_VARIABLE = "TRITON_INTERPRET"

_LEAST_CAPABILITY = (8, 0)


def interprets() -> bool:
    """Whether kernels run on CPU tensors, through Triton's interpreter."""
    return os.environ.get(INTERPRETER_VARIABLE, "0") not in ("", "0")


def unavailable(device_type: str) -> str | None:
    """Why Triton's kernels cannot serve ``device_type`` ("cpu" or "cuda") here, or None when they can."""
    if device_type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for device type {device_type!r}"
    if device_type == "cpu" and not interprets():
        return f"Triton's kernels run on a GPU; on CPU tensors only under {INTERPRETER_VARIABLE}=1, for tests"
    if importlib.util.find_spec("triton") is None:
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


@cache
def _function(family: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"dalle_kernels.{family}.triton_kernels"), name)


def launcher(family: str, name: str) -> Callable:
    """The function ``name`` of ``dalle_kernels.<family>.triton_kernels``, as a provider's ``run``."""

    def run(*args):
        return _function(family, name)(*args)

    return run
