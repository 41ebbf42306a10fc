"""One rank of the tests of PowerSGD: runs every case of a world of four gloo processes and saves what it found.

``python powersgd_ranks.py RANK FOLDER``; the ranks meet through a file of the folder. test_powersgd_hooks.py starts
them, and computes the same from the same seeds by the reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_kernels import PowerSGD, decode_fp169, shard_longer_axis
from dalle_kernels.powersgd.compression import Batch
from dalle_kernels.testing import GradientBucket

WORLD = 4
STEPS = 4
AXES = ("machine", "gpu")
MESHES = [(1, 2), (2, 1), (2, 2)]
SHAPES = {"tall": (37, 21), "wide": (13, 40), "square": (24, 24), "again": (37, 21), "fused": (30, 17), "row": (1, 9)}
PIECES = {"fused.weight": 3}
RANK = 5
ONLY_MATRICES = nn.ModuleDict({n: nn.Linear(9, 14, bias=False) for n in ("a", "b")})
SETTINGS = {"p_divisor": 3.0, "q_divisor": 0.7, "gradient_divisor": 1.5, "seed": 7}


def matrices(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Parameters of odd shapes; of the two equal ones one has no bias."""
    layers = {n: nn.Linear(shape[1], shape[0], bias=n != "again", dtype=dtype) for n, shape in SHAPES.items()}
    return nn.ModuleDict({**layers, "embedding": nn.Embedding(6, 5, dtype=dtype)})


def gradients(model: nn.Module, rank: int, step: int, size: float = 0.01) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1000 * rank + step)
    return {n: (size * torch.randn(p.shape, generator=draw)).to(p.dtype) for n, p in model.named_parameters()}


def scales(model: nn.Module) -> dict[str, float]:
    """Of the parameters of some modules, in another order than theirs."""
    return {n: 2.0**i for i, n in enumerate(reversed(dict(model.named_parameters()))) if not n.startswith("square")}


def mlp() -> nn.Module:
    """A model for DDP and FSDP2, some sizes of which two GPUs do not divide evenly."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(18, 46), nn.GELU(), nn.Linear(46, 18)) for _ in range(2)]
    blocks += [nn.Sequential(nn.LayerNorm(18), nn.Linear(18, 25), nn.Linear(25, 50, bias=False))]
    return nn.Sequential(*blocks, nn.Linear(50, 7))


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(5000 + 100 * rank + step)
    x = torch.randn(6, 18, generator=draw).to(next(model.parameters()).dtype)
    return model(x).square().mean()


def bucket(model: nn.Module, own: dict[str, Tensor]) -> GradientBucket:
    named = dict(model.named_parameters())
    return GradientBucket(named.values(), torch.cat([own[name].flatten() for name in named]))


def reduced(powersgd: PowerSGD, model: nn.Module, own: dict[str, Tensor]) -> dict[str, Tensor]:
    given = bucket(model, own)
    assert PowerSGD.ddp_hook(powersgd, given).value() is given.buffer()
    sums = {name: part.clone() for (name, _), part in zip(model.named_parameters(), given.gradients())}
    return {**sums, "norm": powersgd.gradient_norm()}


def errors_of(powersgd: PowerSGD) -> dict[str, Tensor]:
    return {s.name: decode_fp169(s.errors).view(s.shape) for s in powersgd.shards if s.errors is not None}


def by_dtype(group: dist.ProcessGroup, dtype: torch.dtype, rank: int) -> dict:
    """The hook of DDP on odd shapes, with scales, pieces and divisors of its own."""
    model = matrices(dtype)
    as_tensors = {name: torch.tensor([scale]) for name, scale in scales(model).items()}
    powersgd = PowerSGD(model, RANK, machines=group, pieces=PIECES, scales=as_tensors, **SETTINGS)
    sums = [reduced(powersgd, model, gradients(model, rank, step)) for step in range(STEPS)]
    return {"sums": sums, "errors": errors_of(powersgd), "state": powersgd.state_dict()}


NONFINITE = {
    "a gradient": ("tall.weight", torch.nan),
    "an infinite gradient": ("tall.weight", torch.inf),
    "an exempt gradient": ("tall.bias", torch.nan),
    "P": ("project", None),
    "Q": ("project_back", None),
    "an error buffer": ("tall.weight", 1e12),
}
TINY = 1e-30
"""The scale of every gradient of the last of these in its second step; that of rank 1 is too large for it."""


def spoil(own: dict[str, Tensor], kind: str, rank: int, step: int) -> float:
    """Make gradients nonfinite on rank 1 in step 1, where the kind says so; returns the scale of ``tall.weight``."""
    name, value = NONFINITE[kind]
    if step != 1 or value is None:
        return 1.0
    if kind == "an error buffer":
        own[name] *= value if rank == 1 else TINY
        return TINY
    if rank == 1:
        own[name].view(-1)[-1] = value
    return 1.0


@contextmanager
def spoiled_factor(method: str) -> Iterator[None]:
    """A step of a batch gives an infinity in the first matrix of the batch that ``tall.weight`` is in."""
    plain = getattr(Batch, method)

    def spoil(self: Batch, *args) -> None:
        plain(self, *args)
        if self.shards[0].name == "tall.weight":
            *_, factor = args
            factor[0, 0, 0] = torch.inf

    setattr(Batch, method, spoil)
    try:
        yield
    finally:
        setattr(Batch, method, plain)


def nonfinite(group: dist.ProcessGroup, rank: int) -> dict:
    """What each kind of nonfinite number on rank 1 alone, in the second step of three, leaves."""
    found = {}
    for kind, (place, value) in NONFINITE.items():
        model, scale = matrices(), torch.ones(1)
        powersgd = PowerSGD(model, RANK, machines=group, scales={"tall.weight": scale}, gradient_divisor=1.0)
        sums, errors = [], []
        for step in range(3):
            own = gradients(model, rank, step)
            scale.fill_(spoil(own, kind, rank, step))
            is_spoiled = value is None and (rank, step) == (1, 1)
            with spoiled_factor(place) if is_spoiled else nullcontext():
                sums.append(reduced(powersgd, model, own))
            errors.append(errors_of(powersgd))
        found[kind] = {"sums": sums, "errors": errors}
    return found


def saturated(group: dist.ProcessGroup, rank: int) -> dict:
    """Gradients far beyond the largest code."""
    model = matrices()
    powersgd = PowerSGD(model, RANK, machines=group, gradient_divisor=1.0)
    sums = [reduced(powersgd, model, gradients(model, rank, step, size=40.0)) for step in range(2)]
    return {"sums": sums, "errors": errors_of(powersgd)}


def exempt(group: dist.ProcessGroup, rank: int) -> dict:
    """By names, by a predicate, and nothing exempt at all."""
    found = {}
    for name, model, choice in [
        ("none", ONLY_MATRICES, ()),
        ("all", ONLY_MATRICES, ("a", "b.weight")),
        ("names", matrices(), ("square", "tall.weight")),
        ("predicate", matrices(), lambda name, parameter: not name.startswith("embedding")),
    ]:
        powersgd = PowerSGD(model, RANK, machines=group, exempt=choice)
        found[name] = {
            "compressed": [shard.name for shard in powersgd.shards if shard.matrices is not None],
            "sums": [reduced(powersgd, model, gradients(model, rank, 0))],
        }
    return found


def resumed(pair: dist.ProcessGroup, rank: int, machines: dict[int, dist.ProcessGroup | None]) -> dict:
    """The sum of errors saved by two machines, taken up by four and by one; only the first machine has it."""
    model = matrices()
    powersgd = PowerSGD(model, RANK, machines=pair, pieces=PIECES, seed=3)
    for step in range(2):
        reduced(powersgd, model, gradients(model, rank % 2, step))
    state = powersgd.state_dict()
    found = {"saved": state["errors"]}
    for count in (4, 1):
        again = PowerSGD(model, RANK, machines=machines[count], pieces=PIECES)
        zeros = {name: torch.zeros_like(total) for name, total in state["errors"].items()}
        again.load_state_dict(state if rank == 0 or count == 1 else {"seed": 3, "errors": zeros})
        found[count] = {"errors": errors_of(again), "saved": again.state_dict()["errors"]}
        found[count]["sums"] = [reduced(again, model, gradients(model, rank, 2))]
    return found


def ddp(group: dist.ProcessGroup, rank: int) -> dict:
    """DistributedDataParallel itself with many buckets, which it rebuilds after the first backward."""
    model = nn.parallel.DistributedDataParallel(mlp(), process_group=group, bucket_cap_mb=0.003)
    powersgd = PowerSGD(model, RANK, machines=group)
    model.register_comm_hook(powersgd, PowerSGD.ddp_hook)
    sums = []
    for step in range(STEPS):
        model.zero_grad()
        loss(model, rank, step).backward()
        norm = powersgd.gradient_norm()
        sums.append({**{n: p.grad.clone() for n, p in model.module.named_parameters()}, "norm": norm})
    return {"sums": sums, "buckets": len(powersgd._groups)}


def fsdp(shape: tuple[int, int], rank: int) -> dict:
    """FSDP2 on a (machine, gpu) mesh; a rank that is not on it takes no part."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    ranks = torch.arange(shape[0] * shape[1]).view(shape)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=AXES)
    if rank >= ranks.numel():
        return {}
    model = mlp()
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh["gpu"], shard_placement_fn=shard_longer_axis)
    powersgd = PowerSGD(
        model, 2 * RANK, machines=mesh["machine"].get_group(), gpus=mesh["gpu"].get_group(), exempt=["3"]
    )
    powersgd.attach(model)
    sums = []
    for step in range(STEPS):
        model.zero_grad()
        loss(model, rank, step).backward()
        norm = powersgd.gradient_norm()
        sums.append({**{n: p.grad.to_local().clone() for n, p in model.named_parameters()}, "norm": norm})
    state = powersgd.state_dict()
    powersgd.load_state_dict(state)
    total = powersgd.state_dict()["errors"]
    return {
        "sums": sums,
        "full": {name: error.full_tensor() for name, error in state["errors"].items()},
        "loaded": {name: error.full_tensor() for name, error in total.items()},
    }


def train_sharded(keep_gradients: bool, rank: int) -> dict:
    """FSDP2 on a 2 x 2 mesh, one of whose updates is skipped; what is held after each backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=AXES), mlp()
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh["gpu"], shard_placement_fn=shard_longer_axis)
    groups = {"machines": mesh["machine"].get_group(), "gpus": mesh["gpu"].get_group()}
    powersgd = PowerSGD(model, 2 * RANK, **groups, exempt=["3"], keep_gradients=keep_gradients)
    powersgd.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    norms, held = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        (loss(model, rank, step) * (torch.inf if (rank, step) == (3, 1) else 1)).backward()
        norms.append(powersgd.gradient_norm())
        storages = {p.grad.to_local().untyped_storage() for p in model.parameters() if p.grad is not None}
        held.append(sum(storage.nbytes() for storage in storages))
        if norms[-1].isfinite():
            optimizer.step() if keep_gradients else powersgd.step(optimizer)
    return {
        "parameters": [parameter.detach().to_local() for parameter in model.parameters()],
        "errors": errors_of(powersgd),
        "norms": norms,
        "held": held,
        "exempt": 4 * sum(shard.shape.numel() for shard in powersgd.shards if shard.matrices is None),
    }


def readme(rank: int, example: int) -> dict:
    """An example of the family's README as it stands there, on the four processes."""
    from torch.distributed.device_mesh import init_device_mesh

    text = (Path(__file__).parent.parent / "dalle_kernels/powersgd/README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1 + example].partition("```")[0]
    draw = torch.Generator().manual_seed(rank)
    batches = [torch.randn(6, 18, generator=draw) for _ in range(3)]
    names = {"model": mlp(), "batches": batches, "mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=AXES)}
    exec(compile(code, "README.md", "exec"), names)
    return {"parameters": [p.detach().full_tensor() if example else p.detach() for p in names["model"].parameters()]}


def mistakes() -> dict:
    """What ``attach`` says of a unit sharded over machines too, and of a model that is not sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = mlp()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=AXES))
    said = []
    for model in (mlp(), sharded):
        with pytest.raises(ValueError) as found:
            PowerSGD(model, RANK).attach(model)
        said.append(str(found.value))
    return {"said": said}


def cases(rank: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([r]) for r in range(WORLD)]
    pair = pairs[rank // 2]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield f"{dtype} 4", lambda dtype=dtype: by_dtype(None, dtype, rank)
        yield f"{dtype} 2", lambda dtype=dtype: by_dtype(pair, dtype, rank % 2)
    yield "nonfinite", lambda: nonfinite(pair, rank % 2)
    yield "saturated", lambda: saturated(pair, rank % 2)
    yield "exempt", lambda: exempt(pair, rank % 2)
    yield "resumed", lambda: resumed(pair, rank, {4: None, 1: alone[rank]})
    yield "ddp", lambda: ddp(None, rank)
    for shape in MESHES:
        yield f"fsdp {shape}", lambda shape=shape: fsdp(shape, rank)
    for kept in (True, False):
        yield f"kept {kept}", lambda kept=kept: train_sharded(kept, rank)
    for example in (0, 1):
        yield f"readme {example}", lambda example=example: readme(rank, example)
    yield "mistakes", mistakes


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.save({name: run() for name, run in cases(rank)}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
