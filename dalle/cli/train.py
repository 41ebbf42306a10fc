"""``dalle train``: stage 2."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle.cli.training_arguments import (
    add_training_arguments,
    model_config,
    open_images,
    prepare_device,
    read_sections,
    run_settings,
)

NAME = "train"
HELP = "Train the transformer of stage 2 on captions and the tokens that a trained dVAE makes of the images."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)
    parser.add_argument("--dvae", required=True, type=Path, help="model folder of stage 1 (RUN/model)")
    parser.add_argument("--tokenizer", type=Path, help="a saved tokenizer (default: one trained on the captions)")


def run(args: argparse.Namespace) -> None:
    """Train stage 2 and print where its model folder is."""
    device = prepare_device(args)

    from dalle.config import DALLEConfig, from_mapping
    from dalle.tokenizer import Tokenizer
    from dalle.train.dalle import DALLEStage, DALLETraining
    from dalle.train.loop import require_startable
    from dalle.train.loop import run as train

    driving = run_settings(args)
    require_startable(args.out, args.resume)
    where, (model, training) = read_sections(args, "dalle", "dalle_training")
    config = model_config(DALLEConfig, model, f"{where}, [dalle]")
    settings = from_mapping(DALLETraining, training, f"{where}, [dalle_training]")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    images, held_out = open_images(args.data, captions=True)
    stage = DALLEStage(config, settings, images, args.dvae, args.out / "cache", held_out, tokenizer, device)
    print(f"stage 2 is done; its model: {train(stage, args.out, driving, args.resume)}")
