"""The linear layer for few rows against float64 and torch's own, its layouts, its module, its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import dalle_kernels
from dalle_kernels import Linear, _native, linear
from dalle_kernels.linear.ops import FEW_ROWS
from dalle_kernels.linear.training import mixed_linear
from dalle_kernels.testing import assert_accurate, poisoned_allocations, strided_views

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (1, 64, 48),
    (2, 17, 5),
    (3, 512, 13),
    (4, 513, 24),
    (5, 1030, 7),
    (8, 256, 25),
    (33, 40, 12),
    (64, 8, 70),
]
native_only = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")


def draw(rows, inputs, outputs, dtype, bias=True):
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    return x, weight, torch.randn(outputs).to(dtype) if bias else None


def assert_meets_the_error_rule(shape, dtype, result_dtype=None, bias=True):
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        x, weight, bias_of_draw = draw(*shape, dtype, bias)
        with poisoned_allocations():
            actual = linear(x, weight, bias_of_draw, result_dtype)
        assert actual.dtype == (result_dtype or dtype)
        inputs = [t if t is None else t.to(actual.dtype) for t in (x, weight, bias_of_draw)]
        exact = F.linear(*(t if t is None else t.double() for t in inputs))
        results.append((actual, F.linear(*inputs), exact))
    assert_accurate(*zip(*results), f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_meet_the_error_rule(shape, dtype):
    assert_meets_the_error_rule(shape, dtype)
    assert_meets_the_error_rule(shape, dtype, torch.float32, bias=False)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (FEW_ROWS + 1, 4, 3)])
def test_what_the_kernel_does_not_take_is_torchs(shape):
    for dtype in (torch.float32, torch.float64):
        x, weight, bias = draw(*shape, dtype)
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        assert dalle_kernels.explain("linear", x, weight, bias, dtype).runs == "reference"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_other_dtypes_are_torchs(dtype):
    x, weight, bias = draw(3, 4, 5, dtype)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_any_layout_and_any_leading_dimensions():
    x, weight, bias = draw(6, 20, 9, torch.float32)
    expected = linear(x, weight, bias)
    for (_, view), (_, weights), (_, biases) in zip(strided_views(x), strided_views(weight), strided_views(bias)):
        torch.testing.assert_close(linear(view, weights, biases), expected)
    assert torch.equal(linear(x.view(2, 1, 3, 20), weight, bias), expected.view(2, 1, 3, 9))
    assert torch.equal(linear(x[0], weight, bias), expected[0])
    rows = torch.randn(6, 3, 20)
    rows[:, -1] = x
    assert torch.equal(linear(rows[:, -1], weight, bias), expected)


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other_row_and_no_thread(dtype):
    x, weight, bias = draw(13, 700, 50, dtype)
    together, threads = linear(x, weight, bias), torch.get_num_threads()
    for rows in (1, 2, 3, 5):
        assert torch.equal(torch.cat([linear(part, weight, bias) for part in x.split(rows)]), together)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(linear(x, weight, bias), together)
    finally:
        torch.set_num_threads(threads)


@native_only
def test_which_provider_runs_and_why():
    for dtype in DTYPES:
        x, weight, bias = draw(4, 20, 9, dtype)
        assert dalle_kernels.explain("linear", x, weight, bias, dtype).runs == "native"
        assert dalle_kernels.explain("linear", x, weight, None, torch.float32).runs == "native"
    found = dalle_kernels.explain("linear", x.t().contiguous().t(), weight, bias, dtype)
    assert found.runs == "reference" and "takes a contiguous x" in str(found)
    found = dalle_kernels.explain("linear", x, weight.t().contiguous().t(), bias, dtype)
    assert found.runs == "reference" and "whose rows are contiguous" in str(found)


def test_gradients_and_autocast_are_torchs():
    x, weight, bias = (t.requires_grad_() for t in draw(3, 5, 4, torch.float64))
    assert torch.autograd.gradcheck(linear, (x, weight, bias))
    layer = Linear(5, 4)
    x = torch.randn(3, 5)
    layer(x).square().sum().backward()
    plain = torch.nn.Linear(5, 4)
    plain.load_state_dict(layer.state_dict())
    plain(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad) and torch.equal(layer.bias.grad, plain.bias.grad)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(layer(x), plain(x)) and layer(x).dtype == torch.bfloat16
        assert linear(x, layer.weight, layer.bias, torch.float32).dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain(x))


def test_transforms_and_forward_mode_are_torchs():
    x, weight, bias = draw(3, 5, 4, torch.float32)

    def results(layer):
        def loss(x):
            return layer(x, weight, bias).square().sum()

        with forward_ad.dual_level():
            yield forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x + 1), weight, bias)).tangent
        yield torch.func.jvp(loss, (x,), (x + 1,))[1]
        yield torch.func.grad(lambda x: torch.vmap(loss)(x[None]).sum())(x)
        yield torch.vmap(torch.func.grad(loss))(x[None])
        yield torch.func.jacfwd(loss)(x)
        yield torch.func.hessian(loss)(x)

    torch.testing.assert_close(list(results(linear)), list(results(F.linear)))


def test_a_named_dtype_holds_under_autocast_with_and_without_a_gradient():
    x, weight, bias = draw(3, 5, 4, torch.float32)
    expected = F.linear(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        for tensor in (x, x.clone().requires_grad_()):
            torch.testing.assert_close(linear(tensor, weight, bias, torch.float32), expected)


def test_tensors_without_values_pass():
    assert Linear(5, 4, device="meta")(torch.empty(3, 5, device="meta")).shape == (3, 4)
    with torch.no_grad():
        assert Linear(5, 4, device="meta")(torch.empty(3, 5, device="meta")).is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    operator = torch.ops.dalle_kernels.linear.default
    x, weight, bias = draw(4, 20, 9, dtype)
    torch.library.opcheck(operator, (x, weight, bias, dtype))
    torch.library.opcheck(operator, (x, weight, None, torch.float32))


def test_compiles_into_one_graph():
    x, weight, bias = draw(3, 20, 9, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: linear(x * 2, weight, bias) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear(x * 2, weight, bias) + 1)


def test_mistakes_get_one_clear_sentence():
    x, weight, bias = draw(3, 5, 4, torch.float32)
    with pytest.raises(TypeError, match=r"expected weight of x's dtype torch.float32, got torch.float16"):
        linear(x, weight.half(), bias)
    with pytest.raises(TypeError, match=r"expected bias of x's dtype torch.float32, got torch.float64"):
        linear(x, weight, bias.double())
    with pytest.raises(ValueError, match="expected weight on x's device cpu, got meta"):
        linear(x, weight.to("meta"), bias)
    with pytest.raises(ValueError, match="expected bias on x's device cpu, got meta"):
        linear(x, weight, bias.to("meta"))
    with pytest.raises(ValueError, match=r"got shapes \[3, 5\] and \[5, 4\]"):
        linear(x, weight.t(), bias)
    with pytest.raises(ValueError, match=r"expected bias of shape \[4\], got \[3\]"):
        linear(x, weight, bias[:3])


CHECK_ONE_INSTRUCTION_SET = """
from test_linear import *
from dalle_kernels import _native
assert _native.instruction_sets()[2] == {isa!r}
for shape in SHAPES:
    for dtype in DTYPES:
        assert_meets_the_error_rule(shape, dtype)
        assert_meets_the_error_rule(shape, dtype, torch.float32, bias=False)
"""


@native_only
def test_every_instruction_set_meets_the_error_rule(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (7, 33, 12), (130, 40, 9)])
def test_a_bias_in_float32_beside_16_bits(shape, dtype):
    """The layer in training against float64, and torch's own with everything in 16 bits."""
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    layer = Linear(inputs, outputs)
    layer.weight.data = layer.weight.data.to(dtype)
    x, grad = torch.randn(2, rows, inputs, dtype=dtype), torch.randn(2, rows, outputs, dtype=dtype)

    def results(x, weight, bias, function):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
        out = function(*leaves)
        out.backward(grad.to(out.dtype))
        return [out, *(leaf.grad for leaf in leaves)]

    arguments = (x, layer.weight, layer.bias)
    exact = results(*(tensor.double() for tensor in arguments), F.linear)
    plain = results(x, layer.weight, layer.bias.to(dtype), F.linear)
    x = x.requires_grad_()
    out = layer(x)
    out.backward(grad)
    ours = [out, x.grad, layer.weight.grad, layer.bias.grad]
    assert [tensor.dtype for tensor in ours] == [dtype, dtype, dtype, torch.float32]
    for name, *tensors in zip(("out", "x", "weight", "bias"), ours, plain, exact, strict=True):
        assert_accurate(*tensors, name)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), out, rtol=2e-2, atol=2e-2)


def test_a_bias_gradient_leaves_the_range_of_16_bits():
    layer = Linear(1, 1)
    layer.weight.data = layer.weight.data.half()
    layer(torch.ones(4, 1).half()).backward(torch.full((4, 1), 60000.0).half())
    assert layer.bias.grad.item() == 4 * torch.tensor(60000.0).half().item()


def test_mixed_linear_names_the_dtypes_that_it_wants():
    with pytest.raises(TypeError, match=r"x and weight in float16 or bfloat16 and bias in float32, got .*float32"):
        mixed_linear(torch.ones(1, 1), torch.ones(1, 1).half(), torch.ones(1))
