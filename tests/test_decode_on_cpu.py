"""The CUDA kernels of a decode step themselves, compiled for the CPU by tests/cuda_on_cpu, against float64."""

from __future__ import annotations

import on_cpu
import pytest
import torch
from test_decode import decode_all, draw

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, sparse_attention
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.testing import assert_accurate, poisoned_allocations

HEAD_DIM = 64


def decode(cuda_on_cpu, pattern, q, k, v, samples, positions, scale, on_device):
    """The steps at ``positions``, one after the other; what must be written before it is read is NaN at first."""
    rows, heads, _, head_dim = q.shape
    with poisoned_allocations():
        cache = KVCache(pattern, rows // samples, heads, head_dim, q.dtype, samples_per_prompt=samples)
        if positions.start:
            cache.prefill(k[::samples, :, : positions.start], v[::samples, :, : positions.start])
        steps = [torch.empty(rows, heads, 1, head_dim, dtype=q.dtype) for _ in positions]
    kind, *numbers = cache.pattern_arguments
    for position, out in zip(positions, steps, strict=True):
        token = (x[:, :, position : position + 1] for x in (q, k, v))
        place = torch.tensor(position, dtype=torch.int32 if position % 2 else torch.int64)
        where = (0, place.data_ptr(), place.dtype == torch.int64) if on_device else (position, 0, False)
        cuda_on_cpu.decode_attention(
            *token, cache.text, cache.image, out, *where, KINDS.index(kind), *numbers, scale, 0
        )
    return torch.cat(steps, dim=2)


def check(
    cuda_on_cpu,
    pattern,
    prompts,
    samples,
    heads,
    positions,
    dtype=torch.bfloat16,
    scale=0.125,
    on_device=False,
    head_dim=HEAD_DIM,
):
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        q, k, v = draw(pattern, prompts, samples, heads, head_dim, dtype, positions.start)
        actual = decode(cuda_on_cpu, pattern, q, k, v, samples, positions, scale, on_device)
        end = positions.stop
        q, k, v = (x[:, :, :end] for x in (q, k, v))
        with dalle_kernels.use("reference"):
            plain = decode_all(pattern, q, k, v, samples, positions.start, scale)
            exact = sparse_attention(q.double(), k.double(), v.double(), pattern, scale)[:, :, positions.start :]
        results.append((actual, plain, exact))
    assert_accurate(*zip(*results), str(pattern))


# Text length, grid and kernel size.
SHAPES = [(5, (4, 6), 3), (0, (3, 5), 5), (1, (5, 3), 7), (3, (1, 7), 3), (2, (6, 1), 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step(cuda_on_cpu, kind, shape):
    pattern = AttentionPattern(kind, *shape)
    check(cuda_on_cpu, pattern, 1, 1, 1, range(pattern.seq_len))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_every_step_of_samples(cuda_on_cpu, kind, shape):
    pattern = AttentionPattern(kind, *shape)
    check(cuda_on_cpu, pattern, 1, 2, 1, range(pattern.text_len, pattern.seq_len), on_device=True)


# Four warps take a head where there are many, else 16, in rounds of 160 and 320 keys; of shared text 16 warps take
# tiles of 16 keys, two at once, and of a sample's image 32 keys.
@pytest.mark.parametrize(
    ("prompts", "samples", "heads", "head_dim", "text_len", "grid", "kind", "dtype"),
    [
        (1, 1, 134, 64, 170, (8, 16), "row", torch.bfloat16),
        (2, 1, 1, 64, 700, (8, 16), "conv", torch.float16),
        (2, 17, 2, 64, 257, (8, 16), "conv", torch.bfloat16),
        (1, 3, 1, 64, 800, (8, 16), "causal", torch.float16),
        # Of heads of 128 a warp takes half as many keys at once, and of shared text one tile at a time.
        (1, 1, 134, 128, 5, (3, 16), "column", torch.bfloat16),
        (1, 1, 2, 128, 170, (3, 16), "row", torch.float16),
        (1, 3, 1, 128, 300, (3, 16), "conv", torch.bfloat16),
        (2, 17, 1, 128, 5, (3, 16), "row", torch.float16),
    ],
)
def test_many_keys_heads_and_samples(cuda_on_cpu, prompts, samples, heads, head_dim, text_len, grid, kind, dtype):
    pattern = AttentionPattern(kind, text_len, grid)
    last = pattern.seq_len - 1
    check(cuda_on_cpu, pattern, prompts, samples, heads, range(last, last + 1), dtype, head_dim=head_dim)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("scale", [0.0, -0.3, 20.0])
def test_scales(cuda_on_cpu, scale, samples):
    pattern = AttentionPattern("column", 40, (3, 4))
    check(cuda_on_cpu, pattern, 2, samples, 2, range(46, 49), scale=scale)


def test_a_place_without_a_step_gives_nan_and_leaves_the_cache(cuda_on_cpu):
    pattern = AttentionPattern("column", 3, (2, 2))
    for samples, places in ((1, (-1, 7, 100)), (2, (0, 2, 7))):
        cache = KVCache(pattern, 1, 2, HEAD_DIM, torch.bfloat16, samples_per_prompt=samples)
        for held in (cache.text, cache.image):
            held.normal_()
        before = cache.text.clone(), cache.image.clone()
        token = torch.randn(samples, 2, 1, HEAD_DIM).bfloat16()
        kind, *numbers = cache.pattern_arguments
        for at in places:
            place, out = torch.tensor(at), torch.empty_like(token)
            settings = (0, place.data_ptr(), True, KINDS.index(kind), *numbers, 0.125, 0)
            cuda_on_cpu.decode_attention(token, token, token, cache.text, cache.image, out, *settings)
            assert out.isnan().all()
            assert torch.equal(cache.text, before[0]) and torch.equal(cache.image, before[1])


def refusal_of(cuda_on_cpu, samples, text_len, head_dim):
    pattern = AttentionPattern("row", text_len, (4, 4))
    cache = KVCache(pattern, 1, 1, head_dim, torch.float16, samples_per_prompt=samples)
    token = torch.zeros(samples, 1, 1, head_dim, dtype=torch.float16)
    kind, *numbers = cache.pattern_arguments
    return cuda_on_cpu.decode_attention_refusal(
        token, token, token, cache.text, cache.image, KINDS.index(kind), *numbers
    )


def test_it_takes_heads_of_64_and_128(cuda_on_cpu):
    for head_dim in (64, 128):
        assert refusal_of(cuda_on_cpu, 1, 5, head_dim) is None
    for head_dim in (32, 72, 256):
        assert "head_dim of 64 or 128" in refusal_of(cuda_on_cpu, 1, 5, head_dim)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("samples", "text_len"), [(1, 5), (2, 0), (2, 5)])
def test_shared_text_is_refused_where_its_memory_does_not_fit(cuda_on_cpu, samples, text_len, head_dim):
    """As on the smaller GPUs of compute capability 8.6 and 8.9; 8.0 gives a block 163 KiB."""
    with on_cpu.device(cuda_on_cpu, 80, 80, shared=163 << 10):
        assert refusal_of(cuda_on_cpu, samples, text_len, head_dim) is None
    with on_cpu.device(cuda_on_cpu, 86, 80, shared=99 << 10):
        refusal = refusal_of(cuda_on_cpu, samples, text_len, head_dim)
    assert "shared memory" in refusal if samples > 1 and text_len else refusal is None
