"""Whose turn it is on a GPU that benchmarks in several processes share: any of them prepare, or one of them measures.

Most of a case's time is the host's, which compiles and checks; so several processes take a fraction of one's time. File
locks order them, and a process that dies gives up its own.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path


class Turns:
    """The turns of all processes that name the same ``path``; without one there are no others to wait for."""

    def __init__(self, path: Path | None):
        self.shared, self._path = path is not None, path
        if path is not None:
            # Who is to measure holds the first while waiting for the second, so that nobody else begins to prepare.
            self._next, self._device = (path.with_suffix(f".{name}").open("w") for name in ("next", "device"))

    def preparing(self) -> AbstractContextManager:
        """While nobody measures."""
        return self._preparing() if self.shared else nullcontext()

    def measuring(self) -> AbstractContextManager:
        """While nobody else does anything; within :meth:`preparing`, which goes on afterwards."""
        return self._measuring() if self.shared else nullcontext()

    def once(self, name: str, make: Callable[[], object]) -> object:
        """What the first process to ask has made, by JSON; within :meth:`measuring`."""
        if not self.shared:
            return make()
        path = self._path.with_suffix(f".{name}.json")
        if not path.exists():
            path.write_text(json.dumps(make()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        self._take(fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self._device, fcntl.LOCK_UN)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        # Not turned from one into the other: two that wait for each other's end to prepare would wait forever.
        fcntl.flock(self._device, fcntl.LOCK_UN)
        self._take(fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._device, fcntl.LOCK_UN)
            self._take(fcntl.LOCK_SH)

    def _take(self, kind: int) -> None:
        fcntl.flock(self._next, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._device, kind)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)
