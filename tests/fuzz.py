"""Kernels against the reference on random shapes, strides, dtypes and numbers of threads.

``python tests/fuzz.py [--seed S] [--count N] [OP ...]`` draws N calls of each op with the given seed (by default one of
its own, which is printed) under the instruction set that the environment gives, and ends with status 1 where the error
rule is broken, an output's bits depend on the number of threads, an input is changed or an output is not written whole.
``--provider triton`` tries Triton's kernels: on the GPU where there is one, else by the interpreter.

Each family has one function in tests/fuzz_calls.py that draws a call of its ops. An op with a native provider and none
there is an error, so a new family cannot be forgotten.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import interpreter
import torch
from fuzz_calls import SAMPLERS, Call, as_tuple, is_list, largest
from torch import Tensor

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.testing import ErrorReport, measure_errors, poisoned_allocations


def ops_of(provider: str, device: str) -> list[str]:
    """The ops that this provider serves here on "cpu" or "cuda"."""
    found = dalle_kernels.ops().values()
    return sorted(
        op.name for op in found if any(p.name == provider and p.unavailable(device) is None for p in op.providers)
    )


def drawn(op: str, draw: random.Random, samplers: Mapping[str, Callable] = SAMPLERS) -> Call:
    """A call of the op, which ``draw`` alone decides on."""
    torch.manual_seed(draw.getrandbits(32))
    return samplers[op](op, draw)


@dataclass
class Findings:
    """What was found for one op; ``reports`` holds one for each output and dtype, over all calls together."""

    op: str
    served: int = 0
    served_otherwise: int = 0
    reports: list[ErrorReport] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.served > 0 and not self.mistakes and all(report.passed for report in self.reports)

    def __str__(self) -> str:
        lines = [f"{self.op}: {'passed' if self.passed else 'FAILED'}, {self.served} calls of the kernel"]
        if self.served_otherwise:
            lines[0] += f", {self.served_otherwise} that only the reference serves"
        lines += [f"  {mistake}" for mistake in self.mistakes[:3]]
        if len(self.mistakes) > 3:
            lines.append(f"  and {len(self.mistakes) - 3} more")
        lines += [f"  {report}" for report in self.reports if not report.passed]
        return "\n".join(lines)


def copied(args: tuple, device: str | None = None) -> tuple:
    """Copies in the same layout, NaN between rows included, so that a call can be made again with the same inputs."""
    return tuple(
        copied(arg, device) if is_list(arg) else _copy(arg, device) if isinstance(arg, Tensor) else arg for arg in args
    )


def _copy(tensor: Tensor, device: str | None) -> Tensor:
    count = tensor.untyped_storage().nbytes() // tensor.itemsize
    whole = tensor.as_strided((count,), (1,), 0).clone().to(device or tensor.device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def flat(args: tuple) -> list[Tensor]:
    return [t for arg in args for t in (flat(arg) if is_list(arg) else [arg] if isinstance(arg, Tensor) else [])]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(_INTEGERS[a.itemsize]), b.view(_INTEGERS[b.itemsize]))


def run(op: dalle_kernels._dispatch.Op, provider: str, args: tuple, device: str = "cpu") -> tuple[Tensor, ...]:
    """The outputs, and the arguments that the op writes, after a call on copies on the device."""
    writes = [
        argument.alias_info is not None and argument.alias_info.is_write for argument in op.overload._schema.arguments
    ]
    args = copied(args, device)
    before = copied(args)
    with dalle_kernels.use(provider), poisoned_allocations():
        output = as_tuple(op(*args))
    for written, argument, earlier in zip(writes, args, before, strict=True):
        for now, then in zip(flat((argument,)), flat((earlier,))):
            if not written and not same_bits(now, then):
                raise AssertionError("an input was changed")
    return *flat(output), *flat(tuple(a for w, a in zip(writes, args) if w))


def fuzz(name: str, count: int, seed: int, provider: str = "native", device: str = "cpu") -> Findings:
    """Draw ``count`` calls of an op and hold the provider to the error rule over all of them together.

    The exact results are those of the CPU on every device, so noise must be the CPU's as well.
    """
    op, found = dalle_kernels.ops()[name], Findings(name)
    results: dict[tuple[int, torch.dtype], list[tuple[Tensor, ...]]] = defaultdict(list)
    threads = torch.get_num_threads()
    for index in range(count):
        draw = random.Random(f"{name} {seed} {index}")
        call = drawn(name, draw)
        with dalle_kernels.use(provider):
            serves = dalle_kernels.explain(name, *copied(call.args, device)).runs == provider
        if not serves:
            found.served_otherwise += 1
            continue
        found.served += 1
        where = f"call {index} of seed {seed}"
        try:
            torch.set_num_threads(draw.choice((1, 2, 3)))
            actual = run(op, provider, call.args, device)
            if not call.products:
                torch.set_num_threads(draw.choice((1, 2, 4)))
            again = run(op, provider, call.args, device)
            torch.set_num_threads(threads)
            if call.plain is not None and (provider == "triton" or device == "cuda"):
                plain = call.plain(device)
            else:
                plain = run(op, "reference", call.args, "cpu" if call.bits else device)
            exact = plain if call.bits else run(op, "reference", call.exact)
            if not all(map(same_bits, actual, again)):
                found.mistakes.append(f"{where}: the bits depend on the number of threads or on the run")
            for output, (a, p, e) in enumerate(zip(*map(on_cpu, (actual, plain, exact)), strict=True)):
                if (a.shape, a.dtype) != (p.shape, p.dtype):
                    found.mistakes.append(f"{where}: output {output} is {a.dtype} {list(a.shape)}")
                elif call.bits or not a.is_floating_point():
                    if not same_bits(a, p):
                        found.mistakes.append(f"{where}: output {output} differs from the reference")
                else:
                    terms = call.terms[output] if call.terms else 0.0
                    results[output, a.dtype].append(_scaled(a, p, e, terms))
        except Exception as error:
            found.mistakes.append(f"{where}: {type(error).__name__}: {error}")
        finally:
            torch.set_num_threads(threads)
    for (output, dtype), draws in results.items():
        try:
            found.reports.append(measure_errors(*map(list, zip(*draws)), f"output {output}, {dtype}"))
        except AssertionError as error:
            found.mistakes.append(str(error))
    return found


def _scaled(actual: Tensor, plain: Tensor, exact: Tensor, terms: float) -> tuple[Tensor, Tensor, Tensor]:
    """With a largest value, or ``terms``, of about 1 (by a power of two), so that no call outweighs the others."""
    finite = exact[exact.isfinite()]
    factor = 2.0 ** -max(-100, min(100, math.frexp(max(largest(finite), terms))[1]))
    return tuple((tensor * factor).flatten() for tensor in (actual, plain, exact))


def on_cpu(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.cpu() for tensor in results]


def prepare_triton() -> tuple[str, str]:
    """Where Triton's kernels run here, and in words; without a GPU the interpreter is turned on."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.mend()
    return "cpu", "Triton's interpreter"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="names of ops (default: all that have a kernel)")
    parser.add_argument("--provider", choices=("native", "triton"), default="native", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="(default: any)")
    parser.add_argument("--count", type=int, default=50, help="calls of each op (default: %(default)s)")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*deterministic")
    device = "cpu"
    if args.provider == "native":
        library = f"instruction set {_native.instruction_sets()[2]}, library {_native.library('cpu').__file__}"
    else:
        device, library = prepare_triton()
    print(f"seed {args.seed}, {library}")
    failed = 0
    for name in args.ops or ops_of(args.provider, device):
        if name not in SAMPLERS:
            print(f"{name}: FAILED, no function in tests/fuzz_calls.py draws its arguments")
            failed += 1
            continue
        found = fuzz(name, args.count, args.seed, args.provider, device)
        failed += not found.passed
        print(found, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
