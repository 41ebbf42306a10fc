"""What goes over the wires: count the collectives that run, whoever starts them (FSDP, DDP, a hook, the loop)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# By what the names of c10d's ops and of the functional ones hold. "gather" and "reduce" come last: others hold them.
_KINDS = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
    "scatter": "scatter",
    "gather": "gather",
    "reduce": "reduce",
}


class Collective(NamedTuple):
    """One collective: its ``kind``, the ``ranks`` that take part, the dtype and the bytes of its whole buffer.

    The whole buffer is what an all-gather yields, what a reduce-scatter or an all-to-all takes, what an all-reduce
    works on.
    """

    kind: str
    ranks: tuple[int, ...]
    dtype: torch.dtype
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that each of the ranks sends, on average."""
        return sent_bytes(self.kind, self.bytes, len(self.ranks))


def sent_bytes(kind: str, count: int, size: int) -> float:
    """Bytes that each of ``size`` processes sends, by the ring algorithms, which send the fewest, in a collective whose
    whole buffer has ``count`` bytes."""
    return count * (size - 1) / size * (2 if kind == "all_reduce" else 1)


class CollectiveCounter(TorchDispatchMode):
    """While it is entered, ``collectives`` gets every collective that this process starts, in order.

    A backward is counted too. It looks at shapes alone and never waits for a device, but every operator of PyTorch
    passes through it, which costs the host some microseconds each: count one update, for all send the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    @property
    def sent(self) -> float:
        """Bytes that this process sent."""
        return sum(collective.sent for collective in self.collectives)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes first, and what it calls comes here
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
        name = func._schema.name.partition("::")[2]
        kind = next((kind for part, kind in _KINDS.items() if part in name), None)
        if kind is None:  # a barrier, a wait
            return
        group = _group(args)
        buffers = [tensors for tensors in map(_tensors, args) if tensors]
        whole = max(sum(tensor.numel() * tensor.element_size() for tensor in tensors) for tensors in buffers)
        if func.namespace == "_c10d_functional" and kind == "all_gather":  # which makes its result by itself
            whole *= group.size()
        ranks = tuple(dist.get_process_group_ranks(group))
        self.collectives.append(Collective(kind, ranks, buffers[0][0].dtype, whole))


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """The group among an op's arguments: boxed, or the last of them that is a name."""
    for argument in reversed(args):
        if isinstance(argument, torch.ScriptObject):
            group = _unboxed(argument)
            if group is not None:
                return group
        if isinstance(argument, str):
            return dist.distributed_c10d._resolve_process_group(argument)
    raise AssertionError("a collective without a group")


def _unboxed(value: torch.ScriptObject) -> dist.ProcessGroup | None:
    try:
        return dist.ProcessGroup.unbox(value)
    except RuntimeError:  # the operation of a reduction
        return None


def _tensors(argument: Any) -> list[torch.Tensor]:
    """The tensors of an argument, however deep in lists."""
    if isinstance(argument, torch.Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for part in argument for tensor in _tensors(part)]
    return []
