"""Linear cross-entropy on a GPU: torch's matrix products, Triton's kernels between them.

Rows are taken in chunks. A product gives a chunk's logits in float32; one kernel reads them and writes each row's loss
and, in the logits' own memory, their gradient, which a second product turns into that of ``hidden``. A weight of
float32 has its gradient summed where it lies, chunk after chunk. One of 16 bits has no room for sums in float32, and
rounding after every chunk would spoil it: all rows go into one product, whose sums the library keeps in float32 and
rounds once. For that the logits' gradients of all rows are kept, in 16 bits. Where ``_WORKSPACE`` bytes hold them, the
logits lie in the memory of the weight's gradient, which is written last. Else they are kept in that memory, panel by
panel of classes: ``[classes, width]`` holds as many rows as the width. At the end a panel's part is copied out, and its
gradient written over it; the logits of later rows are computed again, panel by panel.

Products of two tensors of one 16-bit dtype run on the tensor cores as they are, with the logits' gradient rounded to
that dtype; any others are taken in float32. Where the library cuts a product's sums into parts it might add these up in
16 bits, and is told not to. In float16 the logits' gradient is kept relative to the largest incoming one, so that small
ones do not vanish, and products are rounded after they were multiplied by it.

Floor, 1024 rows of 3968 against 16384 classes and 4096 against 8192 on an H200 in bfloat16: three products are 1.20
TFLOP or 1.52 ms at 790 TFLOP/s. Each logit is written and read in float32, its gradient written once for each of the
two products that read it and copied once: 0.9 GB or 0.2 ms if none of it stays in the L2 cache. Scaling the gradients
by what reaches the loss takes 0.47 GB or 0.11 ms. Of 8192 rows against 16384 classes 4224 are not kept: a half of a
fourth product, 0.7 ms beside 4.0. Sums in float32 instead would take 260 MB and 520 MB of traffic a chunk.
Reached there: 1.94 ms with that scaling, of which products take 1.58 (Liger-Kernel summing in float32 3.77, torch with
16-bit logits 1.86), and 0.66 for the losses alone. The 128 rows beyond 3968 were then still found again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
import triton
from torch import Tensor

from dalle_kernels import _triton
from dalle_kernels._triton_configurations import configuration
from dalle_kernels.cross_entropy import triton_logits
from dalle_kernels.triton_elements import is_wide

_WORKSPACE = 48 << 20
_LEAST_ROWS = 16  # of a chunk or a panel, whatever the workspace
_FEW_ROWS = 256  # fewer make a product wait for its operands
_TILE = 128

_settings_of_products = Lock()


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """Within, bfloat16 products are rounded once; torch's setting of that is the whole process's."""
    of_products = torch.backends.cuda.matmul
    with _settings_of_products:
        splits = of_products.allow_bf16_reduced_precision_reduction_split_k
        allowed = of_products.allow_bf16_reduced_precision_reduction
        of_products.allow_bf16_reduced_precision_reduction = False, splits
        try:
            yield
        finally:
            of_products.allow_bf16_reduced_precision_reduction = allowed, splits


def _product(left: Tensor, right: Tensor, output: Tensor | None = None) -> Tensor:
    """left @ right in float32, of two matrices of one dtype."""
    if left.dtype == torch.float32 or not left.is_cuda or left.shape[1] == 0:
        return torch.mm(left.float(), right.float(), out=output)
    return torch.mm(left, right, out_dtype=torch.float32, out=output)


def _slices(count: int, most: int) -> list[slice]:
    step = max(count, 1) if count <= most else max(most - most % _LEAST_ROWS, _LEAST_ROWS)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _corner(matrix: Tensor, rows: int, columns: int) -> Tensor:
    return matrix if matrix.shape == (rows, columns) else matrix[:rows, :columns]


def _padded(columns: int) -> int:
    """The length of a row in memory, so that each begins where a product reads it quickly."""
    return -(-columns // triton_logits.GROUP) * triton_logits.GROUP


@cache
def _best_step(count: int, most: int, products: tuple[tuple[int, int], ...], multiprocessors: int) -> int:
    """How many of ``count`` rows of products, at most ``most``, to take at once, by (columns, depth) of each product.

    The time of a part is guessed from the waves of tiles, of 128 × 256 or 128 × 128, that it takes; one of the smaller
    tiles takes a little more than half as long.
    """
    if count <= most or most < 2 * _TILE:
        return most

    def waves(rows: int, columns: int, tile: int) -> int:
        return -(-(-(-rows // _TILE) * -(-columns // tile)) // multiprocessors)

    def time_of_part(rows: int) -> float:
        return sum(depth * min(waves(rows, n, 256), 0.58 * waves(rows, n, 128)) for n, depth in products)

    def time(step: int) -> float:
        return count // step * time_of_part(step) + time_of_part(count % step)

    return min(range(most - most % _TILE, 0, -_TILE), key=time)


class _Problem:
    """A call's tensors, and each row's loss, with gradients also its largest logit and sum, once its chunk was seen."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int):
        self.hidden, self.weight, self.target, self.ignore_index = hidden, weight, target, ignore_index
        self.bias = None if bias is None else bias.contiguous()
        self.kind = hidden.dtype if hidden.dtype == weight.dtype else torch.float32
        self.count, self.classes, self.width = len(hidden), *weight.shape
        self.loss, self.largest, self.sum = hidden.new_empty(3, self.count, dtype=torch.float32).unbind()
        self.transposed = weight.t()
        self.unit: Tensor | float = 1.0
        self.widens = hidden.dtype != weight.dtype
        # Operands and results in float32 that are not there in the end take a third of the workspace.
        self.spare = _WORKSPACE // 3
        self.room = _WORKSPACE - (self.spare if self.widens or self.kind == torch.float16 else 0)
        self.spare_rows = self.spare // (8 * max(self.width, 1))
        self.most_rows = self.room // (4 * _padded(self.classes) + (8 * self.width if self.widens else 0))

    def chunks(self, most: int, with_gradients: bool = True) -> list[slice]:
        products = ((self.classes, self.width), (self.width, self.classes))
        return self.parts(self.count, most, products[: 1 + with_gradients])

    def parts(self, count: int, most: int, products: tuple[tuple[int, int], ...]) -> list[slice]:
        return _slices(count, _best_step(count, most, products, _triton.multiprocessors(self.hidden.device)))

    def memory(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.hidden.new_empty(rows, _padded(columns), dtype=dtype)

    def rows(self, chunk: slice) -> Tensor:
        return self.hidden[chunk].to(self.kind)

    def panel(self, panel: slice) -> Tensor:
        """The weight of a few classes in the products' dtype."""
        return self.weight[panel].to(self.kind)

    def find_logits(self, rows: Tensor, logits: Tensor) -> None:
        """``[rows, classes]`` in float32, without the bias."""
        if self.weight.dtype == self.kind:
            _product(rows, self.transposed, logits)
            return
        for panel in _slices(self.classes, self.spare_rows):
            _product(rows, self.panel(panel).t(), logits[:, panel])

    def count_of(self, reduction: str) -> Tensor:
        """What the sum of the losses is divided by; it may be off by rounding beyond 2^24 rows."""
        if reduction == "mean":
            return (self.target != self.ignore_index).sum(dtype=torch.float32)
        return self.loss.new_ones(())

    def losses(self) -> Tensor:
        chosen = configuration("cross_entropy_losses", "any", self.hidden.device)
        chunks = self.chunks(self.most_rows, with_gradients=False)
        memory = self.memory(chunks[0].stop if chunks else 0, self.classes)
        for chunk in chunks:
            rows = self.rows(chunk)
            logits = _corner(memory, len(rows), self.classes)
            self.find_logits(rows, logits)
            triton_logits.losses[(len(rows),)](
                logits, logits if self.bias is None else self.bias, self.target, self.loss, chunk.start, self.classes,
                logits.stride(0), self.target.stride(0), self.ignore_index, self.bias is not None, **chosen.options,
            )  # fmt: skip
        return self.loss

    @_sums_in_float32()
    def gradients(self, row_scale: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden, weight and bias, empty where ``output_mask`` wants none; losses are found as well."""
        hidden, weight, bias = self.hidden, self.weight, self.weight if self.bias is None else self.bias
        if self.count == 0:
            shapes = (tensor.shape if wanted else (0,) for tensor, wanted in zip((hidden, weight, bias), output_mask))
            return tuple(tensor.new_zeros(shape) for tensor, shape in zip((hidden, weight, bias), shapes))
        grad_hidden = hidden.new_empty(hidden.shape if output_mask[0] else 0)
        grad_weight = weight.new_empty(weight.shape if output_mask[1] else 0)
        bias_sums = weight.new_zeros(self.classes, dtype=torch.float64) if output_mask[2] else None
        self.set_scale(row_scale)
        way = _way_to_weight(self, grad_weight if output_mask[1] else None)
        step = way.chunks[0].stop
        outputs = grad_hidden.split(step) if output_mask[0] else [grad_hidden] * len(way.chunks)
        for chunk, rows, output in zip(way.chunks, hidden.split(step), outputs, strict=True):
            rows, gradient = rows.to(self.kind), way.gradient(chunk)
            self.find_gradients(chunk, rows, gradient, way)
            if output_mask[0]:
                self.multiply_by_weight(gradient, output)
            if bias_sums is not None:
                bias_sums += gradient.sum(0, dtype=torch.float64)
            way.add(chunk, rows, gradient)
        del rows, gradient  # and with them what the chunks took
        way.finish()
        grad_bias = bias.new_empty(0) if bias_sums is None else bias_sums.mul_(self.unit).to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias

    def set_scale(self, row_scale: Tensor) -> None:
        """What comes in for each row, and in float16 its unit: the largest of all."""
        self.row_scale = row_scale.to(torch.float32)
        if self.kind == torch.float16:
            largest = self.row_scale.abs().nan_to_num(0.0, 0.0, 0.0).amax()
            self.unit = largest.masked_fill(largest == 0, 1.0)
            self.row_scale = self.row_scale / self.unit

    def find_gradients(self, chunk: slice, rows: Tensor, gradient: Tensor, way: _Way) -> None:
        """A chunk's losses and the gradients of its logits over the unit."""
        logits = way.logits(chunk)
        self.find_logits(rows, logits)
        chosen = configuration("cross_entropy_losses_and_gradients", "any", logits.device)
        triton_logits.losses_and_gradients[(len(logits),)](
            logits, gradient, gradient if way.stash is None else way.stash, logits if self.bias is None else self.bias,
            self.target, self.loss, self.largest, self.sum, self.row_scale, chunk.start, self.classes,
            logits.stride(0), gradient.stride(0), self.target.stride(0), self.row_scale.stride(0), self.ignore_index,
            way.kept, self.width, way.step, self.bias is not None, way.stash is not None, **chosen.options,
        )  # fmt: skip

    def find_gradients_again(self, chunk: slice, panel: slice, logits: Tensor, gradient: Tensor) -> None:
        """Those of a panel's logits, of rows whose largest logits and sums are known."""
        chosen = configuration("cross_entropy_gradients", "any", logits.device)
        triton_logits.gradients[len(logits), triton.cdiv(logits.shape[1], chosen["BLOCK"])](
            logits, gradient, logits if self.bias is None else self.bias[panel], self.target, self.largest, self.sum,
            self.row_scale, chunk.start, panel.start, logits.shape[1], self.classes, logits.stride(0),
            gradient.stride(0), self.target.stride(0), self.row_scale.stride(0), self.ignore_index,
            self.bias is not None, **chosen.options,
        )  # fmt: skip

    def multiply_by_weight(self, gradient: Tensor, output: Tensor) -> None:
        if self.weight.dtype == self.kind:
            self.multiply(gradient, self.weight, output)
            return
        total = output.new_zeros(output.shape, dtype=torch.float32)
        for panel in _slices(self.classes, self.spare_rows):
            total.addmm_(gradient[:, panel], self.panel(panel))
        output.copy_(total)

    def multiply(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        """``output = left @ right * unit``, summed in float32 and rounded once."""
        if output.dtype == left.dtype != torch.float16:
            torch.mm(left, right, out=output)
            return
        for part in _slices(len(output), self.spare_rows):
            torch.mul(_product(left[part], right), self.unit, out=output[part])


class _Way:
    """How the weight's gradient, ``output``, comes about from those of each chunk's logits.

    This one sums it where it lies, in float32, or wants none. The gradients of a chunk's logits overwrite these.
    """

    stash: Tensor | None = None
    """Where the gradients of the first ``kept`` rows are to go, too, in panels of ``step`` classes."""
    kept = 0

    def __init__(self, problem: _Problem, output: Tensor | None, most_rows: int | None = None):
        self.problem, self.output, self.step = problem, output, problem.classes
        self.chunks = problem.chunks(problem.most_rows if most_rows is None else most_rows)
        self.memory = problem.memory(self.chunks[0].stop, problem.classes)

    def logits(self, chunk: slice) -> Tensor:
        return _corner(self.memory, chunk.stop - chunk.start, self.problem.classes)

    def gradient(self, chunk: slice) -> Tensor:
        return _corner(self.memory.view(self.problem.kind), chunk.stop - chunk.start, self.problem.classes)

    def add(self, chunk: slice, rows: Tensor, gradient: Tensor) -> None:
        if self.output is not None and chunk.start == 0:
            torch.mm(gradient.t(), rows, out=self.output)
        elif self.output is not None:
            self.output.addmm_(gradient.t(), rows)

    def finish(self) -> None:
        """Called after the last chunk."""


class _Whole(_Way):
    """The gradients of all logits stay in the workspace, for one product that writes ``output``."""

    def __init__(self, problem: _Problem, output: Tensor):
        self.problem, self.output, self.step = problem, output, problem.classes
        self.whole = problem.memory(problem.count, problem.classes, problem.kind)
        length = self.whole.stride(0)
        inside, outside = self.most_rows(problem)
        self.chunks = problem.chunks(max(inside, outside))
        if problem.widens:
            self.memory = self.whole
        elif inside >= outside:
            self.memory = output.view(-1)[: 2 * inside * length].view(torch.float32).view(inside, length)
        else:
            self.memory = problem.memory(self.chunks[0].stop, problem.classes)

    @staticmethod
    def most_rows(problem: _Problem) -> tuple[int, int]:
        """Of how many rows the logits find room inside ``output`` and outside; none where the gradients find none."""
        if problem.widens:  # in float32, where the logits lie
            return 0, problem.count if problem.count <= problem.most_rows else 0
        length = _padded(problem.classes)
        left = problem.room - problem.kind.itemsize * problem.count * length
        return (problem.classes * problem.width // (2 * length), left // (4 * length)) if left >= 0 else (0, 0)

    def gradient(self, chunk: slice) -> Tensor:
        return _corner(self.whole[chunk], chunk.stop - chunk.start, self.problem.classes)

    def add(self, chunk: slice, rows: Tensor, gradient: Tensor) -> None:
        pass

    def finish(self) -> None:
        every_row = slice(0, self.problem.count)
        self.problem.multiply(self.gradient(every_row).t(), self.problem.rows(every_row), self.output)


class _Panels(_Way):
    """Gradients of logits stay in ``output``, panel by panel of classes, and those of some later rows beside it.

    Those of rows for which there is no room are found once more.
    """

    def __init__(self, problem: _Problem, output: Tensor):
        count, classes, width, size = problem.count, problem.classes, problem.width, problem.kind.itemsize
        self.more_rows = self.most_more_rows(problem)
        beside = size * _padded(classes) * self.more_rows
        super().__init__(problem, output, min(problem.most_rows, (_WORKSPACE - beside) // (4 * _padded(classes))))
        self.more = problem.memory(self.more_rows, classes, problem.kind)
        if not problem.widens:
            self.stash, self.kept = output, min(count, width)
        # A panel's gradients, and rows if they are widened, take what is not spare, be it the least of panels.
        room, widened = _WORKSPACE - problem.spare, 0 if problem.hidden.dtype == problem.kind else 4 * width
        self.groups = _slices(count, room // (size * min(classes, _TILE) + widened))
        rows = self.groups[0].stop
        most = (room - widened * rows) // (size * rows)
        if len(self.groups) > 1:  # a sum and a term of it in float32
            most = min(most, problem.spare_rows // 2)
        elif problem.widens:
            most = min(most, problem.spare_rows)
        self.panels = problem.parts(classes, most, ((width, count),))
        self.step = self.panels[0].stop

    @staticmethod
    def most_more_rows(problem: _Problem) -> int:
        """How many of the rows that ``output`` has no room for half of what is spare takes."""
        if problem.widens:
            return 0
        later = max(problem.count - problem.width, 0)
        return min(later, problem.spare // (2 * problem.kind.itemsize * _padded(problem.classes)))

    def add(self, chunk: slice, rows: Tensor, gradient: Tensor) -> None:
        self.copy(gradient, chunk.start, _corner(self.more, self.more_rows, self.problem.classes), self.kept)

    @staticmethod
    def copy(source: Tensor, first_row: int, target: Tensor, first_of_target: int) -> None:
        """The rows that both have, by the number of their first ones."""
        first, last = max(first_row, first_of_target), min(first_row + len(source), first_of_target + len(target))
        if first < last:
            target[first - first_of_target : last - first_of_target] = source[first - first_row : last - first_row]

    def finish(self) -> None:
        problem = self.problem
        del self.memory  # of the logits
        memory = problem.memory(self.groups[0].stop, self.step, problem.kind)
        for panel in self.panels:
            output, total = self.output[panel], None
            for group in self.groups:
                gradient = _corner(memory, group.stop - group.start, panel.stop - panel.start)
                self.find_gradient(panel, group, gradient)
                if len(self.groups) == 1:
                    problem.multiply(gradient.t(), problem.rows(group), output)
                elif total is None:
                    total = _product(gradient.t(), problem.rows(group))
                else:
                    total += _product(gradient.t(), problem.rows(group))
            if total is not None:
                torch.mul(total, problem.unit, out=output)

    def find_gradient(self, panel: slice, group: slice, gradient: Tensor) -> None:
        """``[rows, classes]`` of a group and a panel: what was kept, and what is found again."""
        problem = self.problem
        if self.kept > 0:
            kept = self.output[panel].view(problem.width, -1)[: self.kept]
            self.copy(kept, 0, gradient, group.start)
        if self.more_rows > 0:
            self.copy(self.more[:, panel], self.kept, gradient, group.start)
        first = max(self.kept + self.more_rows, group.start)
        if first >= group.stop:
            return
        weight, in_place = problem.panel(panel), problem.kind == torch.float32
        parts = _slices(group.stop - first, problem.spare // (8 * _padded(len(weight))))
        memory = None if in_place else problem.memory(parts[0].stop, len(weight))
        for part in parts:
            chunk = slice(first + part.start, first + part.stop)
            found = gradient[chunk.start - group.start : chunk.stop - group.start]
            logits = found if in_place else _corner(memory, *found.shape)
            _product(problem.rows(chunk), weight.t(), logits)
            problem.find_gradients_again(chunk, panel, logits, found)


def _way_to_weight(problem: _Problem, output: Tensor | None) -> _Way:
    if output is not None and output.dtype == torch.float32:
        # Sums where they lie are read and written for each chunk.
        whole = problem.widens or problem.count <= problem.most_rows
        keeps = problem.count <= problem.width + _Panels.most_more_rows(problem)
        return _Panels(problem, output) if keeps and not whole else _Way(problem, output)
    if output is None:
        return _Way(problem, output)
    if max(_Whole.most_rows(problem)) >= min(problem.count, _FEW_ROWS):
        return _Whole(problem, output)
    return _Panels(problem, output)


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
    count = problem.count_of(reduction)
    gradients = problem.gradients(count.reciprocal().expand(len(hidden)), output_mask)
    return _reduced(problem.loss, count), *gradients


def linear_cross_entropy_reduced(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    problem = _Problem(hidden, weight, target, bias, ignore_index)
    return _reduced(problem.losses(), problem.count_of(reduction))


def _reduced(losses: Tensor, count: Tensor) -> Tensor:
    return torch.div(losses.sum(dtype=torch.float64), count, out=losses.new_empty(()))


def linear_cross_entropy_scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    gradient = gradient.contiguous()  # which it is already, unless a compiler chose another layout
    output = torch.empty_like(gradient)
    _scale(gradient, factor, output)
    return output


def linear_cross_entropy_scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    if gradient.is_contiguous():
        _scale(gradient, factor, gradient)
    else:
        gradient.copy_(linear_cross_entropy_scaled_gradient(gradient, factor))


def _scale(gradient: Tensor, factor: Tensor, output: Tensor) -> None:
    count, chosen = gradient.numel(), configuration("cross_entropy_scaled_gradient", "any", gradient.device)
    if count > 0:
        triton_logits.scaled[(triton.cdiv(count, chosen["BLOCK"]),)](
            gradient, output, factor, count, is_wide(count, chosen["BLOCK"]), **chosen.options
        )
