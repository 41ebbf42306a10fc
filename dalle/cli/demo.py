"""``dalle demo``: a labelled grid of pictures drawn from captions by the shipped model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

NAME = "demo"
HELP = "Draw a labelled grid of pictures for a dozen captions with the model that comes with the package."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("out/demo.png"), help="PNG to write (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=4, help="pictures a caption (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Draw the captions that the model folder's ``demo.json`` lists and print where the PNG is."""
    from dalle.checkpoint import load_dalle, load_dvae, shipped
    from dalle.errors import UserError
    from dalle.files import atomic_write, read_json
    from dalle.generation import generate
    from dalle.pictures import labelled_grid, png

    if args.samples < 1:
        raise UserError(f"--samples: expected at least 1, got {args.samples}")
    if args.out.is_dir():
        raise UserError(f"cannot write {args.out}: it is a folder; give the name of a file in it")
    folder = shipped("emoji")
    demo = read_json(folder / "demo.json", "list of demo captions")
    captions = [*demo["seen"], *demo["held_out"]]
    marks = [None] * len(demo["seen"]) + ["held out"] * len(demo["held_out"])
    model, tokenizer = load_dalle(folder)
    dvae = load_dvae(folder)
    started = time.monotonic()
    drawn = generate(model, dvae, tokenizer, captions, args.samples, seed=args.seed, **demo["sampling"])
    seconds = time.monotonic() - started
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {args.out.parent}: {error.strerror}") from None
    atomic_write(args.out, png(labelled_grid(drawn.images, captions, marks=marks)))
    tokens = drawn.tokens.numel()
    print(f"{len(captions)} captions x {args.samples} samples: {tokens:,} image tokens in {seconds:.1f} s")
    print("held out: this concept in this style was never seen in training; both were, apart from each other")
    print(f"the grid is in {args.out.resolve()}")
