"""Gumbel-softmax, with its KL and with the codebook, against torch eager, compiled and DALLE-pytorch's way."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Candidate, Case, Goal, by_triton, compiled
from torch import Tensor

from dalle_kernels import gumbel_codebook, gumbel_softmax, gumbel_softmax_kl
from dalle_kernels.philox import gumbel_noise, new_seed
from dalle_kernels.testing import assert_accurate

EAGER = "torch, eager"
COMPILED = "torch, compiled"
CODES, WIDTH = 8192, 128
# What a call may take beyond its results, in the steps in which memory is counted.
EXTRA_BYTES = 2 << 20

each_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))


def seeded(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def plain(logits: Tensor, tau: float, dim: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The sample and the KL as a user writes them, in the logits' dtype."""
    log_q = logits.log_softmax(dim)
    kl = (log_q.exp() * (log_q + math.log(CODES))).sum(dim)
    return ((logits + noise.to(logits.dtype)) / tau).softmax(dim), kl


def eager_kl(logits: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """``F.gumbel_softmax`` and the KL to the uniform prior along dimension 1."""
    log_q = logits.log_softmax(1)
    return F.gumbel_softmax(logits, tau=tau, dim=1), (log_q.exp() * (log_q + math.log(CODES))).sum(1)


def dalle_pytorch_kl(logits: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """As DALLE-pytorch's ``DiscreteVAE.forward``; its KL is one number, divided by the batch."""
    one_hot = F.gumbel_softmax(logits, tau=tau, dim=1)
    log_q = logits.flatten(2).transpose(1, 2).log_softmax(-1)
    uniform = torch.log(torch.tensor([1.0 / CODES], device=logits.device))
    return one_hot, F.kl_div(uniform, log_q, None, None, "batchmean", log_target=True)


def with_gradient(function: Callable[[Tensor], tuple[Tensor, Tensor]], logits: Tensor, grad_y: Tensor) -> tuple:
    """y, the KL and the gradient of the logits, for ``grad_y`` and a KL that counts once."""
    y, kl = function(logits)
    (grad,) = torch.autograd.grad((y, kl), logits, (grad_y, torch.ones_like(kl)))
    return y.detach(), kl.detach(), grad


def times_codebook(y: Tensor, codebook: Tensor) -> Tensor:
    """A sample along dimension 1 times the codebook, in the codebook's dtype."""
    return torch.tensordot(y.to(codebook.dtype), codebook, ([1], [0])).movedim(-1, 1)


def eager_codebook(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    y, kl = eager_kl(logits)
    return times_codebook(y, codebook), kl


def with_gradients(function, logits: Tensor, codebook: Tensor, grad_embedding: Tensor) -> tuple[Tensor, ...]:
    """The embedding, the KL and the gradients of the logits and of the codebook, for a KL that counts once."""
    embedding, kl = function(logits, codebook)
    grads = torch.autograd.grad((embedding, kl), (logits, codebook), (grad_embedding, torch.ones_like(kl)))
    return embedding.detach(), kl.detach(), *grads


def speed_goals(cpu: float, eager: float, device: str) -> list[Goal]:
    """Over eager torch on a CPU; on a GPU over that and over compiled torch."""
    if device == "cpu":
        return [Goal("speed", cpu, EAGER)]
    return [Goal("speed", eager, EAGER), Goal("speed", 1.3, COMPILED)]


@each_dtype
def test_forward(side_by_side, device, dtype):
    rows = 8 * 1024
    logits = (2 * torch.randn(rows, CODES, device=device)).to(dtype)

    def check() -> None:
        some = 64
        numbers = torch.arange(some, device=device).view(-1, 1, 1)
        actual = gumbel_softmax(logits, generator=seeded(device))[:some]
        noise = partial(gumbel_noise, new_seed(logits.device, seeded(device)), numbers, CODES)
        near, exact = (
            plain(logits[:some].to(kind), 1.0, -1, noise(wide).view(some, CODES))[0]
            for kind, wide in ((dtype, torch.float32), (torch.float64, torch.float64))
        )
        assert_accurate(actual, near, exact, f"gumbel_softmax, {dtype}")

    with torch.no_grad():
        side_by_side(
            Case(
                family="gumbel_softmax",
                work="forward",
                dtype=dtype,
                settings={"shape": f"{rows}x{CODES}", "dim": -1},
                ours=Candidate(OURS, lambda: gumbel_softmax(logits)),
                rivals=[
                    Candidate(EAGER, lambda: F.gumbel_softmax(logits)),
                    compiled(COMPILED, F.gumbel_softmax, lambda function: function(logits)),
                    *by_triton(device, lambda: gumbel_softmax(logits)),
                ],
                check=check,
                goals=[*speed_goals(12, 6, device), Goal("extra bytes", 4 * rows + EXTRA_BYTES)],
                bytes_moved=2 * logits.nbytes,
            )
        )


@each_dtype
@pytest.mark.parametrize("layout", ("channels first", "channels last"))
def test_with_kl_and_backward(side_by_side, device, dtype, layout):
    if device == "cpu" and layout == "channels last":
        pytest.skip("measured on a GPU only")
    batch, side = 8, 32
    shape = (batch, CODES, side, side)
    memory = torch.contiguous_format if layout == "channels first" else torch.channels_last
    logits = (2 * torch.randn(shape, device=device)).to(dtype, memory_format=memory).requires_grad_()
    grad_y = torch.randn(shape, device=device).to(dtype, memory_format=memory)

    def check() -> None:
        few = (slice(1), slice(None), slice(4))
        rows = torch.arange(4 * side, device=device).view(1, 1, -1)
        actual = with_gradient(partial(gumbel_softmax_kl, dim=1, generator=seeded(device)), logits, grad_y)
        actual = (actual[0][few], actual[1][0:1, :4], actual[2][few])
        noise = partial(gumbel_noise, new_seed(logits.device, seeded(device)), rows, CODES)
        known = []
        for kind, wide in ((dtype, torch.float32), (torch.float64, torch.float64)):
            function = partial(plain, tau=1.0, dim=1, noise=noise(wide).view(1, CODES, 4, side))
            leaf = logits.detach()[few].to(kind).requires_grad_()
            known.append(with_gradient(function, leaf, grad_y[few].to(kind)))
        for name, *results in zip(("y", "kl", "gradient"), actual, *known, strict=True):
            assert_accurate(*results, f"gumbel_softmax_kl, {name}, {dtype}")

    ours = partial(gumbel_softmax_kl, dim=1)
    compiled_rival = compiled(COMPILED, eager_kl, partial(with_gradient, logits=logits, grad_y=grad_y))
    side_by_side(
        Case(
            family="gumbel_softmax",
            work="with KL, forward + backward",
            dtype=dtype,
            settings={
                "shape": "x".join(map(str, shape)),
                "dim": 1,
                **({"memory": layout} if layout == "channels last" else {}),
            },
            ours=Candidate(OURS, partial(with_gradient, ours, logits, grad_y)),
            rivals=[
                Candidate(EAGER, partial(with_gradient, eager_kl, logits, grad_y)),
                compiled_rival,
                Candidate("as DALLE-pytorch writes it", partial(with_gradient, dalle_pytorch_kl, logits, grad_y)),
                *by_triton(device, partial(with_gradient, ours, logits, grad_y)),
            ],
            check=check,
            goals=[
                *speed_goals(12 if dtype == torch.float32 else 10, 4, device),
                Goal("extra bytes", 4 * batch * side * side + EXTRA_BYTES),
            ],
            # Forward reads the logits and writes y; backward reads both and y's gradient and writes the logits'.
            bytes_moved=6 * logits.nbytes,
        )
    )


@each_dtype
def test_codebook(side_by_side, device, dtype):
    """The sample times a float32 codebook: ours keeps no sample, and draws its noise again in the backward."""
    batch, side = 8, 32
    logits = (2 * torch.randn(batch, CODES, side, side, device=device)).to(dtype).requires_grad_()
    codebook = torch.randn(CODES, WIDTH, device=device, requires_grad=True)
    grad_embedding = torch.randn(batch, WIDTH, side, side, device=device)

    def check() -> None:
        few = (slice(1), slice(None), slice(4))
        rows = torch.arange(4 * side, device=device).view(1, 1, -1)
        ours = partial(gumbel_codebook, dim=1, generator=seeded(device))
        # Elsewhere no gradient flows, so that these rows alone make the codebook's.
        grad_of_few = torch.zeros_like(grad_embedding)
        grad_of_few[few] = grad_embedding[few]
        actual = with_gradients(ours, logits, codebook, grad_of_few)
        actual = (actual[0][few], actual[1][0:1, :4], actual[2][few], actual[3])
        noise = partial(gumbel_noise, new_seed(logits.device, seeded(device)), rows, CODES)
        known = []
        for kind, wide in ((dtype, torch.float32), (torch.float64, torch.float64)):

            def function(leaf: Tensor, table: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
                y, kl = plain(leaf, 1.0, 1, noise)
                return times_codebook(y, table), kl

            call = partial(function, noise=noise(wide).view(1, CODES, 4, side))
            leaf, table = logits.detach()[few].to(kind).requires_grad_(), codebook.detach().to(wide).requires_grad_()
            known.append(with_gradients(call, leaf, table, grad_embedding[few].to(wide)))
        names = ("embedding", "kl", "gradient", "codebook's gradient")
        for name, *results in zip(names, actual, *known, strict=True):
            assert_accurate(*results, f"gumbel_codebook, {name}, {dtype}")

    tensors = (logits, codebook, grad_embedding)
    side_by_side(
        Case(
            family="gumbel_softmax",
            work="times a codebook, with KL, forward + backward",
            dtype=dtype,
            settings={"shape": f"{batch}x{CODES}x{side}x{side}", "dim": 1, "width": WIDTH},
            ours=Candidate(OURS, partial(with_gradients, partial(gumbel_codebook, dim=1), *tensors)),
            rivals=[
                Candidate(EAGER, partial(with_gradients, eager_codebook, *tensors)),
                compiled(COMPILED, eager_codebook, lambda function: with_gradients(function, *tensors)),
            ],
            check=check,
            # The product, and those of its two gradients.
            operations=6 * batch * side * side * CODES * WIDTH,
            product_dtype=codebook.dtype,
            # Forward reads the logits, backward reads them and writes their gradient.
            bytes_moved=3 * logits.nbytes,
        )
    )
