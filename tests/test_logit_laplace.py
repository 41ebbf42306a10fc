"""The logit-Laplace loss against float64, against the density's own integral, and the map of pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle_kernels.logit_laplace import logit_laplace_loss, map_pixels, ops, unmap_pixels
from dalle_kernels.testing import assert_accurate, poisoned_allocations, sample_shapes, strided_views


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
    return [loss, *torch.autograd.grad(loss, leaves, weight.to(loss.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_loss_and_gradients_meet_the_error_rule(reduction, dtype):
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


def test_layout_changes_no_more_than_rounding():
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


def test_channels_of_one_decoder_output():
    """The decoder gives mu and ln b as halves of one tensor; each half's gradient must reach its own channels."""
    x, mu, log_b = _inputs((2, 3, 4, 4), 4, torch.float32)
    output = torch.cat([mu, log_b], dim=1).requires_grad_()
    logit_laplace_loss(x, *output.chunk(2, dim=1)).backward()
    _, grad_mu, grad_log_b = _run(logit_laplace_loss, (x, mu, log_b), torch.float32, "mean")
    assert torch.equal(output.grad, torch.cat([grad_mu, grad_log_b], dim=1))


def test_mixed_dtypes_and_the_kink():
    x, mu, log_b = _inputs((3, 4), 5, torch.float32)
    loss = logit_laplace_loss(x, mu.bfloat16(), log_b.half(), "none")
    torch.testing.assert_close(loss, _plain(x, mu.bfloat16().float(), log_b.half().float(), "none"))
    mu = torch.zeros(1, requires_grad=True)
    logit_laplace_loss(torch.full((1,), 0.5), mu, torch.zeros(1)).backward()
    assert mu.grad.item() == 0


def test_empty_and_outside():
    empty = torch.zeros(0, 3)
    assert logit_laplace_loss(empty, empty, empty, "none").shape == (0, 3)
    assert logit_laplace_loss(empty, empty, empty, "sum").item() == 0
    assert logit_laplace_loss(empty, empty, empty).isnan()
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, math.nan])
    loss = logit_laplace_loss(x, torch.zeros(5), torch.zeros(5), "none")
    assert torch.isfinite(loss).tolist() == [False, False, True, False, False]


def test_opcheck():
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
