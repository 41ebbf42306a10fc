"""Eager calls that need no gradient, prepared once for all that look alike.

What must be asked before a kernel runs (whether the arguments are right, which provider serves them, what the results
look like) takes longer than a small kernel itself, and depends on nothing but how the arguments look: dtypes, sizes and
strides of the tensors, and the settings. So a public function asks once, keeps the answer as a function of the tensors,
and finds it again by the arguments' looks, which the compiled library reads in half a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from dalle_kernels import _native
from dalle_kernels._dispatch import any_autocast, dispatcher_listens, forced_provider, is_differentiated

_MOST = 512  # kept for a function; then it begins anew
_UNKNOWN = object()


class Prepared:
    """A public function's prepared calls.

    ``prepare(*tensors, *settings)`` gives what runs a call that looks like this one, or None where such calls go the
    general way; it raises what the public function raises.
    """

    def __init__(self, prepare: Callable[..., Callable | None]):
        self._prepare = prepare
        self._runs: dict[tuple, Callable | None] = {}

    def find(self, tensors: tuple, settings: tuple) -> Callable | None:
        """What runs the call, or None for the general way.

        That is where a compiler follows, where something listens in torch's dispatcher or a tensor is more than memory
        of the CPU, under autocast, where a gradient is wanted or a provider is forced, and without a compiled library.
        """
        if torch.compiler.is_dynamo_compiling() or dispatcher_listens() or any_autocast() or forced_provider():
            return None
        signature = _reader()(tensors, settings)
        if signature is None or is_differentiated(tensors):
            return None
        key = signature, settings
        run = self._runs.get(key, _UNKNOWN)
        if run is _UNKNOWN:
            run = self._prepare(*tensors, *settings)
            if len(self._runs) >= _MOST:
                self._runs.clear()
            self._runs[key] = run
        return run


@cache
def _reader() -> Callable[[tuple, tuple], bytes | None]:
    if _native.unavailable("cpu"):
        return lambda tensors, settings: None
    return _native.library("cpu").signature
