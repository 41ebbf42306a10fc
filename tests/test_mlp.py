"""The MLP for training against float64 and plain PyTorch, its gradients, when it takes its own way, its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import dalle_kernels
from dalle_kernels import _native, mlp
from dalle_kernels.testing import assert_accurate, poisoned_allocations, strided_views

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((1,), 1, 1, 1), ((5,), 3, 7, 2), ((2, 33), 16, 64, 16), ((3, 1, 50), 40, 129, 24), ((200,), 33, 100, 33)]
NAMES = ("x", "expansion", "expansion_bias", "contraction", "contraction_bias")
native_only = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")


def draw(leading, dim, width, outputs, dtype=torch.float32):
    shapes = ((*leading, dim), (width, dim), (width,), (outputs, width), (outputs,))
    return [(torch.randn(shape) / (shape[-1] ** 0.5 if i in (1, 3) else 1)).to(dtype) for i, shape in enumerate(shapes)]


def plain(x, expansion, expansion_bias, contraction, contraction_bias):
    return F.linear(F.gelu(F.linear(x, expansion, expansion_bias)), contraction, contraction_bias)


def with_gradients(function, tensors, grad_out):
    """The result and the gradient of every tensor."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad_out)


def assert_meets_the_error_rule(shape, dtype, scale=1.0):
    draws = []
    # A slope of GELU near its zero is what two terms leave of each other: of few results many draws tell.
    for seed in range(3 if shape[2] > 10 else 40):
        torch.manual_seed(seed)
        tensors = draw(*shape, dtype)
        tensors[0] *= scale
        grad_out = torch.randn(*shape[0], shape[3]).to(dtype)
        with poisoned_allocations():
            actual = with_gradients(mlp, tensors, grad_out)
        exact = with_gradients(plain, [tensor.double() for tensor in tensors], grad_out.double())
        draws.append(zip(actual, with_gradients(plain, tensors, grad_out), exact))
    for name, *results in zip(("out", *NAMES), *draws):
        assert_accurate(*zip(*results), f"{name} of {shape}, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_meet_the_error_rule(shape, dtype):
    assert_meets_the_error_rule(shape, dtype)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_small_and_large_inputs_meet_the_error_rule(scale):
    assert_meets_the_error_rule(SHAPES[2], torch.float32, scale)


def test_reference_gradients():
    tensors = [tensor.double().requires_grad_() for tensor in draw((2, 3), 4, 5, 3)]
    assert dalle_kernels.explain("mlp", *tensors).runs == "reference"
    assert torch.autograd.gradcheck(mlp, tensors)


def test_no_rows():
    tensors = draw((0, 3), 4, 5, 2)
    out, *gradients = with_gradients(mlp, tensors, torch.empty(0, 3, 2))
    assert out.shape == (0, 3, 2)
    assert all(gradient.shape == tensor.shape and not gradient.any() for gradient, tensor in zip(gradients, tensors))


def test_any_layout():
    tensors, grad_out = draw((4, 6), 10, 20, 9), torch.randn(4, 6, 9)
    expected = with_gradients(mlp, tensors, grad_out)
    for views in zip(*(strided_views(tensor) for tensor in (*tensors, grad_out))):
        *arguments, grad_view = (view for _, view in views)
        torch.testing.assert_close(with_gradients(mlp, arguments, grad_view), expected)
    summed = with_gradients(mlp, tensors, torch.ones(()).expand(4, 6, 9))
    torch.testing.assert_close(summed, with_gradients(plain, tensors, torch.ones(4, 6, 9)))


def test_infinities_and_nan_are_plain_pytorchs():
    one, zero = torch.ones(1, 1), torch.zeros(1)
    for value in (torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 20.0, -20.0, 0.0):
        tensors = (torch.full((1, 1), value), one, zero, one, zero)
        actual, expected = (with_gradients(function, tensors, one)[:2] for function in (mlp, plain))
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_which_provider_runs_and_why(dtype):
    tensors = draw((4,), 8, 16, 8, dtype)
    assert dalle_kernels.explain("mlp", *tensors).runs == "native"
    tensors[2] = torch.randn(32).to(dtype)[::2]
    found = dalle_kernels.explain("mlp", *tensors)
    assert found.runs == "reference" and "takes a contiguous hidden layer and bias" in str(found)


@native_only
def test_gelu_and_its_slope_on_a_grid():
    x = torch.linspace(-14, 14, 100_001)[None]
    activation, slope, bias, total = torch.empty_like(x), torch.ones_like(x), torch.zeros(1), torch.empty(1)
    addresses = [tensor.data_ptr() for tensor in (x, bias, slope, activation, total)]
    _native.call("bias_gelu_backward", x.device, 0, *x.shape, *addresses)
    exact = x.double().requires_grad_()
    exact_slope = torch.autograd.grad(F.gelu(exact).sum(), exact)[0]
    assert_accurate(activation, F.gelu(x), F.gelu(exact), "activation")
    assert_accurate(slope, torch.ops.aten.gelu_backward(torch.ones_like(x), x), exact_slope, "slope")


@native_only
def test_the_kernels_bits_do_not_depend_on_threads():
    hidden, bias, grad = torch.randn(50, 3000), torch.randn(50), torch.randn(50, 3000)

    def run():
        gradient, activation, sums = grad.clone(), torch.empty_like(grad), torch.empty_like(bias)
        addresses = [tensor.data_ptr() for tensor in (hidden, bias, gradient, activation, sums)]
        _native.call("bias_gelu_backward", hidden.device, 0, *hidden.shape, *addresses)
        return gradient, activation, sums

    threads, expected = torch.get_num_threads(), run()
    torch.testing.assert_close(expected[2], expected[0].double().sum(1).float(), atol=1e-4, rtol=1e-6)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(threads)


def test_half_the_hidden_layer_is_kept():
    tensors = [tensor.requires_grad_() for tensor in draw((40,), 8, 64, 8)]

    def kept(function):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.shape) or tensor, lambda t: t):
            function(*tensors)
        return sizes.count((40, 64)) + sizes.count((64, 40))

    assert (kept(mlp), kept(plain)) == (1, 2)


def test_otherwise_it_is_plain_pytorch():
    tensors = draw((3,), 5, 8, 4)
    with torch.no_grad():
        torch.testing.assert_close(mlp(*tensors), plain(*tensors))
    frozen = [tensor.clone().requires_grad_(i > 2) for i, tensor in enumerate(tensors)]
    assert "dalle_kernels" not in repr(mlp(*frozen).grad_fn) and mlp(*frozen).grad_fn.name() == "AddmmBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        assert mlp(*leaves).dtype == torch.bfloat16 and torch.equal(mlp(*leaves), plain(*leaves))
    loss = torch.func.grad(lambda *inputs: mlp(*inputs).square().sum(), argnums=(0, 1, 2, 3, 4))
    plain_loss = torch.func.grad(lambda *inputs: plain(*inputs).square().sum(), argnums=(0, 1, 2, 3, 4))
    torch.testing.assert_close(loss(*tensors), plain_loss(*tensors))
    assert mlp(*(tensor.to("meta").requires_grad_() for tensor in tensors)).shape == (3, 4)


def test_under_checkpointing_and_twice_through_one_graph():
    tensors, grad_out = draw((6,), 5, 8, 4), torch.randn(6, 4)
    expected = with_gradients(mlp, tensors, grad_out)
    again = with_gradients(lambda *leaves: checkpoint(mlp, *leaves, use_reentrant=False), tensors, grad_out)
    assert all(map(torch.equal, again, expected))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = mlp(*leaves)
    for _ in range(2):
        gradients = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
        assert all(map(torch.equal, gradients, expected[1:]))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out, leaves, grad_out, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors = draw((2, 3), 8, 16, 4, dtype)
    torch.library.opcheck(torch.ops.dalle_kernels.mlp.default, [tensor.requires_grad_() for tensor in tensors])
    saved = (torch.randn(2, 3, 4).to(dtype), tensors[0], torch.randn(16, 6).to(dtype), *tensors[1:4])
    torch.library.opcheck(torch.ops.dalle_kernels.mlp_backward.default, [tensor.detach() for tensor in saved])


def test_compiles_into_one_graph():
    tensors, grad_out = draw((3,), 5, 8, 4), torch.randn(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, tensors, grad_out), with_gradients(plain, tensors, grad_out))


def test_mistakes_get_one_clear_sentence():
    x, *weights = (tensor.requires_grad_() for tensor in draw((3,), 5, 8, 4))
    with pytest.raises(TypeError, match=r"expected weight of x's dtype torch.float64, got torch.float32"):
        mlp(x.double(), *weights)
    with pytest.raises(ValueError, match=r"got shapes \[3, 5\] and \[8, 4\]"):
        mlp(x, weights[0][:, :4], *weights[1:])
    with pytest.raises(ValueError, match=r"expected bias of shape \[8\], got \[7\]"):
        mlp(x, weights[0], weights[1][:7], *weights[2:])
    with pytest.raises(ValueError, match=r"expected bias of shape \[4\], got \[3\]"):
        mlp(x, *weights[:3], weights[3][:3])


CHECK_ONE_INSTRUCTION_SET = """
from test_mlp import *
from dalle_kernels import _native
assert _native.instruction_sets()[2] == {isa!r}
for shape in SHAPES:
    for dtype in DTYPES:
        assert_meets_the_error_rule(shape, dtype)
"""


@native_only
def test_every_instruction_set_meets_the_error_rule(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)
