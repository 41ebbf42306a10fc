"""The compiled CUDA kernels on a GPU, where the small calls of the fuzz do not reach: many tensors and long rows."""

from __future__ import annotations

import math

import pytest
import test_adamw_triton as adamw
import test_grad_scale_triton as grad_scale
import torch
from test_gumbel_softmax import SEED, _plain, _random, _run

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.gumbel_softmax import ops, reference
from dalle_kernels.testing import assert_accurate, poisoned_allocations

GPU = torch.cuda.is_available() and _native.unavailable("cuda") is None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU and the compiled CUDA library")]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# More tensors than one launch holds; whole tiles, parts of one, and less than a pack.
SHAPES = [(70_001,), (0,), (2048,), (4096, 3), (2049,), ()] + [(7,)] * 300


@pytest.fixture(autouse=True)
def native():
    with dalle_kernels.use("native"):
        yield


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values at an address that is no multiple of 16."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("coded", ((True, True), (False, False), (True, False), (False, True)), ids=str)
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adamw_steps_many_parameters(dtype, grad_dtype, coded):
    with dalle_kernels.use("reference"):
        lists = adamw.state(SHAPES, dtype, grad_dtype, coded, "cuda")
    for tensors in lists[:4]:
        tensors[2] = shifted(tensors[2])
    for grad in lists[1]:
        grad[torch.rand(grad.shape, device="cuda") < 0.2] = 0
    lists[1][0][:5] = torch.tensor([1e-30, -1e-30, math.nan, math.inf, -math.inf])
    for tensor in (lists[2][0], lists[3][0]):
        tensor[:2000] = 0
    adamw.check(lists, lr=3e-3)


@pytest.mark.parametrize("coded", ((True, True), (False, False)), ids=str)
@pytest.mark.parametrize("grad_dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("dtype", adamw.HALVES, ids=str)
def test_adamw_rounds_stochastically(dtype, grad_dtype, coded):
    with dalle_kernels.use("reference"):
        lists = adamw.state(SHAPES, dtype, grad_dtype, coded, "cuda")
    lists[0][2] = shifted(lists[0][2])
    adamw.check(lists, lr=3e-3, rounding_seed=2**63 - 5, numbers=[2**31 - 1 - number for number in range(len(SHAPES))])


@pytest.mark.parametrize("weight_decay", (0.0, 0.3, -1e-3), ids=str)
@pytest.mark.parametrize("dtype", adamw.HALVES, ids=str)
def test_adamw_rounds_what_lies_between_any_two_numbers(dtype, weight_decay):
    adamw.check(adamw.every_number(dtype, "cuda"), lr=1.0, weight_decay=weight_decay, rounding_seed=6)


@pytest.mark.parametrize("found", (False, True))
def test_adamw_counts_steps_unless_there_was_an_overflow(found):
    with dalle_kernels.use("reference"):
        lists = adamw.state(SHAPES, torch.bfloat16, torch.float16, (True, True), "cuda")
    steps = [step.clone() for step in lists[4]]
    flag = torch.tensor(found, device="cuda")
    adamw.check(lists, lr=1e-2, grad_scale=torch.tensor(1.37 * 2**9, device="cuda"), found_nonfinite=flag)
    assert all(torch.equal(now, then if found else then + 1 + 1) for now, then in zip(lists[4], steps, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_of_many_tensors(dtype):
    tensors = [grad_scale.awkward(shape, dtype, seed).cuda() for seed, shape in enumerate(SHAPES)]
    tensors[2] = shifted(tensors[2])
    scale = torch.tensor(1.37 * 2**13, device="cuda")
    grad_scale.check(dalle_kernels.filter_cast_unscale, tensors, scale)
    for to in FLOATS:
        grad_scale.check(dalle_kernels.scale_cast_filter, tensors, scale, to)


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_one_number_that_is_not_finite_is_found_wherever_it_is(value):
    scale = torch.ones((), device="cuda")
    for tensor in (torch.ones(9001, device="cuda"), torch.ones(9001, device="cuda")[1:]):
        for position in (0, 4095, 4096, len(tensor) - 1):
            tensor[position] = value
            grad_scale.check(dalle_kernels.filter_cast_unscale, [tensor], scale)
            assert dalle_kernels.encode_fp169_checked(tensor)[1].item()
            tensor[position] = 1
        assert not dalle_kernels.filter_cast_unscale([tensor], scale)[1].item()
        assert not dalle_kernels.encode_fp169_checked(tensor)[1].item()


@pytest.mark.parametrize("dtype", (*FLOATS, torch.float64), ids=str)
def test_codes_of_whole_and_partial_tiles(dtype):
    every_code = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cuda")
    for count in (4095, 4096, 4097, 2**16):
        values = grad_scale.awkward((count,), torch.float32, count).to("cuda", dtype)
        codes = every_code[:count].flip(0)
        for x, c in ((values, codes), (shifted(values), shifted(codes))):
            for name in ("fp169", "fp0610"):
                encode, decode = (getattr(dalle_kernels, f"{way}_{name}") for way in ("encode", "decode"))
                with poisoned_allocations():
                    got = encode(x), decode(c, dtype)
                with dalle_kernels.use("reference"):
                    assert torch.equal(got[0], encode(x)) and torch.equal(got[1], decode(c, dtype))


def scalars(tau: float, offset: int = 0) -> list[torch.Tensor]:
    return [torch.as_tensor(scalar).to("cuda") for scalar in (SEED, torch.tensor(offset), torch.tensor(tau))]


# Whole packs, rows that are none, columns apart in clusters of eight, two and one block, and rows of no common stride.
ROWS = [((9, 8192), -1), ((3, 5001), -1), ((2, 8192, 3, 5), 1), ((1900, 13), 0), ((2, 1000, 8), 1), ((3, 4, 300, 2), 2)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "dim"), ROWS)
def test_long_rows_meet_the_error_rule(shape, dim, dtype):
    logits = _random(shape, seed=5).to(dtype).double()
    weights = [_random(size, seed=6).to(dtype).double() for size in (shape, reference.kl_shape(logits, dim))]
    with poisoned_allocations():
        call = [logits.cuda()], dtype, [weight.cuda() for weight in weights]
        actual = _run(lambda t: ops.gumbel_softmax_kl_op(t, *scalars(0.7), False, dim), *call)
    near, exact = (_run(lambda t: _plain(t, 0.7, dim), [logits], kind, weights) for kind in (dtype, torch.float64))
    for name, result, *others in zip(("y", "kl", "gradient"), actual, near, exact, strict=True):
        assert_accurate(result.cpu(), *others, name)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


# Clusters all of whose threads have columns and others, rows that are whole clusters and not, short of a whole group.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 8192, 3, 5), (2, 4096, 4, 4), (3, 1024, 1, 3), (2, 5000, 3, 3), (2, 1023, 2, 3)])
def test_results_lie_otherwise_than_what_is_given(shape, dtype):
    """Codes next to each other in the logits, the gradient or both, and apart in the results; parts of a batch."""
    logits, grad_y = (_random(shape, seed, dtype).cuda() for seed in (18, 19))
    grad_kl = _random(reference.kl_shape(logits, 1), 20, torch.float32).cuda()
    noise = scalars(0.7, offset=2**32 - 3)

    def results(logits, grad_y, grad_kl, noise):
        with poisoned_allocations():
            y, kl = ops.gumbel_softmax_kl_op(logits, *noise, False, 1)
            gradients = (
                ops.gumbel_softmax_kl_backward_op(grad_y, grad_kl, logits, y, *noise, False, 1),
                ops.gumbel_softmax_backward_op(grad_y, logits, y, *noise, False, 1),
            )
        assert all(result.is_contiguous() for result in (y, *gradients))
        return y, kl, *gradients

    expected = results(logits, grad_y, grad_kl, noise)
    last = channels_last(logits)
    unaligned = channels_last(torch.cat([logits[:, :1], logits], 1))[:, 1:]
    turned = (last, grad_y), (logits, channels_last(grad_y)), (last, channels_last(grad_y)), (unaligned, grad_y)
    for given in turned:
        assert all(map(torch.equal, results(*given, grad_kl, noise), expected))
    rest = scalars(0.7, offset=2**32 - 3 + logits[0, 0].numel())
    part = results(last[1:], channels_last(grad_y)[1:], grad_kl[1:], rest)
    assert all(map(torch.equal, part, (result[1:] for result in expected)))


@pytest.mark.parametrize(("shape", "dim"), ROWS)
def test_hard_samples_are_the_reference_s(shape, dim):
    logits, weight = (_random(shape, seed, torch.float32).cuda() for seed in (16, 17))
    leaf = logits.requires_grad_()
    hard, soft = (ops.gumbel_softmax_op(leaf, *scalars(0.5, offset=11), kind, dim) for kind in (True, False))
    with dalle_kernels.use("reference"):
        assert torch.equal(hard, ops.gumbel_softmax_op(leaf, *scalars(0.5, offset=11), True, dim))
    grads = [torch.autograd.grad(y, leaf, weight)[0] for y in (hard, soft)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hard", (False, True))
@pytest.mark.parametrize("dim", (0, 1))
def test_bad_rows_stay_alone(dim, hard):
    rows = _random((12, 3000), 26, torch.float32)
    spoiled = rows.clone()
    spoiled[1, 2], spoiled[3, 0], spoiled[5] = math.nan, math.inf, -math.inf
    spoiled[7, 9:], rows[7, 9:] = -math.inf, -math.inf
    bad, good = [1, 3, 5], [0, 2, 4, 6, 7, 8, 9, 10, 11]
    results = []
    for source in (spoiled, rows):
        leaf = (source if dim else source.t()).contiguous().cuda().requires_grad_()
        outputs = ops.gumbel_softmax_kl_op(leaf, *scalars(1.0), hard, dim)
        weights = [torch.ones_like(output).cumsum(-1) for output in outputs]
        gradient = torch.autograd.grad(outputs, leaf, weights)[0]
        results.append([result.movedim(dim, 1) if result.dim() == 2 else result for result in (*outputs, gradient)])
    for got, expected in zip(*results, strict=True):
        assert got[bad].isnan().all()
        torch.testing.assert_close(got[good], expected[good])
        assert got[good].isfinite().all()


def test_rows_beyond_the_registers_are_left_to_others():
    for columns in (16384, 16385):
        arguments = (torch.zeros(2, columns, device="cuda"), *scalars(1.0), False, 1)
        if columns == 16384:
            torch.testing.assert_close(ops.gumbel_softmax_op(*arguments).sum(1).cpu(), torch.ones(2))
        else:
            with pytest.raises(dalle_kernels.ProviderError, match="rows of at most 16384 codes, got 16385"):
                ops.gumbel_softmax_op(*arguments)
