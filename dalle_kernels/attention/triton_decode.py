"""The kernels of a decode step: one token a sample, its key and value into the cache, attention from the cache.

The keys that a token sees are numbered, text first, and cut into parts for programs that share a head where heads are
few; a part's sums are added in the parts' order. The samples of a prompt share its text keys: these are scored for a
tile of samples at once by matrix products. A sample's image keys are read by it alone, so that there is nothing to
multiply by but one row: a program keeps a softmax for each row of its block of keys and joins them at its end. The new
key is taken from where it is given, and no program reads the slot that another one writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_dependent import await_last_kernel
from .triton_tiles import LOWEST, load_real_rows, load_rows, meet, power, product, signed


@triton.jit
def _visible_slots(number, token, height, width, kernel_size, slots, KIND: tl.constexpr):
    """The slots of the image keys number ``number`` that image token ``token`` may see, and which of them it does.

    Its own is not among them. Slots are as :mod:`.slots` lays them out.
    """
    row, column = token // width, token % width
    if KIND == "column":
        slot, seen = column * height + number, number < row
    elif KIND == "axial_row":
        slot, seen = number, number < column
    elif KIND == "conv":
        # Number after number along the rows of a neighbourhood that starts in mid-row, with the query; where it is as
        # wide as the grid or wider, along the raster.
        reach = kernel_size // 2
        narrow = 2 * reach + 1 <= width
        span, middle = tl.where(narrow, 2 * reach + 1, width), tl.where(narrow, reach, 0)
        distance = (number + middle) // span * width + (number + middle) % span - middle
        last = tl.where(narrow, (reach + 1) * span - reach, reach * (width + 1) + 1)
        slot = (token - distance + slots) % slots
        seen = (number < last) & (distance <= token) & (distance > 0)
    elif KIND == "conv_corner":
        span = tl.minimum(kernel_size, width)
        rows_back, columns_back = number // span, number % span
        slot = (token - rows_back * width - columns_back + slots) % slots
        seen = (rows_back < kernel_size) & (rows_back <= row) & (columns_back <= column) & (number > 0)
    else:
        slot, seen = number, (number <= token) & (number < slots) & (number != token % slots)
    return slot, seen


@triton.jit
def _own_slot(token, height, width, slots, KIND: tl.constexpr):
    if KIND == "column":
        return token % width * height + token // width
    if KIND == "axial_row":
        return token % width
    return token % slots


@triton.jit
def _load_token(start, row, head, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of ``[rows, heads, 1, head_dim]`` in any layout: float32 ``[BLOCK_D]``, zero beyond the head."""
    column = tl.arange(0, BLOCK_D)
    pointers = start + row.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + column * strides[3]
    return tl.load(pointers, mask=column < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def _scores(products, AXIS: tl.constexpr, exponent, EXACT: tl.constexpr):
    sums = tl.sum(products, axis=AXIS)
    return sums if EXACT else sums * exponent


@triton.jit
def _meet_row(query, keys, values, visible, maximum, total, weighted, exponent):
    """Take a block of keys into the softmaxes of its rows; their maxima are in the units of ``meet``."""
    EXACT: tl.constexpr = values.dtype == tl.float32
    scores = _scores(keys.to(tl.float32) * query[None, :], 1, exponent, EXACT)
    scores = tl.where(visible, scores, -float("inf"))
    largest = tl.maximum(maximum, scores)
    shrink, weights = power(maximum - largest, exponent, EXACT), power(scores - largest, exponent, EXACT)
    weighted = weighted * shrink[:, None] + weights[:, None] * values.to(tl.float32)
    return largest, total * shrink + weights, weighted


@triton.jit(do_not_specialize=["position", "prompts", "samples", "heads", "text_len", "height", "width", "kernel_size",
                               "slots", "numbers", "part_keys", "first_part", "parts"])  # fmt: skip
def decode_rows_kernel(q, q_strides, k_new, k_strides, v_new, v_strides, text, image, out, sums, statistics, position,
                       prompts, samples, heads, text_len, height, width, kernel_size, slots, numbers, part_keys,
                       first_part, parts, exponent,
                       KIND: tl.constexpr, SIGN: tl.constexpr, POSITION_ON_DEVICE: tl.constexpr, TEXT: tl.constexpr,
                       SPLIT: tl.constexpr, DEPENDENT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                       BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """A program takes one head of one sample through a part of the image keys, and with ``TEXT`` of the text's.

    It is ``part_keys`` of the numbers from 0 to ``text_len`` (if ``TEXT``) and ``numbers`` more. Without ``SPLIT`` it
    writes the output, else its unnormalized sum and its maximum and total as part ``first_part`` and on of ``parts``.
    """
    await_last_kernel(DEPENDENT)
    if POSITION_ON_DEVICE:
        position = tl.load(position)
        is_step = (position >= (0 if TEXT else text_len)) & (position < text_len + height * width)
        position = tl.where(is_step, position, -1).to(tl.int32)
    EXACT: tl.constexpr = image.dtype.element_ty == tl.float32
    program, part = tl.program_id(0), tl.program_id(1)
    row, head = program // heads, program % heads
    prompt_head = (row // samples * heads + head).to(tl.int64)
    text += prompt_head * text_len * HEAD_DIM
    image += (prompt_head * samples + row % samples) * slots * HEAD_DIM
    text_values = text + prompts.to(tl.int64) * heads * text_len * HEAD_DIM
    image_values = image + prompts.to(tl.int64) * heads * samples * slots * HEAD_DIM
    column, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_KEYS)
    in_image = position >= text_len
    token = tl.maximum(position - text_len, 0)
    query = _load_token(q, row, head, q_strides, HEAD_DIM, BLOCK_D) * SIGN

    # The first row of the first part begins with the token's own key.
    key, value = (
        _load_token(k_new, row, head, k_strides, HEAD_DIM, BLOCK_D),
        _load_token(v_new, row, head, v_strides, HEAD_DIM, BLOCK_D),
    )
    own = (lane == 0) & (part == 0)
    maximum = tl.where(own, _scores(query * key, 0, exponent, EXACT), LOWEST)
    # A position at which there is no step makes the output NaN, and writes and reads no cache.
    total = tl.where(own, tl.where(position < 0, float("nan"), 1.0), 0.0)
    weighted = tl.where(own[:, None], value[None, :], 0.0)
    if part == 0:
        in_head = column < HEAD_DIM
        slot = _own_slot(token, height, width, slots, KIND).to(tl.int64) * HEAD_DIM + column
        tl.store(image + slot, key.to(image.dtype.element_ty), mask=in_head & in_image)
        tl.store(image_values + slot, value.to(image.dtype.element_ty), mask=in_head & in_image)
        if TEXT:
            place = position.to(tl.int64) * HEAD_DIM + column
            in_text = in_head & (position >= 0) & (position < text_len)
            tl.store(text + place, key.to(text.dtype.element_ty), mask=in_text)
            tl.store(text_values + place, value.to(text.dtype.element_ty), mask=in_text)

    start, stop = part * part_keys, (part + 1) * part_keys
    if TEXT:
        text_keys = tl.minimum(position, text_len)
        for first in range(start, tl.minimum(stop, text_keys), BLOCK_KEYS):
            number = first + lane
            visible = (number < stop) & (number < text_keys)
            keys = load_real_rows(text, number, visible, HEAD_DIM, HEAD_DIM, BLOCK_D)
            values = load_real_rows(text_values, number, visible, HEAD_DIM, HEAD_DIM, BLOCK_D)
            maximum, total, weighted = _meet_row(query, keys, values, visible, maximum, total, weighted, exponent)
        start, stop = tl.maximum(start - text_len, 0), stop - text_len
    stop = tl.where(in_image, tl.minimum(stop, numbers), 0)
    for first in range(start, stop, BLOCK_KEYS):
        number = first + lane
        slot, seen = _visible_slots(number, token, height, width, kernel_size, slots, KIND)
        visible = seen & (number < stop)
        keys = load_real_rows(image, slot, visible, HEAD_DIM, HEAD_DIM, BLOCK_D)
        values = load_real_rows(image_values, slot, visible, HEAD_DIM, HEAD_DIM, BLOCK_D)
        maximum, total, weighted = _meet_row(query, keys, values, visible, maximum, total, weighted, exponent)

    largest = tl.max(maximum, axis=0)
    share = power(maximum - largest, exponent, EXACT)
    total = tl.sum(total * share, axis=0)
    result = tl.sum(weighted * share[:, None], axis=0)
    if SPLIT:
        place = program.to(tl.int64) * parts + first_part + part
        tl.store(sums + place * HEAD_DIM + column, result, mask=column < HEAD_DIM)
        tl.store(statistics + place * 2, largest * exponent if EXACT else largest)
        tl.store(statistics + place * 2 + 1, total)
    else:
        result = (result / total).to(out.dtype.element_ty)
        tl.store(out + program.to(tl.int64) * HEAD_DIM + column, result, mask=column < HEAD_DIM)


@triton.jit(do_not_specialize=["prompts", "samples", "heads", "text_len", "part_keys", "parts"])
def decode_text_kernel(q, q_strides, text, sums, statistics, prompts, samples, heads, text_len, part_keys, parts,
                       exponent, SIGN: tl.constexpr, TAIL: tl.constexpr, DEPENDENT: tl.constexpr,
                       HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SAMPLES: tl.constexpr,
                       BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """A program takes a tile of a prompt's samples through a part of its text keys, ``part_keys`` whole blocks."""
    await_last_kernel(DEPENDENT)
    program, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    prompt, head = program // heads, program % heads
    text += program.to(tl.int64) * text_len * HEAD_DIM
    text_values = text + prompts.to(tl.int64) * heads * text_len * HEAD_DIM
    sample, column = tile * BLOCK_SAMPLES + tl.arange(0, BLOCK_SAMPLES), tl.arange(0, BLOCK_D)
    row = (prompt * samples + sample).to(tl.int64)
    mask = (sample < samples)[:, None] & (column < HEAD_DIM)[None, :]
    pointers = q + row[:, None] * q_strides[0] + head.to(tl.int64) * q_strides[1] + column[None, :] * q_strides[3]
    queries = signed(tl.load(pointers, mask=mask, other=0.0), SIGN)
    maximum = tl.full([BLOCK_SAMPLES], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_SAMPLES], tl.float32)
    weighted = tl.zeros([BLOCK_SAMPLES, BLOCK_D], tl.float32)
    for first in range(part * part_keys, tl.minimum((part + 1) * part_keys, text_len), BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        if TAIL:
            keys = load_real_rows(text, key, key < text_len, HEAD_DIM, HEAD_DIM, BLOCK_D)
            values = load_real_rows(text_values, key, key < text_len, HEAD_DIM, HEAD_DIM, BLOCK_D)
            scores = tl.where((key < text_len)[None, :], product(queries, tl.trans(keys)), -float("inf"))
        else:
            keys = load_rows(text, key, HEAD_DIM, HEAD_DIM, BLOCK_D)
            values = load_rows(text_values, key, HEAD_DIM, HEAD_DIM, BLOCK_D)
            scores = product(queries, tl.trans(keys))
        maximum, total, weighted = meet(scores, values, maximum, total, weighted, exponent)
    place = (row * heads + head) * parts + part
    tl.store(sums + place[:, None] * HEAD_DIM + column[None, :], weighted, mask=mask)
    if text.dtype.element_ty == tl.float32:
        maximum *= exponent
    tl.store(statistics + place * 2, maximum, mask=sample < samples)
    tl.store(statistics + place * 2 + 1, total, mask=sample < samples)


@triton.jit(do_not_specialize=["parts"])
def join_parts_kernel(sums, statistics, out, parts, DEPENDENT: tl.constexpr, HEAD_DIM: tl.constexpr,
                      BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr):  # fmt: skip
    """The output of one head of one sample from its parts."""
    await_last_kernel(DEPENDENT)
    program = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_D)
    real, in_head = part < parts, column < HEAD_DIM
    place = program * parts + part
    maximum = tl.load(statistics + place * 2, mask=real, other=LOWEST)
    share = power(maximum - tl.max(maximum, axis=0), 1.0, out.dtype.element_ty == tl.float32)
    total = tl.sum(tl.load(statistics + place * 2 + 1, mask=real, other=0.0) * share, axis=0)
    pointers = sums + place[:, None] * HEAD_DIM + column[None, :]
    rows = tl.load(pointers, mask=real[:, None] & in_head[None, :], other=0.0)
    result = tl.sum(rows * share[:, None], axis=0) / total
    tl.store(out + program * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=in_head)
