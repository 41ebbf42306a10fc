"""Sizes and strides: those of contiguous tensors, and those of few dimensions for kernels that take a fixed number."""

from __future__ import annotations

from collections.abc import Sequence


def merged(sizes: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """``sizes`` and each tensor's strides, with neighbours that are one in every tensor made one, and no size of 1."""
    kept: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for size, *here in zip(sizes, *strides):
        if size == 1:
            continue
        if kept and all(mine[-1] == step * size for mine, step in zip(steps, here)):
            kept[-1] *= size
            for mine, step in zip(steps, here):
                mine[-1] = step
        else:
            kept.append(size)
            for mine, step in zip(steps, here):
                mine.append(step)
    return kept, steps


def contiguous_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides that torch gives a new contiguous tensor, empty ones included."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def aligned(*strides: Sequence[int]) -> bool:
    """Whether every stride is 1 or a multiple of 16, so that Triton's kernels move several neighbours at once."""
    return all(step == 1 or step % 16 == 0 for steps in strides for step in steps)
