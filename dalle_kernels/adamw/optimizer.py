"""``AdamW16``: the paper's optimizer as a ``torch.optim.Optimizer`` (section 2.2, B.2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_kernels._arguments import names_wrong_types
from dalle_kernels.adamw.ops import adamw16_step_op, share_layout

MOMENTS = ("float16", "float32")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STATE = ("step", "first_moment", "second_moment")
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "max_variance", "moments", "rounding_seed")
"""Of a parameter group; torch adds some of its own to the defaults of an optimizer that was copied."""


class AdamW16(torch.optim.Optimizer):
    """AdamW whose moments take 2 bytes a number: the mean in 1-6-9, the variance in 0-6-10, clipped (paper B.2).

    With 16-bit parameters and gradients a step moves 14 bytes a parameter, against 28 of AdamW in float32. All
    parameters that share a dtype and settings are updated by one call of ``dalle_kernels::adamw16_step``;
    ``dalle_kernels.adamw.ops.adamw16_step`` says what a step does.

    Args:
        params: parameters, or dicts of parameter groups, which may override every setting below. float32, bfloat16 or
            float16 (float64 by the reference only). The paper's gains, biases, embeddings and unembeddings belong in a
            float32 group with ``moments="float32"``.
        lr: step size, above or at 0.
        betas: decay of the running mean and variance. A 16-bit moment cannot follow a decay much slower than its
            rounding: keep beta1 below 0.999 and beta2 below 0.9995, or use float32 moments.
        eps: added to the root of the variance.
        weight_decay: decoupled weight decay.
        max_variance: the running variance is clipped by value to this, above 0; ``math.inf`` for no clipping.
        moments: "float16" for the 16-bit formats, "float32" for plain moments.
        rounding_seed: None to round parameters to nearest. A whole number to round 16-bit parameters stochastically, by
            noise that is a function of it, the parameter's place among all, its step and the element's number: then
            steps below a parameter's precision add up instead of being lost, and a resumed run has the same bits.

    ``torch.amp.GradScaler`` works as with torch's fused optimizers: gradients are divided by its scale and a step with
    a nonfinite gradient is skipped, on the device, with no synchronization. Without a GradScaler the same is had by
    setting the attributes ``grad_scale`` (float32) and ``found_inf`` (nonzero: skip), tensors of one element, before
    ``step``; ``grad_scale`` may also be a sequence of them, one a parameter group, as resblocks with loss scales of
    their own need it. Otherwise gradients must be finite.

    State of a parameter: ``step`` (float32, one element), ``first_moment`` and ``second_moment`` (of its shape and
    strides, int16 codes or float32).

    Raises:
        TypeError, ValueError: a setting out of range, a parameter of another dtype or layout; on a step, a sparse
            gradient.
    """

    @names_wrong_types
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 4.5e-2,
        max_variance: float = 5.0,
        moments: str = "float16",
        rounding_seed: int | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_variance": max_variance,
            "moments": moments,
            "rounding_seed": rounding_seed,
        }
        self._step_supports_amp_scaling = True  # torch.amp.GradScaler asks for it
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in _DTYPES or param.layout != torch.strided:
                del self.param_groups[-1]
                raise TypeError(
                    "AdamW16: expected dense parameters of float32, bfloat16, float16 or float64, got one of "
                    f"{param.dtype}, {param.layout}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what ``closure``, run first, does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = _one_element("found_inf", getattr(self, "found_inf", None))
        numbers = itertools.count()
        for group, grad_scale in zip(self.param_groups, self._grad_scales(), strict=True):
            calls: dict[tuple, tuple[list, ...]] = {}
            for number, param in zip(itertools.islice(numbers, len(group["params"])), group["params"]):
                if param.grad is not None:
                    tensors = (param, param.grad, *self._state_of(param, group["moments"]))
                    key = (
                        param.device,
                        param.dtype,
                        param.grad.dtype,
                        tensors[2].dtype,
                        tensors[3].dtype,
                        share_layout(*tensors[:4]),
                    )
                    for column, entry in zip(calls.setdefault(key, ([], [], [], [], [], [])), (*tensors, number)):
                        column.append(entry)
            for (device, *_), (*columns, of_call) in calls.items():
                adamw16_step_op(
                    *columns,
                    group["lr"],
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    group["max_variance"],
                    None if grad_scale is None else grad_scale.to(device, torch.float32, non_blocking=True),
                    None if found_inf is None else found_inf.to(device, torch.bool, non_blocking=True),
                    group["rounding_seed"],
                    of_call,
                )
        return loss

    def _grad_scales(self) -> Sequence[Tensor | None]:
        """By what the gradients of each group are divided."""
        grad_scale, count = getattr(self, "grad_scale", None), len(self.param_groups)
        if grad_scale is None or not isinstance(grad_scale, (list, tuple)):
            return [_one_element("grad_scale", grad_scale)] * count
        if len(grad_scale) != count:
            raise ValueError(
                f"AdamW16.grad_scale: expected one tensor, or one for each of {count} parameter groups, got "
                f"{len(grad_scale)}"
            )
        return grad_scale

    def _state_of(self, param: Tensor, moments: str) -> tuple[Tensor, Tensor, Tensor]:
        """First moment, second moment and step, made when first asked for."""
        if param.grad.layout != torch.strided:
            raise TypeError(
                f"AdamW16: expected dense gradients, got one of layout {param.grad.layout} for a parameter of shape "
                f"{tuple(param.shape)}; for an embedding pass sparse=False, or call grad.to_dense()"
            )
        state = self.state[param]
        if not state:
            dtype = torch.int16 if moments == "float16" else torch.float32
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for name in _STATE[1:]:
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state["first_moment"], state["second_moment"], state["step"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, moved to the parameters' devices, dtypes as they were saved.

        Raises ValueError, with nothing changed, where it is not the state of such parameters.
        """
        hooked: list[dict[str, Any]] = []

        def check(_, state: dict[str, Any]) -> None:
            for group in state["param_groups"]:
                group.setdefault("rounding_seed", None)  # saved before there was such a setting
            _check_state(state, self)
            hooked.append(state)

        # The last of the hooks sees the state as it is about to be loaded.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch has cast the moments to the parameters' dtypes, codes included; take the saved ones again.
        saved = (index for group in hooked[-1]["param_groups"] for index in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for index, param in zip(saved, params, strict=True):
            if index in hooked[-1]["state"]:
                loaded = hooked[-1]["state"][index]
                self.state[param].update({name: loaded[name].to(param.device) for name in _STATE if name in loaded})


def _one_element(name: str, tensor: Any) -> Tensor | None:
    if tensor is None or (isinstance(tensor, Tensor) and tensor.numel() == 1):
        return tensor
    got = f"one of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
    raise ValueError(f"AdamW16.{name}: expected a tensor of one element, got {got}")


def _check_state(state_dict: dict[str, Any], optimizer: AdamW16) -> None:
    """The step trusts its state: with moments of another size or dtype it would write out of their bounds."""
    pairs = list(zip(state_dict["param_groups"], optimizer.param_groups))
    for group, own in pairs:
        missing = [name for name in _SETTINGS if name not in group]
        if missing:
            raise ValueError(f"AdamW16: expected groups of an AdamW16's state dict, got one without {missing[0]!r}")
        if len(group["params"]) != len(own["params"]):
            return  # of which torch tells
    moment = (torch.int16, torch.float32)
    for group, own in pairs:
        for index, param in zip(group["params"], own["params"]):
            state = state_dict["state"].get(index)
            for name, dtypes in (("step", moment[1:]), ("first_moment", moment), ("second_moment", moment)):
                if state:
                    _check_loaded(f"{name} of parameter {index}", state.get(name), dtypes, param)


def _check_loaded(name: str, loaded: Any, dtypes: tuple[torch.dtype, ...], param: Tensor) -> None:
    is_step = len(dtypes) == 1
    is_tensor = isinstance(loaded, Tensor)
    if is_tensor and loaded.dtype in dtypes and (loaded.numel() == 1 if is_step else loaded.shape == param.shape):
        return
    got = f"{loaded.dtype} of shape {tuple(loaded.shape)}" if is_tensor else type(loaded).__name__
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    shape = "one element" if is_step else f"shape {tuple(param.shape)}"
    raise ValueError(f"AdamW16: expected the {name} as {wanted} of {shape}, got {got}")


def _check_settings(settings: dict[str, Any]) -> None:
    def require(holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"AdamW16: expected {name} {wanted}, got {settings[name]!r}")

    if isinstance(settings["lr"], Tensor):
        raise TypeError("AdamW16: expected lr as a number, got a tensor; keep the schedule on the host")
    require(0 <= settings["lr"] < math.inf, "lr", "at or above 0")
    betas = settings["betas"]
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", "as two numbers from 0 to below 1")
    require(0 <= settings["eps"] < math.inf, "eps", "at or above 0")
    require(0 <= settings["weight_decay"] < math.inf, "weight_decay", "at or above 0")
    require(settings["max_variance"] > 0, "max_variance", "above 0")
    require(settings["moments"] in MOMENTS, "moments", f"among {', '.join(MOMENTS)}")
    seed = settings["rounding_seed"]
    require(seed is None or (type(seed) is int and 0 <= seed < 2**63), "rounding_seed", "from 0 to 2^63 - 1, or None")
