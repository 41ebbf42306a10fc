"""Every op on an NVIDIA GPU: agreement, equal bits of two runs, the CPU's noise, CUDA graphs, no wait for a result."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import fuzz
import pytest
import torch
from fuzz_calls import OF_TENSOR_CORES, SAMPLERS
from public_calls import NOISY, STEPS

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, decode_attention

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")]
OPS = [(op, provider) for provider in ("triton", "native") for op in fuzz.ops_of(provider, "cuda")] if GPU else []
COUNTS = {"triton": 16, "native": 30}
"""Of fuzzed calls: most of those by Triton have to be compiled first."""
each_kernel = pytest.mark.parametrize(("op", "provider"), OPS)
each_step = pytest.mark.parametrize("name", STEPS)


def of_few_shapes(op: str, provider: str) -> bool:
    return provider == "native" and op in OF_TENSOR_CORES


# The others have test_attention_cuda.py and test_decode_cuda.py.
@pytest.mark.parametrize(("op", "provider"), [kernel for kernel in OPS if not of_few_shapes(*kernel)])
def test_fuzzed_calls_agree_with_the_reference_on_the_cpu_and_repeat_bit_for_bit(op, provider):
    found = fuzz.fuzz(op, COUNTS[provider], seed=0, provider=provider, device="cuda")
    assert found.passed, str(found)


def served_calls(op: str, provider: str, count: int) -> list[tuple]:
    """Arguments on the GPU of calls that the provider serves there, drawn as the fuzz draws them where it can."""
    calls = []
    for index in range(10 * count):
        samplers = OF_TENSOR_CORES if of_few_shapes(op, provider) else SAMPLERS
        args = fuzz.copied(fuzz.drawn(op, random.Random(f"{op} {index}"), samplers).args, "cuda")
        with dalle_kernels.use(provider):
            if len(calls) < count and dalle_kernels.explain(op, *args).runs == provider:
                calls.append(args)
    assert calls, "no drawn call is served by the kernel"
    return calls


def results(op: str, provider: str, args: tuple) -> list[torch.Tensor]:
    """The outputs and, for what the op writes in place, the arguments; the same memory as the call's."""
    with dalle_kernels.use(provider):
        output = dalle_kernels.ops()[op](*args)
    outputs = output if isinstance(output, (list, tuple)) else () if output is None else (output,)
    return [*fuzz.flat(tuple(outputs)), *fuzz.flat(args)]


def restore(args: tuple, originals: tuple) -> None:
    for tensor, original in zip(fuzz.flat(args), fuzz.flat(originals), strict=True):
        tensor.copy_(original)


def captured(step: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of the step, which has run once before, and the memory where its replays leave the results."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # compiles, which a capture must not
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Within the block the host must not wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_kernel
def test_a_captured_call_replays(op, provider):
    for originals in served_calls(op, provider, 4):
        expected = results(op, provider, fuzz.copied(originals))
        args = fuzz.copied(originals)
        graph, found = captured(partial(results, op, provider, args))
        for _ in range(2):
            restore(args, originals)
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(fuzz.same_bits, found, expected))


@each_step
def test_a_captured_step_of_a_public_function_replays(name):
    torch.manual_seed(3)
    step = STEPS[name]("cuda")
    expected = [step() for _ in range(3)]
    torch.manual_seed(3)
    graph, found = captured(STEPS[name]("cuda"))
    for wanted in expected[1:]:
        graph.replay()
        assert all(result.isfinite().all() for result in found if result.is_floating_point())
        if name not in NOISY:
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", NOISY)
def test_every_replay_draws_other_noise_and_the_seed_decides_on_it(name):
    graph, found = captured(STEPS[name]("cuda"))

    def replayed(count: int) -> list[torch.Tensor]:
        torch.manual_seed(5)
        steps = []
        for _ in range(count):
            graph.replay()
            steps += [found[0].clone()]
        return steps

    first, second = replayed(2)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, (first, second), replayed(2)))


@pytest.mark.parametrize("samples", (1, 4))
def test_one_graph_serves_every_step_of_a_generation(samples):
    pattern, given = AttentionPattern("conv", 7, (6, 6), 3), 7
    cache, plain = (KVCache(pattern, 2, 3, 64, torch.bfloat16, "cuda", samples) for _ in range(2))
    tokens = torch.randn(pattern.seq_len, 3, *cache.step_shape, dtype=torch.bfloat16, device="cuda")
    text = torch.randn(2, 2, 3, given, 64, dtype=torch.bfloat16, device="cuda").unbind()
    for held in (cache, plain):
        held.prefill(*text)
    token, position = tokens[given].clone(), torch.full((1,), given, device="cuda")

    def step() -> list[torch.Tensor]:
        out = decode_attention(*token, cache, position=position)
        position.add_(1)
        return [out]

    graph, (out,) = captured(step)
    position.fill_(given)
    for place in range(given, pattern.seq_len):
        token.copy_(tokens[place])
        graph.replay()
        expected = decode_attention(*tokens[place], plain)
        torch.cuda.synchronize()
        assert fuzz.same_bits(out, expected)


@each_kernel
def test_no_call_waits_for_the_device(op, provider):
    for args in served_calls(op, provider, 2):
        results(op, provider, fuzz.copied(args))  # compiles
        again = fuzz.copied(args)
        with waiting_refused():
            results(op, provider, again)


@each_step
def test_no_step_of_a_public_function_waits_for_the_device(name):
    step = STEPS[name]("cuda")
    step()  # compiles, and makes what is made once
    with waiting_refused():
        step()


@pytest.mark.parametrize("provider", ("triton", "native"))
def test_noise_is_that_of_the_cpu(provider):
    """The softmax of noise alone is largest where the noise is."""
    torch.manual_seed(3)
    logits, seed, offset = torch.zeros(512, 1000), torch.tensor(77), torch.tensor(5)
    arguments = (seed, offset, torch.tensor(1.0), True, 1)
    with dalle_kernels.use("reference"):
        expected = dalle_kernels.ops()["gumbel_softmax"](logits, *arguments)
    with dalle_kernels.use(provider):
        got = dalle_kernels.ops()["gumbel_softmax"](*fuzz.copied((logits, *arguments), "cuda"))
    agreeing = (got.cpu().argmax(1) == expected.argmax(1)).double().mean()
    assert agreeing > 0.99  # the largest two of a row may round to the same number
