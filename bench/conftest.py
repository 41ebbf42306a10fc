"""The benchmarks' options and the fixture ``side_by_side``, on top of pytest-benchmark."""

from __future__ import annotations

import time

import machine
import pytest
import torch
from harness import Case, Contest, keep_freed_memory


def pytest_addoption(parser):
    group = parser.getgroup("side by side")
    group.addoption("--rounds", type=int, default=25, help="times each candidate runs, at most (default: 25)")
    group.addoption("--threads", type=int, default=None, help="on a CPU (default: torch's number)")
    group.addoption("--seconds", type=float, help="after which no case begins (default: there is no end)")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)")


DEADLINE = pytest.StashKey[float]()


def pytest_configure(config):
    keep_freed_memory()
    config.stash[DEADLINE] = time.monotonic() + (config.getoption("--seconds") or float("inf"))
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_benchmark_update_machine_info(config, machine_info):
    device = config.getoption("--device")
    machine_info["side_by_side"] = {**machine.describe(device), "peaks": machine.peaks(device)}


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def side_by_side(request, benchmark, device):
    """A function of one :class:`harness.Case` that checks it and measures all its candidates in turns.

    pytest-benchmark's own figures are ours; everyone's are in its ``extra_info``, which ``compare.py`` reads.
    """

    def measure(case: Case) -> None:
        if time.monotonic() > request.config.stash[DEADLINE]:
            pytest.fail("the time is over: not measured", pytrace=False)
        case.check()
        contest = Contest(case, device)
        rounds = contest.rounds(request.config.getoption("--rounds"))
        contest.begin(rounds)
        benchmark.pedantic(contest.our_turn, setup=contest.rivals_turn, rounds=rounds, iterations=1, warmup_rounds=0)
        benchmark.extra_info.update(contest.results())

    torch.manual_seed(0)
    return measure
