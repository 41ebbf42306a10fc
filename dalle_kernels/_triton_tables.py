"""Tables in device memory of where many tensors lie, so that one launch of a Triton kernel serves them all.

A table is built without waiting for the device and without pinned memory, whose lifetime a CUDA graph would not keep:
its numbers travel as arguments of small launches, CHUNK a launch. It is kept for as long as calls with the same
addresses, sizes and stream come by, so a training loop writes it once. While a CUDA graph is captured a new one is
built every time: the launches that write it are then part of the graph, as is its memory, and a replay depends on
nothing outside.

A program of such a kernel serves one block of one tensor, which it finds by :func:`located`; all blocks but the last of
a tensor are whole, and take no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256
MOST_KEPT_BYTES = 1 << 24

# Triton compiles a kernel anew for an integer argument's width, for 1 and for multiples of 16; of n, 2·n + _MARK has
# always 64 bits and is odd.
_MARK = tl.constexpr(2**62 + 1)

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
DTYPES[torch.int16] = tl.int16  # codes


@dataclass(frozen=True)
class Table:
    """``numbers``: int64 rows of ``tensors`` each: element counts, first blocks, addresses, a row a list, and what else
    the tensors were given.

    ``owners``: int32, the tensor of each block. ``aligned``: every address is a multiple of 16.
    """

    numbers: Tensor
    owners: Tensor
    tensors: int
    aligned: bool

    @property
    def blocks(self) -> int:
        return self.owners.numel()


@triton.jit
def _write(numbers, values):
    for i in tl.static_range(len(values)):
        tl.store(numbers + i, (values[i] - _MARK) >> 1)


@triton.jit
def located(numbers, owners, tensors, BLOCK: tl.constexpr):
    """This program's tensor, the first element of its block, and the tensor's element count."""
    block = tl.program_id(0)
    tensor = tl.load(owners + block)
    first = (block - tl.load(numbers + tensors + tensor)) * BLOCK
    return tensor, first, tl.load(numbers + tensor)


@triton.jit
def address(numbers, tensors, tensor, LIST: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the tensor of list number LIST begins."""
    pointer = tl.load(numbers + (2 + LIST) * tensors + tensor).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def number_given(numbers, tensors, tensor, LISTS: tl.constexpr):
    """What the tensor was given beside its addresses in this many lists."""
    return tl.load(numbers + (2 + LISTS) * tensors + tensor)


_kept: dict[tuple, Table] = {}
_lock = Lock()


def table(lists: Sequence[Sequence[Tensor]], block: int, given: Sequence[int] = ()) -> Table:
    """The table of equally long lists of tensors, cut into blocks of ``block`` elements as the first list's are.

    ``given``: for each tensor of a list a number from 0 to 2^61 - 1, which :func:`number_given` reads.
    """
    device = lists[0][0].device
    counts = [tensor.numel() for tensor in lists[0]]
    addresses = [tensor.data_ptr() for tensors in lists for tensor in tensors]
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _built(device, counts, addresses, given, block)
    key = (device, torch.cuda.current_stream(device).cuda_stream, block, len(lists), *counts, *addresses, *given)
    with _lock:
        found = _kept.pop(key, None) or _built(device, counts, addresses, given, block)
        _kept[key] = found  # last, as the one used most recently
        while len(_kept) > 1 and sum(t.numbers.nbytes + t.owners.nbytes for t in _kept.values()) > MOST_KEPT_BYTES:
            del _kept[next(iter(_kept))]
    return found


def _built(device: torch.device, counts: list[int], addresses: list[int], given: Sequence[int], block: int) -> Table:
    ends = list(accumulate(triton.cdiv(count, block) for count in counts))
    firsts = [0, *ends[:-1]]
    values = [*counts, *firsts, *addresses, *given]
    values += [0] * (-len(values) % CHUNK)
    numbers = torch.empty(len(values), dtype=torch.int64, device=device)
    for start in range(0, len(values), CHUNK):
        _write[(1,)](numbers[start:], tuple(2 * value + _MARK.value for value in values[start : start + CHUNK]))
    tensors = len(counts)
    blocks = torch.arange(ends[-1], device=device)
    # An empty tensor begins where the next one does, which is the later of the two.
    owners = torch.searchsorted(numbers[tensors : 2 * tensors], blocks, right=True, out_int32=True) - 1
    return Table(numbers, owners, tensors, all(address % 16 == 0 for address in addresses))
