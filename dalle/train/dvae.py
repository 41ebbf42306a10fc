"""Stage 1: train the dVAE on images alone (paper 2.1, A.2)."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dalle.checkpoint import dvae_files
from dalle.config import DVAEConfig
from dalle.data import ImageTextDataset
from dalle.dvae import DVAE
from dalle.errors import UserError
from dalle.files import atomic_write
from dalle.pictures import png, reconstruction_grid
from dalle.train.averaging import IterateAverage
from dalle.train.batches import ImageBatches
from dalle.train.code_initialization import spread_codes
from dalle.train.loop import Stage
from dalle.train.sampling import derived_seed, generator
from dalle.train.schedules import cosine
from dalle.train.settings import STORED_DTYPES, require_choice, require_in_range
from dalle.train.team import Alone
from dalle.train.transit import to_device


@dataclass(frozen=True)
class DVAETraining:
    """Settings of stage 1. The defaults are the paper's; a ``*_fraction`` is the part of the run a schedule lasts, so
    that the paper's 5,000 / 150,000 / 1,200,000 of 3,000,000 updates scale with ``updates``.

    ``kl_weight`` is beta, ``temperature`` is tau; all schedules are cosine. ``stored_dtype`` is the precision of the
    final model folder ("float32", "float16", "bfloat16"), not of training.

    Two settings are not the paper's, and off by default; without them a run of thousands of updates, not millions,
    ends with a few dozen codes. ``code_sharpness`` > 0 starts the codes at features of training images
    (:func:`spread_codes`). ``encoder_rate`` multiplies the encoder's step size: a decoder that learns faster than the
    encoder moves keeps codes in use.
    """

    updates: int = 3_000_000
    batch_size: int = 512
    seed: int = 0
    learning_rate: float = 1e-4
    final_learning_rate: float = 1.25e-6
    learning_rate_fraction: float = 1_200_000 / 3_000_000
    kl_weight: float = 6.6
    kl_weight_fraction: float = 5_000 / 3_000_000
    temperature: float = 1.0
    final_temperature: float = 1 / 16
    temperature_fraction: float = 150_000 / 3_000_000
    weight_decay: float = 1e-4
    average_decay: float = 0.999
    code_sharpness: float = 0.0
    encoder_rate: float = 1.0
    stored_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size"):
            require_in_range(self, name, 1, math.inf, whole=True)
        require_in_range(self, "seed", 0, 2**63, whole=True)
        for name in ("learning_rate_fraction", "kl_weight_fraction", "temperature_fraction"):
            require_in_range(self, name, 0, 1)
        for name in ("learning_rate", "temperature", "final_temperature"):
            require_in_range(self, name, 1e-12, math.inf)
        for name in ("final_learning_rate", "kl_weight", "weight_decay", "code_sharpness"):
            require_in_range(self, name, 0, math.inf)
        require_in_range(self, "average_decay", 0, 1)
        require_in_range(self, "encoder_rate", 0, 1)
        require_choice(self, "stored_dtype", STORED_DTYPES)

    def scheduled(self, name: str, start: float, end: float, update: int) -> float:
        """The value at ``update`` of the cosine schedule whose length is ``<name>_fraction``."""
        return cosine(start, end, round(self.updates * getattr(self, f"{name}_fraction")), update)


class DVAEStage(Stage):
    """Stage 1 as the loop drives it: batches of augmented images, the bound of Eq. 1, reconstructions as pictures."""

    def __init__(
        self,
        config: DVAEConfig,
        training: DVAETraining,
        images: ImageTextDataset,
        held_out: ImageTextDataset | None = None,
        device: str = "cpu",
    ):
        if len(images) == 0:
            raise UserError("no image to train on: the data set is empty")
        self.config = config
        self.training = training
        self.updates = training.updates
        self.device = device
        torch.manual_seed(derived_seed(training.seed, "dvae"))
        self.team = Alone(device)
        self.place(DVAE(config))
        self.images = images
        self.batches = ImageBatches(images, config.image_size, "dvae", training.seed)
        if training.code_sharpness:
            patches = self.batches.samples(self._first_samples(8 * config.vocab_size))
            spread_codes(self.model, patches.to(device), training.code_sharpness, generator(training.seed, "codes"))
        groups = [
            {"params": list(self.model.encoder.parameters()), "rate_factor": training.encoder_rate},
            {"params": list(self.model.decoder.parameters())},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=training.weight_decay, fused=True
        )
        self.average = IterateAverage(self.model, training.average_decay)
        shown = held_out if held_out is not None and len(held_out) else images
        self.shown = ImageBatches(shown, config.image_size, "none", training.seed)

    def _first_samples(self, patches: int) -> list[int]:
        """As many of the first samples of the run as hold ``patches`` patches, or all."""
        count = min(len(self.images), math.ceil(patches / math.prod(self.config.grid)))
        return [sample for _, sample in self.batches.order.batch(0, count)]

    def learning_rate(self, update: int) -> float:
        settings = self.training
        return settings.scheduled("learning_rate", settings.learning_rate, settings.final_learning_rate, update)

    def loss(self, update: int) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        settings = self.training
        tau = settings.scheduled("temperature", settings.temperature, settings.final_temperature, update)
        beta = settings.scheduled("kl_weight", 0.0, settings.kl_weight, update)
        images = to_device(self.batches.update(update, settings.batch_size), self.device)
        noise = generator(settings.seed, "gumbel", update, device=self.device)
        output = self.model(images, tau, generator=noise)
        figures = {
            "reconstruction": output.reconstruction.detach(),
            "kl_per_token": output.kl.detach() / math.prod(self.config.grid),
            "temperature": tau,
            "kl_weight": beta,
        }
        return output.loss(beta), figures

    def identity(self) -> dict[str, Any]:
        return {
            "stage": "dvae",
            "config": self.config.to_dict(),
            "training": asdict(self.training),
            "data": self.images.fingerprint,
        }

    @torch.no_grad()
    def draw_pictures(self, update: int, folder: Path) -> dict[str, float]:
        dvae = copy.deepcopy(self.average.model).to(self.device)
        images = self.shown.samples(range(min(256, len(self.shown.images)))).to(self.device)
        tokens = dvae.encode(images)
        reconstructions = dvae.decode(tokens)
        count = min(32, len(images))
        atomic_write(
            folder / f"reconstructions-{update:08d}.png",
            png(reconstruction_grid(images[:count], reconstructions[:count])),
        )
        return {
            "held_out_mean_absolute_error": float((images - reconstructions).abs().mean()),
            "held_out_codes_used": int(tokens.unique().numel()),
        }

    def model_files(self, updates: int, seconds: float) -> dict[str, bytes]:
        note = {"training": asdict(self.training), "data": self.images.fingerprint, "seconds": round(seconds)}
        return dvae_files(self.average.model, STORED_DTYPES[self.training.stored_dtype], note)
