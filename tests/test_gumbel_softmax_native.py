"""The compiled Gumbel-softmax: its noise bit for bit, its samples against their law, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from peak_memory import needs_peaks, peak_growth
from torch._subclasses import FakeTensorMode

import dalle_kernels
from dalle_kernels import _native, _triton, philox
from dalle_kernels.gumbel_softmax import gumbel_codebook, gumbel_softmax, ops
from dalle_kernels.testing import poisoned_allocations

pytestmark = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the CPU library is not built")

SEED, ZERO, TAU = torch.tensor(0x5EED), torch.tensor(0), torch.tensor(0.5)


@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 2**32 - 30, -5, 2**63 - 3])
def test_uniforms_equal_the_definition_bit_for_bit(seed, offset, instruction_set):
    rows, columns = 128, 161
    v = torch.full((columns, rows), math.nan)
    _native.library("cpu").uniform_noise(seed=seed, offset=offset, columns=columns, rows=rows, v=v.data_ptr())
    numbers = (torch.tensor(offset) + torch.arange(rows)).view(1, 1, rows)
    expected = philox.complement_uniform(torch.tensor(seed), numbers, columns)[0]
    assert torch.equal(v.view(torch.int32), expected.contiguous().view(torch.int32))


def _kolmogorov_smirnov(draws: torch.Tensor) -> float:
    """sqrt(n) times the largest distance between the draws' distribution and Gumbel's."""
    ordered = draws.double().sort().values
    above = torch.arange(1, len(ordered) + 1) / len(ordered) - torch.exp(-torch.exp(-ordered))
    return math.sqrt(len(ordered)) * max(above.max().item(), (1 / len(ordered) - above).max().item())


def test_draws_follow_the_gumbel_law(instruction_set):
    """At tau = 1 the log-odds of two codes are a difference of two draws: held to the reference's and to their law."""
    logits = torch.zeros(200_000, 2)
    with dalle_kernels.use("native"):
        y = ops.gumbel_softmax_op(logits, SEED, ZERO, torch.tensor(1.0), False, 1).double()
    noise = philox.gumbel_noise(SEED, torch.arange(len(logits)).view(-1, 1, 1), 2, torch.float64).squeeze(2)
    difference = y[:, 0].log() - y[:, 1].log()
    torch.testing.assert_close(difference, noise[:, 0] - noise[:, 1], rtol=1e-6, atol=2e-6)
    # A logistic variable x gives an exponential -log(u), u = 1 / (1 + exp(-x)), whose -log is Gumbel's.
    gumbel = -torch.log(torch.nn.functional.softplus(-difference))
    assert _kolmogorov_smirnov(gumbel) < 1.95  # passes with probability 0.999
    assert _kolmogorov_smirnov(gumbel * 1.05) > 1.95, "the test sees a scale that is 5 % off"


def test_hard_samples_follow_the_softmax_of_the_logits(instruction_set):
    """Chi-square over 7 codes: 6 degrees of freedom, 22.5 at the level 0.001."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.1])
    count = 50_000
    expected = count * logits.softmax(0)
    with dalle_kernels.use("native"):
        samples = ops.gumbel_softmax_op(logits.expand(count, 7), SEED, ZERO, TAU, True, 1)
    assert ((samples.sum(0) - expected) ** 2 / expected).sum().item() < 22.5


@pytest.mark.parametrize("shape", [(4000, 64), (8, 1024, 15, 15)])
def test_hard_samples_are_those_of_the_reference_but_for_ties(shape, instruction_set):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    arguments = (SEED, ZERO, TAU, True, 1)
    with dalle_kernels.use("native"):
        native = ops.gumbel_softmax_op(logits, *arguments).argmax(1)
    with dalle_kernels.use("reference"):
        exact = ops.gumbel_softmax_op(logits.double(), SEED, ZERO, TAU.double(), True, 1).argmax(1)
    # The two best scores lie within 1e-5 of each other in about one row of 10^5.
    assert (native != exact).sum().item() <= 1


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("hard", [False, True])
def test_threads_and_splits_do_not_change_a_bit(dim, hard, instruction_set):
    logits = torch.randn(70, 33, 19, generator=torch.Generator().manual_seed(2))
    whole = ops.gumbel_softmax_kl_op(logits, SEED, ZERO, TAU, hard, dim)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for result, expected in zip(ops.gumbel_softmax_kl_op(logits, SEED, ZERO, TAU, hard, dim), whole):
                assert torch.equal(result, expected)
    finally:
        torch.set_num_threads(threads)
    if dim != 0:
        first = 23
        rows_before = torch.tensor(first * logits[0].numel() // logits.shape[dim])
        part = ops.gumbel_softmax_kl_op(logits[first:], SEED, rows_before, TAU, hard, dim)
        assert torch.equal(part[0], whole[0][first:]) and torch.equal(part[1], whole[1][first:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(7, 70, 24, 24), (2, 37, 25, 31), (1, 12, 8, 17), (1, 3000, 32, 33)])
def test_neither_layout_nor_threads_change_a_bit_of_the_sample(sizes, dtype, instruction_set):
    """Exponentials that wait in y, for several blocks side by side and for one, and those that wait in a cache."""
    logits = (3 * torch.randn(sizes, generator=torch.Generator().manual_seed(6))).to(dtype)
    logits[0, :, 0, 1], logits[0, 3, 0, 2], logits[0, 5, 1, 0] = -torch.inf, torch.nan, torch.inf
    logits[0, 1:, 2, :9] = -torch.inf
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            with poisoned_allocations():
                results.append(ops.gumbel_softmax_kl_op(logits, SEED, ZERO, TAU, False, 1))
            rows = logits.movedim(1, -1).contiguous()
            y, kl = ops.gumbel_softmax_kl_op(rows, SEED, ZERO, TAU, False, -1)
            results.append((y.movedim(-1, 1), kl))
    finally:
        torch.set_num_threads(threads)
    for result in results:
        for ours, expected in zip(result, results[0]):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert results[0][0].isnan().any(1).sum() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(3, 70, 24, 24), (2, 37, 25, 31), (2, 12, 32, 33)])
def test_neither_layout_nor_threads_change_a_bit_of_the_gradient(sizes, dtype, instruction_set):
    """Whole columns of wide blocks, read where they lie, pieces of them, and rows of contiguous codes."""
    tensors = torch.randn(4, *sizes, generator=torch.Generator().manual_seed(5)).to(dtype)
    grad_y, logits, y = tensors[0], 3 * tensors[1], tensors[2].softmax(1)
    grad_kl = tensors[3, :, 0].float()
    turned = [tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in (grad_y, logits, y)]
    backward = ops.gumbel_softmax_kl_backward_op
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for tensors in ((grad_y, logits, y), turned, (grad_y, turned[1], y)):
                first, *rest = tensors
                results.append(backward(first, grad_kl, *rest, SEED, ZERO, TAU, False, 1))
            rows = [tensor.movedim(1, -1).contiguous() for tensor in (grad_y, logits, y)]
            results.append(backward(rows[0], grad_kl, *rows[1:], SEED, ZERO, TAU, False, -1).movedim(-1, 1))
    finally:
        torch.set_num_threads(threads)
    for result in results:
        assert torch.equal(result, results[0])


def test_rows_too_long_to_keep_are_drawn_twice(instruction_set):
    logits = torch.randn(3, 65_537 + 40, generator=torch.Generator().manual_seed(3)).requires_grad_()
    for hard in (False, True):
        results = []
        for provider in ("native", "reference"):
            with dalle_kernels.use(provider):
                y, kl = ops.gumbel_softmax_kl_op(logits, SEED, ZERO, TAU, hard, 1)
                weight = torch.linspace(-1, 1, logits.shape[1]).expand_as(y)
                results.append((y, kl, *torch.autograd.grad((y, kl), logits, (weight, torch.ones_like(kl)))))
        for native, reference in zip(*results):
            torch.testing.assert_close(native, reference, rtol=2e-4, atol=1e-7)


@needs_peaks
@pytest.mark.parametrize("dim", [1, -1])
def test_a_sample_that_meets_the_codebook_is_never_stored(dim):
    """It would take 32 MiB, as do the logits and their gradient."""
    shape = (4, 8192, 256) if dim == 1 else (4, 256, 8192)
    logits, codebook = torch.randn(shape, requires_grad=True), torch.randn(8192, 8, requires_grad=True)

    def forward():
        return gumbel_codebook(logits, codebook, dim=dim)

    def backward():
        torch.autograd.backward((embedding, kl), (torch.ones_like(embedding), torch.ones_like(kl)))

    with dalle_kernels.use("native"):
        assert peak_growth(forward) < 16 * 2**20
        embedding, kl = forward()
        assert peak_growth(backward) < (32 + 16) * 2**20


def test_refusals_say_why():
    logits, codebook = torch.zeros(2, 3), torch.zeros(3, 4)
    cases = [
        ("gumbel_softmax", (logits.double(), SEED, ZERO, TAU.double(), False, 1), "got torch.float64"),
        ("gumbel_softmax", (logits, SEED, ZERO, TAU.double(), False, 1), "takes tau as float32"),
        ("gumbel_softmax", (torch.zeros((1,) * 10), SEED, ZERO, TAU, False, 1), "at most 9 dimensions, got 10"),
        ("gumbel_softmax", (torch.zeros(1).expand(2**24 + 1), SEED, ZERO, TAU, False, 0), "at most 16777216 codes"),
        ("gumbel_codebook", (logits, codebook.double(), SEED, ZERO, TAU, 1), "a codebook of float32"),
        (
            "gumbel_softmax_backward",
            (logits.double(), logits, logits, SEED, ZERO, TAU, False, 1),
            "takes grad_y as torch.float32",
        ),
    ]
    for op, arguments, reason in cases:
        rejected = dict(dalle_kernels.explain(op, *arguments).rejected)
        assert reason in rejected["native"]


def test_generator_and_public_function_use_the_kernel():
    logits = torch.zeros(4, 5)
    with dalle_kernels.use("native"):
        first, again = (gumbel_softmax(logits, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("shape", "dim", "dtype", "hard", "last", "ahead"),
    [
        ((8, 8192), 1, torch.float32, False, False, {"gumbel_softmax"}),
        ((8, 8192), 1, torch.float16, False, False, set()),
        ((8, 16384), 1, torch.bfloat16, False, False, {"gumbel_softmax"}),
        ((2, 8192, 4, 4), 1, torch.bfloat16, False, False, {"gumbel_softmax_kl", "gumbel_softmax_kl_backward"}),
        ((2, 8192, 4, 4), 1, torch.float32, False, True, {"gumbel_softmax_kl", "gumbel_softmax_kl_backward"}),
        ((2, 16384, 4, 4), 1, torch.bfloat16, False, False, set()),
        ((8, 1024), 1, torch.float32, False, False, set()),
        ((8, 8192), 1, torch.float32, True, False, set()),
    ],
)
def test_on_cuda_triton_serves_what_it_is_not_shown_slower_at(shape, dim, dtype, hard, last, ahead, monkeypatch):
    """A check of the arguments alone: fake tensors of a chip that need not be here."""
    monkeypatch.setattr(_triton, "_unavailable", lambda device_type: None)
    names = ("gumbel_softmax", "gumbel_softmax_kl", "gumbel_softmax_backward", "gumbel_softmax_kl_backward")
    too_long = shape[dim] > 8192
    memory = torch.channels_last if last else torch.contiguous_format
    with FakeTensorMode(), _triton.assume(90, 132):
        logits = torch.empty(shape, dtype=dtype, device="cuda", memory_format=memory)
        scalar = torch.empty((), device="cuda")
        noise = (scalar, scalar, scalar, hard, dim)
        saved = (logits, logits, *noise)
        calls = (logits, *noise), (logits, *noise), (logits, *saved), (logits, scalar, *saved)
        for name, call in zip(names, calls, strict=True):
            (native,) = (p for p in dalle_kernels.ops()[name].providers if p.name == "native")
            refused = native.unsupported(*call)
            assert (refused is None) == (name in ahead), refused
            with dalle_kernels.use("native"):
                assert (native.unsupported(*call) is not None) == (too_long and "backward" in name)
