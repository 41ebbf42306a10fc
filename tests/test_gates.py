"""Kernels for GPUs compile for sm_80 and sm_90 without spills, Triton's as `make gates` checks; no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import cuda_gates
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_kernels_compile_to_what_is_known():
    # A process of its own: where the interpreter is on, nothing can be compiled.
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "gates.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(cuda_gates.unavailable() is not None, reason="needs nvcc and Triton's disassembler")
def test_hopper_kernels_compile_to_what_is_known():
    done = subprocess.run([sys.executable, cuda_gates.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's cuobjdump")
@pytest.mark.skipif(importlib.util.find_spec("dalle_kernels._cuda") is None, reason="the CUDA library is not built")
def test_compiled_cuda_kernels_do_not_spill():
    """A kernel that spills registers, on any architecture in the library, has a stack frame to spill them to."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = importlib.util.find_spec("dalle_kernels._cuda").origin
    done = subprocess.run([tool, "--dump-resource-usage", library], check=True, capture_output=True, text=True)
    kernels = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", done.stdout)
    assert kernels
    assert [name for name, stack in kernels if stack != "0"] == []
