"""Triton's kernels of family attention against masked softmax attention in float64: on a GPU, else interpreted."""

from __future__ import annotations

import random
from collections import defaultdict
from contextlib import ExitStack, contextmanager

import pytest
import torch
from test_attention import check, check_draws, gradients
from test_decode import assert_no_step

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, decode_attention, sparse_attention
from dalle_kernels._triton_configurations import DEFAULT, TABLE, Configuration, use_configuration
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.testing import assert_accurate, poisoned_allocations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("sparse_attention", "sparse_attention_backward", "decode_attention")


@contextmanager
def blocks_of(size):
    """Within the block each kernel of the family takes blocks of ``size(op, shape_class)``, a number by its name."""
    with ExitStack() as stack:
        for (op, shape_class), row in TABLE.items():
            if op in OPS:
                sizes = {name: size(op, shape_class)[name] for name in row[DEFAULT].blocks if name.startswith("BLOCK")}
                blocks = Configuration({**row[DEFAULT].blocks, **sizes})
                stack.enter_context(use_configuration(op, shape_class, blocks))
        yield


@pytest.fixture
def small_blocks():
    """The smallest blocks that multiply, so that short sequences have tiles of every sort."""
    with blocks_of(lambda *_row: defaultdict(lambda: 16)):
        yield


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def split(request, monkeypatch):
    """Whether the queries of text keys, and the keys of a decode step, are split between programs."""
    from dalle_kernels.attention import triton_kernels

    monkeypatch.setattr(triton_kernels, "_ENOUGH_PROGRAMS", 1 << 20 if request.param else 1)
    return request.param


def random_inputs(device, *shape, dtype=torch.float32, count=4):
    return [torch.randn(shape).to(dtype).to(device) for _ in range(count)]


def check_random(device, pattern, scale, *shape, dtype=torch.float32):
    """`check` on fresh draws, by the rule of `check_draws`; the interpreter tries one first, a GPU many at once."""
    torch.manual_seed(0)

    def check_set(count):
        check([random_inputs(device, *shape, dtype=dtype) for _ in range(count)], pattern, scale)

    check_draws(check_set, (1, 10, 10) if device == "cpu" else (40, 40, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(kind, dtype, triton_device, small_blocks):
    # Text and image both end within a tile, the prefix within a row of the image.
    check_random(triton_device, AttentionPattern(kind, 17, (4, 8), 3), 0.25, 1, 1, 45, 16, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "text_len", "grid", "kernel_size", "shape", "scale", "dtype"),
    [
        ("column", 0, (5, 7), 3, (1, 1, 33, 16), 0.3, torch.float32),
        ("row", 40, (3, 3), 3, (1, 1, 21, 8), 0.3, torch.float32),
        ("conv_corner", 20, (3, 5), 5, (1, 1, 20, 16), 0.3, torch.float32),
        ("conv", 3, (1, 4), 3, (2, 3, 7, 24), 0.3, torch.bfloat16),
        ("axial_row", 16, (4, 4), 3, (1, 1, 32, 1), 0.3, torch.float32),
        ("row", 0, (2, 50), 3, (1, 1, 100, 16), 0.3, torch.float32),
        ("axial_row", 0, (2, 48), 3, (1, 1, 90, 16), 0.3, torch.float32),
        ("column", 5, (50, 2), 3, (1, 1, 103, 16), 0.3, torch.float32),
        ("conv", 0, (20, 4), 41, (1, 1, 70, 16), 0.3, torch.float32),
        ("row", 16, (3, 5), 3, (1, 1, 31, 16), -0.7, torch.float32),
        ("conv", 17, (3, 5), 3, (1, 1, 32, 16), 0.0, torch.float32),
        ("column", 9, (3, 5), 3, (1, 2, 24, 40), 1e-9, torch.float16),
        ("conv", 18, (3, 6), 3, (1, 1, 33, 33), 0.3, torch.float16),
    ],
)
def test_other_shapes(kind, text_len, grid, kernel_size, shape, scale, dtype, triton_device, small_blocks):
    check_random(triton_device, AttentionPattern(kind, text_len, grid, kernel_size), scale, *shape, dtype=dtype)


@pytest.mark.parametrize("head_dim", (64, 80, 200, 256))
def test_blocks_of_the_table(head_dim, triton_device):
    check_random(triton_device, AttentionPattern("conv", 5, (3, 6), 3), 0.2, 1, 1, 22, head_dim, dtype=torch.bfloat16)
    check_random(triton_device, AttentionPattern("row", 5, (3, 6)), 0.2, 1, 1, 23, head_dim)


@pytest.mark.parametrize(
    ("kind", "queries", "text", "keys"),
    [("row", 32, 16, 16), ("conv", 16, 32, 16), ("column", 16, 16, 32)],
)
def test_blocks_of_unequal_sizes(kind, queries, text, keys, triton_device):
    sizes = {"BLOCK_QUERIES": queries, "BLOCK_TEXT": text, "BLOCK_KEYS": keys, "BLOCK_SAMPLES": 16}
    with blocks_of(lambda *_row: sizes):
        check_random(triton_device, AttentionPattern(kind, 33, (2, 20), 3), 0.3, 1, 1, 72, 16)


@pytest.mark.parametrize("number", range(6))
def test_random_shapes_and_blocks(number, triton_device):
    draw = random.Random(f"attention {number}")
    grid = draw.randint(1, 6), draw.randint(1, 12)
    pattern = AttentionPattern(draw.choice(KINDS), draw.randint(0, 40), grid, draw.choice((1, 3, 5, 11)))
    shape = 1, draw.randint(1, 2), draw.randint(1, pattern.seq_len), draw.choice((3, 8, 16, 20, 33))
    with blocks_of(lambda *_row: defaultdict(lambda: draw.choice((16, 32)))):
        check_random(triton_device, pattern, draw.uniform(-1, 1), *shape, dtype=draw.choice(DTYPES))


def test_split_queries(split, triton_device, small_blocks):
    check_random(triton_device, AttentionPattern("row", 20, (4, 10)), 0.3, 1, 1, 60, 16)


def test_strided_views_are_read_in_place(triton_device, small_blocks):
    torch.manual_seed(2)
    pattern = AttentionPattern("column", 7, (3, 5))
    fused = torch.randn(2, 22, 3, 2, 20, device=triton_device)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    pitched = torch.full((2, 2, 22, 23), torch.nan, device=triton_device)
    grad_out = pitched[..., 1:21].copy_(torch.randn(2, 2, 22, 20))
    check([(q, k, v, grad_out)], pattern, 0.2)


@pytest.mark.parametrize("kind", ("column", "conv"))
def test_extreme_logits(kind, triton_device, small_blocks):
    """Logits of about 1e4 whose dot products are exact: a rounded log-sum-exp would lose the gradients."""
    torch.manual_seed(3)
    draws = [random_inputs(triton_device, 1, 1, 40, 16) for _ in range(10)]
    draws = [((50 * q).round(), (50 * k).round(), v, grad_out) for q, k, v, grad_out in draws]
    check(draws, AttentionPattern(kind, 11, (5, 6), 3), 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_output_depends_on_exactly_the_keys_that_the_mask_allows(kind, triton_device, small_blocks):
    pattern, seq = AttentionPattern(kind, 19, (5, 5), 3), 43
    q, k = random_inputs(triton_device, 1, 1, seq, seq, count=2)
    # One-hot values: out[i, j] is query i's weight of key j, positive where it is visible and exactly 0 elsewhere.
    weights = sparse_attention(q, k, torch.eye(seq, device=triton_device)[None, None], pattern, scale=0.1)[0, 0]
    assert torch.equal(weights > 0, pattern.mask(seq, triton_device))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[0]))


@pytest.mark.parametrize("kind", ("row", "conv_corner"))
def test_hidden_keys_have_no_influence(kind, triton_device, small_blocks):
    pattern, seq, query = AttentionPattern(kind, 6, (5, 6), 3), 33, 29
    inputs = random_inputs(triton_device, 1, 1, seq, 16)
    changed = [x.clone() for x in inputs]
    hidden = ~pattern.mask(seq, triton_device)[query]
    changed[1][:, :, hidden], changed[2][:, :, hidden] = -1e4, 3e38
    outs = [sparse_attention(q, k, v, pattern)[0, 0, query] for q, k, v, _ in (inputs, changed)]
    assert torch.equal(*outs)


def test_single_token_and_empty_batch(triton_device):
    pattern = AttentionPattern("conv", 0, (2, 3), 3)
    q, k, v, grad_out = random_inputs(triton_device, 2, 3, 1, 5)
    out, dq, dk, dv = gradients(sparse_attention, q, k, v, grad_out, pattern, None)
    assert torch.equal(out, v) and torch.equal(dv, grad_out) and not dq.any() and not dk.any()
    for shape in ((0, 3, 6, 5), (2, 0, 6, 5), (2, 3, 0, 5)):
        empty = torch.empty(shape, device=triton_device)
        for result in gradients(sparse_attention, empty, empty, empty, empty, pattern, None):
            assert result.shape == shape


def test_a_nan_is_not_swallowed(triton_device, small_blocks):
    q, k, v = random_inputs(triton_device, 1, 1, 20, 4, count=3)
    q[0, 0, 7, 2] = torch.nan
    out = sparse_attention(q, k, v, AttentionPattern("row", 4, (4, 4)))
    assert out[0, 0, 7].isnan().all() and out[0, 0, :7].isfinite().all() and out[0, 0, 8:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(dtype, triton_device, small_blocks):
    q, k, v = random_inputs(triton_device, 1, 2, 30, 8, dtype=dtype, count=3)
    _, lse = torch.ops.dalle_kernels.sparse_attention(q, k, v, "column", 6, 4, 6, 11, -0.7)
    hidden = ~AttentionPattern("column", 6, (4, 6)).mask(device=triton_device)
    scores = (q.double() @ k.double().transpose(-2, -1) * -0.7).masked_fill(hidden, -torch.inf)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_same_bits_run_to_run(split, triton_device, small_blocks):
    draw = random_inputs(triton_device, 1, 1, 45, 16)
    first, second = (gradients(sparse_attention, *draw, AttentionPattern("conv", 17, (4, 8), 3), None) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_output_joins_heads_without_a_copy(triton_device, small_blocks):
    draw = random_inputs(triton_device, 2, 2, 10, 4)
    for result in gradients(sparse_attention, *draw, AttentionPattern("row", 4, (2, 3)), None):
        joined = result.transpose(1, 2).flatten(2)
        assert joined.data_ptr() == result.data_ptr()


def test_float64_is_not_served(triton_device):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64, device=triton_device)
    with pytest.raises(dalle_kernels.ProviderError, match=r"'triton' was forced but .* got float64"):
        sparse_attention(x, x, x, AttentionPattern("row", 0, (2, 2)))


# ---- Decoding


def decode_inputs(device, pattern, prompts, samples, heads, head_dim, dtype):
    """q, k, v ``[rows, heads, seq, head_dim]``, strided; a prompt's samples share their text."""
    joint = torch.randn(prompts, samples, pattern.seq_len, 3, heads, head_dim)
    joint[:, :, : pattern.text_len] = joint[:, :1, : pattern.text_len]
    return joint.to(dtype).to(device).flatten(0, 1).permute(2, 0, 3, 1, 4).unbind()


def decode_all(pattern, q, k, v, samples, given, scale):
    """Every token from ``given`` on, one by one; what must be written before it is read is NaN at first."""
    with poisoned_allocations():
        cache = KVCache(pattern, len(q) // samples, q.shape[1], q.shape[3], q.dtype, q.device, samples)
        if given:
            cache.prefill(k[::samples, :, :given], v[::samples, :, :given])
        steps = [
            decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache, scale) for i in range(given, q.shape[2])
        ]
    return torch.cat(steps, dim=2)


def check_decode(device, pattern, prompts, samples, heads, head_dim, dtype, given, scale=None):
    torch.manual_seed(4)
    q, k, v = decode_inputs(device, pattern, prompts, samples, heads, head_dim, dtype)
    actual = decode_all(pattern, q, k, v, samples, given, scale)
    with dalle_kernels.use("reference"):
        plain = decode_all(pattern, q, k, v, samples, given, scale)
        exact = sparse_attention(q.double(), k.double(), v.double(), pattern, scale)[:, :, given:]
    assert_accurate(actual, plain, exact, f"{pattern}, {samples} samples")


@pytest.mark.parametrize("samples", (1, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_equals_the_last_row(kind, samples, triton_device, small_blocks):
    pattern = AttentionPattern(kind, 5, (3, 4), 3)
    check_decode(triton_device, pattern, 1, samples, 1, 8, torch.float32, 0 if samples == 1 else 5)


@pytest.mark.parametrize(
    ("kind", "text_len", "grid", "kernel_size", "samples", "dtype", "given"),
    [
        ("conv", 0, (4, 3), 5, 1, torch.float32, 0),  # as wide as the grid
        ("conv", 2, (6, 2), 3, 1, torch.bfloat16, 2),
        ("conv_corner", 1, (3, 3), 5, 2, torch.float32, 1),
        ("conv_corner", 17, (1, 4), 3, 2, torch.float16, 17),
        ("row", 33, (2, 3), 3, 1, torch.bfloat16, 30),
        ("row", 33, (2, 3), 3, 18, torch.bfloat16, 36),
        ("causal", 16, (2, 9), 3, 2, torch.float32, 30),
    ],
)
def test_other_steps(kind, text_len, grid, kernel_size, samples, dtype, given, triton_device, small_blocks):
    pattern = AttentionPattern(kind, text_len, grid, kernel_size)
    check_decode(triton_device, pattern, 1, samples, 1, 20, dtype, given, -0.4)


@pytest.mark.parametrize(("samples", "dtype"), [(1, torch.bfloat16), (3, torch.float32)])
def test_last_steps_by_the_blocks_of_the_table(samples, dtype, triton_device):
    pattern = AttentionPattern("conv", 33, (4, 8), 3)
    check_decode(triton_device, pattern, 1, samples, 1, 64, dtype, pattern.seq_len - 2)


@pytest.mark.parametrize("samples", (1, 3))
def test_split_keys(samples, split, triton_device, small_blocks):
    check_decode(triton_device, AttentionPattern("column", 37, (20, 2)), 2, samples, 1, 8, torch.float32, 74)


@pytest.mark.parametrize(("samples", "dtype"), [(1, torch.int32), (2, torch.int64)])
def test_a_position_on_the_device(samples, dtype, split, triton_device, small_blocks):
    pattern, given = AttentionPattern("conv", 3, (2, 4), 3), 0 if samples == 1 else 3
    q, k, v = decode_inputs(triton_device, pattern, 1, samples, 1, 8, torch.float32)
    expected = decode_all(pattern, q, k, v, samples, given, 0.3)
    cache = KVCache(pattern, 1, 1, 8, device=triton_device, samples_per_prompt=samples)
    if given:
        cache.prefill(k[::samples, :, :given], v[::samples, :, :given])
    position = torch.full((1,), given, dtype=dtype, device=triton_device)
    for i in range(given, pattern.seq_len):
        out = decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache, 0.3, position)
        position += 1
        assert torch.equal(out, expected[:, :, i - given : i - given + 1])


def test_a_place_without_a_step_gives_nan_and_leaves_the_cache(split, triton_device):
    assert_no_step(triton_device, "triton")


def test_a_text_token_of_several_samples_is_not_served(triton_device):
    cache = KVCache(AttentionPattern("row", 3, (2, 2)), 1, 1, 4, device=triton_device, samples_per_prompt=2)
    token = torch.zeros(2, 1, 1, 4, device=triton_device)
    with pytest.raises(dalle_kernels.ProviderError, match="text tokens of one sample a prompt"):
        torch.ops.dalle_kernels.decode_attention(
            token, token, token, cache.text, cache.image, 1, *cache.pattern_arguments, 0.5
        )
