"""Iterate averaging: an exponential moving average of the parameters (paper 2.1 and B.2)."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn


class IterateAverage:
    """Keeps ``average = decay * average + (1 - decay) * parameters`` in a float32 copy of ``model``, every ``every``
    updates, on the CPU and beside the training.

    Early on the decay is lowered to ``(1 + n) / (10 + n)`` at the n-th averaging, so that a short run is not held back
    by its random start; the paper's long runs never notice.

    A training step waits for no more than a copy of the parameters in its own device's memory, and for an averaging
    that is not done when the next one is due. From a GPU that copy goes to pinned memory on a stream of its own.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1):
        self._model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        self.decay = decay
        self.every = every
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="averaging")
        self._running: Future[None] | None = None
        self._copies: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    @property
    def model(self) -> nn.Module:
        """The averaged model, on the CPU, with all that has been observed."""
        self._wait()
        return self._model

    @torch.no_grad()
    def observe(self, model: nn.Module, update: int) -> None:
        """Take in the parameters after update number ``update`` (from 1); they may change as soon as this returns."""
        if update % self.every:
            return
        count = update // self.every
        weight = 1 - min(self.decay, (1 + count) / (10 + count))
        self._wait()  # it reads the copies
        arrived = self._copy([parameter.detach() for parameter in model.parameters()])
        self._running = self._thread.submit(self._average, weight, arrived)

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _copy(self, parameters: list[torch.Tensor]) -> torch.cuda.Event | None:
        """Copy the parameters to the CPU; where they come from a GPU, they are there when the event has happened."""
        if not self._copies:
            self._copies = [torch.empty_like(p, device="cpu", pin_memory=p.is_cuda) for p in parameters]
        if not any(parameter.is_cuda for parameter in parameters):
            torch._foreach_copy_(self._copies, parameters)
            return None
        self._stream = self._stream or torch.cuda.Stream()
        # Of a copy on the GPU, so that the next step need not wait for the way to the CPU.
        parameters = [parameter.clone() for parameter in parameters]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for kept, parameter in zip(self._copies, parameters, strict=True):
                kept.copy_(parameter, non_blocking=True)
                parameter.record_stream(self._stream)
            return self._stream.record_event()

    @torch.no_grad()
    def _average(self, weight: float, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        copies = [kept.float() for kept in self._copies]
        torch._foreach_lerp_(list(self._model.parameters()), copies, weight)
