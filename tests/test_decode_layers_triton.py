"""Triton's kernels of family transformer against plain PyTorch and float64: on a GPU, else interpreted."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from test_decode_layers import GRID, TEXT_LEN, draw_layers, new_caches

import dalle_kernels
from dalle_kernels import LayerWeights, _triton, decode_layers
from dalle_kernels._triton_configurations import few_rows_blocks, row_blocks, sample_blocks, use_configuration
from dalle_kernels.testing import assert_accurate, poisoned_allocations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_blocks():
    """Blocks that small layers fill and leave, and that the interpreter gets through."""
    small = few_rows_blocks(2, 16, 16, warps=4, stages=1)
    with ExitStack() as stack:
        for key in ("float32 8", "16-bit 8", "float32 16"):
            stack.enter_context(use_configuration("decode_layers", key, small))
            stack.enter_context(use_configuration("decode_layers", f"normed {key}", small))
        for dtype in ("float32", "16-bit"):
            rows, text = row_blocks(16, warps=4, stages=1), sample_blocks(16, 16, warps=4, stages=1)
            stack.enter_context(use_configuration("decode_attention", f"rows {dtype} 64", rows))
            stack.enter_context(use_configuration("decode_attention", f"text {dtype} 64", text))
        yield


def step(x, layers, heads, head_dim, samples, provider, on_device):
    """The token after the text, whose keys and values are drawn at random, alike."""
    prompts, count = len(x) // samples, len(layers)
    caches = new_caches(prompts, heads, head_dim, x.dtype, samples, count, x.device)
    generator = torch.Generator().manual_seed(9)
    for cache in caches:
        text = torch.randn(2, prompts, heads, TEXT_LEN, head_dim, generator=generator).bfloat16()
        cache.prefill(*text.to(x.device, x.dtype))
    position = torch.full((1,), TEXT_LEN, device=x.device) if on_device else None
    with poisoned_allocations(), dalle_kernels.use(provider):
        return decode_layers(x, layers, caches, position=position)


def check(sizes, dtype, device, on_device=False):
    rows, samples, dim, heads, head_dim, hidden = sizes
    results = []
    for seed in range(2 if torch.device(device).type == "cpu" else 40):  # few numbers, whose largest error varies
        torch.manual_seed(seed)
        layers = [
            LayerWeights(*(t.to(device) for t in layer))
            for layer in draw_layers(dim, heads, head_dim, hidden, dtype, 2)
        ]
        exact = [LayerWeights(*(t.double() for t in layer)) for layer in layers]
        x = (torch.randn(rows, dim) + 1).to(device, dtype)
        actual = step(x, layers, heads, head_dim, samples, "triton", on_device)
        plain = step(x, layers, heads, head_dim, samples, "reference", False)
        results.append((actual, plain, step(x.double(), exact, heads, head_dim, samples, "reference", False)))
        again = step(x, layers, heads, head_dim, samples, "triton", not on_device)
        assert torch.equal(actual, again)
    assert_accurate(*zip(*results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 8, 1, 8, 16), (4, 2, 24, 3, 10, 33), (3, 1, 7, 2, 5, 70)])
def test_a_step_meets_the_error_rule(sizes, dtype, triton_device, small_blocks):
    check(sizes, dtype, triton_device)


def test_more_rows_than_eight(triton_device, small_blocks):
    check((11, 1, 16, 1, 16, 32), torch.float32, triton_device, on_device=True)


def test_more_rows_than_the_products_take_go_to_the_library(triton_device, small_blocks):
    check((33, 1, 8, 1, 8, 16), torch.float32, triton_device)


def test_a_place_without_a_step_gives_nan(triton_device, small_blocks):
    layers = [LayerWeights(*(t.to(triton_device) for t in layer)) for layer in draw_layers(8, 1, 8, 16, count=1)]
    x, place = (
        torch.randn(2, 8, device=triton_device),
        torch.full((1,), TEXT_LEN + GRID[0] * GRID[1], device=triton_device),
    )
    caches = new_caches(2, 1, 8, torch.float32, 1, 1, triton_device)
    held = [tensor.clone() for cache in caches for tensor in (cache.text, cache.image)]
    assert decode_layers(x, layers, caches, position=place).isnan().all()
    for before, after in zip(held, (caches[0].text, caches[0].image)):
        torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)


def test_a_kernel_may_start_early_on_hopper_alone():
    device = torch.device("meta")
    for architecture, early in ((80, False), (90, True)):
        with _triton.assume(architecture, 1):
            assert _triton.dependent_launch(device)["DEPENDENT"] == early
