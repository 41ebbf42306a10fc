"""``dalle train-dvae``: stage 1."""

from __future__ import annotations

import argparse

from dalle.cli.training_arguments import add_training_arguments, train_stage

NAME = "train-dvae"
HELP = "Train the discrete VAE of stage 1 on images; captions are not needed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train stage 1 and print where its model folder is."""
    from dalle.config import DVAEConfig
    from dalle.train.dvae import DVAEStage, DVAETraining
    from dalle.train.team import alone

    def make(config, settings, images, held_out, team) -> DVAEStage:
        return DVAEStage(config, settings, images, held_out, team.device)

    model = train_stage(args, "dvae", DVAEConfig, DVAETraining, False, alone, make)
    print(f"stage 1 is done; its model: {model}")
