"""The CUDA kernels of single passes over memory, compiled for the CPU by tests/cuda_on_cpu, against the reference."""

from __future__ import annotations

import fuzz
import pytest
import torch

import dalle_kernels
from dalle_kernels import _native, decode_fp0610, decode_fp169, encode_fp0610, encode_fp169
from dalle_kernels.adamw.ops import _FACTORS

OPS = [
    *("encode_fp169", "encode_fp0610", "decode_fp169", "decode_fp0610"),
    *("scale_cast_filter", "filter_cast_unscale"),
    "adamw16_step",
]


@pytest.fixture
def kernels(served_on_cpu, monkeypatch):
    call = _native.call

    def with_factors(name, device, *arguments, **named):
        if "factors" in named:  # AdamW's, which a CPU kernel does without
            factors = torch.full((len(named["parameters"]), _FACTORS), torch.nan)
            named["factors"] = factors.data_ptr()
        return call(name, device, *arguments, **named)

    monkeypatch.setattr(_native, "call", with_factors)


@pytest.mark.parametrize("op", OPS)
def test_fuzzed_calls_agree_with_the_reference(op, kernels):
    found = fuzz.fuzz(op, 40, seed=0)
    assert found.passed, str(found)


@pytest.mark.parametrize(
    ("encode", "decode"), [(encode_fp169, decode_fp169), (encode_fp0610, decode_fp0610)], ids=["fp169", "fp0610"]
)
def test_every_16_bit_number_and_every_code(encode, decode, kernels):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    cases = [(encode, bits.view(torch.float16)), (encode, bits.view(torch.bfloat16)), (decode, bits)]
    with dalle_kernels.use("reference"):
        expected = [function(x) for function, x in cases]
    with dalle_kernels.use("native"):
        for (function, x), whole in zip(cases, expected, strict=True):
            assert fuzz.same_bits(function(x), whole)
