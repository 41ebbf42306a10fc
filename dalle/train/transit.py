"""Numbers on their way from the device to the host and back, for which neither waits."""

from __future__ import annotations

from typing import Any

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on ``device``; to a GPU from pinned memory, since from other memory the host waits for its work."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Underway:
    """Figures, of which the tensors on a GPU have been sent to the host, all in one copy."""

    def __init__(self, figures: dict[str, Any]):
        self._figures = figures
        tensors = [value.detach().double().flatten() for value in figures.values() if isinstance(value, torch.Tensor)]
        self._numbers = torch.cat(tensors) if tensors else torch.empty(0)
        self._arrival: torch.cuda.Event | None = None
        if self._numbers.is_cuda:
            sent = torch.empty_like(self._numbers, device="cpu", pin_memory=True)
            self._numbers = sent.copy_(self._numbers, non_blocking=True)
            self._arrival = torch.cuda.current_stream().record_event()

    def read(self) -> dict[str, Any]:
        """The figures, tensors as numbers or lists of numbers, once they are there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        numbers = iter(self._numbers.tolist())

        def read(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return [next(numbers) for _ in range(value.numel())] if value.dim() else next(numbers)

        return {name: read(value) for name, value in self._figures.items()}
