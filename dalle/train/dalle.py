"""Stage 2: train the transformer on captions and the frozen dVAE's tokens (paper 2.2, B.2)."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dalle.checkpoint import dalle_files, dvae_sha256, load_dvae
from dalle.config import DALLEConfig
from dalle.data import ImageTextDataset
from dalle.errors import UserError
from dalle.files import atomic_write, sha256
from dalle.generation import generate
from dalle.pictures import labelled_grid, png
from dalle.plan import model_flops
from dalle.tokenizer import Tokenizer
from dalle.train.averaging import IterateAverage
from dalle.train.loop import Stage
from dalle.train.precision import (
    OPTIMIZERS,
    PRECISIONS,
    make_optimizer,
    prepare_scaled_step,
    require_fitting,
    scales_from_json,
    scales_to_json,
)
from dalle.train.sampling import EpochOrder, derived_seed
from dalle.train.schedules import PlateauHalving, cosine, warm_up
from dalle.train.settings import STORED_DTYPES, require_choice, require_in_range
from dalle.train.team import ALONE, Alone, Compression, Figures
from dalle.train.tokens import encode_dataset
from dalle.train.transit import to_device
from dalle.transformer import DALLE
from dalle_kernels import GradScales

PICTURED_CAPTIONS = 8
SAMPLES_PER_CAPTION = 4


@dataclass(frozen=True)
class DALLETraining:
    """Settings of stage 2. The defaults are the paper's; ``warm_up_fraction`` and ``plateau_fraction`` scale with
    ``updates``.

    ``schedule`` is what follows the warm-up: "plateau" halves the step size each time the training loss, averaged over
    windows of ``plateau_fraction`` of the run, stops falling (the paper's, five times at most); "cosine" goes down to
    ``final_learning_rate``, the better choice for a short run. ``crops`` is how many augmented crops of each image are
    encoded once and cached. Weight decay spares gains, biases and embeddings. ``stored_dtype`` is the precision of the
    final model folder, not of training.

    ``precision`` is the resblocks': "float32", or the paper's "float16", or "bfloat16", for their matrices, activations
    and gradients, each resblock under a loss scale of its own. ``optimizer`` is torch's "adamw", or "adamw16", which
    keeps the moments of the resblocks' matrices in 16 bits and which 16-bit resblocks need (paper 2.4, B.2).
    ``stochastic_rounding`` rounds 16-bit matrices up or down at random after each step, so that steps below their
    precision add up; the noise is a function of the seed, the update and how many GPUs a machine has.

    ``compression_rank`` is the total rank at which PowerSGD sums the gradients of the resblocks' matrices between
    machines (paper App. E); 0 sums them as they are. It needs a run under torchrun. ``p_divisor`` and ``q_divisor`` are
    the constants by which its factors P and Q are divided before they are summed in 1-6-9, whose numbers end at 16.
    """

    updates: int = 430_000
    batch_size: int = 1024
    seed: int = 0
    learning_rate: float = 4.5e-4
    final_learning_rate: float = 0.0
    schedule: str = "plateau"
    warm_up_fraction: float = 5_000 / 430_000
    plateau_fraction: float = 0.02
    weight_decay: float = 4.5e-2
    clip_norm: float = 4.0
    average_decay: float = 0.99
    average_every: int = 25
    bpe_dropout: float = 0.1
    crops: int = 1
    precision: str = "float32"
    optimizer: str = "adamw"
    stochastic_rounding: bool = False
    compression_rank: int = 0
    p_divisor: float = 1.0
    q_divisor: float = 1.0
    stored_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "average_every", "crops"):
            require_in_range(self, name, 1, math.inf, whole=True)
        require_in_range(self, "seed", 0, 2**63, whole=True)
        for name in ("warm_up_fraction", "plateau_fraction", "average_decay"):
            require_in_range(self, name, 0, 1)
        require_in_range(self, "bpe_dropout", 0, 0.99)
        for name in ("learning_rate", "p_divisor", "q_divisor"):
            require_in_range(self, name, 1e-12, math.inf)
        require_in_range(self, "clip_norm", 1e-12, math.inf, finite=False)
        for name in ("final_learning_rate", "weight_decay"):
            require_in_range(self, name, 0, math.inf)
        require_choice(self, "schedule", ("plateau", "cosine"))
        require_choice(self, "precision", PRECISIONS)
        require_choice(self, "optimizer", OPTIMIZERS)
        require_fitting(self)
        require_in_range(self, "compression_rank", 0, math.inf, whole=True)
        require_choice(self, "stored_dtype", STORED_DTYPES)

    @property
    def compression(self) -> Compression | None:
        return Compression(self.compression_rank, self.p_divisor, self.q_divisor) if self.compression_rank else None

    @property
    def warm_up_updates(self) -> int:
        return round(self.updates * self.warm_up_fraction)


class DALLEStage(Stage):
    """Stage 2 as the loop drives it: batches of (caption, cached image tokens), the weighted cross-entropy, sample
    grids.

    ``images`` and ``held_out`` are encoded once by the dVAE of the model folder ``dvae_folder``; the tokens are cached
    in ``cache``. The tokenizer is trained on the captions unless one is given.
    """

    def __init__(
        self,
        config: DALLEConfig,
        training: DALLETraining,
        images: ImageTextDataset,
        dvae_folder: str | Path,
        cache: str | Path,
        held_out: ImageTextDataset | None = None,
        tokenizer: Tokenizer | None = None,
        team: Alone = ALONE,
    ):
        if len(images) == 0:
            raise UserError("no image to train on: the data set is empty")
        team.require_fitting(training.batch_size, training.compression_rank)
        if team.from_leader(lambda: images.fingerprint) != images.fingerprint:
            raise UserError(
                "expected the same data in all processes, got other files or captions than the first process has"
            )
        self.team = team
        self.config = config
        self.training = training
        self.updates = training.updates
        self.clip_norm = training.clip_norm
        self.tokens_per_update = training.batch_size * (config.text_len + config.image_len)
        self.flops_per_update = training.batch_size * model_flops(config)
        self.device = team.device
        self.dvae_folder = Path(dvae_folder)
        self.dvae = load_dvae(dvae_folder).to(self.device)
        self.dvae_sha256 = dvae_sha256(dvae_folder)
        self.tokenizer = tokenizer or team.from_leader(lambda: Tokenizer.train(images.captions, config.text_vocab_size))
        self.tokenizer_json = self.tokenizer.to_json().encode()
        self._check_fit()
        self.captions = list(images.captions)
        self.fingerprint = images.fingerprint
        self.tokens = self._encode(images, training.crops, cache)
        self.held_out_captions, self.held_out_tokens = self._held_out(held_out, cache)
        self.order = EpochOrder(len(images), training.seed)
        torch.manual_seed(derived_seed(training.seed, "dalle"))
        model = team.build(lambda: DALLE(config))
        dtype = PRECISIONS[training.precision]
        if dtype is not None:
            # Each process takes the mean over its own share of the batch, as one replica of one would.
            self.scales = GradScales(2 * config.layers, device=team.device)
            model.set_precision(dtype, self.scales.scales)
        scales = None if self.scales is None else self.scales.scales
        self.place(model, training.compression, scales)
        self.optimizer = make_optimizer(self.model, self.shards, training, team.gpu)
        self.average = IterateAverage(self.shards, training.average_decay, training.average_every)
        if isinstance(self.average.model, DALLE):
            self.average.model.set_precision(torch.float32)
        self.plateau = PlateauHalving(window=max(1, round(training.updates * training.plateau_fraction)))

    def _check_fit(self) -> None:
        made, expected = self.dvae.config, self.config
        if made.grid != expected.grid or made.vocab_size != expected.image_vocab_size:
            raise UserError(
                f"wrong dVAE for this transformer: expected a grid of {expected.grid} and "
                f"{expected.image_vocab_size} codes, the dVAE of {self.dvae_folder} makes {made.grid} "
                f"and {made.vocab_size}"
            )
        if self.tokenizer.vocab_size != expected.text_vocab_size:
            raise UserError(
                f"wrong tokenizer for this transformer: expected a vocabulary of {expected.text_vocab_size} text "
                f"tokens, got one of {self.tokenizer.vocab_size}"
            )

    def _held_out(self, held_out: ImageTextDataset | None, cache: str | Path) -> tuple[list[str], torch.Tensor]:
        if held_out is None or len(held_out) == 0:
            return [], self.tokens[:0, 0]
        return list(held_out.captions), self._encode(held_out, 1, cache)[:, 0]

    def _encode(self, images: ImageTextDataset, crops: int, cache: str | Path) -> torch.Tensor:
        return self.team.leader_first(
            lambda: encode_dataset(self.dvae, self.dvae_sha256, images, crops, self.training.seed, cache, self.device)
        )

    def learning_rate(self, update: int) -> float:
        settings = self.training
        rate = warm_up(settings.learning_rate, settings.warm_up_updates, update)
        if settings.schedule == "plateau":
            return rate * self.plateau.factor
        since = max(0, update - settings.warm_up_updates)
        length = settings.updates - settings.warm_up_updates
        return min(rate, cosine(settings.learning_rate, settings.final_learning_rate, length, since))

    def observe(self, loss: float) -> None:
        if self.training.schedule == "plateau":
            self.plateau.observe(loss)

    def awaits_losses(self, updates: int) -> bool:
        return self.training.schedule == "plateau" and updates % self.plateau.window == 0

    def _encode_captions(self, captions: Sequence[str], dropout: float, *key: int | str) -> torch.Tensor:
        draw = random.Random(derived_seed(self.training.seed, "captions", *key))
        text = self.tokenizer.encode_batch(captions, self.config.text_len, dropout, truncate=True, generator=draw)
        return to_device(text, self.device)

    def loss(self, update: int) -> tuple[torch.Tensor, Figures]:
        settings = self.training
        samples = self.order.batch(update, settings.batch_size)
        # Dropout draws for the batch as a whole, so that it does not depend on how many processes share it.
        text = self._encode_captions([self.captions[i] for _, i in samples], settings.bpe_dropout, update)
        text, samples = self.team.share(text), self.team.share(samples)
        rows = torch.tensor([i for _, i in samples])
        crops = torch.tensor([epoch % settings.crops for epoch, _ in samples])
        output = self.model(text, to_device(self.tokens[rows, crops].long(), self.device))
        return output.loss, {"text_loss": output.text_loss.detach(), "image_loss": output.image_loss.detach()}

    def prepare_step(self) -> tuple[torch.Tensor, Figures]:
        if self.scales is None:
            return super().prepare_step()
        return prepare_scaled_step(self.optimizer, self.scales, self.clip_norm, self.team)

    def identity(self) -> dict[str, Any]:
        return {
            "stage": "dalle",
            "config": self.config.to_dict(),
            "training": asdict(self.training),
            "data": self.fingerprint,
            "dvae_sha256": self.dvae_sha256,
            "tokenizer_sha256": sha256(self.tokenizer_json),
        }

    def extra_files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.tokenizer_json}

    def state(self) -> dict[str, Any]:
        scales = {} if self.scales is None else scales_to_json(self.scales)
        return {"plateau": self.plateau.state_dict(), "scales": scales}

    def load_state(self, state: dict[str, Any]) -> None:
        self.plateau.load_state_dict(state["plateau"])
        if self.scales is not None:
            scales_from_json(self.scales, state["scales"])

    @torch.no_grad()
    def draw_pictures(self, update: int, folder: Path) -> dict[str, float]:
        model = self._averaged()
        if model is None:
            return {}
        model = copy.deepcopy(model).to(self.device)
        half = PICTURED_CAPTIONS // 2
        seen = self.captions[:: max(1, len(self.captions) // half)][:half]
        held_out = self.held_out_captions[:: max(1, len(self.held_out_captions) // half)][:half]
        prompts = [*seen, *held_out]
        drawn = generate(model, self.dvae, self.tokenizer, prompts, SAMPLES_PER_CAPTION, truncate=True)
        marks = [None] * len(seen) + ["held out"] * len(held_out)
        atomic_write(folder / f"samples-{update:08d}.png", png(labelled_grid(drawn.images, prompts, marks=marks)))
        if not self.held_out_captions:
            return {}
        text = self._encode_captions(self.held_out_captions[:256], 0.0, "held out")
        output = model(text, self.held_out_tokens[:256].long().to(self.device))
        return {"held_out_text_loss": float(output.text_loss), "held_out_image_loss": float(output.image_loss)}

    def _averaged(self) -> DALLE | None:
        """The averaged model, whole, in the leader."""
        return self.team.whole(self.model, self.average.model, lambda: DALLE(self.config))

    def model_files(self, updates: int, seconds: float) -> dict[str, bytes]:
        model = self._averaged()
        if model is None:
            return {}
        if dvae_sha256(self.dvae_folder) != self.dvae_sha256:
            raise UserError(
                f"the dVAE in {self.dvae_folder} is no longer the one that this run began with, whose SHA-256 is "
                f"{self.dvae_sha256}; put that back and use --resume: the last checkpoint is safe"
            )
        note = {"training": asdict(self.training), "data": self.fingerprint, "seconds": round(seconds)}
        dtype = STORED_DTYPES[self.training.stored_dtype]
        return dalle_files(model, self.tokenizer, self.dvae_folder, dtype, note)
