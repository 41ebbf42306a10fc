"""Check and measure on an NVIDIA GPU: what ``make gpu`` runs once the CUDA library is built. It needs no network.

The tests that need a GPU come first, Triton's and those of captured graphs among them, under NVIDIA's memory checker
as well where it is installed; then the benchmarks, a family at a time until the time is over, whose JSON is under
``bench/results/``. The last lines are a table of what was measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import compare
import torch

from dalle_kernels import _native, _triton

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 8 * 60
SECONDS_OF_CHECKER = 60
CHECKED = ("tests/test_float16_triton.py", "-k", "odd_sizes")
"""What the memory checker runs: it slows everything down, so the kernels' shortest test."""
FAMILIES = ("attention", "gumbel_softmax", "cross_entropy", "adamw", "grad_scale", "logit_laplace", "float16", "linear")
"""In the order in which their figures matter; any others follow."""

begin = time.perf_counter()


def left() -> float:
    return max(1.0, SECONDS - (time.perf_counter() - begin))


def run(*command: str, seconds: float | None = None) -> bool:
    """Whether the command succeeded, in the time that is left or in ``seconds``."""
    print("+", " ".join(command), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=min(seconds or left(), left())).returncode == 0
    except subprocess.TimeoutExpired:
        print("stopped: the time is over", flush=True)
        return False


def check_memory() -> bool:
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        print("compute-sanitizer is not installed: accesses out of bounds are not checked")
        return True
    pytest = (sys.executable, "-m", "pytest", "-q", *CHECKED)
    return run(checker, "--error-exitcode=1", *pytest, seconds=SECONDS_OF_CHECKER)


def measure() -> list[str]:
    """Run the benchmarks; the families that failed or for which no time was left."""
    families = sorted(compare.families(), key=lambda name: (*FAMILIES, name).index(name))
    return [name for name in families if not run(sys.executable, "bench/compare.py", name, "--device=cuda")]


def table() -> str:
    """One line a case: ours, the share of the floor, the best rival of the same function."""
    rows = []
    for path in sorted(compare.RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["machine"]["device"] != "cuda":
            continue
        for case in content["cases"]:
            took = case["candidates"][case["ours"]]["median_ms"]
            share = f"{case['share_of_floor']:.0%} of the floor" if case["floor_ms"] is not None else ""
            rival = compare.best_rival(case)
            against = f"{case['candidates'][rival]['median_ms'] / took:.2f}x {rival}" if rival else ""
            rows.append(f"{compare.describe(case)}: {compare.milliseconds(took)} ms  {share}  {against}")
    return "\n".join(rows)


def main() -> None:
    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA GPU here, so there is nothing to check on or measure; stopping.")
        return
    reason = _native.unavailable("cuda") or _triton.unavailable("cuda")
    if reason is not None:
        sys.exit(f"make gpu: {reason}")
    failed = []
    if not run(sys.executable, "-m", "dalle_kernels"):
        failed.append("python -m dalle_kernels")
    if not run(sys.executable, "-m", "pytest", "-q", "-m", "gpu"):
        failed.append("tests")
    if not check_memory():
        failed.append("memory checker")
    failed += measure()
    print(table())
    if failed:
        sys.exit(f"failed or not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
