"""Triton's interpreter, made to compute what a GPU does where it does not, and without needless work.

As it comes (Triton 3.6) it truncates float32 to bfloat16 instead of rounding to nearest even, multiplies bfloat16
matrices as the integers that hold their bits, sums float32 products in whatever order a BLAS likes, rounds a fused
multiply-add twice, lets NaN through a minimum or maximum of numbers, and takes no loop bound from a scalar under NumPy
2.4.
"""

from __future__ import annotations

from functools import cache

import numpy as np


@cache
def mend() -> None:
    """Replace these operations of the interpreter, for the life of the process."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    def widened(handle: TensorHandle) -> np.ndarray:
        """The values of a bfloat16 tensor as float32; any other as they are."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        """The bits of float32 numbers in bfloat16, to nearest even."""
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    cast = InterpreterBuilder.cast_impl
    dot = InterpreterBuilder.create_dot

    def cast_impl(self, source, dtype):
        scalars = source.dtype.scalar, dtype.scalar
        if scalars == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source), tl.float32)
        if scalars == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(source.data).reshape(source.data.shape), tl.bfloat16)
        if scalars == (tl.float64, tl.bfloat16):
            raise NotImplementedError("go by float32, as a GPU does")
        with np.errstate(over="ignore", invalid="ignore"):
            return cast(self, source, dtype)

    def create_dot(self, a, b, c, *options):
        if a.dtype.scalar == tl.float32:
            return TensorHandle(_chained(a.data, b.data, c.data), c.dtype.scalar)
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(widened(operand), tl.float32) for operand in (a, b))
        return dot(self, a, b, c, *options)

    def create_fma(self, a, b, c):
        if c.dtype.scalar != tl.float32:
            return TensorHandle(a.data * b.data + c.data, c.dtype.scalar)
        return TensorHandle(_fused(a.data, b.data, c.data), tl.float32)

    def create_minnumf(self, a, b):
        return self.binary_op(a, b, np.fmin)

    def create_maxnumf(self, a, b):
        return self.binary_op(a, b, np.fmax)

    for replacement in (cast_impl, create_dot, create_fma, create_minnumf, create_maxnumf):
        setattr(InterpreterBuilder, replacement.__name__, replacement)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_bounds(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_with_bounds

    # Every call of a device function would prepare the whole language anew; once a module and launch is enough.
    prepared: set[str] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_afresh(self, *args, **options):
        prepared.clear()
        return launch(self, *args, **options)

    def call_prepared(self, *args, **options):
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **options)

    interpreter.GridExecutor.__call__ = launch_afresh
    InterpretedFunction.__call__ = call_prepared


def _chained(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a @ b + c of float32 matrices as a GPU without tf32 sums it: one chain of fused multiply-adds an element.

    So an element does not depend on the shape and layout of its matrix, as it does in a BLAS.
    """
    total = c.copy()
    with np.errstate(all="ignore"):
        products = a.astype(np.float64)[..., None] * b.astype(np.float64)[..., None, :, :]  # exact
        for i in range(a.shape[-1]):
            np.add(products[..., i, :], total, out=total)
    return total


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c of float32 numbers, rounded once."""
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)  # both exact
        total = np.asarray(product + addend)
        part = total - product
        lost = (product - (total - part)) + (addend - part)  # Knuth's two-sum
        # Where anything was lost an odd last bit keeps the next rounding from mistaking the sum for a tie.
        is_even = (total.view(np.int64) & 1) == 0
        towards = np.nextafter(total, np.copysign(np.inf, lost))
        return np.where((lost != 0) & ~np.isnan(lost) & is_even, towards, total).astype(np.float32)
