"""Every compiled kernel against the reference: fuzzed calls under each instruction set, and calls from many threads."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz
import fuzz_calls
import pytest
import torch

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels._dispatch import Op

NATIVE = _native.unavailable("cpu") is None
pytestmark = pytest.mark.skipif(not NATIVE, reason="the compiled library is not built")
AVAILABLE = _native.instruction_sets()[1] if NATIVE else []
OPS = fuzz.ops_of("native", "cpu") if NATIVE else []


def test_every_op_with_a_compiled_kernel_is_fuzzed():
    assert set(OPS) <= fuzz.SAMPLERS.keys()


@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_fuzzed_calls_agree_with_the_reference(instruction_set):
    environment = {**os.environ, "DALLE_KERNELS_ISA": instruction_set}
    # Fewer calls would leave the largest error to luck.
    command = [sys.executable, str(Path(fuzz.__file__)), "--seed", "0", "--count", "40"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"instruction set {instruction_set}," in done.stdout
    assert all(f"{op}: passed" in done.stdout for op in OPS)


def tripled(x):
    return x * 3


def wrong_in_one_place(x):
    y = x * 3
    if y.numel() > 1:
        y.view(-1)[-1] *= 1.001
    return y


def one_element_unwritten(x):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y.view(-1)[:-1] = x.reshape(-1)[:-1] * 3
    return y


def input_changed(x):
    y = x * 3
    x.zero_()
    return y


def by_threads(x):
    return x * 3 + 1e-7 * torch.get_num_threads()


def wrong_dtype(x):
    return x.double() * 3


@pytest.mark.parametrize(
    ("kernel", "finding"),
    [
        (tripled, None),
        (wrong_in_one_place, "largest error"),
        (one_element_unwritten, "not finite"),
        (input_changed, "an input was changed"),
        (by_threads, "the bits depend on the number of threads"),
        (wrong_dtype, "output 0 is torch.float64"),
    ],
)
def test_the_fuzz_finds_mistakes(kernel, finding, monkeypatch):
    op = Op(f"test_tripled_{uuid.uuid4().hex}(Tensor x) -> Tensor", torch.empty_like)
    op.provide("native", kernel)
    op.provide("reference", tripled)

    def call(_op: str, draw: random.Random) -> fuzz_calls.Call:
        return fuzz_calls.Call((fuzz_calls.laid_out(draw, torch.randn(fuzz_calls.shape_of(draw, 1, 3))),))

    monkeypatch.setitem(fuzz.SAMPLERS, op.name, call)
    try:
        found = fuzz.fuzz(op.name, 20, seed=0)
    finally:
        del dalle_kernels._dispatch.OPS[op.name]
    assert found.served == 20
    assert found.passed == (finding is None)
    assert finding is None or finding in str(found)


def test_calls_from_many_threads_at_once_agree_with_calls_one_by_one():
    draws = [(name, random.Random(f"{name} {index}")) for index in range(12) for name in OPS]
    calls = [(name, fuzz.SAMPLERS[name](name, draw)) for name, draw in draws]
    calls = [(name, call) for name, call in calls if dalle_kernels.explain(name, *call.args).runs == "native"]

    def run(case):
        name, call = case
        output = dalle_kernels.ops()[name](*fuzz.copied(call.args))
        return fuzz.flat(output if isinstance(output, (list, tuple)) else (output,))

    expected = [run(case) for case in calls]
    with ThreadPoolExecutor(6) as pool:
        for round_ in range(3):
            for got, wanted in zip(pool.map(run, calls), expected, strict=True):
                assert all(map(fuzz.same_bits, got, wanted)), round_


def test_any_number_of_threads_serves():
    library = _native.library("cpu")
    x = torch.randn(200_000)
    expected = dalle_kernels.encode_fp169(x)
    for threads in (0, 1, 2, 7, 64, 1000, 2**40 + 3):
        codes, nonfinite = torch.zeros(x.shape, dtype=torch.int16), torch.ones((), dtype=torch.bool)
        library.float16_encode(
            input=x.data_ptr(),
            dtype=0,
            sizes=x.shape,
            strides=x.stride(),
            codes=codes.data_ptr(),
            nonfinite=nonfinite.data_ptr(),
            format=0,
            executor=threads,
        )
        assert torch.equal(codes, expected) and not nonfinite, threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_runs_kernels_on_one_thread():
    # After a fork libgomp's other threads are gone, and a parallel region hangs, torch's own as well. So data loaders
    # set one thread in their workers; then kernels must run in them too.
    code = (
        "import os, torch, dalle_kernels\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(1 << 20); expected = dalle_kernels.encode_fp169(x)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(dalle_kernels.encode_fp169(x), expected) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr
