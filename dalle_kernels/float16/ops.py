"""The ops ``encode_fp169``, ``decode_fp169``, ``encode_fp0610``, ``decode_fp0610``: checks, providers, public names.

Any strides are read in place, with no copy; what comes back is contiguous. None of these has a gradient.
"""

from __future__ import annotations

from functools import partial

import torch

from dalle_kernels import _native, _triton
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op
from dalle_kernels.float16 import reference
from dalle_kernels.float16.reference import FP0610, FP169, Format

_MAX_DIMS = 8  # Strided::MAX_DIMS in csrc/common/strided.h


def _encode_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty_like(x, dtype=torch.int16, memory_format=torch.contiguous_format)
    # Not by torch.empty, which takes twice as long to read its arguments.
    return codes, torch.empty_strided((), (), dtype=torch.bool, device=x.device)


def _decode_fake(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)


def _encode_reference(form: Format, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.encode(x, form)


def _decode_reference(form: Format, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return reference.decode(codes, dtype, form)


def _encode_native(form: Format, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, nonfinite = _encode_fake(x)
    _native.call(
        "float16_encode",
        x.device,
        x.data_ptr(),
        _native.DTYPES[x.dtype],
        x.shape,
        x.stride(),
        codes.data_ptr(),
        nonfinite.data_ptr(),
        form.number,
    )
    return codes, nonfinite


def _decode_native(form: Format, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    output = _decode_fake(codes, dtype)
    _native.call(
        "float16_decode",
        codes.device,
        codes.data_ptr(),
        codes.shape,
        codes.stride(),
        output.data_ptr(),
        _native.DTYPES[dtype],
        form.number,
    )
    return output


def _unsupported(tensor: torch.Tensor, *_arguments) -> str | None:
    if tensor.dim() > _MAX_DIMS:
        return f"the compiled kernel takes at most {_MAX_DIMS} dimensions, got {tensor.dim()}"
    return None


def _define(form: Format) -> tuple[Op, Op]:
    encode = Op(f"encode_{form.name}(Tensor x) -> (Tensor, Tensor)", _encode_fake)
    decode = Op(f"decode_{form.name}(Tensor codes, ScalarType dtype) -> Tensor", _decode_fake)
    for op, native, plain in ((encode, _encode_native, _encode_reference), (decode, _decode_native, _decode_reference)):
        # Ahead of native, which on a CPU it never stands in for: on an H200 both reach the speed of a copy.
        launch = _triton.launcher("float16", op.name.partition("_")[0])
        op.provide("triton", partial(launch, form), unavailable=_triton.unavailable)
        op.provide("native", partial(native, form), unavailable=_native.unavailable, unsupported=_unsupported)
        op.provide("reference", partial(plain, form))
    return encode, decode


_encode_fp169, _decode_fp169 = _define(FP169)
_encode_fp0610, _decode_fp0610 = _define(FP0610)


def _checked_input(name: str, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.dtype not in _native.DTYPES:
        got = f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected x to be a tensor of float32, float16, bfloat16 or float64, got {got}")
    return x


def _checked_codes(name: str, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(codes, torch.Tensor) or codes.dtype != torch.int16:
        got = f"a tensor of {codes.dtype}" if isinstance(codes, torch.Tensor) else type(codes).__name__
        raise TypeError(f"{name}: expected codes to be a tensor of int16, got {got}")
    if dtype not in _native.DTYPES:
        raise TypeError(f"{name}: expected dtype to be float32, float16, bfloat16 or float64, got {dtype}")
    return codes


def encode_fp169(x: torch.Tensor) -> torch.Tensor:
    """Encode numbers in 1-6-9: sign, 6-bit exponent, 9-bit significand (paper B.2 and E.2; ``mhalf`` of blocksparse).

    Rounds half away from zero; saturates at ±15.984375; magnitudes below (1 + 2^-9)·2^-60 become 0, of positive sign. A
    code holds no infinity and no NaN: an infinity saturates with its sign and NaN becomes 15.984375, as in the
    published encoder; :func:`encode_fp169_checked` reports them.

    :param x: float32, float16, bfloat16 or float64, any shape and strides, CPU or CUDA.
    :returns: int16 codes of x's shape, contiguous.
    :raises TypeError: when x is no tensor of these dtypes.
    """
    return encode_fp169_checked(x)[0]


@names_wrong_types
def encode_fp169_checked(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`encode_fp169`, and reports whether ``x`` held an infinity or NaN.

    :returns: the codes, and a bool tensor of no dimensions on x's device; reading it there costs no synchronization.
    """
    return _encode_fp169(_checked_input("encode_fp169", x))


@names_wrong_types
def decode_fp169(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode 1-6-9 codes (paper B.2 and E.2). Exact in float32 and float64; the code 0x8000 is -0.

    :param codes: int16, any shape and strides, CPU or CUDA.
    :param dtype: float32, float64, or float16 and bfloat16, which round to nearest even (float16 flushes most to 0).
    :returns: a contiguous tensor of the codes' shape.
    :raises TypeError: when codes is no int16 tensor or dtype is not one of these.
    """
    return _decode_fp169(_checked_codes("decode_fp169", codes, dtype), dtype)


def encode_fp0610(x: torch.Tensor) -> torch.Tensor:
    """Encode numbers in 0-6-10: no sign, 6-bit exponent, 10-bit significand (paper B.2; ``vhalf`` of blocksparse).

    Rounds half up; saturates at 15.9921875; everything below (1 + 2^-10)·2^-60, negative numbers too, becomes 0. A code
    holds no infinity and no NaN: infinity and NaN become 15.9921875 and minus infinity 0, as in the published encoder;
    :func:`encode_fp0610_checked` reports them.

    :param x: float32, float16, bfloat16 or float64, any shape and strides, CPU or CUDA.
    :returns: int16 codes of x's shape, contiguous; those of numbers from 2^-28 on are negative as int16.
    :raises TypeError: when x is no tensor of these dtypes.
    """
    return encode_fp0610_checked(x)[0]


@names_wrong_types
def encode_fp0610_checked(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`encode_fp0610`, and reports whether ``x`` held an infinity or NaN.

    :returns: the codes, and a bool tensor of no dimensions on x's device; reading it there costs no synchronization.
    """
    return _encode_fp0610(_checked_input("encode_fp0610", x))


@names_wrong_types
def decode_fp0610(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode 0-6-10 codes (paper B.2). Exact in float32 and float64.

    :param codes: int16, any shape and strides, CPU or CUDA.
    :param dtype: float32, float64, or float16 and bfloat16, which round to nearest even (float16 flushes most to 0).
    :returns: a contiguous tensor of the codes' shape.
    :raises TypeError: when codes is no int16 tensor or dtype is not one of these.
    """
    return _decode_fp0610(_checked_codes("decode_fp0610", codes, dtype), dtype)
