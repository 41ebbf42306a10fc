"""The benchmarks' options and the fixture ``side_by_side``, on top of pytest-benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import machine
import pytest
import torch
from harness import Case, Contest, keep_freed_memory
from turns import Turns


def pytest_addoption(parser):
    group = parser.getgroup("side by side")
    group.addoption("--rounds", type=int, default=25, help="times each candidate runs, at most (default: 25)")
    group.addoption("--threads", type=int, default=None, help="on a CPU (default: torch's number)")
    group.addoption("--seconds", type=float, help="after which no case begins (default: there is no end)")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)")
    group.addoption("--turns", type=Path, help="a file beside which processes that share a GPU lock its use")


DEADLINE = pytest.StashKey[float]()
TURNS = pytest.StashKey[Turns]()
PEAKS = pytest.StashKey[dict[str, float]]()


def pytest_configure(config):
    keep_freed_memory()
    config.stash[DEADLINE] = time.monotonic() + (config.getoption("--seconds") or float("inf"))
    config.stash[TURNS] = Turns(config.getoption("--turns"))
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["side_by_side"] = {**machine.describe(config.getoption("--device")), "peaks": peaks(config)}


def peaks(config: pytest.Config) -> dict[str, float]:
    """The machine's, measured once: a run that its time ends must not begin to."""
    if PEAKS not in config.stash:
        turns = config.stash[TURNS]
        with turns.preparing(), turns.measuring():
            config.stash[PEAKS] = turns.once("peaks", partial(machine.peaks, config.getoption("--device")))
    return config.stash[PEAKS]


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def side_by_side(request, benchmark, device) -> Iterator[Callable[[Case], None]]:
    """A function of one :class:`harness.Case` that checks it and measures all its candidates in turns.

    pytest-benchmark's own figures are ours; everyone's are in its ``extra_info``, which ``compare.py`` reads.
    """

    def finish() -> None:
        """Leave the GPU to the others."""
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def measure(case: Case) -> None:
        if time.monotonic() > request.config.stash[DEADLINE]:
            pytest.fail("the time is over: not measured", pytrace=False)
        case.check()
        contest = Contest(case, device)
        if turns.shared:
            contest.call_all()
            finish()
        with turns.measuring():
            rounds = contest.rounds(request.config.getoption("--rounds"))
            contest.begin(rounds)
            benchmark.pedantic(
                contest.our_turn, setup=contest.rivals_turn, rounds=rounds, iterations=1, warmup_rounds=0
            )
        benchmark.extra_info.update(contest.results())

    peaks(request.config)
    torch.manual_seed(0)
    turns = request.config.stash[TURNS]
    with turns.preparing():
        yield measure
        if turns.shared:
            finish()
