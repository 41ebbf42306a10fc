"""The error rule that every op is held to, and the awkward inputs it is tried on; shared by tests and benchmarks.

The rule: an op passes when its error against a float64 reference is at most twice the error of the plain PyTorch
expression in the op's dtype, on the same inputs. Error means both the largest absolute error and the root mean square.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ERROR_FACTOR = 2.0
"""How many times the plain expression's error an op may have."""

ODD_SIZES = (1, 2, 3, 5, 7, 13, 17, 31, 33, 63, 65, 97, 127, 129)
"""Sizes beside the multiples that kernels like, for :func:`sample_shapes`."""


@dataclass(frozen=True)
class ErrorReport:
    """What :func:`measure_errors` found; ``floors`` is what one rounding of the exact result may cost."""

    name: str
    errors: tuple[float, float]
    plain_errors: tuple[float, float]
    floors: tuple[float, float]

    @property
    def limits(self) -> tuple[float, ...]:
        """The largest errors that pass: no result is asked to be closer than one rounding of the exact one."""
        return tuple(max(ERROR_FACTOR * plain, floor) for plain, floor in zip(self.plain_errors, self.floors))

    @property
    def passed(self) -> bool:
        return all(error <= limit for error, limit in zip(self.errors, self.limits))

    def __str__(self) -> str:
        parts = [
            f"{norm} error {error:.3e} (plain {plain:.3e}, limit {limit:.3e})"
            for norm, error, plain, limit in zip(("largest", "rms"), self.errors, self.plain_errors, self.limits)
        ]
        return f"{self.name}: " + ", ".join(parts)


def _flatten(results: Tensor | Sequence[Tensor]) -> tuple[Tensor, torch.dtype]:
    tensors = [results] if isinstance(results, Tensor) else list(results)
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]), tensors[0].dtype


def _norms(difference: Tensor) -> tuple[float, float]:
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def measure_errors(
    actual: Tensor | Sequence[Tensor],
    plain: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    name: str = "result",
) -> ErrorReport:
    """Measure an op's result and the plain expression's against the float64 result.

    Each argument is a tensor or several draws of one; several draws are measured together, which steadies the
    comparison of small results such as losses. Results that the exact one says are NaN or infinite must be exactly that
    in ``actual``, and are then left out; so are elements where the plain expression alone is not finite.

    Raises:
        AssertionError: a shape differs, or ``actual`` is NaN or infinite where the exact result is not, or the reverse.
    """
    shapes = [[tensor.shape for tensor in ([r] if isinstance(r, Tensor) else r)] for r in (actual, plain, exact)]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise AssertionError(f"{name}: expected results of one shape, got {', '.join(map(str, shapes))}")
    (actual, dtype), (plain, _), (exact, _) = _flatten(actual), _flatten(plain), _flatten(exact)
    rounded = exact.to(dtype).double()
    wrong = ~(torch.isfinite(actual) == torch.isfinite(rounded)) | (actual.isnan() != rounded.isnan())
    wrong |= actual.isinf() & (actual != rounded)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are not finite where they should be or the "
            f"reverse; element {first} is {actual[first]:g} instead of {exact[first]:g}"
        )
    kept = torch.isfinite(rounded) & torch.isfinite(plain)
    actual, plain, exact = actual[kept], plain[kept], exact[kept]
    half_unit = torch.finfo(dtype).eps / 2
    floors = tuple(half_unit * norm for norm in _norms(exact))
    return ErrorReport(name, _norms(actual - exact), _norms(plain - exact), floors)


def assert_accurate(
    actual: Tensor | Sequence[Tensor],
    plain: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    name: str = "result",
) -> ErrorReport:
    """Hold a result to the error rule; the arguments are those of :func:`measure_errors`, whose report is returned."""
    report = measure_errors(actual, plain, exact, name)
    if not report.passed:
        raise AssertionError(str(report))
    return report


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every fresh allocation with NaN (integers with their largest value), so an element left unwritten is seen.

    It uses torch's deterministic mode, which poisons ``torch.empty`` and its kin, and reaches no memory that compiled
    code allocates by itself.
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def sample_shapes(rank: int, count: int, seed: int, largest: int = max(ODD_SIZES)) -> list[tuple[int, ...]]:
    """Draw ``count`` shapes of ``rank`` dimensions from the odd sizes up to ``largest``, the same for the same seed."""
    draw = random.Random(seed)
    sizes = [size for size in ODD_SIZES if size <= largest]
    return [tuple(draw.choice(sizes) for _ in range(rank)) for _ in range(count)]


def _poison(shape: Sequence[int], like: Tensor) -> Tensor:
    value = math.nan if like.is_floating_point() else torch.iinfo(like.dtype).min
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def strided_views(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, view) of equal values in other memory layouts; the memory between and around them holds NaN.

    "pitched": rows further apart than their length; "stepped": a last stride of 2; "shifted": contiguous, but starting
    at an address that no vector load likes; "transposed": the first and last dimensions swapped in memory.
    """
    values = tensor.detach()
    *leading, last = values.shape if values.dim() else (1,)
    pitched = _poison((*leading, last + 3), values)[..., 1 : 1 + last]
    stepped = _poison((*leading, 2 * last), values)[..., ::2]
    shifted = _poison((values.numel() + 2,), values)[1:-1].view(values.shape)
    transposed = _poison(values.transpose(0, -1).shape, values).transpose(0, -1) if values.dim() > 1 else None
    for name, view in (("pitched", pitched), ("stepped", stepped), ("shifted", shifted), ("transposed", transposed)):
        if view is not None:
            yield name, view.view(values.shape).copy_(values) if values.dim() == 0 else view.copy_(values)


class GradientBucket:
    """What DistributedDataParallel hands to a communication hook: gradients one after the other in one ``buffer``."""

    def __init__(self, parameters: Sequence[Tensor], buffer: Tensor):
        self._parameters, self._buffer = list(parameters), buffer

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self._buffer

    def parameters(self) -> list[Tensor]:
        return self._parameters

    def gradients(self) -> list[Tensor]:
        parts = self._buffer.split([parameter.numel() for parameter in self._parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self._parameters)]
