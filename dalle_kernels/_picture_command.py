"""The command line of ``python -m dalle_kernels.<family> OUT.png``, which draws one picture of the family."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def picture_command(family: str, description: str, draw: Callable[[Path], None]) -> None:
    """Have ``draw`` write the PNG that the arguments name, and print its path; one sentence where that fails."""
    parser = argparse.ArgumentParser(prog=f"python -m dalle_kernels.{family}", description=description)
    parser.add_argument("out", type=Path, help="the PNG to write")
    path = parser.parse_args().out
    if not path.parent.is_dir():
        parser.error(f"expected a path in an existing folder, got {path}")
    try:
        draw(path)
    except OSError as error:
        parser.error(f"{path} cannot be written: {error.strerror or error}")
    print(path)
