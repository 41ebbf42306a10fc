"""The linear layer against torch's own: of few rows, as in a step of generation, and of many rows of 16 bits.

Of few rows eight weights take turns, so that they come from memory, as those of a model larger than the cache do. Many
rows go forward and backward, as in training, also against torch's layer converted to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Candidate, Case, with_gradients
from torch import Tensor

from dalle_kernels import linear
from dalle_kernels.testing import assert_accurate

WEIGHTS = 8
INPUTS, OUTPUTS = 512, 8192


def through(weights: Iterator[Tensor], function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: function(x, next(weights))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("rows", (1, 8, 32))
def test_few_rows(side_by_side, device, rows, dtype):
    x = torch.randn(rows, INPUTS, device=device).to(dtype)
    weights = [(torch.randn(OUTPUTS, INPUTS, device=device) / INPUTS**0.5).to(dtype) for _ in range(WEIGHTS)]

    def check() -> None:
        with torch.no_grad():
            actual, plain = linear(x, weights[0]), F.linear(x, weights[0])
            assert_accurate(actual, plain, F.linear(x.double(), weights[0].double()), f"linear, {rows} rows, {dtype}")

    with torch.no_grad():
        side_by_side(
            Case(
                family="linear",
                work="forward",
                dtype=dtype,
                settings={"rows": rows, "inputs": INPUTS, "outputs": OUTPUTS},
                ours=Candidate(OURS, through(cycle(weights), linear, x)),
                rivals=[Candidate("torch's own", through(cycle(weights), F.linear, x))],
                check=check,
                operations=2 * rows * INPUTS * OUTPUTS,
                bytes_moved=weights[0].nbytes,
                calls=WEIGHTS,
                memory=False,
                seconds=2,
            )
        )


def converted(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_many_rows_of_16_bits(side_by_side, device, dtype):
    rows, inputs, outputs = 1280, 512, 2048
    x, weight, grad_out = (
        (torch.randn(shape, device=device) / inputs**0.5).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )

    def check() -> None:
        results = [
            with_gradients(function, grad_out.to(to), *(tensor.to(to).requires_grad_() for tensor in (x, weight)))
            for function, to in ((linear, dtype), (converted, dtype), (F.linear, torch.float64))
        ]
        for name, *found in zip(("out", "x", "weight"), *results, strict=True):
            assert_accurate(*found, f"linear, {name}, {dtype}")

    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    side_by_side(
        Case(
            family="linear",
            work="forward + backward",
            dtype=dtype,
            settings={"rows": rows, "inputs": inputs, "outputs": outputs},
            ours=Candidate(OURS, partial(with_gradients, linear, grad_out, *leaves)),
            rivals=[
                Candidate("torch's own", partial(with_gradients, F.linear, grad_out, *leaves)),
                Candidate("torch's own, converted to float32", partial(with_gradients, converted, grad_out, *leaves)),
            ],
            check=check,
            operations=6 * rows * inputs * outputs,
            seconds=4,
        )
    )
