"""Scale-cast-filter and its way back: against their definition, and the compiled kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.grad_scale import ops
from dalle_kernels.grad_scale.ops import filter_cast_unscale, scale_cast_filter
from dalle_kernels.testing import poisoned_allocations

NATIVE = _native.unavailable("cpu") is None
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled library is not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALE = torch.tensor(1.37 * 2**13)


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "reference"])
def provider(request):
    with dalle_kernels.use(request.param):
        yield request.param


def awkward(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Numbers of all sizes, some of which overflow or vanish when scaled and cast."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-40, 24, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scales_casts_and_filters(dtype, provider):
    x = awkward((3001,))
    (y,), nonfinite = scale_cast_filter([x], SCALE, dtype)
    cast = (x * SCALE).to(dtype)
    assert torch.equal(y, torch.where(cast.isfinite(), cast, 0)) and y.isfinite().all()
    assert nonfinite.shape == () and nonfinite.dtype == torch.bool
    assert nonfinite.item() == (not cast.isfinite().all())
    assert nonfinite.item() == (dtype == torch.float16)  # whose range the numbers exceed


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_filters_casts_and_divides(dtype, provider):
    x = awkward((3001,), dtype)
    x[[0, 2000, 3000]] = torch.tensor([math.inf, math.nan, -math.inf]).to(dtype)
    (y,), nonfinite = filter_cast_unscale([x], SCALE)
    assert y.dtype == torch.float32 and nonfinite.item()
    assert torch.equal(y, torch.where(x.isfinite(), x, 0).float() / SCALE)
    assert not filter_cast_unscale([torch.ones(70)], SCALE)[1].item()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_the_largest_number_is_kept_and_what_rounds_beyond_it_is_not(dtype, provider):
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float32)
    half_way = torch.tensor(65520.0 if dtype == torch.float16 else (2 - 2.0**-8) * 2.0**127)
    below = torch.nextafter(half_way, torch.tensor(0.0))
    x = torch.stack([largest, below, half_way, -below, -half_way, torch.tensor(math.inf), torch.tensor(math.nan)])
    (y,), nonfinite = scale_cast_filter([x], torch.tensor(1.0), dtype)
    assert y.tolist() == [largest.item(), largest.item(), 0, -largest.item(), 0, 0, 0] and nonfinite.item()
    assert not scale_cast_filter([x[:2]], torch.tensor(1.0), dtype)[1].item()


def test_there_and_back_is_the_identity_in_range(provider):
    x = torch.randn(1000).half().float()
    there, overflow = scale_cast_filter([x], torch.tensor(2.0**5), torch.float16)
    (back,), nonfinite = filter_cast_unscale(there, torch.tensor(2.0**5))
    assert torch.equal(back, x) and not overflow and not nonfinite


def native_and_reference(op, *args):
    with dalle_kernels.use("native"), poisoned_allocations():
        native = op(*args)
    with dalle_kernels.use("reference"):
        return native, op(*args)


def assert_same(got, expected) -> None:
    for a, b in zip(got[0], expected[0], strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    assert torch.equal(got[1], expected[1])


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_equals_reference_over_many_tensors_and_threads(dtype):
    shapes = [(1,), (0,), (3, 5), (40_001,), (64,), (2, 0, 3), (), (129, 65)] + [(7,)] * 100
    tensors = [awkward(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for to in FLOATS:
                assert_same(*native_and_reference(scale_cast_filter, tensors, SCALE, to))
            assert_same(*native_and_reference(filter_cast_unscale, tensors, SCALE))
        # One bad number in any thread's share is reported.
        for index in (0, 3, 7, 107):
            tensors[index].view(-1)[-1] = math.nan
            assert filter_cast_unscale(tensors, SCALE)[1].item()
            tensors[index].view(-1)[-1] = 1
        assert not filter_cast_unscale([t.nan_to_num(0, 0, 0) for t in tensors], SCALE)[1].item()
    finally:
        torch.set_num_threads(before)


def test_any_strides():
    base = awkward((6, 8, 10))
    for x, dense in ((base.transpose(0, 2), True), (base[:, ::2], False), (base[..., 3], False)):
        assert not NATIVE or dalle_kernels.explain("filter_cast_unscale", [x], SCALE).runs == (
            "native" if dense else "reference"
        )
        for op, to in ((scale_cast_filter, (torch.float16,)), (filter_cast_unscale, ())):
            (y,), _ = op([x], SCALE, *to)
            (expected,), _ = op([x.contiguous()], SCALE, *to)
            assert torch.equal(y, expected)


def test_empty_lists(provider):
    for outputs, nonfinite in (scale_cast_filter([], SCALE), filter_cast_unscale([], SCALE)):
        assert outputs == [] and not nonfinite.item()


def test_opcheck_and_one_graph(provider):
    tensors = [awkward((3, 4)), awkward((5,))]
    torch.library.opcheck(ops.scale_cast_filter_op.overload, (tensors, SCALE, torch.float16))
    torch.library.opcheck(ops.filter_cast_unscale_op.overload, (tensors, SCALE))

    def both(a, b, scale):
        outputs, found = scale_cast_filter([a, b], scale, torch.float16)
        return *filter_cast_unscale(outputs, scale)[0], found

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*tensors, SCALE), both(*tensors, SCALE), strict=True):
        assert torch.equal(got, expected)


def test_mistakes_get_one_clear_sentence():
    x = torch.ones(3)
    with pytest.raises(TypeError, match="expected scale as a float32 tensor of one element, got float"):
        scale_cast_filter([x], 2.0)
    with pytest.raises(
        TypeError, match=r"expected scale as a float32 tensor of one element, got torch.float32 of shape"
    ):
        filter_cast_unscale([x], torch.ones(2))
    with pytest.raises(TypeError, match=r"expected tensors of float32.*got a tensor of torch.int64"):
        scale_cast_filter([x.long()], SCALE)
    with pytest.raises(TypeError, match=r"expected dtype float16.*got torch.int16"):
        scale_cast_filter([x], SCALE, torch.int16)
    with pytest.raises(ValueError, match="expected tensors on the scale's device cpu, got meta"):
        filter_cast_unscale([x.to("meta")], SCALE)


CHECK_ONE_INSTRUCTION_SET = """
import torch
from dalle_kernels import _native
from test_grad_scale import *
assert _native.instruction_sets()[2] == {isa!r}
bits = torch.randint(-2**31, 2**31, (50_003,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
for dtype in FLOATS:
    x = bits.view(torch.float32).to(dtype)
    for to in FLOATS:
        assert_same(*native_and_reference(scale_cast_filter, [x], torch.tensor(1.3), to))
    assert_same(*native_and_reference(filter_cast_unscale, [x], SCALE))
"""


@needs_native
def test_every_instruction_set_equals_the_reference(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)
