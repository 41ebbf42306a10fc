"""Check and measure on an NVIDIA GPU: what ``make gpu`` runs once the CUDA library is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from dalle_kernels import _native

BENCH = Path(__file__).resolve().parent


def run(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    status = subprocess.run(command, cwd=BENCH.parent, check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA GPU here, so there is nothing to check on or measure; stopping.")
        return
    reason = _native.unavailable("cuda")
    if reason is not None:
        sys.exit(f"make gpu: {reason}")
    run(sys.executable, "-m", "dalle_kernels")
    run(sys.executable, "-m", "pytest", "-q", "-m", "gpu")
    run(sys.executable, "bench/compare.py", "--device=cuda")


if __name__ == "__main__":
    main()
