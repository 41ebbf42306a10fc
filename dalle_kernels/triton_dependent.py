"""For kernels that may start while the one before them ends: see :func:`dalle_kernels._triton.dependent_launch`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def await_last_kernel(DEPENDENT: tl.constexpr):
    """Wait until all kernels before this one have ended, then let the next one start.

    So whatever the next one does ahead of its own wait comes after all kernels before this one.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
