"""``PowerSGD``: the hook of DDP and of FSDP2 that sums gradients between machines (paper App. E)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_kernels._arguments import names_wrong_types
from dalle_kernels.float16.ops import decode_fp169, encode_fp169
from dalle_kernels.powersgd.group import Group, Settings
from dalle_kernels.powersgd.shards import Exempt, LocalShard, like_parameter, local_part, local_shards, unit_layout


class PowerSGD:
    """Gradients summed between machines through factors of low rank, with error feedback in 16 bits (paper App. E).

    With DistributedDataParallel each process is a machine::

        model = DistributedDataParallel(model)
        powersgd = PowerSGD(model, rank=64)
        model.register_comm_hook(powersgd, PowerSGD.ddp_hook)

    With FSDP2 on a (machine, gpu) mesh each GPU compresses its own shard::

        for block in model.blocks:
            fully_shard(block, mesh=mesh["gpu"], shard_placement_fn=shard_longer_axis)
        fully_shard(model, mesh=mesh["gpu"], shard_placement_fn=shard_longer_axis)
        powersgd = PowerSGD(model, rank=64, machines=mesh["machine"].get_group(), gpus=mesh["gpu"].get_group())
        powersgd.attach(model)

    After each backward whose gradients are reduced, and before the optimizer's step, every rank calls
    :meth:`gradient_norm`, and skips the step where that is infinite.

    Args:
        model: what holds the parameters, as the optimizer sees it: wrapped, or sharded, already.
        rank: total rank of a compressed matrix; each of a machine's GPUs takes an equal part of it for its shard.
        machines: the ranks that hold the same shard, one a machine; None means all ranks.
        gpus: the ranks of this machine, over which parameters are sharded; None where they are not.
        exempt: which parameters are summed as they are, in float32. Always so are those that are not matrices. By
            default so is every parameter but the weights of ``nn.Linear``. Names, of parameters or of modules, are
            exempt besides these; a predicate of name and parameter decides alone.
        pieces: for names of parameters that hold several equal matrices one after the other by rows, how many: 3 for a
            weight of queries, keys and values. Each, or each part of its shard, is compressed by itself.
        scales: for names of parameters, what their gradients were multiplied by: float32 tensors of one element, read
            anew at each reduction, on the device.
        gradient_divisor: gradients are divided by it too; None means the number of ranks, so that the result is the
            mean as without this hook. 1 suits a loss that is divided by the overall batch size.
        p_divisor, q_divisor: the factors P and Q are divided by these before they are summed: codes end at ±15.984375.
            P's numbers should stay well above ``eps``.
        keep_scale: give gradients back multiplied by their scales again, as 16-bit gradients must stay that underflow
            without, and those of compressed parameters infinite in an FSDP unit or bucket where one of them is not
            finite on this rank or in a factor.
        keep_gradients: False for FSDP units whose compressed parameters are to have no ``.grad``, which takes as much
            memory as they do: the sums stay factors until :meth:`step`, as the paper has it.
        eps: what is added to P's diagonal before it is orthogonalized.
        seed: of the fixed Gaussian Q, equal on every rank.

    Raises:
        TypeError, ValueError: a setting out of range, a name the model does not have, a parameter of another dtype.
    """

    @names_wrong_types
    def __init__(
        self,
        model: nn.Module,
        rank: int,
        *,
        machines: dist.ProcessGroup | None = None,
        gpus: dist.ProcessGroup | None = None,
        exempt: Exempt = None,
        pieces: Mapping[str, int] | None = None,
        scales: Mapping[str, Tensor] | None = None,
        gradient_divisor: float | None = None,
        p_divisor: float = 1.0,
        q_divisor: float = 1.0,
        keep_scale: bool = False,
        keep_gradients: bool = True,
        eps: float = 1e-6,
        seed: int = 0,
    ):
        gpu_count = 1 if gpus is None else dist.get_world_size(gpus)
        if rank < 1 or rank % gpu_count:
            raise ValueError(f"PowerSGD: expected a rank that {gpu_count} GPUs divide evenly, got {rank}")
        machine_count = dist.get_world_size(machines)
        gradient_divisor = machine_count * gpu_count if gradient_divisor is None else gradient_divisor
        divisors = {"gradient_divisor": gradient_divisor, "p_divisor": p_divisor, "q_divisor": q_divisor}
        for name, divisor in divisors.items():
            if not 0 < divisor < math.inf:
                raise ValueError(f"PowerSGD: expected {name} above 0 and finite, got {divisor}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"PowerSGD: expected eps at or above 0 and finite, got {eps}")
        kept = {"keep_scale": keep_scale, "keep_gradients": keep_gradients}
        self.settings = Settings(rank // gpu_count, machines, machine_count, **divisors, eps=eps, **kept)
        self.gpus, self.seed = gpus, seed
        self.shards = local_shards(model, exempt, pieces or {}, scales or {})
        self._by_parameter = {shard.parameter: shard for shard in self.shards}
        self._groups: dict[tuple[int, ...], Group] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def ddp_hook(self, bucket):
        """The communication hook: ``ddp_model.register_comm_hook(powersgd, PowerSGD.ddp_hook)``.

        Buckets may be many and may be rebuilt: state belongs to parameters, not to buckets. The collectives of a bucket
        are issued before the hook returns, by the thread that DDP calls it on, in the order of the buckets; so all
        ranks issue them in one order, over gloo too. On a GPU they run on a stream of their own beside the backward.
        """
        if not self.settings.keep_gradients:
            raise ValueError("PowerSGD: expected keep_gradients with DDP, whose buckets keep all gradients anyway")
        buffer = bucket.buffer()
        with self._beside_backward(buffer.device):
            future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
            self._reduce([self._by_parameter[parameter] for parameter in bucket.parameters()], bucket.gradients())
            future.set_result(buffer)
        return future

    def attach(self, model: nn.Module) -> None:
        """Set the all-reduce hook of each FSDP unit in ``model``, which may be a part of the whole.

        The units are to be sharded over the GPUs of a machine alone. FSDP is told to sum over the GPUs; the division is
        in ``gradient_divisor``. All parameters of a unit that require gradients must get them in each backward. FSDP
        hands on the result in its ``reduce_dtype``: float16 would lose small gradients once their scale is divided out.
        """
        from torch.distributed.fsdp import FSDPModule  # here, for it takes a second

        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if not units:
            raise ValueError("PowerSGD.attach: expected a model to which fully_shard was applied, found no FSDP unit")
        for unit in units:
            layout = [(self._by_parameter[parameter], size) for parameter, size in unit_layout(unit)]
            if any(shard.parameter.device_mesh.ndim > 1 for shard, _ in layout):
                raise ValueError("PowerSGD.attach: expected units sharded over a mesh of one axis, the machine's GPUs")
            if layout:
                unit.set_force_sum_reduction_for_comms(True)
                unit.set_gradient_divide_factor(1.0)
                unit.set_all_reduce_hook(partial(self._reduce_unit, layout))
                if not self.settings.keep_gradients:
                    for shard, _ in layout:
                        shard.parameter.register_post_accumulate_grad_hook(
                            _keep_copy if shard.matrices is None else _drop
                        )

    def gradient_norm(self, rest: Tensor | None = None) -> Tensor:
        """The norm of all gradients since the last call (steps 9 and 10): a tensor on the device, equal on every rank.

        It is the compressed gradients' norm as their factors Q have it, infinite where a gradient or factor of any rank
        was not finite. ``rest`` is for gradients that other means have summed: the square of their norm, or this GPU's
        part of it, for it is added over the GPUs of a machine. A collective: every rank calls it.
        """
        reduced = [group for group in self._groups.values() if group.square is not None]
        if not reduced:
            raise RuntimeError("PowerSGD.gradient_norm: no gradient was reduced since the last call")
        square = torch.stack([group.square for group in reduced]).sum()
        if rest is not None:
            square += rest
        return self._over_all_ranks(square).sqrt_()

    def squares(self, parameters: Sequence[Tensor]) -> Tensor:
        """For each of ``parameters`` the squared norm of the gradients of its whole unit, or bucket, [parameters].

        It takes the place of :meth:`gradient_norm` where it is asked which part of the model is not finite.
        """
        group_of = {shard.parameter: group for group in self._groups.values() for shard in group.shards}
        groups = [group_of.get(parameter) for parameter in parameters]
        if any(group is None or group.square is None for group in groups):
            raise RuntimeError("PowerSGD.squares: of a parameter no gradient was reduced since the last call")
        return self._over_all_ranks(torch.stack([group.square for group in groups]))

    def _over_all_ranks(self, squares: Tensor) -> Tensor:
        for group in self._groups.values():
            group.square = None
        squares.nan_to_num_(nan=math.inf, posinf=math.inf)
        if self.gpus is not None:
            dist.all_reduce(squares, group=self.gpus)
        # The squares are the machines' same; an infinite one, for a gradient of one machine, is so on all by this.
        dist.all_reduce(squares, op=dist.ReduceOp.MAX, group=self.settings.machines)
        return squares

    def step(
        self, optimizer: torch.optim.Optimizer, units: Iterable[Sequence[tuple[Tensor, Tensor]]] | None = None
    ) -> None:
        """``optimizer.step()`` where gradients are not kept: one for all that has a gradient, then one a unit.

        The gradients of one unit's compressed parameters are there at a time. The optimizer is to pass over parameters
        without a gradient, as torch's do, and :class:`~dalle_kernels.AdamW16`. ``units`` are what :meth:`decompressed`
        yields; or what is made of that, such as clipped gradients, or the local tensors that the optimizer knows.
        """
        optimizer.step()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        others = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in others:
            parameter.grad = None
        for unit in self.decompressed() if units is None else units:
            for parameter, gradient in unit:
                parameter.grad = gradient
            optimizer.step()
            for parameter, _ in unit:
                parameter.grad = None
        for parameter, gradient in others:
            parameter.grad = gradient

    def decompressed(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Where gradients are not kept, unit by unit: its compressed parameters, each with its gradient.

        They can be had once after a backward, and take memory only one unit at a time.
        """
        for group in self._groups.values():
            if group.sums is not None:
                pairs = [(shard.parameter, gradient) for shard, gradient in group.decompressed()]
                group.sums = None
                yield [(parameter, like_parameter(gradient, parameter)) for parameter, gradient in pairs]

    def state_dict(self) -> dict[str, Any]:
        """The seed, and the sum over the machines of each error buffer, in float32 (a DTensor for a sharded parameter).

        A collective: every rank calls it. All machines get the same, so one of them needs to save.
        """
        parameters = {shard.name: shard.parameter for shard in self._compressed()}
        sums = {name: like_parameter(total, parameters[name]) for name, total in self.error_sums()}
        return {"seed": self.seed, "errors": sums}

    def error_sums(self) -> Iterator[tuple[str, Tensor]]:
        """The names and sums of :meth:`state_dict`, one after the other, in float32; of a DTensor the local part.

        To be moved elsewhere one by one, where the memory for all of them is missing. A collective.
        """
        for shard in self._compressed():
            total = decode_fp169(shard.errors)
            dist.all_reduce(total, group=self.settings.machines)
            yield shard.name, total.view(shard.shape)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the sums that :meth:`state_dict` gave, on any number of machines; the first machine's are broadcast.

        A collective. Raises ValueError for other names or shapes, with nothing changed.
        """
        compressed = list(self._compressed())
        sums = {name: local_part(total) for name, total in state["errors"].items()}
        expected = {shard.name: shard.shape for shard in compressed}
        for name in expected.keys() | sums.keys():
            got = sums[name].shape if name in sums else None
            if got != expected.get(name):
                wanted = f"of shape {list(expected[name])}" if name in expected else "to be absent"
                raise ValueError(f"PowerSGD: expected the errors of {name} {wanted}, got {got and list(got)}")
        for shard in compressed:
            total = sums[shard.name].to(shard.errors.device, torch.float32, copy=True).view(shard.matrices)
            dist.broadcast(total, group_src=0, group=self.settings.machines)
            shard.errors = encode_fp169(total.div_(self.settings.machine_count))
        self.seed = state["seed"]
        self._groups.clear()  # they hold the buffers and Qs that were

    def _compressed(self) -> Iterator[LocalShard]:
        return (shard for shard in self.shards if shard.matrices is not None)

    def _reduce(self, shards: Sequence[LocalShard], gradients: Sequence[Tensor]) -> None:
        key = tuple(shard.index for shard in shards)
        if key not in self._groups:
            # DDP has rebuilt its buckets: those that share a parameter with this one are no more.
            self._groups = {old: group for old, group in self._groups.items() if not set(old) & set(key)}
            self._groups[key] = Group(shards, self.settings, self.seed)
        self._groups[key].reduce(gradients)

    def _reduce_unit(self, layout: Sequence[tuple[LocalShard, int]], flat: Tensor) -> None:
        """The all-reduce hook of one FSDP unit."""
        sizes = [size for _, size in layout]
        if sum(sizes) != flat.numel():
            names = ", ".join(shard.name for shard, _ in layout)
            raise RuntimeError(f"PowerSGD: expected a gradient of each parameter of an FSDP unit, one lacks of {names}")
        shards = [shard for shard, _ in layout]
        if flat.is_cuda and not self.settings.keep_gradients:
            # FSDP counts on gradients to hold this memory, which another stream has given, to the backward's end.
            flat.record_stream(torch.cuda.current_stream(flat.device))
        self._reduce(shards, [part[: s.shape.numel()].view(s.shape) for s, part in zip(shards, flat.split(sizes))])

    @contextmanager
    def _beside_backward(self, device: torch.device) -> Iterator[None]:
        """On a GPU, a stream that goes on where the current one is now."""
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield


def _drop(parameter: Tensor) -> None:
    """After FSDP has set a gradient that is not to be kept."""
    parameter.grad = None


def _keep_copy(parameter: Tensor) -> None:
    """The gradient by itself, where it is a part of those of the whole unit."""
    parameter.grad = parameter.grad.clone()
