"""Triton kernels of sparse attention, forward and backward, and of decoding from a cache: what launches them.

Floor, on an H200 (4.3 TB/s, about 790 TFLOP/s in bfloat16), batch 8, 62 heads of 64, text 256, 32 x 32 image tokens:

    forward    q, k, v read and out written: 325 MB, 76 µs; 4 * 64 operations a visible pair (row: 328,304 a head): 42
               Gop, 53 µs
    backward   q, k, v, out, grad_out read, dq, dk, dv written: 650 MB, 152 µs; 10 * 64 operations a pair: 104 Gop,
               132 µs
    decode     every visible key and value of a head read once, 289 of 64 elements: 37 MB, 9 µs

What the tiles cost beyond: pairs that a mask hides (of `row` with tiles of 64 queries and 32 keys 352 of which 289 are
visible), and in the backward the scores and grad_out . v computed a second time, 14 operations for 10, and five tensors
read twice. Reached on an H200, `row`: forward 207 µs, backward 618 µs, against 288 and 923 µs of cuDNN's dense causal
attention; `column` and `conv` forward 206 and 352 µs. The products of `row` forward come at 203 TFLOP/s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dalle_kernels import _triton
from dalle_kernels._strides import aligned
from dalle_kernels._triton_configurations import Configuration, configuration
from dalle_kernels.attention import reference
from dalle_kernels.attention import triton_descriptors as descriptors
from dalle_kernels.attention.tiles import Stream, has_full_key_tiles, has_full_query_tiles, most_visible, stream
from dalle_kernels.attention.triton_backward import add_parts_kernel, key_gradients_kernel, query_gradient_kernel
from dalle_kernels.attention.triton_decode import decode_rows_kernel, decode_text_kernel, join_parts_kernel
from dalle_kernels.attention.triton_forward import forward_kernel

# Programs that keep a large GPU busy. Not the device's own number: the bits of a result should not depend on it.
_ENOUGH_PROGRAMS = 256
_MOST_SEGMENTS = 8
_MOST_PARTS = 32
_MOST_OF_A_PART = 4096
"""Elements that a program adds up of both gradients in registers."""
_MOST_KEPT = 8
"""Tiles of text that a program keeps: each has its own code."""
_MOST_SHARED = 220 << 10
"""Bytes of shared memory that two tensors' tiles may take where text is kept, of the 227 KiB of a block on Hopper."""


def shape_class(tensor: Tensor) -> str:
    """The class of a call's shapes: the dtype, and the head's width rounded up to a power of two, 64 at least."""
    dtype = "float32" if tensor.dtype == torch.float32 else "16-bit"
    return f"{dtype} {max(64, block_of_head(tensor.shape[-1]))}"


def block_of_head(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _scale_arguments(scale: float, dtype: torch.dtype) -> tuple[float, int]:
    """The factor on scores in exponents of 2, or of e for float32, and the sign of the scale.

    The sign enters with the queries or keys.
    The factor is positive, so that a hidden score of minus infinity stays that: a scale of zero is in the sign alone.
    """
    sign = (scale > 0) - (scale < 0)
    unit = 1.0 if dtype == torch.float32 else math.log2(math.e)
    return (max(abs(scale) * unit, 1e-36) if sign else 1.0), sign


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3]


def _blocks(op: str, shapes: str, owned: str, *tensors: Tensor) -> Configuration:
    """The table's blocks; where heads or strides keep lanes from moving several neighbours at once, half of those
    that a program owns."""
    odd = tensors[0].shape[-1] % 16 != 0 or not aligned(*map(_strides, tensors))
    return configuration(op, shapes, tensors[0].device, halved=(owned,) if odd else ())


class QueryLaunch(NamedTuple):
    """A launch of a kernel that owns queries."""

    grid: tuple[int]
    keys: tuple
    """What keys are loaded from, the text's and the window's: the tensor, twice, or descriptors. So for ``values``."""
    values: tuple
    numbers: tuple[int, ...]
    """The kernel's arguments from ``text_len`` to ``tiles``."""
    options: Mapping[str, object]
    """What it is compiled for, beside what all launches of the kernel are."""


def query_launches(k: Tensor, v: Tensor, part: Stream, blocks: Configuration) -> Iterator[QueryLaunch]:
    """One launch for all queries; but where text is kept, or there are descriptors, one for the image's and one for the
    text's, which ends where no descriptor of the image's would."""
    sizes = blocks["BLOCK_QUERIES"], blocks["BLOCK_TEXT"], blocks["BLOCK_KEYS"]
    described = bool(blocks["DESCRIPTORS"]) and descriptors.serve(k, v)
    described = described and descriptors.give_tiles(part, k.shape[2], sizes[2])
    tiles, in_text = part.tiles(sizes[0]), part.text_tiles(sizes[0])
    kept = _kept_tiles(part, tiles - in_text, blocks, k)
    launches = [(part, 0, tiles, 0)]
    if kept or described:
        launches = [(part, in_text, tiles - in_text, kept)]
        if in_text:
            launches.append((stream("causal", part.text_len, 0, 1, 1), 0, in_text, 0))
    for served, first, count, kept_tiles in launches:
        run = blocks["RUN"] if kept_tiles else 1
        sources = (descriptors.text_and_window(x, served, *sizes[1:]) if described else (x, x) for x in (k, v))
        form = {
            "KIND": served.kind,
            "TAIL": served.text_len % sizes[1] != 0,
            "FULL": has_full_key_tiles(served, *sizes),
            "KEPT": kept_tiles,
            "RUN": run,
            "DESCRIPTORS": described,
        }
        programs = k.shape[0] * k.shape[1] * triton.cdiv(count, run)
        yield QueryLaunch((programs,), *sources, (*served[1:], first, count), {**blocks.options, **form})


def _kept_tiles(part: Stream, image_tiles: int, blocks: Configuration, k: Tensor) -> int:
    """Of how many tiles the text is, where programs keep it: if they are to, are enough, and it fits; else 0."""
    run, tiles = blocks["RUN"], part.text_tiles(blocks["BLOCK_TEXT"])
    if run == 0 or tiles > _MOST_KEPT or k.shape[0] * k.shape[1] * triton.cdiv(image_tiles, run) < _ENOUGH_PROGRAMS:
        return 0
    rows = tiles * blocks["BLOCK_TEXT"] + blocks.num_stages * blocks["BLOCK_KEYS"] + blocks["BLOCK_QUERIES"]
    return tiles if 2 * rows * block_of_head(k.shape[-1]) * k.element_size() <= _MOST_SHARED else 0


def sparse_attention(q, k, v, kind, text_len, height, width, kernel_size, scale):
    batch, heads, seq, head_dim = q.shape
    out, lse = reference.empty_heads(q), torch.empty((batch, heads, seq), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    part = stream(kind, seq, text_len, width, kernel_size)
    blocks = _blocks("sparse_attention", shape_class(q), "BLOCK_QUERIES", q, k, v)
    exponent, sign = _scale_arguments(scale, q.dtype)
    for launch in query_launches(k, v, part, blocks):
        forward_kernel[launch.grid](
            q, _strides(q), *launch.keys, _strides(k), *launch.values, _strides(v), out, _strides(out), lse, heads, seq,
            *launch.numbers, exponent, SIGN=sign, HEAD_DIM=head_dim, BLOCK_D=block_of_head(head_dim), **launch.options,
        )  # fmt: skip
    return out, lse


def sparse_attention_backward(grad_out, q, k, v, out, lse, kind, text_len, height, width, kernel_size, scale):
    batch, heads, seq, head_dim = q.shape
    dq, dk, dv = (reference.empty_heads(q) for _ in range(3))
    if dq.numel() == 0:
        return dq, dk, dv
    part = stream(kind, seq, text_len, width, kernel_size)
    exact = q.dtype == torch.float32
    deltas = torch.empty_like(lse)
    totals = torch.empty_like(lse) if exact else deltas
    exponent, sign = _scale_arguments(scale, q.dtype)
    common = {"SIGN": sign, "EXACT": exact, "HEAD_DIM": head_dim, "BLOCK_D": block_of_head(head_dim)}

    tensors = q, k, v, out, grad_out
    blocks = _blocks("sparse_attention_backward", f"dq {shape_class(q)}", "BLOCK_QUERIES", *tensors)
    for launch in query_launches(k, v, part, blocks):
        query_gradient_kernel[launch.grid](
            grad_out, _strides(grad_out), q, _strides(q), *launch.keys, _strides(k), *launch.values, _strides(v),
            out, _strides(out), dq, _strides(dq), lse, deltas, totals, heads, seq, *launch.numbers, scale, exponent,
            **common, **launch.options,
        )  # fmt: skip

    blocks = _blocks("sparse_attention_backward", f"dk {shape_class(q)}", "BLOCK_KEYS", *tensors)
    tiles, text_tiles = part.tiles(blocks["BLOCK_KEYS"]), part.text_tiles(blocks["BLOCK_KEYS"])
    segments = _segments(batch * heads * text_tiles, seq, blocks["BLOCK_QUERIES"])
    parts = dk
    if segments > 1:
        parts = torch.empty((2, segments, batch * heads, part.text_len, head_dim), dtype=torch.float32, device=q.device)
    # A tile of a permuted image's keys goes through queries in another order than one of the text's.
    described = bool(blocks["DESCRIPTORS"]) and part.kind != "column" and descriptors.serve(q, grad_out)
    queries, grads = (descriptors.tokens(x, blocks["BLOCK_QUERIES"]) if described else x for x in (q, grad_out))
    key_gradients_kernel[(batch * heads * (segments * text_tiles + tiles - text_tiles),)](
        grads, _strides(grad_out), queries, _strides(q), k, _strides(k), v, _strides(v), dk, _strides(dk),
        dv, _strides(dv), parts, lse, deltas, totals, batch * heads, heads, seq, *part[1:], tiles, segments, scale,
        exponent, KIND=part.kind, FULL=has_full_query_tiles(part, blocks["BLOCK_KEYS"], blocks["BLOCK_QUERIES"]),
        SPLIT=segments > 1, **common, **{**blocks.options, "DESCRIPTORS": described},
    )  # fmt: skip
    if segments > 1:
        keys = min(32, _MOST_OF_A_PART // common["BLOCK_D"])
        add_parts_kernel[(batch * heads, triton.cdiv(part.text_len, keys))](
            parts, dk, _strides(dk), dv, _strides(dv), batch * heads, heads, part.text_len, segments, scale,
            HEAD_DIM=head_dim, BLOCK_D=common["BLOCK_D"], BLOCK_KEYS=keys,
        )  # fmt: skip
    return dq, dk, dv


def _segments(text_programs: int, seq: int, block_queries: int) -> int:
    """How many parts the queries of a tile of text keys are split into: more than one only where heads are few."""
    if text_programs == 0:
        return 1
    return max(1, min(_MOST_SEGMENTS, _ENOUGH_PROGRAMS // text_programs, triton.cdiv(seq, 2 * block_queries)))


def decode_attention(q, k_new, v_new, text, image, position, kind, text_len, height, width, kernel_size, scale):
    """The operators ``decode_attention``, ``position`` a number, and ``decode_attention_at``, a tensor of one."""
    _, prompts, heads, samples, slots, head_dim = image.shape
    rows = prompts * samples
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    exponent, sign = _scale_arguments(scale, q.dtype)
    head = {"HEAD_DIM": head_dim, "BLOCK_D": block_of_head(head_dim), **_triton.dependent_launch(q.device)}
    shared = samples > 1 and text_len > 0
    blocks = configuration("decode_attention", f"rows {shape_class(q)}", q.device)
    numbers = most_visible(kind, height, width, kernel_size)
    keys = numbers if shared else text_len + numbers
    parts, part_keys = _parts(rows * heads, keys, blocks["BLOCK_KEYS"])
    text_parts = 0
    if shared:
        text_blocks = configuration("decode_attention", f"text {shape_class(q)}", q.device)
        sample_tiles = triton.cdiv(samples, text_blocks["BLOCK_SAMPLES"])
        text_parts, text_part_keys = _parts(prompts * heads * sample_tiles, text_len, text_blocks["BLOCK_KEYS"])
    all_parts = text_parts + parts
    sums = statistics = out
    if all_parts > 1:
        sums = torch.empty((rows * heads, all_parts, head_dim), dtype=torch.float32, device=q.device)
        statistics = torch.empty((rows * heads, all_parts, 2), dtype=torch.float32, device=q.device)
    if shared:
        decode_text_kernel[(prompts * heads, text_parts, sample_tiles)](
            q, q.stride(), text, sums, statistics, prompts, samples, heads, text_len, text_part_keys, all_parts,
            exponent, TAIL=text_len % text_blocks["BLOCK_KEYS"] != 0, SIGN=sign, **head, **text_blocks.options,
        )  # fmt: skip
    decode_rows_kernel[(rows * heads, parts)](
        q, q.stride(), k_new, k_new.stride(), v_new, v_new.stride(), text, image, out, sums, statistics, position,
        prompts, samples, heads, text_len, height, width, kernel_size, slots, numbers, part_keys, text_parts, all_parts,
        exponent, KIND=kind, POSITION_ON_DEVICE=isinstance(position, Tensor), TEXT=not shared, SPLIT=all_parts > 1,
        SIGN=sign, **head, **blocks.options,
    )  # fmt: skip
    if all_parts > 1:
        join_parts_kernel[(rows * heads,)](
            sums, statistics, out, all_parts, BLOCK_PARTS=triton.next_power_of_2(all_parts), **head
        )  # fmt: skip
    return out


def _parts(programs: int, keys: int, block: int) -> tuple[int, int]:
    """Into how many parts the keys are cut for ``programs`` to be enough, and how many keys, whole blocks, a part has.

    Of the cache's shape alone, not of the position: every step of a generation is cut alike.
    """
    wanted = max(1, min(_MOST_PARTS, _ENOUGH_PROGRAMS // programs))
    part_keys = triton.cdiv(triton.cdiv(keys, wanted), block) * block
    return triton.cdiv(keys, part_keys), part_keys
