"""``dalle data``: make or look at a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAME = "data"
HELP = "Make the captioned emoji set, or check a data set of your own."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two jobs: ``emoji`` and ``check``."""
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    text = "Fetch icon packages with the npm client, render and caption their pictures, and write tar shards."
    emoji = jobs.add_parser("emoji", help=text, description=text)
    emoji.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    emoji.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="side of the pictures (default: %(default)s)"
    )
    emoji.add_argument(
        "--categories",
        choices=("objects", "all"),
        default="objects",
        help="'objects' leaves out people, flags and symbols (default: %(default)s)",
    )
    emoji.add_argument(
        "--packages",
        nargs="+",
        metavar="NAME[@VERSION]",
        help="of noto, noto-v1, fluent-emoji, fluent-emoji-flat (the default: Apache-2.0, MIT) and twemoji, emojione "
        "(CC-BY-4.0), openmoji (CC-BY-SA-4.0), which ask for attribution",
    )
    emoji.add_argument(
        "--hold-out",
        type=float,
        default=0.05,
        metavar="FRACTION",
        help="share of (concept, style) cells kept out of training (default: %(default)s)",
    )
    emoji.add_argument("--jobs", type=int, default=2, help="rendering processes (default: %(default)s)")
    emoji.add_argument("--cache", type=Path, metavar="FOLDER", help="for downloads (default: ~/.cache/dalle/npm)")
    emoji.add_argument("--overwrite", action="store_true", help="replace a data set at OUT")

    text = "Read every image and caption of a folder or of shards and say what would be skipped, and why."
    check = jobs.add_parser("check", help=text, description=text)
    check.add_argument(
        "path", metavar="PATH", type=Path, help="a folder of images and captions, of tar shards, or one shard"
    )
    check.add_argument("--split", default="train", help="'train' or 'heldout' (default: %(default)s)")
    check.add_argument("--list", action="store_true", help="print every skipped name with its reason")


def run(args: argparse.Namespace) -> None:
    """Run the job that was asked for."""
    _make_emoji(args) if args.job == "emoji" else _check(args)


def _make_emoji(args: argparse.Namespace) -> None:
    from dalle.data import emoji

    packages = emoji.select_packages(args.packages or emoji.DEFAULT_PACKAGES)
    manifest = emoji.build(
        args.out,
        packages,
        image_size=args.size,
        categories=args.categories,
        hold_out=args.hold_out,
        cache=args.cache,
        jobs=args.jobs,
        overwrite=args.overwrite,
    )
    for package in manifest["packages"]:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in package["left_out"].items()) or "nothing"
        counts = f"{package['train']:,} train, {package['heldout']:,} held out; left out {left_out}"
        source = f"{package['name']}@{package['version']}, {package['licence']}, {package['author']}"
        print(f"{package['style']} style: {counts} ({source})")
    splits = manifest["splits"]
    print(f"{args.out}: {splits['train']['samples']:,} pictures to train on, {splits['heldout']['samples']:,} held out")


def _check(args: argparse.Namespace) -> None:
    from dalle.data import NothingUsable, open_dataset

    skipped = []
    try:
        dataset = open_dataset(args.path, args.split, progress=True)
        skipped = dataset.skipped
    except NothingUsable as error:
        skipped = error.skipped
        raise
    finally:
        for name, reason in skipped if args.list else ():
            print(json.dumps({"name": name, "reason": reason}, ensure_ascii=False))
    print(f"{args.path} ({args.split}): {dataset.summary()}")
