"""What every benchmark shares: a case, candidates that take turns in one process, medians, memory, floors and goals.

A benchmark hands a :class:`Case` to the fixture ``side_by_side`` of ``conftest.py``. Its check runs first, so that no
time is ever taken of wrong work; then every round times each rival once and ours once, so that whatever else the
machine does is spread over all of them.

Memory that a call frees is kept for the next one (:func:`keep_freed_memory`).

Peak memory is the growth of the process's resident memory during one call after a warm one: freed memory is given back
to the system first (``malloc_trim``), the kernel's high-water mark is reset through ``/proc/self/clear_refs`` and read
from ``VmHWM`` afterwards. It holds what a call returns; ``result_bytes`` says how much of it that is. The kernel counts
it in steps of up to some hundred KiB. On CUDA it is the allocator's own peak.

On CUDA a call's time is the device's, and ``host_ms`` says how long the host was busy launching it.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import dalle_kernels

OURS = "dalle_kernels"
BEST_RIVAL = "the best rival of the same function"
LEAST_ROUNDS = 5
SLOW, SLOW_ROUNDS = 2.0, 3
"""A rival that takes more seconds than this takes part in so many rounds only; where we do, there are no more."""


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    ``run`` does it once and returns its results; ``before`` prepares a call and is not timed. One call makes ``units``
    of what the case counts, tokens say; times are those of one unit. ``same_function`` is False for what computes
    something else, and its name or note says what. ``seconds`` tells how long the last call took, where the clock of
    this process cannot.
    """

    name: str
    run: Callable[[], object]
    before: Callable[[], object] | None = None
    units: int = 1
    same_function: bool = True
    note: str = ""
    seconds: Callable[[], float] | None = None


def by_provider(provider: str, run: Callable[[], object]) -> Candidate:
    """Our own work by one of the providers, whichever a call would choose."""

    def forced() -> object:
        with dalle_kernels.use(provider):
            return run()

    return Candidate(f"{OURS}, {provider}", forced)


def by_triton(device: str, run: Callable[[], object]) -> list[Candidate]:
    """Our own work by Triton on a GPU, where it may not be the default; nothing on a CPU."""
    return [by_provider("triton", run)] if device == "cuda" else []


@dataclass(frozen=True)
class Unavailable:
    """A rival that cannot run here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Goal:
    """A bound from the goals on one measure of a case.

    ``measure`` is "speed" (time of ``against`` over ours), "memory" (peak memory beyond the results, of ours over that
    of ``against``), "extra bytes" (that of ours), "share" (floor over time), "milliseconds" or "rate" (units a second).
    ``against`` is a candidate's name or BEST_RIVAL.
    """

    measure: str
    bound: float
    against: str | None = None


@dataclass
class Case:
    """One row of the results: a work of a family with its settings, who does it, and what it is held to.

    ``check`` raises unless the work passed the error rule on these inputs. ``operations`` (floating point, ideal) and
    ``bytes_moved`` (ideal), of one unit, make the floor; ``unit`` is a unit's name where a call makes several. The
    operations are of ``dtype``, or of ``product_dtype``; ``in_cache`` says that the bytes come from the processor's
    cache. ``calls`` is how many calls one round times, for work too short for a clock. ``seconds`` is about how long
    the rounds take in all.
    """

    family: str
    work: str
    dtype: torch.dtype | None
    settings: dict[str, object]
    ours: Candidate
    rivals: Sequence[Candidate | Unavailable]
    check: Callable[[], object]
    goals: Sequence[Goal] = ()
    operations: float | None = None
    product_dtype: torch.dtype | None = None
    bytes_moved: float | None = None
    in_cache: bool = False
    unit: str = ""
    calls: int = 1
    memory: bool = True
    seconds: float = 6.0

    def describe(self) -> dict[str, object]:
        """All that is known before anything is measured, for the results file."""
        return {
            "family": self.family,
            "work": self.work,
            "dtype": _name(self.dtype),
            "product_dtype": _name(self.product_dtype),
            "settings": self.settings,
            "operations": self.operations,
            "bytes_moved": self.bytes_moved,
            "in_cache": self.in_cache,
            "unit": self.unit,
            "goals": [asdict(goal) for goal in self.goals],
        }


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def run_in_turns(
    candidates: Sequence[Candidate], slow: set[str], rounds: int, run: Callable[[Candidate], None]
) -> Iterator[int]:
    """A generator of rounds: each runs every candidate once, starting one further along than the round before.

    Those of a ``slow`` name take part in the first SLOW_ROUNDS only.
    """
    for turn in range(rounds):
        first = turn % max(1, len(candidates))
        for candidate in (*candidates[first:], *candidates[:first]):
            if turn < SLOW_ROUNDS or candidate.name not in slow:
                run(candidate)
        yield turn


class Contest:
    """The candidates of one case and the seconds they took, ours apart: its turn comes at the end of each round."""

    def __init__(self, case: Case, device: str = "cpu"):
        self.case, self.device = case, device
        self.rivals = [rival for rival in case.rivals if isinstance(rival, Candidate)]
        self.unavailable = [rival for rival in case.rivals if isinstance(rival, Unavailable)]
        self.seconds: dict[str, list[float]] = {case.ours.name: []} | {rival.name: [] for rival in self.rivals}
        if len(self.seconds) != 1 + len(self.rivals):
            raise ValueError(f"expected candidates of different names, got {[rival.name for rival in self.rivals]}")
        self.memory: dict[str, dict[str, int]] = {}
        self.host: dict[str, float] = {}
        self.slow: set[str] = set()
        self._turns: Iterator[int] = iter(())

    def warm_up(self, candidate: Candidate) -> float:
        """The first calls (compilation, thread pools), which also take its memory; the seconds of its turn in a round.

        Memory is that of the second call, without what only a first one needs; who is slow is called once.
        """
        for _ in range(2 if self.case.memory else 0):
            begin = time.perf_counter()
            self.memory[candidate.name] = peak_memory(candidate, self.device)
            seconds = time.perf_counter() - begin
            if seconds > SLOW:
                return seconds
        if self.device == "cuda":
            self.host[candidate.name] = min(host_seconds(candidate) for _ in range(3))
        return self.clock(candidate) * candidate.units * self.case.calls

    def call_all(self) -> None:
        """Everyone's first call, for what it compiles."""
        for candidate in (self.case.ours, *self.rivals):
            if candidate.before is not None:
                candidate.before()
            candidate.run()

    def rounds(self, most: int) -> int:
        """How many rounds fit the case's time, at most ``most`` and at least LEAST_ROUNDS; who is slow takes fewer."""
        turns = {candidate.name: self.warm_up(candidate) for candidate in (self.case.ours, *self.rivals)}
        self.slow = {name for name, seconds in turns.items() if seconds > SLOW}
        if self.case.ours.name in self.slow:
            return min(most, SLOW_ROUNDS)
        fast = sum(seconds for name, seconds in turns.items() if name not in self.slow)
        return min(most, max(LEAST_ROUNDS, int(self.case.seconds / max(fast, 1e-9))))

    def begin(self, rounds: int) -> None:
        self._turns = run_in_turns(self.rivals, self.slow, rounds, lambda rival: self._record(rival, self.clock(rival)))

    def rivals_turn(self) -> None:
        """The part of a round that comes before ours."""
        next(self._turns)

    def our_turn(self) -> None:
        self._record(self.case.ours, self.clock(self.case.ours))

    def _record(self, candidate: Candidate, seconds: float) -> None:
        self.seconds[candidate.name].append(seconds)

    def clock(self, candidate: Candidate) -> float:
        """Seconds of one unit: the mean over the units of a call and the calls that are timed at once."""
        if candidate.before is not None:
            candidate.before()
        each = candidate.units * self.case.calls
        if self.device == "cuda":
            host = self.host.get(candidate.name, 0) * self.case.calls
            return device_seconds(candidate.run, self.case.calls, host) / candidate.units
        begin_time = time.perf_counter()
        for _ in range(self.case.calls):
            candidate.run()
        took = time.perf_counter() - begin_time
        return (took if candidate.seconds is None else candidate.seconds()) / each

    def results(self) -> dict[str, object]:
        """Every candidate's quantiles and memory, and who could not run."""
        found: dict[str, object] = {}
        for candidate in (self.case.ours, *self.rivals):
            found[candidate.name] = {
                **quantiles(self.seconds[candidate.name]),
                **self.memory.get(candidate.name, {}),
                **({"host_ms": self.host[candidate.name] * 1e3} if candidate.name in self.host else {}),
                "same_function": candidate.same_function,
                "note": candidate.note,
            }
        skipped = {rival.name: rival.reason for rival in self.unavailable}
        return {**self.case.describe(), "candidates": found, "unavailable": skipped}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, first and last decile in milliseconds, and how many rounds they come from."""
    milliseconds = [value * 1e3 for value in seconds]
    if len(milliseconds) == 1:
        milliseconds *= 2
    tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return {
        "median_ms": statistics.median(milliseconds),
        "p10_ms": tenths[0],
        "p90_ms": tenths[-1],
        "rounds": len(seconds),
    }


_L2_BYTES = 1 << 28
"""More than any GPU's second-level cache holds."""
_CYCLES_A_SECOND = 2e9
"""At most, of the GPU's clock."""
_LEAST_PAUSE, _MOST_PAUSE = 1e-3, 0.1
"""Seconds; what waits for the device itself would wait for any pause."""


def device_seconds(run: Callable[[], object], calls: int = 1, host: float = 0) -> float:
    """Seconds of the GPU for one call of ``calls`` in a row, the first with a cold cache.

    The GPU is kept busy beforehand for longer than the ``host`` seconds that launching the work takes, so that launches
    do not count: a model, or a captured graph, has more work queued as well.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(int(_CYCLES_A_SECOND * min(_LEAST_PAUSE + 1.5 * host, _MOST_PAUSE)))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def host_seconds(candidate: Candidate) -> float:
    """Seconds until a call returns while the GPU has nothing else to do: those of its launches, if it never waits."""
    if candidate.before is not None:
        candidate.before()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    candidate.run()
    return time.perf_counter() - begin


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next call instead of giving it back to the system; whether it does.

    By default every large result is memory that the system must supply anew, page by page. On a virtual machine that
    takes longer than the work, and differently long each time. Every candidate is spared it alike, as on a GPU, where
    torch keeps freed memory itself.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    return bool(set_option(mmap_max, 0)) and bool(set_option(trim_threshold, -1))


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def with_gradients(
    function: Callable[..., torch.Tensor], grad_out: torch.Tensor, *tensors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The result, and the gradient of every tensor."""
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad_out)


def result_bytes(results: object) -> int:
    """Bytes of the tensors in what a call returned, each storage once."""
    storages: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    visit(results)
    return sum(storages.values())


def peak_memory(candidate: Candidate, device: str) -> dict[str, int]:
    """``peak_bytes`` that one more call adds, results included, and their ``result_bytes``; {} where not to be had."""
    if candidate.before is not None:
        candidate.before()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = candidate.run()
        torch.cuda.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "result_bytes": result_bytes(results)}
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmHWM")
    except (OSError, AttributeError):  # not Linux with glibc
        return {}
    results = candidate.run()
    return {"peak_bytes": max(0, _resident("VmHWM") - before), "result_bytes": result_bytes(results)}


def runs(candidate: Candidate, complaint: str = "it does not run here") -> Candidate | Unavailable:
    """The candidate after a first call, or why that fails."""
    try:
        if candidate.before is not None:
            candidate.before()
        candidate.run()
    except Exception as error:
        first_line = (str(error).splitlines() or [repr(error)])[0]
        return Unavailable(candidate.name, f"{complaint}: {first_line}")
    return candidate


def compiles(candidate: Candidate) -> Candidate | Unavailable:
    """The candidate after a first call, or why ``torch.compile`` fails on it here (for want of a C++ compiler, say)."""
    return runs(candidate, "it does not compile here")


def compiled(name: str, function: Callable, call: Callable[[Callable], object], **options) -> Candidate | Unavailable:
    """``call(function)``, the function under ``torch.compile``, as a candidate where it compiles."""
    return compiles(Candidate(name, partial(call, torch.compile(function, fullgraph=True, dynamic=False)), **options))
