"""Linear cross-entropy between torch's products by Triton's kernels: on a GPU, else by the interpreter."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from peak_memory import PeakOfTensors
from test_cross_entropy import IGNORE, _inputs, _plain, _run

import dalle_kernels
from dalle_kernels import _triton
from dalle_kernels._triton_configurations import Configuration, use_configuration
from dalle_kernels.cross_entropy import linear_cross_entropy, ops
from dalle_kernels.testing import assert_accurate, poisoned_allocations, strided_views

NAMES = ("loss", "gradient of hidden", "gradient of weight", "gradient of bias")


# What is taken for these rows, classes and width in 16 bits, in the workspace of small_chunks: the way to the gradient
# of the weight, how many chunks of rows there are, panels of classes, groups of a panel's rows, and rows found again.
WAYS = {
    (40, 100, 40): ("_Whole", 3),  # logits in the gradient of the weight
    (30, 64, 4): ("_Whole", 2),  # beside it
    (3, 1, 2): ("_Whole", 1),
    (20, 257, 33): ("_Panels", 2, 2, 1, 0),
    (20, 97, 17): ("_Panels", 1, 1, 1, 0),  # three rows are kept beside the gradient of the weight
    (37, 129, 24): ("_Panels", 3, 9, 3, 8),  # and here five
}


@pytest.fixture
def small_chunks(triton_device, monkeypatch):
    """Several chunks of rows, panels of classes and blocks of logits already in small problems."""
    pytest.importorskip("triton")
    from dalle_kernels.cross_entropy import triton_kernels

    monkeypatch.setattr(triton_kernels, "_WORKSPACE", 9000)
    monkeypatch.setattr(triton_kernels, "_FEW_ROWS", 16)
    small = Configuration({"BLOCK": 128}, num_warps=1)
    with ExitStack() as stack:
        for kernel in ("losses", "losses_and_gradients", "gradients"):
            stack.enter_context(use_configuration(f"cross_entropy_{kernel}", "any", small))
        yield triton_device


def _on(device, inputs, dtype=None):
    return [tensor.to(device, dtype if tensor.is_floating_point() else None) for tensor in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_loss_and_gradients_meet_the_error_rule(reduction, dtype, small_chunks):
    for sizes in list(WAYS)[:: 2 if reduction == "none" or dtype == torch.float16 else 1]:
        draws = []
        for seed in range(3):
            inputs = _on(small_chunks, [tensor.to(dtype) for tensor in _inputs(*sizes, seed)[:3]])
            inputs = [tensor.double() for tensor in inputs] + [_inputs(*sizes, seed)[3].to(small_chunks)]
            with poisoned_allocations():
                actual = _run(linear_cross_entropy, inputs, dtype, reduction)
            assert [result.dtype for result in actual] == [torch.float32, dtype, dtype, dtype]
            draws.append((actual, *(_run(_plain, inputs, kind, reduction) for kind in (dtype, torch.float64))))
        for index, name in enumerate(NAMES):
            assert_accurate(*([results[index] for results in column] for column in zip(*draws)), f"{name} of {sizes}")


@pytest.mark.parametrize("sizes", WAYS)
def test_small_problems_take_every_way(sizes, small_chunks):
    from dalle_kernels.cross_entropy import triton_kernels

    hidden, weight, _, target = _on(small_chunks, _inputs(*sizes, seed=1, dtype=torch.bfloat16))
    with _triton.assume(90, 1):
        problem = triton_kernels._Problem(hidden, weight, target, None, IGNORE)
        way = triton_kernels._way_to_weight(problem, torch.empty_like(weight))
    found = (type(way).__name__, len(way.chunks))
    if found[0] == "_Panels":
        found += (len(way.panels), len(way.groups), sizes[0] - way.kept - way.more_rows)
    assert found == WAYS[sizes]


@pytest.mark.parametrize(
    "count, classes, width", [(4096, 8192, 3968), (1024, 16384, 3968), (700, 50257, 768), (5, 3, 2)]
)
def test_parts_are_as_large_as_the_workspace_lets_them(count, classes, width):
    pytest.importorskip("triton")
    from dalle_kernels.cross_entropy.triton_kernels import _best_step, _slices

    products = (classes, width), (width, classes)
    for most in (1, 100, 300, 1536, 10**6):
        parts = _slices(count, _best_step(count, most, products, 132))
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == count
        assert all(part.stop - part.start <= max(most, 16) and part.start % 16 == 0 for part in parts)
    # 256 tiles of 128 × 256 in two waves, and 128 in one
    assert _best_step(4096, 1536, ((8192, 3968), (3968, 8192)), 132) == 1024


@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
@pytest.mark.parametrize("rows", [20, 60])  # whose gradients the workspace holds, and does not
def test_mixed_dtypes_are_multiplied_in_float32(rows, kinds, small_chunks):
    hidden, weight, bias, target = _on(small_chunks, _inputs(rows, 45, 8, seed=18, dtype=torch.float32))
    hidden, weight = (tensor.to(getattr(torch, kind)) for tensor, kind in zip((hidden, weight), kinds))
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    wide = [tensor.detach().float().requires_grad_() for tensor in leaves]
    loss, expected = linear_cross_entropy(*leaves[:2], target, bias), _plain(*wide[:2], target, wide[2])
    torch.testing.assert_close(loss, expected)
    for got, leaf, wanted in zip(torch.autograd.grad(loss, leaves), leaves, torch.autograd.grad(expected, wide)):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got, wanted.to(leaf.dtype))


def test_a_loss_scale_saves_small_float16_gradients(small_chunks):
    hidden, weight, _, target = _on(small_chunks, _inputs(24, 33, 9, seed=12, dtype=torch.float16))
    hidden = (hidden * 1e-3).requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target) / 2**20
    (grad,) = torch.autograd.grad(loss * 2.0**20, weight)
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(_plain(hidden.detach().double(), exact, target), exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-7)


def test_sums_of_bfloat16_products_stay_in_float32(small_chunks, monkeypatch):
    """While they are taken the library may not add up parts of them in 16 bits; before and afterwards it may."""
    settings, product, allowed = torch.backends.cuda.matmul, torch.mm, []

    def noted(*operands, out=None, **options):
        if out is not None and out.dtype == torch.bfloat16:
            allowed.append(settings.allow_bf16_reduced_precision_reduction)
        return product(*operands, out=out, **options)

    monkeypatch.setattr(torch, "mm", noted)
    for reduction in ("mean", "none"):
        inputs = _on(small_chunks, _inputs(37, 129, 24, seed=13, dtype=torch.bfloat16))
        _run(linear_cross_entropy, inputs, torch.bfloat16, reduction)
    assert allowed and not any(allowed) and settings.allow_bf16_reduced_precision_reduction


def test_layout_changes_no_more_than_rounding(triton_device):
    hidden, weight, bias, target = _on(triton_device, _inputs(13, 11, 7, seed=14, dtype=torch.float32))
    expected = _run(linear_cross_entropy, (hidden, weight, bias, target), torch.float32, "mean")
    for views in zip(*map(strided_views, (hidden, weight, bias, target)), strict=False):
        leaves = [view.requires_grad_() for _, view in views[:3]]
        loss = linear_cross_entropy(*leaves[:2], views[3][1], leaves[2])
        grads = torch.autograd.grad(loss, leaves, torch.full((), 0.3, device=triton_device))
        torch.testing.assert_close([loss, *grads], expected, msg=views[3][0])


def test_ignored_and_bad_rows(triton_device):
    """An ignored row counts for nothing; NaN spoils its own row, and so does a target that is no class."""
    hidden, weight, bias, target = _on(triton_device, _inputs(6, 5, 4, seed=15, dtype=torch.float32))
    target = torch.tensor([0, IGNORE, 1, 5, 4, -1], device=triton_device)
    hidden[1], hidden[2, 0] = float("inf"), float("nan")
    hidden.requires_grad_()
    rows = linear_cross_entropy(hidden, weight, target, bias, IGNORE, "none")
    assert rows.isnan().tolist() == [False, False, True, True, False, True] and rows[1] == 0
    (grad,) = torch.autograd.grad(rows.sum(), hidden)
    assert grad.isnan().any(1).tolist() == [False, False, True, True, False, True] and not grad[1].any()
    assert linear_cross_entropy(hidden, weight, target, bias).isnan()


def test_nobody_counts(triton_device):
    hidden, weight, bias, _ = _on(triton_device, _inputs(6, 5, 4, seed=15, dtype=torch.float32))
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    for reduction, loss in (("sum", 0.0), ("mean", float("nan"))):
        target = torch.full((6,), 3, device=triton_device)
        result = linear_cross_entropy(*leaves[:2], target, leaves[2], 3, reduction)
        torch.testing.assert_close(result.cpu(), torch.tensor(loss), equal_nan=True)
        assert all(not grad.any() for grad in torch.autograd.grad(result, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(0, 5, 3), (6, 5, 0)])
def test_no_rows_and_no_columns(sizes, dtype, triton_device):
    inputs = _on(triton_device, _inputs(*sizes, seed=30, dtype=dtype))
    for reduction in ops.REDUCTIONS:
        results = _run(linear_cross_entropy, inputs, dtype, reduction)
        for result, expected in zip(results, _run(_plain, inputs, torch.float32, reduction)):
            wanted = expected.nan_to_num(0.0) if expected.dim() else expected  # torch's gradient of no mean is NaN
            torch.testing.assert_close(result, wanted.to(result.dtype), equal_nan=True)


def test_extreme_logits(small_chunks):
    """Logits that overflow an exponential, classes at -inf, a row of nothing else."""
    bias = torch.tensor([1e4, -1e4, 0.0, -float("inf"), 3e4], device=small_chunks)
    hidden, weight = torch.zeros(5, 2, device=small_chunks), torch.zeros(5, 2, device=small_chunks)
    target = torch.arange(5, device=small_chunks)
    rows = linear_cross_entropy(hidden, weight, target, bias, IGNORE, "none")
    torch.testing.assert_close(rows, F.cross_entropy(bias.expand(5, 5), target, reduction="none"))
    nothing = torch.full((5,), -float("inf"), device=small_chunks)
    assert linear_cross_entropy(hidden, weight, target, nothing, IGNORE, "none").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_input_same_bits_and_no_work_for_what_is_frozen(dtype, small_chunks):
    hidden, weight, bias, target = _on(small_chunks, _inputs(20, 33, 17, seed=19, dtype=dtype))
    call = (hidden, weight, target, bias, IGNORE, "mean")
    _, *whole = ops.linear_cross_entropy_with_gradient_op(*call, [True] * 3)
    for index in range(3):
        mask = [position == index for position in range(3)]
        _, *grads = ops.linear_cross_entropy_with_gradient_op(*call, mask)
        assert torch.equal(grads[index], whole[index])
        assert [grad.numel() > 0 for grad in grads] == mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_gradients_are_rounded_once(dtype, triton_device):
    gradient = torch.randn(37, 61, device=triton_device).to(dtype)
    factor = torch.tensor(0.3, device=triton_device)
    with poisoned_allocations():
        result = ops.linear_cross_entropy_scaled_gradient_op(gradient, factor)
    expected = (gradient.float() * factor).to(dtype)
    assert torch.equal(result, expected)
    for _, view in strided_views(gradient):
        ops.linear_cross_entropy_scale_gradient_op(view, factor)
        assert torch.equal(view, expected)


def test_what_the_kernels_do_not_serve_goes_to_the_reference():
    with dalle_kernels.use("triton"):
        found = dalle_kernels.explain("linear_cross_entropy", *_inputs(4, 3, 2, seed=1)[:2], None, None, IGNORE)
    assert found.runs is None and "float64" in dict(found.rejected)["triton"]


class NoKernel:
    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, classes", [(1024, 16384), (2048, 16384), (4096, 8192), (8192, 16384)])
def test_tensors_fit_the_workspace_at_the_largest_unembeddings(rows, classes, dtype, monkeypatch):
    """All that a call makes on a GPU, as its allocator counts it, without what the library of products takes."""
    pytest.importorskip("triton")
    from dalle_kernels.cross_entropy import triton_kernels, triton_logits

    def product(left, right, output=None):
        return left.new_empty(len(left), right.shape[1], dtype=torch.float32) if output is None else output

    monkeypatch.setattr(triton_kernels, "_product", product)
    for kernel in ("losses", "losses_and_gradients", "gradients"):
        monkeypatch.setattr(triton_logits, kernel, NoKernel())
    hidden, weight = (torch.empty(count, 3968, dtype=dtype, device="meta") for count in (rows, classes))
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    call = (hidden, weight, target, None, IGNORE, "mean", [True, True, False])
    with _triton.assume(90, 132), PeakOfTensors(hidden, weight, target) as made:
        triton_kernels.linear_cross_entropy_with_gradient(*call)
    beyond_results = made.peak - hidden.nbytes - weight.nbytes
    assert triton_kernels._WORKSPACE // 2 < beyond_results <= 1.01 * triton_kernels._WORKSPACE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU's allocator tells its highest memory")
@pytest.mark.parametrize("rows, classes", [(1024, 16384), (2048, 16384), (4096, 8192)])
def test_workspace_at_the_largest_unembeddings(rows, classes, triton_device):
    hidden = torch.randn(rows, 3968, device=triton_device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(classes, 3968, device=triton_device, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(0, classes, (rows,), device=triton_device)
    linear_cross_entropy(hidden, weight, target).backward()  # the library takes its own workspace once
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, target).backward()  # which scales the kept gradients where they are
    assert torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes <= 60e6
