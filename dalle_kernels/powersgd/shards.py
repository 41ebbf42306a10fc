"""Which parameters are compressed, and what a rank holds of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dalle_kernels._arguments import names_wrong_types

if TYPE_CHECKING:  # they take a second to import
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Exempt = Callable[[str, Tensor], bool] | Iterable[str] | None


@dataclass(eq=False)
class LocalShard:
    """One parameter, or what this rank holds of it.

    ``shape`` is that of its gradient here. ``matrices`` is None for a parameter that is not compressed, else (matrices,
    rows, columns): its rows make so many equal matrices, each compressed by itself. ``errors`` are the codes of its
    error buffer, of that shape. ``scale`` is what its gradients are multiplied by, a tensor of one element; None means
    1. ``index`` is its place among the model's parameters.
    """

    name: str
    index: int
    parameter: Tensor
    shape: torch.Size
    matrices: tuple[int, int, int] | None
    scale: Tensor | None
    errors: Tensor | None = None


def local_shards(
    model: nn.Module, exempt: Exempt, pieces: Mapping[str, int], scales: Mapping[str, Tensor]
) -> list[LocalShard]:
    """A shard for each parameter that requires a gradient; the arguments are those of ``PowerSGD``."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for given in (pieces, scales):
        for name in given:
            if name not in named:
                raise ValueError(f"PowerSGD: expected names of the model's parameters, got {name!r}")
    for name, scale in scales.items():
        if scale.dtype != torch.float32 or scale.numel() != 1:
            got = f"{scale.dtype} of shape {list(scale.shape)}"
            raise TypeError(f"PowerSGD: expected scales as float32 tensors of one element, that of {name} is {got}")
    is_exempt = exempt if callable(exempt) else _exempt_by_default(model, exempt or ())
    shards = []
    for index, (name, parameter) in enumerate(named.items()):
        if parameter.dtype not in _DTYPES:
            raise TypeError(f"PowerSGD: expected float32, float16 or bfloat16, parameter {name} is {parameter.dtype}")
        shape = local_part(parameter).shape
        is_compressed = parameter.dim() == 2 and not is_exempt(name, parameter)
        matrices = _matrices(name, shape, pieces.get(name, 1)) if is_compressed else None
        shards.append(LocalShard(name, index, parameter, shape, matrices, scales.get(name)))
        if matrices is not None:
            shards[-1].errors = torch.zeros(matrices, dtype=torch.int16, device=parameter.device)
    return shards


def _matrices(name: str, shape: torch.Size, count: int) -> tuple[int, int, int]:
    rows, columns = shape
    if count < 1 or rows % count:
        raise ValueError(f"PowerSGD: expected the {rows} rows that are here of {name} to make {count} equal matrices")
    return count, rows // count, columns


def _exempt_by_default(model: nn.Module, names: Iterable[str]) -> Callable[[str, Tensor], bool]:
    """All but the weights of linear layers, and what bears one of ``names`` or is in a module of such a name."""
    weights = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    exempt = tuple(names)
    known = {name for named in (model.named_modules(), model.named_parameters()) for name, _ in named}
    for name in exempt:
        if name not in known:
            raise ValueError(f"PowerSGD: expected exempt names of the model's parameters or modules, got {name!r}")
    return lambda name, parameter: parameter not in weights or any(f"{name}.".startswith(f"{one}.") for one in exempt)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which may be a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def like_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    """``local`` as the part of a tensor that is sharded as the parameter is."""
    if not hasattr(parameter, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)


@names_wrong_types
def shard_longer_axis(parameter: nn.Parameter) -> Shard:
    """A ``shard_placement_fn`` for ``fully_shard`` that keeps a matrix's parts near square, which compress best.

    Of a weight [out, in] of ``nn.Linear`` that is the paper's rule: the outputs (its axis 1, for it writes weights the
    other way), save for the second matrix of an MLP, of which it is the inputs.
    """
    from torch.distributed.tensor import Shard

    return Shard(1 if parameter.dim() == 2 and parameter.shape[1] > parameter.shape[0] else 0)


def unit_layout(unit: FSDPModule) -> Iterator[tuple[Tensor, int]]:
    """The parameters of an FSDP unit, in the order of its reduced gradients, and the numbers each takes up there.

    FSDP hands its hook one flat tensor and nothing public tells of its layout.
    """
    state = unit._get_fsdp_state()
    # One group up to torch 2.11, a list of them later, with one unless parameters have meshes of their own.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        for held in group.fsdp_params if group is not None else ():
            if held.sharded_param.requires_grad:
                yield held.sharded_param, held.padded_sharded_param_size.numel()
