"""Shard a transformer over the GPUs of a machine and replicate it over machines (paper 2.5, App. E), by FSDP2.

What goes where:

- The matrices of a resblock, which hold nearly all parameters, are sharded over the GPUs of a machine. A resblock (the
  attention's and the MLP's each) is one unit: its matrices are gathered by one all-gather while the resblock before it
  computes, dropped after use, and its gradients reduced by one reduce-scatter, all in 16 bit where one is asked for.
- Its gains and biases, less than a thousandth of its parameters in a large model, stay whole on every GPU, in 32 bit.
  FSDP knows nothing of them: :func:`average_replicated` averages their gradients in one all-reduce.
- Embeddings, unembeddings and the last norm are sharded too, one unit of the whole model, in 32 bit throughout.

The paper shards matrices [in, out] on axis 1 and the second matrix of the MLP on axis 0. ``nn.Linear`` holds [out, in],
so here that is axis 0 and, for the second matrix, axis 1: both matrices of the MLP are cut at its hidden width.

Nothing here needs a real device: a meta model under a fake process group of any size is sharded alike.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from dalle.errors import UserError
from dalle.train.team import Compression
from dalle.transformer import DALLE, MLPBlock
from dalle_kernels import PowerSGD

MACHINE, GPU = "machine", "gpu"


def mesh_of(machines: int, gpus: int, device_type: str = "cpu") -> DeviceMesh:
    """The mesh ("machine", "gpu") of all processes, rank = machine x gpus + gpu.

    Needs a process group: gloo for ``device_type`` "cpu", NCCL for "cuda". Raises UserError when it has not
    machines x gpus processes.
    """
    if machines < 1 or gpus < 1 or machines * gpus != dist.get_world_size():
        raise UserError(
            f"expected machines x GPUs a machine to be the number of processes, {dist.get_world_size()}, "
            f"got {machines} x {gpus}"
        )
    return init_device_mesh(device_type, (machines, gpus), mesh_dim_names=(MACHINE, GPU))


def replicated(model: DALLE) -> list[nn.Parameter]:
    """The gains and biases of the resblocks: what stays whole on every GPU."""
    return [parameter for block in model.resblocks() for parameter in block.parameters() if parameter.dim() == 1]


def shard(model: DALLE, mesh: DeviceMesh, dtype: torch.dtype | None = None, compressed: bool = False) -> DALLE:
    """Shard ``model``, in place, over the mesh of :func:`mesh_of`; returns it.

    The resblocks' matrices are gathered, and their gradients reduced, in ``dtype`` (None: the parameters' own); the
    blocks' inputs are left as they are, so with a 16-bit ``dtype`` the model casts or autocasts. Gradients become the
    mean over all processes, as DTensors on the mesh.

    With ``compressed`` the gradients of a resblock's matrices are averaged over the GPUs of a machine only, and their
    DTensors know the mesh's "gpu" dimension alone: what happens between machines is left to :func:`compress`.
    """
    # A block returns a view; the residual stream adds it out of place, which is what the warning asks for.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    whole = set(replicated(model))
    _move(whole, mesh.device_type)
    blocks = model.resblocks()
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh[GPU] if compressed else mesh,
            reshard_after_forward=True,
            shard_placement_fn=_placements(block, mesh[GPU].size()),
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, cast_forward_inputs=False),
            ignored_params=whole,
        )
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
    _prefetch(blocks)
    return model


def compress(model: DALLE, mesh: DeviceMesh, compression: Compression, scales: torch.Tensor | None = None) -> PowerSGD:
    """Let PowerSGD average the resblocks' matrices of a model, sharded as ``compressed``, between machines.

    The rank is shared out evenly to the GPUs' shards; the matrices of queries, keys and values are compressed one by
    one. Matrices have no ``.grad``: PowerSGD's ``step`` makes what the optimizer needs of them.
    ``scales``, float32, one for each of ``model.resblocks()``, are what their gradients are multiplied by, before and
    after. Raises UserError where the mesh does not divide the rank or the matrices.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    scaled = {} if scales is None else dict(zip(model.resblocks(), scales.split(1)))
    try:
        powersgd = PowerSGD(
            model,
            compression.rank,
            machines=mesh.get_group(MACHINE),
            gpus=mesh.get_group(GPU),
            exempt=("text_unembedding", "image_unembedding"),
            pieces={name: 3 for name in names.values() if name.endswith("query_key_value.weight")},
            scales={names[matrix]: scale for block, scale in scaled.items() for matrix in _matrices(block)},
            p_divisor=compression.p_divisor,
            q_divisor=compression.q_divisor,
            keep_scale=scales is not None,
            keep_gradients=False,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    for block in model.resblocks():
        powersgd.attach(block)
    return powersgd


def squares_of_matrices(model: DALLE, powersgd: PowerSGD) -> torch.Tensor:
    """The squared norm of the gradients of each resblock's matrices, unscaled, over all processes (a collective)."""
    return powersgd.squares([_matrices(block)[0] for block in model.resblocks()])


def _matrices(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if parameter.dim() == 2]


def average_replicated(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of :func:`replicated` parameters over all processes, in one fp32 all-reduce."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    joint = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(joint)
    joint /= dist.get_world_size()
    for gradient, mean in zip(gradients, joint.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def _move(parameters: Iterable[nn.Parameter], device_type: str) -> None:
    """Move parameters that FSDP ignores, and so does not move, to the device on which it shards the others."""
    for parameter in parameters:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device_type)


def _placements(block: nn.Module, gpus: int) -> Callable[[nn.Parameter], Shard]:
    """The axis that each matrix of a resblock is sharded on; UserError unless it can be cut evenly."""
    second = block.projection.weight if isinstance(block, MLPBlock) else None

    def placement(matrix: nn.Parameter) -> Shard:
        axis = 1 if matrix is second else 0
        if matrix.shape[axis] % gpus:
            raise UserError(
                f"cannot shard a matrix {list(matrix.shape)} of the model over {gpus} GPUs: "
                f"expected {matrix.shape[axis]} to be a multiple of {gpus}"
            )
        return Shard(axis)

    return placement


def _prefetch(blocks: Sequence[nn.Module]) -> None:
    """Gather the next block's matrices while one computes, in the forward and in the backward."""
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
