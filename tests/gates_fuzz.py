"""Triton's kernels compiled in every form that random and odd calls launch, for chips that need not be here.

``python tests/gates_fuzz.py [--count N] [--no-odd] [OP ...]`` makes on meta tensors, for sm_80 and sm_90, the
calls that the tests on a GPU draw (or the first N of them), and those of tests/odd_calls.py. It prints what is wrong
with a launch, and ends with status 1 where one does not compile, spills registers, multiplies float32 as tf32 or needs
more shared memory than the chip has. The calls of ``bench/triton_<family>.py`` launch few of these forms: a number that
is 1 is a constant to Triton, a multiple of 16 is another form, as is each dtype, layout and kind.

It takes an hour or two, or minutes where Triton's cache holds the kernels.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from gates import CHIPS, MOST_SHARED, compiling, examine  # isort: skip (turns the interpreter off)

import fuzz
import machine_code
from odd_calls import odd_calls

import dalle_kernels

SERVED = 8
"""Among so many more calls are those that the tests on a GPU capture."""


def ops() -> list[str]:
    """All that have a kernel of Triton's, wherever it runs."""
    return sorted(name for name, op in dalle_kernels.ops().items() if any(p.name == "triton" for p in op.providers))


def random_calls(op: str, count: int) -> Iterator[tuple[str, tuple]]:
    """What the tests on a GPU draw: a name, and the arguments."""
    keys = [f"{op} 0 {index}" for index in range(count)] + [f"{op} {index}" for index in range(min(count, SERVED))]
    for key in keys:
        yield f"random call {key!r}", fuzz.drawn(op, random.Random(key)).args


def origin(error: BaseException) -> str:
    """What went wrong first: Triton's compiler tells of it line by line of the callers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def compile_calls(op: str, architecture: int, count: int, odd: bool) -> tuple[int, list[str]]:
    """In how many forms the op's calls launch kernels, and what is wrong with them."""
    (provider,) = (provider for provider in dalle_kernels.ops()[op].providers if provider.name == "triton")
    calls = list(random_calls(op, count))
    if odd:
        calls += [(f"odd call {number}", args) for number, args in enumerate(odd_calls(op))]
    faults, examined = [], set()
    with compiling(architecture) as found:
        for call, args in calls:
            if provider.unsupported(*args) is not None:
                continue
            try:
                provider.run(*fuzz.copied(args, "meta"))
            except Exception as error:
                faults.append(f"{call}: {origin(error)}")
            for form in found.keys() - examined:
                name, kernel = found[form]
                faults += [
                    f"{call}, {name}: {wrong}" for wrong in examine(kernel).own_faults(MOST_SHARED[architecture])
                ]
            examined |= found.keys()
    return len(found), faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="names of ops (default: all that Triton serves)")
    parser.add_argument("--count", type=int, default=16, help="random calls of each op (default: %(default)s)")
    parser.add_argument("--no-odd", action="store_true", help="leave out the calls of tests/odd_calls.py")
    options = parser.parse_args()
    faulty = False
    with ProcessPoolExecutor(machine_code.PROCESSES, get_context("spawn")) as pool:
        jobs = [
            (op, architecture, pool.submit(compile_calls, op, architecture, options.count, not options.no_odd))
            for op in options.ops or ops()
            for architecture in CHIPS
        ]
        for op, architecture, job in jobs:
            forms, faults = job.result()
            print(f"{op} on sm_{architecture}: {forms} forms compiled", *(f"  FAILED {f}" for f in faults), sep="\n")
            sys.stdout.flush()
            faulty |= bool(faults)
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
