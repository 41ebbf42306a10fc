"""The logit-Laplace loss against float64, against the density's own integral, and the map of pixels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.logit_laplace import logit_laplace_loss, map_pixels, ops, unmap_pixels
from dalle_kernels.testing import assert_accurate, poisoned_allocations, sample_shapes, strided_views

needs_native = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "reference"])
def provider(request):
    with dalle_kernels.use(request.param):
        yield request.param


def _inputs(shape, seed: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels over the whole mapped range, with locations and scales as a decoder in training gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = map_pixels(torch.rand(shape, dtype=torch.float64, generator=generator))
    mu = 1.5 * torch.randn(shape, dtype=torch.float64, generator=generator)
    log_b = torch.randn(shape, dtype=torch.float64, generator=generator) - 2
    return tuple(tensor.to(dtype) for tensor in (x, mu, log_b))


def _plain(x: Tensor, mu: Tensor, log_b: Tensor, reduction: str) -> Tensor:
    """The paper's formula as a user writes it, in the inputs' dtype."""
    loss = (torch.logit(x) - mu).abs() / log_b.exp() + torch.log(2 * log_b.exp() * x * (1 - x))
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


def _run(function, inputs, dtype: torch.dtype, reduction: str) -> list[Tensor]:
    x, mu, log_b = (tensor.to(dtype) for tensor in inputs)
    leaves = [mu.requires_grad_(), log_b.requires_grad_()]
    loss = function(x, *leaves, reduction)
    weight = torch.ones_like(loss) if loss.dim() == 0 else torch.linspace(-1, 1, loss.numel()).view(loss.shape)
    return [loss, *torch.autograd.grad(loss, leaves, weight.to(loss))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_loss_and_gradients_meet_the_error_rule(reduction, dtype, provider):
    draws = []
    for seed, shape in enumerate(sample_shapes(3, 4, seed=1, largest=65)):
        inputs = [tensor.to(dtype).double() for tensor in _inputs(shape, seed)]
        with poisoned_allocations():
            actual = _run(logit_laplace_loss, inputs, dtype, reduction)
        assert [result.dtype for result in actual] == [torch.float32, dtype, dtype]
        draws.append((actual, _run(_plain, inputs, dtype, reduction), _run(_plain, inputs, torch.float64, reduction)))
    for index, name in enumerate(("loss", "gradient of mu", "gradient of log_b")):
        assert_accurate(*([results[index] for results in column] for column in zip(*draws)), name)


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_float64_gradients_by_finite_differences(reduction):
    x, mu, log_b = _inputs((3, 4), 2)
    assert torch.autograd.gradcheck(
        lambda mu, log_b: logit_laplace_loss(x, mu, log_b, reduction), (mu.requires_grad_(), log_b.requires_grad_())
    )


@pytest.mark.parametrize(("mu", "b"), [(0.0, 1.0), (1.3, 0.5), (-2.0, 0.2)])
def test_the_density_integrates_to_one(mu, b):
    """The substitution x = sigmoid(s) spreads the two ends of (0, 1) out, so a plain sum over s converges."""
    step = 1e-3
    s = torch.arange(-30, 30, step, dtype=torch.float64)
    x = s.sigmoid()
    loss = logit_laplace_loss(x, torch.full_like(x, mu), torch.full_like(x, math.log(b)), "none")
    assert ((-loss).exp() * x * (1 - x)).sum().item() * step == pytest.approx(1, abs=1e-5)


def test_layout_changes_no_more_than_rounding(provider):
    inputs = _inputs((4, 6, 5), 3, torch.float32)
    expected = _run(logit_laplace_loss, inputs, torch.float32, "none")
    for views in zip(*map(strided_views, inputs)):
        name = views[0][0]
        x, *leaves = (view for _, view in views)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        loss = logit_laplace_loss(x, *leaves, "none")
        weight = torch.linspace(-1, 1, loss.numel()).view(loss.shape)
        grads = torch.autograd.grad(loss, leaves, weight)
        torch.testing.assert_close([loss, *grads], expected, rtol=1e-6, atol=1e-6, msg=name)


def test_channels_of_one_decoder_output(provider):
    """The decoder gives mu and ln b as halves of one tensor; each half's gradient must reach its own channels."""
    x, mu, log_b = _inputs((2, 3, 4, 4), 4, torch.float32)
    output = torch.cat([mu, log_b], dim=1).requires_grad_()
    logit_laplace_loss(x, *output.chunk(2, dim=1)).backward()
    _, grad_mu, grad_log_b = _run(logit_laplace_loss, (x, mu, log_b), torch.float32, "mean")
    assert torch.equal(output.grad, torch.cat([grad_mu, grad_log_b], dim=1))


def test_mixed_dtypes_and_the_kink(provider):
    x, mu, log_b = _inputs((3, 4), 5, torch.float32)
    loss = logit_laplace_loss(x, mu.bfloat16(), log_b.half(), "none")
    torch.testing.assert_close(loss, _plain(x, mu.bfloat16().float(), log_b.half().float(), "none"))
    mu = torch.zeros(1, requires_grad=True)
    logit_laplace_loss(torch.full((1,), 0.5), mu, torch.zeros(1)).backward()
    assert mu.grad.item() == 0


def test_empty_and_outside(provider):
    empty = torch.zeros(0, 3)
    assert logit_laplace_loss(empty, empty, empty, "none").shape == (0, 3)
    assert logit_laplace_loss(empty, empty, empty, "sum").item() == 0
    assert logit_laplace_loss(empty, empty, empty).isnan()
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, math.nan])
    loss = logit_laplace_loss(x, torch.zeros(5), torch.zeros(5), "none")
    assert torch.isfinite(loss).tolist() == [False, False, True, False, False]


# Pixels at and outside the ends, subnormal, at the kink, NaN; locations and scales that overflow.
EDGES = (
    [-0.1, -0.0, 0.0, 1e-40, 2.0**-101, 0.5, 1 - 2.0**-24, 1.0, 1.1, math.inf, math.nan],
    [0.0, 1.0, -50.0, math.inf, -math.inf, math.nan],
    [0.0, -100.0, 80.0, math.inf, -math.inf, math.nan],
)


@needs_native
def test_native_equals_the_reference_at_the_ends():
    """Finite where the reference is, and the same infinity, NaN or zero where it is not."""
    x, mu, log_b = (tensor.flatten() for tensor in torch.meshgrid(*map(torch.tensor, EDGES), indexing="ij"))
    results = []
    for provider in ("native", "reference"):
        with dalle_kernels.use(provider):
            results.append(_run(logit_laplace_loss, (x, mu, log_b), torch.float32, "none"))
    for name, native, reference in zip(("loss", "gradient of mu", "gradient of log_b"), *results):
        torch.testing.assert_close(native, reference, rtol=2e-6, atol=1e-6, equal_nan=True, msg=name)


@needs_native
@pytest.mark.parametrize("size", [2047, 2048, 2049, 100_003])
def test_threads_change_no_bit(size):
    inputs = _inputs((size,), 8, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                [tensor for kind in ops.REDUCTIONS for tensor in _run(logit_laplace_loss, inputs, torch.float32, kind)]
            )
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_cross_rows_of_every_layout(dtype):
    """Larger than the kernel's blocks, in shapes whose rows end inside of them, with an outlying pixel in one block."""
    x, mu, log_b = _inputs((3, 7, 11, 97), 9, torch.float32)
    x[1, 2, 3, 4] = 1e-39
    mu, log_b = mu.to(dtype), log_b.to(dtype)
    exact = _run(logit_laplace_loss, (x, mu, log_b), torch.float64, "none")
    layouts = (
        lambda tensor: tensor,
        lambda tensor: tensor.to(memory_format=torch.channels_last),
        lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3),
    )
    tolerance = 2 * torch.finfo(dtype).eps + 2e-5  # the gradient of log_b is a difference of larger numbers
    for layout, other in itertools.product(layouts, layouts):
        leaves = [other(mu).detach().requires_grad_(), layout(log_b).detach().requires_grad_()]
        with poisoned_allocations(), dalle_kernels.use("native"):
            loss = logit_laplace_loss(layout(x), *leaves, "none")
            grads = torch.autograd.grad(loss, leaves, other(torch.linspace(-1, 1, loss.numel()).view(loss.shape)))
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-5)
        for grad, wanted in zip(grads, exact[1:]):
            torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance)


@needs_native
def test_kernels_write_within_bounds_and_all_of_them():
    x, mu, log_b = _inputs((2049,), 10, torch.float32)
    loss, grad_mu, grad_log_b = (torch.full((2051,), math.nan) for _ in range(3))
    library = _native.library("cpu")
    common = {"x": x, "mu": mu, "log_b": log_b, "divisor": 1.0, "executor": 2}
    library.logit_laplace_loss(**common, loss=loss[1:], partial=None)
    grad = torch.ones(()).expand(x.shape)
    library.logit_laplace_loss_backward(**common, grad=grad, grad_mu=grad_mu[1:], grad_log_b=grad_log_b[1:])
    for written in (loss, grad_mu, grad_log_b):
        assert written[[0, -1]].isnan().all() and written[1:-1].isfinite().all()


def test_what_the_kernel_does_not_serve_goes_to_the_reference():
    x, mu, log_b = (tensor.view((1,) * 7 + (2, 3)) for tensor in _inputs((2, 3), 11, torch.float32))
    for inputs in ((x, mu, log_b), tuple(tensor.double() for tensor in (x, mu, log_b))):
        torch.testing.assert_close(logit_laplace_loss(*inputs), _plain(*inputs, "mean"))
        assert dalle_kernels.explain("logit_laplace_loss", *inputs, "mean").runs == "reference"


CHECK_ONE_INSTRUCTION_SET = """
import torch, dalle_kernels
from dalle_kernels import _native
from dalle_kernels.testing import assert_accurate
assert _native.instruction_sets()[2] == {isa!r}
generator = torch.Generator().manual_seed(12)
x = 0.1 + 0.8 * torch.rand(5000, generator=generator)
mu, log_b = 1.5 * torch.randn(5000, generator=generator), torch.randn(5000, generator=generator) - 2
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for reduction in ("none", "mean"):
        results = []
        for provider, kind in (("native", dtype), ("reference", dtype), ("reference", torch.float64)):
            pixels, *leaves = (tensor.to(dtype).to(kind) for tensor in (x, mu, log_b))
            leaves = [leaf.requires_grad_() for leaf in leaves]
            with dalle_kernels.use(provider):
                loss = dalle_kernels.logit_laplace_loss(pixels, *leaves, reduction)
                results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        for native, reference, exact in zip(*results):
            assert_accurate(native, reference, exact, str((dtype, reduction)))
"""


@needs_native
def test_every_instruction_set_is_as_accurate_as_the_reference(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)


def test_opcheck(provider):
    x, mu, log_b = _inputs((2, 3), 6, torch.float32)
    arguments = (x, mu.requires_grad_(), log_b.requires_grad_())
    for reduction in ops.REDUCTIONS:
        torch.library.opcheck(ops.logit_laplace_loss_op.overload, (*arguments, reduction))
    detached = (x, mu.detach(), log_b.detach())
    torch.library.opcheck(ops.logit_laplace_loss_backward_op.overload, (torch.tensor(2.0), *detached, "mean"))
    torch.library.opcheck(ops.logit_laplace_loss_backward_op.overload, (torch.ones(2, 3), *detached, "none"))


def test_compiles_whole():
    inputs = _inputs((3, 5), 7, torch.float32)
    compiled = torch.compile(logit_laplace_loss, fullgraph=True, backend="aot_eager")
    for result, expected in zip(
        _run(compiled, inputs, torch.float32, "mean"), _run(logit_laplace_loss, inputs, torch.float32, "mean")
    ):
        torch.testing.assert_close(result, expected)


def test_map_of_pixels():
    images = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(map_pixels(images), torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(map_pixels(images, epsilon=0.25), torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(unmap_pixels(map_pixels(images)), images)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0], "a decoder's sigmoid may leave [0.1, 0.9]"
    for function in (map_pixels, unmap_pixels):
        with pytest.raises(ValueError, match=r"expected epsilon strictly between 0 and 0\.5, got 0\.5"):
            function(images, 0.5)
    with pytest.raises(TypeError, match=r"expected images as floats in \[0, 1\], got torch.uint8"):
        map_pixels(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            "expected x as a floating-point tensor, got torch.uint8",
            {"x": torch.ones(2, 3, dtype=torch.uint8)},
        ),
        (TypeError, "expected mu as a floating-point tensor, got torch.int64", {"mu": torch.zeros(2, 3).long()}),
        (TypeError, "expected log_b as a floating-point tensor, got float", {"log_b": 0.0}),
        (ValueError, r"expected mu of x's shape \(2, 3\), got \(3,\)", {"mu": torch.zeros(3)}),
        (ValueError, "expected log_b on x's device cpu, got meta", {"log_b": torch.zeros(2, 3, device="meta")}),
        (ValueError, "expected a reduction among none, mean, sum, got 'average'", {"reduction": "average"}),
        (ValueError, "expected x without a gradient", {"x": torch.full((2, 3), 0.5, requires_grad=True)}),
    ],
)
def test_mistakes_get_one_clear_sentence(error, message, arguments):
    arguments = {"x": torch.full((2, 3), 0.5), "mu": torch.zeros(2, 3), "log_b": torch.zeros(2, 3), **arguments}
    with pytest.raises(error, match=message):
        logit_laplace_loss(**arguments)


def test_pixels_that_require_a_gradient_are_taken_where_none_is_recorded():
    x, mu = torch.full((2, 3), 0.5, requires_grad=True), torch.zeros(2, 3)
    with torch.no_grad():
        assert torch.equal(logit_laplace_loss(x, mu, mu), logit_laplace_loss(x.detach(), mu, mu))
