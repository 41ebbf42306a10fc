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
    kept_text,
    key_tile,
    load_real_rows,
    product,
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


@triton.jit(do_not_specialize=["heads", "seq", "text_len", "places", "rows", "width", "kernel_size", "first_tile",
                               "tiles"])  # fmt: skip
def query_gradient_kernel(grad_out, grad_strides, q, q_strides, k_text, k_window, k_strides, v_text, v_window,
                          v_strides, out, out_strides, dq, dq_strides, lse, deltas, totals, heads, seq,
                          text_len, places, rows, width, kernel_size, first_tile, tiles, scale, exponent,
                          KIND: tl.constexpr, SIGN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
                          EXACT: tl.constexpr, KEPT: tl.constexpr, RUN: tl.constexpr, DESCRIPTORS: tl.constexpr,
                          HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                          BLOCK_QUERIES: tl.constexpr, BLOCK_TEXT: tl.constexpr,
                          BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """The forward kernel's way through the keys, once more; see there."""
    head, tile, stop = run_of_tiles(first_tile, tiles, KEPT, RUN)
    grad_out, q = head_of(grad_out, head, heads, grad_strides), head_of(q, head, heads, q_strides)
    out, dq = head_of(out, head, heads, out_strides), head_of(dq, head, heads, dq_strides)
    k = rows_of(k_text, k_window, head, heads, k_strides, DESCRIPTORS)
    v = rows_of(v_text, v_window, head, heads, v_strides, DESCRIPTORS)
    own, own_strides = (grad_out, q, out, dq), (grad_strides[2], q_strides[2], out_strides[2], dq_strides[2])
    statistics = head.to(tl.int64) * seq
    statistics = lse + statistics, deltas + statistics, totals + statistics
    part = seq, text_len, places, rows, width, kernel_size
    if KEPT:
        k_kept = kept_text(k, text_len, KEPT, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
        v_kept = kept_text(v, text_len, KEPT, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
        for t in tl.range(tile, stop, num_stages=1):
            _query_gradient_tile(
                t, own, own_strides, k, v, k_kept, v_kept, statistics, part, scale, exponent,
                KIND, SIGN, TAIL, FULL, EXACT, HEAD_DIM, BLOCK_D, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS,
            )  # fmt: skip
    else:
        _query_gradient_tile(
            tile, own, own_strides, k, v, (), (), statistics, part, scale, exponent,
            KIND, SIGN, TAIL, FULL, EXACT, HEAD_DIM, BLOCK_D, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS,
        )  # fmt: skip


@triton.jit
def _query_gradient_tile(tile, own, own_strides, k, v, k_kept, v_kept, statistics, part, scale, exponent,
                         KIND: tl.constexpr, SIGN: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
                         EXACT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_QUERIES: tl.constexpr, BLOCK_TEXT: tl.constexpr,
                         BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """One tile of a head's queries.

    ``own``: where the head's rows of grad_out, q, out and dq begin; ``statistics``: where lse, deltas and totals do.
    """
    grad_out, q, out, dq = own
    grad_stride, q_stride, out_stride, dq_stride = own_strides
    lse, deltas, totals = statistics
    seq, text_len, places, rows, width, kernel_size = part
    image, first, text_tiles, begin, window, ahead, full = query_tile(
        tile, text_len, places, rows, width, kernel_size, KIND, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS
    )
    place = first + tl.arange(0, BLOCK_QUERIES)
    token = tokens_of(place, image, text_len, rows, width, KIND)
    limit = tl.where(image, places, text_len)
    real = (place < limit) & (token < seq)
    shift = _shift_of(tl.load(lse + token, mask=real, other=0.0), EXACT)
    grads = load_real_rows(grad_out, token, real, grad_stride, HEAD_DIM, BLOCK_D)
    outs = load_real_rows(out, token, real, out_stride, HEAD_DIM, BLOCK_D)
    delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), axis=1)
    queries = signed(load_real_rows(q, token, real, q_stride, HEAD_DIM, BLOCK_D), SIGN)
    gradient = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    excess = tl.zeros([BLOCK_QUERIES], tl.float32)
    mean = gradient

    if len(k_kept) > 0:
        for i in tl.static_range(len(k_kept)):
            text_scores = dots(queries, k_kept[i])
            if TAIL and i == len(k_kept) - 1:
                text_scores = without_tail(text_scores, i * BLOCK_TEXT, text_len)
            gradient, total, excess, mean = _query_gradient(
                text_scores, _grad_dots(grads, v_kept[i]), k_kept[i], shift, delta, gradient, total, excess, mean,
                exponent, EXACT,
            )  # fmt: skip
    else:
        for t in range(text_tiles):
            keys = text_tile(k, t * BLOCK_TEXT, text_len, True, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
            values = text_tile(v, t * BLOCK_TEXT, text_len, True, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
            scores, grad_scores = dots(queries, keys), _grad_dots(grads, values)
            gradient, total, excess, mean = _query_gradient(
                scores, grad_scores, keys, shift, delta, gradient, total, excess, mean, exponent, EXACT
            )
        if TAIL:
            for t in tl.range(text_tiles, text_tiles + tl.where(image, 1, 0), num_stages=1):
                keys = text_tile(k, t * BLOCK_TEXT, text_len, False, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
                values = text_tile(v, t * BLOCK_TEXT, text_len, False, BLOCK_TEXT, HEAD_DIM, BLOCK_D)
                scores = without_tail(dots(queries, keys), t * BLOCK_TEXT, text_len)
                grad_scores = _grad_dots(grads, values)
                gradient, total, excess, mean = _query_gradient(
                    scores, grad_scores, keys, shift, delta, gradient, total, excess, mean, exponent, EXACT
                )
    if FULL:
        for t in range(ahead, ahead + full):
            at = begin + t * BLOCK_KEYS
            keys = window_tile(k, at, True, limit, part, KIND, True, BLOCK_KEYS, HEAD_DIM, BLOCK_D)
            values = window_tile(v, at, True, limit, part, KIND, True, BLOCK_KEYS, HEAD_DIM, BLOCK_D)
            scores, grad_scores = dots(queries, keys), _grad_dots(grads, values)
            gradient, total, excess, mean = _query_gradient(
                scores, grad_scores, keys, shift, delta, gradient, total, excess, mean, exponent, EXACT
            )
    else:
        full = 0
    for t in range(window - full):
        at = begin + (t + tl.where(t >= ahead, full, 0)) * BLOCK_KEYS
        keys = window_tile(k, at, image, limit, part, KIND, False, BLOCK_KEYS, HEAD_DIM, BLOCK_D)
        values = window_tile(v, at, image, limit, part, KIND, False, BLOCK_KEYS, HEAD_DIM, BLOCK_D)
        key_place = at + tl.arange(0, BLOCK_KEYS)
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
        tl.store(totals + token, total, mask=real)
    tl.store(deltas + token, delta, mask=real)
    store_rows(dq, token, real, dq_stride, gradient * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradients(scores, grad_scores, queries, grads, dk, dv, shift, delta, total, exponent, EXACT: tl.constexpr):
    """Take one tile of queries into dk and dv; scores and grad_out . v have a key a row."""
    weights = _probabilities(scores, exponent, shift[None, :], EXACT)
    if EXACT:
        weights /= total[None, :]
    dv += product(weights.to(grads.dtype), grads)
    dk += product((weights * (grad_scores - delta[None, :])).to(queries.dtype), queries)
    return dk, dv


@triton.jit(do_not_specialize=["all_heads", "heads", "seq", "text_len", "places", "rows", "width", "kernel_size",
                               "tiles", "segments"])  # fmt: skip
def key_gradients_kernel(grad_out, grad_strides, q, q_strides, k, k_strides, v, v_strides, dk, dk_strides,
                         dv, dv_strides, parts, lse, deltas, totals, all_heads, heads, seq,
                         text_len, places, rows, width, kernel_size, tiles, segments, scale, exponent,
                         KIND: tl.constexpr, SIGN: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                         SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_KEYS: tl.constexpr, BLOCK_QUERIES: tl.constexpr):  # fmt: skip
    """A program takes a tile of keys through the queries that see it.

    The text's tiles are seen by far more queries than the image's, and start first; with ``SPLIT`` each is cut into
    ``segments`` of its queries, whose sums go to ``parts``, float32 ``[2, segments, all_heads, text_len, HEAD_DIM]``.
    With DESCRIPTORS ``q`` and ``grad_out`` are tensor descriptors of tokens in their own order.
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
    q = rows_of(q, q, head, heads, q_strides, DESCRIPTORS)
    grad_out = rows_of(grad_out, grad_out, head, heads, grad_strides, DESCRIPTORS)
    statistics = head.to(tl.int64) * seq
    part = seq, text_len, places, rows, width, kernel_size
    limit = tl.where(image, places, seq)
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
        at = begin + (t + tl.where(t >= ahead, full, 0)) * BLOCK_QUERIES
        query_place = at + tl.arange(0, BLOCK_QUERIES)
        query = tokens_of(query_place, image, text_len, rows, width, KIND)
        exists = (query_place < limit) & (query < seq)
        queries = window_tile(q, at, image, limit, part, KIND, False, BLOCK_QUERIES, HEAD_DIM, BLOCK_D)
        grads = window_tile(grad_out, at, image, limit, part, KIND, False, BLOCK_QUERIES, HEAD_DIM, BLOCK_D)
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
        at = begin + (t - masked + ahead) * BLOCK_QUERIES
        query_place = at + tl.arange(0, BLOCK_QUERIES)
        # Of an image tile this loop is empty, but where FULL; of a text tile it goes by tokens.
        in_image = image if FULL else False
        query = tokens_of(query_place, in_image, text_len, rows, width, KIND)
        exists = (query_place < limit) & (query < seq)
        # Queries that do not exist have neither rows nor gradients, and add nothing.
        queries = window_tile(q, at, in_image, limit, part, KIND, False, BLOCK_QUERIES, HEAD_DIM, BLOCK_D)
        grads = window_tile(grad_out, at, in_image, limit, part, KIND, False, BLOCK_QUERIES, HEAD_DIM, BLOCK_D)
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
            sums = parts + (segment.to(tl.int64) * all_heads + head) * text_len * HEAD_DIM
            store_rows(sums, token, real, HEAD_DIM, key_gradient, HEAD_DIM, BLOCK_D)
            sums += segments.to(tl.int64) * all_heads * text_len * HEAD_DIM
            store_rows(sums, token, real, HEAD_DIM, value_gradient, HEAD_DIM, BLOCK_D)
            real &= False
    dk = head_of(dk, head, heads, dk_strides)
    dv = head_of(dv, head, heads, dv_strides)
    store_rows(dk, token, real, dk_strides[2], key_gradient * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv, token, real, dv_strides[2], value_gradient, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["all_heads", "heads", "text_len", "segments"])
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
