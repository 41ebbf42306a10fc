"""How much memory a call takes at most, by what the system counts for this process."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

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
