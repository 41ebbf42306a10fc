"""Kernels for GPUs compile for sm_80 and sm_90 without spills, Triton's as `make gates` checks; no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("*.cu")), ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, tmp_path):
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-I",
        str(ROOT / "csrc"),
        "-Xptxas",
        "-v",
        "-c",
        "-o",
        str(tmp_path / "object"),
    ]
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ("80", "90a")]
    result = subprocess.run([*command, *architectures, str(source)], check=True, capture_output=True, text=True)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stdout + result.stderr)
    assert spills
    assert all(spill == ("0", "0") for spill in spills)
