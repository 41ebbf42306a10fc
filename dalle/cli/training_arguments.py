"""What ``dalle train-dvae`` and ``dalle train`` share: flags, the config file, and opening the data."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle.config import read_toml
from dalle.device import usable_device
from dalle.errors import UserError

if TYPE_CHECKING:
    from dalle.data import ImageTextDataset
    from dalle.train.loop import RunSettings, Stage
    from dalle.train.team import Alone

RECIPES = Path(__file__).parent.parent / "recipes"
MOST_THREADS = 1024
"""More than any machine has cores; a system that cannot start as many as it is asked for ends the process."""
OVERRIDES = ("updates", "batch_size", "learning_rate", "seed", "compression_rank")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a training run; those of :data:`OVERRIDES` go before the config file's settings."""
    parser.add_argument(
        "--data", required=True, type=Path, help="a folder of images with same-named .txt captions, or of tar shards"
    )
    parser.add_argument("--out", required=True, type=Path, help="run folder: log, pictures, checkpoints, model")
    parser.add_argument(
        "--config", default="emoji", help="a TOML file, or the name of a shipped recipe (default: %(default)s)"
    )
    parser.add_argument("--preset", help="model size instead of the config's: tiny, emoji, small, medium, large, 12b")
    parser.add_argument("--updates", type=int, help="length of the run; every schedule scales with it")
    parser.add_argument("--batch-size", type=int, help="images an update")
    parser.add_argument("--learning-rate", type=float, help="peak step size")
    parser.add_argument("--seed", type=int, help="of initialization, order, augmentation and noise")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--log-every", type=int, default=20, help="updates a log line (default: %(default)s)")
    parser.add_argument(
        "--picture-every", type=int, default=500, help="updates a picture, 0: none (default: %(default)s)"
    )
    parser.add_argument("--checkpoint-every", type=int, default=500, help="updates a checkpoint (default: %(default)s)")
    parser.add_argument("--keep-checkpoints", type=int, default=3, help="how many to keep (default: %(default)s)")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="of a device, for the share that is used (default: measured)"
    )


def train_stage(
    args: argparse.Namespace,
    stage: str,
    config_class: Any,
    settings_class: Any,
    captions: bool,
    join: Callable[[str], Alone],
    make: Callable[..., Stage],
) -> Path:
    """Train one stage as the flags say and return its model folder.

    ``stage`` names the config's sections, ``[<stage>]`` of ``config_class`` and ``[<stage>_training]`` of
    ``settings_class``; ``join(device)`` gives the processes to train with and ``make(config, settings, images,
    held_out, team)`` builds what the loop drives. ``captions``: whether images need them.
    """
    device = _prepare_device(args)

    from dalle.config import from_mapping
    from dalle.train.loop import require_startable, run

    driving = _run_settings(args)
    with join(device) as team:
        require_startable(args.out, args.resume, team)
        where, (model, training) = _read_sections(args, stage, f"{stage}_training")
        config = model_config(config_class, model, f"{where}, [{stage}]")
        settings = from_mapping(settings_class, training, f"{where}, [{stage}_training]")
        images, held_out = _open_images(args.data, captions, team.leads)
        return run(make(config, settings, images, held_out, team), args.out, driving, args.resume)


def _read_sections(args: argparse.Namespace, *names: str) -> tuple[str, list[dict[str, Any]]]:
    """The config's sections called ``names``, and where they come from for error messages.

    A model section may name a ``preset`` that its other keys change; ``--preset`` replaces the section. The other flags
    override the last section, the training settings.
    """
    path = _config_path(args.config)
    content = read_toml(path)
    known = {"dvae", "dvae_training", "dalle", "dalle_training"}
    unknown = sorted(set(content) - known)
    if unknown:
        raise UserError(f"{path}: unknown section {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    wrong = [name for name in names if not isinstance(content.get(name, {}), dict)]
    if wrong:
        raise UserError(f"{path}: expected {wrong[0]} as a section, [{wrong[0]}], got {content[wrong[0]]!r}")
    sections = [dict(content.get(name, {})) for name in names]
    if args.preset:
        sections[0] = {"preset": args.preset}
    for name in OVERRIDES:
        if getattr(args, name, None) is not None:
            sections[-1][name] = getattr(args, name)
    return str(path), sections


def model_config(cls: Any, section: dict[str, Any], where: str) -> Any:
    """A DVAEConfig or DALLEConfig of a config section."""
    settings = dict(section)
    if "preset" in settings:
        settings = {**cls.preset(settings.pop("preset")).to_dict(), **settings}
    return cls.from_dict(settings, where)


def _config_path(name: str) -> Path:
    shipped = RECIPES / f"{name}.toml"
    return shipped if shipped.exists() else Path(name)


def _run_settings(args: argparse.Namespace) -> RunSettings:
    """The settings of the loop that the flags give."""
    from dalle.train.loop import RunSettings

    names = ("log_every", "picture_every", "checkpoint_every", "keep_checkpoints", "peak_tflops")
    return RunSettings(**{name: getattr(args, name) for name in names})


def _prepare_device(args: argparse.Namespace) -> str:
    """Set the thread count, keep freed memory, and return the device to train on."""
    import torch

    if args.threads is not None:
        if not 1 <= args.threads <= MOST_THREADS:
            raise UserError(f"--threads: expected from 1 to {MOST_THREADS}, got {args.threads}")
        torch.set_num_threads(args.threads)
    _keep_freed_memory()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: no usable NVIDIA GPU was found; leave the flag out to train on the CPU")
    usable_device(device)
    return device


def _keep_freed_memory() -> None:
    # glibc returns every large buffer to the kernel on free, and each update would fetch its pages anew. So tell it to
    # keep them: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at their largest.
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # Another libc.
        return
    mallopt(-3, 2**30)
    mallopt(-1, 2**31 - 1)


def _open_images(path: Path, captions: bool, progress: bool) -> tuple[ImageTextDataset, ImageTextDataset | None]:
    """The training images and the held-out ones, where there are any; prints how many were skipped and why."""
    from dalle.data import open_dataset

    images = open_dataset(path, "train", captions=captions, progress=progress)
    print(f"train: {images.summary()}")
    try:
        held_out = open_dataset(path, "heldout", captions=captions)
    except UserError as error:
        print(f"held out: none, {error}")
        return images, None
    print(f"held out: {held_out.summary()}")
    return images, held_out
