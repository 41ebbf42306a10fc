"""Gumbel-softmax and its codebook product by Triton's kernels: on a GPU, else by the interpreter."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from test_gumbel_softmax import SEED, TAU, _plain, _plain_codebook, _random, _run

import dalle_kernels
from dalle_kernels import philox
from dalle_kernels._triton_configurations import TABLE, Configuration, use_configuration
from dalle_kernels.gumbel_softmax import ops, reference
from dalle_kernels.testing import assert_accurate, poisoned_allocations, strided_views

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ZERO = torch.tensor(0)
# Rows that a tile holds, rows in blocks of columns, columns that lie apart.
SHAPES = [((9, 33), -1), ((3, 150), -1), ((2, 65, 2, 7), 1), ((7, 5, 3), 0), ((3, 1), 1)]


@pytest.fixture
def blocks(triton_device, monkeypatch):
    """Several blocks already in small problems; gives the device."""
    pytest.importorskip("triton")
    from dalle_kernels.gumbel_softmax import triton_kernels

    monkeypatch.setattr(triton_kernels, "_CLASSES", {op: {"short rows": 100} for op in triton_kernels._CLASSES})
    in_rows = Configuration({"ROWS": 1, "GROUPS": 16}, num_warps=1)
    apart = Configuration({"ROWS": 16, "GROUPS": 4}, num_warps=1)
    with (
        use_configuration("gumbel_softmax", "blocks of rows", in_rows),
        use_configuration("gumbel_softmax_backward", "blocks of rows", in_rows),
        use_configuration("gumbel_softmax", "columns apart", apart),
        use_configuration("gumbel_softmax_backward", "columns apart", apart),
    ):
        yield triton_device


def _scalars(device, tau, seed=SEED, offset=ZERO):
    return [torch.as_tensor(scalar).to(device) for scalar in (seed, offset, torch.as_tensor(tau))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim", "tau"), [(*shape, tau) for shape, tau in zip(SHAPES, (1, 0.25, 0.5, 2, 1))])
def test_sample_kl_and_gradient_meet_the_error_rule(shape, dim, tau, dtype, blocks):
    logits = _random(shape, seed=5).to(dtype).double()
    weights = [_random(size, seed=6).to(dtype).double() for size in (shape, reference.kl_shape(logits, dim))]
    with poisoned_allocations():
        call = [logits.to(blocks)], dtype, [weight.to(blocks) for weight in weights]
        actual = _run(lambda t: ops.gumbel_softmax_kl_op(t, *_scalars(blocks, float(tau)), False, dim), *call)
    assert [result.dtype for result in actual] == [dtype, torch.float32, dtype]
    near, exact = (_run(lambda t: _plain(t, tau, dim), [logits], kind, weights) for kind in (dtype, torch.float64))
    for name, result, *others in zip(("y", "kl", "gradient"), actual, near, exact):
        assert_accurate(result.cpu(), *others, name)


def _check_codebook(shape, dim, width, dtype, device):
    inputs = [_random(shape, seed=8).to(dtype).double(), _random((shape[dim], width), seed=9).to(dtype).double()]
    sizes = reference.embedding_shape(*inputs, dim), reference.kl_shape(inputs[0], dim)
    weights = [_random(size, seed=10).to(dtype).double() for size in sizes]
    with poisoned_allocations():
        call = [tensor.to(device) for tensor in inputs], dtype, [weight.to(device) for weight in weights]
        actual = _run(lambda t, c: ops.gumbel_codebook_op(t, c, *_scalars(device, 0.7), dim), *call)
    near, exact = (
        _run(lambda t, c: _plain_codebook(t, c, 0.7, dim), inputs, kind, weights) for kind in (dtype, torch.float64)
    )
    for name, result, *others in zip(("embedding", "kl", "logits' gradient", "codebook's"), actual, near, exact):
        assert_accurate(result.cpu(), *others, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim", "width"), [((19, 70), -1, 5), ((2, 65, 2, 7), 1, 31)])
def test_codebook_meets_the_error_rule(shape, dim, width, dtype, triton_device):
    _check_codebook(shape, dim, width, dtype, triton_device)


@pytest.mark.parametrize(("shape", "dim", "dtype"), [((70, 9), 1, torch.float32), ((2, 9, 35), 1, torch.bfloat16)])
def test_codebook_in_several_blocks_of_its_width_and_runs_of_rows(shape, dim, dtype, triton_device):
    small = Configuration({"ROWS": 16, "GROUPS": 4, "WIDTH": 16}, num_warps=1)
    with ExitStack() as stack:
        for op, shape_class in TABLE:
            if op.startswith("gumbel_codebook"):
                stack.enter_context(use_configuration(op, shape_class, small))
        _check_codebook(shape, dim, 20, dtype, triton_device)


def test_codebook_takes_its_own_dtype_and_layout(triton_device):
    logits, codebook = _random((4, 6), 12, torch.float32), _random((6, 300), 13, torch.bfloat16)
    results = []
    for provider, table in (("triton", codebook.t().contiguous().t()), ("reference", codebook)):
        with dalle_kernels.use(provider):
            leaves = [tensor.to(triton_device).requires_grad_() for tensor in (logits, table)]
            outputs = ops.gumbel_codebook_op(*leaves, *_scalars(triton_device, 0.5), 1)
            grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
            results.append([*outputs, *grads])
    for got, wanted in zip(*results):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 2**32 - 3, -5, 2**63 - 3])
def test_uniforms_equal_the_definition_bit_for_bit(seed, offset, triton_device):
    pytest.importorskip("triton")
    import triton_uniforms

    rows, columns = 7, 13
    numbers = (torch.tensor(offset) + torch.arange(rows)).view(rows, 1, 1)
    expected = philox.complement_uniform(torch.tensor(seed), numbers, columns).squeeze(2)
    for axis in (0, 1):
        v = triton_uniforms.uniforms(*_scalars(triton_device, 1.0, seed, offset)[:2], rows, columns, axis)
        assert torch.equal(v.cpu().view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES[1:3])
def test_hard_samples_are_the_reference_s(shape, dim, dtype, blocks):
    """Where no two scores tie to rounding, which these do not; the gradient is the soft sample's."""
    logits, weight = _random(shape, 16, dtype), _random(shape, 17, dtype)
    scalars = _scalars(blocks, TAU, offset=torch.tensor(11))
    leaf = logits.to(blocks).requires_grad_()
    hard, soft = (ops.gumbel_softmax_op(leaf, *scalars, kind, dim) for kind in (True, False))
    with dalle_kernels.use("reference"):
        assert torch.equal(hard, ops.gumbel_softmax_op(leaf, *scalars, True, dim))
    grads = [torch.autograd.grad(y, leaf, weight.to(blocks))[0] for y in (hard, soft)]
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(*grads, rtol=8 * unit, atol=8 * unit)


def test_strides_are_read_in_place_and_parts_of_a_batch_draw_the_whole_s_noise(triton_device):
    logits = _random((4, 6, 5), 3, torch.float32).to(triton_device)
    scalars = _scalars(triton_device, TAU)
    for dim in (1, 2):
        expected = ops.gumbel_softmax_kl_op(logits, *scalars, False, dim)
        permuted = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        for name, view in [*strided_views(logits), ("permuted", permuted)]:
            torch.testing.assert_close(ops.gumbel_softmax_kl_op(view, *scalars, False, dim), expected, msg=name)
        rows = torch.tensor(2 * logits[0].numel() // logits.shape[dim])
        part = ops.gumbel_softmax_op(logits[2:], *_scalars(triton_device, TAU, offset=rows), False, dim)
        torch.testing.assert_close(part, expected[0][2:])


def test_bad_rows_stay_alone(triton_device):
    logits = _random((8, 6), 26, torch.float32).to(triton_device)
    clean, codebook = logits.clone(), _random((6, 4), 27, torch.float32).to(triton_device)
    logits[1, 2], logits[3, 0], logits[5] = math.nan, math.inf, -math.inf
    bad, good = [1, 3, 5], [0, 2, 4, 6, 7]
    scalars = _scalars(triton_device, TAU)
    for call in (
        lambda t: ops.gumbel_softmax_kl_op(t, *scalars, False, 1),
        lambda t: ops.gumbel_softmax_kl_op(t, *scalars, True, 1),
        lambda t: ops.gumbel_codebook_op(t, codebook, *scalars, 1),
    ):
        results = []
        for source in (logits, clean):
            leaf = source.clone().requires_grad_()
            outputs = call(leaf)
            weights = [torch.ones_like(output).cumsum(-1) for output in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, leaf, weights)])
        for spoiled, expected in zip(*results):
            assert spoiled[bad].isnan().all()
            torch.testing.assert_close(spoiled[good], expected[good])


@pytest.mark.parametrize("dim", [0, 1])
def test_extreme_logits_stay_finite_in_every_block(dim, blocks):
    rows = [[1e4, -1e4, 0.0, 3.0], [-1e4] * 4, [1e4] * 4, [0.0, -math.inf, 1.0, -2.0]]
    logits = torch.cat([torch.tensor(rows), torch.full((4, 80), -math.inf), torch.tensor(rows)], 1)
    logits = (logits if dim == 1 else logits.t()).contiguous().to(blocks).requires_grad_()
    for tau in (1.0, 1e-3):
        y, kl = ops.gumbel_softmax_kl_op(logits, *_scalars(blocks, tau), False, dim)
        (grad,) = torch.autograd.grad([y, kl], logits, [torch.ones_like(y).cumsum(dim), torch.ones_like(kl)])
        assert torch.isfinite(y).all() and torch.isfinite(kl).all() and torch.isfinite(grad).all()
        torch.testing.assert_close(y.sum(dim).cpu(), torch.ones(4))
        excluded = logits == -math.inf
        assert not y[excluded].any() and not grad[excluded].any()


def test_no_rows_and_same_bits(triton_device):
    scalars = _scalars(triton_device, TAU)
    for shape, dim in (((0, 7), 1), ((3, 7, 0), 1)):
        logits = torch.zeros(shape, device=triton_device, requires_grad=True)
        codebook = torch.zeros(7, 2, device=triton_device, requires_grad=True)
        embedding, kl = ops.gumbel_codebook_op(logits, codebook, *scalars, dim)
        y, _ = ops.gumbel_softmax_kl_op(logits, *scalars, False, dim)
        grads = torch.autograd.grad((embedding.sum(), kl.sum(), y.sum()), (logits, codebook))
        assert grads[0].shape == shape and not grads[1].any()
    inputs = [_random(shape, 30, torch.float32).to(triton_device) for shape in ((33, 40), (40, 5))]
    weights = [torch.ones(33, 5, device=triton_device), torch.ones(33, device=triton_device)]
    first, again = (
        _run(lambda t, c: ops.gumbel_codebook_op(t, c, *scalars, 1), inputs, torch.float32, weights) for _ in range(2)
    )
    assert all(map(torch.equal, first, again))


def test_what_the_kernels_do_not_serve(triton_device):
    logits = torch.zeros(2, 3, dtype=torch.float64, device=triton_device)
    tau = torch.ones((), dtype=torch.float64)
    with pytest.raises(dalle_kernels.ProviderError, match=r"take float32, bfloat16 and float16, got torch\.float64"):
        ops.gumbel_softmax_op(logits, *_scalars(triton_device, tau), False, 1)
