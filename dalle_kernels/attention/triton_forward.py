"""The forward kernel: a program takes a tile of queries, of text or of image, through the keys that it sees.

Text comes first: an image query sees all of it, so that its running maximum is finite before the window, of which a
query may see nothing in a tile. Whole tiles take no mask. A running maximum starts at the lowest finite number instead
of minus infinity, and then no row without a key needs care.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LOWEST,
    dots,
    head_of,
    load_real_rows,
    load_rows,
    log_sum,
    meet,
    query_tile,
    sees,
    signed,
    store_rows,
    tokens_of,
)


@triton.jit(do_not_specialize=["seq", "text_len", "places", "rows", "width", "kernel_size", "tiles"])
def forward_kernel(q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, heads, seq,
                   text_len, places, rows, width, kernel_size, tiles, exponent,
                   KIND: tl.constexpr, SIGN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_QUERIES: tl.constexpr, BLOCK_TEXT: tl.constexpr, BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """``TAIL``: whether the text ends within a tile; ``FULL``: whether any tile of image keys is whole."""
    program = tl.program_id(0)
    # A head's tiles run together and share its keys; the last ones of a causal part are the longest and come first.
    head, tile = program // tiles, tiles - 1 - program % tiles
    image, first, text_tiles, begin, window, ahead, full = query_tile(
        tile, text_len, places, rows, width, kernel_size, KIND, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS
    )
    q, k, v = head_of(q, head, heads, q_strides), head_of(k, head, heads, k_strides), head_of(v, head, heads, v_strides)
    place = first + tl.arange(0, BLOCK_QUERIES)
    token = tokens_of(place, image, text_len, rows, width, KIND)
    real = (place < tl.where(image, places, text_len)) & (token < seq)
    queries = signed(load_real_rows(q, token, real, q_strides[2], HEAD_DIM, BLOCK_D), SIGN)
    maximum = tl.full([BLOCK_QUERIES], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    weighted = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)

    for t in range(text_tiles):
        key = t * BLOCK_TEXT + tl.arange(0, BLOCK_TEXT)
        scores = dots(queries, load_rows(k, key, k_strides[2], HEAD_DIM, BLOCK_D))
        values = load_rows(v, key, v_strides[2], HEAD_DIM, BLOCK_D)
        maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)
    if TAIL:
        # A loop of one round or none: as straight code it would spill registers in wide float32 heads.
        for t in tl.range(text_tiles, text_tiles + tl.where(image, 1, 0), num_stages=1):
            key = t * BLOCK_TEXT + tl.arange(0, BLOCK_TEXT)
            scores = dots(queries, load_real_rows(k, key, key < text_len, k_strides[2], HEAD_DIM, BLOCK_D))
            scores = tl.where((key < text_len)[None, :], scores, -float("inf"))
            values = load_real_rows(v, key, key < text_len, v_strides[2], HEAD_DIM, BLOCK_D)
            maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)
    if FULL:
        for t in range(ahead, ahead + full):
            key = tokens_of(begin + t * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS), True, text_len, rows, width, KIND)
            scores = dots(queries, load_rows(k, key, k_strides[2], HEAD_DIM, BLOCK_D))
            values = load_rows(v, key, v_strides[2], HEAD_DIM, BLOCK_D)
            maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)
    else:
        full = 0
    for t in range(window - full):
        key_place = begin + (t + tl.where(t >= ahead, full, 0)) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        key = tokens_of(key_place, image, text_len, rows, width, KIND)
        # A place at the end may be without a token: no query that has one sees it.
        exists = (key_place < tl.where(image, places, text_len)) & (key < seq)
        scores = dots(queries, load_real_rows(k, key, exists, k_strides[2], HEAD_DIM, BLOCK_D))
        visible = sees(place[:, None], key_place[None, :], image, rows, width, kernel_size, KIND)
        scores = tl.where(visible, scores, -float("inf"))
        values = load_real_rows(v, key, exists, v_strides[2], HEAD_DIM, BLOCK_D)
        maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)

    out = head_of(out, head, heads, out_strides)
    store_rows(out, token, real, out_strides[2], weighted / total[:, None], HEAD_DIM, BLOCK_D)
    logarithm = log_sum(maximum, total, exponent, v.dtype.element_ty == tl.float32)
    tl.store(lse + head.to(tl.int64) * seq + token, logarithm, mask=real)
