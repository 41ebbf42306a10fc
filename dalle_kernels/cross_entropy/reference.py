"""Linear layer and cross-entropy in one, in plain PyTorch: the definition of the ops, in any floating dtype.

Rows are worked through in chunks, so that logits exist for one chunk at a time. Logits, softmax and sums are float32
(float64 when any input is float64), whatever the inputs' dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 21


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the logits and of the loss: float64 when any input is float64, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def must_not_wait(target: Tensor) -> bool:
    """A GPU's target cannot be looked at without waiting for it: there a bad one makes its row NaN, not an error."""
    return target.device.type != "cpu"


def checked_targets(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which rows count, and which of them have a target that is no class; on the CPU such a target raises."""
    kept = target != ignore_index
    outside = kept & ((target < 0) | (target >= classes))
    if not must_not_wait(target) and outside.any():
        refuse_target(int(target[outside][0]), classes, ignore_index)
    return kept, outside


def refuse_target(target: int, classes: int, ignore_index: int) -> NoReturn:
    raise ValueError(
        f"expected targets from 0 to {classes - 1} or ignore_index {ignore_index}, got {target}; "
        f"the weight has one row per class"
    )


class _Problem:
    """The inputs in the arithmetic's dtype, and what both directions need of the targets."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int):
        self.dtype = compute_dtype(hidden, weight, bias)
        self.hidden, self.weight = hidden, weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.kept, self.outside = checked_targets(target, weight.shape[0], ignore_index)
        self.target = target.masked_fill(self.outside | ~self.kept, 0)

    def chunks(self) -> Iterator[slice]:
        step = max(1, _CHUNK_LOGITS // self.weight.shape[0])
        for start in range(0, self.hidden.shape[0], step):
            yield slice(start, start + step)

    def log_softmax(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """The chunk of ``hidden`` in the arithmetic's dtype and its log-probabilities ``[rows, classes]``."""
        rows = self.hidden[chunk].to(self.dtype)
        return rows, torch.nn.functional.linear(rows, self.weight, self.bias).log_softmax(1)

    def loss(self, chunk: slice, log_p: Tensor) -> Tensor:
        """Loss of each row of a chunk: 0 where ignored, NaN where the target is no class."""
        picked = log_p.gather(1, self.target[chunk, None]).squeeze(1)
        return picked.neg_().masked_fill_(~self.kept[chunk], 0.0).masked_fill_(self.outside[chunk], math.nan)

    def row_scale(self, grad_loss: Tensor) -> Tensor:
        """Gradient that reaches each row's loss: 0 where ignored, NaN where the target is no class."""
        return grad_loss.to(self.dtype).masked_fill(~self.kept, 0.0).masked_fill_(self.outside, math.nan)


class _Gradients:
    """Gradients gathered chunk by chunk: the rows of ``hidden`` as they come, sums for the weight and the bias.

    The bias's is a plain sum over every row, which float32 would blur; it is kept in float64.
    """

    def __init__(self, problem: _Problem, output_mask: list[bool]):
        self.problem, self.output_mask = problem, output_mask
        hidden, weight = problem.hidden, problem.weight
        self.hidden = hidden.new_empty(hidden.shape if output_mask[0] else 0)
        self.weight = weight.new_zeros(weight.shape if output_mask[1] else 0)
        self.bias = weight.new_zeros(len(weight) if output_mask[2] else 0, dtype=torch.float64)

    def add(self, chunk: slice, rows: Tensor, log_p: Tensor, row_scale: Tensor) -> None:
        """``(softmax - one_hot)·row_scale`` overwrites the log-probabilities, then goes to the three inputs."""
        grad_logits = log_p.exp_()
        grad_logits.scatter_add_(1, self.problem.target[chunk, None], grad_logits.new_full((len(rows), 1), -1.0))
        grad_logits.mul_(row_scale[:, None])
        grad_logits.masked_fill_(~self.problem.kept[chunk, None], 0.0)  # a NaN in an ignored row stays out of the sums
        if self.output_mask[0]:
            self.hidden[chunk] = grad_logits @ self.problem.weight
        if self.output_mask[1]:
            self.weight.addmm_(grad_logits.t(), rows)
        if self.output_mask[2]:
            self.bias += grad_logits.sum(0, dtype=torch.float64)

    def cast(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight.to(weight.dtype), self.bias.to(weight.dtype if bias is None else bias.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> Tensor:
    problem = _Problem(hidden, weight, target, bias, ignore_index)
    loss = torch.empty(len(hidden), dtype=problem.dtype, device=hidden.device)
    for chunk in problem.chunks():
        loss[chunk] = problem.loss(chunk, problem.log_softmax(chunk)[1])
    return loss


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the row losses, from logits that are computed again; empty where ``output_mask`` wants none."""
    problem = _Problem(hidden, weight, target, bias, ignore_index)
    gradients = _Gradients(problem, output_mask)
    row_scale = problem.row_scale(grad_loss)
    for chunk in problem.chunks():
        rows, log_p = problem.log_softmax(chunk)
        gradients.add(chunk, rows, log_p, row_scale[chunk])
    return gradients.cast(weight, bias)


def linear_cross_entropy_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss and its gradients while a chunk's logits are at hand: three matrix products instead of four."""
    problem = _Problem(hidden, weight, target, bias, ignore_index)
    gradients = _Gradients(problem, output_mask)
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    share = problem.kept.sum().double().reciprocal() if reduction == "mean" else torch.ones_like(loss)
    row_scale = problem.row_scale(share.expand(len(hidden)))
    for chunk in problem.chunks():
        rows, log_p = problem.log_softmax(chunk)
        loss += problem.loss(chunk, log_p).sum(dtype=torch.float64)
        if any(output_mask):
            gradients.add(chunk, rows, log_p, row_scale[chunk])
    return (loss * share).to(problem.dtype), *gradients.cast(weight, bias)


def linear_cross_entropy_reduced(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    settings = (ignore_index, reduction, [False] * 3)
    return linear_cross_entropy_with_gradient(hidden, weight, target, bias, *settings)[0]


def linear_cross_entropy_scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient times what reaches the loss, in the loss's dtype: a 16-bit gradient meets an unrounded factor."""
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype)


def linear_cross_entropy_scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """As above, in the gradient's own memory."""
    gradient.copy_(linear_cross_entropy_scaled_gradient(gradient, factor))
