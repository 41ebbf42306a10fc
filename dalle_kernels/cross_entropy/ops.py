"""Linear layer and cross-entropy in one: checks, operators and the public function (the unembeddings of paper B.1).

Three operators serve one public function. ``linear_cross_entropy`` gives a loss per row; its backward computes the
logits again. ``linear_cross_entropy_with_gradient`` gives a mean or a sum and computes the gradients in the same pass,
which saves one of four matrix products; its backward only scales them. It is taken when a gradient is wanted of a
reduced loss, except in float16: there a loss scale must multiply the gradients before they are rounded, not after.
``linear_cross_entropy_reduced`` gives a mean or a sum to an eager call that wants no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle_kernels import _native, _triton
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op, dispatcher_is_needed, has_transform
from dalle_kernels._prepared import Prepared
from dalle_kernels.cross_entropy import native, reference

REDUCTIONS = ("none", "mean", "sum")
_INPUTS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias"


def _fake_rows(hidden, weight, target, bias, ignore_index):
    return hidden.new_empty(hidden.shape[0], dtype=reference.compute_dtype(hidden, weight, bias))


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, output_mask: list[bool]) -> tuple[Tensor, ...]:
    inputs = (hidden, weight, weight if bias is None else bias)
    return tuple(tensor.new_empty(tensor.shape if wanted else 0) for tensor, wanted in zip(inputs, output_mask))


def _fake_with_gradient(hidden, weight, target, bias, ignore_index, reduction, output_mask):
    loss = hidden.new_empty((), dtype=reference.compute_dtype(hidden, weight, bias))
    return loss, *_fake_gradients(hidden, weight, bias, output_mask)


linear_cross_entropy_op = Op(f"linear_cross_entropy({_INPUTS}, int ignore_index) -> Tensor", _fake_rows)
linear_cross_entropy_backward_op = Op(
    f"linear_cross_entropy_backward(Tensor grad_loss, {_INPUTS}, int ignore_index, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad_loss, hidden, weight, target, bias, _, output_mask: _fake_gradients(hidden, weight, bias, output_mask),
)
linear_cross_entropy_with_gradient_op = Op(
    f"linear_cross_entropy_with_gradient({_INPUTS}, int ignore_index, str reduction, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_with_gradient,
)
linear_cross_entropy_reduced_op = Op(
    f"linear_cross_entropy_reduced({_INPUTS}, int ignore_index, str reduction) -> Tensor",
    lambda hidden, weight, target, bias, *_: hidden.new_empty((), dtype=reference.compute_dtype(hidden, weight, bias)),
)
linear_cross_entropy_scaled_gradient_op = Op(
    "linear_cross_entropy_scaled_gradient(Tensor gradient, Tensor factor) -> Tensor",
    lambda gradient, factor: gradient.new_empty(gradient.shape),
)
linear_cross_entropy_scale_gradient_op = Op(
    "linear_cross_entropy_scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()", lambda gradient, factor: None
)


for _op in (
    linear_cross_entropy_op,
    linear_cross_entropy_backward_op,
    linear_cross_entropy_with_gradient_op,
    linear_cross_entropy_reduced_op,
    linear_cross_entropy_scaled_gradient_op,
    linear_cross_entropy_scale_gradient_op,
):
    _op.provide(
        "native", getattr(native, _op.name), unavailable=_native.unavailable_but_on_cpu, unsupported=native.unsupported
    )
    _op.provide(
        "triton",
        _triton.launcher("cross_entropy", _op.name),
        unavailable=_triton.unavailable,
        unsupported=_triton.unsupported,
    )
    _op.provide("reference", getattr(reference, _op.name))


def _save_rows(ctx, inputs, output) -> None:
    hidden, weight, target, bias, ctx.ignore_index = inputs
    ctx.save_for_backward(hidden, weight, target, bias)


def _where_wanted(gradients, output_mask: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the inputs hidden, weight, target, bias."""
    hidden, weight, bias = (gradient if wanted else None for gradient, wanted in zip(gradients, output_mask))
    return hidden, weight, None, bias


def _rows_gradient(ctx, grad_loss: Tensor):
    hidden, weight, _, bias = ctx.needs_input_grad[:4]
    output_mask = [hidden, weight, bias]
    gradients = linear_cross_entropy_backward_op(grad_loss, *ctx.saved_tensors, ctx.ignore_index, output_mask)
    return *_where_wanted(gradients, output_mask), None


def _save_gradients(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]
    ctx.gradients = output[1:]


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """In its own memory where nothing traces the backward, else as a new tensor."""
    if dispatcher_is_needed((gradient, factor)):
        return linear_cross_entropy_scaled_gradient_op(gradient, factor)
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    linear_cross_entropy_scale_gradient_op(gradient, factor)
    return gradient


def _scaled_gradients(ctx, grad_loss: Tensor | None, *unused):
    """The gradients of the forward pass times what reaches the loss, given away as they come.

    A second backward through the same graph (``retain_graph=True``) finds none left and computes them again.
    """
    if grad_loss is None:
        return (None,) * 7
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = linear_cross_entropy_with_gradient_op(*ctx.saved_tensors, *ctx.settings)[1:]
    output_mask = ctx.settings[-1]
    gradients = [_scaled(gradient, grad_loss) if wanted else None for gradient, wanted in zip(gradients, output_mask)]
    return *_where_wanted(gradients, output_mask), None, None, None


linear_cross_entropy_op.register_autograd(_rows_gradient, _save_rows)
linear_cross_entropy_with_gradient_op.register_autograd(_scaled_gradients, _save_gradients)


def _well_formed(hidden, weight, target, bias, reduction: str) -> bool:
    """Whether :func:`_check` would find nothing wrong: one condition, for an eager call's time."""
    return (
        isinstance(hidden, Tensor)
        and isinstance(weight, Tensor)
        and isinstance(target, Tensor)
        and hidden.is_floating_point()
        and weight.is_floating_point()
        and target.dtype == torch.int64
        and hidden.dim() > 0
        and weight.dim() == 2
        and weight.shape[0] > 0
        and weight.shape[1] == (shape := hidden.shape)[-1]
        and target.shape == shape[:-1]
        and hidden.device == weight.device == target.device
        and (bias is None or _is_bias(bias, weight))
        and reduction in REDUCTIONS
    )


def _is_bias(bias, weight: Tensor) -> bool:
    return (
        isinstance(bias, Tensor)
        and bias.is_floating_point()
        and bias.shape == weight.shape[:1]
        and bias.device == weight.device
    )


def _check(hidden, weight, target, bias, reduction: str) -> None:
    """Raise one clear sentence unless the arguments are right."""
    tensors = (("hidden", hidden), ("weight", weight), ("bias", bias))[: 2 if bias is None else 3]
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"expected {name} as a floating-point tensor, got {got}; convert it with {name}.float()")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(
            f"expected target as an int64 tensor of class numbers, got {got}; convert it with target.long()"
        )
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"expected hidden [..., D] and weight [V, D] with at least one class, got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}; the weight is laid out as that of torch.nn.Linear"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"expected one target per row of hidden, shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}; "
            "give hidden as [..., D] and target without the last dimension"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"expected a bias of shape ({weight.shape[0]},), one per class, got {tuple(bias.shape)}; "
            "it is that of torch.nn.Linear"
        )
    device = hidden.device
    for name, tensor in (*tensors, ("target", target)):
        if tensor.device != device:
            raise ValueError(f"expected {name} on hidden's device {device}, got {tensor.device}; move it with .to()")
    if reduction not in REDUCTIONS:
        raise ValueError(f"expected a reduction among {', '.join(REDUCTIONS)}, got {reduction!r}")


def _wanted_gradients(*tensors: Tensor | None) -> list[bool]:
    if not torch.is_grad_enabled():
        return [False, False, False]
    return [tensor is not None and tensor.requires_grad for tensor in tensors]


def _prepare(hidden, weight, target, bias, ignore_index: int, reduction: str) -> Callable | None:
    _check(hidden, weight, target, bias, reduction)
    rows, settings = hidden.reshape(target.numel(), hidden.shape[-1]), (ignore_index, reduction)
    arguments = (rows, weight, target.reshape(-1), bias, *settings)
    if reduction == "none" or linear_cross_entropy_reduced_op.choose("cpu", arguments).name != "native":
        return None
    return native.prepare_reduced(hidden, weight, target, bias, *settings)


_prepared = Prepared(_prepare)


@names_wrong_types
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` in nats; its float32 logits are never stored whole (paper B.1).

    Args:
        hidden: ``[..., D]`` floating tensor, one row per prediction, any strides.
        weight: ``[V, D]`` floating tensor, one row per class, as in ``torch.nn.Linear``.
        target: int64 of hidden's shape without D: the class of each row, or ``ignore_index``.
        bias: ``[V]`` or None.
        ignore_index: rows with this target give loss 0 and no gradient, and do not count in the mean.
        reduction: "mean" over the rows that count (NaN when none does, as in ``F.cross_entropy``; the gradients are
            then 0), "sum", or "none" for a loss of target's shape.

    Returns:
        The loss in float32 (float64 when any input is float64). Hidden, weight and bias may differ in dtype; products
        are taken and summed in float32. Gradients go to all three, once.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or reduction. A target that is neither a class nor
            ``ignore_index`` raises on the CPU; on a GPU, where looking at it would mean waiting, the loss is NaN.
    """
    run = _prepared.find((hidden, weight, target, bias), (ignore_index, reduction))
    if run is not None:
        return run(hidden, weight, target, bias)
    if not _well_formed(hidden, weight, target, bias, reduction):
        _check(hidden, weight, target, bias, reduction)
    classes = target if target.dim() == 1 else target.reshape(-1)
    rows = hidden if hidden.dim() == 2 else hidden.reshape(classes.shape[0], hidden.shape[-1])
    inputs = (rows, weight, classes, bias, ignore_index)
    if reduction != "none":
        output_mask = _wanted_gradients(hidden, weight, bias)
        if True in output_mask:
            if all(tensor is None or tensor.dtype != torch.float16 for tensor in (hidden, weight, bias)):
                return linear_cross_entropy_with_gradient_op(*inputs, reduction, output_mask)[0]
        # A transform may want a gradient that the inputs do not tell of.
        elif not torch.compiler.is_compiling() and not has_transform():
            return linear_cross_entropy_reduced_op(*inputs, reduction)
    loss = linear_cross_entropy_op(*inputs)
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (classes != ignore_index).sum()
