"""In what precision stage 2 trains, and by which AdamW (paper 2.4, B.2, App. D)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dalle.errors import UserError
from dalle.train.sampling import derived_seed
from dalle_kernels import AdamW16, GradScales, squared_norms

if TYPE_CHECKING:
    from dalle.train.dalle import DALLETraining
    from dalle.train.team import Alone, Figures

PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPTIMIZERS = ("adamw", "adamw16")
BETAS = (0.9, 0.96)
OUTSIDE = -1
"""The ``resblock`` of a parameter group whose parameters are not those of one resblock."""


def require_fitting(training: DALLETraining) -> None:
    """Raise UserError for resblocks in 16 bits under an optimizer that knows no loss scale of each, and for stochastic
    rounding where nothing is in 16 bits."""
    is_narrow = PRECISIONS[training.precision] is not None
    if is_narrow and training.optimizer != "adamw16":
        raise UserError(
            f"DALLETraining.optimizer: expected adamw16 for a precision of {training.precision}, got "
            f"{training.optimizer}: torch's AdamW would keep its moments in 16 bits too"
        )
    rounding = training.stochastic_rounding
    if not isinstance(rounding, bool) or (rounding and not is_narrow):
        raise UserError(
            "DALLETraining.stochastic_rounding: expected false, or true for a precision of float16 or bfloat16, got "
            f"{rounding!r} for one of {training.precision}"
        )


def make_optimizer(
    model: nn.Module, shards: nn.Module, training: DALLETraining, part: int = 0
) -> torch.optim.Optimizer:
    """The AdamW that ``training`` asks for, of the parameters in ``shards``, which are named as those of ``model``.

    ``part`` numbers the shards of a model: each is rounded by noise of its own.
    """
    by_resblock = PRECISIONS[training.precision] is not None
    groups = parameter_groups(model, shards, training.weight_decay, by_resblock)
    if training.optimizer == "adamw16":
        seed = derived_seed(training.seed, "rounding", part) if training.stochastic_rounding else None
        return AdamW16(groups, lr=0.0, betas=BETAS, rounding_seed=seed)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=1e-8, fused=True)


def parameter_groups(
    model: nn.Module, shards: nn.Module, weight_decay: float, by_resblock: bool = False
) -> list[dict[str, Any]]:
    """AdamW groups of the parameters in ``shards``, those together that are treated alike.

    Weights of linear layers decay; gains, biases, embeddings and learned tokens do not. ``moments``, for ``AdamW16``,
    are 16-bit for the resblocks' matrices alone (paper App. D). With ``by_resblock`` each resblock has two groups of
    its own, matrices and vectors, whose ``resblock`` is its number; that of all other groups is ``OUTSIDE``.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in shards.named_parameters():
        number = _resblock_of(name)
        moments = "float16" if name in linear and number != OUTSIDE else "float32"
        key = (weight_decay if name in linear else 0.0, moments, number if by_resblock else OUTSIDE)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "moments": moments, "resblock": number}
        for (decay, moments, number), parameters in groups.items()
    ]


def _resblock_of(name: str) -> int:
    """The number of the resblock, in the order of ``DALLE.resblocks``, that the parameter of this name belongs to."""
    if not name.startswith("layers."):
        return OUTSIDE
    _, layer, block, *_ = name.split(".")
    return 2 * int(layer) + (block == "mlp")


@torch.no_grad()
def prepare_scaled_step(
    optimizer: AdamW16, scales: GradScales, clip_norm: float, team: Alone
) -> tuple[torch.Tensor, Figures]:
    """Between the backward and the step of resblocks in 16 bits, whose optimizer has groups ``by_resblock``.

    It tells the step by what to divide the gradients, so that they are unscaled and their norm clipped to
    ``clip_norm``, and to change nothing where a resblock's gradient is not finite; then it moves the scales.

    Returns:
        The norm, without the resblocks whose gradients are not finite, and for the log whether the step is skipped:
        on the device, which this does not wait for.
    """
    divisors = torch.cat((scales.scales, scales.scales.new_ones(1)))
    squares = _squares_of_resblocks(optimizer, divisors, team)
    nonfinite = squares[:-1].isfinite().logical_not()
    counted = torch.cat((nonfinite.logical_not(), nonfinite.new_ones(1)))
    norm = torch.where(counted, squares, 0.0).sum().sqrt()
    divisors *= (norm / clip_norm).clamp(min=1)
    optimizer.grad_scale = [divisors[group["resblock"]] for group in optimizer.param_groups]
    optimizer.found_inf = nonfinite.any()
    scales.update(nonfinite)
    return norm, {"skipped_updates": optimizer.found_inf.float()}


def _squares_of_resblocks(optimizer: AdamW16, divisors: torch.Tensor, team: Alone) -> torch.Tensor:
    """The squared norms of the gradients over ``divisors``, of each resblock and, last, of all parameters outside.

    In a team the vectors of resblocks are whole in every process, and all else is sharded.
    """
    sharded, whole = ([[] for _ in divisors] for _ in range(2))
    for group in optimizer.param_groups:
        is_whole = group["resblock"] != OUTSIDE and group["moments"] == "float32"
        gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        (whole if is_whole else sharded)[group["resblock"]] += gradients
    vectors = squared_norms(whole[:-1])
    squares = team.add_squares(squared_norms(sharded), torch.cat((vectors, vectors.new_zeros(1)))) / divisors.square()
    compressed = team.compressed_squares()
    if compressed is not None:
        squares[:-1] += compressed
    return squares


def scales_to_json(scales: GradScales) -> dict[str, list[int]]:
    """The scales' state as JSON knows it."""
    return {name: tensor.tolist() for name, tensor in scales.state_dict().items()}


def scales_from_json(scales: GradScales, state: dict[str, list[int]]) -> None:
    """Load what :func:`scales_to_json` gave."""
    scales.load_state_dict({name: torch.tensor(values, dtype=torch.int32) for name, values in state.items()})
