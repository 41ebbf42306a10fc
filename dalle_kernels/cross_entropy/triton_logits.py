"""Triton's kernels of linear cross-entropy: a row's loss from its logits, their gradients, and where these are kept."""

from __future__ import annotations

import triton
import triton.language as tl

from dalle_kernels.triton_elements import first_of_block
from dalle_kernels.triton_philox import LN_2, LOG2_E

GROUP = 8
"""Panels of classes begin at multiples of this, and rows of logits in memory."""
_GROUP = tl.constexpr(GROUP)


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
def _row_loss(logits, bias, wanted, classes, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """A row's loss, NaN where ``wanted`` is no class, its largest logit, and the sum of exponentials relative to that.

    Where all logits are -inf, 0 is given for the largest.
    """
    largest = tl.full([], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, classes, BLOCK):
        x = _load_logits(logits, bias, first + tl.arange(0, BLOCK), classes, HAS_BIAS)
        before = largest
        largest = tl.maximum(before, tl.max(x, 0))
        sums = sums * _shrink(before, largest) + tl.exp2((x - _reference(largest)) * LOG2_E)
    total = tl.sum(sums, 0)
    is_class = (wanted >= 0) & (wanted < classes)
    x = tl.load(logits + wanted, is_class, other=float("nan"))
    if HAS_BIAS:
        x += tl.load(bias + wanted, is_class, other=0.0).to(tl.float32)
    return (largest - x) + LN_2 * tl.log2(total), _reference(largest), total


@triton.jit
def _gradient(x, column, wanted, largest, total, scale, classes, ignore_index):
    """(softmax - one_hot)·scale of a row's logits: 0 where its target is ignore_index, NaN where that is no class."""
    e = tl.exp2((x - largest) * LOG2_E)
    scale = tl.where((wanted >= 0) & (wanted < classes), scale, float("nan"))
    value = tl.where(column == wanted, e - total, e) * tl.div_rn(scale, total)
    return tl.where(wanted == ignore_index, 0.0, value)


@triton.jit(do_not_specialize=["first_row", "ignore_index"])
def losses(logits, bias, target, loss, first_row, classes, logits_stride, target_stride, ignore_index,
           HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The losses of the rows from ``first_row`` on, whose logits these are."""
    local_row = tl.program_id(0).to(tl.int64)
    row = first_row + local_row
    wanted = tl.load(target + row * target_stride)
    row_loss, _, _ = _row_loss(logits + local_row * logits_stride, bias, wanted, classes, HAS_BIAS, BLOCK)
    tl.store(loss + row, tl.where(wanted == ignore_index, 0.0, row_loss))


@triton.jit(do_not_specialize=["first_row", "ignore_index"])
def losses_and_gradients(logits, gradient, stash, bias, target, loss, row_largest, row_sum, row_scale, first_row,
                         classes, logits_stride, gradient_stride, target_stride, row_scale_stride, ignore_index, kept,
                         width, step, HAS_BIAS: tl.constexpr, KEEPS: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """The losses of the rows from ``first_row`` on, and the gradients of their logits, which may overwrite these.

    KEEPS: the gradients of rows before ``kept``, at most ``width``, go to ``stash`` [classes, width], too. Those of
    each ``step`` classes, fewer at the end, lie where these classes do, as a matrix of as many columns.
    """
    local_row = tl.program_id(0).to(tl.int64)
    row = first_row + local_row
    logits += local_row * logits_stride
    gradient += local_row * gradient_stride
    wanted = tl.load(target + row * target_stride)
    row_loss, largest, total = _row_loss(logits, bias, wanted, classes, HAS_BIAS, BLOCK)
    tl.store(loss + row, tl.where(wanted == ignore_index, 0.0, row_loss))
    tl.store(row_largest + row, largest)
    tl.store(row_sum + row, total)
    scale = tl.load(row_scale + row * row_scale_stride)
    last_panel = (classes - 1) // step
    for first in range(0, classes, BLOCK):
        group = first + tl.arange(0, BLOCK // _GROUP) * _GROUP
        column = group[:, None] + tl.arange(0, _GROUP)[None, :]
        x = _load_logits(logits, bias, column, classes, HAS_BIAS)
        value = _gradient(x, column, wanted, largest, total, scale, classes, ignore_index)
        value = value.to(gradient.dtype.element_ty)
        # A gradient of 16 bits overwrites logits of this block or an earlier one, which other threads may still read.
        tl.debug_barrier()
        tl.store(gradient + column, value, column < classes)
        if KEEPS:
            panel = group // step
            columns = tl.where(panel == last_panel, classes - last_panel * step, step)
            place = panel.to(tl.int64) * step * width + row * columns + (group - panel * step)
            place = place[:, None] + tl.arange(0, _GROUP)[None, :]
            tl.store(stash + place, value, (column < classes) & (row < kept))


@triton.jit(do_not_specialize=["first_row", "ignore_index"])
def gradients(logits, gradient, bias, target, row_largest, row_sum, row_scale, first_row, first_class, columns, classes,
              logits_stride, gradient_stride, target_stride, row_scale_stride, ignore_index, HAS_BIAS: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """The gradients of logits [rows, columns], from ``first_class`` on, of rows whose largest logit and sum are known.

    They may overwrite these where both are float32.
    """
    local_row = tl.program_id(0).to(tl.int64)
    row = first_row + local_row
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _load_logits(logits + local_row * logits_stride, bias, column, columns, HAS_BIAS)
    wanted, scale = tl.load(target + row * target_stride), tl.load(row_scale + row * row_scale_stride)
    largest, total = tl.load(row_largest + row), tl.load(row_sum + row)
    value = _gradient(x, first_class + column, wanted, largest, total, scale, classes, ignore_index)
    place = local_row * gradient_stride + column
    tl.store(gradient + place, value.to(gradient.dtype.element_ty), column < columns)


@triton.jit
def scaled(gradient, output, factor, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    index = first_of_block(BLOCK, WIDE) + tl.arange(0, BLOCK)
    value = tl.load(gradient + index, index < count, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(output + index, value.to(output.dtype.element_ty), index < count)
