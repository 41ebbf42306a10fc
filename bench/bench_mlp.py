"""The MLP of a transformer layer, forward and backward, against plain PyTorch, eager and compiled."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Candidate, Case, compiled, with_gradients
from torch import Tensor

from dalle_kernels import mlp
from dalle_kernels.testing import assert_accurate

NAMES = ("x", "expansion", "expansion_bias", "contraction", "contraction_bias")


def plain(x: Tensor, expansion: Tensor, expansion_bias: Tensor, contraction: Tensor, contraction_bias: Tensor):
    return F.linear(F.gelu(F.linear(x, expansion, expansion_bias)), contraction, contraction_bias)


@pytest.mark.parametrize("rows, dim", ((768, 256), (1280, 512)))
def test_forward_and_backward(side_by_side, device, rows, dim):
    width = 4 * dim
    shapes = ((rows, dim), (width, dim), (width,), (dim, width), (dim,))
    tensors = [torch.randn(shape, device=device) / shape[-1] ** 0.5 for shape in shapes]
    grad_out = torch.randn(rows, dim, device=device)

    def check() -> None:
        results = [
            with_gradients(function, grad_out.to(dtype), *(tensor.to(dtype).requires_grad_() for tensor in tensors))
            for function, dtype in ((mlp, torch.float32), (plain, torch.float32), (plain, torch.float64))
        ]
        for name, *found in zip(("out", *NAMES), *results, strict=True):
            assert_accurate(*found, f"mlp, {name}")

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    side_by_side(
        Case(
            family="mlp",
            work="forward + backward",
            dtype=torch.float32,
            settings={"rows": rows, "dim": dim, "width": width},
            ours=Candidate(OURS, partial(with_gradients, mlp, grad_out, *leaves)),
            rivals=[
                Candidate("torch, eager", partial(with_gradients, plain, grad_out, *leaves)),
                compiled("torch, compiled", plain, lambda function: with_gradients(function, grad_out, *leaves)),
            ],
            check=check,
            operations=12 * rows * dim * width,
            seconds=4,
        )
    )
