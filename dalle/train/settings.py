"""Checks that the settings of both stages share."""

from __future__ import annotations

from typing import Any

import torch

from dalle.errors import UserError

STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def require_in_range(settings: Any, name: str, low: float, high: float, whole: bool = False) -> None:
    """Raise UserError unless the setting is a number in [low, high], a whole one where ``whole``."""
    value = getattr(settings, name)
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise UserError(f"{type(settings).__name__}.{name}: expected a {kind} from {low:g} to {high:g}, got {value!r}")


def require_choice(settings: Any, name: str, choices: Any) -> None:
    """Raise UserError unless the setting is one of ``choices``."""
    value = getattr(settings, name)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{type(settings).__name__}.{name}: expected one of {', '.join(choices)}, got {value!r}")
