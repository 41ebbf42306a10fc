"""Linear cross-entropy on the CPU: matrix products with a compiled kernel between them, chunk after chunk.

A chunk's logits are stored transposed, ``[classes, rows]``: a row of them belongs to one lane of the kernel's
registers, and the product shares out the classes among threads. Work space beside the results is about
``4·_CHUNK_FLOATS`` bytes; with a weight of 16 bits a panel or two and one byte an element of its gradient come on top.

Results are the same for any number of threads, as far as ``torch.mm`` gives the same where it makes the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dalle_kernels import _native
from dalle_kernels.cross_entropy import reference
from dalle_kernels.linear.products import DTYPES, product

_CHUNK_FLOATS = 5 << 20  # of logits, and of the rows in float32; what lies between two products stays in cache
_PANEL_FLOATS = 1 << 20  # of a 16-bit weight's gradient in float32
_FEWEST_MULTIPLICATIONS = 1 << 20  # below as many, calling torch's product is faster than ours
_ROW_COPIES = 3  # in float32 for the logits, the sums of their gradient, times a factor for the weight's gradient


def _balanced(count: int, most: int, multiple: int) -> list[slice]:
    """Slices of at most ``most`` (at least ``multiple``) that are alike but for the last; a multiple long."""
    most = max(most, multiple)
    if 0 < count <= most:
        return [slice(0, count)]
    parts = max(1, -(-count // most))
    step = max(multiple, -(-count // (parts * multiple)) * multiple)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _most_rows(classes: int, width: int) -> int:
    """Of a chunk."""
    return _CHUNK_FLOATS // (classes + _ROW_COPIES * width)


class _GradientOfWeight:
    """Sums of a chunk's products into the weight's gradient, rounded to its dtype once."""

    def __init__(self, weight: Tensor):
        self.gradient = weight.new_empty(weight.shape)
        self.narrow = weight.dtype != torch.float32
        if self.narrow:
            classes, width = weight.shape
            self.panels = _balanced(classes, _PANEL_FLOATS // max(width, 1), 16)
            self.term = _scratch(self.panels[0].stop, width)
            self.low = torch.empty(weight.shape, dtype=torch.uint8)

    def add(self, logits: Tensor, rows: Tensor, *, first: bool, last: bool) -> None:
        if not self.narrow:
            product(logits, rows, out=self.gradient, accumulate=not first)
            return
        for panel in self.panels:
            part = self.gradient[panel]
            term = product(logits[panel], rows, out=self.term[: len(part)])
            _native.call("gradient_sum", term.device, term, part, self.low[panel], part.numel(), first, last)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32)


def _scratch(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


class _Chunks:
    """One pass over the rows: losses and, where ``row_scale`` says what reaches each of them, gradients."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int):
        rows, (classes, width) = hidden.shape[0], weight.shape
        self.hidden, self.weight, self.target, self.ignore_index = hidden, weight, target, ignore_index
        self.counted = self._counted_rows(classes)
        self.bias = None if bias is None else _wide(bias).contiguous()
        self.total = 0.0  # of the losses
        self.chunks = _balanced(rows, _most_rows(classes, width), 16)
        self.logits = _scratch(classes, self.chunks[0].stop if self.chunks else 0)

    def _counted_rows(self, classes: int) -> int:
        """How many rows count; raises where one of them has a target that is no class."""
        target, ignore_index = self.target, self.ignore_index
        counted, outside = _native.call("cross_entropy_targets", target.device, target, classes, ignore_index)
        if outside >= 0 and not reference.must_not_wait(target):
            reference.refuse_target(int(target[outside]), classes, ignore_index)
        return counted

    def _products(self, chunk: slice) -> Tensor:
        """The logits ``[classes, rows]`` of a chunk, without their bias."""
        rows = self.hidden[chunk]
        logits = self.logits.view(-1)[: len(self.weight) * len(rows)].view(len(self.weight), len(rows))
        return product(self.weight, rows.t(), out=logits)

    def _logits(
        self,
        chunk: slice,
        loss: Tensor | None = None,
        row_scale: Tensor | None = None,
        row_factor: Tensor | None = None,
        bias_sums: Tensor | None = None,
    ) -> Tensor:
        """The losses of a chunk, and its logits ``[classes, rows]`` or their gradient.

        ``loss`` takes all rows' losses, ``row_scale`` is what reaches each of them, ``row_factor`` takes the chunk's
        row factors, ``bias_sums`` the sums for the bias: None where they are not wanted.
        """
        logits = self._products(chunk)
        results = loss, row_scale, row_factor, bias_sums
        given = logits, self.target, self.bias, *results, chunk.start, self.ignore_index
        self.total += _native.call("cross_entropy_chunk", logits.device, *given)
        return logits

    def losses(self) -> Tensor:
        loss = torch.empty(len(self.hidden), dtype=torch.float32)
        for chunk in self.chunks:
            self._logits(chunk, loss)
        return loss

    def add_losses(self) -> None:
        for chunk in self.chunks:
            self._logits(chunk)

    def count(self, reduction: str) -> int:
        """What the sum of the losses is divided by."""
        return self.counted if reduction == "mean" else 1

    def reduced(self, reduction: str) -> Tensor:
        """The mean or the sum of the losses, once every chunk's are added."""
        count = self.count(reduction)
        return torch.scalar_tensor(self.total / count if count else math.nan, dtype=torch.float32)

    def gradients(self, row_scale: Tensor, bias: Tensor | None, output_mask: list[bool]) -> tuple[Tensor, ...]:
        """Gradients of hidden, weight and bias; empty where ``output_mask`` wants none."""
        grad_hidden = self.hidden.new_empty(self.hidden.shape) if output_mask[0] else _nothing(self.hidden)
        bias_sums = self.weight.new_zeros(len(self.weight), dtype=torch.float64) if output_mask[2] else None
        grad_weight = None
        if output_mask[1]:
            kept = self.target != self.ignore_index
            grad_weight = _GradientOfWeight(self.weight)
            if not self.chunks:
                grad_weight.gradient.zero_()
        step = self.chunks[0].stop if self.chunks else 0
        row_factor, sums = _scratch(step), _scratch(step, self.weight.shape[1])
        for chunk in self.chunks:
            logits = self._logits(chunk, None, row_scale, row_factor, bias_sums)
            rows = self.hidden[chunk]
            factor = row_factor[: len(rows), None]
            if output_mask[0]:
                torch.mul(product(logits.t(), self.weight, out=sums[: len(rows)]), factor, out=grad_hidden[chunk])
            if grad_weight is not None:
                # A NaN in an ignored row stays out of the sums.
                scaled = torch.mul(rows, factor, out=sums[: len(rows)]).masked_fill_(~kept[chunk, None], 0.0)
                grad_weight.add(logits, scaled, first=chunk is self.chunks[0], last=chunk is self.chunks[-1])
        return (
            grad_hidden,
            _nothing(self.weight) if grad_weight is None else grad_weight.gradient,
            _nothing(self.weight if bias is None else bias) if bias_sums is None else bias_sums.to(bias.dtype),
        )


def _nothing(like: Tensor) -> Tensor:
    return torch.empty_strided((0,), (1,), dtype=like.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> Tensor:
    return _Chunks(hidden, weight, target, bias, ignore_index).losses()


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    return _Chunks(hidden, weight, target, bias, ignore_index).gradients(grad_loss, bias, output_mask)


def linear_cross_entropy_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    chunks = _Chunks(hidden, weight, target, bias, ignore_index)
    count = chunks.count(reduction)
    share = torch.full((), 1 / count if count else math.inf, dtype=torch.float32)
    gradients = chunks.gradients(share.expand(len(hidden)), bias, output_mask)
    return chunks.reduced(reduction), *gradients


def linear_cross_entropy_reduced(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    chunks = _Chunks(hidden, weight, target, bias, ignore_index)
    chunks.add_losses()
    return chunks.reduced(reduction)


def prepare_reduced(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> Callable | None:
    """How :func:`linear_cross_entropy_reduced` runs for float32 tensors that look like these and make one chunk.

    None for others. ``hidden`` and ``target`` may have more dimensions than the operator's.
    """
    (classes, width), rows, mean = weight.shape, target.numel(), reduction == "mean"
    if not 0 < rows <= _most_rows(classes, width) or (bias is not None and not bias.is_contiguous()):
        return None
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (hidden, weight, bias)):
        return None
    flat, kernel = target.dim() == 1, _native.cpu_kernel("cross_entropy_reduced")
    is_small = rows * classes * width < _FEWEST_MULTIPLICATIONS

    def run(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        if not flat:
            hidden, target = hidden.reshape(rows, width), target.reshape(rows)
        logits = torch.nn.functional.linear(weight, hidden) if is_small else product(weight, hidden.t())
        loss = torch.empty_strided((), (), dtype=torch.float32, device="cpu")
        outside = kernel(logits, target, bias, loss, mean, ignore_index, torch.get_num_threads())
        if outside >= 0:
            reference.refuse_target(int(target[outside]), classes, ignore_index)
        return loss

    return run


def linear_cross_entropy_scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    gradient = gradient.contiguous()  # which it is already, unless a compiler chose another layout
    output = torch.empty_like(gradient)
    _native.call("gradient_scale", gradient.device, gradient, output, gradient.numel(), factor)
    return output


def linear_cross_entropy_scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    if gradient.is_contiguous():
        _native.call("gradient_scale", gradient.device, gradient, gradient, gradient.numel(), factor)
    else:
        gradient.copy_(linear_cross_entropy_scaled_gradient(gradient, factor))


def unsupported(*arguments) -> str | None:
    for argument in arguments:
        if argument is None:
            continue
        if not isinstance(argument, Tensor):
            break  # the settings follow
        if argument.dtype not in (*DTYPES, torch.int64):  # the last one of targets
            return f"the compiled kernel takes float32, float16 and bfloat16, got {argument.dtype}"
    return None
