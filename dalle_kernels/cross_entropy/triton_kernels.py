"""Linear cross-entropy on a GPU: torch's matrix products with float32 results, Triton's kernels between them.

Rows are taken in chunks, whose logits give losses, then their own gradients and with them the gradient of ``hidden``.
A weight of float32 has its gradient summed where it lies, chunk after chunk. One of 16 bits has no room for sums in
float32, and rounding after every chunk would spoil it: unless one chunk has all rows, its gradient is taken in a second
pass over panels of classes, each element summed in float32 and rounded once. The memory of that gradient, ``[classes,
width]``, serves the first pass to keep the logits' gradients of as many rows as the width; those of later rows are
computed again.

Products of two tensors of one 16-bit dtype run on the tensor cores as they are, with the logits' gradient rounded to
that dtype; any others are taken in float32. In float16 that gradient is kept relative to the largest incoming one, so
that small ones do not vanish.

Floor, 8192 rows of 3968 against 16384 classes on an H200 in bfloat16: 2·rows·classes·width is 1.07 TFLOP or 1.35 ms at
790 TFLOP/s; loss and gradients take three products, 4.0 ms, and the rows beyond the first 3840, which are not kept,
half of a fourth, 0.7 ms. Sums in float32 instead would take 260 MB and be slower: their 520 MB of traffic for each of
20 chunks cost 2.4 ms. Between the products each logit is written, read twice and its gradient written and read twice,
1.1 GB a pass or 0.25 ms each if none of it stays in the L2 cache; to keep a gradient, it is read and written once more.
Workspace: ``_WORKSPACE`` bytes and what the library takes. Reached on an H200, 8192 rows of 3968 against 16384
classes in bfloat16, launches included: losses 1.84 ms, 578 TFLOP/s; with gradients 8.1 ms, 394 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._triton_configurations import configuration
from dalle_kernels.triton_elements import first_of_block, is_wide
from dalle_kernels.triton_philox import LN_2, LOG2_E

_WORKSPACE = 48 << 20
_LEAST_ROWS = 16  # of a chunk, whatever the workspace


@triton.jit
def _load_logits(logits, bias, column, columns, HAS_BIAS: tl.constexpr):
    """A row's logits, -inf beyond the last one."""
    x = tl.load(logits + column, column < columns, other=-float("inf"))
    if HAS_BIAS:
        x += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)
    return x


@triton.jit
def _reference(largest):
    """What is subtracted before exponentials are taken: 0 while there is nothing but -inf."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _shrink(before, after):
    """By what sums relative to a former maximum shrink."""
    return tl.where(before == -float("inf"), 0.0, tl.exp2((before - _reference(after)) * LOG2_E))


@triton.jit
def _losses(logits, bias, target, loss, row_largest, row_sum, classes, target_stride, ignore_index,
            HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Each row's loss, its largest logit and the sum of exponentials relative to that."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * classes
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, classes, BLOCK):
        x = _load_logits(logits, bias, first + tl.arange(0, BLOCK), classes, HAS_BIAS)
        before = largest
        largest = tl.maximum(before, x)
        total = total * _shrink(before, largest) + tl.exp2((x - _reference(largest)) * LOG2_E)
    of_row = tl.max(largest, 0)
    total = tl.sum(total * _shrink(largest, of_row), 0)
    wanted = tl.load(target + row.to(tl.int64) * target_stride)
    is_class = (wanted >= 0) & (wanted < classes)
    x = tl.load(logits + wanted, is_class, other=float("nan"))
    if HAS_BIAS:
        x += tl.load(bias + wanted, is_class, other=0.0).to(tl.float32)
    value = (of_row - x) + LN_2 * tl.log2(total)
    tl.store(loss + row, tl.where(wanted == ignore_index, 0.0, value))
    tl.store(row_largest + row, _reference(of_row))
    tl.store(row_sum + row, total)


@triton.jit
def _gradients(logits, gradient, bias, target, row_largest, row_sum, row_scale, unit, columns, first_class, classes,
               target_stride, row_scale_stride, ignore_index, HAS_BIAS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """(softmax - one_hot)·row_scale / unit of the logits [rows, columns] of classes from ``first_class`` on.

    ``gradient`` may be ``logits``. A row whose target is ignore_index gets 0, one whose target is no class NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _load_logits(logits + row * columns, bias, column, columns, HAS_BIAS)
    wanted, total = tl.load(target + row * target_stride), tl.load(row_sum + row)
    e = tl.exp2((x - tl.load(row_largest + row)) * LOG2_E)
    scale = tl.div_rn(tl.load(row_scale + row * row_scale_stride), tl.load(unit))
    scale = tl.where((wanted >= 0) & (wanted < classes), scale, float("nan"))
    value = tl.where(column + first_class == wanted, e - total, e) * tl.div_rn(scale, total)
    value = tl.where(wanted == ignore_index, 0.0, value)
    tl.store(gradient + row * columns + column, value.to(gradient.dtype.element_ty), column < columns)


@triton.jit
def _scaled(gradient, output, factor, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    index = first_of_block(BLOCK, WIDE) + tl.arange(0, BLOCK)
    value = tl.load(gradient + index, index < count, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(output + index, value.to(output.dtype.element_ty), index < count)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, of two matrices of one dtype."""
    if left.dtype == torch.float32 or not left.is_cuda or left.shape[1] == 0:
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


def _slices(count: int, most: int) -> Iterator[slice]:
    step = max(most - most % 128 if most > 128 else most, _LEAST_ROWS)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class _Problem:
    """A call's tensors, and each row's loss, largest logit and sum once its chunk was seen."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int):
        self.hidden, self.weight, self.target, self.ignore_index = hidden, weight, target, ignore_index
        self.bias = None if bias is None else bias.contiguous()
        self.kind = hidden.dtype if hidden.dtype == weight.dtype else torch.float32
        self.loss, self.largest, self.sum = hidden.new_empty(3, len(hidden), dtype=torch.float32).unbind()
        classes, width = weight.shape
        self.logit_bytes = 4 if self.kind == torch.float32 else 6  # with its gradient, in its place or beside it
        self.chunks = list(_slices(len(hidden), _WORKSPACE // (classes * self.logit_bytes + 4 * width)))
        # Sums and terms of a panel's gradient take half of the workspace, and so do its logits. A weight that is
        # widened to float32 for the products is so in panels of this size.
        self.panels = list(_slices(classes, _WORKSPACE // (16 * max(width, 1))))

    def rows(self, chunk: slice) -> Tensor:
        return self.hidden[chunk].to(self.kind)

    def classes(self, panel: slice) -> Tensor:
        return self.weight[panel].to(self.kind)

    def logits(self, rows: Tensor) -> Tensor:
        """``[rows, classes]`` in float32, without the bias."""
        if self.weight.dtype == self.kind:
            return _product(rows, self.weight.t())
        logits = rows.new_empty(len(rows), len(self.weight), dtype=torch.float32)
        for panel in self.panels:
            logits[:, panel] = _product(rows, self.classes(panel).t())
        return logits

    def find_losses(self, chunk: slice, logits: Tensor) -> None:
        chosen = configuration("cross_entropy_losses", "any", logits.device)
        target = self.target[chunk]
        _losses[(len(logits),)](
            logits, logits if self.bias is None else self.bias, target, self.loss[chunk], self.largest[chunk],
            self.sum[chunk], logits.shape[1], target.stride(0), self.ignore_index, self.bias is not None,
            **chosen.options,
        )  # fmt: skip

    def gradient(self, chunk: slice, panel: slice, logits: Tensor, row_scale: Tensor, unit: Tensor) -> Tensor:
        """The gradient of these logits over ``unit``, in the products' dtype; in float32 it overwrites them."""
        chosen = configuration("cross_entropy_gradients", "any", logits.device)
        gradient = logits if self.kind == torch.float32 else torch.empty_like(logits, dtype=self.kind)
        bias = logits if self.bias is None else self.bias[panel]
        target, scale = self.target[chunk], row_scale[chunk]
        _gradients[len(logits), triton.cdiv(logits.shape[1], chosen["BLOCK"])](
            logits, gradient, bias, target, self.largest[chunk], self.sum[chunk], scale, unit, logits.shape[1],
            panel.start, len(self.weight), target.stride(0), scale.stride(0), self.ignore_index,
            self.bias is not None, **chosen.options,
        )  # fmt: skip
        return gradient

    def losses(self) -> Tensor:
        for chunk in self.chunks:
            self.find_losses(chunk, self.logits(self.rows(chunk)))
        return self.loss

    def times_weight(self, gradient: Tensor) -> Tensor:
        if self.weight.dtype == self.kind:
            return _product(gradient, self.weight)
        total = gradient.new_zeros(len(gradient), self.weight.shape[1])
        for panel in self.panels:
            total += _product(gradient[:, panel], self.classes(panel))
        return total

    def gradients(self, row_scale: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden, weight and bias; empty where ``output_mask`` wants none."""
        hidden, weight, every_class = self.hidden, self.weight, slice(0, len(self.weight))
        grad_hidden = hidden.new_empty(hidden.shape if output_mask[0] else 0)
        grad_weight = weight.new_zeros(weight.shape if output_mask[1] else 0)
        bias_sums = weight.new_zeros(len(weight) if output_mask[2] else 0, dtype=torch.float64)
        row_scale = row_scale.to(torch.float32)
        unit = self.unit(row_scale)
        again = output_mask[1] and weight.dtype != torch.float32 and len(self.chunks) > 1
        kept = 0
        for chunk in self.chunks:
            rows = self.rows(chunk)
            logits = self.logits(rows)
            self.find_losses(chunk, logits)
            gradient = self.gradient(chunk, every_class, logits, row_scale, unit)
            del logits
            if output_mask[0]:
                torch.mul(self.times_weight(gradient), unit, out=grad_hidden[chunk])
            if output_mask[1] and weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.t(), rows)
            elif output_mask[1] and not again:
                for panel in self.panels:
                    torch.mul(_product(gradient[:, panel].t(), rows), unit, out=grad_weight[panel])
            if again and gradient.dtype == weight.dtype and chunk.stop <= weight.shape[1]:
                self.keep(chunk, gradient, grad_weight)
                kept = chunk.stop
            if output_mask[2]:
                bias_sums += gradient.sum(0, dtype=torch.float64)
        if again:
            for panel in self.panels:
                held = grad_weight[panel].view(weight.shape[1], -1)[:kept]
                torch.mul(self.gradient_of_panel(panel, held, row_scale, unit), unit, out=grad_weight[panel])
        bias_sums *= unit
        return grad_hidden, grad_weight, bias_sums.to(weight.dtype if self.bias is None else self.bias.dtype)

    def unit(self, row_scale: Tensor) -> Tensor:
        """What gradients are divided by before they are rounded: in float16 the largest that comes in, else 1."""
        if self.kind != torch.float16 or len(row_scale) == 0:
            return row_scale.new_ones(())
        largest = row_scale.abs().nan_to_num(0.0, 0.0, 0.0).amax()
        return largest.masked_fill(largest == 0, 1.0)

    def keep(self, chunk: slice, gradient: Tensor, grad_weight: Tensor) -> None:
        """Store a chunk's gradients panel by panel, ``[rows, classes]`` where the panel's own gradient is to be."""
        classes, width = grad_weight.shape
        step = self.panels[0].stop
        whole = classes // step * step
        panels = gradient[:, :whole].unflatten(1, (-1, step)).transpose(0, 1)
        grad_weight[:whole].view(-1, width, step)[:, chunk] = panels
        if whole < classes:
            grad_weight[whole:].view(width, -1)[chunk] = gradient[:, whole:]

    def gradient_of_panel(self, panel: slice, held: Tensor, row_scale: Tensor, unit: Tensor) -> Tensor:
        """The gradient over ``unit`` of a few classes' weights in float32; every row's maximum and sum are known.

        ``held`` are the logits' gradients of the first rows.
        """
        weight, total, kept = self.classes(panel), None, len(held)
        if kept:
            total = _product(held.t(), self.rows(slice(0, kept)))
        for later in _slices(len(self.hidden) - kept, _WORKSPACE // (2 * len(weight) * self.logit_bytes)):
            chunk = slice(kept + later.start, kept + later.stop)
            rows = self.rows(chunk)
            gradient = self.gradient(chunk, panel, _product(rows, weight.t()), row_scale, unit)
            term = _product(gradient.t(), rows)
            total = term if total is None else total.add_(term)
        return total


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> Tensor:
    return _Problem(hidden, weight, target, bias, ignore_index).losses()


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _Problem(hidden, weight, target, bias, ignore_index).gradients(grad_loss, output_mask)


def linear_cross_entropy_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _Problem(hidden, weight, target, bias, ignore_index)
    count = (target != ignore_index).sum() if reduction == "mean" else hidden.new_ones(())
    share = count.to(torch.float64).reciprocal()
    gradients = problem.gradients(share.expand(len(hidden)), output_mask)
    return (problem.loss.sum(dtype=torch.float64) * share).to(torch.float32), *gradients


def linear_cross_entropy_reduced(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    losses = _Problem(hidden, weight, target, bias, ignore_index).losses()
    total = losses.sum(dtype=torch.float64)
    return (total / (target != ignore_index).sum() if reduction == "mean" else total).to(torch.float32)


def linear_cross_entropy_scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    gradient = gradient.contiguous()  # which it is already, unless a compiler chose another layout
    output, count = torch.empty_like(gradient), gradient.numel()
    chosen = configuration("cross_entropy_scaled_gradient", "any", gradient.device)
    if count > 0:
        _scaled[(triton.cdiv(count, chosen["BLOCK"]),)](
            gradient, output, factor, count, is_wide(count, chosen["BLOCK"]), **chosen.options
        )
    return output
