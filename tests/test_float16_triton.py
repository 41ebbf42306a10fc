"""Triton's kernels of family float16 give the reference's bits: on a GPU, else by the interpreter."""

from __future__ import annotations

import pytest
import torch

import dalle_kernels
from dalle_kernels._triton_configurations import Configuration, use_configuration
from dalle_kernels.testing import poisoned_allocations, strided_views

FORMATS = ("fp169", "fp0610")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CODES = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16)


def random_numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of every size, subnormals, infinities and NaN of both signs among them."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(count)).to(torch.int32)
    values = bits.view(torch.float32)
    return torch.where(torch.arange(count) % 3 == 0, values, torch.ldexp(values % 2 - 1, bits % 64 - 62)).to(dtype)


def check(form: str, x: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> None:
    """Encoding ``x`` and decoding ``codes`` by the forced provider, against the reference."""
    encode, decode = (getattr(dalle_kernels, name) for name in (f"encode_{form}_checked", f"decode_{form}"))
    with poisoned_allocations():
        results = (*encode(x), decode(codes, dtype))
    with dalle_kernels.use("reference"):
        expected = (*encode(x), decode(codes, dtype))
    for got, wanted in zip(results, expected, strict=True):
        assert got.is_contiguous() and got.dtype == wanted.dtype and torch.equal(got, wanted)
    assert torch.equal(results[2].signbit(), expected[2].signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_code_and_numbers_of_every_size(form, dtype, triton_device):
    check(form, random_numbers(40_003, dtype).to(triton_device), CODES.to(triton_device), dtype)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", (0, 1, 7, 33, 1023, 1024, 1025))
def test_odd_sizes(size, form, triton_device):
    x = random_numbers(size + 1, torch.float32).to(triton_device)[1:]  # off any vector's alignment
    check(form, x, CODES[:size].to(triton_device), torch.float32)


@pytest.mark.parametrize("form", FORMATS)
def test_strides_are_read_in_place(form, triton_device):
    x = random_numbers(5 * 7 * 3, torch.float32).view(5, 7, 3).to(triton_device)
    codes = CODES[::624][: x.numel()].view(x.shape).to(triton_device)
    for (_, view), (_, code_view) in zip(strided_views(x), strided_views(codes), strict=True):
        check(form, view, code_view, torch.bfloat16)
    check(form, x[:, :1].expand(5, 4, 3), codes.transpose(0, 1)[:, :, None, 1:], torch.float32)
    check(form, x[0, 0, 0], codes[0, 0, 0], torch.float32)


@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan))
def test_one_number_that_is_not_finite_is_found_wherever_it_is(value, triton_device):
    for position in (0, 2048, 4999):
        x = torch.zeros(5000, device=triton_device)
        assert not dalle_kernels.encode_fp169_checked(x)[1].item()
        x[position] = value
        assert dalle_kernels.encode_fp169_checked(x)[1].item()


def test_any_block_size_serves(triton_device):
    x, codes = random_numbers(1000, torch.float32).to(triton_device), CODES[:1000].to(triton_device)
    with (
        use_configuration("encode", "dense", Configuration({"BLOCK": 64}, num_warps=1)),
        use_configuration("decode", "dense", Configuration({"BLOCK": 128}, num_warps=1)),
    ):
        check("fp169", x, codes, torch.float16)
