"""A run of several processes, started by torchrun: one a GPU, or on CPUs for tests."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from dalle.errors import UserError
from dalle.train.sharding import GPU, average_replicated, compress, mesh_of, shard, squares_of_matrices
from dalle.train.team import Alone, Compression, Figures, Item
from dalle_kernels import PowerSGD

# While the leader encodes a data set the others wait.
PATIENCE = datetime.timedelta(days=2)


class Team(Alone):
    """The processes of a run, rank = machine x GPUs a machine + GPU; the model is sharded over them as
    :mod:`dalle.train.sharding` says."""

    def __init__(self, machines: int | None, device: str):
        kind = torch.device(device).type
        if kind == "cuda":
            super().__init__(f"cuda:{_local_gpu()}")
            torch.cuda.set_device(self.device)
        else:
            super().__init__(kind)
        store, rank, size = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=_fresh(store, size), rank=rank, world_size=size)
        self.rank, self.size, self.leads = rank, size, rank == 0
        machines = _machines_of_torchrun(self.size) if machines is None else machines
        if machines < 1 or self.size % machines:
            raise UserError(
                f"--machines {machines}: expected a divisor of the number of processes, {self.size} by torchrun"
            )
        self.machines = machines
        self.gpu = self.rank % (self.size // machines)
        # The model that is trained, what compresses its gradients, its shards, and what clips gradients to come.
        self._model: nn.Module | None = None
        self._powersgd: PowerSGD | None = None
        self._locals: dict[nn.Parameter, nn.Parameter] = {}
        self._clipped: torch.Tensor | None = None
        self.mesh = mesh_of(machines, self.size // machines, kind)
        # Checkpoints and the averaged model are on the CPU, whatever the model is on.
        self.cpu_mesh = self.mesh if kind == "cpu" else mesh_of(machines, self.size // machines)
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.saving = dist.new_group(backend="gloo", timeout=PATIENCE)  # for the thread that writes checkpoints
        # torchrun counts the restarts of each machine, and only where the failure was.
        starts = torch.tensor(_restarts())
        dist.all_reduce(starts, dist.ReduceOp.MAX, group=self._control)
        self.resumes = bool(starts)
        if not self.leads:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the process's end)

    def __exit__(self, kind: Any, *_exception: Any) -> None:
        # After a failure the others may not come: then torchrun ends them.
        if kind is None:
            dist.destroy_process_group()

    def build(self, make: Callable[[], nn.Module]) -> nn.Module:
        if self.leads:
            return make()
        with torch.device("meta"):
            return make()

    def shard(
        self, model: nn.Module, compression: Compression | None = None, scales: torch.Tensor | None = None
    ) -> nn.Module:
        whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
        shard(model.to("meta"), self.mesh, compressed=compression is not None)
        self._fill(model.to_empty(device=self.device), whole)
        if compression is not None:
            self._powersgd = compress(model, self.mesh, compression, scales)
        self._model = model
        return model

    def _fill(self, model: nn.Module, whole: dict[str, torch.Tensor]) -> None:
        """Take this process's parts of the parameters that the leader holds ``whole``, one by one: nobody else ever
        holds more than one."""
        for name, parameter in model.named_parameters():
            tensor = whole.pop(name)
            tensor = tensor.to(self.device) if self.leads else torch.empty_like(tensor, device=self.device)
            dist.broadcast(tensor.view(torch.uint8), src=0)
            if isinstance(parameter, DTensor):
                shard = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
                tensor = shard.to_local()
            _local(parameter).detach().copy_(tensor)

    def shards(self, model: nn.Module) -> nn.Module:
        tree = nn.Module()
        for name, parameter in model.named_parameters():
            *path, last = name.split(".")
            module = tree
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, self._locals.setdefault(parameter, _local(parameter)))
        return tree

    def require_fitting(self, batch_size: int, compression_rank: int = 0) -> None:
        if batch_size % self.size:
            raise UserError(f"batch_size: expected a multiple of the {self.size} processes, got {batch_size}")
        if compression_rank and self.machines == 1:
            raise UserError(
                f"compression_rank: expected 0 for one machine, whose GPUs send gradients as they are, got "
                f"{compression_rank}; leave it out, or say by --machines how many there are"
            )

    def share(self, batch: Sequence[Item]) -> Sequence[Item]:
        part = len(batch) // self.size
        return batch[self.rank * part : (self.rank + 1) * part]

    def divide(self, work: Sequence[Item]) -> Sequence[Item]:
        return work[self.rank :: self.size]

    def combine(self, model: nn.Module, shards: nn.Module, figures: Figures) -> Figures:
        for parameter, local in self._locals.items():
            if parameter is not local and parameter.grad is not None:
                local.grad, parameter.grad = parameter.grad.to_local(), None
        average_replicated([parameter for parameter, local in self._locals.items() if parameter is local])
        means = torch.stack([self._as_double(value) for value in figures.values()])
        dist.all_reduce(means)
        return dict(zip(figures, (means / self.size).unbind()))

    def clip(self, shards: nn.Module, clip_norm: float) -> torch.Tensor:
        sharded, whole = ([], [])
        for parameter, local in self._locals.items():
            if local.grad is not None:
                (whole if parameter is local else sharded).append(local.grad)
        squares = self.add_squares(*(nn.utils.get_total_norm(part).double() ** 2 for part in (sharded, whole)))
        if self._powersgd is not None:
            squares = squares + self._powersgd.gradient_norm().double() ** 2
        norm = squares.sqrt().float()
        nn.utils.clip_grads_with_norm_(shards.parameters(), clip_norm, norm)
        self._clipped = (clip_norm / (norm + 1e-6)).clamp(max=1)  # what torch multiplies by
        return norm

    def step(
        self, optimizer: torch.optim.Optimizer, observe: Callable[[Sequence[torch.Tensor]], None] | None = None
    ) -> None:
        if self._powersgd is None:
            optimizer.step()
        else:
            self._powersgd.step(optimizer, self._compressed_gradients(observe))

    def _compressed_gradients(
        self, observe: Callable[[Sequence[torch.Tensor]], None] | None
    ) -> Iterator[list[tuple[nn.Parameter, torch.Tensor]]]:
        """Resblock by resblock, of its matrices' shards."""
        for unit in self._powersgd.decompressed():
            shards, gradients = zip(*((self._locals[parameter], gradient.to_local()) for parameter, gradient in unit))
            if self._clipped is not None:
                torch._foreach_mul_(gradients, self._clipped)
            if observe is not None:
                observe(gradients)
            yield list(zip(shards, gradients))

    def _as_double(self, value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.double()
        return torch.full((), value, dtype=torch.float64, device=self.device)  # a number would be copied with a wait

    def add_squares(self, sharded: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        # Each machine holds all shards once, each process all that is whole: so the mean counts both once.
        squares = sharded * (self.size / self.machines) + whole
        dist.all_reduce(squares)
        return squares / self.size

    def compressed_squares(self) -> torch.Tensor | None:
        return None if self._powersgd is None else squares_of_matrices(self._model, self._powersgd)

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(counts)
        return counts

    def whole(self, model: nn.Module, shards: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
        parameters, tensors = dict(model.named_parameters()), {}
        for name, tensor in shards.named_parameters():
            stored = self.stored(parameters[name], tensor)
            full = stored.full_tensor() if isinstance(stored, DTensor) else stored
            if self.leads:
                tensors[name] = full
        if not self.leads:
            return None
        built = build()
        built.load_state_dict(tensors)
        return built.eval().requires_grad_(False)

    def from_leader(self, make: Callable[[], Item]) -> Item:
        box = [make() if self.leads else None]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def after_leader(self, done: Item) -> Item:
        dist.barrier(group=self._control)
        return done

    def leader_first(self, make: Callable[[], Item]) -> Item:
        made = make() if self.leads else None
        dist.barrier(group=self._control)
        return made if self.leads else make()

    def error_sums(self) -> dict[str, torch.Tensor]:
        if self._powersgd is None:
            return {}
        # One by one, for in float32 all of them together take twice the memory of the parameters.
        return {name: total.cpu() for name, total in self._powersgd.error_sums()}

    def take_error_sums(self, sums: dict[str, torch.Tensor]) -> None:
        if self._powersgd is not None:
            self._powersgd.load_state_dict({"seed": self._powersgd.seed, "errors": sums})

    def stored(self, parameter: nn.Parameter | None, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a part of ``parameter``, or of what is shaped like it, for a checkpoint."""
        return self._spread(parameter, tensor.detach().to("cpu", copy=True))

    def empty(self, parameter: nn.Parameter | None, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            shape = parameter.to_local().shape
        return self._spread(parameter, torch.empty(shape, dtype=dtype))

    def part(self, parameter: nn.Parameter | None, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
            return tensor
        mesh = self._cpu_mesh_of(parameter)
        return distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None).to_local()

    def _spread(self, parameter: nn.Parameter | None, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor as what it is a part of: where it has the shape of the parameter's shard, of such a whole."""
        if not isinstance(parameter, DTensor) or tensor.shape != parameter.to_local().shape:
            return tensor
        return DTensor.from_local(
            tensor,
            self._cpu_mesh_of(parameter),
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def _cpu_mesh_of(self, parameter: DTensor) -> DeviceMesh:
        return self.cpu_mesh[GPU] if self._is_compressed(parameter) else self.cpu_mesh

    @staticmethod
    def _is_compressed(parameter: DTensor) -> bool:
        """Whether PowerSGD sums its gradient between machines, of which its mesh knows nothing."""
        return parameter.device_mesh.ndim == 1


def _local_gpu() -> int:
    number, count = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if not number.isdecimal() or int(number) >= count:
        raise UserError(f"expected one process for each of the {count} GPUs here, started by torchrun, got one more")
    return int(number)


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _fresh(store: dist.Store, size: int) -> dist.Store:
    """The store without what an earlier start left there.

    torchrun keeps one store for all starts, and processes that find the addresses of those before them wait for these.
    On several machines the numbers of restarts differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) < size:
        return store
    return dist.PrefixStore(f"start {_restarts()}", store)


def _machines_of_torchrun(size: int) -> int:
    return size // int(os.environ.get("LOCAL_WORLD_SIZE", size))


def _local(parameter: nn.Parameter) -> nn.Parameter:
    """The shard of a parameter, in the same memory; a parameter that is whole itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.detach().to_local(), parameter.requires_grad)
