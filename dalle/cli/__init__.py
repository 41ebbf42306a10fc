"""The ``dalle`` command: one subcommand a job, each in a module of its own.

A job's module has ``NAME``, ``HELP``, ``add_arguments(parser)`` and ``run(args)``, and imports what is heavy inside
``run``, so that ``dalle --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dalle.errors import UserError

JOBS = ("demo", "data", "train_dvae", "train", "generate", "import_openai")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, every job with its own ``--help``."""
    parser = argparse.ArgumentParser(
        prog="dalle", description="Text to image in two stages: a discrete VAE and a sparse autoregressive transformer."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in JOBS:
        job = importlib.import_module(f"dalle.cli.{name}")
        job_parser = commands.add_parser(job.NAME, help=job.HELP, description=job.HELP)
        job.add_arguments(job_parser)
        job_parser.set_defaults(run=job.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake is one sentence on stderr and exit status 2, an interruption 130."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"dalle: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dalle: interrupted", file=sys.stderr)
        return 130
