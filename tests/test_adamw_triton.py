"""Triton's AdamW16 gives the reference's bits: on a GPU, else by the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import dalle_kernels
from dalle_kernels._triton_configurations import Configuration, use_configuration
from dalle_kernels.adamw.ops import adamw16_step

SHAPES = [(1,), (0,), (3, 5), (4099,), (64,), (), (33, 65)] + [(7,)] * 60


def state(shapes, dtype, grad_dtype, coded, device, seed=0):
    """Lists of parameters, gradients of all sizes, moments in the middle of training, and steps."""
    generator = torch.Generator().manual_seed(seed)
    lists = [[], [], [], [], []]
    for number, shape in enumerate(shapes):
        param, grad, first, second = (torch.randn(shape, generator=generator) for _ in range(4))
        sizes = torch.exp2(torch.randint(-20, 3, shape, generator=generator).float())
        first, second = first * sizes, (second * sizes).square()
        if coded[0]:
            first = dalle_kernels.encode_fp169(first)
        if coded[1]:
            second = dalle_kernels.encode_fp0610(second)
        row = param.to(dtype), (grad * sizes).to(grad_dtype), first, second, torch.tensor(float(number**4))
        for tensors, tensor in zip(lists, row, strict=True):
            tensors.append(tensor.to(device))
    return lists


def check(lists, **settings) -> None:
    """Two steps, so that the second starts from what the first wrote."""
    copies = [[tensor.clone() for tensor in tensors] for tensors in lists]
    for _ in range(2):
        adamw16_step(*lists, **settings)
        with dalle_kernels.use("reference"):
            adamw16_step(*copies, **settings)
    for tensors, expected in zip(lists, copies, strict=True):
        for got, wanted in zip(tensors, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def coded_state(triton_device):
    """As :func:`state`, on the device; the codes are the reference's."""

    def make(*args, **options):
        with dalle_kernels.use("reference"):
            return state(*args, triton_device, **options)

    return make


@pytest.mark.parametrize(
    ("dtypes", "coded"),
    (((torch.float32, torch.float32), (True, True)), ((torch.float32, torch.float32), (False, False)),
     ((torch.bfloat16, torch.bfloat16), (True, True)), ((torch.float16, torch.float16), (True, False)),
     ((torch.float32, torch.bfloat16), (True, False)), ((torch.float32, torch.float16), (False, True))),
    ids=str,
)  # fmt: skip
def test_many_parameters_in_one_launch(dtypes, coded, coded_state):
    check(coded_state(SHAPES, *dtypes, coded), lr=3e-3)


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("dtypes", "coded"),
    (((torch.bfloat16, torch.float32), (True, True)), ((torch.float16, torch.float16), (False, True)),
     ((torch.float32, torch.float32), (True, True))),
    ids=str,
)  # fmt: skip
def test_stochastic_rounding(dtypes, coded, coded_state):
    """Of 16-bit parameters; the seed does not matter to others."""
    lists = coded_state([(1,), (0,), (3, 5), (4099,), ()], *dtypes, coded)
    check(lists, lr=3e-3, rounding_seed=2**63 - 5, numbers=[2**31 - 1 - number for number in range(5)])


def every_number(dtype, device):
    """As :func:`state`: a parameter of all numbers that 16 bits hold, NaN included, whose gradient is 0."""
    param = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    zeros = torch.zeros(len(param))
    return [[tensor.to(device)] for tensor in (param, *(zeros.clone() for _ in range(3)), torch.zeros(()))]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_lies_between_two_numbers_and_beyond_the_last_is_rounded(dtype, triton_device):
    check(every_number(dtype, triton_device), lr=1.0, weight_decay=-1e-3, rounding_seed=6)


@pytest.mark.parametrize("found", (False, True, None))
def test_scaled_gradients_and_steps_that_must_not_be_taken(found, coded_state, triton_device):
    lists = coded_state(SHAPES[:7], torch.float32, torch.float16, (True, True))
    flag = None if found is None else torch.tensor([found], device=triton_device)
    check(lists, lr=1e-2, grad_scale=torch.tensor(1.37 * 2**9, device=triton_device), found_nonfinite=flag)
    assert lists[4][0].item() == (0 if found else 2)


@pytest.mark.parametrize(
    "settings",
    (
        {"lr": 0.0},
        {"lr": 1e-3, "beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0},
        {"lr": 1e-3, "beta2": 0.999, "eps": 0.0, "max_variance": math.inf},
        {"lr": 0.5, "beta1": 0.95, "eps": 1e-3, "max_variance": 1e-4},
    ),
    ids=str,
)
def test_settings(settings, coded_state):
    lists = coded_state([(3000,)], torch.bfloat16, torch.bfloat16, (True, True))
    lists[4][0].fill_(2)
    check(lists, **settings)


def test_what_is_not_finite_is_taken_as_the_reference_takes_it(coded_state):
    lists = coded_state([(500,)], torch.float32, torch.float32, (True, False))
    lists[1][0][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    check(lists, lr=1e-3)


def test_any_block_size_serves(coded_state):
    with use_configuration("adamw16_step", "any", Configuration({"BLOCK": 128}, num_warps=2)):
        check(coded_state([(127,), (128,), (129,), (300,)], torch.float16, torch.float16, (True, True)), lr=1e-3)


def test_autograd_sees_that_parameters_changed(coded_state):
    lists = coded_state([(5,)], torch.float32, torch.float32, (True, True))
    before = lists[0][0]._version
    adamw16_step(*lists, lr=1e-3)
    assert lists[0][0]._version > before
