"""``python -m dalle.figures FIGURE DATA OUT.png``: train what a figure shows, for minutes on two cores, and draw it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from dalle.errors import UserError
from dalle.figures import adamw16, loss_scales

FIGURES = {"loss-scales": loss_scales, "adamw16": adamw16}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dalle.figures", description="Draw a figure of real training runs.")
    figures = parser.add_subparsers(dest="figure", metavar="FIGURE", required=True)
    for name, module in FIGURES.items():
        text = module.__doc__.partition("\n")[0]
        figure = figures.add_parser(name, help=text, description=text)
        figure.add_argument("data", type=Path, help="a data set of 64-pixel emoji, as dalle data emoji makes it")
        figure.add_argument("out", type=Path, help="the PNG to write")
        figure.add_argument("--updates", type=int, default=module.UPDATES, help="of each run (default: %(default)s)")
        figure.add_argument("--cache", type=Path, help="folder that keeps the image tokens for the next figure")
    arguments = parser.parse_args()
    if not arguments.out.parent.is_dir():  # told now, not after minutes of training
        parser.error(f"expected a path in an existing folder, got {arguments.out}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            cache = arguments.cache or Path(folder)
            FIGURES[arguments.figure].draw(arguments.data, arguments.out, arguments.updates, cache)
        except UserError as error:
            print(f"dalle.figures: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("dalle.figures: interrupted", file=sys.stderr)
            return 130
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
