"""``dalle plot``: a picture of a training's log."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "plot"
HELP = "Draw what a training has logged: losses, step size, scales and exponents of gradients, speed, traffic."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="LOG", type=Path, help="a log.jsonl, or the run folder that holds it")
    parser.add_argument("-o", "--out", type=Path, help="PNG file to write (default: LOG's name with .png)")


def run(args: argparse.Namespace) -> None:
    from dalle.files import atomic_write
    from dalle.plot import plot_log

    out = args.out or (args.log / "log.png" if args.log.is_dir() else args.log.with_suffix(".png"))
    atomic_write(out, plot_log(args.log))
    print(f"wrote {out}")
