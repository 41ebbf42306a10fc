"""The forward kernel: a program takes a tile of queries, of text or of image, through the keys that it sees.

Text comes first: an image query sees all of it, so that its running maximum is finite before the window, of which a
query may see nothing in a tile. Whole tiles take no mask. A running maximum starts at the lowest finite number instead
of minus infinity, and then no row without a key needs care.

A program may also take a run of tiles of image queries, and keep the text's keys and values in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LOWEST,
    dots,
    head_of,
    kept_text,
    load_real_rows,
    log_sum,
    meet,
    query_tile,
    rows_of,
    run_of_tiles,
    sees,
    signed,
    store_rows,
    text_tile,
    tokens_of,
    window_tile,
    without_tail,
)


@triton.jit(do_not_specialize=["heads", "seq", "text_len", "places", "rows", "width", "kernel_size", "first_tile",
                               "tiles"])  # fmt: skip
def forward_kernel(q, q_strides, k_text, k_window, k_strides, v_text, v_window, v_strides, out, out_strides, lse,
                   heads, seq, text_len, places, rows, width, kernel_size, first_tile, tiles, exponent,
                   KIND: tl.constexpr, SIGN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
                   KEPT: tl.constexpr, RUN: tl.constexpr, DESCRIPTORS: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_QUERIES: tl.constexpr, BLOCK_TEXT: tl.constexpr, BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """The ``tiles`` tiles of each head's queries from number ``first_tile`` on.

    ``TAIL``: whether the text ends within a tile. ``FULL``: whether any tile of image keys is whole. ``KEPT``: of how
    many tiles the text is that a program keeps for a run of RUN tiles of image queries; 0: it keeps none. With
    DESCRIPTORS keys and values are tensor descriptors of the text and of the window, else both the same pointer.
    """
    head, tile, stop = run_of_tiles(first_tile, tiles, KEPT, RUN)
    q, out = head_of(q, head, heads, q_strides), head_of(out, head, heads, out_strides)
    lse += head.to(tl.int64) * seq
    k = rows_of(k_text, k_window, head, heads, k_strides, DESCRIPTORS)
    v = rows_of(v_text, v_window, head, heads, v_strides, DESCRIPTORS)
    part = seq, text_len, places, rows, width, kernel_size
    if KEPT:
        k_kept = kept_text(k, text_len, KEPT, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
        v_kept = kept_text(v, text_len, KEPT, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
        for t in tl.range(tile, stop, num_stages=1):
            _forward_tile(
                t, q, q_strides[2], k, v, k_kept, v_kept, out, out_strides[2], lse, part, exponent,
                KIND, SIGN, TAIL, FULL, HEAD_DIM, BLOCK_D, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS,
            )  # fmt: skip
    else:
        _forward_tile(
            tile, q, q_strides[2], k, v, (), (), out, out_strides[2], lse, part, exponent,
            KIND, SIGN, TAIL, FULL, HEAD_DIM, BLOCK_D, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS,
        )  # fmt: skip


@triton.jit
def _forward_tile(tile, q, q_stride, k, v, k_kept, v_kept, out, out_stride, lse, part, exponent,
                  KIND: tl.constexpr, SIGN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_QUERIES: tl.constexpr, BLOCK_TEXT: tl.constexpr, BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """One tile of a head's queries: of image queries, if its text is kept."""
    seq, text_len, places, rows, width, kernel_size = part
    image, first, text_tiles, begin, window, ahead, full = query_tile(
        tile, text_len, places, rows, width, kernel_size, KIND, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS
    )
    place = first + tl.arange(0, BLOCK_QUERIES)
    token = tokens_of(place, image, text_len, rows, width, KIND)
    limit = tl.where(image, places, text_len)
    real = (place < limit) & (token < seq)
    queries = signed(load_real_rows(q, token, real, q_stride, HEAD_DIM, BLOCK_D), SIGN)
    maximum = tl.full([BLOCK_QUERIES], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    weighted = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)

    if len(k_kept) > 0:
        for i in tl.static_range(len(k_kept)):
            text_scores = dots(queries, k_kept[i])
            if TAIL and i == len(k_kept) - 1:
                text_scores = without_tail(text_scores, i * BLOCK_TEXT, text_len)
            maximum, total, weighted = meet(text_scores, v_kept[i], maximum, total, weighted, exponent)
    else:
        for t in range(text_tiles):
            scores = dots(queries, text_tile(k, t * BLOCK_TEXT, text_len, True, BLOCK_TEXT, HEAD_DIM, BLOCK_D))
            values = text_tile(v, t * BLOCK_TEXT, text_len, True, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
            maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)
        if TAIL:
            # A loop of one round or none: as straight code it would spill registers in wide float32 heads.
            for t in tl.range(text_tiles, text_tiles + tl.where(image, 1, 0), num_stages=1):
                scores = dots(queries, text_tile(k, t * BLOCK_TEXT, text_len, False, BLOCK_TEXT, HEAD_DIM, BLOCK_D))
                scores = without_tail(scores, t * BLOCK_TEXT, text_len)
                values = text_tile(v, t * BLOCK_TEXT, text_len, False, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
                maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)
    if FULL:
        for t in range(ahead, ahead + full):
            at = begin + t * BLOCK_KEYS
            scores = dots(queries, window_tile(k, at, True, limit, part, KIND, True, BLOCK_KEYS, HEAD_DIM, BLOCK_D))
            values = window_tile(v, at, True, limit, part, KIND, True, BLOCK_KEYS, HEAD_DIM, BLOCK_D)
            maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)
    else:
        full = 0
    for t in range(window - full):
        at = begin + (t + tl.where(t >= ahead, full, 0)) * BLOCK_KEYS
        scores = dots(queries, window_tile(k, at, image, limit, part, KIND, False, BLOCK_KEYS, HEAD_DIM, BLOCK_D))
        key_place = at + tl.arange(0, BLOCK_KEYS)
        visible = sees(place[:, None], key_place[None, :], image, rows, width, kernel_size, KIND)
        scores = tl.where(visible, scores, -float("inf"))
        values = window_tile(v, at, image, limit, part, KIND, False, BLOCK_KEYS, HEAD_DIM, BLOCK_D)
        maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)

    store_rows(out, token, real, out_stride, weighted / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse + token, log_sum(maximum, total, exponent, q.dtype.element_ty == tl.float32), mask=real)
