"""The ``--device`` flag, for every job that has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle.errors import UserError

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """The CPU or GPU called ``name``; UserError unless torch can use it here."""
    import torch

    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("another kind of device")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device: expected cpu, cuda or cuda:N of a GPU that is there, got {name!r}") from None
    return device
