"""Gumbel-softmax ops: checks, operators and public functions (paper section 2.1, relaxation of the dVAE's codes).

The operators ``dalle_kernels::gumbel_softmax``, ``gumbel_softmax_kl`` and ``gumbel_codebook`` take the noise's seed and
offset as int64 scalar tensors (``dalle_kernels.philox`` says what they mean). The public functions draw a fresh seed
for each call and pass offset 0; a caller that splits a batch and wants the noise of the whole calls the operators with
one seed and, as offset, the number of rows before the part.

The temperature tau too reaches the operators as a scalar tensor, in the dtype of their arithmetic (float32, or float64
for float64 logits), since ``torch.compile`` would compile anew for each value of a Python number. It is a constant: no
gradient flows to it. All three scalars lie on the logits' device, so that a kernel, for CPU or CUDA, can read them
through their address and the host need not wait for the device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dalle_kernels import _native, _triton
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op, dispatcher_is_needed
from dalle_kernels._prepared import Prepared
from dalle_kernels._strides import contiguous_strides
from dalle_kernels.gumbel_softmax import reference
from dalle_kernels.gumbel_softmax.cuda import on_cuda_too
from dalle_kernels.philox import new_seed

_SAMPLE = "Tensor logits, Tensor seed, Tensor offset, Tensor tau, bool hard, int dim"
_SAMPLE_BACKWARD = "Tensor logits, Tensor y, Tensor seed, Tensor offset, Tensor tau, bool hard, int dim"
_CODEBOOK = "Tensor logits, Tensor codebook, Tensor seed, Tensor offset, Tensor tau, int dim"


def _fake_logits(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_kl(logits: Tensor, dim: int) -> Tensor:
    return logits.new_empty(reference.kl_shape(logits, dim), dtype=reference.compute_dtype(logits.dtype))


def _fake_codebook(logits, codebook, seed, offset, tau, dim):
    return codebook.new_empty(reference.embedding_shape(logits, codebook, dim)), _fake_kl(logits, dim)


gumbel_softmax_op = Op(
    f"gumbel_softmax({_SAMPLE}) -> Tensor",
    lambda logits, seed, offset, tau, hard, dim: _fake_logits(logits),
)
gumbel_softmax_backward_op = Op(
    f"gumbel_softmax_backward(Tensor grad_y, {_SAMPLE_BACKWARD}) -> Tensor",
    lambda grad_y, logits, *rest: _fake_logits(logits),
)
gumbel_softmax_kl_op = Op(
    f"gumbel_softmax_kl({_SAMPLE}) -> (Tensor, Tensor)",
    lambda logits, seed, offset, tau, hard, dim: (_fake_logits(logits), _fake_kl(logits, dim)),
)
gumbel_softmax_kl_backward_op = Op(
    f"gumbel_softmax_kl_backward(Tensor grad_y, Tensor grad_kl, {_SAMPLE_BACKWARD}) -> Tensor",
    lambda grad_y, grad_kl, logits, *rest: _fake_logits(logits),
)
gumbel_codebook_op = Op(f"gumbel_codebook({_CODEBOOK}) -> (Tensor, Tensor)", _fake_codebook)
gumbel_codebook_backward_op = Op(
    f"gumbel_codebook_backward(Tensor grad_embedding, Tensor grad_kl, {_CODEBOOK}) -> (Tensor, Tensor)",
    lambda grad_embedding, grad_kl, logits, codebook, *rest: (_fake_logits(logits), torch.empty_like(codebook)),
)


# ---- The compiled kernels. Their bindings tell rows from columns.

_MAX_ROW_DIMS = 8  # Strided::MAX_DIMS in csrc/common/strided.h
_MAX_COLUMNS = 1 << 24  # column numbers are compared as float32


@lru_cache(maxsize=256)
def _layout(sizes: tuple[int, ...], dim: int, *width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a contiguous tensor of the logits' ``sizes`` with ``width``, or none, in place of ``dim``.

    A tensor whose strides are told is made sooner than by torch.empty.
    """
    dim %= len(sizes)
    changed = (*sizes[:dim], *width, *sizes[dim + 1 :])
    return changed, contiguous_strides(changed)


def _empty_kl(logits: Tensor, dim: int) -> Tensor:
    return logits.new_empty_strided(*_layout(logits.shape, dim), dtype=torch.float32)


def _sample_native(logits, *noise_and_settings) -> Tensor:
    y = _fake_logits(logits)
    _native.call("gumbel_softmax", logits.device, logits, y, None, *noise_and_settings)
    return y


def _sample_kl_native(logits, seed, offset, tau, hard, dim) -> tuple[Tensor, Tensor]:
    y, kl = _fake_logits(logits), _empty_kl(logits, dim)
    _native.call("gumbel_softmax", logits.device, logits, y, kl, seed, offset, tau, hard, dim)
    return y, kl


def _sample_backward_native(grad_y, *rest) -> Tensor:
    return _sample_kl_backward_native(grad_y, None, *rest)


def _sample_kl_backward_native(grad_y, grad_kl, logits, y, *noise_and_settings) -> Tensor:
    grad_logits = _fake_logits(logits)
    tensors = grad_y, grad_kl, logits, y, grad_logits
    _native.call("gumbel_softmax_backward", logits.device, *tensors, *noise_and_settings)
    return grad_logits


def _codebook_native(logits, codebook, seed, offset, tau, dim) -> tuple[Tensor, Tensor]:
    embedding = codebook.new_empty_strided(*_layout(logits.shape, dim, codebook.shape[1]))
    kl = _empty_kl(logits, dim)
    _native.call("gumbel_codebook", logits.device, logits, codebook, embedding, kl, seed, offset, tau, dim)
    return embedding, kl


def _codebook_backward_native(grad_embedding, grad_kl, logits, codebook, *noise_and_dim):
    gradients = _fake_logits(logits), torch.empty_like(codebook)
    inputs = grad_embedding, grad_kl, logits, codebook
    _native.call("gumbel_codebook_backward", logits.device, *inputs, *gradients, *noise_and_dim)
    return gradients


def _unsupported_logits(logits: Tensor, tau: Tensor, dim: int) -> str | None:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the compiled kernel takes logits of float32, bfloat16 and float16, got {logits.dtype}"
    if tau.dtype != torch.float32:
        return f"the compiled kernel takes tau as float32, got {tau.dtype}"
    if logits.dim() > _MAX_ROW_DIMS + 1:
        return f"the compiled kernel takes at most {_MAX_ROW_DIMS + 1} dimensions, got {logits.dim()}"
    if logits.shape[dim] > _MAX_COLUMNS:
        return f"the compiled kernel takes at most {_MAX_COLUMNS} codes, got {logits.shape[dim]}"
    return None


def _unlike(dtype: torch.dtype, **tensors: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            return f"the compiled kernel takes {name} as {dtype} with these arguments, got {tensor.dtype}"
    return None


def _unsupported_sample(logits, seed, offset, tau, hard, dim) -> str | None:
    return _unsupported_logits(logits, tau, dim)


def _unsupported_sample_backward(grad_y, logits, y, seed, offset, tau, hard, dim) -> str | None:
    return _unsupported_logits(logits, tau, dim) or _unlike(logits.dtype, grad_y=grad_y, y=y)


def _unsupported_sample_kl_backward(grad_y, grad_kl, *rest) -> str | None:
    return _unlike(torch.float32, grad_kl=grad_kl) or _unsupported_sample_backward(grad_y, *rest)


def _unsupported_codebook(logits, codebook, seed, offset, tau, dim) -> str | None:
    if codebook.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the compiled kernel takes a codebook of float32, bfloat16 and float16, got {codebook.dtype}"
    return _unsupported_logits(logits, tau, dim)


def _unsupported_codebook_backward(grad_embedding, grad_kl, logits, codebook, *rest) -> str | None:
    return (
        _unsupported_codebook(logits, codebook, *rest)
        or _unlike(torch.float32, grad_kl=grad_kl)
        or _unlike(codebook.dtype, grad_embedding=grad_embedding)
    )


def _unsupported_by_triton(first, *rest) -> str | None:
    """``first`` has the rows of the call."""
    if first.numel() >= first.shape[rest[-1]] << 31:
        return "the Triton kernels take fewer than 2^31 rows"
    return _triton.unsupported(first, *rest)


for _op, _run, _unsupported, _plain in (
    (gumbel_softmax_op, _sample_native, _unsupported_sample, reference.gumbel_softmax),
    (
        gumbel_softmax_backward_op,
        _sample_backward_native,
        _unsupported_sample_backward,
        reference.gumbel_softmax_backward,
    ),
    (gumbel_softmax_kl_op, _sample_kl_native, _unsupported_sample, reference.gumbel_softmax_kl),
    (
        gumbel_softmax_kl_backward_op,
        _sample_kl_backward_native,
        _unsupported_sample_kl_backward,
        reference.gumbel_softmax_kl_backward,
    ),
    (gumbel_codebook_op, _codebook_native, _unsupported_codebook, reference.gumbel_codebook),
    (
        gumbel_codebook_backward_op,
        _codebook_backward_native,
        _unsupported_codebook_backward,
        reference.gumbel_codebook_backward,
    ),
):
    if "codebook" in _op.name:
        _op.provide("native", _run, unavailable=_native.unavailable_but_on_cpu, unsupported=_unsupported)
    else:
        _refused = on_cuda_too(_op.name, _unsupported)
        _op.provide("native", _run, unavailable=_native.unavailable, unsupported=_refused)
    _op.provide(
        "triton",
        _triton.launcher("gumbel_softmax", _op.name),
        unavailable=_triton.unavailable,
        unsupported=_unsupported_by_triton,
    )
    _op.provide("reference", _plain)


def _save_sample(ctx, inputs, output) -> None:
    logits, seed, offset, tau, ctx.hard, ctx.dim = inputs
    y = output[0] if isinstance(output, tuple) else output
    ctx.save_for_backward(logits, y, seed, offset, tau)


def _sample_gradient(ctx, grad_y):
    grad = gumbel_softmax_backward_op(grad_y, *ctx.saved_tensors, ctx.hard, ctx.dim)
    return grad, None, None, None, None, None


def _sample_kl_gradient(ctx, grad_y, grad_kl):
    grad = gumbel_softmax_kl_backward_op(grad_y, grad_kl, *ctx.saved_tensors, ctx.hard, ctx.dim)
    return grad, None, None, None, None, None


def _save_codebook(ctx, inputs, output) -> None:
    logits, codebook, seed, offset, tau, ctx.dim = inputs
    ctx.save_for_backward(logits, codebook, seed, offset, tau)


def _codebook_gradient(ctx, grad_embedding, grad_kl):
    grads = gumbel_codebook_backward_op(grad_embedding, grad_kl, *ctx.saved_tensors, ctx.dim)
    return *grads, None, None, None, None


gumbel_softmax_op.register_autograd(_sample_gradient, _save_sample)
gumbel_softmax_kl_op.register_autograd(_sample_kl_gradient, _save_sample)
gumbel_codebook_op.register_autograd(_codebook_gradient, _save_codebook)


_LEAST_TAU = torch.finfo(torch.float32).tiny


def _check(logits: Tensor, tau: float, dim: int) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"expected logits as a floating-point tensor, got {got}; convert it with logits.float()")
    if logits.dim() == 0:
        raise ValueError("expected logits with at least one dimension, got a scalar; give it the codes' dimension")
    if not -logits.dim() <= dim < logits.dim():
        raise ValueError(
            f"expected dim between {-logits.dim()} and {logits.dim() - 1} for logits of shape {tuple(logits.shape)}, "
            f"got {dim}; give it the codes' dimension"
        )
    if logits.shape[dim] == 0:
        raise ValueError(f"expected at least one code along dim {dim}, got logits of shape {tuple(logits.shape)}")
    if isinstance(tau, Tensor):
        raise TypeError("expected the temperature tau as a number, got a tensor; keep the schedule on the host")
    if not 0 < tau < math.inf:
        raise ValueError(f"expected a finite temperature tau above 0, got {tau}; for a one-hot sample pass hard=True")
    if not _LEAST_TAU <= tau <= 1 / _LEAST_TAU and logits.dtype != torch.float64:
        raise ValueError(
            f"expected a temperature tau from {_LEAST_TAU:g} to {1 / _LEAST_TAU:g}, which float32 can hold and divide "
            f"by, got {tau}; for a one-hot sample pass hard=True"
        )


def _check_codebook(logits: Tensor, codebook: Tensor, dim: int) -> None:
    if not isinstance(codebook, Tensor) or not codebook.is_floating_point():
        got = codebook.dtype if isinstance(codebook, Tensor) else type(codebook).__name__
        raise TypeError(f"expected codebook as a floating-point tensor, got {got}; convert it with codebook.float()")
    if codebook.dim() != 2 or codebook.shape[0] != logits.shape[dim]:
        raise ValueError(
            f"expected a codebook of shape [{logits.shape[dim]}, D], one row per code along dim {dim} of the logits, "
            f"got {tuple(codebook.shape)}"
        )
    if codebook.device != logits.device:
        raise ValueError(
            f"expected the codebook on the logits' device {logits.device}, got {codebook.device}; move it with .to()"
        )


def _sample(op: Op, tensors: tuple[Tensor, ...], tau: float, generator: torch.Generator | None, *settings):
    """What ``op`` gives for ``tensors``, whose first are the logits, with a seed drawn for the call.

    Seed, offset and temperature are scalar tensors on the logits' device.
    """
    device, dtype = tensors[0].device, reference.compute_dtype(tensors[0].dtype)
    if torch.compiler.is_dynamo_compiling():
        # A product, since torch.compile makes tau a constant of the graph where it meets torch.full or torch.tensor.
        temperature = torch.ones((), dtype=dtype, device=device) * float(tau)
    elif device != _CPU or dispatcher_is_needed(tensors):
        temperature = torch.full((), float(tau), dtype=dtype, device=device)
    else:
        return op(*tensors, new_seed(device, generator), *_kept_scalars(float(tau), dtype), *settings)
    offset = torch.zeros((), dtype=torch.int64, device=device)
    return op(*tensors, new_seed(device, generator), offset, temperature, *settings)


_CPU = torch.device("cpu")


@lru_cache(maxsize=16)
def _kept_scalars(tau: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Offset 0 and the temperature as CPU scalars, made once, for nobody writes to them; anew they take 4 µs a call."""
    with torch.inference_mode(False):  # a backward may save them
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        return zero, torch.full((), tau, dtype=dtype, device="cpu")


# ---- Eager calls without a gradient. They are over when they return, so that the seed too finds memory that is there.


class _OfThread(threading.local):
    """A seed's memory, drawn into anew by each call of its thread; to make it too would take 3 µs."""

    def __init__(self):
        with torch.inference_mode(False):
            self.seed = torch.zeros((), dtype=torch.int64, device="cpu")


_of_thread = _OfThread()


def _native_scalars(op: Op, tensors: tuple[Tensor, ...], tau: float, *settings) -> tuple[Tensor, Tensor] | None:
    """Offset and temperature of calls that look like this one, or None without a compiled kernel for them."""
    offset, temperature = _kept_scalars(float(tau), reference.compute_dtype(tensors[0].dtype))
    provider = op.choose("cpu", (*tensors, offset, offset, temperature, *settings))
    return (offset, temperature) if provider.name == "native" else None


def _seed(generator: torch.Generator | None) -> Tensor:
    return new_seed(_CPU, generator, _of_thread.seed)


def _prepare_sample(logits: Tensor, tau: float, hard: bool, dim: int) -> Callable | None:
    _check(logits, tau, dim)
    scalars = _native_scalars(gumbel_softmax_op, (logits,), tau, hard, dim)
    if scalars is None:
        return None
    kernel, shape, strides = _native.cpu_kernel("gumbel_softmax"), logits.shape, contiguous_strides(logits.shape)

    def run(logits: Tensor, generator: torch.Generator | None) -> Tensor:
        y = logits.new_empty_strided(shape, strides)
        kernel(logits, y, None, _seed(generator), *scalars, hard, dim, torch.get_num_threads())
        return y

    return run


def _prepare_sample_kl(logits: Tensor, tau: float, hard: bool, dim: int) -> Callable | None:
    _check(logits, tau, dim)
    scalars = _native_scalars(gumbel_softmax_kl_op, (logits,), tau, hard, dim)
    if scalars is None:
        return None
    kernel, shape, strides = _native.cpu_kernel("gumbel_softmax"), logits.shape, contiguous_strides(logits.shape)
    rows = _layout(shape, dim)

    def run(logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        y = logits.new_empty_strided(shape, strides)
        kl = logits.new_empty_strided(*rows, dtype=torch.float32)
        kernel(logits, y, kl, _seed(generator), *scalars, hard, dim, torch.get_num_threads())
        return y, kl

    return run


def _prepare_codebook(logits: Tensor, codebook: Tensor, tau: float, dim: int) -> Callable | None:
    _check(logits, tau, dim)
    _check_codebook(logits, codebook, dim)
    scalars = _native_scalars(gumbel_codebook_op, (logits, codebook), tau, dim)
    if scalars is None:
        return None
    kernel, rows = _native.cpu_kernel("gumbel_codebook"), _layout(logits.shape, dim)
    vectors = _layout(logits.shape, dim, codebook.shape[1])

    def run(logits: Tensor, codebook: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        embedding = codebook.new_empty_strided(*vectors)
        kl = logits.new_empty_strided(*rows, dtype=torch.float32)
        kernel(logits, codebook, embedding, kl, _seed(generator), *scalars, dim, torch.get_num_threads())
        return embedding, kl

    return run


_prepared_sample, _prepared_sample_kl = Prepared(_prepare_sample), Prepared(_prepare_sample_kl)
_prepared_codebook = Prepared(_prepare_codebook)


@names_wrong_types
def gumbel_softmax(
    logits: Tensor, tau: float = 1.0, hard: bool = False, dim: int = -1, generator: torch.Generator | None = None
) -> Tensor:
    """Sample ``softmax((logits + gumbel) / tau)`` along ``dim`` (paper section 2.1), as ``F.gumbel_softmax`` does.

    Args:
        logits: floating tensor of any shape and strides, K codes along ``dim``. ``-inf`` excludes a code.
        tau: temperature, above 0.
        hard: give the one-hot of the largest noisy logit (exact zeros and ones), with the gradient of the soft sample.
        dim: the dimension of the codes.
        generator: source of the call's seed, on the logits' device; None takes the device's default, and then the call
            can be captured whole by ``torch.compile``.

    Returns:
        y, contiguous, of the logits' shape and dtype; computed in float32 (float64 for float64). A row that holds NaN
        or ``+inf``, or nothing but ``-inf``, is NaN, in y and in the gradient; other rows are not touched.

    Raises:
        TypeError, ValueError: logits not floating or without a code, dim out of range, tau not above 0, or a generator
            on another device.
    """
    run = _prepared_sample.find((logits,), (tau, hard, dim))
    if run is not None:
        return run(logits, generator)
    _check(logits, tau, dim)
    return _sample(gumbel_softmax_op, (logits,), tau, generator, hard, dim)


@names_wrong_types
def gumbel_softmax_kl(
    logits: Tensor, tau: float = 1.0, hard: bool = False, dim: int = -1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`gumbel_softmax` together with the KL of the codes' posterior to the uniform prior.

    The posterior is ``q = softmax(logits)``, without noise and temperature; ``kl = sum q·ln q + ln K`` in nats, one
    number per row: the logits' shape without ``dim``, float32 (float64 for float64 logits), 0 <= kl <= ln K.
    Arguments, y and errors are those of :func:`gumbel_softmax`. Both outputs carry gradients to the logits.
    """
    run = _prepared_sample_kl.find((logits,), (tau, hard, dim))
    if run is not None:
        return run(logits, generator)
    _check(logits, tau, dim)
    return _sample(gumbel_softmax_kl_op, (logits,), tau, generator, hard, dim)


@names_wrong_types
def gumbel_codebook(
    logits: Tensor, codebook: Tensor, tau: float = 1.0, dim: int = -1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The relaxed code vectors: a soft Gumbel sample times the codebook, without keeping the sample.

    Args:
        logits: floating tensor with K codes along ``dim``.
        codebook: ``[K, D]`` floating tensor on the same device, the vector of each code; its dtype may differ.
        tau, dim, generator: as in :func:`gumbel_softmax`.

    Returns:
        (embedding, kl): the embedding has the logits' shape with D in place of K, and the codebook's dtype; kl is that
        of :func:`gumbel_softmax_kl`. Products are summed in float32 (float64 for float64 logits). Gradients go to the
        logits and to the codebook; the backward draws the noise again from the same seed.

    Raises:
        TypeError, ValueError: as :func:`gumbel_softmax`, or a codebook that is not ``[K, D]`` on the logits' device.
    """
    run = _prepared_codebook.find((logits, codebook), (tau, dim))
    if run is not None:
        return run(logits, codebook, generator)
    _check(logits, tau, dim)
    _check_codebook(logits, codebook, dim)
    return _sample(gumbel_codebook_op, (logits, codebook), tau, generator, dim)
