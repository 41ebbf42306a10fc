"""Which machine the figures come from, and what it can do at most: the peaks that floors are made of."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.linear.products import product

_ROUNDS = 9


def describe(device: str) -> dict[str, object]:
    """The machine and its software, the load of other work on it included."""
    found: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dalle_kernels": dalle_kernels.__version__,
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found["cuda"] = torch.version.cuda
    else:
        found["threads"] = torch.get_num_threads()
        found["instruction_set"] = _native.unavailable("cpu") or _native.instruction_sets()[2]
    return found


def slug(machine: dict[str, object]) -> str:
    """A name for files, such as ``amd-epyc-avx2-2-threads``."""
    if "gpu" in machine:
        parts = str(machine["gpu"])
    else:
        parts = f"{machine['processor']} {machine['instruction_set']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", parts.lower())).strip("-")


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _best_seconds(run: Callable[[], object], device: str) -> float:
    """The best of nine runs, or of as many as half a second holds."""
    best, start, done = float("inf"), time.perf_counter(), 0
    while done < _ROUNDS or time.perf_counter() - start < 0.5:
        done += 1
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def product_rate(dtype: torch.dtype, device: str, multiply: Callable[..., object] = torch.mm) -> float:
    """Operations a second of a square product; of a small one where a large 16-bit one would take seconds."""
    rate = 0.0
    for size in (256, 8192 if device == "cuda" else 1536):
        if dtype != torch.float32 and rate and 2 * size**3 / rate > 1:
            break
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rate = 2 * size**3 / _best_seconds(lambda a=a, b=b, out=out: multiply(a, b, out=out), device)
    return rate


def peaks(device: str) -> dict[str, float]:
    """Operations a second of a large matrix product in each dtype, bytes a second of a large copy and out of the cache.

    Each is the best of nine or more. On a CPU a float32 product is the faster one of torch's and ours. The copy reads
    and writes; both count. Out of the cache 4 MiB are read, by the faster of a sum and a matrix-vector product.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[f"gemm_{str(dtype).removeprefix('torch.')}_per_s"] = product_rate(dtype, device)
    if device == "cpu":
        found["gemm_float32_per_s"] = max(found["gemm_float32_per_s"], product_rate(torch.float32, device, product))
    source = torch.ones(1 << (30 if device == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    found["copy_bytes_per_s"] = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)
    matrix, vector = source[: 1 << 20].view(1 << 10, 1 << 10), source[: 1 << 10]
    found["cache_bytes_per_s"] = matrix.nbytes / min(
        _best_seconds(run, device) for run in (lambda: torch.mv(matrix, vector), matrix.sum)
    )
    return found


def floor_ms(case: dict, peaks: dict[str, float]) -> float | None:
    """The least time that the case's ideal operations and bytes can take on a machine with these peaks.

    16-bit work may go at the float32 rate where that is the faster one: a processor without 16-bit products converts.
    """
    rate = peaks["gemm_float32_per_s"]
    if (case.get("product_dtype") or case["dtype"]) in ("bfloat16", "float16"):
        rate = max(rate, peaks["gemm_bfloat16_per_s"])
    parts = []
    if case.get("operations"):
        parts.append(case["operations"] / rate)
    if case.get("bytes_moved"):
        parts.append(case["bytes_moved"] / peaks["cache_bytes_per_s" if case.get("in_cache") else "copy_bytes_per_s"])
    return max(parts) * 1e3 if parts else None
