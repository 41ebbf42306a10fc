"""KVCache, decode_attention and SparseSelfAttention against sparse_attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, SparseSelfAttention, decode_attention, sparse_attention
from dalle_kernels.attention.pattern import KINDS

SHAPES = [(5, (4, 6), 3), (0, (3, 5), 5), (4, (5, 3), 7), (3, (1, 7), 3), (2, (6, 1), 5)]


def shared_inputs(pattern, prompts, samples, heads, head_dim, shared_tokens, dtype=torch.float64):
    """q, k, v of ``prompts * samples`` sequences whose first tokens are the same for all samples of a prompt."""
    inputs = torch.randn(3, prompts, samples, heads, pattern.seq_len, head_dim, dtype=dtype)
    inputs[:, :, :, :, :shared_tokens] = inputs[:, :, :1, :, :shared_tokens]
    return inputs.flatten(1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid", "kernel_size"), SHAPES)
def test_every_step_equals_the_last_row_of_sparse_attention(kind, text_len, grid, kernel_size):
    pattern = AttentionPattern(kind, text_len, grid, kernel_size)
    prompts, samples, heads, head_dim = 2, 3, 2, 4
    for given in {text_len, min(text_len + grid[1] + 1, pattern.seq_len)}:  # without and with image priming
        q, k, v = shared_inputs(pattern, prompts, samples, heads, head_dim, given)
        whole = sparse_attention(q, k, v, pattern, scale=0.7)
        cache = KVCache(pattern, prompts, heads, head_dim, torch.float64, samples_per_prompt=samples)
        cache.prefill(k[::samples, :, :given], v[::samples, :, :given])
        for i in range(given, pattern.seq_len):
            step = slice(i, i + 1)
            out = decode_attention(q[:, :, step], k[:, :, step], v[:, :, step], cache, scale=0.7)
            torch.testing.assert_close(out, whole[:, :, step])
        assert cache.length == pattern.seq_len


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_from_the_first_text_token(dtype):
    pattern = AttentionPattern("conv", 6, (4, 4), 3)
    q, k, v = shared_inputs(pattern, 2, 1, 3, 16, 0, dtype)
    whole = sparse_attention(q.double(), k.double(), v.double(), pattern)
    cache = KVCache(pattern, 2, 3, 16, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for i in range(pattern.seq_len):
        out = decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), whole[:, :, i : i + 1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "image_slots"),
    [("causal", 1024), ("row", 33), ("column", 1024), ("conv", 166), ("axial_row", 32), ("conv_corner", 331)],
)
def test_the_cache_holds_only_what_can_still_be_seen(kind, image_slots):
    pattern = AttentionPattern(kind, 257, (32, 32))
    cache = KVCache(pattern, 2, 3, 8, torch.bfloat16, samples_per_prompt=5)
    assert cache.nbytes == 2 * 2 * 3 * 8 * 2 * (257 + 5 * image_slots)


def test_a_reset_cache_serves_another_batch():
    pattern = AttentionPattern("row", 3, (3, 3))
    cache = KVCache(pattern, 1, 1, 4, torch.float64)
    for _ in range(2):
        q, k, v = shared_inputs(pattern, 1, 1, 1, 4, 0)
        whole = sparse_attention(q, k, v, pattern)
        cache.reset()
        cache.prefill(k[:, :, :5], v[:, :, :5])
        out = [decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache) for i in range(5, 12)]
        torch.testing.assert_close(torch.cat(out, dim=2), whole[:, :, 5:])


def test_decoding_works_under_inference_mode_and_after_it():
    pattern = AttentionPattern("conv", 2, (3, 3), 3)
    q, k, v = shared_inputs(pattern, 1, 1, 1, 4, 0)
    cache = KVCache(pattern, 1, 1, 4, torch.float64)
    with torch.inference_mode():
        inside = [decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache) for i in range(6)]
    outside = [decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache) for i in range(6, 11)]
    torch.testing.assert_close(torch.cat(inside + outside, dim=2), sparse_attention(q, k, v, pattern))


def full_cache():
    cache = KVCache(AttentionPattern("row", 2, (1, 2)), 1, 1, 4)
    cache.prefill(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    return cache


def test_wrong_use_of_a_cache_gets_one_clear_sentence():
    pattern = AttentionPattern("row", 3, (2, 2))
    one = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="expected samples_per_prompt to be a positive integer, got 0"):
        KVCache(pattern, 1, 1, 4, samples_per_prompt=0)
    with pytest.raises(ValueError, match="expected a head_dim between 1 and 256, got 257"):
        KVCache(pattern, 1, 1, 257)
    with pytest.raises(TypeError, match=r"expected a cache of dtype float32, .* got torch.int64"):
        KVCache(pattern, 1, 1, 4, torch.int64)
    with pytest.raises(TypeError, match="expected pattern to be an AttentionPattern, got str"):
        KVCache("row", 1, 1, 4)
    with pytest.raises(ValueError, match="expected at most the pattern's 4 tokens, the cache is full"):
        decode_attention(one, one, one, full_cache())
    with pytest.raises(ValueError, match="expected an empty cache to prefill, got one holding 4 tokens"):
        full_cache().prefill(one, one)
    with pytest.raises(ValueError, match="expected at most the pattern's 7 tokens to prefill, got 8"):
        KVCache(pattern, 1, 1, 4).prefill(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4))
    with pytest.raises(
        ValueError, match="expected the 3 text tokens that samples share to be prefilled at once, got 2"
    ):
        KVCache(pattern, 1, 1, 4, samples_per_prompt=2).prefill(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    two = torch.zeros(2, 1, 1, 4)
    with pytest.raises(
        ValueError, match="expected the 3 text tokens that samples share to be prefilled, got a step at 0"
    ):
        decode_attention(two, two, two, KVCache(pattern, 1, 1, 4, samples_per_prompt=2))
    with pytest.raises(ValueError, match=r"expected keys of shape \[1, 1, 1, 4\] for this cache, got \[2, 1, 1, 4\]"):
        decode_attention(two, two, two, KVCache(pattern, 1, 1, 4))
    with pytest.raises(TypeError, match=r"expected keys of the cache's dtype torch.float16, got torch.float32"):
        decode_attention(one, one, one, KVCache(pattern, 1, 1, 4, torch.float16))
    with pytest.raises(TypeError, match="expected cache to be a KVCache, got NoneType"):
        decode_attention(one, one, one, None)
    with pytest.raises(TypeError, match="expected k to be a tensor, got list"):
        KVCache(pattern, 1, 1, 4).prefill([0.0], one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_is_attention_between_two_projections(kind):
    torch.manual_seed(0)
    pattern = AttentionPattern(kind, 4, (3, 4), 3)
    module = SparseSelfAttention(24, 3, pattern, head_dim=10).double()
    x = torch.randn(2, 14, 24, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (3, 10)).transpose(1, 2) for part in module.qkv(x).chunk(3, dim=-1))
    scores = (q @ k.transpose(-2, -1) * 10**-0.5).masked_fill(~pattern.mask(14), -torch.inf)
    expected = module.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 14, 30))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_the_module_decodes_what_it_computes_at_once(kind):
    torch.manual_seed(0)
    pattern = AttentionPattern(kind, 4, (3, 4), 3)
    module = SparseSelfAttention(24, 3, pattern, bias=False, scale=0.4)
    x = torch.randn(2, 2, pattern.seq_len, 24)
    x[:, :, :4] = x[:, :1, :4]
    x = x.flatten(0, 1)
    whole = module(x)
    cache = module.new_cache(2, samples_per_prompt=2)
    assert cache.dtype == torch.float32
    torch.testing.assert_close(module(x[::2, :4], cache), whole[::2, :4], atol=1e-5, rtol=1e-4)
    counted, position = module.new_cache(2, samples_per_prompt=2), torch.tensor(4)
    module(x[::2, :4], counted)
    for i in range(4, pattern.seq_len):
        for step in (module(x[:, i : i + 1], cache), module(x[:, i : i + 1], counted, position)):
            torch.testing.assert_close(step, whole[:, i : i + 1], atol=1e-5, rtol=1e-4)
        position += 1


def test_the_module_trains_compiles_and_loads():
    torch.manual_seed(0)
    pattern = AttentionPattern("row", 4, (3, 4))
    module = SparseSelfAttention(24, 3, pattern)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "qkv.weight": (72, 24),
        "qkv.bias": (72,),
        "out.weight": (24, 24),
        "out.bias": (24,),
    }
    x = torch.randn(2, 16, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (module, compiled):
        module.zero_grad()
        function(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for expected, actual in zip(*gradients):
        torch.testing.assert_close(actual, expected)
    twin = SparseSelfAttention(24, 3, pattern)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))


def test_the_module_runs_under_autocast():
    pattern = AttentionPattern("column", 4, (3, 4))
    module = SparseSelfAttention(24, 3, pattern)
    x = torch.randn(2, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), module(x), atol=3e-2, rtol=3e-2)


def test_wrong_modules_and_inputs_get_one_clear_sentence():
    pattern = AttentionPattern("row", 4, (3, 4))
    with pytest.raises(
        ValueError, match="expected dim to be a multiple of heads, or head_dim to be given, got 24 and 5"
    ):
        SparseSelfAttention(24, 5, pattern)
    with pytest.raises(ValueError, match="expected a head_dim between 1 and 256, got 0"):
        SparseSelfAttention(24, 3, pattern, head_dim=0)
    with pytest.raises(ValueError, match="expected a positive dim and number of heads, got dim 0 and 3 heads"):
        SparseSelfAttention(0, 3, pattern)
    with pytest.raises(ValueError, match=r"expected an input of shape \[batch, seq, 24\], got \[2, 16, 23\]"):
        SparseSelfAttention(24, 3, pattern)(torch.randn(2, 16, 23))
    other = SparseSelfAttention(24, 3, AttentionPattern("column", 4, (3, 4)))
    with pytest.raises(ValueError, match=r"expected a cache of this layer's pattern .*'row'.*, got one of .*'column'"):
        SparseSelfAttention(24, 3, pattern)(torch.randn(2, 4, 24), other.new_cache(2))


def test_the_public_names():
    for name in ("AttentionPattern", "KVCache", "SparseSelfAttention", "decode_attention", "sparse_attention"):
        assert name in dalle_kernels.__all__
