"""Encoding and decoding 1-6-9 and 0-6-10 against the floor: a copy that moves as many bytes.

The kernels write into memory that is there already, as the copy does: on a CPU a fresh output costs more in page faults
than the kernel takes.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import arguments, measure, report

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.float16.reference import FP0610, FP169, Format


def prepare(form: Format, dtype: torch.dtype, elements: int, device: str):
    """The candidates of both directions, and their checks against the reference, bit for bit."""
    x = torch.randn(elements, device=device).exp().sub_(1).to(dtype)
    codes = torch.empty(elements, dtype=torch.int16, device=device)
    nonfinite = torch.empty((), dtype=torch.bool, device=device)
    values = torch.empty_like(x)
    half = elements * (x.element_size() + codes.element_size()) // 2
    source = torch.randint(0, 256, (half,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    common = {"sizes": [elements], "strides": [1], "dtype": _native.DTYPES[dtype], "format": form.number}
    encode = partial(
        _native.call,
        "float16_encode",
        x.device,
        input=x.data_ptr(),
        codes=codes.data_ptr(),
        nonfinite=nonfinite.data_ptr(),
        **common,
    )
    decode = partial(
        _native.call, "float16_decode", x.device, codes=codes.data_ptr(), output=values.data_ptr(), **common
    )

    def check() -> None:
        encode()
        decode()
        with dalle_kernels.use("reference"):
            expected = getattr(dalle_kernels, f"encode_{form.name}")(x)
            assert torch.equal(codes, expected), "encoding differs from the reference"
            decoded = getattr(dalle_kernels, f"decode_{form.name}")(expected, dtype)
            assert torch.equal(values, decoded), "decoding differs from the reference"

    # The tensors come along so that they live as long as the addresses of them do.
    tensors = (x, codes, nonfinite, values)
    candidates = {"copy": lambda: target.copy_(source), "encode": encode, "decode": decode}
    return tensors, candidates, check, 2 * half


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--elements", type=int, default=1 << 24, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = []
    for form in (FP169, FP0610):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            _tensors, candidates, check, moved = prepare(form, dtype, options.elements, options.device)
            times = measure(candidates, check=check, device=options.device, rounds=options.rounds)
            copy = times["copy"]["median_ms"]
            of_copy = {name: copy / times[name]["median_ms"] for name in ("encode", "decode")}
            cases.append(
                {
                    "format": form.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "elements": options.elements,
                    "bytes_moved": moved,
                    "times": times,
                    "share_of_copy_bandwidth": of_copy,
                }
            )
            print(
                f"{form.name:7} {cases[-1]['dtype']:9} copy {copy:7.3f} ms ({moved / copy / 1e6:.1f} GB/s)  "
                + "  ".join(f"{name} {times[name]['median_ms']:7.3f} ms ({of_copy[name]:.0%})" for name in of_copy)
            )
    report("float16", options.device, cases)


if __name__ == "__main__":
    main()
