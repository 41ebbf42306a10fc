"""Triton's kernels of family grad_scale give the reference's bits: on a GPU, else by the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import dalle_kernels
from dalle_kernels import filter_cast_unscale, scale_cast_filter
from dalle_kernels._triton_configurations import Configuration, use_configuration
from dalle_kernels.testing import poisoned_allocations

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (0,), (3, 5), (5001,), (64,), (2, 0, 3), (), (129, 65)] + [(7,)] * 150
"""Empty, odd and many: more numbers than one launch writes into a table."""


def awkward(shape, dtype, seed) -> torch.Tensor:
    """Numbers of all sizes, some of which overflow or vanish when scaled and cast."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-40, 24, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def check(op, *args) -> None:
    with poisoned_allocations():
        outputs, nonfinite = op(*args)
    with dalle_kernels.use("reference"):
        expected, expected_nonfinite = op(*args)
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.dtype == wanted.dtype and got.stride() == wanted.stride() and torch.equal(got, wanted)
    assert torch.equal(nonfinite, expected_nonfinite)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_tensors_in_one_launch(dtype, triton_device):
    tensors = [awkward(shape, dtype, seed).to(triton_device) for seed, shape in enumerate(SHAPES)]
    scale = torch.tensor(1.37 * 2**13, device=triton_device)
    check(filter_cast_unscale, tensors, scale)
    for to in FLOATS:
        check(scale_cast_filter, tensors, scale, to)


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_one_number_that_is_not_finite_is_found_wherever_it_is(value, triton_device):
    tensors = [torch.ones(size, device=triton_device) for size in (5, 9000, 1)]
    scale = torch.ones((), device=triton_device)
    assert not filter_cast_unscale(tensors, scale)[1].item()
    for tensor in tensors:
        for position in {0, 4096 % len(tensor), len(tensor) - 1}:
            tensor[position] = value
            check(filter_cast_unscale, tensors, scale)
            check(scale_cast_filter, tensors, scale, torch.bfloat16)
            tensor[position] = 1


def test_layouts_addresses_and_nothing(triton_device):
    base = awkward((6, 8, 10), torch.float32, 0).to(triton_device)
    scale = torch.tensor([3.0], device=triton_device)
    check(filter_cast_unscale, [base.transpose(0, 2)], scale)
    check(filter_cast_unscale, [base.flatten()[1:], base.flatten()[3:50]], scale)  # off any vector's alignment
    check(filter_cast_unscale, [base[0, :0]], scale)
    with pytest.raises(dalle_kernels.ProviderError, match="takes tensors that are dense"):
        filter_cast_unscale([base[:, ::2]], scale)


@pytest.mark.parametrize("block", (64, 512))
def test_any_block_size_serves(block, triton_device):
    tensors = [awkward((size,), torch.float32, size).to(triton_device) for size in (block - 1, block, block + 1, 1300)]
    with use_configuration("grad_scale", "any", Configuration({"BLOCK": block}, num_warps=2)):
        check(scale_cast_filter, tensors, torch.tensor(100.0, device=triton_device), torch.float16)
