"""Eager calls without a gradient that are prepared once, and the calls that must not be taken for one of them."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import dalle_kernels
from dalle_kernels import AttentionPattern, _native
from dalle_kernels._prepared import Prepared

needs_native = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="needs the compiled CPU library")

PATTERN = AttentionPattern("conv", 3, (3, 4), 3)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _heads(x: torch.Tensor) -> torch.Tensor:
    return dalle_kernels.sparse_attention(x, x.flip(2), x.neg(), PATTERN, 0.5)


def _loss(x: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(-1, 1, 7 * x.shape[-1]).view(7, -1).to(x)
    target = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 7
    return dalle_kernels.linear_cross_entropy(x, weight, target, weight[:, 0].contiguous(), ignore_index=3)


def _codebook(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codebook = torch.linspace(-1, 1, 3 * x.shape[1]).view(-1, 3)
    return dalle_kernels.gumbel_codebook(x, codebook, 0.7, 1, generator=_seeded())


CALLS = {
    "sparse_attention": _heads,
    "gumbel_softmax": lambda x: dalle_kernels.gumbel_softmax(x, 0.7, dim=1, generator=_seeded()),
    "gumbel_softmax_hard": lambda x: dalle_kernels.gumbel_softmax(x, 0.7, True, -2, generator=_seeded()),
    "gumbel_softmax_kl": lambda x: dalle_kernels.gumbel_softmax_kl(x, dim=-1, generator=_seeded()),
    "gumbel_codebook": _codebook,
    "linear_cross_entropy": _loss,
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "other sizes": lambda x: x[:, :3],
    "strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


def _tensors(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_prepared_call_gives_the_bits_of_a_general_one(call, dtype):
    x = torch.randn(2, 5, 15, 4, generator=_seeded()).to(dtype)
    for layout in LAYOUTS.values():
        for _ in range(2):  # the second finds the first one's
            found = _tensors(call(layout(x)))
            with torch.autograd.profiler.profile(), torch.no_grad():  # which sends calls the general way
                general = _tensors(call(layout(x)))
            for ours, expected in zip(found, general, strict=True):
                assert torch.equal(ours, expected)
                assert ours.dtype == expected.dtype and ours.stride() == expected.stride()


class Counting:
    def __init__(self):
        self.prepared = 0
        self.calls = Prepared(self._prepare)

    def _prepare(self, *arguments):
        self.prepared += 1
        if arguments[-1] == "wrong":
            raise ValueError("wrong")
        return lambda *tensors: tensors

    def find(self, *tensors, settings=(1,)):
        return self.calls.find(tensors, settings)


@needs_native
def test_calls_are_told_apart_by_all_that_was_asked():
    calls, x = Counting(), torch.ones(3, 4)
    others = [x.t(), x[:2], x.half(), x.long(), x[None], x.expand(2, 3, 4), torch.ones(3, 8)[:, ::2]]
    for number, tensor in enumerate([x, *others], 1):
        assert calls.find(tensor) is calls.find(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype))
        assert calls.prepared == number
    for settings in ((1.0,), (True,), (2,), (1, 1), ()):
        before = calls.prepared
        assert calls.find(x, settings=settings) is calls.find(x + 1, settings=settings)
        assert calls.prepared == before + 1
    assert calls.find(x, None) is calls.find(x, None) is not calls.find(None, x)


@needs_native
def test_an_error_is_not_kept():
    calls, x = Counting(), torch.ones(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            calls.find(x, settings=("wrong",))
    assert calls.prepared == 2


class Subclass(torch.Tensor):
    pass


def _general(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of ``x``'s shape and dtype that are more, or something else, than memory of the CPU."""
    return {
        "negative view": torch._neg_view(x),
        "symbolic zero": torch._efficientzerotensor(x.shape),
        "subclass": x.as_subclass(Subclass),
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "wants a gradient": x.clone().requires_grad_(),
        "no tensor": 3,
    }


def test_whoever_must_see_the_call_or_the_tensor_does():
    calls, x = Counting(), torch.ones(3)
    for tensor in _general(x).values():
        assert calls.find(tensor) is None and calls.find(x, tensor) is None
    for context in (
        torch.overrides.BaseTorchFunctionMode(),
        torch._subclasses.FakeTensorMode(),
        torch.autograd.profiler.profile(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.forward_ad.dual_level(),
        dalle_kernels.use("reference"),
    ):
        with context:
            assert calls.find(x) is None
    torch.func.vmap(lambda row: [calls.find(row), row][1])(torch.ones(2, 3))
    make_fx(lambda x: [calls.find(x), x + 1][1])(x)
    assert calls.prepared == 0
    with torch.no_grad(), torch.inference_mode():
        assert (calls.find(_general(x)["wants a gradient"]) is None) == (_native.unavailable("cpu") is not None)


def test_values_of_negative_views_and_symbolic_zeros_are_seen():
    x = torch.randn(2, 5, 15, 4, generator=_seeded())
    _heads(x)  # prepares the calls that these must not be taken for
    tensors = _general(x)
    assert torch.equal(_heads(tensors["negative view"]), _heads(-x))
    assert torch.equal(_heads(tensors["symbolic zero"]), torch.zeros_like(x))
