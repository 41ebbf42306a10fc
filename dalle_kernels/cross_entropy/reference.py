"""Linear layer and cross-entropy in one, in plain PyTorch: the definition of the ops, in any floating dtype.

Rows are worked through in chunks, so that logits exist for one chunk at a time. Logits, softmax and sums are float32
(float64 when any input is float64), whatever the inputs' dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 21


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the logits and of the loss: float64 when any input is float64, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


class _Problem:
    """The inputs in the arithmetic's dtype, and what both directions need of the targets."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int):
        self.dtype = compute_dtype(hidden, weight, bias)
        self.hidden, self.weight = hidden, weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.kept = target != ignore_index
        outside = self.kept & ((target < 0) | (target >= weight.shape[0]))
        self.target = target.masked_fill(outside | ~self.kept, 0)
        # A GPU's target cannot be looked at without waiting for it: there the row becomes NaN instead of an error.
        self.outside = outside
        if target.device.type == "cpu" and outside.any():
            first = target[outside][0].item()
            raise ValueError(
                f"expected targets from 0 to {weight.shape[0] - 1} or ignore_index {ignore_index}, got {first}; "
                f"the weight has one row per class"
            )

    def chunks(self) -> Iterator[slice]:
        step = max(1, _CHUNK_LOGITS // self.weight.shape[0])
        for start in range(0, self.hidden.shape[0], step):
            yield slice(start, start + step)

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """The chunk of ``hidden`` in the arithmetic's dtype and its logits ``[rows, classes]``."""
        rows = self.hidden[chunk].to(self.dtype)
        return rows, torch.nn.functional.linear(rows, self.weight, self.bias)

    def loss(self, chunk: slice, logits: Tensor, logsumexp: Tensor) -> Tensor:
        """Loss of each row of a chunk: 0 where ignored, NaN where the target is no class."""
        picked = logits.gather(1, self.target[chunk, None]).squeeze(1)
        loss = (logsumexp - picked).masked_fill_(~self.kept[chunk], 0.0)
        return loss.masked_fill_(self.outside[chunk], math.nan)

    def row_scale(self, grad_loss: Tensor) -> Tensor:
        """Gradient that reaches each row's loss: 0 where ignored, NaN where the target is no class."""
        return grad_loss.to(self.dtype).masked_fill(~self.kept, 0.0).masked_fill_(self.outside, math.nan)


class _Gradients:
    """Gradients gathered chunk by chunk: the rows of ``hidden`` as they come, float32 sums for weight and bias."""

    def __init__(self, problem: _Problem):
        self.problem = problem
        self.hidden = torch.empty_like(problem.hidden, memory_format=torch.contiguous_format)
        self.weight = torch.zeros_like(problem.weight, memory_format=torch.contiguous_format)
        self.bias = self.weight.new_zeros(0 if problem.bias is None else self.weight.shape[0])

    def add(self, chunk: slice, rows: Tensor, logits: Tensor, logsumexp: Tensor, row_scale: Tensor) -> None:
        """``(softmax - one_hot)·row_scale`` overwrites the logits, then goes to the three inputs."""
        grad_logits = logits.sub_(logsumexp[:, None]).exp_()
        grad_logits.scatter_add_(1, self.problem.target[chunk, None], grad_logits.new_full((len(rows), 1), -1.0))
        grad_logits.mul_(row_scale[:, None])
        grad_logits.masked_fill_(~self.problem.kept[chunk, None], 0.0)  # a NaN in an ignored row stays out of the sums
        self.hidden[chunk] = grad_logits @ self.problem.weight
        self.weight.addmm_(grad_logits.t(), rows)
        if self.problem.bias is not None:
            self.bias += grad_logits.sum(0)

    def cast(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight.to(weight.dtype), self.bias.to(weight.dtype if bias is None else bias.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    problem = _Problem(hidden, weight, target, bias, ignore_index)
    loss = torch.empty(len(hidden), dtype=problem.dtype, device=hidden.device)
    logsumexp = torch.empty_like(loss)
    for chunk in problem.chunks():
        _, logits = problem.logits(chunk)
        logsumexp[chunk] = logits.logsumexp(1)
        loss[chunk] = problem.loss(chunk, logits, logsumexp[chunk])
    return loss, logsumexp


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits are computed again; ``logsumexp`` spares their softmax a second pass for its statistics."""
    problem = _Problem(hidden, weight, target, bias, ignore_index)
    gradients = _Gradients(problem)
    row_scale = problem.row_scale(grad_loss)
    for chunk in problem.chunks():
        rows, logits = problem.logits(chunk)
        gradients.add(chunk, rows, logits, logsumexp[chunk], row_scale[chunk])
    return gradients.cast(weight, bias)


def linear_cross_entropy_with_gradient(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss and its gradients while a chunk's logits are at hand: three matrix products instead of four."""
    problem = _Problem(hidden, weight, target, bias, ignore_index)
    gradients = _Gradients(problem)
    loss = torch.zeros((), dtype=problem.dtype, device=hidden.device)
    share = problem.kept.sum().to(problem.dtype).reciprocal() if reduction == "mean" else torch.ones_like(loss)
    row_scale = problem.row_scale(share.expand(len(hidden)))
    for chunk in problem.chunks():
        rows, logits = problem.logits(chunk)
        logsumexp = logits.logsumexp(1)
        loss += problem.loss(chunk, logits, logsumexp).sum()
        gradients.add(chunk, rows, logits, logsumexp, row_scale[chunk])
    return loss * share, *gradients.cast(weight, bias)
