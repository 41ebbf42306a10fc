"""``dalle train``: stage 2."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle.cli.training_arguments import add_training_arguments, train_stage

NAME = "train"
HELP = "Train the transformer of stage 2 on captions and the tokens that a trained dVAE makes of the images."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)
    parser.add_argument("--dvae", required=True, type=Path, help="model folder of stage 1 (RUN/model)")
    parser.add_argument(
        "--machines", type=int, help="machines to replicate the model over, under torchrun (default: as torchrun says)"
    )
    parser.add_argument("--compression-rank", type=int, help="total rank of PowerSGD between machines, 0: uncompressed")
    parser.add_argument("--tokenizer", type=Path, help="a saved tokenizer (default: one trained on the captions)")


def run(args: argparse.Namespace) -> None:
    """Train stage 2 and print where its model folder is."""
    from dalle.config import DALLEConfig
    from dalle.tokenizer import Tokenizer
    from dalle.train.dalle import DALLEStage, DALLETraining
    from dalle.train.team import Alone, join

    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None

    def team_on(device: str) -> Alone:
        return join(args.machines, device)

    def make(config, settings, images, held_out, team) -> DALLEStage:
        return DALLEStage(config, settings, images, args.dvae, args.out / "cache", held_out, tokenizer, team)

    model = train_stage(args, "dalle", DALLEConfig, DALLETraining, True, team_on, make)
    print(f"stage 2 is done; its model: {model}")
