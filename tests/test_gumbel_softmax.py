"""Gumbel-softmax, its KL and its product with a codebook, against float64 and against their definition."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dalle_kernels.gumbel_softmax import gumbel_codebook, gumbel_softmax, gumbel_softmax_kl, ops, reference
from dalle_kernels.philox import gumbel_noise
from dalle_kernels.testing import assert_accurate, poisoned_allocations, sample_shapes, strided_views

SEED, OFFSET, TAU = torch.tensor(0x5EED), torch.tensor(0), torch.tensor(0.5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _random(shape, seed: int, dtype=torch.float64, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _noise(logits: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The op's noise in the logits' layout, laid out here by moving ``dim`` last and back."""
    moved = logits.movedim(dim, -1)
    rows = torch.arange(moved[..., 0].numel()).view(-1, 1, 1)
    return gumbel_noise(SEED, rows, moved.shape[-1], dtype).view(moved.shape).movedim(-1, dim)


def _plain(logits: Tensor, tau: float, dim: int) -> tuple[Tensor, Tensor]:
    """The sample and the KL as a user writes them, in the logits' dtype."""
    noise = _noise(logits, dim, reference.compute_dtype(logits.dtype)).to(logits.dtype)
    log_q = logits.log_softmax(dim)
    kl = (log_q.exp() * (log_q + math.log(logits.shape[dim]))).sum(dim)
    return ((logits + noise) / tau).softmax(dim), kl


def _plain_codebook(logits: Tensor, codebook: Tensor, tau: float, dim: int) -> tuple[Tensor, Tensor]:
    y, kl = _plain(logits, tau, dim)
    return (y.movedim(dim, -1) @ codebook).movedim(-1, dim), kl


def _run(function, inputs: list[Tensor], dtype: torch.dtype, weights: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of ``function`` and the gradients of their weighted sum, for ``inputs`` in ``dtype``."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    grads = torch.autograd.grad(outputs, leaves, [w.to(out.dtype) for w, out in zip(weights, outputs)])
    return [*outputs, *grads]


CASES = [
    (shape, dim, tau)
    for shape, dim, tau in zip(
        [
            *sample_shapes(2, 3, seed=1),
            *sample_shapes(3, 2, seed=2, largest=33),
            *sample_shapes(4, 2, seed=3, largest=17),
        ],
        [-1, 0, 1, 1, -1, 1, 2],
        [1.0, 0.5, 1 / 16, 1.0, 2.0, 1 / 16, 0.3],
    )
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim", "tau"), CASES)
def test_sample_kl_and_gradient_meet_the_error_rule(shape, dim, tau, dtype):
    logits = _random(shape, seed=5).to(dtype).double()
    kl_shape = reference.kl_shape(logits, dim)
    weights = (_random(shape, seed=6).to(dtype).double(), _random(kl_shape, seed=7).to(dtype).double())
    with poisoned_allocations():
        scalars = SEED, OFFSET, torch.tensor(tau)
        actual = _run(lambda t: ops.gumbel_softmax_kl_op(t, *scalars, False, dim), [logits], dtype, weights)
    plain = _run(lambda t: _plain(t, tau, dim), [logits], dtype, weights)
    exact = _run(lambda t: _plain(t, tau, dim), [logits], torch.float64, weights)
    assert [result.dtype for result in actual] == [dtype, torch.float32, dtype]
    for name, *results in zip(("y", "kl", "gradient"), actual, plain, exact):
        assert_accurate(*results, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim", "width"), [((17, 33), -1, 5), ((3, 65, 2, 7), 1, 31), ((13, 5), 0, 1)])
def test_codebook_meets_the_error_rule(shape, dim, width, dtype):
    inputs = [_random(shape, seed=8).to(dtype).double(), _random((shape[dim], width), seed=9).to(dtype).double()]
    embedding_shape = reference.embedding_shape(*inputs, dim)
    weights = (
        _random(embedding_shape, seed=10).to(dtype).double(),
        _random(reference.kl_shape(inputs[0], dim), seed=11),
    )
    with poisoned_allocations():
        scalars = SEED, OFFSET, torch.tensor(0.7)
        actual = _run(lambda t, c: ops.gumbel_codebook_op(t, c, *scalars, dim), inputs, dtype, weights)
    plain = _run(lambda t, c: _plain_codebook(t, c, 0.7, dim), inputs, dtype, weights)
    exact = _run(lambda t, c: _plain_codebook(t, c, 0.7, dim), inputs, torch.float64, weights)
    for name, *results in zip(("embedding", "kl", "logits' gradient", "codebook's gradient"), actual, plain, exact):
        assert_accurate(*results, name)


def test_codebook_takes_its_own_dtype():
    logits, codebook = _random((4, 6), 12, torch.float32), _random((6, 3), 13, torch.bfloat16)
    embedding, kl = gumbel_codebook(logits.requires_grad_(), codebook.requires_grad_())
    (embedding.sum() + kl.sum()).backward()
    assert (embedding.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
    assert (logits.grad.dtype, codebook.grad.dtype) == (torch.float32, torch.bfloat16)


def test_float64_gradients_by_finite_differences():
    logits, codebook = _random((2, 5, 3), 14).requires_grad_(), _random((5, 4), 15).requires_grad_()
    scalars = SEED, OFFSET, torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: ops.gumbel_softmax_op(t, *scalars, False, 1), (logits,))
    assert torch.autograd.gradcheck(lambda t: ops.gumbel_softmax_kl_op(t, *scalars, False, 1), (logits,))
    assert torch.autograd.gradcheck(lambda t, c: ops.gumbel_codebook_op(t, c, *scalars, 1), (logits, codebook))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("shape", "dim"), [((31, 17), 1), ((3, 13, 5), 1)])
def test_hard_sample_is_the_one_hot_of_the_noisy_logits_with_the_soft_gradient(shape, dim, dtype):
    logits = _random(shape, 16, dtype).requires_grad_()
    soft, hard = (ops.gumbel_softmax_op(logits, SEED, OFFSET, TAU, hard, dim) for hard in (False, True))
    wide = reference.compute_dtype(dtype)
    scores = logits.to(wide) + _noise(logits, dim, wide)
    expected = torch.zeros(shape, dtype=dtype).scatter_(dim, scores.argmax(dim, keepdim=True), 1.0)
    assert torch.equal(hard, expected) and hard.dtype == dtype
    weight = _random(shape, 17, dtype)
    (soft_grad,), (hard_grad,) = (torch.autograd.grad(y, logits, weight) for y in (soft, hard))
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(hard_grad, soft_grad, rtol=8 * unit, atol=8 * unit)


def test_hard_samples_follow_the_softmax_of_the_logits():
    """Chi-square over 7 codes: 6 degrees of freedom, 22.5 at the level 0.001."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.1])
    count = 20_000
    expected = count * logits.softmax(0)
    for temperature in (1.0, 0.1):
        generator = torch.Generator().manual_seed(18)
        samples = gumbel_softmax(logits.expand(count, 7), temperature, hard=True, generator=generator)
        statistic = ((samples.sum(0) - expected) ** 2 / expected).sum().item()
        assert statistic < 22.5
        assert ((samples.sum(0) - count / 7) ** 2 / (count / 7)).sum().item() > 1000, "the test can tell two laws apart"


def test_layout_does_not_change_a_bit():
    logits = _random((3, 13, 5, 2), 19, torch.float32)
    for dim in (0, 1, -1):
        expected = ops.gumbel_softmax_kl_op(logits, SEED, OFFSET, TAU, False, dim)
        for name, view in strided_views(logits):
            for result, reference_result in zip(
                ops.gumbel_softmax_kl_op(view, SEED, OFFSET, TAU, False, dim), expected
            ):
                assert result.is_contiguous() and torch.equal(result, reference_result), name
    codebook = _random((13, 4), 20, torch.float32)
    expected = ops.gumbel_codebook_op(logits, codebook, SEED, OFFSET, TAU, 1)
    for name, view in strided_views(codebook):
        result = ops.gumbel_codebook_op(logits, view, SEED, OFFSET, TAU, 1)
        torch.testing.assert_close(result, expected, msg=name)


def test_strided_gradients():
    logits = _random((4, 9, 6), 21, torch.float32).requires_grad_()
    weight = _random((4, 9, 6), 22, torch.float32)
    for hard in (False, True):
        y = ops.gumbel_softmax_op(logits, SEED, OFFSET, TAU, hard, 1)
        (expected,) = torch.autograd.grad(y, logits, weight, retain_graph=True)
        for name, view in strided_views(weight):
            (grad,) = torch.autograd.grad(y, logits, view, retain_graph=True)
            torch.testing.assert_close(grad, expected, msg=name)


def test_neither_batch_split_nor_chunks_change_the_sample(monkeypatch):
    logits = _random((6, 11, 4), 23, torch.float32)
    whole = ops.gumbel_softmax_op(logits, SEED, OFFSET, TAU, False, 1)
    rest = ops.gumbel_softmax_op(logits[2:], SEED, torch.tensor(2 * 4), TAU, False, 1)
    torch.testing.assert_close(rest, whole[2:], rtol=1e-6, atol=0)
    codebook = _random((11, 3), 24, torch.float32)
    embedding = ops.gumbel_codebook_op(logits, codebook, SEED, OFFSET, TAU, 1)
    for elements in (1, 30, 100):
        monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", elements)
        chunked = ops.gumbel_softmax_op(logits, SEED, OFFSET, TAU, False, 1)
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
        torch.testing.assert_close(ops.gumbel_codebook_op(logits, codebook, SEED, OFFSET, TAU, 1), embedding)


def test_generator_decides_the_sample():
    logits = _random((5, 7), 25, torch.float32)
    first, again, other = (gumbel_softmax(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(gumbel_softmax(logits), first)
    assert not torch.equal(gumbel_softmax(logits), first), "each call draws anew"
    assert torch.equal(gumbel_softmax_kl(logits, generator=torch.Generator().manual_seed(1))[0], first)
    codebook = torch.eye(7)
    embedding, _ = gumbel_codebook(logits, codebook, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(embedding, first)


def test_bad_rows_stay_alone():
    """NaN, +inf and all -inf spoil their own row and nothing else, in every output and gradient."""
    logits = _random((8, 6), 26, torch.float32)
    clean = logits.clone()
    logits[1, 2], logits[3, 0], logits[5] = math.nan, math.inf, -math.inf
    bad = torch.tensor([1, 3, 5])
    good = torch.tensor([0, 2, 4, 6, 7])
    codebook = _random((6, 4), 27, torch.float32)
    calls = [
        lambda t: ops.gumbel_softmax_kl_op(t, SEED, OFFSET, TAU, False, 1),
        lambda t: ops.gumbel_softmax_kl_op(t, SEED, OFFSET, TAU, True, 1),
        lambda t: ops.gumbel_codebook_op(t, codebook, SEED, OFFSET, TAU, 1),
    ]
    for call in calls:
        results = []
        for source in (logits, clean):
            leaf = source.clone().requires_grad_()
            outputs = call(leaf)
            weights = [torch.ones_like(output).cumsum(-1) for output in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, leaf, weights)])
        for spoiled, expected in zip(*results):
            assert spoiled[bad].isnan().all()
            torch.testing.assert_close(spoiled[good], expected[good])


@pytest.mark.parametrize("tau", [1.0, 1 / 16, 1e-3])
def test_extreme_logits_stay_finite(tau):
    logits = torch.tensor(
        [[1e4, -1e4, 0.0, 3.0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 1e4, 1e4], [0.0, -math.inf, 1.0, -2.0]]
    )
    leaf = logits.requires_grad_()
    y, kl = ops.gumbel_softmax_kl_op(leaf, SEED, OFFSET, torch.tensor(tau), False, 1)
    (grad,) = torch.autograd.grad([y, kl], leaf, [torch.ones_like(y).cumsum(1), torch.ones_like(kl)])
    assert torch.isfinite(y).all() and torch.isfinite(kl).all() and torch.isfinite(grad).all()
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    assert y[3, 1] == 0 and grad[3, 1] == 0, "a code at -inf is never drawn and gets no gradient"
    torch.testing.assert_close(kl[:3], torch.tensor([math.log(4), 0.0, 0.0]), atol=1e-6, rtol=1e-6)
    q = torch.tensor([0.0, 1.0, -2.0]).softmax(0)
    torch.testing.assert_close(kl[3], (q * q.log()).sum() + math.log(4))


def test_one_code_and_no_rows():
    y, kl = gumbel_softmax_kl(_random((5, 1), 28, torch.float32), dim=1)
    assert torch.equal(y, torch.ones(5, 1)) and torch.equal(kl, torch.zeros(5))
    for shape, dim in (((0, 7), 1), ((3, 7, 0), 1)):
        logits = torch.zeros(shape, requires_grad=True)
        embedding, kl = gumbel_codebook(logits, torch.zeros(7, 2, requires_grad=True), dim=dim)
        assert embedding.shape == tuple(reference.embedding_shape(logits, torch.zeros(7, 2), dim))
        assert kl.shape == tuple(reference.kl_shape(logits, dim))
        (embedding.sum() + kl.sum()).backward()
        assert logits.grad.shape == shape
    y, kl = gumbel_softmax_kl(torch.zeros(4))
    assert y.shape == (4,) and kl.shape == ()


def test_autocast_changes_nothing():
    logits, codebook = _random((4, 9), 29, torch.float32), _random((9, 3), 30, torch.float32)
    expected = ops.gumbel_codebook_op(logits, codebook, SEED, OFFSET, TAU, 1)
    with torch.autocast("cpu", torch.bfloat16):
        for result, reference_result in zip(ops.gumbel_codebook_op(logits, codebook, SEED, OFFSET, TAU, 1), expected):
            assert torch.equal(result, reference_result)


def test_opcheck():
    logits, codebook = _random((2, 5, 3), 31, torch.float32).requires_grad_(), _random((5, 4), 32, torch.float32)
    codebook.requires_grad_()
    sample = (logits, SEED, OFFSET, TAU, True, 1)
    torch.library.opcheck(ops.gumbel_softmax_op.overload, sample)
    torch.library.opcheck(ops.gumbel_softmax_kl_op.overload, sample)
    torch.library.opcheck(ops.gumbel_codebook_op.overload, (logits, codebook, SEED, OFFSET, TAU, 1))
    logits, codebook, kl = logits.detach(), codebook.detach(), torch.ones(2, 3)
    saved = (logits, logits, SEED, OFFSET, TAU, False, 1)
    embedding = torch.ones(2, 4, 3)
    torch.library.opcheck(ops.gumbel_softmax_backward_op.overload, (logits, *saved))
    torch.library.opcheck(ops.gumbel_softmax_kl_backward_op.overload, (logits, kl, *saved))
    arguments = (embedding, kl, logits, codebook, SEED, OFFSET, TAU, 1)
    torch.library.opcheck(ops.gumbel_codebook_backward_op.overload, arguments)


def test_compiles_whole_and_once_for_every_temperature():
    """The first temperature may be compiled as a constant; the graph of the second serves all the others."""
    logits, codebook = _random((2, 5, 3), 33, torch.float32).requires_grad_(), _random((5, 4), 34, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, codebook, tau):
        y = gumbel_softmax(logits, tau, hard=True, dim=1)
        sample, kl = gumbel_softmax_kl(logits, tau, dim=1)
        embedding, _ = gumbel_codebook(logits, codebook, tau, 1)
        return y.sum() + sample.square().sum() + kl.sum() + embedding.sum(), sample, embedding

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for tau in [1.0, *(16.0 ** -(update / 11) for update in range(1, 12))]:
        torch.manual_seed(35)
        loss, *samples = compiled(logits, codebook, tau)
        torch.manual_seed(35)
        expected, *expected_samples = step(logits, codebook, tau)
        for sample, expected_sample in zip(samples, expected_samples):
            assert torch.equal(sample, expected_sample), tau
        torch.testing.assert_close(loss, expected)
        grads = (torch.autograd.grad(total, logits)[0] for total in (loss, expected))
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2


def test_compiles_with_inductor():
    logits = _random((3, 9), 36, torch.float32).requires_grad_()
    # One process, no precompiled header: for so small a graph either costs far more than it saves.
    options = {"compile_threads": 1, "cpp_cache_precompile_headers": False}
    y, kl = torch.compile(lambda t: gumbel_softmax_kl(t * 2, 0.5), fullgraph=True, options=options)(logits)
    torch.testing.assert_close(y.sum(1), torch.ones(3))
    (kl.sum() + y[:, 0].sum()).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_one_seed_gives_one_noise_with_and_without_a_gradient():
    """Without one the seed is drawn into memory that the thread's next call overwrites."""
    logits, codebook = _random((5, 7), 50, torch.float32), _random((7, 3), 51, torch.float32)
    calls = (
        lambda x, generator: gumbel_softmax(x, generator=generator),
        lambda x, generator: gumbel_softmax_kl(x, generator=generator)[0],
        lambda x, generator: gumbel_codebook(x, codebook, generator=generator)[0],
    )
    for call in calls:
        for generator in (None, torch.Generator()):
            results = []
            for wanted in (False, True):
                (torch.default_generator if generator is None else generator).manual_seed(52)
                first = call(logits.clone().requires_grad_(wanted), generator)
                results.append((first, call(logits, generator)))
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
            assert not torch.equal(*results[0])


def test_a_backward_draws_its_own_noise_again_after_calls_that_wanted_no_gradient():
    logits, codebook = _random((5, 7), 53, torch.float32).requires_grad_(), _random((7, 3), 54, torch.float32)

    def gradient(between):
        torch.manual_seed(55)
        total = gumbel_codebook(logits, codebook)[0].sum()
        between()
        return torch.autograd.grad(total, logits)[0]

    expected = gradient(lambda: None)
    assert torch.equal(gradient(lambda: gumbel_softmax(logits.detach())), expected)


def test_threads_draw_seeds_into_memory_of_their_own():
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(lambda: (gumbel_softmax(torch.randn(2, 3)), ops._of_thread.seed)[1]).result()
    assert theirs.data_ptr() != ops._of_thread.seed.data_ptr()


@pytest.mark.parametrize("sizes", [(3,), (0, 4), (4, 0, 3), (2, 3, 1, 5)])
def test_results_are_laid_out_as_torch_would(sizes):
    for dim in range(-len(sizes), len(sizes)):
        rows, strides = ops._layout(sizes, dim)
        assert rows == torch.empty(sizes).sum(dim).shape
        assert strides == torch.empty(rows).stride()
        wide, strides = ops._layout(sizes, dim, 6)
        assert wide[dim] == 6 and len(wide) == len(sizes) and strides == torch.empty(wide).stride()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            "expected logits as a floating-point tensor, got torch.int64",
            {"logits": torch.zeros(2, 3).long()},
        ),
        (TypeError, "expected logits as a floating-point tensor, got list", {"logits": [0.0]}),
        (ValueError, "at least one dimension, got a scalar", {"logits": torch.tensor(1.0)}),
        (ValueError, "expected dim between -2 and 1 for logits of shape", {"dim": 2}),
        (ValueError, "at least one code along dim -1", {"logits": torch.zeros(2, 0)}),
        (ValueError, "finite temperature tau above 0, got 0", {"tau": 0}),
        (ValueError, "finite temperature tau above 0, got -1.0", {"tau": -1.0}),
        (ValueError, "finite temperature tau above 0, got nan", {"tau": math.nan}),
        (ValueError, "finite temperature tau above 0, got inf", {"tau": math.inf}),
        (ValueError, "tau from 1.17549e-38 to 8.50706e.37, which float32 can hold .* got 1e-300", {"tau": 1e-300}),
        (ValueError, "tau from 1.17549e-38 to 8.50706e.37, which float32 can hold .* got 1e.300", {"tau": 1e300}),
        (TypeError, "temperature tau as a number, got a tensor", {"tau": torch.tensor(1.0)}),
    ],
)
def test_mistakes_get_one_clear_sentence(error, message, arguments):
    arguments = {"logits": torch.zeros(2, 3), **arguments}
    for function in (gumbel_softmax, gumbel_softmax_kl):
        with pytest.raises(error, match=message):
            function(**arguments)
    with pytest.raises(error, match=message):
        gumbel_codebook(codebook=torch.zeros(3, 4), **arguments)


@pytest.mark.parametrize(
    ("error", "message", "codebook"),
    [
        (ValueError, r"expected a codebook of shape \[3, D\], .* got \(4, 3\)", torch.zeros(4, 3)),
        (ValueError, r"expected a codebook of shape \[3, D\]", torch.zeros(3)),
        (TypeError, "expected codebook as a floating-point tensor, got torch.int64", torch.zeros(3, 4).long()),
        (ValueError, "expected the codebook on the logits' device cpu, got meta", torch.zeros(3, 4, device="meta")),
    ],
)
def test_mistaken_codebooks(error, message, codebook):
    with pytest.raises(error, match=message):
        gumbel_codebook(torch.zeros(2, 3), codebook)
