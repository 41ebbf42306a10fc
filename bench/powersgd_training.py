"""Train one small model four ways over gloo: PowerSGD of dalle_kernels, of torch, and uncompressed gradients.

    python bench/powersgd_training.py OUT.png

Ours compresses what the paper does, and in a run of its own all that torch's hook compresses. Each process holds all
four and takes their steps in turn, on the same batches, so that their times compare. The job
is a language model of bytes on the sources of Python's standard library. What is printed: bytes that a process sends a
step (an all-reduce counted as a reduce-scatter and an all-gather), median milliseconds of a step, and the loss on a
held-out part; what is drawn: the training loss against steps and against bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dalle_kernels import PowerSGD

DIM, HEADS, LAYERS, LENGTH = 128, 4, 2, 64
BATCH, STEP_SIZE = 8, 2e-3
HELD_OUT = 32
OURS, LIKE_TORCHS = "PowerSGD of dalle_kernels", "the same, of torch's matrices"
TORCHS, PLAIN = "PowerSGD of torch", "no compression"
COLOURS = {OURS: "#1f77b4", LIKE_TORCHS: "#2ca02c", TORCHS: "#d62728", PLAIN: "#7f7f7f"}


class Layer(nn.Module):
    """Causal self-attention and an MLP, each after a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class ByteModel(nn.Module):
    """The loss, in nats a byte, of [batch, LENGTH + 1] bytes."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, DIM), nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.unembedding = nn.Linear(DIM, 256)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(text[:, :-1]) + self.positions)
        return F.cross_entropy(self.unembedding(hidden).flatten(0, 1), text[:, 1:].flatten())


def corpus() -> Tensor:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batch(text: Tensor, seed: int, size: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (size,), generator=draw)
    return text[starts[:, None] + torch.arange(LENGTH + 1)].long()


@dataclass
class Run:
    """One way to train, and what it took."""

    model: DistributedDataParallel
    after_backward: Callable[[], None]
    optimizer: torch.optim.Optimizer = field(init=False)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=STEP_SIZE)

    def step(self, text: Tensor, counted: list[int]) -> None:
        dist.barrier()
        counted.clear()
        begin = time.perf_counter()
        loss = self.model(text)
        self.optimizer.zero_grad()
        loss.backward()
        self.after_backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)
        self.sent.append(sum(counted))
        self.losses.append(loss.item())


def runs(rank: int) -> dict[str, Run]:
    """The same model four times; torch's hook needs all gradients in one bucket, for it orders no collectives."""
    models = {}
    for name in COLOURS:
        torch.manual_seed(0)
        models[name] = DistributedDataParallel(ByteModel(), bucket_cap_mb=1000 if name == TORCHS else None)
    pieces = {f"layers.{i}.qkv.weight": 3 for i in range(LAYERS)}
    ours = {
        OURS: PowerSGD(models[OURS], rank, exempt=["unembedding"], pieces=pieces),
        LIKE_TORCHS: PowerSGD(models[LIKE_TORCHS], rank, exempt=lambda name, parameter: False),
    }
    for name, powersgd in ours.items():
        models[name].register_comm_hook(powersgd, PowerSGD.ddp_hook)
    state = powerSGD_hook.PowerSGDState(None, rank, start_powerSGD_iter=2, min_compression_rate=1)
    models[TORCHS].register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    models[PLAIN].register_comm_hook(None, default_hooks.allreduce_hook)
    return {n: Run(model, ours[n].gradient_norm if n in ours else lambda: None) for n, model in models.items()}


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """What this process sends in each collective that is called meanwhile."""
    counted: list[int] = []
    others = dist.get_world_size() - 1

    def counting(collective: Callable, place: int, share: float) -> Callable:
        def call(*args, **kwargs):
            counted.append(round(share * args[place].nbytes))
            return collective(*args, **kwargs)

        return call

    ring = others / dist.get_world_size()
    shares = {"all_reduce": (0, 2 * ring), "all_to_all_single": (1, ring)}
    shares |= {name: (1, others) for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)}
    plain = {name: getattr(dist, name) for name in shares}
    for name, (place, share) in shares.items():
        setattr(dist, name, counting(plain[name], place, share))
    try:
        yield counted
    finally:
        for name, collective in plain.items():
            setattr(dist, name, collective)


def train(process: int, processes: int, steps: int, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes)
    text = corpus()
    held_out, text = text[: len(text) // 20], text[len(text) // 20 :]
    by_name = runs(rank)
    with counted_bytes() as counted:
        for step in range(steps):
            own = batch(text, step * processes + process, BATCH)
            for turn in range(len(by_name)):
                list(by_name.values())[(step + turn) % len(by_name)].step(own, counted)
    with torch.no_grad():
        finals = {name: run.model.module(batch(held_out, 0, HELD_OUT)).item() for name, run in by_name.items()}
    if process == 0:
        found = {n: {"losses": r.losses, "seconds": r.seconds, "sent": r.sent} for n, r in by_name.items()}
        torch.save({name: {**one, "final": finals[name]} for name, one in found.items()}, f"{folder}/found.pt")
    dist.destroy_process_group()


def table(found: dict[str, dict]) -> str:
    lines = [f"{'':30}{'KiB sent a step':>16}{'share':>8}{'ms a step':>11}{'held-out loss':>15}"]
    whole = statistics.median(found[PLAIN]["sent"])
    for name, one in found.items():
        sent, took = statistics.median(one["sent"]), 1e3 * statistics.median(one["seconds"])
        lines.append(f"{name:30}{sent / 1024:>16.1f}{sent / whole:>8.1%}{took:>11.1f}{one['final']:>15.3f}")
    return "\n".join(lines)


def draw(found: dict[str, dict], path: Path, rank: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_step, by_bytes = figure.subplots(1, 2, sharey=True)
    width = max(1, len(found[OURS]["losses"]) // 20)
    for name, one in found.items():
        losses = torch.tensor(one["losses"]).unfold(0, width, 1).mean(-1)
        sent = torch.tensor(one["sent"]).cumsum(0)[width - 1 :] / 2**20
        by_step.plot(range(width, len(losses) + width), losses, color=COLOURS[name], label=name)
        by_bytes.semilogx(sent, losses, color=COLOURS[name])
    by_step.set(xlabel="update", ylabel=f"training loss, mean of {width} (nats a byte)")
    by_bytes.set(xlabel="MiB sent by a process")
    by_step.legend(fontsize=8)
    figure.suptitle(f"Rank {rank} of matrices from {DIM} × {DIM} on, two processes", fontsize=10)
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--steps", type=int, default=240, help="updates (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of PowerSGD (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="that train together (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.out.parent.is_dir():
        parser.error(f"expected a path in an existing folder, got {arguments.out}")
    with tempfile.TemporaryDirectory() as folder:
        settings = (arguments.processes, arguments.steps, arguments.rank, folder)
        torch.multiprocessing.spawn(train, settings, nprocs=arguments.processes)
        found = torch.load(Path(folder) / "found.pt")
    print(table(found))
    draw(found, arguments.out, arguments.rank)
    print(arguments.out)


if __name__ == "__main__":
    main()
