"""One mechanism from an op's name to the provider that runs it.

An :class:`Op` is registered once with ``torch.library`` (schema, fake, autograd), so ``torch.compile(fullgraph=True)``,
``torch.library.opcheck`` and CUDA graphs see an ordinary operator. Behind it stand *providers*, fastest first:
``native`` (compiled, CPU or CUDA), ``triton`` (CUDA through Triton) and ``reference`` (plain PyTorch, always last, runs
anywhere). A call takes the first provider that can serve its arguments.

An operator written in Python costs 25 µs a call on its way through torch's dispatcher, and 60 µs more with a gradient.
So an eager call on plain tensors goes to its provider directly, and to the dispatcher only where something listens
there: a compiler, a tracer, a transform of torch.func, a mode, a profiler, a tensor subclass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from dalle_kernels._arguments import names_wrong_types

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

    ``unavailable(device_type)`` says why it cannot run on this machine and device type ("cpu", "cuda") at all, which is
    asked once, and ``unsupported(*args)`` why it cannot serve these arguments; both return None when it can.
    """

    name: str
    run: Callable
    unavailable: Callable[[str], str | None]
    unsupported: Callable[..., str | None]

    def rejected(self, device_type: str, forced: str | None) -> str | None:
        """Why it does not run on ``device_type``, whatever the arguments, where the user forces ``forced``."""
        if forced is not None and self.name != forced:
            return f"{forced!r} is forced"
        reason = self.unavailable(device_type)
        if reason is None and forced is None and self.name == "triton" and device_type == "cpu":
            return "Triton's interpreter is for tests and runs only where it is forced"
        return reason


class Op:
    """A ``torch.library`` operator ``dalle_kernels::<name>`` and the providers behind it.

    ``schema`` is a torch schema such as ``"encode_fp169(Tensor x) -> (Tensor, Tensor)"``; its first argument is a
    tensor (or a tensor list) whose device decides where the op runs. ``fake`` computes the outputs' metadata.
    """

    def __init__(self, schema: str, fake: Callable):
        self.name = schema.partition("(")[0]
        self.providers: list[Provider] = []
        self._candidates: dict[str, list[Provider]] = {}
        self._function: type[torch.autograd.Function] | None = None
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        # The first arguments, up to the last one that may be a tensor or a list of tensors.
        holds_tensor = ["Tensor" in str(argument.type) for argument in self.overload._schema.arguments]
        self._tensors = slice(max(i + 1 for i, holds in enumerate(holds_tensor) if holds))
        OPS[self.name] = self

    def __call__(self, *args):
        # Asked first and by this name, so that a compiler that follows these lines goes no further.
        if torch.compiler.is_dynamo_compiling():
            return self.overload(*args)
        tensors = args[self._tensors]
        if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
            # torch would take the tangents of an operator for zero.
            raise RuntimeError(f"{self.name} has no forward-mode derivative: use reverse mode or plain PyTorch")
        if dispatcher_is_needed(tensors):
            return self.overload(*args) if _transform() is None else self._transformed(*args)
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*tensors):
            return self.run(*args)
        # Without a gradient of its own the op is torch's to warn of.
        return self._function.apply(*args) if self._function else self.overload(*args)

    def _transformed(self, *args):
        """The call under a transform of torch.func, of which vmap can go through the operator."""
        try:
            return self.overload(*args)
        except RuntimeError as error:
            if "setup_context" not in str(error):  # of the Function that torch makes of a registered gradient
                raise
            raise RuntimeError(
                f"{self.name} has no derivative in torch.func (grad, vjp, jacrev): use torch.autograd or plain PyTorch"
            ) from error

    def provide(
        self,
        name: str,
        run: Callable,
        *,
        unavailable: Callable[[str], str | None] = _always,
        unsupported: Callable[..., str | None] = _always,
    ) -> None:
        """Add a provider; the order of the calls is the order of preference, fastest first, ``reference`` last.

        A CUDA kernel that no GPU has shown ahead of Triton's comes after it: it runs where it is forced.
        """
        if name not in PROVIDERS:
            raise ValueError(f"expected a provider among {', '.join(PROVIDERS)}, got {name!r}")
        self.providers.append(Provider(name, run, cache(unavailable), unsupported))
        self._candidates.clear()

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

        def forward(ctx, *args):
            output = self.run(*args)
            setup_context(ctx, args, output)
            return output

        # A Function follows no list of tensors, torch.library does.
        if not any("List[Tensor]" in str(argument.type) for argument in self.overload._schema.arguments):
            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
            self._function = type(self.name, (torch.autograd.Function,), methods)

    def choose(self, device_type: str, args: tuple) -> Provider:
        """The provider that serves ``args``: the forced one, or the first that can."""
        forced = _forced or _provider_of_environment()
        if forced is not None:
            return self._choose_forced(forced, device_type, args)
        candidates = self._candidates.get(device_type)
        if candidates is None:
            candidates = [provider for provider in self.providers if provider.rejected(device_type, None) is None]
            self._candidates[device_type] = candidates
        for provider in candidates:
            if provider.unsupported(*args) is None:
                return provider
        raise ProviderError(f"{self.name}: no provider can serve this call; see dalle_kernels.explain({self.name!r})")

    def _choose_forced(self, forced: str, device_type: str, args: tuple) -> Provider:
        for provider in self.providers:
            if provider.name != forced:
                continue
            reason = provider.rejected(device_type, forced) or provider.unsupported(*args)
            if reason is None:
                return provider
            raise ProviderError(f"{self.name}: provider {forced!r} was forced but {reason}")
        names = ", ".join(provider.name for provider in self.providers)
        raise ProviderError(f"{self.name}: provider {forced!r} was forced but the op only has: {names}")

    def run(self, *args):
        """What the provider returns, with no gradient; for a caller that knows what ``__call__`` would ask.

        That is a call for which neither :func:`dispatcher_is_needed` nor :func:`is_differentiated`.
        """
        device_type = _device_type(args)
        provider = self.choose(device_type, args)
        if not any_autocast() or not torch.is_autocast_enabled(device_type):
            return provider.run(*args)
        # An op's dtypes are its own contract: autocast must not reach the matrix products inside a provider.
        torch.set_autocast_enabled(device_type, False)
        try:
            return provider.run(*args)
        finally:
            torch.set_autocast_enabled(device_type, True)


any_autocast = torch._C._is_any_autocast_enabled  # for some device type, which is quicker to ask

# Of the thread: modes, transforms, a tracer or a profiler, which must see the operators that are called.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch = torch._C._functorch
_transform = _functorch.peek_interpreter_stack
_tracer = torch._C._get_tracing_state
_profiler = torch.autograd._profiler_enabled


def dispatcher_listens() -> bool:
    """Whether something listens in torch's dispatcher on this thread."""
    return bool(_dispatch_modes() or _function_modes() or _transform() or _tracer() or _profiler())


def dispatcher_is_needed(args: tuple) -> bool:
    """Whether something listens in torch's dispatcher, or one of ``args`` is more than memory of a CPU or CUDA GPU.

    That are subclasses of Tensor, and tensors whose values the dispatcher makes on the way: negative views, symbolic
    zeros.
    """
    if dispatcher_listens():
        return True
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if not (arg.is_cpu or arg.is_cuda) or arg.is_neg() or arg._is_zerotensor():
                return True
        elif kind is list or kind is tuple:
            if dispatcher_is_needed(arg):
                return True
        elif arg is not None and isinstance(arg, Tensor):
            return True
    return False


def is_differentiated(tensors: tuple) -> bool:
    """Whether autograd records an eager call on ``tensors``, or forward-mode differentiation may follow it."""
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))


def _has_tangent(arg) -> bool:
    """Whether ``arg`` is a dual tensor of forward-mode differentiation, or a list with one, under any transform."""
    if isinstance(arg, (list, tuple)):
        return any(map(_has_tangent, arg))
    while isinstance(arg, Tensor):
        # Unpacking has no batching rule.
        if not _functorch.is_batchedtensor(arg) and forward_ad.unpack_dual(arg).tangent is not None:
            return True
        arg = _functorch.get_unwrapped(arg) if _functorch.is_functorch_wrapped_tensor(arg) else None
    return False


def has_transform() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is on, which cannot look into an operator.

    A compiler that follows the call is none: it sees the operator.
    """
    return not torch.compiler.is_compiling() and (_transform() is not None or forward_ad._current_level >= 0)


def _device_type(args: tuple) -> str:
    first = args[0]
    if type(first) is not Tensor and isinstance(first, (list, tuple)):
        if not first:
            return "cpu"
        first = first[0]
    return "cpu" if first.is_cpu else first.device.type


def ops() -> dict[str, Op]:
    """Every op by its name."""
    return dict(OPS)


_forced: str | None = None


def forced_provider() -> str | None:
    """The provider forced by :func:`use` or by the environment variable DALLE_KERNELS_PROVIDER, else None.

    The environment is read once, at the first call of an op.
    """
    return _forced or _provider_of_environment()


@cache
def _provider_of_environment() -> str | None:
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
    """What :func:`explain` found for one op: the provider that runs, and why each faster one does not.

    ``optional`` names the kernels that could run too, and do only where they are forced: nobody has shown them faster.
    """

    op: str
    runs: str | None
    rejected: tuple[tuple[str, str], ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.runs or 'nothing'} runs"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons]
        return "\n".join(lines)

    @property
    def reasons(self) -> tuple[tuple[str, str], ...]:
        """Every kernel that does not run, and why."""
        opt_in = "not shown to be faster here; dalle_kernels.use({!r}) takes it"
        return (*self.rejected, *((name, opt_in.format(name)) for name in self.optional))


@names_wrong_types
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
    rejected, serving = [], []
    for provider in providers:
        reason = provider.rejected(device_type, forced) or (provider.unsupported(*args) if args else None)
        if reason is None:
            serving.append(provider.name)
        elif not serving:
            rejected.append((provider.name, reason))
    runs, *optional = serving or [None]
    return Explanation(op, runs, tuple(rejected), tuple(name for name in optional if name != "reference"))
