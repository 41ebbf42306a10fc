"""Linear cross-entropy against float64 and against torch's two separate steps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peak_memory import needs_peaks, peak_growth
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.cross_entropy import linear_cross_entropy, native, ops, reference
from dalle_kernels.testing import assert_accurate, poisoned_allocations, strided_views

IGNORE = -100
needs_native = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")
ALL = [True] * 3


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "reference"])
def provider(request):
    with dalle_kernels.use(request.param):
        yield request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks of rows and panels of classes already in small problems."""
    monkeypatch.setattr(reference, "_CHUNK_LOGITS", 1000)
    monkeypatch.setattr(native, "_CHUNK_FLOATS", 3000)
    monkeypatch.setattr(native, "_PANEL_FLOATS", 700)


def _inputs(
    rows: int, classes: int, width: int, seed: int, dtype=torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, weight, bias and targets, every fifth of them ignored, with logits of the size that training gives."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    weight = 2 * torch.randn(classes, width, dtype=torch.float64, generator=generator) / width**0.5
    bias = torch.randn(classes, dtype=torch.float64, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[2::5] = IGNORE
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target


def _plain(hidden, weight, target, bias=None, ignore_index=IGNORE, reduction="mean"):
    return F.cross_entropy(F.linear(hidden, weight, bias), target, ignore_index=ignore_index, reduction=reduction)


def _run(function, inputs, dtype: torch.dtype, reduction: str) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and bias, under an uneven incoming gradient."""
    *floating, target = inputs
    hidden, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in floating)
    loss = function(hidden, weight, target, bias, IGNORE, reduction)
    grad = torch.full((), 0.3) if loss.dim() == 0 else torch.linspace(0.5, 1, loss.numel())
    return [loss, *torch.autograd.grad(loss, (hidden, weight, bias), grad.to(loss))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_loss_and_gradients_meet_the_error_rule(reduction, dtype, provider, small_chunks):
    """Draws of a shape are measured together: the largest error of a few rows, which one logit's rounding makes, is
    luck."""
    # More than one of the kernel's segments of classes; the reference would take them row by row.
    wide = [(20, 600, 33)] if provider == "native" else []
    for sizes in ((33, 97, 31), (7, 257, 64), (65, 3, 17), (31, 129, 5), (3, 1, 2), *wide):
        draws = []
        for seed in range(24):
            *floating, target = _inputs(*sizes, seed)
            inputs = [tensor.to(dtype).double() for tensor in floating] + [target]
            with poisoned_allocations():
                actual = _run(linear_cross_entropy, inputs, dtype, reduction)
            assert [result.dtype for result in actual] == [torch.float32, dtype, dtype, dtype]
            plain, exact = (_run(_plain, inputs, kind, reduction) for kind in (dtype, torch.float64))
            draws.append((actual, plain, exact))
        for index, name in enumerate(("loss", "gradient of hidden", "gradient of weight", "gradient of bias")):
            assert_accurate(*([results[index] for results in column] for column in zip(*draws)), f"{name} of {sizes}")


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_float64_gradients_by_finite_differences(reduction):
    hidden, weight, bias, target = _inputs(6, 7, 5, seed=10)
    leaves = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w, b: linear_cross_entropy(h, w, target, b, IGNORE, reduction), leaves)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, target, None, IGNORE, reduction), leaves[:2]
    )


def test_both_routes_to_the_gradient_agree(provider, small_chunks):
    """A mean's gradient comes from the forward pass, that of the rows from logits computed again."""
    inputs = _inputs(33, 41, 17, seed=11, dtype=torch.float32)

    def mean_of_rows(hidden, weight, target, bias, ignore_index, reduction):
        return linear_cross_entropy(hidden, weight, target, bias, ignore_index, "none").sum() / (target != IGNORE).sum()

    results = (_run(function, inputs, torch.float32, "mean") for function in (linear_cross_entropy, mean_of_rows))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


def test_a_loss_scale_saves_small_float16_gradients(provider):
    """These gradients would round to zero if they were rounded before the incoming scale reaches them."""
    hidden, weight, _, target = _inputs(64, 33, 9, seed=12, dtype=torch.float16)
    hidden = (hidden * 1e-3).requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, None, IGNORE, "mean") / 2**20
    (grad,) = torch.autograd.grad(loss * 2.0**20, weight)
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(_plain(hidden.detach().double(), exact, target), exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-7)


def test_leading_dimensions_and_no_gradient(provider):
    hidden, weight, bias, target = _inputs(12, 9, 5, seed=13, dtype=torch.float32)
    for reduction in ops.REDUCTIONS:
        expected = _plain(hidden, weight, target, bias, reduction=reduction)
        shaped = linear_cross_entropy(hidden.view(3, 4, 5), weight, target.view(3, 4), bias, IGNORE, reduction)
        assert shaped.shape == (target.view(3, 4).shape if reduction == "none" else ())
        torch.testing.assert_close(shaped.flatten(), expected.flatten())
    single = linear_cross_entropy(hidden[0], weight, target[0], bias, IGNORE, "none")
    torch.testing.assert_close(single, _plain(hidden, weight, target, bias, reduction="none")[0])


def test_layout_changes_no_more_than_rounding(provider):
    hidden, weight, bias, target = _inputs(13, 11, 7, seed=14, dtype=torch.float32)
    expected = _run(linear_cross_entropy, (hidden, weight, bias, target), torch.float32, "mean")
    for views in zip(*map(strided_views, (hidden, weight, bias, target)), strict=False):
        name, target_view = views[3]
        leaves = [view.requires_grad_() for _, view in views[:3]]
        loss = linear_cross_entropy(*leaves[:2], target_view, leaves[2])
        grads = torch.autograd.grad(loss, leaves, torch.full((), 0.3))
        torch.testing.assert_close([loss, *grads], expected, msg=name)


def test_ignored_rows_count_for_nothing(provider):
    hidden, weight, bias, _ = _inputs(6, 5, 4, seed=15, dtype=torch.float32)
    nobody = torch.full((6,), 3)
    for reduction, loss in (("sum", 0.0), ("mean", float("nan"))):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        result = linear_cross_entropy(leaves[0], leaves[1], nobody, leaves[2], 3, reduction)
        torch.testing.assert_close(result, torch.tensor(loss), equal_nan=True)
        assert all(not grad.any() for grad in torch.autograd.grad(result, leaves))
    target = torch.tensor([0, IGNORE, 1, 2, IGNORE, 4])
    spoiled = weight.clone().requires_grad_()
    hidden[1] = float("inf")
    rows = linear_cross_entropy(hidden, spoiled, target, bias, IGNORE, "none")
    assert torch.isfinite(rows).all() and rows[1] == 0


def test_a_bad_row_spoils_only_its_own_loss_and_hidden_gradient(provider):
    hidden, weight, bias, target = _inputs(5, 6, 4, seed=16, dtype=torch.float32)
    hidden[1, 2] = float("nan")
    hidden.requires_grad_()
    rows = linear_cross_entropy(hidden, weight, target, bias, IGNORE, "none")
    rows.sum().backward()
    assert rows.isnan().tolist() == [False, True, False, False, False]
    assert hidden.grad.isnan().any(1).tolist() == [False, True, False, False, False]


def test_no_rows(provider):
    weight = torch.randn(5, 3, requires_grad=True)
    hidden, target = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert linear_cross_entropy(hidden, weight, target, reduction="none").shape == (0,)
    assert linear_cross_entropy(hidden, weight, target).isnan()
    loss = linear_cross_entropy(hidden, weight, target, reduction="sum")
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 3) and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_no_columns(reduction, dtype, provider):
    """The logits are the bias's."""
    inputs = _inputs(6, 5, 0, seed=30, dtype=dtype)
    results = _run(linear_cross_entropy, inputs, dtype, reduction)
    for result, expected in zip(results, _run(_plain, inputs, torch.float32, reduction)):
        torch.testing.assert_close(result, expected.to(result.dtype))
    shaped = linear_cross_entropy(inputs[0].view(2, 3, 0), inputs[1], inputs[3].view(2, 3), inputs[2])
    torch.testing.assert_close(shaped, linear_cross_entropy(inputs[0], inputs[1], inputs[3], inputs[2]))


def test_dtypes_that_only_the_reference_reads():
    hidden, weight, bias, target = _inputs(6, 5, 4, seed=31, dtype=torch.float32)
    hidden = hidden.to(torch.float8_e4m3fn).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, bias)
    torch.testing.assert_close(loss, _plain(hidden.float(), weight, target, bias))
    assert torch.autograd.grad(loss, hidden)[0].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("wrong", [6, -1, 2**40])
def test_a_target_that_is_no_class(wrong, provider, monkeypatch):
    hidden, weight, bias, target = _inputs(4, 6, 3, seed=17, dtype=torch.float32)
    target[1] = wrong
    with pytest.raises(ValueError, match=f"expected targets from 0 to 5 or ignore_index -100, got {wrong};"):
        linear_cross_entropy(hidden, weight, target, bias)
    # As on a device where nobody may look: the row is NaN, and so is every gradient that it reaches.
    monkeypatch.setattr(reference, "must_not_wait", lambda tensor: True)
    rows = linear_cross_entropy(hidden, weight.requires_grad_(), target, bias, IGNORE, "none")
    assert rows.isnan().tolist() == [False, True, False, False]
    assert linear_cross_entropy(hidden, weight, target, bias).isnan()
    assert torch.autograd.grad(rows.sum(), weight)[0].isnan().all()


def test_mixed_dtypes_and_autocast(provider):
    hidden, weight, bias, target = _inputs(9, 13, 8, seed=18, dtype=torch.float32)
    mixed = linear_cross_entropy(hidden.bfloat16(), weight, target, bias)
    torch.testing.assert_close(mixed, _plain(hidden.bfloat16().float(), weight, target, bias))
    weight.requires_grad_()
    expected = linear_cross_entropy(hidden, weight, target, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, target, bias), expected)


def test_the_default_dtype_changes_nothing(provider):
    inputs = _inputs(9, 13, 8, seed=29, dtype=torch.float32)
    for reduction in ops.REDUCTIONS:
        expected = _run(linear_cross_entropy, inputs, torch.float32, reduction)
        torch.set_default_dtype(torch.float64)
        try:
            results = _run(linear_cross_entropy, inputs, torch.float32, reduction)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(results, expected, msg=reduction)


def test_same_input_same_bits(provider):
    inputs = _inputs(65, 33, 17, seed=19, dtype=torch.float32)
    first, again = (_run(linear_cross_entropy, inputs, torch.float32, "mean") for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_the_reference_has_logits_for_one_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_LOGITS", 300)
    sizes = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *arguments: sizes.append(linear(*arguments).numel()) or linear(*arguments))
    hidden, weight, bias, target = _inputs(20, 100, 4, seed=20, dtype=torch.float32)
    with dalle_kernels.use("reference"):
        linear_cross_entropy(hidden, weight.requires_grad_(), target, bias).backward()
    assert len(sizes) == 7 and max(sizes) == 300


@needs_native
@needs_peaks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_exist_for_one_chunk_at_a_time(reduction, dtype):
    """In float32 the logits of this problem would take 160 MiB, and as much again for their gradient."""
    hidden, weight, bias, target = _inputs(2560, 16384, 16, seed=20, dtype=dtype)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    loss_and_gradients = partial(linear_cross_entropy, hidden, weight, target, bias, IGNORE, reduction)
    assert peak_growth(lambda: loss_and_gradients().sum().backward()) < 40 * 2**20


@needs_native
def test_threads_change_no_bit_of_the_compiled_kernel():
    """The matrix products are torch's and may depend on the threads, so the kernels between them are tried alone."""
    classes, rows = 1300, 37
    generator = torch.Generator().manual_seed(24)
    logits = 5 * torch.randn(classes, rows, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    library = _native.library("cpu")
    results = []
    for threads in (1, 2, 3, 7):
        written = logits.clone()
        loss, row_factor, bias_sums = torch.empty(rows), torch.empty(rows), torch.zeros(classes, dtype=torch.float64)
        scale = torch.full((rows,), 0.3)
        total = library.cross_entropy_chunk(
            logits=written,
            target=target,
            bias=logits.flatten()[:classes],
            loss=loss,
            row_scale=scale,
            row_factor=row_factor,
            bias_sums=bias_sums,
            first=0,
            ignore_index=IGNORE,
            executor=threads,
        )
        results.append((written, loss, row_factor, bias_sums, torch.tensor(total, dtype=torch.float64)))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))
    biased = (logits + logits.flatten()[:classes, None]).double()
    expected = F.cross_entropy(biased.t(), target, reduction="none")
    torch.testing.assert_close(results[0][1].double(), expected, rtol=1e-6, atol=1e-6)
    gradient = 0.3 * (biased.softmax(0) - F.one_hot(target, classes).t())
    torch.testing.assert_close(results[0][0].double() * results[0][2], gradient, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(results[0][3], gradient.sum(1), rtol=1e-5, atol=1e-7)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_is_rounded_once(dtype):
    """Many terms, of which each alone would be lost beside the sum in 16 bits."""
    library, count = _native.library("cpu"), 70_001
    generator = torch.Generator().manual_seed(25)
    terms = [torch.randn(count, generator=generator)] + [torch.full((count,), 2.0**-11)] * 64
    gradient, low = torch.empty(count, dtype=dtype), torch.empty(count, dtype=torch.uint8)
    for i, term in enumerate(terms):
        library.gradient_sum(term, gradient, low, count, first=i == 0, last=i == 64, executor=2)
    exact = torch.stack(terms).double().sum(0)
    torch.testing.assert_close(gradient.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-3 * 2**-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backward_of_a_kept_graph_gives_its_own_gradients(dtype, provider):
    """The gradients of the forward pass are scaled where they lie and given away once; then they are made again."""
    hidden, weight, bias, target = _inputs(9, 11, 5, seed=28, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    loss = linear_cross_entropy(*leaves[:2], target, leaves[2])
    results = [torch.autograd.grad(loss, leaves, torch.tensor(scale), retain_graph=True) for scale in (2.0, 0.5, 2.0)]
    for first, half, again in zip(*results):
        assert torch.equal(first, again) and torch.equal(first, 4 * half)
        first.zero_()
        assert again.any()
    weight.data.zero_()
    loss.backward()
    (expected,) = torch.autograd.grad(linear_cross_entropy(*leaves[:2], target, leaves[2]), weight)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_work_for_what_is_frozen(reduction, wanted, provider):
    """What needs no gradient gets none, and the operators are not asked for it."""
    hidden, weight, bias, target = _inputs(6, 7, 5, seed=26, dtype=torch.float32)
    leaves = [tensor.requires_grad_(bool(flag)) for tensor, flag in zip((hidden, weight, bias), wanted)]
    loss = linear_cross_entropy(*leaves[:2], target, leaves[2], IGNORE, reduction).sum()
    chosen = [leaf for leaf in leaves if leaf.requires_grad]
    expected = torch.autograd.grad(_plain(*leaves[:2], target, leaves[2], IGNORE, reduction).sum(), chosen)
    torch.testing.assert_close(torch.autograd.grad(loss, chosen), expected)
    gradients = ops.linear_cross_entropy_with_gradient_op(
        *(leaf.detach() for leaf in leaves[:2]), target, leaves[2].detach(), IGNORE, "mean", [*map(bool, wanted)]
    )[1:]
    assert [gradient.numel() for gradient in gradients] == [
        leaf.numel() if flag else 0 for leaf, flag in zip(leaves, wanted)
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_wants_no_gradient_is_reduced_by_an_operator_of_its_own(dtype, reduction, provider, small_chunks):
    for sizes in ((1, 2, 8), (65, 33, 17), (3, 129, 5)):
        *floating, target = _inputs(*sizes, seed=32)
        hidden, weight, bias = (tensor.to(dtype) for tensor in floating)
        for given_bias in (bias, None):
            arguments = (hidden, weight, target, given_bias, IGNORE, reduction)
            with profile(activities=[ProfilerActivity.CPU]) as found:
                loss = linear_cross_entropy(*arguments)
            names = {event.key for event in found.key_averages() if event.key.startswith("dalle_kernels::")}
            assert names == {"dalle_kernels::linear_cross_entropy_reduced"}
            assert torch.equal(linear_cross_entropy(*arguments), loss)
            assert loss.dtype == torch.float32 and not loss.requires_grad
            together = ops.linear_cross_entropy_with_gradient_op(*arguments, [*ALL[:2], given_bias is not None])[0]
            torch.testing.assert_close(loss, together, rtol=1e-6, atol=0)


def test_opcheck(provider):
    hidden, weight, bias, target = _inputs(6, 7, 5, seed=21, dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    for given_bias in (leaves[2], None):
        arguments = (*leaves[:2], target, given_bias, IGNORE)
        torch.library.opcheck(ops.linear_cross_entropy_op.overload, arguments)
        mask = [True, True, given_bias is not None]
        torch.library.opcheck(ops.linear_cross_entropy_with_gradient_op.overload, (*arguments, "mean", mask))
    hidden, weight, bias = (tensor.detach() for tensor in leaves)
    arguments = (torch.ones(6), hidden, weight, target, bias, IGNORE)
    for mask in (ALL, [False, True, False]):
        torch.library.opcheck(ops.linear_cross_entropy_backward_op.overload, (*arguments, mask))
    torch.library.opcheck(ops.linear_cross_entropy_reduced_op.overload, (*arguments[1:], "mean"))
    for scale_op in (ops.linear_cross_entropy_scaled_gradient_op, ops.linear_cross_entropy_scale_gradient_op):
        torch.library.opcheck(scale_op.overload, (weight, torch.tensor(0.5)))


def test_only_the_loss_carries_a_gradient(provider):
    *floating, target = _inputs(6, 7, 5, seed=23, dtype=torch.float32)
    hidden, weight, bias = (tensor.requires_grad_() for tensor in floating)
    results = ops.linear_cross_entropy_with_gradient_op(hidden, weight, target, bias, IGNORE, "sum", ALL)
    assert [result.requires_grad for result in results] == [True, False, False, False]
    frozen = linear_cross_entropy(hidden, weight.detach(), target, bias.detach(), IGNORE, "sum")
    (expected,) = torch.autograd.grad(_plain(hidden, weight, target, bias, IGNORE, "sum"), hidden)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden)[0], expected)


CHECK_ONE_INSTRUCTION_SET = """
import torch, dalle_kernels
from dalle_kernels import _native
from dalle_kernels.testing import assert_accurate
assert _native.instruction_sets()[2] == {isa!r}
generator = torch.Generator().manual_seed(27)
hidden, weight = torch.randn(45, 19, generator=generator), torch.randn(1100, 19, generator=generator)
bias, target = torch.randn(1100, generator=generator), torch.randint(0, 1100, (45,), generator=generator)
target[::7] = -100
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for reduction in ("mean", "none"):
        results = []
        for provider, kind in (("native", dtype), ("reference", dtype), ("reference", torch.float64)):
            leaves = [tensor.to(dtype).to(kind).requires_grad_() for tensor in (hidden, weight, bias)]
            with dalle_kernels.use(provider):
                loss = dalle_kernels.linear_cross_entropy(*leaves[:2], target, leaves[2], reduction=reduction)
                results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        for native, reference, exact in zip(*results):
            assert_accurate(native, reference, exact, str((dtype, reduction)))
"""


@needs_native
def test_every_instruction_set_is_as_accurate_as_the_reference(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)


def test_compiles_whole():
    inputs = _inputs(6, 7, 5, seed=22, dtype=torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for reduction in ("none", "mean"):
        results = (_run(function, inputs, torch.float32, reduction) for function in (compiled, linear_cross_entropy))
        for result, expected in zip(*results):
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "expected hidden as a floating-point tensor, got torch.int64", {"hidden": torch.ones(4, 3).long()}),
        (
            TypeError,
            "expected target as an int64 tensor of class numbers, got torch.int32",
            {"target": torch.zeros(4).int()},
        ),
        (ValueError, r"got \(4, 3\) and \(3, 5\)", {"weight": torch.zeros(3, 5)}),
        (ValueError, r"at least one class, got \(4, 3\) and \(0, 3\)", {"weight": torch.zeros(0, 3)}),
        (
            ValueError,
            r"expected one target per row of hidden, shape \(4,\), got \(5,\)",
            {"target": torch.zeros(5).long()},
        ),
        (ValueError, r"expected a bias of shape \(5,\), one per class, got \(3,\)", {"bias": torch.zeros(3)}),
        (TypeError, "expected weight as a floating-point tensor, got list", {"weight": [[1.0, 2.0, 3.0]]}),
        (TypeError, "expected bias as a floating-point tensor, got torch.int64", {"bias": torch.zeros(5).long()}),
        (ValueError, "expected bias on hidden's device cpu, got meta", {"bias": torch.zeros(5, device="meta")}),
        (
            ValueError,
            "expected target on hidden's device cpu, got meta",
            {"target": torch.zeros(4, dtype=torch.int64, device="meta")},
        ),
        (ValueError, "expected weight on hidden's device cpu, got meta", {"weight": torch.zeros(5, 3, device="meta")}),
        (ValueError, "expected a reduction among none, mean, sum, got 'max'", {"reduction": "max"}),
    ],
)
def test_mistakes_get_one_clear_sentence(error, message, arguments):
    defaults = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**defaults, **arguments})
