"""Settings for the whole suite."""

from __future__ import annotations

import os

# Before torch is imported: two threads suffice to find what threads break, and leave a small machine usable.
os.environ.setdefault("OMP_NUM_THREADS", "2")
