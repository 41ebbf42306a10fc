"""``dalle plan``: what a training job of stage 2 needs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle.plan import Plan

NAME = "plan"
HELP = "Say what training the transformer needs: memory and traffic of a GPU, and the floor of an update's time."

HARDWARE = {
    "peak_tflops": ("TFLOPS", "of a GPU's 16-bit products"),
    "memory": ("GB", "of a GPU"),
    "memory_bandwidth": ("GB/S", "of a GPU's memory"),
    "link": ("GB/S", "that a GPU sends to others of its machine"),
    "network": ("GB/S", "that a machine sends to others"),
}
PAPER_MODELS = ((1920, 512, 83), (2688, 640, 85), (3968, 896, 86))
"""Width, rank and compression in % of the paper's Table 1; 64 layers, heads of 64, 8 GPUs a machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's and the hardware's flags; the defaults are the paper's."""
    parser.add_argument("--preset", default="12b", help="model size: tiny, emoji, small, ... (default: %(default)s)")
    parser.add_argument("--machines", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="of a machine (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="images an update, of all GPUs (default: %(default)s)")
    parser.add_argument(
        "--rank", type=int, help="PowerSGD's, of a machine; 0: none (default: 896 at width 3968, in proportion)"
    )
    parser.add_argument(
        "--precision",
        default="paper",
        help="'paper': parameters and moments in 16 bit; 'mixed': in 32, work in 16; 'float32' (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-activations", action="store_true", help="of resblocks, instead of computing them again in the backward"
    )
    hardware = parser.add_argument_group(
        "hardware", "the defaults are a V100 of 16 GiB and 100 Gbit/s between machines"
    )
    for name, (unit, text) in HARDWARE.items():
        hardware.add_argument(f"--{name.replace('_', '-')}", type=float, metavar=unit, help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="step the model with fake tensors in a fake process group of that size and compare its collectives",
    )
    parser.add_argument("--table-1", action="store_true", help="print the compression of the paper's Table 1 instead")


def run(args: argparse.Namespace) -> int:
    """Print the plan; the status is 1 when the collectives of ``--verify`` are others."""
    if args.table_1:
        print(_table_1())
        return 0
    from dalle.config import DALLEConfig
    from dalle.files import atomic_write, to_json
    from dalle.plan import Hardware, Job, plan

    given = {name: getattr(args, name) for name in HARDWARE if getattr(args, name) is not None}
    names = ("machines", "gpus", "batch", "rank", "precision")
    job = Job(
        DALLEConfig.preset(args.preset),
        **{name: getattr(args, name) for name in names},
        checkpoint=not args.keep_activations,
    )
    found = plan(job, Hardware(**given))
    parts = [_summary(args.preset, found), _memory(found), *([_traffic(found)] if found.traffic else []), _floor(found)]
    print("\n\n".join(parts))
    if args.json:
        atomic_write(args.json, to_json(found.to_dict()))
    return _verify(found) if args.verify else 0


def _summary(preset: str, found: Plan) -> str:
    from dalle.plan import parameter_count

    job = found.job
    compression = f"PowerSGD of rank {job.rank}, {found.compression_rate:.1%} less" if job.rank else "not compressed"
    return (
        f"{preset}: {parameter_count(job.config):,} parameters, {job.config.layers} layers of width {job.config.dim}\n"
        f"{job.machines} x {job.gpus} GPUs, {job.batch:,} images an update, {job.images_per_gpu} a GPU; "
        f"precision {job.precision!r}; between machines {compression}"
    )


def _memory(found: Plan) -> str:
    total, most = found.memory_at_once, found.hardware.memory
    rows = [(part, _bytes(count)) for part, count in found.memory.items()]
    fits = "fits" if total <= most * 1e9 else "does not fit"
    return _table(("Memory of a GPU", ""), [*rows, (f"at once, at most: {fits} in {most:g} GB", _bytes(total))])


def _traffic(found: Plan) -> str:
    where = {"gpu": "in a machine", "machine": "between machines", "world": "all GPUs"}
    rows = [
        (
            item.purpose,
            item.kind.replace("_", "-"),
            where[item.group],
            str(item.calls),
            _bytes(item.bytes),
            _bytes(item.sent(found.job.group_size(item.group))),
        )
        for item in found.traffic
    ]
    return _table(("Traffic of a GPU and update", "collective", "where", "calls", "buffers", "sent"), rows, 3)


def _floor(found: Plan) -> str:
    from dalle.plan import link_bytes, network_bytes

    job, work = found.job, found.work
    amounts = {
        "operations": f"{work.flops / 1e12:,.4g} TFLOP",
        "memory traffic": _bytes(work.bytes),
        "links in a machine": f"{_bytes(link_bytes(job, found.traffic))} a GPU",
        "network": f"{_bytes(network_bytes(job, found.traffic))} a machine",
    }
    rows = [(name, amounts[name], f"{seconds * 1e3:,.4g} ms") for name, seconds in found.seconds.items()]
    slowest = max(found.seconds, key=found.seconds.get)
    tokens = job.batch * (job.config.text_len + job.config.image_len)
    share = work.model_flops / found.floor / (found.hardware.peak_tflops * 1e12)
    return (
        _table(("Floor of an update", "amount", "time"), rows)
        + f"\n{found.floor * 1e3:,.4g} ms at least, for the {slowest}: at most {tokens / found.floor:,.0f} tokens/s, "
        f"and {share:.0%} of the peak in the model's own {work.model_flops / 1e12:,.4g} TFLOP"
    )


def _verify(found: Plan) -> int:
    from dalle.plan_check import compare

    compared = compare(found.job)
    rows = [
        (
            f"{row.kind.replace('_', '-')}, {row.group}",
            *(f"{number:,}" for number in (*row.planned, *row.counted)),
            "agree" if row.planned == row.counted else "DIFFER",
        )
        for row in compared
    ]
    print("\n" + _table(("Collectives", "planned calls", "bytes", "counted calls", "bytes", ""), rows))
    return int(any(row.planned != row.counted for row in compared))


def _table_1() -> str:
    import dataclasses

    from dalle.config import DALLEConfig
    from dalle.plan import compression_rate, parameter_count

    rows = []
    for dim, rank, paper in PAPER_MODELS:
        config = dataclasses.replace(DALLEConfig(), dim=dim, heads=dim // 64)
        rate = compression_rate(config, 8, rank)
        rows.append((f"{parameter_count(config) / 1e9:.1f}", str(dim), str(rank), f"{rate:.1%}", f"{paper}%"))
    return _table(("10⁹ parameters", "width", "rank", "compression", "paper's"), rows)


def _bytes(count: float) -> str:
    """``count`` bytes in the unit that suits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:,.3f} {unit}"
    return f"{count:.0f} B"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Lines of aligned columns; the first ``texts`` of them to the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
