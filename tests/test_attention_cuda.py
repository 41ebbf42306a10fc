"""The compiled attention kernel for Hopper GPUs against masked softmax attention in float64, on such a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from plain_attention import masked_softmax

import dalle_kernels
from dalle_kernels import AttentionPattern, _native, sparse_attention
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.testing import assert_accurate, poisoned_allocations

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER or _native.unavailable("cuda") is not None, reason="no Hopper GPU, or not built"),
]
DTYPES = (torch.bfloat16, torch.float16)


def draw(batch, heads, seq, head_dim, dtype, heads_first=False):
    """q, k and v on the GPU, stored with tokens before heads or after."""
    if heads_first:
        return [torch.randn(batch, heads, seq, head_dim, device="cuda").to(dtype) for _ in range(3)]
    return [torch.randn(batch, seq, heads, head_dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(3)]


def native(q, k, v, pattern, scale=None):
    """The operator's output and statistics, from memory that was NaN."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = pattern.kind, pattern.text_len, *pattern.grid, pattern.kernel_size, scale
    with dalle_kernels.use("native"), poisoned_allocations():
        return dalle_kernels.ops()["sparse_attention"](q, k, v, *arguments)


def check(q, k, v, pattern, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = native(q, k, v, pattern, scale)
    again = native(q, k, v, pattern, scale)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    exact, exact_lse = masked_softmax(q.double(), k.double(), v.double(), pattern, scale)
    assert_accurate(out, masked_softmax(q, k, v, pattern, scale)[0], exact, name=f"out of {pattern}")
    assert (lse - exact_lse).abs().max() < 1e-5 * max(1.0, exact_lse.abs().max().item())


CASES = [
    ("row", 256, (32, 32), 1280),
    ("column", 256, (32, 32), 1280),
    ("conv", 256, (32, 32), 1280),
    ("row", 257, (32, 32), 1280),
    ("column", 257, (32, 32), 1280),
    ("conv", 257, (32, 32), 1280),
    ("causal", 0, (32, 32), 1024),
    ("axial_row", 256, (32, 32), 1279),
    ("conv_corner", 64, (16, 16), 320),
    ("row", 77, (24, 40), 1037),
    ("column", 77, (24, 40), 800),
    ("conv", 77, (24, 40), 1000),
    ("row", 0, (5, 7), 35),
    ("row", 256, (32, 32), 200),
    ("row", 256, (32, 32), 257),
    ("column", 13, (3, 5), 20),
    ("conv", 130, (16, 16), 386),
    ("row", 13, (16, 16), 269),
    ("conv", 273, (32, 32), 1297),
    ("row", 80, (8, 8), 144),
    ("row", 1, (1, 1), 1),
]


def native_gradients(grad_out, q, k, v, out, lse, pattern, scale):
    """The backward operator's results, in memory that was NaN."""
    arguments = pattern.kind, pattern.text_len, *pattern.grid, pattern.kernel_size, scale
    with dalle_kernels.use("native"), poisoned_allocations():
        return dalle_kernels.ops()["sparse_attention_backward"](grad_out, q, k, v, out, lse, *arguments)


def check_gradients(q, k, v, pattern, scale=0.125):
    grad_out = torch.randn_like(q)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    doubled = [x.double().requires_grad_() for x in (q, k, v)]
    exact_out, exact_lse = masked_softmax(*doubled, pattern, scale)
    exact = torch.autograd.grad(exact_out, doubled, grad_out.double())
    plain = torch.autograd.grad(masked_softmax(*inputs, pattern, scale)[0], inputs, grad_out)
    saved = exact_out.detach().to(q.dtype), exact_lse.detach().float().contiguous()
    actual, again = (native_gradients(grad_out, q, k, v, *saved, pattern, scale) for _ in range(2))
    assert all(map(torch.equal, actual, again))
    for name, *gradients in zip(("dq", "dk", "dv"), actual, plain, exact):
        assert_accurate(*gradients, name=f"{name} of {pattern}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, dtype):
    kind, text_len, grid, seq = case
    torch.manual_seed(seq)
    for batch, heads, scale, heads_first in ((2, 3, None, False), (1, 40, -0.3, True)):
        check(*draw(batch, heads, seq, 64, dtype, heads_first), AttentionPattern(kind, text_len, grid), scale)


# Not of one token: the gradients of its scores are zero, and are rounded otherwise.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*(case for case in CASES if case[3] > 1), ("column", 300, (64, 7), 745)], ids=str)
def test_gradients_match_float64(case, dtype):
    kind, text_len, grid, seq = case
    torch.manual_seed(seq)
    for batch, heads, scale, heads_first in ((2, 3, 0.125, False), (1, 40, -0.3, True)):
        check_gradients(*draw(batch, heads, seq, 64, dtype, heads_first), AttentionPattern(kind, text_len, grid), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_float64_in_wide_heads(kind, dtype):
    torch.manual_seed(0)
    check_gradients(*draw(2, 5, 1280, 128, dtype), AttentionPattern(kind, 257, (32, 32)))


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize("scale", [0.0, 30.0], ids=["zero", "extreme"])
def test_gradients_of_zero_and_extreme_scales(kind, scale):
    torch.manual_seed(0)
    check_gradients(*draw(1, 4, 1280, 64, torch.bfloat16), AttentionPattern(kind, 256, (32, 32)), scale)


def test_gradients_of_slices_of_one_tensor():
    torch.manual_seed(0)
    joined = torch.randn(2, 1280, 3, 5, 64, device="cuda").bfloat16()
    check_gradients(*(joined[:, :, i].transpose(1, 2) for i in range(3)), AttentionPattern("conv", 256, (32, 32)))


@pytest.mark.parametrize("kind", ["row", "column", "conv", "axial_row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_len", [256, 257])
def test_matches_float64_in_wide_heads(text_len, dtype, kind):
    torch.manual_seed(0)
    check(*draw(2, 5, 1280, 128, dtype), AttentionPattern(kind, text_len, (32, 32)))


def test_steps_of_half_a_tile_of_columns():
    torch.manual_seed(0)
    check(*draw(2, 3, 449, 128, torch.bfloat16), AttentionPattern("column", 257, (64, 3)))


@pytest.mark.parametrize("kind", ["row", "conv"])
def test_short_sequences_of_wide_heads(kind):
    torch.manual_seed(0)
    q, k, v = draw(1, 2, 269, 128, torch.bfloat16)
    check(q, k, v, AttentionPattern(kind, 13, (16, 16), 3))
    check_gradients(q, k, v, AttentionPattern(kind, 13, (16, 16), 3))


def test_more_heads_than_multiprocessors():
    torch.manual_seed(0)
    check(*draw(3, 61, 320, 64, torch.bfloat16), AttentionPattern("row", 65, (16, 16)))


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize("scale", [0.0, 30.0], ids=["zero", "extreme"])
def test_zero_and_extreme_scales(kind, scale):
    torch.manual_seed(0)
    check(*draw(1, 4, 1280, 64, torch.bfloat16), AttentionPattern(kind, 256, (32, 32)), scale)


def test_reads_slices_of_one_tensor():
    torch.manual_seed(0)
    joined = torch.randn(2, 1280, 3, 5, 64, device="cuda").bfloat16()
    q, k, v = (joined[:, :, part].transpose(1, 2) for part in range(3))
    check(q, k, v, AttentionPattern("conv", 256, (32, 32)))


def test_gradients_come_from_the_statistics():
    torch.manual_seed(0)
    pattern = AttentionPattern("column", 257, (32, 32))
    inputs = [x.requires_grad_() for x in draw(1, 3, 1280, 64, torch.bfloat16)]
    grad_out = torch.randn(1, 3, 1280, 64, device="cuda").bfloat16()
    with dalle_kernels.use("native"):
        out = sparse_attention(*inputs, pattern)
    actual = torch.autograd.grad(out, inputs, grad_out)
    plain = torch.autograd.grad(masked_softmax(*inputs, pattern, 0.125)[0], inputs, grad_out)
    doubled = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(masked_softmax(*doubled, pattern, 0.125)[0], doubled, grad_out.double())
    for name, *gradients in zip(("dq", "dk", "dv"), actual, plain, exact):
        assert_accurate(*gradients, name=name)


def test_a_captured_call_replays():
    torch.manual_seed(0)
    pattern = AttentionPattern("row", 256, (32, 32))
    q, k, v = draw(1, 4, 1280, 64, torch.bfloat16)
    expected = native(q, k, v, pattern)
    fresh = draw(1, 4, 1280, 64, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with dalle_kernels.use("native"), torch.cuda.graph(graph):
        out = sparse_attention(q, k, v, pattern)
    graph.replay()
    assert torch.equal(out, expected[0])
    for tensor, values in zip((q, k, v), fresh):
        tensor.copy_(values)
    graph.replay()
    assert torch.equal(out, native(*fresh, pattern)[0])


def test_a_captured_backward_replays():
    torch.manual_seed(0)
    pattern = AttentionPattern("column", 257, (32, 32))
    q, k, v = draw(1, 4, 1280, 64, torch.bfloat16)
    saved, grad_out = native(q, k, v, pattern), torch.randn_like(q)
    expected = native_gradients(grad_out, q, k, v, *saved, pattern, 0.125)
    arguments = pattern.kind, pattern.text_len, *pattern.grid, pattern.kernel_size, 0.125
    graph = torch.cuda.CUDAGraph()
    with dalle_kernels.use("native"), torch.cuda.graph(graph):
        gradients = dalle_kernels.ops()["sparse_attention_backward"](grad_out, q, k, v, *saved, *arguments)
    for _ in range(2):
        for gradient in gradients:
            gradient.fill_(math.nan)
        graph.replay()
        assert all(map(torch.equal, gradients, expected))


def test_a_nan_stays_in_its_rows():
    torch.manual_seed(0)
    q, k, v = draw(1, 2, 1280, 64, torch.bfloat16)
    q[0, 1, 700] = math.nan
    out, lse = native(q, k, v, AttentionPattern("row", 256, (32, 32)))
    rows = torch.zeros(1, 2, 1280, dtype=torch.bool, device="cuda")
    rows[0, 1, 700] = True
    assert torch.equal(out.isnan().any(-1), rows) and torch.equal(lse.isnan(), rows)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.float(), "bfloat16 and float16"),
        (lambda x: x[..., :32], "head_dim of 64 or 128"),
        (lambda x: torch.randn(1, 2, 1280, 68, device="cuda").bfloat16()[..., :64], "multiples of 16 bytes"),
        (lambda x: x[:, :1].expand(1, 2, 1280, 64), "not zero"),
    ],
)
def test_what_it_does_not_serve_is_told_and_served_otherwise(change, sentence):
    pattern = AttentionPattern("row", 256, (32, 32))
    q, k, v = (change(x) for x in draw(1, 2, 1280, 64, torch.bfloat16))
    with dalle_kernels.use("native"), pytest.raises(dalle_kernels.ProviderError, match=sentence):
        sparse_attention(q, k, v, pattern)
    assert sparse_attention(q, k, v, pattern).isfinite().all()


def test_it_is_the_default_only_where_it_was_measured_ahead():
    pattern = ("row", 256, 32, 32, 11, 0.125)
    many, few = draw(8, 62, 1280, 64, torch.bfloat16), draw(1, 2, 1280, 64, torch.bfloat16)
    assert dalle_kernels.explain("sparse_attention", *many, *pattern).runs == "native"
    assert dalle_kernels.explain("sparse_attention", *few, *pattern).runs != "native"
