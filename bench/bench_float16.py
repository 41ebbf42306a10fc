"""Encoding and decoding 1-6-9 and 0-6-10 against the floor: a copy that moves as many bytes.

The kernels write into memory that is there already, as the copy does: on a CPU a fresh output costs more in page faults
than the kernel takes. On a GPU Triton's kernels stand beside the compiled ones, with outputs of their own, which
torch's cache of memory makes free.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import OURS, Candidate, Case, Goal

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.float16.reference import FP0610, FP169

ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}


@pytest.mark.parametrize("work", ("encode", "decode"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("form", (FP169, FP0610), ids=lambda form: form.name)
def test_codec(side_by_side, device, form, dtype, work):
    elements = ELEMENTS[device]
    x = torch.randn(elements, device=device).exp().sub_(1).to(dtype)
    codes = torch.empty(elements, dtype=torch.int16, device=device)
    nonfinite = torch.empty((), dtype=torch.bool, device=device)
    values = torch.empty_like(x)
    half = (x.nbytes + codes.nbytes) // 2
    source = torch.randint(0, 256, (half,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    common = {"sizes": [elements], "strides": [1], "dtype": _native.DTYPES[dtype], "format": form.number}
    addresses = {"input": x.data_ptr(), "codes": codes.data_ptr(), "nonfinite": nonfinite.data_ptr()}
    calls = {
        "encode": partial(_native.call, "float16_encode", x.device, **addresses, **common),
        "decode": partial(
            _native.call, "float16_decode", x.device, codes=codes.data_ptr(), output=values.data_ptr(), **common
        ),
    }

    rivals = [Candidate("copy of as many bytes", lambda: target.copy_(source), same_function=False)]
    if device == "cuda":
        # Imported here, since Triton need not be installed.
        from dalle_kernels.float16 import triton_kernels

        calls_of_triton = {
            "encode": partial(triton_kernels.encode, form, x),
            "decode": partial(triton_kernels.decode, form, codes, dtype),
        }
        rivals.append(Candidate("Triton", calls_of_triton[work]))

    def check() -> None:
        calls["encode"]()
        calls["decode"]()
        some = slice(None, None, 16)
        with dalle_kernels.use("reference"):
            expected = getattr(dalle_kernels, f"encode_{form.name}")(x[some])
            decoded = getattr(dalle_kernels, f"decode_{form.name}")(expected, dtype)
        assert torch.equal(codes[some], expected), "encoding differs from the reference"
        assert torch.equal(values[some], decoded), "decoding differs from the reference"
        if device == "cuda":
            assert torch.equal(calls_of_triton["encode"]()[0], codes), "Triton encodes otherwise"
            assert torch.equal(calls_of_triton["decode"](), values), "Triton decodes otherwise"

    side_by_side(
        Case(
            family="float16",
            work=work,
            dtype=dtype,
            settings={"format": form.name, "elements": elements},
            ours=Candidate(OURS, calls[work]),
            rivals=rivals,
            check=check,
            goals=[Goal("speed", 0.7, "copy of as many bytes")],
            bytes_moved=2 * half,
            memory=False,
        )
    )
