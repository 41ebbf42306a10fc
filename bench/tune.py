"""Choose the configurations of Triton's kernels on the GPU at hand: what ``make tune`` runs.

    python bench/tune.py                the rows of every family
    python bench/tune.py float16        of one

A row of ``dalle_kernels/_triton_configurations.py`` is decided by one case, if any yet, of
``bench/triton_<family>.py``: its candidates take turns, and the last lines printed are the entries to write into the
table, with the figures that chose them. Where a call launches by several rows, all but one are as the table has them.
Everything is compiled beforehand, in as many processes as there are cores, into Triton's cache.
Tune what passes the tests: nothing is checked here. That no candidate spills ``make gates CANDIDATES=1`` checks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch
from harness import Candidate, device_seconds, host_seconds
from triton_cases import Case, cases, described, families

from dalle_kernels import _triton
from dalle_kernels._triton_configurations import Configuration, use_configuration

ROUNDS = 15


def measure(call: Callable[[], object], row: tuple[str, str], candidates: Sequence[Configuration]) -> dict[int, float]:
    """The median time of each candidate that runs, by its number; each round starts one further along than the last."""
    times, hosts = {}, {}
    for number, candidate in enumerate(candidates):
        with use_configuration(*row, candidate):
            try:
                device_seconds(call)
            except Exception as error:  # too much shared memory or too many registers for this chip
                print(f"  {described(candidate)}: {str(error).splitlines()[0]}")
                continue
            hosts[number] = host_seconds(Candidate(described(candidate), call))
        times[number] = []
    for turn in range(ROUNDS):
        order = list(times)
        for number in order[turn % len(order) :] + order[: turn % len(order)] if order else ():
            with use_configuration(*row, candidates[number]):
                times[number].append(1e3 * device_seconds(call, host=hosts[number]))
    return {number: median(taken) for number, taken in times.items()}


def compile_candidate(family: str, name: str, row: tuple[str, str], number: int, architecture: int) -> None:
    """Run one candidate once, for what Triton then has in its cache; one that fails is reported when it is measured."""
    (case,) = (case for case in cases(family) if case.name == name)
    try:
        with use_configuration(*row, case.candidates(row, architecture)[number]):
            case.prepare("cuda")()
    except Exception:
        torch.cuda.empty_cache()


def compile_all(chosen: Sequence[str], architecture: int) -> None:
    jobs = [
        (family, case.name, row, number, architecture)
        for family in chosen
        for case in cases(family)
        for row in case.rows
        for number in range(len(case.candidates(row, architecture)))
    ]
    print(f"compiling {len(jobs)} candidates", flush=True)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        list(processes.map(compile_candidate, *zip(*jobs)))


def rate(case: Case, took: float) -> str:
    parts = []
    if case.bytes_moved:
        parts.append(f"{case.bytes_moved / took / 1e9:.2f} TB/s")
    if case.operations:
        parts.append(f"{case.operations / took / 1e9:.0f} TFLOP/s")
    return ", ".join(parts)


def entry(case: Case, row: tuple[str, str], chosen: Configuration, took: float, architecture: int) -> str:
    """A line for the table."""
    parts = torch.cuda.get_device_name(), f"{took:.4f} ms", rate(case, took), time.strftime("%Y-%m-%d")
    figure = ", ".join(filter(None, parts))
    options = [repr(dict(chosen.blocks)), f"num_warps={chosen.num_warps}", f"num_stages={chosen.num_stages}"]
    options += [f"maxnreg={chosen.maxnreg}"] if chosen.maxnreg is not None else []
    options.append(f"figure={figure!r}")
    return f"{row}: {{{architecture}: Configuration({', '.join(options)})}}".replace("'", '"')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help=f"of {', '.join(families())} (default: all)")
    options = parser.parse_args()
    reason = _triton.unavailable("cuda")
    if reason is not None:
        sys.exit(f"make tune: {reason}, so there is nothing to measure; stopping.")
    architecture = _triton.architecture(torch.device("cuda", torch.cuda.current_device()))
    chosen = options.families or families()
    compile_all(chosen, architecture)
    entries = []
    for family in chosen:
        for case in cases(family):
            call = case.prepare("cuda") if case.rows else None
            for row in case.rows:
                print(f"{case.name}: {' '.join(row)}", flush=True)
                candidates = case.candidates(row, architecture)
                times = measure(call, row, candidates)
                for number in sorted(times, key=times.get):
                    took = times[number]
                    print(f"  {described(candidates[number])}: {took:.4f} ms {rate(case, took)}", flush=True)
                if times:
                    best = min(times, key=times.get)
                    entries.append(entry(case, row, candidates[best], times[best], architecture))
    print("\nfor dalle_kernels/_triton_configurations.py:", *entries, sep="\n")


if __name__ == "__main__":
    main()
