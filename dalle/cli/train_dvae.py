"""``dalle train-dvae``: stage 1."""

from __future__ import annotations

import argparse

from dalle.cli.training_arguments import (
    add_training_arguments,
    model_config,
    open_images,
    prepare_device,
    read_sections,
    run_settings,
)

NAME = "train-dvae"
HELP = "Train the discrete VAE of stage 1 on images; captions are not needed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train stage 1 and print where its model folder is."""
    device = prepare_device(args)

    from dalle.config import DVAEConfig, from_mapping
    from dalle.train.dvae import DVAEStage, DVAETraining
    from dalle.train.loop import require_startable
    from dalle.train.loop import run as train

    driving = run_settings(args)
    require_startable(args.out, args.resume)
    where, (model, training) = read_sections(args, "dvae", "dvae_training")
    config = model_config(DVAEConfig, model, f"{where}, [dvae]")
    settings = from_mapping(DVAETraining, training, f"{where}, [dvae_training]")
    images, held_out = open_images(args.data, captions=False)
    stage = DVAEStage(config, settings, images, held_out, device)
    print(f"stage 1 is done; its model: {train(stage, args.out, driving, args.resume)}")
