"""The op ``adamw16_step``: one step of AdamW for many parameters, with moments in 16-bit formats (paper B.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels import _native, _triton
from dalle_kernels._dispatch import Op
from dalle_kernels.adamw import reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FACTORS = 7  # AdamW16Step::FACTORS in csrc/adamw/adamw.h

AHEAD = {torch.float32, torch.bfloat16}
"""Of which parameters a run on an H200 has shown the compiled CUDA kernel ahead of Triton's. Of others, and on other
GPUs, it is opt-in."""

adamw16_step_op = Op(
    "adamw16_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
    "Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, float max_variance, "
    "Tensor? grad_scale, Tensor? found_nonfinite, int? rounding_seed, int[] numbers) -> ()",
    lambda *args: None,
)


def _native_step(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_variance: float,
    grad_scale: Tensor | None,
    found_nonfinite: Tensor | None,
    rounding_seed: int | None,
    numbers: list[int],
) -> None:
    if not params:
        return
    device = params[0].device
    # Where the CUDA kernel keeps what the elements of each tensor are multiplied with.
    factors = None if device.type == "cpu" else torch.empty(len(params), _FACTORS, device=device)
    _native.call(
        "adamw16_step",
        device,
        parameters=[tensor.data_ptr() for tensor in params],
        gradients=[tensor.data_ptr() for tensor in grads],
        first_moments=[tensor.data_ptr() for tensor in first_moments],
        second_moments=[tensor.data_ptr() for tensor in second_moments],
        steps=[tensor.data_ptr() for tensor in steps],
        counts=[tensor.numel() for tensor in params],
        parameter_dtype=_native.DTYPES[params[0].dtype],
        gradient_dtype=_native.DTYPES[grads[0].dtype],
        first_moment_coded=first_moments[0].dtype == torch.int16,
        second_moment_coded=second_moments[0].dtype == torch.int16,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        max_variance=min(max_variance, reference.LARGEST_VARIANCE),
        grad_scale=0 if grad_scale is None else grad_scale.data_ptr(),
        found_nonfinite=0 if found_nonfinite is None else found_nonfinite.data_ptr(),
        factors=0 if factors is None else factors.data_ptr(),
        numbers=numbers,
        stochastic_rounding=rounding_seed is not None,
        rounding_seed=rounding_seed or 0,
    )
    # The kernel wrote through addresses, of which autograd knows nothing.
    torch.autograd.graph.increment_version(params)


def _unsupported(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: list[Tensor],
    *settings,
) -> str | None:
    for name, tensors in (("params", params), ("grads", grads)):
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1 or not dtypes.issubset(_DTYPES):
            return f"the kernel takes {name} of one dtype of float32, float16 and bfloat16 a call"
    for name, tensors in (("first_moments", first_moments), ("second_moments", second_moments)):
        if len({tensor.dtype for tensor in tensors}) > 1:
            return f"the kernel takes {name} of one dtype a call"
    for tensors in zip(params, grads, first_moments, second_moments):
        if not share_layout(*tensors):
            return "the kernel takes dense parameters, and gradients and moments of their sizes and strides"
    *_, rounding_seed, _numbers = settings
    rounds = rounding_seed is not None and params and params[0].dtype != torch.float32
    if rounds and not all(param.is_contiguous() for param in params):
        return "the kernel numbers elements as they lie in memory, for the noise by which it rounds"
    return None


def share_layout(param: Tensor, *others: Tensor) -> bool:
    """Whether all of them keep as many elements in the same order, with none between them."""
    count = param.numel()
    for tensor in (param, *others):  # a plain loop: this runs for every parameter on every step
        if not tensor.is_contiguous() or tensor.numel() != count:
            break
    else:
        return True
    shape, strides = param.shape, param.stride()
    return _is_dense(param) and all(tensor.stride() == strides and tensor.shape == shape for tensor in others)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _native_unsupported(params: list[Tensor], *others) -> str | None:
    reason = _unsupported(params, *others)
    if reason is not None or not params or not params[0].is_cuda:
        return reason
    return _triton.left_to_triton(params[0].device, params[0].dtype in AHEAD)


adamw16_step_op.provide("native", _native_step, unavailable=_native.unavailable, unsupported=_native_unsupported)
adamw16_step_op.provide(
    "triton",
    _triton.launcher("adamw", "adamw16_step"),
    unavailable=_triton.unavailable,
    unsupported=_unsupported,
)
adamw16_step_op.provide("reference", reference.adamw16_step)


def adamw16_step(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.96,
    eps: float = 1e-8,
    weight_decay: float = 4.5e-2,
    max_variance: float = 5.0,
    grad_scale: Tensor | None = None,
    found_nonfinite: Tensor | None = None,
    rounding_seed: int | None = None,
    numbers: list[int] | None = None,
) -> None:
    """One step of AdamW, in place, for many parameters in one pass over memory (paper B.2).

    With g = grad / grad_scale and t the step's number, for each element::

        m = beta1·m + (1 - beta1)·g
        v = min(beta2·v + (1 - beta2)·g², max_variance)
        param = (1 - lr·weight_decay)·param - lr · m/(1 - beta1^t) / (sqrt(v/(1 - beta2^t)) + eps)

    The paper clips the running variance "by value to 5 before use": the new estimate is clipped, once, and that is both
    what the parameter's update divides by and what is stored. The update takes m and v in float32, before they are
    rounded to their codes.

    Args:
        params: float32, bfloat16 or float16 (float64 by the reference only), one device, any strides.
        grads: of the params' shapes, in these dtypes.
        first_moments, second_moments: of the params' shapes; int16 codes of 1-6-9 and of 0-6-10, or float32. All zeros
            before the first step.
        steps: one float32 tensor of one element for each parameter, the steps so far; 1 is added.
        lr, beta1, beta2, eps, weight_decay, max_variance: the settings; ``max_variance`` may be infinite.
        grad_scale: float32 tensor of one element, by which gradients are divided; None means 1.
        found_nonfinite: bool tensor of one element; where it is true nothing changes, steps included. Neither is read
            by the host. Without it an infinite or NaN gradient ruins the parameter and its moments.
        rounding_seed: None to round parameters to nearest; else, from 0 to 2^63 - 1, 16-bit ones are rounded up or down
            at random, so that on average nothing is lost of a step smaller than their precision. The noise is a
            function of this seed, the parameter's number and step and the element's number.
        numbers: of the params, from 0 to 2^31 - 1, for that noise; None: 0, 1, 2, ...

    Gradients and moments of a parameter that is not dense, or that have other strides than it, are left to the
    reference. No gradient flows through a step.

    Raises:
        TypeError, ValueError: lists of different lengths, a tensor of another dtype, shape or device than these.
    """
    for name, tensors in (
        ("grads", grads),
        ("first_moments", first_moments),
        ("second_moments", second_moments),
        ("steps", steps),
    ):
        if len(tensors) != len(params):
            raise ValueError(f"expected as many {name} as params, {len(params)}, got {len(tensors)}")
    for param, grad, first_moment, second_moment, step in zip(params, grads, first_moments, second_moments, steps):
        _check("param", param, (*_DTYPES, torch.float64), params[0])
        _check("gradient", grad, (*_DTYPES, torch.float64), param, param.shape)
        _check("first moment", first_moment, (torch.int16, torch.float32), param, param.shape)
        _check("second moment", second_moment, (torch.int16, torch.float32), param, param.shape)
        _check("step", step, (torch.float32,), param)
        if step.numel() != 1:
            raise ValueError(f"expected each step as a tensor of one element, got shape {tuple(step.shape)}")
    for name, tensor, dtype in (
        ("grad_scale", grad_scale, torch.float32),
        ("found_nonfinite", found_nonfinite, torch.bool),
    ):
        if tensor is not None and params:
            _check(name, tensor, (dtype,), params[0])
            if tensor.numel() != 1:
                raise ValueError(f"expected {name} as a tensor of one element, got shape {tuple(tensor.shape)}")
    if numbers is not None and len(numbers) != len(params):
        raise ValueError(f"expected as many numbers as params, {len(params)}, got {len(numbers)}")
    with torch.no_grad():
        adamw16_step_op(
            params,
            grads,
            first_moments,
            second_moments,
            steps,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            max_variance,
            grad_scale,
            found_nonfinite,
            rounding_seed,
            list(range(len(params))) if numbers is None else numbers,
        )


def _check(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor, shape: torch.Size | None = None
) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in dtypes:
        if not isinstance(tensor, Tensor):
            got = type(tensor).__name__
        else:
            got = f"a {'' if tensor.layout == torch.strided else 'sparse '}tensor of {tensor.dtype}"
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"adamw16_step: expected each {name} as a dense tensor of {wanted}, got {got}")
    if tensor.device != like.device:
        raise ValueError(f"adamw16_step: expected each {name} on {like.device}, got one on {tensor.device}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(
            f"adamw16_step: expected a {name} of its param's shape {tuple(shape)}, got {tuple(tensor.shape)}"
        )
