"""``dalle generate``: draw images from captions into one labelled PNG."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dalle.dvae import DVAE

NAME = "generate"
HELP = "Draw images from captions into one labelled PNG."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help='a caption, as "red apple, noto style"')
    parser.add_argument("-o", "--out", metavar="PNG", required=True, type=Path, help="where to write the picture")
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="model folder (default: the shipped one)")
    parser.add_argument("--samples", metavar="N", type=int, default=4, help="images for each prompt (default: 4)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=1.0, help="0 takes the most likely tokens (default: 1)"
    )
    parser.add_argument("--top-k", metavar="K", type=int, help="draw from the K most likely tokens only")
    parser.add_argument(
        "--top-p", metavar="P", type=float, help="draw from the fewest tokens that together have probability P"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images (default: 0)")
    parser.add_argument("--prime", metavar="IMAGE", type=Path, help="an image whose top rows are given to the model")
    parser.add_argument(
        "--prime-rows", metavar="R", type=int, help="rows of tokens to take from IMAGE (default: half of them)"
    )
    parser.add_argument("--scale", metavar="N", type=int, default=2, help="enlarge each pixel to N x N (default: 2)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=64, help="images drawn at once (default: 64)")
    parser.add_argument("--device", default="cpu", help='where to compute, as "cpu" or "cuda" (default: cpu)')
    parser.add_argument(
        "--tokens-out", metavar="FILE", type=Path, help="also write the image tokens [P, N, H, W] as safetensors"
    )


def run(args: argparse.Namespace) -> None:
    import sys
    import time

    from dalle.checkpoint import load_dalle, load_dvae, shipped, to_safetensors
    from dalle.device import usable_device
    from dalle.errors import UserError
    from dalle.files import atomic_write
    from dalle.generation import generate
    from dalle.pictures import labelled_grid, png

    if args.scale < 1:
        raise UserError(f"expected a scale of at least 1, got {args.scale}")
    for path in filter(None, (args.out, args.tokens_out)):
        # Found out now, not after the drawing.
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if args.tokens_out and args.tokens_out.resolve() == args.out.resolve():
        raise UserError(f"expected another file for --tokens-out than for the picture, got {args.out} for both")
    device = usable_device(args.device)
    folder = args.checkpoint or shipped("emoji")
    model, tokenizer = load_dalle(folder)
    model, dvae = model.to(device), load_dvae(folder).to(device)
    started = time.monotonic()
    drawn = generate(
        model,
        dvae,
        tokenizer,
        args.prompts,
        samples_per_prompt=args.samples,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        prime=_prime(args.prime, args.prime_rows, dvae, model.config.grid),
        batch_size=args.batch_size,
        progress=sys.stderr.isatty(),
    )
    atomic_write(args.out, png(labelled_grid(drawn.images, args.prompts, scale=args.scale)))
    if args.tokens_out:
        atomic_write(args.tokens_out, to_safetensors({"tokens": drawn.tokens}))
    count = len(args.prompts) * args.samples
    print(f"{args.out.resolve()}: {count} {'image' if count == 1 else 'images'} in {time.monotonic() - started:.1f} s")


def _prime(path: Path | None, rows: int | None, dvae: DVAE, grid: tuple[int, int]) -> torch.Tensor | None:
    from dalle.data.images import DEFAULT_LIMITS, ImageError, decode_image
    from dalle.errors import UserError
    from dalle.generation import prime_tokens

    if path is None:
        if rows is not None:
            raise UserError("expected --prime IMAGE with --prime-rows, got the number of rows alone")
        return None
    try:
        with path.open("rb") as file:
            pixels = decode_image(file.read(DEFAULT_LIMITS.max_bytes + 1))
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot use {path} as the given image: {reason}") from error
    return prime_tokens(dvae, pixels, grid[0] // 2 if rows is None else rows, grid)
