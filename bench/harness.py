"""What every benchmark shares: candidates measured in turn in one process, quantiles, the machine, results as JSON.

A time is only taken after the candidates passed their check on the very inputs that are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dalle_kernels
from dalle_kernels import _native

RESULTS = Path(__file__).resolve().parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on CPU (default: torch's number)")
    parser.add_argument("--rounds", type=int, default=25, help="times each candidate runs (default: %(default)s)")
    return parser


def machine(device: str) -> dict[str, object]:
    """Where the figures come from, the load of other work on it included."""
    found: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dalle_kernels": dalle_kernels.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found["cuda"] = torch.version.cuda
    else:
        found["threads"] = torch.get_num_threads()
        found["instruction_set"] = _native.unavailable("cpu") or _native.instruction_sets()[2]
    return found


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_time = time.perf_counter()
    run()
    return time.perf_counter() - begin_time


def measure(
    candidates: dict[str, Callable[[], object]], *, check: Callable[[], None], device: str, rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of each candidate, as median and quantiles of ``rounds`` runs that take turns.

    Taking turns spreads whatever else the machine does over all of them. ``check`` raises when a result is wrong; it
    runs first, so that no time is ever shown for wrong work.
    """
    check()
    for run in candidates.values():  # warm up: allocations, thread pools, compilation
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(_seconds(run, device) * 1e3)
    return {name: _quantiles(values) for name, values in times.items()}


def _quantiles(values: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median_ms": statistics.median(values), "p10_ms": tenths[0], "p90_ms": tenths[-1]}


def report(name: str, device: str, cases: list[dict[str, object]]) -> Path:
    """Write ``bench/results/<name>-<device>.json`` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device}.json"
    path.write_text(json.dumps({"machine": machine(device), "cases": cases}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
