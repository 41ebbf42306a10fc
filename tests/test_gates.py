"""Kernels for GPUs compile to what is known and without spills, as `make gates` checks; no GPU is needed."""

from __future__ import annotations

import importlib.util
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
@pytest.mark.skipif(cuda_gates.unavailable() is not None, reason=str(cuda_gates.unavailable()))
def test_cuda_kernels_compile_to_what_is_known():
    done = subprocess.run([sys.executable, cuda_gates.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
