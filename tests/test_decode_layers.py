"""A decode step through a stack of layers: against float64 and plain PyTorch at every step, and its errors."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, LayerWeights, _native, decode_layers, sparse_attention
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.attention.slots import slot_table
from dalle_kernels.linear.ops import FEW_ROWS
from dalle_kernels.testing import assert_accurate, poisoned_allocations

TEXT_LEN, GRID = 3, (2, 3)
native_only = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")


def draw_layers(dim, heads, head_dim, hidden, dtype=torch.float32, count=6):
    width = heads * head_dim

    def affine(outputs, inputs):
        return torch.randn(outputs, inputs) * inputs**-0.5, torch.randn(outputs)

    def norm():
        return 1 + 0.3 * torch.randn(dim), torch.randn(dim)

    return [
        LayerWeights(
            *(
                tensor.to(dtype)
                for pair in (
                    norm(),
                    affine(3 * width, dim),
                    affine(dim, width),
                    norm(),
                    affine(hidden, dim),
                    affine(dim, hidden),
                )
                for tensor in pair
            )
        )
        for _ in range(count)
    ]


def new_caches(prompts, heads, head_dim, dtype, samples=1, count=6, device="cpu"):
    patterns = [AttentionPattern(kind, TEXT_LEN, GRID, 3) for kind in KINDS[:count]]
    return [KVCache(pattern, prompts, heads, head_dim, dtype, device, samples) for pattern in patterns]


def decode_all(x, layers, prompts, heads, head_dim, samples):
    """Every token of ``x`` ``[rows, seq, dim]`` after the text, whose keys and values are drawn at random, alike."""
    with poisoned_allocations():
        caches = new_caches(prompts, heads, head_dim, x.dtype, samples)
        torch.manual_seed(9)
        for cache in caches:
            cache.prefill(*torch.randn(2, prompts, heads, TEXT_LEN, head_dim).to(torch.bfloat16).to(x.dtype))
        return torch.stack([decode_layers(token, layers, caches) for token in x.unbind(1)], dim=1)


def assert_meets_the_error_rule(dtype, prompts, samples, dim, heads, head_dim, hidden):
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers = draw_layers(dim, heads, head_dim, hidden, dtype)
        x = torch.randn(prompts * samples, GRID[0] * GRID[1], dim).to(dtype)
        sizes = (prompts, heads, head_dim, samples)
        actual = decode_all(x, layers, *sizes)
        with dalle_kernels.use("reference"):
            plain = decode_all(x, layers, *sizes)
            exact = decode_all(x.double(), [LayerWeights(*(t.double() for t in layer)) for layer in layers], *sizes)
        results.append((actual, plain, exact))
    assert_accurate(*zip(*results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 8, 1, 8, 16), (2, 3, 24, 3, 10, 96), (3, 1, 7, 2, 5, 9), (1, 5, 33, 2, 16, 600), (4, 2, 256, 2, 64, 1024)],
)
def test_every_step_meets_the_error_rule(sizes, dtype):
    assert_meets_the_error_rule(dtype, *sizes)


def test_the_reference_is_the_stack_over_the_whole_sequence():
    torch.manual_seed(0)
    rows, heads, head_dim = 2, 3, 4
    layers = draw_layers(20, heads, head_dim, 28, torch.float64)
    caches = new_caches(rows, heads, head_dim, torch.float64)
    whole = x = torch.randn(rows, TEXT_LEN + GRID[0] * GRID[1], 20, dtype=torch.float64)
    for layer, cache in zip(layers, caches):
        normed = F.layer_norm(whole, (20,), layer.attention_norm_weight, layer.attention_norm_bias)
        joint = F.linear(normed, layer.query_key_value_weight, layer.query_key_value_bias)
        q, k, v = joint.unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
        out = sparse_attention(q, k, v, cache.pattern).transpose(1, 2).flatten(2)
        whole = whole + F.linear(out, layer.projection_weight, layer.projection_bias)
        normed = F.layer_norm(whole, (20,), layer.mlp_norm_weight, layer.mlp_norm_bias)
        expanded = F.gelu(F.linear(normed, layer.expansion_weight, layer.expansion_bias))
        whole = whole + F.linear(expanded, layer.contraction_weight, layer.contraction_bias)
    steps = [decode_layers(token, layers, caches) for token in x.unbind(1)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole)
    assert all(cache.length == TEXT_LEN + GRID[0] * GRID[1] for cache in caches)


def test_extreme_activations():
    """GELU far out on both sides, and a row without variance."""
    layers = draw_layers(16, 2, 8, 64, count=1)
    wide = layers[0]._replace(expansion_bias=torch.linspace(-1e4, 1e4, 64))
    x = torch.cat((torch.randn(1, 16), torch.full((1, 16), 3.0)))
    out = decode_layers(x, [wide], new_caches(2, 2, 8, torch.float32, count=1))
    with dalle_kernels.use("reference"):
        expected = decode_layers(x, [wide], new_caches(2, 2, 8, torch.float32, count=1))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(("dim", "hidden"), [(0, 4), (4, 0)])
def test_empty_layers(dim, hidden):
    torch.manual_seed(2)
    draws = [t for _ in range(2) for t in (1 + torch.rand(dim), torch.rand(dim))]
    attention = [torch.rand(24, dim), torch.rand(24), torch.rand(dim, 8), torch.rand(dim)]
    mlp = [torch.rand(hidden, dim), torch.rand(hidden), torch.rand(dim, hidden), torch.rand(dim)]
    layers, x = [LayerWeights(*draws[:2], *attention, *draws[2:], *mlp)], torch.randn(2, dim)
    out = decode_layers(x, layers, new_caches(2, 2, 4, torch.float32, count=1))
    with dalle_kernels.use("reference"):
        assert torch.equal(out, decode_layers(x, layers, new_caches(2, 2, 4, torch.float32, count=1)))


@native_only
def test_slots_outlive_their_cache(monkeypatch):
    """Another thread may need room for other patterns' slots while a kernel reads the addresses of these."""
    caches = new_caches(1, 2, 4, torch.float32)
    listed, call = [], _native.call

    def clear_and_call(*arguments, **named):
        for cache in caches:
            for slots in slot_table(cache.device, *cache.pattern_arguments)[:1]:
                listed.extend([] if slots.listed is None else [weakref.ref(slots.listed)])
        del slots
        slot_table.cache_clear()
        assert all(slots() is not None for slots in listed)
        call(*arguments, **named)

    monkeypatch.setattr(_native, "call", clear_and_call)
    for cache in caches:
        cache.length = TEXT_LEN
    decode_layers(torch.randn(1, 12), draw_layers(12, 2, 4, 20), caches)
    assert len(listed) == 2  # those of the convolutional kinds


@native_only
def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(1)
    layers, x = draw_layers(256, 2, 64, 1024), torch.randn(6, 4, 256)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(decode_all(x, layers, 2, 2, 64, 3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def operator_arguments(dtype=torch.float32, rows=2):
    layers, caches = draw_layers(12, 2, 4, 20, dtype, count=2), new_caches(rows, 2, 4, dtype, count=2)
    for cache in caches:
        cache.image.zero_(), cache.text.zero_()
    tensors = [tensor for layer in layers for tensor in layer], [t for c in caches for t in (c.text, c.image)]
    settings = (",".join(KINDS[:2]), *caches[0].pattern_arguments[1:], 0.5, 1e-5)
    return torch.randn(rows, 12).to(dtype), *tensors, 5, *settings


def test_opcheck():
    arguments = operator_arguments()
    torch.library.opcheck(torch.ops.dalle_kernels.decode_layers.default, arguments)
    x, weights, caches, position, *settings = arguments
    at = (x, weights, caches, torch.tensor([position]), *settings)
    torch.library.opcheck(torch.ops.dalle_kernels.decode_layers_at.default, at)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_position_as_a_tensor(samples):
    """The same bits as by number, and NaN where there is no step."""
    layers, last = draw_layers(12, 2, 4, 20), TEXT_LEN + GRID[0] * GRID[1]
    caches, others = (new_caches(2, 2, 4, torch.float32, samples) for _ in range(2))
    for cache in (*caches, *others):
        cache.prefill(*torch.ones(2, 2, 2, TEXT_LEN, 4))
    for place in range(TEXT_LEN, last):
        x = torch.randn(2 * samples, 12)
        found = decode_layers(x, layers, others, position=torch.tensor([place]))
        assert torch.equal(found, decode_layers(x, layers, caches))
    for place in (-1, last, *([0] if samples > 1 else [])):
        assert decode_layers(x, layers, others, position=torch.tensor(place)).isnan().all()


@native_only
def test_which_provider_runs_and_why():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dalle_kernels.explain("decode_layers", *operator_arguments(dtype)).runs == "native"
    for arguments, why in (
        (operator_arguments(torch.float64), "got float64"),
        (operator_arguments(rows=FEW_ROWS + 1), f"1 to {FEW_ROWS} rows, got {FEW_ROWS + 1}"),
    ):
        found = dalle_kernels.explain("decode_layers", *arguments)
        assert found.runs == "reference" and why in str(found)


def test_a_step_compiles_into_one_graph():
    torch._dynamo.reset()
    layers, x = draw_layers(12, 2, 4, 20, count=2), torch.randn(2, 12)
    expected = decode_layers(x + 1, layers, new_caches(2, 2, 4, torch.float32, count=2))
    step = torch.compile(lambda x, caches: decode_layers(x + 1, layers, caches), fullgraph=True, backend="aot_eager")
    caches = new_caches(2, 2, 4, torch.float32, count=2)
    assert torch.equal(step(x, caches), expected)
    assert [cache.length for cache in caches] == [1, 1]


def test_inductor_serves_every_position():
    torch._dynamo.reset()
    layers, tokens = draw_layers(12, 2, 4, 20), torch.randn(4, 2, 12)
    expected_caches, caches = new_caches(2, 2, 4, torch.float32), new_caches(2, 2, 4, torch.float32)
    step = torch.compile(lambda x: decode_layers(x, layers, caches), fullgraph=True)
    for x in tokens:
        assert torch.equal(step(x), decode_layers(x, layers, expected_caches))
    assert [cache.length for cache in caches] == [len(tokens)] * len(caches)


def test_mistakes_get_one_clear_sentence():
    layers, x = draw_layers(12, 2, 4, 20, count=2), torch.randn(2, 12)
    caches = new_caches(2, 2, 4, torch.float32, count=2)
    with pytest.raises(ValueError, match="expected one cache a layer, got 2 layers and 1 caches"):
        decode_layers(x, layers, caches[:1])
    for epsilon in (-1e-5, float("nan")):
        with pytest.raises(ValueError, match="expected epsilon at or above 0 and finite, got"):
            decode_layers(x, layers, caches, epsilon=epsilon)
    with pytest.raises(ValueError, match=r"expected x of shape \[2, dim\], got \[3, 12\]"):
        decode_layers(torch.randn(3, 12), layers, caches)
    with pytest.raises(ValueError, match=r"expected weights of shapes .*'contraction_weight': \[20, 12\]"):
        decode_layers(x, [layers[0], layers[1]._replace(contraction_weight=torch.randn(20, 12))], caches)
    with pytest.raises(TypeError, match=r"expected weights and caches of x's dtype torch\.float16, got torch\.float32"):
        decode_layers(x.half(), layers, caches)
    other = KVCache(AttentionPattern("row", TEXT_LEN + 1, GRID), 2, 2, 4)
    with pytest.raises(ValueError, match="expected patterns that differ in kind alone"):
        decode_layers(x, layers, [caches[0], other])
    caches[1].length = 1
    with pytest.raises(ValueError, match="expected caches of one length"):
        decode_layers(x, layers, caches)
    caches[0].length = caches[0].pattern.seq_len
    with pytest.raises(ValueError, match="the cache is full"):
        decode_layers(x, layers, caches)
