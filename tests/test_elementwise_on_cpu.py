"""The CUDA kernels of single passes over memory, compiled for the CPU by tests/cuda_on_cpu, against the reference."""

from __future__ import annotations

import fuzz
import on_cpu
import pytest
import torch

import dalle_kernels
from dalle_kernels import _native, decode_fp0610, decode_fp169, encode_fp0610, encode_fp169
from dalle_kernels.adamw.ops import _FACTORS

OPS = {
    "float16": ("encode_fp169", "encode_fp0610", "decode_fp169", "decode_fp0610"),
    "grad_scale": ("scale_cast_filter", "filter_cast_unscale"),
    "adamw": ("adamw16_step",),
}


@pytest.fixture
def serve(monkeypatch):
    """Have a family's ops run its CUDA kernels on CPU tensors."""

    def serve(family: str) -> None:
        on_cpu.serve(monkeypatch, on_cpu.compiled(family))
        if family == "adamw":
            call = _native.call

            def with_factors(name, device, *arguments, **named):
                if "factors" in named:  # which a CPU kernel does without
                    factors = torch.full((len(named["parameters"]), _FACTORS), torch.nan)
                    named["factors"] = factors.data_ptr()
                return call(name, device, *arguments, **named)

            monkeypatch.setattr(_native, "call", with_factors)

    return serve


@pytest.mark.parametrize(("family", "op"), [(family, op) for family, ops in OPS.items() for op in ops])
def test_fuzzed_calls_agree_with_the_reference(family, op, serve):
    serve(family)
    found = fuzz.fuzz(op, 40, seed=0)
    assert found.passed, str(found)


@pytest.mark.parametrize(
    ("encode", "decode"), [(encode_fp169, decode_fp169), (encode_fp0610, decode_fp0610)], ids=["fp169", "fp0610"]
)
def test_every_16_bit_number_and_every_code(encode, decode, serve):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    cases = [(encode, bits.view(torch.float16)), (encode, bits.view(torch.bfloat16)), (decode, bits)]
    with dalle_kernels.use("reference"):
        expected = [function(x) for function, x in cases]
    serve("float16")
    with dalle_kernels.use("native"):
        for (function, x), whole in zip(cases, expected, strict=True):
            assert fuzz.same_bits(function(x), whole)
