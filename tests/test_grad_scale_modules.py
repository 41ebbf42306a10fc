"""Resblocks under loss scales of their own: ScaledResBlock against float64, and the rules by which GradScales moves."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dalle_kernels import AdamW16, GradScales, ScaledResBlock, scaled_resblock, squared_norms
from dalle_kernels.testing import assert_accurate

HALVES = (torch.float16, torch.bfloat16)
ROOT = math.sqrt(2)
GROWTH = 2 ** (1 / 1000)


def scales_after(history: str, replicas: int = 1) -> list[float]:
    """One block's scale at the start and after each update: "x" with a nonfinite gradient, "." without."""
    scales = GradScales(1, replicas)
    seen = [scales.scales.item()]
    for mark in history:
        scales.update(torch.tensor([mark == "x"]))
        seen.append(scales.scales.item())
    return seen


@pytest.mark.parametrize(
    ("history", "factor"),
    [
        ("", 1),
        (".", GROWTH),
        ("." * 7, GROWTH**7),
        ("x", 1 / ROOT),
        ("xx", 1 / ROOT),  # the window: the second one is skipped, and does not grow
        ("x" + "x" * 124, 1 / ROOT),
        ("x" + "x" * 125, 1 / 2),
        ("x" + "." * 124 + "x", GROWTH**124 / 2),  # 125 updates later
        ("x" + "." * 123 + "x", GROWTH**123 / ROOT),
        ("x" + "." * 124 + "xx", GROWTH**124 / 2),  # which opens the next window
        ("x" * 126 + "x" * 125, 2**-1.5),
        ("." * 3 + "x" + "." * 2, GROWTH**5 / ROOT),
    ],
)
def test_growth_backoff_and_window(history, factor):
    assert scales_after(history)[-1] == pytest.approx(2**13 * factor, rel=1e-7)


@pytest.mark.parametrize("replicas", [1, 3, 1024])
def test_start_and_clamp(replicas):
    assert scales_after("", replicas) == [replicas * 2**13]
    grown = scales_after("." * 11_100, replicas)
    assert grown[11_000] == grown[-1] == replicas * 2**24 and grown[10_999] < grown[-1]
    shrunk = scales_after("x" * 125 * 14, replicas)
    assert shrunk[-1] == shrunk[125 * 11 + 1] == replicas * 2**7
    assert shrunk[125 * 11] == pytest.approx(replicas * 2**7.5, rel=1e-7)


def test_blocks_move_apart_and_in_place():
    scales = GradScales(3)
    first = scales.scales[0]
    scales.update(torch.tensor([True, False, False]))
    scales.update(torch.tensor([False, False, True]))
    expected = [GROWTH / ROOT, GROWTH**2, GROWTH / ROOT]
    assert scales.scales.tolist() == pytest.approx([2**13 * factor for factor in expected], rel=1e-7)
    assert first.item() == scales.scales[0].item()


def test_nothing_is_read_by_the_host():
    scales = GradScales(4, replicas=2, device="meta")  # whose values nobody can read
    scales.update(torch.empty(4, dtype=torch.bool, device="meta"))
    scales.load_state_dict(scales.state_dict())


def test_a_resumed_run_has_the_same_bits():
    draw = torch.Generator().manual_seed(0)
    marks = torch.rand(400, 5, generator=draw) < 0.05
    whole, first, second = GradScales(5), GradScales(5), GradScales(5, replicas=2)
    for mark in marks:
        whole.update(mark)
    for mark in marks[:150]:
        first.update(mark)
    state = first.state_dict()
    first.update(marks[150])  # which the state must not follow
    second.load_state_dict(state)
    for mark in marks[150:]:
        second.update(mark)
    assert torch.equal(2 * whole.scales, second.scales)  # on twice the replicas
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_mistakes_get_one_clear_sentence():
    scales = GradScales(3)
    for nonfinite in (torch.zeros(2, dtype=torch.bool), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"expected nonfinite as bool of shape \(3,\), got torch"):
            scales.update(nonfinite)
    with pytest.raises(ValueError, match="expected a state of exponents, waiting, got scales"):
        scales.load_state_dict({"scales": torch.ones(3)})
    with pytest.raises(ValueError, match=r"expected exponents as torch.int32 of shape \(3,\), got .* \(4,\)"):
        scales.load_state_dict(GradScales(4).state_dict())
    with pytest.raises(ValueError, match="expected n_blocks >= 0 and replicas >= 1, got 2 and 0"):
        GradScales(2, replicas=0)
    with pytest.raises(TypeError, match=r"expected dtype float16 or bfloat16, got torch\.float32"):
        ScaledResBlock(nn.Identity(), torch.ones(()), torch.float32)
    for scale, got in ((2.0, "float"), (torch.ones(2), r"torch.float32 of shape \(2,\)")):
        with pytest.raises(TypeError, match=f"expected scale as a float32 tensor of one element, got {got}"):
            ScaledResBlock(nn.Identity(), scale)


def branch(dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(17, 40), nn.GELU(), nn.Linear(40, 17)).to(dtype)


def gradients(blocks, call, x, grad):
    """Of x and of the blocks' parameters."""
    x = x.detach().requires_grad_()
    call(x).backward(grad)
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    return [x.grad, *(parameter.grad for parameter in parameters)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_forward_and_gradients_follow_float64(dtype):
    blocks = [branch(dtype, seed) for seed in range(3)]
    exact_blocks = [branch(dtype, seed).double() for seed in range(3)]
    scales = GradScales(3).scales
    x, grad = torch.randn(5, 9, 17), torch.randn(5, 9, 17) / 1000

    model = nn.Sequential(*(ScaledResBlock(block, scale, dtype) for block, scale in zip(blocks, scales)))
    plain_blocks = [branch(dtype, seed) for seed in range(3)]

    def plain(x):
        for block in plain_blocks:
            x = x + block(x.to(dtype)).float()
        return x

    def exact(x):
        for block in exact_blocks:
            x = x + block(x)
        return x

    assert model(x).dtype == torch.float32
    assert_accurate(model(x), plain(x), exact(x.double()), "forward")
    expected = gradients(exact_blocks, exact, x.double(), grad.double())
    # Small gradients lose nothing to the scale, and without it bits to subnormal numbers.
    plainly = gradients(plain_blocks, plain, x, grad)
    ours = gradients(blocks, model, x, grad)
    for index, (got, plain_grad, wanted) in enumerate(zip(ours, plainly, expected, strict=True)):
        scale = 1.0 if index == 0 else 2.0**13  # the parameters' stay multiplied
        assert_accurate(got.double() / scale, plain_grad.double(), wanted, f"gradient {index}")


def test_small_gradients_survive_and_the_identity_path_is_float32():
    grad = torch.full((4, 17), 2.0**-30)
    block = branch(torch.float16)
    alone = gradients([block], lambda x: x + block(x.half()).float(), torch.randn(4, 17), grad)
    assert torch.equal(alone[0], grad) and not any(g.any() for g in alone[1:])  # underflow: the block learns nothing
    block.zero_grad()
    scaled = gradients([block], ScaledResBlock(block, torch.tensor(2.0**24)), torch.randn(4, 17), grad)
    assert all(g.any() for g in scaled[1:]) and (scaled[0] != grad).all()


def test_what_overflows_is_filtered_and_stays_off_the_identity_path():
    block, grad = nn.Identity(), torch.tensor([1.0, 2.0**30, math.inf, math.nan, -1.0])
    (got,) = gradients([], ScaledResBlock(block, torch.tensor(4.0)), torch.zeros(5), grad)
    assert got[[0, 1, 4]].tolist() == [2.0, 2.0**30, -2.0]  # the block's share of the second is 0
    assert math.isinf(got[2]) and math.isnan(got[3])  # as it arrived

    # An overflow on the way back through the block does not leave it either, but its parameters tell.
    block = nn.Linear(3, 3, bias=False).half()
    nn.init.constant_(block.weight, 2.0**10)
    got, weight = gradients(
        [block], ScaledResBlock(block, torch.tensor(2.0**13)), torch.full((2, 3), 64.0), torch.ones(2, 3)
    )
    assert torch.equal(got, torch.ones(2, 3)) and weight.isinf().all()
    assert squared_norms([[weight]]).isinf().item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_under_checkpointing_and_a_compiler_the_same_bits(dtype):
    block, scale = branch(dtype), torch.tensor(2.0**13)
    module = ScaledResBlock(block, scale, dtype)
    inside = partial(checkpoint, block, use_reentrant=False)
    x, grad = torch.randn(6, 17), torch.randn(6, 17) / 100
    results = []
    for call in (
        module,
        partial(checkpoint, module, use_reentrant=False),
        lambda x: scaled_resblock(inside, x, scale, dtype),
        torch.compile(module, fullgraph=True, backend="aot_eager"),
    ):
        block.zero_grad()
        results.append(gradients([block], call, x, grad))
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def test_a_compiled_block_follows_its_scale_without_compiling_again():
    scales = GradScales(2)
    module = ScaledResBlock(nn.Identity(), scales.scales[1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    small = torch.full((3,), 2.0**-24 * 1.25)  # which rounds, once multiplied, as the scale lets it
    (before,) = gradients([], compiled, torch.zeros(3), small)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(130):
            scales.update(torch.ones(2, dtype=torch.bool))
        scales.scales.fill_(0.25)
        (after,) = gradients([], compiled, torch.zeros(3), small)
    assert torch.equal(before, 2 * small) and torch.equal(after, small)  # then it underflows


def test_a_scale_that_changes_before_the_backward_is_noticed():
    scales = GradScales(1)
    out = ScaledResBlock(nn.Identity(), scales.scales[0])(torch.ones(3, requires_grad=True))
    scales.update(torch.tensor([False]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_block_gets_the_other_arguments():
    class Shifted(nn.Module):
        def forward(self, x, shift, *, sign):
            assert x.dtype == torch.float16
            return sign * (x + shift)

    assert ScaledResBlock(Shifted(), torch.tensor(1.0))(torch.ones(2), 2, sign=-1).tolist() == [-2, -2]


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
def test_squared_norms_of_blocks(dtype):
    blocks = [
        [torch.randn(3, 5), torch.randn(7)],
        [torch.randn(())],
        [torch.randn(2, 0), torch.randn(9), torch.ones(1)],
    ]
    blocks = [[grad.to(dtype) for grad in block] for block in blocks]
    expected = [sum(grad.double().square().sum().item() for grad in block) for block in blocks]
    norms = squared_norms(blocks)
    assert norms.dtype == torch.float32 and norms.tolist() == pytest.approx(expected, rel=1e-5)
    blocks[0][1][3], blocks[2][1][0] = math.nan, -math.inf
    assert squared_norms(blocks).isfinite().tolist() == [False, True, False]
    largest = torch.full((1000,), 65504.0, dtype=torch.float16)
    assert squared_norms([[largest]]).item() == pytest.approx(1000 * 65504.0**2)


def test_a_run_whose_overflow_is_skipped_on_the_device():
    """GradScales, squared_norms and AdamW16 together: one block too many, whose scale falls until it fits."""
    torch.manual_seed(0)
    blocks = [branch(torch.float16, seed) for seed in range(2)]
    scales = GradScales(2)
    scales.exponents[1] = 21_000
    scales.load_state_dict(scales.state_dict())
    model = nn.Sequential(*(ScaledResBlock(block, scale) for block, scale in zip(blocks, scales.scales)))
    optimizer = AdamW16([{"params": block.parameters()} for block in blocks], lr=1e-3)
    optimizer.grad_scale = list(scales.scales)
    x, y = torch.randn(64, 17), torch.randn(64, 17)
    losses, skipped = [], []
    for _ in range(900):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        nonfinite = squared_norms([[p.grad for p in block.parameters()] for block in blocks]).isfinite().logical_not()
        optimizer.found_inf = nonfinite.any()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        scales.update(nonfinite)
        losses.append(loss.item())
        skipped.append(nonfinite.tolist())
        assert not nonfinite.any() or all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not any(first for first, _ in skipped) and 0 < sum(second for _, second in skipped) < len(skipped)
    assert losses[-1] < 0.7 * losses[0]
    assert scales.scales[0] == pytest.approx(2**13 * GROWTH**900, rel=1e-6) and scales.scales[1] < 2**21
