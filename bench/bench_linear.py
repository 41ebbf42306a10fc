"""The linear layer for few rows, as in a step of generation, against torch's own.

Eight weights take turns, so that they come from memory, as those of a model larger than the cache do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Candidate, Case
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
