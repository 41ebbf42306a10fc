"""What the Triton kernels of this family share: where tokens lie, who sees whom, and rows of a head."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _triton
from ..triton_math import exponential, natural_log
from . import tiles

# The interpreter wants a jitted function's module to know triton.language; it calls plain functions just as well.
_compiled = (lambda function: function) if _triton.interprets() else triton.jit

query_tile = _compiled(tiles.query_tile)
key_tile = _compiled(tiles.key_tile)

# Where a running maximum starts: finite, so that a row that has met no visible key needs no care.
LOWEST = tl.constexpr(-3.4028234663852886e38)

_LN2 = tl.constexpr(0.6931471805599453)

# Into how many parts the columns of wide float32 heads are cut, each multiplied in a chain of sums of its own.
_PARTS = tl.constexpr(4)


@triton.jit
def tokens_of(place, image, text_len, rows, width, KIND: tl.constexpr):
    """The tokens at ``place`` of the image, or of the text where ``image`` is false."""
    if KIND == "column":
        return tl.where(image, text_len + place % rows * width + place // rows, place)
    return place + tl.where(image, text_len, 0)


@triton.jit
def sees(query, key, image, rows, width, kernel_size, KIND: tl.constexpr):
    """Whether the queries see the keys, both places of one part of the stream, in shapes that broadcast.

    Everything but the comparisons is computed before broadcasting, a row or a column at a time.
    """
    visible = key <= query
    if KIND == "row":
        visible &= key >= query - tl.where(image, width, query)
    elif KIND == "column":
        visible &= key >= tl.where(image, query // rows * rows, 0)
    elif KIND == "axial_row":
        visible &= key >= tl.where(image, query // width * width, 0)
    elif KIND == "conv":
        # The distance is within `reach` of a multiple of the width if the columns are, around the edge.
        reach = kernel_size // 2
        visible &= key >= query - tl.where(image, reach * (width + 1), query)
        apart = tl.abs(tl.where(image, query % width, 0) - tl.where(image, key % width, 0))
        visible &= (apart <= reach) | (apart >= width - reach)
    elif KIND == "conv_corner":
        query_column, key_column = tl.where(image, query % width, 0), tl.where(image, key % width, 0)
        visible &= tl.where(image, query // width, 0) - tl.where(image, key // width, 0) < kernel_size
        visible &= (query_column >= key_column) & (query_column - key_column < kernel_size)
    return visible


@triton.jit
def head_of(tensor, number, heads, strides):
    """Where head ``number`` of all samples' heads begins, in a tensor with these strides of samples, heads, tokens."""
    sample, head = number // heads, number % heads
    return tensor + sample.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def row_pointers(start, token, token_stride, BLOCK_D: tl.constexpr):
    return start + token.to(tl.int64)[:, None] * token_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_rows(start, token, token_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows that all exist; columns beyond the head's are zero."""
    pointers = row_pointers(start, token, token_stride, BLOCK_D)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def load_real_rows(start, token, real, token_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of which only the ``real`` ones exist; the others are zero."""
    mask = real[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    return tl.load(row_pointers(start, token, token_stride, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def run_of_tiles(first_tile, tiles, KEPT: tl.constexpr, RUN: tl.constexpr):
    """A program's head, and the tiles of queries that it takes: a run of RUN of the ``tiles`` from ``first_tile`` on
    where it has KEPT tiles of text, else one. Returns ``(head, tile, stop)``.

    A head's tiles run together and share its keys; the last ones of a causal part are the longest and come first.
    """
    program = tl.program_id(0)
    if KEPT:
        runs = tl.cdiv(tiles, RUN)
        start = program % runs * RUN
        return program // runs, first_tile + start, first_tile + min(start + RUN, tiles)
    else:
        tile = first_tile + tiles - 1 - program % tiles
        return program // tiles, tile, tile + 1


@triton.jit
def rows_of(text, window, number, heads, strides, DESCRIPTORS: tl.constexpr):
    """The rows of head ``number`` of all samples' heads, for the functions below to take tiles of.

    With DESCRIPTORS these are four things, by which the functions tell: the descriptors of the text and of the window,
    the sample and the head. Else two, of whichever tensor: where the rows begin and how far apart they are.
    """
    if DESCRIPTORS:
        return text, window, number // heads, number % heads
    else:
        return head_of(text, number, heads, strides), strides[2]


@triton.jit
def text_tile(source, first, text_len, WHOLE: tl.constexpr,
              BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """BLOCK rows of the text from token ``first`` on; those after its end are zero, and WHOLE says there are none."""
    if len(source) == 4:
        return source[0].load([source[2], source[3], first, 0]).reshape(BLOCK, BLOCK_D)
    else:
        token = first + tl.arange(0, BLOCK)
        if WHOLE:
            return load_rows(source[0], token, source[1], HEAD_DIM, BLOCK_D)
        else:
            return load_real_rows(source[0], token, token < text_len, source[1], HEAD_DIM, BLOCK_D)


@triton.jit
def window_tile(source, first, image, limit, part, KIND: tl.constexpr, WHOLE: tl.constexpr,
                BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """BLOCK rows from place ``first`` on of the image, or of the text where ``image`` is false.

    Places from ``limit`` on may be without a token: what is there instead is seen by no query that has one, and WHOLE
    says that there are none. A descriptor of a permuted image gives rows of one column.
    """
    seq, text_len, _, rows, width, _ = part
    if len(source) == 4:
        if KIND == "column":
            return source[1].load([source[2], source[3], first % rows, first // rows, 0]).reshape(BLOCK, BLOCK_D)
        else:
            token = first + tl.where(image, text_len, 0)
            return source[1].load([source[2], source[3], token, 0]).reshape(BLOCK, BLOCK_D)
    else:
        place = first + tl.arange(0, BLOCK)
        token = tokens_of(place, image, text_len, rows, width, KIND)
        if WHOLE:
            return load_rows(source[0], token, source[1], HEAD_DIM, BLOCK_D)
        else:
            return load_real_rows(source[0], token, (place < limit) & (token < seq), source[1], HEAD_DIM, BLOCK_D)


@triton.jit
def kept_text(source, text_len, KEPT: tl.constexpr,
              BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """All of the text, as KEPT tiles: operands of products, which stay in shared memory for as long as they serve."""
    tiles = ()
    for t in tl.static_range(KEPT):
        tile = text_tile(source, t * BLOCK, text_len, False, BLOCK, HEAD_DIM, BLOCK_D)
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def without_tail(scores, first, text_len):
    """Scores with the keys from token ``first`` on, those after the text's end hidden."""
    key = first + tl.arange(0, scores.shape[1])
    return tl.where((key < text_len)[None, :], scores, -float("inf"))


@triton.jit
def store_rows(start, token, real, token_stride, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = real[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(row_pointers(start, token, token_stride, BLOCK_D), rows.to(start.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b):
    """``a @ b`` in float32 sums: of float32 operands without the rounding to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dots(a, b, LONGEST: tl.constexpr = 128):
    """The dot products of each row of ``a`` with each of ``b``.

    Those of float32 heads wider than ``LONGEST`` are sums over parts of the columns: one chain of all of them may err
    twice as much as a BLAS, and its operands would not fit the registers.
    """
    if a.dtype == tl.float32 and a.shape[1] > LONGEST:
        return tl.sum(product(_parted(a), tl.permute(_parted(b), [0, 2, 1])), axis=0)
    return product(a, tl.trans(b))


@triton.jit
def _parted(rows):
    """Rows as ``[parts, rows, columns of a part]``."""
    return tl.permute(tl.reshape(rows, [rows.shape[0], _PARTS, rows.shape[1] // _PARTS]), [1, 0, 2])


@triton.jit
def signed(rows, SIGN: tl.constexpr):
    """Rows times the sign of the scale, whose magnitude enters with the scores."""
    if SIGN == 1:
        return rows
    return (rows.to(tl.float32) * SIGN).to(rows.dtype)


@triton.jit
def power(difference, exponent, EXACT: tl.constexpr):
    """The weight of scores less their maximum, in the units of the maximum: see :func:`meet`."""
    if EXACT:
        return exponential(difference * exponent)
    else:
        return tl.exp2(difference)


@triton.jit
def log_sum(maximum, total, exponent, EXACT: tl.constexpr):
    """The natural logarithm of the sum that :func:`meet` has gathered."""
    if EXACT:
        return tl.fma(maximum, exponent, natural_log(total))
    else:
        return (maximum + tl.log2(total)) * _LN2


@triton.jit
def meet(scores, values, maximum, total, weighted, exponent):
    """Take one tile of keys into the running softmax.

    For 16-bit values the maximum is in exponents of 2, and ``exponent`` the factor that makes such of scores: one
    operation a score. For float32 the maximum is a score, and the factor makes exponents of e: the key with the
    largest score weighs 1 exactly, however large the scores, and exponentials are as exact as the products.
    """
    EXACT: tl.constexpr = values.dtype == tl.float32
    if EXACT:
        largest = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = power(scores - largest[:, None], exponent, EXACT)
    else:
        largest = tl.maximum(maximum, tl.max(scores, axis=1) * exponent)
        weights = tl.exp2(tl.fma(scores, exponent, -largest[:, None]))
    shrink = power(maximum - largest, exponent, EXACT)
    total = total * shrink + tl.sum(weights, axis=1)
    weighted = weighted * shrink[:, None] + product(weights.to(values.dtype), values)
    return largest, total, weighted
