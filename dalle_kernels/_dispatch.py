"""One mechanism from an op's name to the provider that runs it.

An :class:`Op` is registered once with ``torch.library`` (schema, fake, autograd), so ``torch.compile(fullgraph=True)``,
``torch.library.opcheck`` and CUDA graphs see an ordinary operator. Behind it stand *providers*, fastest first:
``native`` (compiled, CPU or CUDA), ``triton`` (CUDA through Triton) and ``reference`` (plain PyTorch, always last, runs
anywhere). A call takes the first provider that can serve its arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PROVIDERS = ("native", "triton", "reference")
NAMESPACE = "dalle_kernels"
ENVIRONMENT_VARIABLE = "DALLE_KERNELS_PROVIDER"

OPS: dict[str, Op] = {}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class ProviderError(RuntimeError):
    """A provider was forced that cannot serve the call; the message says why."""


def _always(*_args) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    ``unavailable(device_type)`` says why it cannot run on this machine and device type ("cpu", "cuda") at all, and
    ``unsupported(*args)`` why it cannot serve these arguments; both return None when it can.
    """

    name: str
    run: Callable
    unavailable: Callable[[str], str | None]
    unsupported: Callable[..., str | None]

    def why_not(self, device_type: str, args: tuple) -> str | None:
        return self.unavailable(device_type) or self.unsupported(*args)


class Op:
    """A ``torch.library`` operator ``dalle_kernels::<name>`` and the providers behind it.

    ``schema`` is a torch schema such as ``"encode_fp169(Tensor x) -> (Tensor, Tensor)"``; its first argument is a
    tensor (or a tensor list) whose device decides where the op runs. ``fake`` computes the outputs' metadata.
    """

    def __init__(self, schema: str, fake: Callable):
        self.name = schema.partition("(")[0]
        self.providers: list[Provider] = []
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        OPS[self.name] = self

    def __call__(self, *args):
        return self.overload(*args)

    def provide(
        self,
        name: str,
        run: Callable,
        *,
        unavailable: Callable[[str], str | None] = _always,
        unsupported: Callable[..., str | None] = _always,
    ) -> None:
        """Add a provider; the order of the calls is the order of preference, fastest first, ``reference`` last."""
        if name not in PROVIDERS:
            raise ValueError(f"expected a provider among {', '.join(PROVIDERS)}, got {name!r}")
        self.providers.append(Provider(name, run, unavailable, unsupported))

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Give the op its gradient, as ``torch.library.register_autograd`` does; it is differentiable once.

        A gradient is an op without a gradient of its own, so a second derivative would silently be zero: asking for one
        (``create_graph=True``) raises.
        """

        def backward_once(ctx, *gradients):
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{self.name} is differentiable once: expected a backward without create_graph=True, got one with "
                    "it; for a second derivative use the plain PyTorch expression"
                )
            return backward(ctx, *gradients)

        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}", backward_once, setup_context=setup_context, lib=_library
        )

    def choose(self, args: tuple) -> Provider:
        """The provider that serves ``args``: the forced one, or the first that can."""
        device_type = _device_type(args)
        forced = forced_provider()
        for provider in self.providers:
            if forced not in (None, provider.name):
                continue
            reason = provider.why_not(device_type, args)
            if reason is None:
                return provider
            if forced is not None:
                raise ProviderError(f"{self.name}: provider {forced!r} was forced but {reason}")
        if forced is not None:
            names = ", ".join(provider.name for provider in self.providers)
            raise ProviderError(f"{self.name}: provider {forced!r} was forced but the op only has: {names}")
        raise ProviderError(f"{self.name}: no provider can serve this call; see dalle_kernels.explain({self.name!r})")

    def _run(self, *args):
        # An op's dtypes are its own contract: autocast must not reach the matrix products inside a provider.
        with torch.autocast(_device_type(args), enabled=False):
            return self.choose(args).run(*args)


def _device_type(args: tuple) -> str:
    first = args[0]
    if isinstance(first, (list, tuple)):
        return first[0].device.type if first else "cpu"
    return first.device.type


def ops() -> dict[str, Op]:
    """Every op by its name."""
    return dict(OPS)


_forced: str | None = None


def forced_provider() -> str | None:
    """The provider forced by :func:`use` or by the environment variable DALLE_KERNELS_PROVIDER, else None."""
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None and name not in PROVIDERS:
        raise ProviderError(f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(PROVIDERS)}, got {name!r}; unset it")
    return name


@contextmanager
def use(provider: str) -> Iterator[None]:
    """Force one provider ("reference", "native" or "triton") for every op called inside the block.

    The choice is process-wide, not per thread, because autograd may run a backward on a thread of its own. An op that
    the provider cannot serve raises :class:`ProviderError`, which says why.
    """
    global _forced
    if provider not in PROVIDERS:
        raise ValueError(f"expected a provider among {', '.join(PROVIDERS)}, got {provider!r}")
    previous, _forced = _forced, provider
    try:
        yield
    finally:
        _forced = previous


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found for one op: the provider that runs, and why each faster one does not."""

    op: str
    runs: str | None
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.runs or 'nothing'} runs"]
        lines += [f"  {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


def explain(op: str, *args, device_type: str = "cpu") -> Explanation:
    """Tell which provider runs an op and why not a faster one.

    ``op`` is an op's name (a key of ``dalle_kernels.ops()``). With ``args``, the operator's own arguments, the answer
    is for that very call; without, it is for ``device_type`` on this machine.
    """
    if op not in OPS:
        raise ValueError(f"expected an op among {', '.join(sorted(OPS))}, got {op!r}")
    providers = OPS[op].providers
    if args:
        device_type = _device_type(args)
    forced = forced_provider()
    rejected = []
    for provider in providers:
        if forced not in (None, provider.name):
            reason = f"{forced!r} is forced"
        else:
            reason = provider.why_not(device_type, args) if args else provider.unavailable(device_type)
        if reason is None:
            return Explanation(op, provider.name, tuple(rejected))
        rejected.append((provider.name, reason))
    return Explanation(op, None, tuple(rejected))
