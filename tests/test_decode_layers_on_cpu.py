"""The CUDA kernels of a step through layers themselves, compiled for the CPU by tests/cuda_on_cpu, against float64."""

from __future__ import annotations

import on_cpu
import pytest
import torch
from test_decode_layers import TEXT_LEN, draw_layers, new_caches

import dalle_kernels
from dalle_kernels import LayerWeights, decode_layers
from dalle_kernels.testing import assert_accurate
from dalle_kernels.transformer import ops


def filled_caches(prompts, heads, head_dim, dtype, samples, count):
    caches = new_caches(prompts, heads, head_dim, dtype, samples, count, "cpu")
    generator = torch.Generator().manual_seed(9)
    for cache in caches:
        cache.prefill(*torch.randn(2, prompts, heads, TEXT_LEN, head_dim, generator=generator).bfloat16().to(dtype))
    return caches


def compiled_step(cuda_on_cpu, x, layers, caches, place, overtaking):
    """The token after the text by the compiled kernels, its place a number or of the device."""
    weights = [tensor for layer in layers for tensor in layer]
    held = [tensor for cache in caches for tensor in (cache.text, cache.image)]
    kinds = ",".join(cache.pattern.kind for cache in caches)
    described = ops._cuda_layers(x, weights, held, kinds, *caches[0].pattern_arguments[1:])
    refused = cuda_on_cpu.decode_layers_refusal(**described)
    assert refused is None, refused
    out = x.clone()
    head_dim = caches[0].head_dim
    scratch = torch.full((len(x) * (4 * caches[0].heads * head_dim + ops._hidden(weights)),), torch.nan, dtype=x.dtype)
    where = {"position": TEXT_LEN, "place": 0, "wide_place": False}
    if place is not None:
        where = {"position": 0, "place": place.data_ptr(), "wide_place": place.dtype == torch.int64}
    tensors = {"x": out.data_ptr(), "scratch": scratch.data_ptr()}
    with on_cpu.overtaking(cuda_on_cpu, overtaking):  # what is held back ends while the tensors are there
        cuda_on_cpu.decode_layers(**described, **where, **tensors, scale=head_dim**-0.5, epsilon=1e-5, executor=0)
    return out


# Rows, samples of a prompt, dim, heads, head_dim, hidden: up to four tiles of 16 outputs a block, of which there are
# 132 at most; runs of 32 inputs, of which twelve warps have none, one or several, and more than the ring or a batch
# holds.
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 1, 32, 1, 64, 64), torch.bfloat16),
        ((8, 1, 96, 1, 64, 2144), torch.float16),
        ((4, 2, 64, 2, 64, 6368), torch.bfloat16),
        ((3, 1, 2400, 1, 64, 32), torch.float16),
        ((5, 1, 32, 17, 128, 32), torch.bfloat16),
    ],
    ids=str,
)
def test_a_step_meets_the_error_rule(cuda_on_cpu, sizes, dtype):
    rows, samples, dim, heads, head_dim, hidden = sizes
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        layers = [LayerWeights(*layer) for layer in draw_layers(dim, heads, head_dim, hidden, dtype, 2)]
        double = [LayerWeights(*(tensor.double() for tensor in layer)) for layer in layers]
        x = (torch.randn(rows, dim) + 1).to(dtype)
        place = None if seed else torch.tensor(TEXT_LEN, dtype=torch.int64 if rows % 2 else torch.int32)
        caches = [
            filled_caches(rows // samples, heads, head_dim, of, samples, 2) for of in (dtype, dtype, torch.float64)
        ]
        actual = compiled_step(cuda_on_cpu, x, layers, caches[0], place, overtaking=seed)
        with dalle_kernels.use("reference"):
            results.append((actual, decode_layers(x, layers, caches[1]), decode_layers(x.double(), double, caches[2])))
    assert_accurate(*zip(*results))


def test_what_it_refuses(cuda_on_cpu):
    layers = [LayerWeights(*layer) for layer in draw_layers(32, 1, 64, 64, torch.bfloat16, 1)]
    weights = [tensor for layer in layers for tensor in layer]
    cache = filled_caches(1, 1, 64, torch.bfloat16, 1, 1)[0]
    described = ops._cuda_layers(
        torch.zeros(1, 32).bfloat16(), weights, [cache.text, cache.image], "row", *cache.pattern_arguments[1:]
    )
    for change, message in (
        ({"dtype": 0}, "takes bfloat16"),
        ({"sizes": (9, *described["sizes"][1:])}, "8 rows"),
        ({"sizes": (1, 1, 2, 32, *described["sizes"][4:])}, "head_dim of 64 or 128"),
        ({"sizes": (*described["sizes"][:4], 40, 64, TEXT_LEN)}, "multiples of 32"),
        ({"sizes": (*described["sizes"][:4], 8032, 64, TEXT_LEN)}, "shared memory"),
        ({"weights": [address + 2 for address in described["weights"]]}, "multiples of 16"),
    ):
        assert message in cuda_on_cpu.decode_layers_refusal(**{**described, **change})
    wide = {"sizes": (*described["sizes"][:4], 1920, 64, TEXT_LEN)}
    assert cuda_on_cpu.decode_layers_refusal(**{**described, **wide}) is None
    with on_cpu.device(cuda_on_cpu, 86, 80, shared=99 << 10):
        assert "shared memory" in cuda_on_cpu.decode_layers_refusal(**{**described, **wide})
