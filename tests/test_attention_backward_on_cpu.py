"""The Hopper kernels of attention's backward themselves, compiled for the CPU by tests/cuda_on_cpu, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from plain_attention import masked_softmax

from dalle_kernels import AttentionPattern
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.testing import assert_accurate


def gradients_of(cuda_on_cpu, grad_out, q, k, v, out, lse, pattern, scale):
    """dq, dk and dv from memory that was NaN."""
    gradients = [torch.full_like(q, math.nan) for _ in range(3)]
    settings = (KINDS.index(pattern.kind), pattern.text_len, *pattern.grid, pattern.kernel_size)
    bytes_needed = cuda_on_cpu.sparse_attention_backward_scratch(tuple(q.shape), *settings)
    scratch = torch.full((bytes_needed // 4,), math.nan)
    cuda_on_cpu.sparse_attention_backward(
        grad_out, q, k, v, out, lse, *gradients, scratch.data_ptr(), *settings, scale, 0
    )
    return gradients


@pytest.mark.parametrize(
    ("kind", "text_len", "grid", "kernel_size", "seq", "heads", "dtype", "scale", "head_dim"),
    [
        ("row", 64, (8, 8), 3, 128, 1, torch.bfloat16, 0.125, 64),
        ("row", 0, (5, 7), 3, 35, 2, torch.float16, 0.125, 64),
        ("row", 13, (16, 16), 3, 269, 2, torch.bfloat16, 0.125, 64),
        ("row", 200, (8, 8), 3, 150, 1, torch.bfloat16, 0.125, 64),
        ("row", 150, (3, 150), 3, 400, 1, torch.bfloat16, 0.125, 64),
        ("column", 13, (3, 5), 3, 20, 2, torch.bfloat16, -0.3, 64),
        ("column", 77, (7, 13), 3, 165, 1, torch.bfloat16, 0.125, 64),
        ("column", 33, (40, 5), 3, 230, 1, torch.float16, 0.125, 64),
        ("conv", 77, (9, 13), 5, 190, 1, torch.bfloat16, 0.125, 64),
        ("conv", 130, (12, 16), 11, 322, 1, torch.bfloat16, 0.0, 64),
        ("causal", 0, (16, 16), 3, 200, 1, torch.bfloat16, 0.125, 64),
        ("conv_corner", 7, (9, 16), 5, 150, 1, torch.bfloat16, 0.125, 64),
        ("axial_row", 5, (9, 16), 3, 140, 1, torch.float16, 3.0, 64),
        ("row", 65, (8, 8), 3, 129, 2, torch.bfloat16, 0.1, 128),
        ("column", 33, (40, 5), 3, 230, 1, torch.bfloat16, -0.3, 128),
        ("conv", 77, (9, 13), 5, 190, 1, torch.float16, 0.1, 128),
    ],
)
def test_gradients_match_float64(cuda_on_cpu, kind, text_len, grid, kernel_size, seq, heads, dtype, scale, head_dim):
    torch.manual_seed(seq)
    pattern = AttentionPattern(kind, text_len, grid, kernel_size)
    # As slices of one tensor, tokens before heads.
    q, k, v, grad_out = torch.randn(2, seq, 4, heads, head_dim).to(dtype).permute(2, 0, 3, 1, 4)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    doubled = [x.double().requires_grad_() for x in (q, k, v)]
    exact_out, exact_lse = masked_softmax(*doubled, pattern, scale)
    exact = torch.autograd.grad(exact_out, doubled, grad_out.double())
    plain = torch.autograd.grad(masked_softmax(*inputs, pattern, scale)[0], inputs, grad_out)
    out, lse = exact_out.detach().to(dtype), exact_lse.detach().float().contiguous()
    actual = gradients_of(cuda_on_cpu, grad_out, q, k, v, out, lse, pattern, scale)
    for name, *gradients in zip(("dq", "dk", "dv"), actual, plain, exact):
        assert_accurate(*gradients, name=name)
