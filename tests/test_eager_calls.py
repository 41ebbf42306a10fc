"""Eager calls go to their provider without torch's dispatcher, and through it wherever something listens there."""

from __future__ import annotations

import uuid

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dalle_kernels
from dalle_kernels._dispatch import NAMESPACE, Op


class Scaled:
    """An op of one's own, ``x * w`` with a matrix product in it, that counts its ways to the provider.

    ``dispatched`` counts the calls that came through torch's dispatcher, ``runs`` all of them.
    """

    def __init__(self):
        self.runs = self.dispatched = 0
        self.autocast: list[bool] = []
        name = f"test_scaled_{uuid.uuid4().hex}"
        self.op = Op(f"{name}(Tensor x, Tensor? w, float factor) -> (Tensor, Tensor)", self._fake)
        self.gradient = Op(f"{name}_backward(Tensor grad, float factor) -> Tensor", lambda grad, f: grad.new_empty(2))
        self.gradient.provide("reference", lambda grad, factor: grad * factor)
        self.op.provide("reference", self._run)
        self.op.register_autograd(self._backward, self._setup_context)
        overload = self.op.overload

        def counted(*args):
            self.dispatched += not torch.compiler.is_compiling()
            return overload(*args)

        self.op.overload = counted

    @staticmethod
    def _fake(x, w, factor):
        return x.new_empty(2), x.new_empty(1)

    def _run(self, x, w, factor):
        self.runs += 1
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        if factor == 0:
            raise RuntimeError("no factor")
        return torch.eye(2) @ x * factor, torch.ones(1)

    @staticmethod
    def _setup_context(ctx, inputs, output):
        ctx.factor = inputs[2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], inputs[1])

    def _backward(self, ctx, grad, _):
        assert ctx.needs_input_grad[0] and len(ctx.saved_tensors) == 2
        return self.gradient(grad, ctx.factor), None, None

    def __call__(self, x, factor=3.0):
        return self.op(x, None, factor)[0]


@pytest.fixture
def scaled():
    made = Scaled()
    yield made
    for op in (made.op, made.gradient):
        del dalle_kernels._dispatch.OPS[op.name]


X = torch.tensor([1.0, 2.0])


def test_plain_tensors_take_the_short_way(scaled):
    assert torch.equal(scaled(X), 3 * X)
    assert torch.equal(scaled(torch.nn.Parameter(X)), 3 * X)
    with torch.inference_mode():
        assert scaled(X).is_inference() and scaled(X.clone()).is_inference()
    with torch.no_grad():
        assert not scaled(X.clone().requires_grad_()).requires_grad
    assert (scaled.dispatched, scaled.runs) == (0, 5)


@pytest.mark.parametrize("short", [True, False])
def test_gradients_are_the_same_on_both_ways(scaled, short):
    def call(x, factor):
        return scaled(x, factor) if short else scaled.op.overload(x, None, factor)[0]

    x = X.clone().requires_grad_()
    y = call(x, 5.0)
    assert y.requires_grad and not (scaled.op(x, None, 5.0)[1]).requires_grad
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.full((2,), 5.0))
    with pytest.raises(RuntimeError, match="is differentiable once"):
        torch.autograd.grad(call(x, 5.0).sum(), x, create_graph=True)
    assert scaled.dispatched == (0 if short else 2)


def test_autocast_does_not_reach_into_a_provider_and_is_there_again_afterwards(scaled):
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled(X).dtype == torch.float32
        with pytest.raises(RuntimeError, match="no factor"):
            scaled(X, 0.0)
        assert torch.is_autocast_enabled("cpu")
        assert (X[None] @ X[:, None]).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert scaled.autocast == [False, False] and scaled.dispatched == 0


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_modes_see_the_operator(scaled):
    with Recorder() as recorder:
        scaled(X)
    assert f"{NAMESPACE}.{scaled.op.name}.default" in recorder.names
    with torch.overrides.BaseTorchFunctionMode():
        scaled(X)
    with torch.device("cpu"):  # a mode of functions too
        scaled(X)
    assert scaled.dispatched == 3


def test_subclasses_stay_what_they_are(scaled):
    x = X.as_subclass(Subclass)
    assert type(scaled(x)) is Subclass
    assert scaled.dispatched == 1


def test_fake_and_meta_tensors_run_no_provider(scaled):
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.empty(2)
        assert scaled(fake).shape == (2,)
    assert isinstance(scaled(fake), torch._subclasses.FakeTensor)
    with mode:
        assert isinstance(scaled(mode.from_tensor(X)), torch._subclasses.FakeTensor)
    assert scaled(X.to("meta")).is_meta
    assert scaled.runs == 0


def test_tracers_record_the_operator(scaled):
    graph = make_fx(lambda x: scaled(x))(X)
    assert any(scaled.op.name in str(node.target) for node in graph.graph.nodes)
    with pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(lambda x: scaled(x), X)
    assert scaled.op.name in str(traced.graph)


def test_the_profiler_records_the_operator(scaled):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled(X)
    assert any(scaled.op.name in event.key for event in profile.key_averages())


def test_torch_func_sees_the_operator(scaled):
    batch = torch.stack((X, 2 * X))
    assert torch.equal(torch.func.vmap(lambda x: scaled(x))(batch), 3 * batch)
    assert scaled.dispatched == 1


@pytest.mark.parametrize("transform", [torch.func.jacfwd, lambda f: torch.func.jacfwd(torch.vmap(f))])
def test_forward_mode_is_refused_and_not_zero(scaled, transform):
    x = torch.randn(2, 2)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        transform(lambda x: scaled(x, 3.0))(x)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            scaled(forward_ad.make_dual(x, x), 3.0)
        assert torch.equal(scaled(x, 3.0), 3 * x)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_derivatives_in_torch_func_are_refused_in_one_sentence(transform):
    logits = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"^logit_laplace_loss has no derivative in torch\.func"):
        transform(lambda mu: dalle_kernels.logit_laplace_loss(torch.full((2, 3), 0.5), mu, logits))(logits)


def test_values_that_the_dispatcher_makes_are_made(scaled):
    negative = torch.complex(X, X).conj().imag
    assert negative.is_neg()
    assert torch.equal(scaled(negative), -3 * X)
    assert torch.equal(scaled(torch._efficientzerotensor(2)), torch.zeros(2))
    assert scaled.dispatched == 2


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiler_sees_the_operator(scaled, grad):
    seen = []

    def backend(graph, _inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    x = X.clone().requires_grad_(grad)
    y = torch.compile(lambda x: scaled.op(x, None, 3.0)[0] + 1, fullgraph=True, backend=backend)(x)
    assert torch.equal(y, 3 * X + 1)
    assert any(scaled.op.name in name for name in seen)
    if grad:
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((2,), 3.0))


def test_an_op_without_a_gradient_leaves_the_warning_to_torch(scaled):
    calls = []
    overload = scaled.gradient.overload
    scaled.gradient.overload = lambda *args: (calls.append(args), overload(*args))[1]
    scaled.gradient(X, 2.0)
    assert not calls
    scaled.gradient(X.clone().requires_grad_(), 2.0)
    assert len(calls) == 1


def test_lists_of_tensors_take_the_short_way_and_their_gradients_the_long_one():
    name = f"test_total_{uuid.uuid4().hex}"
    op = Op(f"{name}(Tensor[] parts) -> Tensor", lambda parts: torch.empty_like(parts[0]))
    op.provide("reference", lambda parts: torch.stack(list(parts)).sum(0))
    op.register_autograd(lambda ctx, grad: [grad] * ctx.count, lambda ctx, inputs, output: setattr(ctx, "count", 2))
    try:
        assert torch.equal(op([X, X]), 2 * X)
        x = X.clone().requires_grad_()
        op([X, x]).sum().backward()
        assert torch.equal(x.grad, torch.ones(2))
        assert type(op([X, X.as_subclass(Subclass)])) is Subclass
    finally:
        del dalle_kernels._dispatch.OPS[name]


def test_checkpointing_recomputes(scaled):
    x = X.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(scaled, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0))
    assert scaled.runs == 2 and scaled.dispatched == 0
