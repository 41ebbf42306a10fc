"""Linear cross-entropy on the CPU: torch's matrix products with a compiled kernel between them, chunk after chunk.

A chunk's logits are stored transposed, ``[classes, rows]``: torch's products are fastest that way round. Inputs of 16
bits are widened to float32 a chunk of rows or a panel of classes at a time. Work space beside the results is about
``4·_CHUNK_FLOATS`` bytes; with a weight of 16 bits a panel and one byte an element of its gradient come on top.

Results are the same for any number of threads as far as ``torch.mm`` gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dalle_kernels import _native
from dalle_kernels.cross_entropy import reference

_CHUNK_FLOATS = 5 << 20  # of logits, and of the rows in float32; what lies between two products stays in cache
_PANEL_FLOATS = 1 << 19  # of a 16-bit weight in float32
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)  # the last one of targets
_ROW_COPIES = 3  # transposed for the logits, the sums of their gradient, times a factor for the weight's gradient


def _balanced(count: int, most: int, multiple: int) -> list[slice]:
    """Slices of at most ``most`` (at least ``multiple``) that are alike but for the last; a multiple long."""
    parts = max(1, -(-count // max(most, multiple)))
    step = max(multiple, -(-count // (parts * multiple)) * multiple)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _GradientOfWeight:
    """Sums of a chunk's products into the weight's gradient, rounded to its dtype once."""

    def __init__(self, weight: Tensor, panels: list[slice], product: Tensor | None):
        self.gradient = weight.new_empty(weight.shape)
        self.panels, self.product = panels, product
        self.low = None if product is None else weight.new_empty(weight.shape, dtype=torch.uint8)

    def add(self, logits: Tensor, rows: Tensor, *, first: bool, last: bool) -> None:
        if self.product is None:
            self.gradient.addmm_(logits, rows, beta=0 if first else 1)
            return
        for panel in self.panels:
            part = self.gradient[panel]
            term = torch.mm(logits[panel], rows, out=self.product[: len(part)])
            _native.call(
                "gradient_sum",
                term.device,
                term=term.data_ptr(),
                gradient=part.data_ptr(),
                low=self.low[panel].data_ptr(),
                count=part.numel(),
                first=first,
                last=last,
                dtype=_native.DTYPES[part.dtype],
            )


class _Chunks:
    """One pass over the rows: losses and, where ``row_scale`` says what reaches each of them, gradients."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int):
        self.kept, _ = reference.checked_targets(target, len(weight), ignore_index)
        self.hidden, self.weight, self.target, self.ignore_index = hidden, weight, target, ignore_index
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        classes, width = weight.shape
        self.chunks = _balanced(len(hidden), _CHUNK_FLOATS // (classes + _ROW_COPIES * width), 16)
        self.loss = hidden.new_empty(len(hidden), dtype=torch.float32)
        self.total = hidden.new_zeros((), dtype=torch.float64)
        step = self.chunks[0].stop if self.chunks else 0
        self.logits = self._scratch(classes, step)
        self.transposed = self._scratch(width, step)
        self.row_factor = self._scratch(step)
        self.workspace = self._scratch(_native.library("cpu").cross_entropy_workspace(classes, step))
        narrow = weight.dtype != torch.float32
        self.panels = _balanced(classes, _PANEL_FLOATS // max(width, 1) if narrow else classes, 16)
        self.panel = self._scratch(self.panels[0].stop, width) if narrow else None

    def _scratch(self, *shape: int) -> Tensor:
        return self.hidden.new_empty(shape, dtype=torch.float32)

    def _wide_weight(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in float32, a panel of classes at a time; the next one overwrites it."""
        for panel in self.panels:
            part = self.weight[panel]
            yield panel, part if self.panel is None else self.panel[: len(part)].copy_(part)

    def _logits(self, chunk: slice, row_scale: Tensor | None = None, bias_sums: Tensor | None = None) -> Tensor:
        """The losses of a chunk, and its logits ``[classes, rows]`` or, with ``row_scale``, their gradient."""
        rows, target = self.hidden[chunk], self.target[chunk]
        classes, width = self.weight.shape
        transposed = self.transposed.view(-1)[: width * len(rows)].view(width, len(rows)).copy_(rows.t())
        logits = self.logits.view(-1)[: classes * len(rows)].view(classes, -1)
        for panel, weight in self._wide_weight():
            torch.mm(weight, transposed, out=logits[panel])
        _native.call(
            "cross_entropy_chunk",
            rows.device,
            logits=logits.data_ptr(),
            classes=classes,
            rows=len(rows),
            bias=0 if self.bias is None else self.bias.data_ptr(),
            target=target.data_ptr(),
            target_stride=target.stride(0),
            ignore_index=self.ignore_index,
            row_scale=0 if row_scale is None else row_scale[chunk].data_ptr(),
            row_scale_stride=0 if row_scale is None else row_scale.stride(0),
            loss=self.loss[chunk].data_ptr(),
            total=self.total.data_ptr(),
            row_factor=self.row_factor.data_ptr(),
            bias_sums=0 if bias_sums is None else bias_sums.data_ptr(),
            workspace=self.workspace.data_ptr(),
        )
        return logits

    def losses(self) -> Tensor:
        for chunk in self.chunks:
            self._logits(chunk)
        return self.loss

    def gradients(self, row_scale: Tensor, bias: Tensor | None, output_mask: list[bool]) -> tuple[Tensor, ...]:
        """Gradients of hidden, weight and bias; empty where ``output_mask`` wants none."""
        grad_hidden = self.hidden.new_empty(self.hidden.shape if output_mask[0] else 0)
        grad_weight = _GradientOfWeight(self.weight, self.panels, self.panel) if output_mask[1] else None
        if grad_weight is not None and not self.chunks:
            grad_weight.gradient.zero_()
        bias_sums = self.weight.new_zeros(len(self.weight), dtype=torch.float64) if output_mask[2] else None
        sums = self._scratch(self.transposed.shape[1], self.transposed.shape[0])
        for chunk in self.chunks:
            logits = self._logits(chunk, row_scale, bias_sums)
            rows = self.hidden[chunk]
            factor = self.row_factor[: len(rows), None]
            if output_mask[0]:
                products = self._times_weight(logits, sums[: len(rows)])
                torch.mul(products, factor, out=grad_hidden[chunk])
            if output_mask[1]:
                # A NaN in an ignored row stays out of the sums.
                scaled = torch.mul(rows, factor, out=sums[: len(rows)]).masked_fill_(~self.kept[chunk, None], 0.0)
                grad_weight.add(logits, scaled, first=chunk is self.chunks[0], last=chunk is self.chunks[-1])
        return (
            grad_hidden,
            self.weight.new_empty(0) if grad_weight is None else grad_weight.gradient,
            (self.weight if bias is None else bias).new_empty(0) if bias_sums is None else bias_sums.to(bias.dtype),
        )

    def _times_weight(self, logits: Tensor, out: Tensor) -> Tensor:
        for panel, weight in self._wide_weight():
            out.addmm_(logits[panel].t(), weight, beta=0 if panel.start == 0 else 1)
        return out


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
    count = chunks.kept.sum() if reduction == "mean" else hidden.new_ones(())
    share = count.to(torch.float32).reciprocal()  # in the dtype that the kernel reads, whatever torch's default is
    gradients = chunks.gradients(share.expand(len(hidden)), bias, output_mask)
    return (chunks.total * share).to(torch.float32), *gradients


def linear_cross_entropy_scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    gradient = gradient.contiguous()  # which it is already, unless a compiler chose another layout
    output = torch.empty_like(gradient)
    _native.call(
        "gradient_scale",
        gradient.device,
        input=gradient.data_ptr(),
        output=output.data_ptr(),
        count=gradient.numel(),
        dtype=_native.DTYPES[gradient.dtype],
        factor=factor.data_ptr(),
    )
    return output


def unsupported(*arguments) -> str | None:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dtype not in _DTYPES:
            return f"the compiled kernel takes float32, float16 and bfloat16, got {argument.dtype}"
    return None
