"""The backward kernels: tiles of queries own dq, tiles of keys own dk and dv. Nothing is added atomically.

    p = probabilities,  dp = grad_out . v,  delta = grad_out . out,  ds = p (dp - delta),
    dq = scale ds k,    dk = scale ds^T q,  dv = p^T grad_out

The kernel of dq goes first, and leaves each query's delta for the other. Beside 16-bit probabilities two errors are
little that in float32 (``EXACT``) are not. A log-sum-exp of 1e4 is off by up to 5e-4, which would be the relative error
of every probability: so their sum is taken too, divided by, and left for the other kernel. And delta is not rounded as
the terms of dp are, so that a query with one key would get a gradient instead of none: the sum of ds, which should be
zero, tells by how much, and the mean of the keys what it did to dq.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import exponential
from .triton_tiles import (
    dots,
    head_of,
    key_tile,
    load_real_rows,
    load_rows,
    product,
    query_tile,
    sees,
    signed,
    store_rows,
    tokens_of,
)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _probabilities(scores, exponent, shift, EXACT: tl.constexpr):
    """From scores and the logarithms of their sums, in units of ``exponent``'s kind; see ``meet``."""
    exponents = tl.fma(scores, exponent, -shift)
    if EXACT:
        return exponential(exponents)
    else:
        return tl.exp2(exponents)


@triton.jit
def _grad_dots(a, b):
    """The dot products of output gradients and values.

    Delta is taken from them, and does not err alike: so what one chain of 80 sums errs by is too much on an H200.
    """
    return dots(a, b, LONGEST=64)


@triton.jit
def _shift_of(lse, EXACT: tl.constexpr):
    return lse if EXACT else lse * _LOG2E


@triton.jit
def _query_gradient(scores, grad_scores, keys, shift, delta, dq, total, excess, mean, exponent, EXACT: tl.constexpr):
    """Take one tile of keys into dq; ``grad_scores`` are grad_out . v."""
    weights = _probabilities(scores, exponent, shift[:, None], EXACT)
    score_gradients = weights * (grad_scores - delta[:, None])
    if EXACT:
        total += tl.sum(weights, axis=1)
        excess += tl.sum(score_gradients, axis=1)
        mean += product(weights, keys)
    dq += product(score_gradients.to(keys.dtype), keys)
    return dq, total, excess, mean


@triton.jit(do_not_specialize=["seq", "text_len", "places", "rows", "width", "kernel_size", "tiles"])
def query_gradient_kernel(grad_out, grad_strides, q, q_strides, k, k_strides, v, v_strides, out, out_strides,
                          dq, dq_strides, lse, deltas, totals, heads, seq,
                          text_len, places, rows, width, kernel_size, tiles, scale, exponent,
                          KIND: tl.constexpr, SIGN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
                          EXACT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                          BLOCK_QUERIES: tl.constexpr, BLOCK_TEXT: tl.constexpr,
                          BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """The forward kernel's way through the keys, once more; see there."""
    program = tl.program_id(0)
    head, tile = program // tiles, tiles - 1 - program % tiles
    image, first, text_tiles, begin, window, ahead, full = query_tile(
        tile, text_len, places, rows, width, kernel_size, KIND, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS
    )
    k = head_of(k, head, heads, k_strides)
    v = head_of(v, head, heads, v_strides)
    place = first + tl.arange(0, BLOCK_QUERIES)
    token = tokens_of(place, image, text_len, rows, width, KIND)
    real = (place < tl.where(image, places, text_len)) & (token < seq)
    statistic = head.to(tl.int64) * seq + token
    shift = _shift_of(tl.load(lse + statistic, mask=real, other=0.0), EXACT)
    grads = load_real_rows(
        head_of(grad_out, head, heads, grad_strides), token, real, grad_strides[2], HEAD_DIM, BLOCK_D
    )
    outs = load_real_rows(head_of(out, head, heads, out_strides), token, real, out_strides[2], HEAD_DIM, BLOCK_D)
    delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), axis=1)
    queries = load_real_rows(head_of(q, head, heads, q_strides), token, real, q_strides[2], HEAD_DIM, BLOCK_D)
    queries = signed(queries, SIGN)
    gradient = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    excess = tl.zeros([BLOCK_QUERIES], tl.float32)
    mean = gradient

    for t in range(text_tiles):
        key = t * BLOCK_TEXT + tl.arange(0, BLOCK_TEXT)
        keys = load_rows(k, key, k_strides[2], HEAD_DIM, BLOCK_D)
        values = load_rows(v, key, v_strides[2], HEAD_DIM, BLOCK_D)
        scores, grad_scores = dots(queries, keys), _grad_dots(grads, values)
        gradient, total, excess, mean = _query_gradient(
            scores, grad_scores, keys, shift, delta, gradient, total, excess, mean, exponent, EXACT
        )
    if TAIL:
        for t in tl.range(text_tiles, text_tiles + tl.where(image, 1, 0), num_stages=1):
            key = t * BLOCK_TEXT + tl.arange(0, BLOCK_TEXT)
            keys = load_real_rows(k, key, key < text_len, k_strides[2], HEAD_DIM, BLOCK_D)
            values = load_real_rows(v, key, key < text_len, v_strides[2], HEAD_DIM, BLOCK_D)
            scores = tl.where((key < text_len)[None, :], dots(queries, keys), -float("inf"))
            grad_scores = _grad_dots(grads, values)
            gradient, total, excess, mean = _query_gradient(
                scores, grad_scores, keys, shift, delta, gradient, total, excess, mean, exponent, EXACT
            )
    if FULL:
        for t in range(ahead, ahead + full):
            key = tokens_of(begin + t * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS), True, text_len, rows, width, KIND)
            keys = load_rows(k, key, k_strides[2], HEAD_DIM, BLOCK_D)
            values = load_rows(v, key, v_strides[2], HEAD_DIM, BLOCK_D)
            scores, grad_scores = dots(queries, keys), _grad_dots(grads, values)
            gradient, total, excess, mean = _query_gradient(
                scores, grad_scores, keys, shift, delta, gradient, total, excess, mean, exponent, EXACT
            )
    else:
        full = 0
    for t in range(window - full):
        key_place = begin + (t + tl.where(t >= ahead, full, 0)) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        key = tokens_of(key_place, image, text_len, rows, width, KIND)
        exists = (key_place < tl.where(image, places, text_len)) & (key < seq)
        keys = load_real_rows(k, key, exists, k_strides[2], HEAD_DIM, BLOCK_D)
        values = load_real_rows(v, key, exists, v_strides[2], HEAD_DIM, BLOCK_D)
        visible = sees(place[:, None], key_place[None, :], image, rows, width, kernel_size, KIND)
        scores = tl.where(visible, dots(queries, keys), -float("inf"))
        grad_scores = _grad_dots(grads, values)
        gradient, total, excess, mean = _query_gradient(
            scores, grad_scores, keys, shift, delta, gradient, total, excess, mean, exponent, EXACT
        )

    if EXACT:
        excess /= total
        delta += excess
        gradient = (gradient - excess[:, None] * mean) / total[:, None]
        tl.store(totals + statistic, total, mask=real)
    tl.store(deltas + statistic, delta, mask=real)
    gradient *= scale
    dq = head_of(dq, head, heads, dq_strides)
    store_rows(dq, token, real, dq_strides[2], gradient, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradients(scores, grad_scores, queries, grads, dk, dv, shift, delta, total, exponent, EXACT: tl.constexpr):
    """Take one tile of queries into dk and dv; scores and grad_out . v have a key a row."""
    weights = _probabilities(scores, exponent, shift[None, :], EXACT)
    if EXACT:
        weights /= total[None, :]
    dv += product(weights.to(grads.dtype), grads)
    dk += product((weights * (grad_scores - delta[None, :])).to(queries.dtype), queries)
    return dk, dv


@triton.jit(do_not_specialize=["seq", "text_len", "places", "rows", "width", "kernel_size", "tiles", "segments"])
def key_gradients_kernel(grad_out, grad_strides, q, q_strides, k, k_strides, v, v_strides, dk, dk_strides,
                         dv, dv_strides, parts, lse, deltas, totals, all_heads, heads, seq,
                         text_len, places, rows, width, kernel_size, tiles, segments, scale, exponent,
                         KIND: tl.constexpr, SIGN: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                         SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_KEYS: tl.constexpr, BLOCK_QUERIES: tl.constexpr):  # fmt: skip
    """A program takes a tile of keys through the queries that see it.

    The text's tiles are seen by far more queries than the image's, and start first; with ``SPLIT`` each is cut into
    ``segments`` of its queries, whose sums go to ``parts``, float32 ``[2, segments, all_heads, text_len, HEAD_DIM]``.
    """
    program = tl.program_id(0)
    text_tiles = tl.cdiv(text_len, BLOCK_KEYS)
    text_programs = all_heads * text_tiles * segments
    if program < text_programs:
        segment = program % segments
        tile = program // segments % text_tiles
        head = program // segments // text_tiles
    else:
        segment = 0
        tile = text_tiles + (program - text_programs) % (tiles - text_tiles)
        head = (program - text_programs) // (tiles - text_tiles)
    image, first, begin, count, ahead, full = key_tile(
        tile, seq, text_len, places, rows, width, kernel_size, KIND, BLOCK_KEYS, BLOCK_QUERIES
    )
    q = head_of(q, head, heads, q_strides)
    grad_out = head_of(grad_out, head, heads, grad_strides)
    statistics = head.to(tl.int64) * seq
    place = first + tl.arange(0, BLOCK_KEYS)
    token = tokens_of(place, image, text_len, rows, width, KIND)
    real = (place < tl.where(image, places, text_len)) & (token < seq)
    keys = load_real_rows(head_of(k, head, heads, k_strides), token, real, k_strides[2], HEAD_DIM, BLOCK_D)
    values = load_real_rows(head_of(v, head, heads, v_strides), token, real, v_strides[2], HEAD_DIM, BLOCK_D)
    signed_keys = signed(keys, SIGN)
    key_gradient = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)

    # Tiles in the order masked, then whole; a segment takes a run of them.
    masked = count - full
    start, stop = 0, count
    if SPLIT:  # noqa: SIM102 (decided when compiling)
        if program < text_programs:
            start, stop = count * segment // segments, count * (segment + 1) // segments
    for t in range(start, min(stop, masked)):
        query_place = begin + (t + tl.where(t >= ahead, full, 0)) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        query = tokens_of(query_place, image, text_len, rows, width, KIND)
        exists = (query_place < tl.where(image, places, seq)) & (query < seq)
        queries = load_real_rows(q, query, exists, q_strides[2], HEAD_DIM, BLOCK_D)
        grads = load_real_rows(grad_out, query, exists, grad_strides[2], HEAD_DIM, BLOCK_D)
        shift = _shift_of(tl.load(lse + statistics + query, mask=exists, other=0.0), EXACT)
        delta = tl.load(deltas + statistics + query, mask=exists, other=0.0)
        total = tl.load(totals + statistics + query, mask=exists, other=1.0) if EXACT else delta
        visible = sees(query_place[None, :], place[:, None], image, rows, width, kernel_size, KIND)
        scores = tl.where(visible, dots(signed_keys, queries), -float("inf"))
        grad_scores = _grad_dots(values, grads)
        key_gradient, value_gradient = _key_gradients(
            scores, grad_scores, queries, grads, key_gradient, value_gradient, shift, delta, total, exponent, EXACT
        )
    for t in range(max(start, masked), stop):
        query_place = begin + (t - masked + ahead) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        # Of an image tile this loop is empty, but where FULL; of a text tile it goes by tokens.
        query = tokens_of(query_place, image, text_len, rows, width, KIND) if FULL else query_place
        exists = (query_place < tl.where(image, places, seq)) & (query < seq)
        # Queries that do not exist have neither rows nor gradients, and add nothing.
        queries = load_real_rows(q, query, exists, q_strides[2], HEAD_DIM, BLOCK_D)
        grads = load_real_rows(grad_out, query, exists, grad_strides[2], HEAD_DIM, BLOCK_D)
        shift = _shift_of(tl.load(lse + statistics + query, mask=exists, other=0.0), EXACT)
        delta = tl.load(deltas + statistics + query, mask=exists, other=0.0)
        total = tl.load(totals + statistics + query, mask=exists, other=1.0) if EXACT else delta
        scores = dots(signed_keys, queries)
        grad_scores = _grad_dots(values, grads)
        key_gradient, value_gradient = _key_gradients(
            scores, grad_scores, queries, grads, key_gradient, value_gradient, shift, delta, total, exponent, EXACT
        )

    if SPLIT:  # noqa: SIM102 (decided when compiling)
        if program < text_programs:
            part = parts + (segment.to(tl.int64) * all_heads + head) * text_len * HEAD_DIM
            store_rows(part, token, real, HEAD_DIM, key_gradient, HEAD_DIM, BLOCK_D)
            part += segments.to(tl.int64) * all_heads * text_len * HEAD_DIM
            store_rows(part, token, real, HEAD_DIM, value_gradient, HEAD_DIM, BLOCK_D)
            real &= False
    dk = head_of(dk, head, heads, dk_strides)
    dv = head_of(dv, head, heads, dv_strides)
    store_rows(dk, token, real, dk_strides[2], key_gradient * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv, token, real, dv_strides[2], value_gradient, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["all_heads", "text_len", "segments"])
def add_parts_kernel(parts, dk, dk_strides, dv, dv_strides, all_heads, heads, text_len, segments, scale,
                     HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """dk and dv of the text: the sums of its segments, added in their order."""
    head = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    real = token < text_len
    step = all_heads.to(tl.int64) * text_len * HEAD_DIM
    dk_part = parts + head.to(tl.int64) * text_len * HEAD_DIM
    dv_part = dk_part + segments * step
    dk_sum = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    for _ in range(segments):
        dk_sum += load_real_rows(dk_part, token, real, HEAD_DIM, HEAD_DIM, BLOCK_D)
        dv_sum += load_real_rows(dv_part, token, real, HEAD_DIM, HEAD_DIM, BLOCK_D)
        dk_part += step
        dv_part += step
    store_rows(head_of(dk, head, heads, dk_strides), token, real, dk_strides[2], dk_sum * scale, HEAD_DIM, BLOCK_D)
    store_rows(head_of(dv, head, heads, dv_strides), token, real, dv_strides[2], dv_sum, HEAD_DIM, BLOCK_D)
