"""Triton's kernels compile for sm_80 and sm_90 without spills, as `make gates` checks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.slow
def test_the_kernels_compile_to_what_is_known():
    # A process of its own: where the interpreter is on, nothing can be compiled.
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "gates.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
