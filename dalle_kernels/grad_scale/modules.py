"""``ScaledResBlock``: a resblock in 16 bits on an identity path in 32, under a loss scale of its own (paper 2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dalle_kernels._arguments import names_wrong_types
from dalle_kernels.grad_scale.ops import filter_cast_unscale, scale_cast_filter


class _Enter(torch.autograd.Function):
    """To 16 bits; on the way back ``cast(filter(grad)) / scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_x,), _ = filter_cast_unscale([grad], *ctx.saved_tensors)
        return grad_x, None, None


class _Leave(torch.autograd.Function):
    """To the dtype of the identity path; on the way back ``filter(cast(grad * scale))``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = y.dtype
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_y,), _ = scale_cast_filter([grad], *ctx.saved_tensors, ctx.dtype)
        return grad_y, None, None


@names_wrong_types
def scaled_resblock(
    block: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor, dtype: torch.dtype = torch.float16
) -> Tensor:
    """``x + block(x)``, the block in 16 bits and its gradients multiplied by ``scale`` (paper 2.4, Figure 4).

    Forward: x is cast to ``dtype``, goes through the block and is cast back and added. Backward: the gradient that
    arrives is multiplied by the scale, cast to ``dtype`` and filtered (infinities and NaN become 0), goes back through
    the block, is filtered, cast, divided by the scale and added to the identity path's gradient, which stays as it was.

    The gradients of what the block itself holds stay multiplied by the scale, and nothing filters them: an infinity or
    NaN among them tells that the scale is too large. :func:`squared_norms` finds it, :class:`GradScales` follows.

    Args:
        block: from ``[...]`` in ``dtype`` to the same shape. Activation checkpointing may go around it
            (``partial(checkpoint, block, use_reentrant=False)``), which keeps its input in 16 bits, or around all this.
        x: float32 (float64 where gradients are checked), of any shape.
        scale: float32 tensor of one element on x's device, never read by the host. It must not change between forward
            and backward; autograd raises where it did.
        dtype: float16 or bfloat16.

    Returns:
        Of x's shape and dtype.
    """
    return x + _Leave.apply(block(_Enter.apply(x, scale, dtype)), scale, x.dtype)


class ScaledResBlock(nn.Module):
    """The resblock ``x + block(x)`` by :func:`scaled_resblock`, whose arguments these are.

    ``scale`` is usually one of ``GradScales(...).scales``. It is no buffer: it belongs to the ``GradScales``, which
    changes and saves it, and stays on its device. Further arguments of the call are the block's.
    """

    @names_wrong_types
    def __init__(self, block: nn.Module, scale: Tensor, dtype: torch.dtype = torch.float16):
        super().__init__()
        if dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"ScaledResBlock: expected dtype float16 or bfloat16, got {dtype}")
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.numel() != 1:
            got = f"{scale.dtype} of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
            raise TypeError(f"ScaledResBlock: expected scale as a float32 tensor of one element, got {got}")
        self.block = block
        self.scale = scale
        self.dtype = dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return scaled_resblock(lambda inner: self.block(inner, *args, **kwargs), x, self.scale, self.dtype)
