"""Check and measure on an NVIDIA GPU: what ``make gpu`` runs once the CUDA library is built. It needs no network.

    python bench/gpu.py                 all of it
    python bench/gpu.py tests           a part: tests, sanitizers, benchmarks
    python bench/gpu.py benchmarks --families attention float16 --seconds 240

The tests that need a GPU come first, Triton's and those of captured graphs among them, in one process fewer than there
are cores, since most of their time is Triton's compiler's. Beside them, for the same reason, run NVIDIA's sanitizers,
where they are installed, over short tests of the CUDA kernels, and one round of every benchmark, which leaves what it
compiles in caches, but for those that take tens of gigabytes. Then the benchmarks have the GPU: several processes
prepare side by side, which is work of the host, and take turns to measure, one alone at a time; those that take much of
its memory come last. The JSON is under ``bench/results/``. What a command prints goes to a file under ``build/gpu/`` as
it comes. The last lines are a table of what was measured, the tests that failed, and what else did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import compare
import torch

from dalle_kernels import _native, _triton

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "sanitizers", "benchmarks")
LOGS = ROOT / "build" / "gpu"
SECONDS = 8 * 60
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SECONDS_OF_SANITIZER = 120
SANITIZED = (
    "tests/test_attention_cuda.py",
    "tests/test_decode_cuda.py",
    "tests/test_cuda_kernels.py",
    "tests/test_powersgd.py",
    "-k",
    "(float64 and (13 or 130)) or short or casts_of_many or codes_of_whole or bad_rows or counts_steps or any_scale",
)
"""What the sanitizers run: they slow everything down, so short tests of compiled kernels."""
OUR_KERNELS = "kernel_substring=5dalle"  # as names of csrc's namespace are mangled
FAMILIES = ("attention", "gumbel_softmax", "cross_entropy", "model", "adamw", "powersgd", "logit_laplace", "grad_scale")
"""In the order in which their figures matter; any others follow."""
PARTS_OF = {"attention": [("-k", kind) for kind in ("row", "column", "conv")]}
"""Of families that compile much: what to do side by side."""
WARMED_AT_ONCE, MEASURED_AT_ONCE = 4, 6
"""Parts of families; each takes some gigabytes of the GPU's memory, which the tests share with those that warm up."""
ALONE = ("model",)
"""Families that take so much of the GPU's memory that beside them there is none for others."""
CPU_ONLY = ("linear", "mlp", "overhead")

OF_ONE_ALONE = 1 / 4
"""How much of the time for figures is kept for each of these."""
OF_A_CASE = 20
"""Seconds before its time is over in which a family begins no case, but ends the one that it is at."""


class Budget:
    """What is left of ``seconds`` since the time ``since``, and commands that get no more of it."""

    def __init__(self, seconds: float, since: float):
        self.end = since + seconds

    @property
    def left(self) -> float:
        return max(1.0, self.end - time.time())

    def run(self, name: str, *command: str, seconds: float | None = None, quiet: bool = False) -> bool:
        """Whether the command succeeded, in the time that is left or in ``seconds``.

        What it prints goes to ``build/gpu/<name>.log`` at once, and if it is not ``quiet`` is shown in one piece at the
        end, for several commands run side by side.
        """
        LOGS.mkdir(parents=True, exist_ok=True)
        path = log(name)
        with path.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(min(seconds or self.left, self.left))
            except subprocess.TimeoutExpired:
                self._stop(process)
                output.write(b"\nstopped: the time is over\n")
        if not quiet:
            print("+", " ".join(command), path.read_text(errors="replace"), sep="\n", flush=True)
        return process.returncode == 0

    @staticmethod
    def _stop(process: subprocess.Popen) -> None:
        """End a command and its own processes, pytest at the end of its tests."""
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def log(name: str) -> Path:
    return LOGS / f"{name}.log"


def failures(name: str) -> list[str]:
    """The lines in which pytest, or the plugin that does so at once, named the tests that failed."""
    lines = log(name).read_text(errors="replace").splitlines() if log(name).exists() else []
    named = {line.split(" ")[1]: line for line in reversed(lines) if line.startswith(("FAILED ", "ERROR "))}
    return list(reversed(named.values()))


def test(budget: Budget) -> list[str]:
    """The tests, one process fewer than there are cores, with half of the time."""
    pytest = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-n",
        str(max(1, (os.cpu_count() or 1) - 1)),
        "--dist=worksteal",
        "-p",
        "failures_at_once",
    )
    good = {
        "python -m dalle_kernels": budget.run("providers", sys.executable, "-m", "dalle_kernels"),
        "tests": budget.run("tests", *pytest, seconds=budget.left / 2),
    }
    return [name for name, passed in good.items() if not passed]


def sanitize(budget: Budget) -> list[str]:
    """Each of NVIDIA's sanitizers over our kernels alone."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return [f"{', '.join(SANITIZERS)} (compute-sanitizer is not installed)"]
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", *SANITIZED)
    checked = ("--kernel-name", OUR_KERNELS, "--error-exitcode=1")
    commands = [(tool, sanitizer, "--tool", tool, *checked, *pytest) for tool in SANITIZERS]
    passed = side_by_side(lambda command: budget.run(*command, seconds=SECONDS_OF_SANITIZER), commands)
    return [tool for tool, good in zip(SANITIZERS, passed) if not good]


Part = tuple[str, ...]
"""A family, and the options of pytest that choose among its cases."""


def parts_of(families: Sequence[str]) -> list[Part]:
    return [(family, *part) for family in families for part in PARTS_OF.get(family, [()])]


def warm_caches(budget: Budget, families: list[str]) -> None:
    """One round of every family but those ALONE, for what Triton and torch compile; nothing else of it counts."""
    command = (sys.executable, "bench/compare.py", "--device=cuda", "--rounds=1", "--dry")

    def warm(part: Part) -> bool:
        return budget.run(f"warm {' '.join(part)}", *command, *part, seconds=budget.left / 2, quiet=True)

    side_by_side(warm, parts_of([family for family in families if family not in ALONE]), WARMED_AT_ONCE)


def side_by_side(do: Callable[[Any], Any], things: Sequence[Any], most: int | None = None) -> list[Any]:
    """What ``do`` gives for each of the things, all or ``most`` of them at once."""
    with ThreadPoolExecutor(most or max(1, len(things))) as pool:
        return list(pool.map(do, things))


def measure(budget: Budget, families: list[str], device: str = "cuda") -> list[str]:
    """Run the benchmarks and write what they found; the parts of families that failed or were not measured whole."""
    print(f"{budget.left:.0f} s are left for the figures", flush=True)
    reports = LOGS / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    (reports / "turns").mkdir(parents=True)

    def measured(part: Part, seconds: float, *options: str) -> bool:
        name = " ".join(part)
        family, *chosen = part
        options = (*chosen, f"--device={device}", f"--seconds={max(1, seconds - OF_A_CASE):.0f}", *options)
        return budget.run(name, *compare.command(family, options, reports / f"{name}.json"), seconds=seconds)

    together = parts_of([family for family in families if family not in ALONE])
    alone = parts_of([family for family in families if family in ALONE])
    kept = budget.left * OF_ONE_ALONE * len(alone)
    turns = f"--turns={reports / 'turns' / 'gpu'}"
    good = side_by_side(lambda part: measured(part, max(1.0, budget.left - kept), turns), together, MEASURED_AT_ONCE)
    good += [measured(part, budget.left) for part in alone]
    written = [path for path in sorted(reports.glob("*.json")) if path.stat().st_size]
    compare.publish(json.loads(path.read_text(encoding="utf-8")) for path in written)
    return [" ".join(part) for part, whole in zip([*together, *alone], good) if not whole]


def table(since: float) -> str:
    """One line a case measured after ``since``: ours, the share of the floor, the best rival of the same function."""
    rows = []
    for path in sorted(compare.RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["machine"]["device"] != "cuda" or path.stat().st_mtime < since:
            continue
        for case in content["cases"]:
            took = case["candidates"][case["ours"]]["median_ms"]
            share = f"{case['share_of_floor']:.0%} of the floor" if case["floor_ms"] is not None else ""
            rival = compare.best_rival(case)
            against = f"{case['candidates'][rival]['median_ms'] / took:.2f}x {rival}" if rival else ""
            rows.append(f"{compare.describe(case)}: {compare.milliseconds(took)} ms  {share}  {against}")
    return "\n".join(rows)


def main() -> None:
    known = [family for family in compare.families() if family not in CPU_ONLY]
    known.sort(key=lambda name: (*FAMILIES, name).index(name))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--families", nargs="+", default=known, choices=known, help="to measure (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--since", type=float, default=time.time(), help="when they began, in seconds (default: now)")
    options = parser.parse_args()
    if not set(options.parts) <= set(PARTS):
        parser.error(f"expected parts among {', '.join(PARTS)}, got {' '.join(options.parts)}")
    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA GPU here, so there is nothing to check on or measure; stopping.")
        return
    reason = _native.unavailable("cuda") or _triton.unavailable("cuda")
    if reason is not None:
        sys.exit(f"make gpu: {reason}")
    budget = Budget(options.seconds, options.since)
    print(f"{budget.left:.0f} s of {options.seconds:.0f} are left after the build; --seconds gives more", flush=True)
    parts = {
        "tests": lambda: test(budget),
        "sanitizers": lambda: sanitize(budget),
        "benchmarks": lambda: warm_caches(budget, options.families) or [],
    }
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process
    os.environ["PYTHONUNBUFFERED"] = "1"
    # For the plugin: pytest before 8.4 loads it before it reads where pyproject.toml says that it is.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "bench"), os.environ.get("PYTHONPATH")]))
    failed = [name for names in side_by_side(lambda part: parts[part](), options.parts) for name in names]
    if "benchmarks" in options.parts:
        failed += measure(budget, options.families)
    print(table(options.since), *failures("tests"), sep="\n")
    if failed:
        sys.exit(f"failed or not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
