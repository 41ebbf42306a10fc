"""Family float16 against an oracle of its own: exact arithmetic on the formats' definition (paper B.2 and E.2)."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

import dalle_kernels
from dalle_kernels import _native

FORMATS = ("fp169", "fp0610")
PROVIDERS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built"),
    ),
    "reference",
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ALL_CODES = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16)


@pytest.fixture(params=PROVIDERS)
def provider(request):
    with dalle_kernels.use(request.param):
        yield request.param


def encode(form: str, x: torch.Tensor) -> torch.Tensor:
    return getattr(dalle_kernels, f"encode_{form}")(x)


def encode_checked(form: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(dalle_kernels, f"encode_{form}_checked")(x)


def decode(form: str, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return getattr(dalle_kernels, f"decode_{form}")(codes, dtype)


def significand_bits(form: str) -> int:
    return {"fp169": 9, "fp0610": 10}[form]


@cache
def magnitudes(form: str) -> np.ndarray:
    """Value of every code without a sign bit, from the definition; exact as doubles."""
    steps = 2 ** significand_bits(form)
    exponents, significands = np.divmod(np.arange(64 * steps), steps)
    values = np.ldexp(1 + significands / steps, exponents - 60)
    values[0] = 0.0
    return values


def oracle_encode(form: str, values: np.ndarray) -> np.ndarray:
    """Codes of finite numbers: the nearest magnitude, halves away from zero. Every step is exact in doubles."""
    table, bits = magnitudes(form), significand_bits(form)
    values = values.astype(np.float64)
    fractions, exponents = np.frexp(np.abs(values))  # fractions in [1/2, 1)
    steps = np.ldexp(2 * fractions - 1, bits)
    whole = np.floor(steps)
    codes = ((exponents.astype(np.int64) - 1 + 60) << bits) + whole.astype(np.int64) + (steps - whole >= 0.5)
    codes = np.where(np.abs(values) >= table[-1], len(table) - 1, codes)
    codes = np.where(np.abs(values) < table[1], 0, codes)
    if form == "fp0610":
        return np.where(values < 0, 0, codes)
    return np.where((values < 0) & (codes > 0), codes | 0x8000, codes)


def as_unsigned(codes: torch.Tensor) -> np.ndarray:
    return codes.numpy().view(np.uint16).astype(np.int64)


@pytest.mark.parametrize("form", FORMATS)
def test_every_code_decodes_to_its_definition(form, provider):
    table = magnitudes(form)
    codes = as_unsigned(ALL_CODES)
    expected = table[codes & 0x7FFF] * np.where(codes & 0x8000, -1.0, 1.0) if form == "fp169" else table[codes]
    for dtype in (torch.float32, torch.float64):
        assert np.array_equal(decode(form, ALL_CODES, dtype).double().numpy(), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(decode(form, ALL_CODES, dtype), torch.from_numpy(expected).float().to(dtype))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_every_code_survives_a_round_trip(form, dtype, provider):
    back = encode(form, decode(form, ALL_CODES, dtype))
    expected = ALL_CODES.clone()
    if form == "fp169":
        expected[expected == -0x8000] = 0  # minus zero is encoded as zero
    assert torch.equal(back, expected)


def neighbours(form: str, dtype: torch.dtype) -> torch.Tensor:
    """Every magnitude, every midpoint to the next one, and the representable numbers on either side of both."""
    table = magnitudes(form)
    middles = (table[:-1] + table[1:]) / 2
    exact = np.concatenate([table, middles]).astype({torch.float32: np.float32, torch.float64: np.float64}[dtype])
    points = np.concatenate(
        [exact, np.nextafter(exact, np.inf, dtype=exact.dtype), np.nextafter(exact, -np.inf, dtype=exact.dtype)]
    )
    return torch.from_numpy(np.concatenate([points, -points]))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_around_every_code_and_every_midpoint(form, dtype, provider):
    points = neighbours(form, dtype)
    assert np.array_equal(as_unsigned(encode(form, points)), oracle_encode(form, points.numpy()))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_16_bit_number(form, dtype, provider):
    numbers = ALL_CODES.view(dtype)
    numbers = numbers[numbers.isfinite()]
    expected = oracle_encode(form, numbers.double().numpy())
    assert np.array_equal(as_unsigned(encode(form, numbers)), expected)


def test_saturation_flush_ties_and_signs(provider):
    largest, smallest = 15.984375, (1 + 2**-9) * 2.0**-60
    x = torch.tensor([1e30, -1e30, largest, -16.0, smallest, -smallest, smallest * 0.999, -0.0, 0.0, 1e-45])
    expected = [largest, -largest, largest, -largest, smallest, -smallest, 0.0, 0.0, 0.0, 0.0]
    assert decode("fp169", encode("fp169", x)).tolist() == pytest.approx(expected, rel=0, abs=0)
    ties = torch.tensor([1 + 2.0**-10, -1 - 2.0**-10, 1 + 3 * 2.0**-10, 2 - 2.0**-10])
    assert decode("fp169", encode("fp169", ties)).tolist() == [1 + 2.0**-9, -1 - 2.0**-9, 1 + 2.0**-8, 2.0]
    largest, smallest = 15.9921875, (1 + 2**-10) * 2.0**-60
    x = torch.tensor([1e30, -1e30, 16.0, -1.0, smallest, smallest * 0.999, 1 + 2.0**-11])
    assert decode("fp0610", encode("fp0610", x)).tolist() == [largest, 0.0, largest, 0.0, smallest, 0.0, 1 + 2.0**-10]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_are_reported_and_encoded_as_documented(dtype, provider):
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 1.0], dtype=dtype)
    x[3] = torch.copysign(x[3], torch.tensor(-1.0, dtype=dtype))
    codes, nonfinite = encode_checked("fp169", x)
    assert decode("fp169", codes).tolist() == [15.984375, -15.984375, 15.984375, 15.984375, 1.0]
    assert nonfinite.shape == () and nonfinite.dtype == torch.bool and nonfinite.item()
    codes, nonfinite = encode_checked("fp0610", x)
    assert decode("fp0610", codes).tolist() == [15.9921875, 0.0, 15.9921875, 15.9921875, 1.0] and nonfinite.item()
    for form in FORMATS:
        finite = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0], dtype=dtype)
        assert not encode_checked(form, finite)[1].item()
        assert not encode_checked(form, torch.empty(0, dtype=dtype))[1].item()
        for bad in (math.inf, -math.inf, math.nan):
            for position in (0, 12345, 99_999):  # each of two threads' share
                y = torch.zeros(100_000, dtype=dtype)
                y[position] = bad
                assert encode_checked(form, y)[1].item()


def strided_views() -> dict[str, torch.Tensor]:
    base = torch.randn(12, 10, 14, generator=torch.Generator().manual_seed(1))
    return {
        "transposed": base.transpose(0, 2),
        "every other": base[::2, 1::3, ::2],
        "expanded": base[:, :1, :1].expand(12, 5, 7),
        "channels last": base[None].to(memory_format=torch.channels_last),
        "flat with a stride": base.flatten()[3::7],
        "no dimensions": base[1, 2, 3],
        "empty inside": base[:, :0],
        "nine dimensions": base[:8, 0, :8].reshape(2, 2, 2, 2, 2, 2).expand(2, 1, 2, 2, 2, 2, 2, 2, 2).transpose(0, 8),
    }


@pytest.mark.parametrize("view", strided_views())
@pytest.mark.parametrize("form", FORMATS)
def test_strides_and_shapes(form, view):
    x = strided_views()[view]
    expected = encode(form, x.contiguous())
    codes = encode(form, x)
    assert codes.shape == x.shape and codes.is_contiguous() and torch.equal(codes, expected)
    strided = torch.empty_strided(x.shape, x.stride(), dtype=torch.int16) if 0 not in x.stride() else expected
    strided.copy_(expected)
    values = decode(form, strided)
    assert values.is_contiguous() and torch.equal(values, decode(form, expected))


@pytest.mark.parametrize("size", (1, 7, 8, 33, 65_537, 131_073))
def test_native_equals_reference_at_odd_sizes_and_writes_every_element(size):
    bits = torch.randint(-(2**31), 2**31, (size + 1,), generator=torch.Generator().manual_seed(size))
    x = bits.to(torch.int32).view(torch.float32)[1:]  # 4 bytes off any vector's alignment
    for dtype in DTYPES:
        for form in FORMATS:
            y = x.to(dtype)
            codes, nonfinite = encode_checked(form, y)
            values = decode(form, codes, dtype)
            with dalle_kernels.use("reference"):
                expected_codes, expected_nonfinite = encode_checked(form, y)
                expected_values = decode(form, codes, dtype)
            assert torch.equal(codes, expected_codes) and torch.equal(nonfinite, expected_nonfinite)
            assert torch.equal(values, expected_values)


@pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")
def test_kernels_write_within_bounds_and_all_of_them():
    x = torch.randn(1000)
    codes = torch.full((1002,), 0x7ABC, dtype=torch.int16)
    flag = torch.full((3,), 7, dtype=torch.uint8)
    library = _native.library("cpu")
    common = {"sizes": [1000], "strides": [1], "format": 0, "executor": 2}
    library.float16_encode(
        input=x.data_ptr(), dtype=0, codes=codes[1:].data_ptr(), nonfinite=flag[1:].data_ptr(), **common
    )
    assert flag.tolist() == [7, 0, 7] and codes[0] == codes[-1] == 0x7ABC
    assert torch.equal(codes[1:-1], encode("fp169", x))
    values = torch.full((1002,), math.nan)
    library.float16_decode(codes=codes[1:].data_ptr(), output=values[1:].data_ptr(), dtype=0, **common)
    assert values[[0, -1]].isnan().all() and torch.equal(values[1:-1], decode("fp169", codes[1:-1]))


@pytest.mark.parametrize("form", FORMATS)
def test_opcheck(form, provider):
    operators = torch.ops.dalle_kernels
    x = torch.randn(5, 6).t()
    torch.library.opcheck(getattr(operators, f"encode_{form}").default, (x,))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(getattr(operators, f"decode_{form}").default, (encode(form, x).t(), dtype))


def test_compiles_into_one_graph():
    def through_fp169(x):
        codes, nonfinite = dalle_kernels.encode_fp169_checked(x * 2)
        return dalle_kernels.decode_fp169(codes) + 1, dalle_kernels.encode_fp0610(x), nonfinite

    x = torch.randn(3, 5, 7).transpose(0, 1)
    compiled = torch.compile(through_fp169, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), through_fp169(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("form", FORMATS)
def test_mistakes_get_one_clear_sentence(form):
    with pytest.raises(TypeError, match=r"expected x to be a tensor of float32.*got a tensor of torch.int64"):
        encode(form, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"expected x to be a tensor of float32.*got list"):
        encode(form, [1.0])
    with pytest.raises(TypeError, match=r"expected codes to be a tensor of int16, got a tensor of torch.int32"):
        decode(form, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"expected dtype to be float32.*got torch.int16"):
        decode(form, torch.zeros(3, dtype=torch.int16), torch.int16)


CHECK_ONE_INSTRUCTION_SET = """
import torch, dalle_kernels
from dalle_kernels import _native
assert _native.instruction_sets()[2] == {isa!r}
for form in ("fp169", "fp0610"):
    encode, decode = (getattr(dalle_kernels, f"{{job}}_{{form}}") for job in ("encode", "decode"))
    bits = torch.randint(-2**31, 2**31, (100_003,), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = bits.to(torch.int32).view(torch.float32).to(dtype)
        results = []
        for provider in ("native", "reference"):
            with dalle_kernels.use(provider):
                codes = encode(x)
                results.append((codes, decode(codes, dtype)))
        assert all(torch.equal(a, b) for a, b in zip(*results)), (form, dtype)
"""


@pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")
def test_every_instruction_set_equals_the_reference(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)


@pytest.mark.gpu
@pytest.mark.skipif(_native.unavailable("cuda") is not None, reason="no GPU, or the CUDA library is not built")
@pytest.mark.parametrize("form", FORMATS)
def test_cuda_equals_reference(form):
    bits = torch.randint(-(2**31), 2**31, (131_077,), generator=torch.Generator().manual_seed(0))
    for dtype in DTYPES:
        flat = bits.to(torch.int32).view(torch.float32).to(dtype).cuda()
        for x in (flat, flat[1:], flat[: 3 * 40_000].view(300, 400).t(), flat[::3], flat[:0]):
            codes, nonfinite = encode_checked(form, x)
            values = decode(form, codes.t() if x.dim() == 2 else codes, dtype)
            with dalle_kernels.use("reference"):
                assert all(torch.equal(a, b) for a, b in zip((codes, nonfinite), encode_checked(form, x)))
                assert torch.equal(values, decode(form, codes.t() if x.dim() == 2 else codes, dtype))
