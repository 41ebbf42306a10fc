"""Checks that the settings of both stages share."""

from __future__ import annotations

import math
from typing import Any

import torch

from dalle.errors import UserError

STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def require_in_range(
    settings: Any, name: str, low: float, high: float, whole: bool = False, finite: bool = True
) -> None:
    """Raise UserError unless the setting is a number in [low, high], a whole one where ``whole``, finite or not."""
    value = getattr(settings, name)
    kinds = int if whole else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (finite and value == math.inf):
        kind = "whole number" if whole else "finite number" if finite else "number"
        bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"{type(settings).__name__}.{name}: expected a {kind} {bounds}, got {value!r}")


def require_choice(settings: Any, name: str, choices: Any) -> None:
    """Raise UserError unless the setting is one of ``choices``."""
    value = getattr(settings, name)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{type(settings).__name__}.{name}: expected one of {', '.join(choices)}, got {value!r}")
