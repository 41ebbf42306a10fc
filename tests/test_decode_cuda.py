"""The compiled kernels of decoding on a GPU: attention and layers, every step, against float64."""

from __future__ import annotations

import pytest
import torch
from test_decode import assert_no_step
from test_decode_layers import draw_layers

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, LayerWeights, _native, decode_attention, decode_layers
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.testing import assert_accurate, poisoned_allocations

GPU = torch.cuda.is_available() and _native.unavailable("cuda") is None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU and the compiled CUDA library")]


def tokens(rows, heads, count, dtype, head_dim=64):
    """q, k and v ``[rows, heads, count, head_dim]`` on the GPU, strided as a model makes them."""
    return torch.randn(rows, count, 3, heads, head_dim).to("cuda", dtype).permute(2, 0, 3, 1, 4).unbind()


def attend(provider, pattern, given_tokens, own, samples, on_device):
    """Each sample's ``own`` tokens, q, k and v, one by one, after the keys and values that its prompt was given."""
    (k, v), (rows, heads, count, head_dim) = given_tokens, own[0].shape
    given = k.shape[2]
    with poisoned_allocations():
        cache = KVCache(pattern, rows // samples, heads, head_dim, k.dtype, "cuda", samples)
        if given:
            cache.prefill(k, v)
        steps, place = [], torch.full((1,), given, device="cuda", dtype=torch.int32 if given % 2 else torch.int64)
        with dalle_kernels.use(provider):
            for i in range(count):
                token = (x[:, :, i : i + 1] for x in own)
                steps.append(decode_attention(*token, cache, position=place if on_device else None))
                place += 1
    return torch.cat(steps, dim=2)


def check(pattern, prompts, samples, heads, dtype=torch.bfloat16, given=None, head_dim=64):
    given = pattern.text_len if given is None else given
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        _, *given_tokens = tokens(prompts, heads, given, dtype, head_dim)
        own = tokens(prompts * samples, heads, pattern.seq_len - given, dtype, head_dim)
        actual = attend("native", pattern, given_tokens, own, samples, on_device=seed % 2 == 1)
        again = attend("native", pattern, given_tokens, own, samples, on_device=seed % 2 == 0)
        assert torch.equal(actual, again)
        plain = attend("reference", pattern, given_tokens, own, samples, on_device=False)
        doubled = ([x.double() for x in part] for part in (given_tokens, own))
        exact = attend("reference", pattern, *doubled, samples, on_device=False)
        results.append((actual, plain, exact))
    assert_accurate(*zip(*results), str(pattern))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step(kind, dtype):
    for shape in ((5, (4, 6), 3), (0, (3, 5), 5), (1, (5, 3), 7)):
        pattern = AttentionPattern(kind, *shape)
        check(pattern, 2, 1, 2, dtype, given=0)
        check(pattern, 2, 3, 2, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_many_keys_heads_and_samples(kind):
    pattern = AttentionPattern(kind, 257, (32, 32))
    for prompts, samples, heads in ((8, 1, 62), (1, 32, 62), (1, 1, 3), (2, 17, 5)):
        check(pattern, prompts, samples, heads, given=pattern.seq_len - 2)
    pattern = AttentionPattern(kind, 1100, (4, 4))
    for samples in (1, 2):
        check(pattern, 1, samples, 1, given=pattern.seq_len - 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("samples", "heads"), [(1, 1), (1, 134), (3, 1), (17, 2)])
def test_heads_of_128(samples, heads, dtype):
    for kind, text_len in (("row", 5), ("conv", 300)):
        pattern = AttentionPattern(kind, text_len, (4, 16))
        check(pattern, 1, samples, heads, dtype, given=pattern.seq_len - 2, head_dim=128)


@pytest.mark.parametrize(("samples", "heads"), [(1, 1), (1, 134), (3, 1)])
def test_short_caches(samples, heads):
    """By 16 warps a head, by 4, and by blocks of samples."""
    pattern = AttentionPattern("row", 20, (4, 4))
    check(pattern, 1, samples, heads, given=pattern.seq_len - 1)


def test_a_place_without_a_step_gives_nan_and_leaves_the_cache():
    assert_no_step("cuda", "native", torch.bfloat16, 64)


def step(provider, x, layers, heads, samples, pattern, on_device):
    """The last token, every key before it drawn at random."""
    with poisoned_allocations():
        caches = [
            KVCache(AttentionPattern(kind, *pattern), len(x) // samples, heads, 64, x.dtype, "cuda", samples)
            for kind in ("row", "column", "conv")
        ]
    generator = torch.Generator().manual_seed(9)
    for cache in caches:
        shape = (2, cache.batch, heads, cache.pattern.seq_len - 1, 64)
        cache.prefill(*torch.randn(shape, generator=generator).bfloat16().to("cuda", x.dtype))
    place = torch.full((1,), caches[0].length, device="cuda") if on_device else None
    with dalle_kernels.use(provider):
        return decode_layers(x, layers, caches, position=place)


def test_short_layers():
    layers = [LayerWeights(*(tensor.cuda() for tensor in draw_layers(32, 1, 64, 64, torch.bfloat16, 1)[0]))] * 3
    x = torch.ones(3, 32, device="cuda", dtype=torch.bfloat16)
    settings = 1, 3, (20, (4, 4))
    assert_accurate(
        step("native", x, layers, *settings, on_device=True),
        step("reference", x, layers, *settings, on_device=False),
        step("reference", x.double(), [LayerWeights(*map(torch.Tensor.double, layers[0]))] * 3, *settings, False),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 32, 1, 64), (8, 1, 96, 1, 2144), (4, 2, 416, 2, 6368), (3, 1, 2400, 1, 32), (8, 1, 1920, 30, 7680)],
    ids=str,
)
def test_layers(sizes, dtype):
    rows, samples, dim, heads, hidden = sizes
    results = []
    for seed in range(4):
        torch.manual_seed(seed)
        layers = [
            LayerWeights(*(tensor.cuda() for tensor in layer))
            for layer in draw_layers(dim, heads, 64, hidden, dtype, 3)
        ]
        double = [LayerWeights(*(tensor.double() for tensor in layer)) for layer in layers]
        x = (torch.randn(rows, dim) + 1).to("cuda", dtype)
        settings = heads, samples, (20, (8, 8))
        actual = step("native", x, layers, *settings, on_device=True)
        for _ in range(5):  # kernels that begin early, and must not too early
            assert torch.equal(actual, step("native", x, layers, *settings, on_device=False))
        exact = step("reference", x.double(), double, *settings, on_device=False)
        results.append((actual, step("reference", x, layers, *settings, on_device=False), exact))
    assert_accurate(*zip(*results))
