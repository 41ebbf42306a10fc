"""The CPU's matrix product against float64: sizes about its blocks, strides, dtypes, sums, threads; where it serves."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import dalle_kernels
from dalle_kernels import _native, linear
from dalle_kernels.linear import products
from dalle_kernels.linear.ops import FEW_ROWS
from dalle_kernels.linear.products import DTYPES, product
from dalle_kernels.testing import assert_accurate

pytestmark = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")
NARROW = DTYPES[1:]
# rows, depth, columns: below, at and beyond panels (6, 8, 12, 16, 32), pieces of the depth (256), blocks of rows (192)
# and of columns (4096), and what threads share.
SHAPES = [
    (1, 1, 1),
    (6, 8, 16),
    (7, 9, 17),
    (13, 300, 33),
    (12, 256, 32),
    (200, 257, 70),
    (401, 64, 24),
    (5, 1030, 8),
    (70, 20, 4100),
    (64, 600, 130),
]
LAYOUTS = {
    "rows": lambda tensor: tensor.contiguous(),
    "columns": lambda tensor: tensor.t().contiguous().t(),
    "neither": lambda tensor: torch.stack([tensor, tensor + 1], dim=-1)[..., 0],
    "cut": lambda tensor: F.pad(tensor, (3, 2, 1, 1), value=torch.nan)[1:-1, 3:-2],
}


def compiled(a, b, out, bias=None, accumulate=False):
    """Of the kernel itself, into ``out``."""
    _native.call("product", out.device, a, b, bias, out, accumulate)
    return out


def draw(rows, depth, columns, a_dtype=torch.float32, b_dtype=torch.float32):
    return torch.randn(rows, depth).to(a_dtype), torch.randn(depth, columns).to(b_dtype)


def poisoned(rows, columns, dtype=torch.float32):
    return torch.full((rows, columns), torch.nan, dtype=dtype)


def assert_meets_the_error_rule(shape, layouts=("rows", "rows"), dtypes=(torch.float32,) * 3, bias=False):
    *operand_dtypes, dtype = dtypes
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        a, b = (LAYOUTS[name](x) for name, x in zip(layouts, draw(*shape, *operand_dtypes)))
        offset = torch.randn(shape[2]) if bias else None
        exact, plain = a.double() @ b.double(), a.float() @ b.float()
        if bias:
            exact, plain = exact + offset, plain + offset
        actual = compiled(a, b, poisoned(shape[0], shape[2], dtype), offset)
        draws.append((actual, plain.to(dtype), exact))
    assert_accurate(*zip(*draws), f"{shape}, {layouts}, {dtypes}")


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape):
    assert_meets_the_error_rule(shape)
    assert_meets_the_error_rule(shape, ("columns", "columns"), bias=True)


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(layouts):
    assert_meets_the_error_rule((37, 290, 45), layouts)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_dtypes(dtypes):
    for shape, layout in itertools.product([(37, 290, 45), (18, 40, 64)], ("rows", "columns")):
        assert_meets_the_error_rule(shape, (layout, layout), dtypes, bias=layout == "rows")


def test_expanded_operands():
    ones = torch.ones(()).expand(30, 70)
    assert torch.equal(compiled(ones, ones.t(), poisoned(30, 30)), torch.full((30, 30), 70.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_added_to_what_is_there(shape):
    (a, b), before = draw(*shape), torch.randn(shape[0], shape[2])
    actual = compiled(a, b, before.clone(), accumulate=True)
    assert_accurate(actual, before + a @ b, before.double() + a.double() @ b.double(), f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_between_the_rows(dtype):
    a, b = draw(20, 300, 21)
    memory = poisoned(20, 40, dtype)
    compiled(a, b, memory[:, 4:25])
    assert memory[:, 4:25].isfinite().all() and memory[:, :4].isnan().all() and memory[:, 25:].isnan().all()


def test_no_depth_no_rows_no_columns():
    bias = torch.randn(7)
    for dtype in DTYPES:
        assert torch.equal(compiled(*draw(5, 0, 7), poisoned(5, 7, dtype)), torch.zeros(5, 7, dtype=dtype))
    assert torch.equal(compiled(*draw(5, 0, 7), poisoned(5, 7), bias), bias.expand(5, 7))
    assert torch.equal(compiled(*draw(5, 0, 7), torch.ones(5, 7), accumulate=True), torch.ones(5, 7))
    for rows, columns in ((0, 7), (5, 0), (0, 0)):
        assert compiled(*draw(rows, 3, columns), poisoned(rows, columns)).shape == (rows, columns)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_row_and_column(value):
    a, b = draw(20, 300, 40)
    expected = compiled(a, b, poisoned(20, 40))
    a[13, 270] = b[5, 31] = value
    actual = compiled(a, b, poisoned(20, 40))
    touched = torch.zeros(20, 40, dtype=torch.bool)
    touched[13] = touched[:, 31] = True
    assert torch.equal(actual[~touched], expected[~touched]) and not actual[touched].isfinite().any()


@pytest.mark.parametrize("dtype", NARROW)
def test_results_that_leave_the_range_are_infinite(dtype):
    a = torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(compiled(a, a.t(), poisoned(3, 3, dtype)), torch.full((3, 3), torch.inf, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_no_thread_and_on_no_other_row_or_column(dtype):
    a, b = draw(430, 520, 190)
    threads, expected = torch.get_num_threads(), compiled(a, b, poisoned(430, 190, dtype))
    for rows, columns in (
        (slice(0, 1), slice(0, 1)),
        (slice(7, 20), slice(3, 100)),
        (slice(200, 430), slice(180, 190)),
    ):
        part = compiled(a[rows], b[:, columns], torch.empty_like(expected[rows, columns]))
        assert torch.equal(part, expected[rows, columns])
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(compiled(a, b, poisoned(430, 190, dtype)), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_product_by_either_way(is_compiled, monkeypatch):
    """What :func:`product` returns, and where, is the same whoever computes it."""
    monkeypatch.setattr(products, "is_compiled", lambda: is_compiled)
    monkeypatch.setattr(products, "_PANEL_FLOATS", 70)
    for a_dtype, b_dtype, dtype in itertools.product(DTYPES, DTYPES, DTYPES):
        a, b = draw(9, 30, 11, a_dtype, b_dtype)
        bias, exact = torch.randn(11).to(dtype), a.double() @ b.double()
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 40 * torch.finfo(dtype).eps}
        out = poisoned(9, 20, dtype)[:, 5:16]
        assert product(a, b, bias, out=out) is out
        torch.testing.assert_close(out.double(), exact + bias.double(), **tolerance)
        found = product(a, b, dtype=dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, **tolerance)
        if dtype == torch.float32:
            assert product(a, b, out=out, accumulate=True) is out
            torch.testing.assert_close(out.double(), 2 * exact + bias.double(), **tolerance)


avx2_only = pytest.mark.skipif(not products.is_compiled(), reason="torch's own products serve other instruction sets")


@avx2_only
@pytest.mark.parametrize("dtype", NARROW)
def test_many_rows_of_16_bits(dtype):
    x, weight, bias = torch.randn(2, FEW_ROWS, 40), torch.randn(24, 40), torch.randn(24)
    arguments = [tensor.to(dtype) for tensor in (x, weight, bias)]
    for result in (dtype, torch.float32):
        assert dalle_kernels.explain("linear", *arguments, result).runs == "native"
        exact = F.linear(*(tensor.double() for tensor in arguments))
        plain = F.linear(*(tensor.to(result) for tensor in arguments))
        assert_accurate(linear(*arguments, result), plain, exact, f"{dtype} to {result}")
    arguments = [tensor.float() for tensor in arguments]
    found = dalle_kernels.explain("linear", *arguments, torch.float32)
    assert found.runs == "reference" and "more than 64 rows of torch.float32 are torch's product here" in str(found)
    with dalle_kernels.use("reference"):
        arguments = [tensor.to(dtype) for tensor in (x, weight, bias)]
        assert torch.equal(linear(*arguments), F.linear(*arguments))


@avx2_only
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_of_a_layer_of_16_bits(dtype, has_bias):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 50, 40).to(dtype), torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype)]
    tensors = tensors if has_bias else tensors[:2]
    grad = torch.randn(3, 50, 24).to(dtype)

    def results(function, leaves, wanted):
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(leaves)]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, [leaves[i] for i in wanted], grad.to(out.dtype))]

    wanted = tuple(range(len(tensors)))
    exact = results(F.linear, [tensor.double() for tensor in tensors], wanted)
    actual = results(linear, tensors, wanted)
    assert "NarrowLinear" in repr(actual[0].grad_fn.next_functions)
    for name, *found in zip(("out", "x", "weight", "bias"), actual, results(F.linear, tensors, wanted), exact):
        assert_accurate(*found, name)
    for i in wanted:
        assert torch.equal(results(linear, tensors, (i,))[1], actual[1 + i])
    with dalle_kernels.use("reference"):
        assert all(map(torch.equal, results(linear, tensors, wanted), results(F.linear, tensors, wanted)))


@pytest.mark.parametrize("shape", [((0, 3), 4, 5), ((2,), 0, 5), ((2,), 4, 0), ((), 4, 5), ((2, 1, 3), 4, 5)])
def test_shapes_of_a_layer_of_16_bits(shape):
    leading, inputs, outputs = shape
    tensors = [torch.randn(*leading, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    leaves = [tensor.bfloat16().requires_grad_() for tensor in tensors]
    found, expected = ((out, *torch.autograd.grad(out.sum(), leaves)) for out in (linear(*leaves), F.linear(*leaves)))
    for actual, wanted in zip(found, expected):
        torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)


def test_a_layer_of_16_bits_in_place_and_in_batches():
    x, weight, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((6, 4), (5, 4), (5,)))
    for change in (F.relu_, lambda out: out.add_(1)):
        torch.testing.assert_close(change(linear(x, weight, bias)), change(F.linear(x, weight, bias)))
    hidden = x * 1
    out = linear(hidden, weight.detach(), bias)
    hidden.add_(1)  # which the gradient of a frozen weight would need, and no other
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(6, 4), rtol=2e-2, atol=2e-2)
    grads = torch.randn(3, 6, 5).bfloat16()
    found, expected = (
        torch.autograd.grad(function(x, weight, bias), (x, weight, bias), grads, is_grads_batched=True)
        for function in (linear, F.linear)
    )
    for actual, wanted in zip(found, expected):
        torch.testing.assert_close(actual, wanted, rtol=5e-2, atol=5e-2)


def test_a_frozen_layer_of_16_bits_keeps_no_input():
    x, weight = torch.randn(50, 4).bfloat16().requires_grad_(), torch.randn(5, 4).bfloat16()

    def kept(*leaves):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
            linear(*leaves)
        return sizes

    assert kept(x, weight) == [20] and kept(x.detach(), weight.clone().requires_grad_()) == [200]


@avx2_only
def test_second_derivatives_of_a_layer_of_16_bits_are_torchs():
    x, weight = torch.randn(8, 6).bfloat16().requires_grad_(), torch.randn(5, 6).bfloat16().requires_grad_()

    def second(function):
        (grad,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, weight))

    for actual, expected in zip(second(linear), second(F.linear)):
        torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", NARROW)
def test_sums_on_their_way_to_16_bits_take_their_turns(dtype):
    """More rows than are summed at a time, and more columns than there is room for beside them."""
    a, b = draw(4100, 300, 600)
    actual = compiled(a, b, poisoned(4100, 600, dtype))
    assert_accurate(actual, (a @ b).to(dtype), a.double() @ b.double(), f"{dtype}")
    few = compiled(a[4090:], b[:, 500:], poisoned(10, 100, dtype))
    assert torch.equal(actual[4090:, 500:], few)


def test_sums_of_16_bits_are_not_added_to():
    with pytest.raises(RuntimeError, match="product: expected float32 to add to"):
        compiled(*draw(2, 3, 4), torch.zeros(2, 4).half(), accumulate=True)


CHECK_ONE_INSTRUCTION_SET = """
from test_products import *
from dalle_kernels import _native
assert _native.instruction_sets()[2] == {isa!r}
for shape in SHAPES:
    assert_meets_the_error_rule(shape, ("columns", "columns"), bias=True)
    test_sums_are_added_to_what_is_there(shape)
for dtype in DTYPES:
    test_nothing_is_written_between_the_rows(dtype)
    test_bits_depend_on_no_thread_and_on_no_other_row_or_column(dtype)
test_no_depth_no_rows_no_columns()
test_sums_on_their_way_to_16_bits_take_their_turns(torch.bfloat16)
for layouts in itertools.product(LAYOUTS, LAYOUTS):
    assert_meets_the_error_rule((37, 290, 45), layouts)
for dtypes in itertools.product(DTYPES, DTYPES, DTYPES):
    for layout in ("rows", "columns"):
        assert_meets_the_error_rule((37, 290, 45), (layout, layout), dtypes)
assert products.is_compiled() == ({isa!r} == "avx2")
"""


def test_every_instruction_set_meets_the_error_rule(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)
