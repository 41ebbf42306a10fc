"""Encode a data set's images once and keep the tokens on disk (paper 2.2: argmax of the encoder, no noise)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tqdm import tqdm

from dalle.checkpoint import read_tensors, to_safetensors
from dalle.data import ImageTextDataset
from dalle.dvae import DVAE
from dalle.errors import UserError
from dalle.files import atomic_write, sha256
from dalle.train.batches import ImageBatches


@torch.no_grad()
def encode_dataset(
    dvae: DVAE,
    dvae_sha256: str,
    images: ImageTextDataset,
    crops: int,
    seed: int,
    cache: str | Path,
    device: str = "cpu",
    batch_size: int = 64,
) -> torch.Tensor:
    """Image tokens of every sample, int32 [len(images), crops, H * W], in raster order.

    ``dvae_sha256`` is the identity of ``dvae`` (``dalle.checkpoint.dvae_sha256``). Crop c of an image is its
    augmentation (paper Listing 2) of epoch c. The tokens are read from ``cache`` when it holds those of the same dVAE,
    data, crops and seed, else encoded and written there.
    """
    key = sha256("/".join(map(str, (dvae_sha256, images.fingerprint, crops, seed))).encode())
    path = Path(cache) / f"tokens-{key[:16]}.safetensors"
    try:
        tokens = read_tensors(path, "cached image tokens").get("tokens") if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)  # found out now, not after the encoding
    except UserError:
        tokens = None  # Damaged: they can be made again.
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent} for image tokens: {error.strerror}") from None
    if tokens is not None and tokens.shape == (len(images), crops, math.prod(dvae.config.grid)):
        return tokens
    batches = ImageBatches(images, dvae.config.image_size, "dalle", seed)
    pairs = [(crop, sample) for sample in range(len(images)) for crop in range(crops)]
    encoded = []
    for start in tqdm(range(0, len(pairs), batch_size), desc="encoding images", unit="batch", dynamic_ncols=True):
        pixels = batches.load(pairs[start : start + batch_size]).to(device)
        encoded.append(dvae.encode(pixels).flatten(1).to("cpu", torch.int32))
    tokens = torch.cat(encoded).view(len(images), crops, -1)
    atomic_write(path, to_safetensors({"tokens": tokens}))
    return tokens
