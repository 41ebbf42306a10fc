"""The step of AdamW16 against float64 arithmetic of its own, and its compiled kernel against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dalle_kernels
from dalle_kernels import _native, decode_fp0610, decode_fp169, encode_fp0610, encode_fp169
from dalle_kernels.adamw.ops import adamw16_step, adamw16_step_op
from dalle_kernels.testing import assert_accurate

NATIVE = _native.unavailable("cpu") is None
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled library is not built")
PROVIDERS = [pytest.param("native", marks=needs_native), "reference"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODED, PLAIN = (torch.int16, torch.int16), (torch.float32, torch.float32)


@pytest.fixture(params=PROVIDERS)
def provider(request):
    with dalle_kernels.use(request.param):
        yield request.param


def gradients(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Of widely different sizes: the moments flush to zero, keep their codes, and saturate or are clipped."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-36, 6, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def tensors(shape, dtype=torch.float32, moments=CODED, seed=0) -> list[torch.Tensor]:
    """A parameter, a gradient, both moments and the step, such as a few steps leave behind."""
    generator = torch.Generator().manual_seed(seed + 1)
    param = torch.randn(shape, generator=generator).to(dtype)
    mean, variance = gradients(shape, seed=seed + 2) / 8, gradients(shape, seed=seed + 3).square().clamp(max=5)
    first = encode_fp169(mean) if moments[0] == torch.int16 else mean
    second = encode_fp0610(variance) if moments[1] == torch.int16 else variance
    return [param, gradients(shape, dtype, seed), first, second, torch.tensor(3.0)]


def step(columns: list[torch.Tensor], **settings) -> None:
    adamw16_step(*[[tensor] for tensor in columns], **{"lr": 1e-2, **settings})


def copied(columns):
    return [tensor.clone() for tensor in columns]


def assert_same(columns, expected) -> None:
    assert all(torch.equal(a, b) for a, b in zip(columns, expected, strict=True))


def values(columns) -> list[np.ndarray]:
    """Parameter, gradient and moments in float64, codes decoded."""
    decoders = (None, None, decode_fp169, decode_fp0610)
    return [
        (decode(tensor, torch.float64) if tensor.dtype == torch.int16 else tensor.double()).numpy()
        for tensor, decode in zip(columns, decoders)
    ]


def oracle(columns, lr, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, max_variance=5.0, grad_scale=1.0):
    """Parameter and moments after a step, by the textbook in float64."""
    param, grad, mean, variance = values(columns)
    count = columns[4].item() + 1
    grad = grad / float(grad_scale)
    mean = beta1 * mean + (1 - beta1) * grad
    variance = np.minimum(beta2 * variance + (1 - beta2) * grad**2, max_variance)
    root = np.sqrt(variance / (1 - beta2**count)) + eps
    return param - lr * weight_decay * param - lr * mean / (1 - beta1**count) / root, mean, variance


def plain(columns, lr, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, max_variance=5.0, grad_scale=1.0):
    """As :func:`oracle`, in torch's float32, the parameter rounded to its dtype: what a user would write."""
    param, grad, mean, variance = (torch.from_numpy(x).float() for x in values(columns))
    count = columns[4].item() + 1
    grad = grad / float(grad_scale)
    mean = mean.lerp(grad, 1 - beta1)
    variance = (variance * beta2).addcmul(grad, grad, value=1 - beta2).clamp(max=max_variance)
    root = variance.sqrt() / (1 - beta2**count) ** 0.5 + eps
    value = (param * (1 - lr * weight_decay)).addcdiv(mean, root, value=-lr / (1 - beta1**count))
    return value.to(columns[0].dtype), mean, variance


SETTINGS = (
    {"lr": 1e-2},
    {"lr": 0.5, "beta1": 0.5, "beta2": 0.999, "eps": 1e-3, "weight_decay": 0.0, "max_variance": math.inf},
    {"lr": 3e-4, "max_variance": 0.25, "grad_scale": torch.tensor(1.37 * 2**20)},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parameters_and_float32_moments_meet_the_error_rule(dtype, settings, provider):
    columns = tensors((61, 67), dtype, PLAIN)
    exact, near = oracle(columns, **settings), plain(columns, **settings)
    step(columns, **settings)
    for name, actual, p, e in zip(("param", "mean", "variance"), (columns[0], *columns[2:4]), near, exact, strict=True):
        assert_accurate(actual, p, torch.from_numpy(e), name)
    assert columns[4].item() == 4


@pytest.mark.parametrize("exponent", (-126, -100, -60, -1, 0, 7, 37, 60, 64, 100, 120))
@pytest.mark.parametrize("factor", (1.0, 1.37))
def test_every_scale_of_the_gradients_serves(factor, exponent, provider):
    """The error rule holds at every scale, and a power of two changes no bit of what a step without a scale gives."""
    scale = torch.tensor(factor * 2.0**exponent)
    for moments in (CODED, PLAIN):
        columns = tensors((61, 67), moments=moments)
        columns[1] *= scale
        settings = {"lr": 1e-2, "grad_scale": scale}
        exact, near = oracle(columns, **settings), plain(columns, **settings)
        unscaled = copied(columns)
        unscaled[1] = (columns[1].double() / scale.double()).float()
        step(columns, **settings)
        step(unscaled, lr=1e-2)
        if factor == 1.0:
            assert_same(columns[:1] + columns[2:], unscaled[:1] + unscaled[2:])
        if moments == PLAIN:
            for actual, p, e in zip((columns[0], *columns[2:4]), near, exact, strict=True):
                assert_accurate(actual, p, torch.from_numpy(e))


@pytest.mark.parametrize("grad_scale", (1.0, 1.37 * 2**20))
def test_codes_are_those_of_the_moments_but_for_one_rounding(grad_scale, provider):
    """The moments are rounded to float32 before they are encoded: a code is off by one where that crosses a tie.

    With decays that float32 holds and that are no simple fractions: nine tenths of a code often lie at a tie.
    """
    columns = tensors((61, 67))
    beta1, beta2 = float(np.float32(0.8437891)), float(np.float32(0.9612347))
    settings = {"lr": 1e-2, "beta1": beta1, "beta2": beta2, "grad_scale": torch.tensor(grad_scale)}
    _, mean, variance = oracle(columns, **settings)
    step(columns, **settings)
    for codes, expected in (
        (columns[2], encode_fp169(torch.from_numpy(mean))),
        (columns[3], encode_fp0610(torch.from_numpy(variance))),
    ):
        apart = (codes.int() & 0xFFFF) - (expected.int() & 0xFFFF)
        assert apart.abs().max() <= 1 and apart.count_nonzero() <= 4


@needs_native
@pytest.mark.parametrize("moments", (CODED, PLAIN, CODED[:1] + PLAIN[1:], PLAIN[:1] + CODED[1:]))
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_gives_the_bits_of_the_reference(dtype, grad_dtype, moments):
    for size in (0, 1, 7, 15, 16, 17, 33, 4099):
        columns = tensors((size,), dtype, moments, seed=size)
        columns[1] = columns[1].to(grad_dtype)
        expected = copied(columns)
        for round_ in range(2):
            columns[1].copy_(gradients((size,), seed=round_))
            expected[1].copy_(columns[1])
            with dalle_kernels.use("native"):
                step(columns)
            with dalle_kernels.use("reference"):
                step(expected)
        assert_same(columns, expected)


@needs_native
def test_many_tensors_take_one_call_and_any_number_of_threads_gives_the_same_bits():
    shapes = [(1,), (0,), (3, 5), (70_001,), (64,), (129, 65), (2, 0, 3), (5,)] + [(7,)] * 300
    rows = [tensors(shape, torch.bfloat16, seed=index) for index, shape in enumerate(shapes)]
    for index, row in enumerate(rows):
        row[4].fill_(index % 3)  # parameters without a gradient now and then fall behind
    expected = [copied(row) for row in rows]
    for row in expected:
        step(row)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            again = [copied(row) for row in rows]
            with dalle_kernels.use("native"):
                adamw16_step(*map(list, zip(*again)), lr=1e-2)
            for row, wanted in zip(again, expected, strict=True):
                assert_same(row, wanted)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_the_kernel_writes_within_bounds():
    whole = [torch.cat([tensor[:3], tensor, tensor[:3]]) for tensor in tensors((1000,), torch.bfloat16)[:4]]
    before = copied(whole)
    step([*(tensor[3:-3] for tensor in whole), torch.zeros(())])
    for tensor, old in zip(whole, before, strict=True):
        assert torch.equal(tensor[:3], old[:3]) and torch.equal(tensor[-3:], old[-3:])


def layouts():
    base = torch.randn(12, 10, 6)
    return {
        "transposed": (base.transpose(0, 2).clone(memory_format=torch.preserve_format), True),
        "channels last": (torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        "with holes": (base[::2, :, ::3], False),
        "one column": (torch.randn(5, 7)[:, 2:3], False),
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_strides(layout):
    param, dense = layouts()[layout]
    columns = tensors(param.shape)
    expected = copied(columns)
    strided = [torch.empty_strided(param.shape, param.stride(), dtype=x.dtype).copy_(x) for x in columns[:4]]
    args = [*([x] for x in (*strided, columns[4])), 1e-2, 0.9, 0.96, 1e-8, 0.0, 5.0, None, None]
    assert not NATIVE or dalle_kernels.explain("adamw16_step", *args).runs == ("native" if dense else "reference")
    step([*strided, columns[4]])
    step(expected)
    assert_same([*strided, columns[4]], expected)
    # Strides of a gradient's own.
    other = tensors(param.shape)
    other[1] = torch.empty(param.shape[::-1]).permute(*range(param.dim() - 1, -1, -1)).copy_(other[1])
    step(other)
    assert_same(other, expected)


def test_found_nonfinite_changes_nothing(provider):
    for moments in (CODED, PLAIN):
        columns = tensors((1000,), torch.bfloat16, moments)
        columns[1][::3] = math.inf
        before = copied(columns)
        step(columns, found_nonfinite=torch.tensor(True))
        assert_same(columns, before)
        columns[1].fill_(0.5)
        step(columns, found_nonfinite=torch.tensor([False]), grad_scale=torch.tensor([8.0]))
        expected = [before[0], columns[1] / 8, *before[2:]]
        step(expected)
        assert_same(columns[:1] + columns[2:], expected[:1] + expected[2:])


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
def test_a_nonfinite_gradient_ruins_only_its_own_element(bad, provider):
    for dtype in FLOATS:
        columns, expected = tensors((100,), dtype), tensors((100,), dtype)
        columns[1][37] = bad
        step(columns)
        step(expected)
        others = torch.arange(100) != 37
        assert_same([x[others] for x in columns[:4:2]], [x[others] for x in expected[:4:2]])
        assert not columns[0][37].isfinite()
        # Codes hold no NaN: they end at their largest.
        assert decode_fp169(columns[2])[37] == math.copysign(15.984375, bad if bad == -math.inf else 1)
        assert decode_fp0610(columns[3])[37] == 5.0


def test_opcheck_and_one_graph(provider):
    columns = [[x.clone() for x in tensors((5, 6), torch.bfloat16)] for _ in range(2)]
    settings = (1e-2, 0.9, 0.96, 1e-8, 0.045, 5.0, torch.tensor(2.0), torch.tensor(False), None, [0, 1])
    torch.library.opcheck(adamw16_step_op.overload, (*map(list, zip(*columns)), *settings))

    def update(*lists):
        adamw16_step_op(*lists, *settings)
        return lists[0][0] * 2

    expected = [copied(row) for row in columns]
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*map(list, zip(*columns))), update(*map(list, zip(*expected))))
    for row, wanted in zip(columns, expected, strict=True):
        assert_same(row, wanted)


def test_mistakes_get_one_clear_sentence():
    good = [[tensor] for tensor in tensors((4,))]
    for index, wrong, message in (
        (1, torch.zeros(5), r"expected a gradient of its param's shape \(4,\), got \(5,\)"),
        (1, torch.zeros(4, dtype=torch.int64), "expected each gradient as a dense tensor of float32 or"),
        (2, torch.zeros(4, dtype=torch.bfloat16), "expected each first moment as a dense tensor of int16 or float32"),
        (3, torch.zeros(4, device="meta"), "expected each second moment on cpu, got one on meta"),
        (4, torch.zeros(2), "expected each step as a tensor of one element"),
    ):
        lists = list(good)
        lists[index] = [wrong]
        with pytest.raises((TypeError, ValueError), match=message):
            adamw16_step(*lists, lr=0.1)
    with pytest.raises(ValueError, match="expected as many grads as params, 1, got 2"):
        adamw16_step(good[0], good[1] * 2, *good[2:], lr=0.1)
    with pytest.raises(TypeError, match="expected each grad_scale as a dense tensor of float32"):
        adamw16_step(*good, lr=0.1, grad_scale=torch.tensor(2.0, dtype=torch.float64))
    adamw16_step([], [], [], [], [], lr=0.1)


CHECK_ONE_INSTRUCTION_SET = """
import torch, dalle_kernels
from dalle_kernels import _native
from test_adamw import CODED, PLAIN, assert_same, copied, step, tensors
assert _native.instruction_sets()[2] == {isa!r}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for moments in (CODED, PLAIN):
        columns = tensors((50_003,), dtype, moments)
        expected = copied(columns)
        for provider, lists in (("native", columns), ("reference", expected)):
            with dalle_kernels.use(provider):
                step(lists, grad_scale=torch.tensor(1.3))
        assert_same(columns, expected)
"""


@needs_native
def test_every_instruction_set_gives_the_bits_of_the_reference(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)
