"""How much memory a call takes at most: by what the system counts for this process, or by the tensors it makes."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PEAK_RESET = Path("/proc/self/clear_refs")
needs_peaks = pytest.mark.skipif(
    not PEAK_RESET.exists() or "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="only Linux tells a process's highest memory, and a sanitizer adds its own",
)


def _memory(name: str) -> int:
    """This process's memory in bytes: "VmRSS" now, "VmHWM" at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)[1]) * 1024


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which this process grows at most during a call, what it returns included."""
    PEAK_RESET.write_text("5")  # the highest memory becomes that of now
    before = _memory("VmRSS")
    kept = run()
    grown = _memory("VmHWM") - before
    del kept
    return grown


class PeakOfTensors(TorchDispatchMode):
    """``peak``: the most bytes that tensors made within took at once, in a GPU's allocator's steps; not ``given`` ones.

    It needs no such memory: tensors on the meta device count as any others do.
    """

    STEP = 512

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, results)
        return results

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = -(-storage.nbytes() // self.STEP) * self.STEP
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size
