"""``python -m dalle_kernels``: versions, instruction sets, GPUs, each op's providers, which one runs here and why."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import dalle_kernels
from dalle_kernels import _native, _triton

DEVICE_TYPES = ("cpu", "cuda")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process (Linux; empty where that cannot be told)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))


def versions() -> Iterator[tuple[str, str]]:
    yield "dalle_kernels", f"{dalle_kernels.__version__} at {Path(dalle_kernels.__file__).parent}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"


def processor() -> Iterator[tuple[str, str]]:
    reason = _native.unavailable("cpu")
    if reason is not None:
        yield "CPU library", reason
    else:
        built, available, used = _native.instruction_sets()
        forced = " (DALLE_KERNELS_ISA)" if os.environ.get(_native.ISA_ENVIRONMENT_VARIABLE) else ""
        yield "CPU library", f"uses {used}{forced}"
        yield "", f"built: {', '.join(built)}; this processor runs: {', '.join(available)}"
    yield "threads", f"{torch.get_num_threads()} (torch.get_num_threads())"
    runtimes = ", ".join(openmp_runtimes()) or "none found"
    if reason is None and not _native.library("cpu").has_openmp():
        runtimes += "; the CPU library cannot use it and runs on one thread"
    yield "OpenMP", runtimes


def gpus() -> Iterator[tuple[str, str]]:
    reason = _native.unavailable("cuda")
    if reason is not None:
        yield "CUDA library", reason
    else:
        version = _native.library("cuda").runtime_version()
        yield "CUDA library", f"CUDA runtime {version // 1000}.{version % 1000 // 10}"
    reason = _triton.unavailable("cuda")
    yield "Triton", "; ".join(filter(None, (_triton.version(), reason)))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield f"GPU {index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"


def op_rows(device_types: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, op in sorted(dalle_kernels.ops().items()):
        providers = ", ".join(provider.name for provider in op.providers)
        for device_type in device_types:
            if device_type == "cuda" and not torch.cuda.is_available():
                yield name, providers, device_type, "-", "torch finds no CUDA GPU"
                continue
            found = dalle_kernels.explain(name, device_type=device_type)
            reasons = "; ".join(f"{provider}: {reason}" for provider, reason in found.reasons)
            yield name, providers, device_type, found.runs or "nothing", reasons


def table(rows: list[tuple[str, ...]]) -> str:
    """Plain columns, as wide as their longest entry; the last one is left ragged."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dalle_kernels", description=__doc__)
    parser.parse_args(argv)
    try:
        print(table([*versions(), *processor(), *gpus()]))
        header = ("op", "providers", "device", "runs", "why no other")
        print("\n" + table([header, *op_rows(DEVICE_TYPES)]), flush=True)
    except BrokenPipeError:  # The reader of our output has left, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (_native.NativeError, dalle_kernels.ProviderError) as error:
        print(f"dalle_kernels: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
