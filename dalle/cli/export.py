"""``dalle export``: the model folder of a training that has not ended."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "export"
HELP = "Make a model folder of a training's checkpoint, of one process or of many, without going on with the training."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="RUN", type=Path, help="a run folder of your own, or one of its checkpoints"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the model folder to write")
    parser.add_argument("--dvae", type=Path, help="model folder of stage 1, which a run of stage 2 was given")


def run(args: argparse.Namespace) -> None:
    from dalle.files import atomic_write_folder
    from dalle.train.export import checkpoint_of, model_files

    checkpoint = checkpoint_of(args.run_folder)
    atomic_write_folder(args.out, model_files(checkpoint, args.dvae))
    print(f"wrote {args.out}: the averaged parameters of {checkpoint}")
