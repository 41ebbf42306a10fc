"""The exponential and the logarithms of csrc/common/vector_math.h against float64, for every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_kernels import _native

FUNCTIONS = {"exponential": (0, torch.exp), "natural_log": (1, torch.log), "log1p": (2, torch.log1p)}
UNIT = 2.0**-24
# The header's figures, rounded up.
LIMITS = {"exponential": 1.5, "natural_log": 1.5, "log1p": 2.2}

pytestmark = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the CPU library is not built")


def _apply(name: str, x: torch.Tensor) -> torch.Tensor:
    output = torch.full_like(x, math.nan)
    number = FUNCTIONS[name][0]
    _native.library("cpu").elementwise(
        function=number, input=x.data_ptr(), output=output.data_ptr(), count=x.numel(), executor=1
    )
    return output


def _floats(first: float, last: float, step: int) -> torch.Tensor:
    """Every ``step``-th float between two positive ones."""
    first_bits, last_bits = (torch.tensor(bound).view(torch.int32).item() for bound in (first, last))
    return torch.arange(first_bits, last_bits, step, dtype=torch.int32).view(torch.float32)


INPUTS = {
    "exponential": [
        _floats(1e-9, 88.72283, 1009),
        -_floats(1e-9, 87.33654, 1009),
        torch.tensor([88.72283, -87.33654]),
    ],
    "natural_log": [_floats(1e-45, 3.4e38, 9973), _floats(0.5, 2.0, 101)],
    "log1p": [_floats(1e-38, 3.4e38, 9973), -_floats(1e-38, 1.0, 4999), _floats(0.3, 0.5, 31), -_floats(0.1, 1.0, 101)],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_relative_error_everywhere(name, instruction_set):
    x = torch.cat(INPUTS[name])
    exact = FUNCTIONS[name][1](x.double())
    error = (_apply(name, x).double() - exact).abs() / exact.abs().clamp(min=torch.finfo(torch.float64).tiny)
    assert error.max().item() <= LIMITS[name] * UNIT
    assert error.max().item() > 0.5 * UNIT, "the test sees rounding"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name, instruction_set):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -1.0, -2.0, 3.4e38, -3.4e38, 88.73, -87.34, -104.0])
    expected = FUNCTIONS[name][1](x)
    expected[expected.abs() < torch.finfo(torch.float32).tiny] = 0.0
    torch.testing.assert_close(_apply(name, x), expected, rtol=3e-7, atol=0, equal_nan=True)
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert _apply(name, payloads).isnan().all()


@pytest.mark.parametrize("count", [0, 1, 3, 7, 15, 17, 33])
def test_leftover_lanes(count, instruction_set):
    x = torch.rand(count, generator=torch.Generator().manual_seed(count))
    torch.testing.assert_close(_apply("log1p", x), x.log1p())
