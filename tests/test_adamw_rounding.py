"""Stochastic rounding of 16-bit parameters by AdamW16: its mean, its edges, and what its noise depends on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_adamw import CODED, PLAIN, assert_same, copied, needs_native, tensors

import dalle_kernels
from dalle_kernels import AdamW16, _native
from dalle_kernels.adamw.ops import adamw16_step, adamw16_step_op
from dalle_kernels.adamw.reference import stochastically_rounded

HALVES = (torch.float16, torch.bfloat16)
ROW = torch.tensor(7)


def neighbours(value: float, dtype: torch.dtype) -> set[float]:
    """The numbers of ``dtype`` on either side of a positive value."""
    nearest = torch.tensor(value).to(dtype)
    bits = nearest.view(torch.int16).item() + torch.arange(-1, 2, dtype=torch.int16)
    around = sorted(bits.view(dtype).double().tolist())
    return {max(x for x in around if x <= value), min(x for x in around if x >= value)}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [1.0003, 0.3, 1e-6, 3e-8, 1.00048828125, 60001.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_kept(value, sign, dtype):
    count = 1 << 18
    rounded = stochastically_rounded(torch.full((count,), sign * value), dtype, 5, ROW).double()
    exact = torch.tensor(value).double().item()
    low, high = min(neighbours(exact, dtype)), max(neighbours(exact, dtype))
    assert set((sign * rounded).unique().tolist()) <= {low, high}
    # Five standard deviations of the mean of that many draws.
    deviation = math.sqrt((exact - low) * (high - exact) / count)
    assert abs(rounded.mean().item() - sign * exact) <= 5 * deviation + 1e-12 * exact


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_16_bits_hold_stays_as_it_is(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = bits.view(dtype)
    rounded = stochastically_rounded(every.float(), dtype, 0, ROW)
    assert torch.equal(rounded.isnan(), every.isnan())
    assert torch.equal(rounded.view(torch.int16)[~every.isnan()], bits[~every.isnan()])


def test_finite_numbers_stay_finite():
    largest = torch.finfo(torch.float16).max
    beyond = torch.tensor([65504.5, -65519.0, 65520.0, 1e30, -1e38, math.inf, -math.inf])
    expected = [largest, -largest, largest, largest, -largest, math.inf, -math.inf]
    assert stochastically_rounded(beyond, torch.float16, 0, ROW).tolist() == expected


def test_noise_depends_on_seed_row_and_place_alone():
    value = torch.randn(1000)

    def rounded(value=value, seed=3, row=7):
        return stochastically_rounded(value, torch.bfloat16, seed, torch.tensor(row))

    assert torch.equal(rounded(), rounded()) and torch.equal(rounded(value[:123]), rounded()[:123])
    assert torch.equal(rounded(value.view(50, 20)).flatten(), rounded())
    for other in (rounded(seed=4), rounded(row=8), rounded(row=7 + 2**32)):
        assert 0.1 < (other != rounded()).float().mean() < 0.9


def test_a_step_rounds_16_bit_parameters_alone_and_on_average_to_float32s():
    """The moments are those of a step that rounds to nearest; float32 parameters do not change by the seed."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        columns = tensors((300, 70), dtype)
        nearest, again, wide = copied(columns), copied(columns), copied(columns)
        wide[0] = columns[0].float().clone()
        for target, seed in ((columns, 11), (nearest, None), (again, 11), (wide, None)):
            adamw16_step(*[[tensor] for tensor in target], lr=1e-3, rounding_seed=seed)
        assert_same(columns, again)
        assert_same(columns[2:], nearest[2:])
        if dtype == torch.float32:
            assert_same(columns, nearest)
        else:
            assert not torch.equal(columns[0], nearest[0])
            bias = (columns[0].double() - wide[0].double()) / wide[0].double().abs()
            assert abs(bias.mean().item()) < 5 * bias.std().item() / 21000**0.5


SETTINGS = (1e-2, 0.9, 0.96, 1e-8, 0.0, 5.0, None, None)


def test_what_serves_it_and_opcheck():
    columns = tensors((30, 101), torch.bfloat16)
    arguments = [[tensor] for tensor in columns]
    native = "reference" if _native.unavailable("cpu") else "native"
    assert dalle_kernels.explain("adamw16_step", *arguments, *SETTINGS, 5, [0]).runs == native
    turned = [[tensor.t()] if tensor.dim() else [tensor] for tensor in columns]
    assert dalle_kernels.explain("adamw16_step", *turned, *SETTINGS, 5, [0]).runs == "reference"
    assert dalle_kernels.explain("adamw16_step", *turned, *SETTINGS, None, [0]).runs == native
    torch.library.opcheck(adamw16_step_op.overload, (*arguments, *SETTINGS, 5, [0]))


@needs_native
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("moments", [CODED, PLAIN], ids=["coded", "plain"])
def test_native_equals_reference_over_sizes_and_threads(moments, dtype):
    shapes = [(1,), (0,), (3, 5), (40_001,), (64,), (), (129, 65), (63,), (65,)]
    rows = [tensors(shape, dtype, moments, seed) for seed, shape in enumerate(shapes)]
    numbers = [2**31 - 1 - index for index in range(len(rows))]
    before, results = torch.get_num_threads(), []
    try:
        for provider, threads in (("reference", 2), ("native", 1), ("native", 3)):
            torch.set_num_threads(threads)
            results.append([copied(row) for row in rows])
            with dalle_kernels.use(provider):
                adamw16_step(*map(list, zip(*results[-1])), lr=1e-2, rounding_seed=2**63 - 5, numbers=numbers)
    finally:
        torch.set_num_threads(before)
    for row, *others in zip(*results, strict=True):
        for other in others:
            assert_same(row, other)


@needs_native
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_native_equals_reference_where_numbers_end(dtype):
    """With no gradient, moment or decay a step only rounds: every 16-bit number stays, infinities too."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    bits = bits[~bits.view(dtype).isnan()]
    columns = [[bits.clone().view(dtype)], [torch.zeros(len(bits))], *([torch.zeros(len(bits))] for _ in range(2))]
    with dalle_kernels.use("native"):
        adamw16_step(*columns, [torch.tensor(0.0)], lr=1e-2, weight_decay=0.0, rounding_seed=1)
    assert torch.equal(columns[0][0].view(torch.int16), bits)


@needs_native
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_native_equals_reference_between_any_two_numbers_and_beyond_the_last(dtype):
    param = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    param = param[~param.isnan()]
    rows = [[param.clone(), *(torch.zeros(len(param)) for _ in range(3)), torch.zeros(())] for _ in range(2)]
    for provider, row in zip(("reference", "native"), rows, strict=True):
        with dalle_kernels.use(provider):  # growth by a thousandth, which is between all numbers but 0
            adamw16_step(*[[tensor] for tensor in row], lr=1.0, weight_decay=-1e-3, rounding_seed=6)
    assert_same(*rows)


def test_small_steps_add_up_where_nearest_loses_them():
    def moved(seed: int | None) -> float:
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = AdamW16([param], lr=1e-4, weight_decay=0.0, rounding_seed=seed)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return 1 - param.float().mean().item()

    assert moved(None) == 0.0  # each step is a twentieth of half a unit in the last place
    assert moved(1) == pytest.approx(100 * 1e-4, rel=0.1)


def test_parameters_have_noise_of_their_own_and_a_resumed_run_the_same():
    def groups() -> list[dict]:
        params = [torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(3)]
        return [{"params": params[:2]}, {"params": params[2:]}]

    def step(optimizer: AdamW16) -> list[torch.Tensor]:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return [param.detach().clone() for param in params]

    optimizer = AdamW16(groups(), lr=1e-3, rounding_seed=9)
    first = step(optimizer)
    assert not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    resumed = AdamW16(groups(), lr=1e-3)
    with torch.no_grad():
        for param, value in zip((p for group in resumed.param_groups for p in group["params"]), first, strict=True):
            param.copy_(value)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(step(resumed), step(optimizer))


def test_mistakes_get_one_clear_sentence():
    for seed in (-1, 2**63, 1.5, True):
        with pytest.raises(ValueError, match=r"expected rounding_seed from 0 to 2\^63 - 1, or None, got"):
            AdamW16([torch.nn.Parameter(torch.ones(3))], lr=0.1, rounding_seed=seed)
    with pytest.raises(ValueError, match="expected as many numbers as params, 1, got 2"):
        adamw16_step(*[[tensor] for tensor in tensors((3,))], lr=0.1, numbers=[0, 1])
