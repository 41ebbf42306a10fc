"""The ``dalle`` command: one subcommand a job, each in a module of its own.

A job's module has ``NAME``, ``HELP``, ``add_arguments(parser)`` and ``run(args)``, and imports what is heavy inside
``run``, so that ``dalle --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence

from dalle.errors import UserError

JOBS = ("demo", "data", "train_dvae", "train", "export", "generate", "plan", "plot", "import_openai")


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
    """Run the command line; a user's mistake is one sentence on stderr and exit status 2, an interruption 130.

    Too little memory counts as a mistake: of the size that was asked for.
    """
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        _let_the_leader_speak()
        print(f"dalle: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _let_the_leader_speak()
        print("dalle: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # The reader of our output has left, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        if _is_about_providers(error):
            print(f"dalle: error: {error}", file=sys.stderr)
            return 2
        if not _is_out_of_memory(error):
            raise
        print(
            "dalle: error: there is not enough memory for this; ask for a smaller model, batch, picture or number of "
            "samples",
            file=sys.stderr,
        )
        return 2


def _let_the_leader_speak() -> None:
    # Processes that torchrun started together mostly make the same mistake. The first says it, and as it ends torchrun
    # ends the others, which wait for that here. Who is still there made the mistake alone, and says it too.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)


def _is_about_providers(error: Exception) -> bool:
    # DALLE_KERNELS_PROVIDER and DALLE_KERNELS_ISA can ask for what is not to be had. Whoever raised this has loaded the
    # kernels; nobody else should wait for them.
    kernels = sys.modules.get("dalle_kernels")
    return kernels is not None and isinstance(error, (kernels.NativeError, kernels.ProviderError))


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a plain RuntimeError when the CPU's memory is not enough.
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "not enough memory")
    )
