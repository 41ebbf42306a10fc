"""Calls of Triton's kernels at the shapes that matter: what ``make gates`` compiles and ``make tune`` measures.

Each family declares its own in ``triton_<family>.py``, a list CASES. A call is prepared for a device, "meta" for the
gates, which launch nothing, or "cuda", so its function of ``triton_kernels.py`` allocates by torch and reads no value.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dalle_kernels._triton_configurations import DEFAULT, Configuration

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """One call: ``prepare(device)`` makes its inputs and returns the function that makes it.

    ``rows`` are the configurations that the call is to choose, if any: for the key of each row of the table the
    candidates by architecture, as the row itself is kept. ``bytes_moved`` and ``operations`` are the least that it
    needs, for the figure. ``architectures``: those that the gates compile it for.
    """

    name: str
    prepare: Callable[[str], Callable[[], object]]
    rows: Mapping[tuple[str, str], Mapping[int, Sequence[Configuration]]] = field(default_factory=dict)
    bytes_moved: float | None = None
    operations: float | None = None
    architectures: Collection[int] = (80, 90)

    def candidates(self, row: tuple[str, str], architecture: int) -> Sequence[Configuration]:
        """What the row is chosen among on such a chip."""
        return self.rows[row].get(architecture) or self.rows[row][DEFAULT]


def described(chosen: Configuration) -> str:
    return ", ".join(f"{name} {value}" for name, value in chosen.options.items())


def families() -> list[str]:
    return sorted(
        path.stem.removeprefix("triton_") for path in FOLDER.glob("triton_*.py") if path.stem != "triton_cases"
    )


def cases(family: str) -> Sequence[Case]:
    return importlib.import_module(f"triton_{family}").CASES
