"""The logit-Laplace loss, forward and backward, against the paper's formula in torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import OURS, Candidate, Case, Goal, compiled
from torch import Tensor

from dalle_kernels import logit_laplace_loss, map_pixels
from dalle_kernels.testing import assert_accurate

EAGER = "torch, eager"


def plain(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """The paper's formula as a user writes it, in the inputs' dtype."""
    return ((torch.logit(x) - mu).abs() / log_b.exp() + torch.log(2 * log_b.exp() * x * (1 - x))).mean()


def with_gradients(function: Callable[..., Tensor], x: Tensor, mu: Tensor, log_b: Tensor) -> tuple[Tensor, ...]:
    loss = function(x, mu, log_b)
    return loss.detach(), *torch.autograd.grad(loss, (mu, log_b))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_forward_and_backward(side_by_side, device, dtype):
    shape = (32 if device == "cpu" else 256, 3, 256, 256)
    x = map_pixels(torch.rand(shape, device=device)).to(dtype)
    mu = (1.5 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    log_b = (torch.randn(shape, device=device) - 2).to(dtype).requires_grad_()

    def check() -> None:
        few = tuple(tensor.detach()[:4] for tensor in (x, mu, log_b))
        actual, near, exact = (
            with_gradients(function, few[0].to(kind), *(tensor.to(kind).requires_grad_() for tensor in few[1:]))
            for function, kind in ((logit_laplace_loss, dtype), (plain, dtype), (plain, torch.float64))
        )
        for name, *results in zip(("loss", "gradient of mu", "gradient of log_b"), actual, near, exact, strict=True):
            assert_accurate(*results, f"logit_laplace_loss, {name}, {dtype}")

    side_by_side(
        Case(
            family="logit_laplace",
            work="forward + backward",
            dtype=dtype,
            settings={"shape": "x".join(map(str, shape))},
            ours=Candidate(OURS, partial(with_gradients, logit_laplace_loss, x, mu, log_b)),
            rivals=[
                Candidate(EAGER, partial(with_gradients, plain, x, mu, log_b)),
                compiled("torch, compiled", plain, partial(with_gradients, x=x, mu=mu, log_b=log_b)),
            ],
            check=check,
            goals=[Goal("speed", 4 if device == "cpu" else 8, EAGER)] if dtype == torch.float32 else [],
            # Each direction reads the three inputs; backward writes two gradients.
            bytes_moved=8 * x.nbytes,
            seconds=6,
        )
    )
