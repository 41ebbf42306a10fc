"""The logit-Laplace loss by Triton's kernels: on a GPU, else by the interpreter."""

from __future__ import annotations

import pytest
import torch
from test_logit_laplace import EDGES, _inputs, _plain, _run

import dalle_kernels
from dalle_kernels._triton_configurations import Configuration, use_configuration
from dalle_kernels.logit_laplace import logit_laplace_loss, ops
from dalle_kernels.testing import assert_accurate, poisoned_allocations, sample_shapes, strided_views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_loss_and_gradients_meet_the_error_rule(reduction, dtype, triton_device):
    draws = []
    for seed, shape in enumerate(sample_shapes(3, 4, seed=1, largest=65)):
        inputs = [tensor.to(triton_device, dtype).double() for tensor in _inputs(shape, seed)]
        with poisoned_allocations():
            actual = _run(logit_laplace_loss, inputs, dtype, reduction)
        assert [result.dtype for result in actual] == [torch.float32, dtype, dtype]
        draws.append((actual, _run(_plain, inputs, dtype, reduction), _run(_plain, inputs, torch.float64, reduction)))
    for index, name in enumerate(("loss", "gradient of mu", "gradient of log_b")):
        assert_accurate(*([results[index] for results in column] for column in zip(*draws)), name)


def test_a_mean_s_gradient_is_divided_in_one_rounding(triton_device):
    upstream = torch.full((), 0.7, device=triton_device)
    for count in (1, 3, 41, 49, 1023):
        x, log_b = torch.full((count,), 0.5, device=triton_device), torch.zeros(count, device=triton_device)
        mu = torch.ones(count, device=triton_device, requires_grad=True)
        (gradient,) = torch.autograd.grad(logit_laplace_loss(x, mu, log_b), mu, upstream)
        # On the CPU: a GPU's torch divides by a number through its inverse, in two roundings.
        assert torch.equal(gradient.cpu(), (upstream.cpu() / count).expand(count))


def test_strides_are_read_in_place(triton_device):
    inputs = [tensor.to(triton_device) for tensor in _inputs((4, 6, 5), 3, torch.float32)]
    expected = _run(logit_laplace_loss, inputs, torch.float32, "none")
    views = zip(*map(strided_views, inputs))
    mixed = [(name, view) for (name, view), (_, _), (_, _) in zip(*map(strided_views, inputs))][-1]
    for (name, x), *leaves in [*views, (mixed, *(("", tensor) for tensor in inputs[1:]))]:
        leaves = [leaf.detach().requires_grad_() for _, leaf in leaves]
        loss = logit_laplace_loss(x, *leaves, "none")
        weight = torch.linspace(-1, 1, loss.numel(), device=loss.device).view(loss.shape)
        grads = torch.autograd.grad(loss, leaves, weight.transpose(0, 2).contiguous().transpose(0, 2))
        torch.testing.assert_close([loss, *grads], expected, rtol=1e-6, atol=1e-6, msg=name)


def test_channels_of_one_decoder_output(triton_device):
    """Halves of one tensor, in the memory of channels first and of channels last."""
    x, mu, log_b = (tensor.to(triton_device) for tensor in _inputs((2, 3, 4, 4), 4, torch.float32))
    _, grad_mu, grad_log_b = _run(logit_laplace_loss, (x, mu, log_b), torch.float32, "mean")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        output = torch.cat([mu, log_b], dim=1).detach().to(memory_format=memory_format).requires_grad_()
        logit_laplace_loss(x, *output.chunk(2, dim=1)).backward()
        torch.testing.assert_close(output.grad, torch.cat([grad_mu, grad_log_b], dim=1), rtol=1e-6, atol=1e-9)


def test_mixed_dtypes_the_kink_and_no_dimensions(triton_device):
    x, mu, log_b = (tensor.to(triton_device) for tensor in _inputs((3, 4), 5, torch.float32))
    loss = logit_laplace_loss(x, mu.bfloat16(), log_b.half(), "none")
    torch.testing.assert_close(loss, _plain(x, mu.bfloat16().float(), log_b.half().float(), "none"))
    mu = torch.zeros((), device=triton_device, requires_grad=True)
    logit_laplace_loss(torch.full((), 0.5, device=triton_device), mu, torch.zeros((), device=triton_device)).backward()
    assert mu.grad.item() == 0


def test_empty_and_outside(triton_device):
    empty = torch.zeros(0, 3, device=triton_device)
    assert logit_laplace_loss(empty, empty, empty, "none").shape == (0, 3)
    assert logit_laplace_loss(empty, empty, empty, "sum").item() == 0
    assert logit_laplace_loss(empty, empty, empty).isnan()
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, torch.nan], device=triton_device)
    zeros = torch.zeros(5, device=triton_device)
    assert torch.isfinite(logit_laplace_loss(x, zeros, zeros, "none")).tolist() == [False, False, True, False, False]


def test_the_ends_are_the_reference_s(triton_device):
    """But for subnormal pixels, which a GPU's logarithm may take for 0."""
    pixels, *rest = EDGES
    pixels = [pixel for pixel in pixels if pixel != 1e-40]
    inputs = [tensor.flatten() for tensor in torch.meshgrid(*map(torch.tensor, (pixels, *rest)), indexing="ij")]
    results = [_run(logit_laplace_loss, [tensor.to(triton_device) for tensor in inputs], torch.float32, "none")]
    with dalle_kernels.use("reference"):
        results.append(_run(logit_laplace_loss, inputs, torch.float32, "none"))
    for name, triton, reference in zip(("loss", "gradient of mu", "gradient of log_b"), *results):
        torch.testing.assert_close(triton.cpu(), reference, rtol=2e-6, atol=1e-6, equal_nan=True, msg=name)


def test_sums_are_the_same_in_every_run_and_near_for_every_block(triton_device):
    inputs = [tensor.to(triton_device) for tensor in _inputs((5003,), 8, torch.float32)]
    first = logit_laplace_loss(*inputs)
    assert torch.equal(logit_laplace_loss(*inputs), first)
    with use_configuration("logit_laplace_loss", "reduced", Configuration({"BLOCK": 128}, num_warps=1)):
        torch.testing.assert_close(logit_laplace_loss(*inputs), first, rtol=1e-7, atol=0)
