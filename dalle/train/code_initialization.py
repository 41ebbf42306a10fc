"""Start a dVAE's codes at its encoder's features of training images: a departure from the paper for short runs.

From the paper's random start a run of a few thousand updates settles on a few dozen codes. Here code k starts as the
feature vector c_k of some patch of a training image, chosen by the rule of k-means++ so that the codes spread over the
features. The logits of features f become ``-s |f - c_k|² / 2`` up to a term that is the same for all k, which a 1x1
convolution computes exactly, and the codebook a random projection of the c_k, so that similar patches have similar
codes.
"""

from __future__ import annotations

import torch

from dalle.dvae import DVAE
from dalle.errors import UserError


@torch.no_grad()
def spread_codes(dvae: DVAE, images: torch.Tensor, sharpness: float, generator: torch.Generator) -> None:
    """Set the encoder's output layer and the decoder's input layer from ``images`` [B, 3, S, S].

    ``sharpness`` is s times the mean squared distance of a feature to its nearest code: larger means more certain
    tokens at the start. The images must hold at least as many patches as there are codes.
    """
    features = _features(dvae, images)
    if len(features) < dvae.config.vocab_size:
        raise UserError(
            f"expected at least {dvae.config.vocab_size} patches to start the codes from, got {len(features)}; "
            "give more images, or set code_sharpness = 0"
        )
    mean = features.mean(dim=0)
    centred = features - mean
    codes, distance = _spread(centred, dvae.config.vocab_size, generator)
    scale = sharpness / distance.clamp_min(1e-12)
    output, codebook = dvae.encoder.blocks["output"].conv, dvae.decoder.blocks["input"]
    output.w.copy_((scale * codes)[:, :, None, None])
    output.b.copy_(-scale * (codes.square().sum(dim=1) / 2 + codes @ mean))
    projection = torch.randn(codes.shape[1], codebook.w.shape[0], generator=generator, dtype=codes.dtype)
    embedding = codes @ projection.to(codes.device)
    codebook.w.copy_((embedding / embedding.std()).t()[:, :, None, None])


def _features(dvae: DVAE, images: torch.Tensor) -> torch.Tensor:
    """What the encoder's output layer sees, one row a patch: [B * H * W, width]."""
    found = []

    def keep(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found.append(inputs[0].permute(0, 2, 3, 1).flatten(0, 2))

    hook = dvae.encoder.blocks["output"].conv.register_forward_pre_hook(keep)
    try:
        for batch in images.split(32):
            dvae.encode_logits(batch)
    finally:
        hook.remove()
    return torch.cat(found)


def _spread(points: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` of the ``points``, each drawn with a probability that grows with the squared distance to those before,
    and the mean squared distance of a point to the nearest of them."""
    nearest = torch.full((len(points),), torch.inf, device=points.device)
    weights = torch.ones(len(points))
    chosen = []
    for _ in range(count):
        index = int(torch.multinomial(weights, 1, generator=generator))
        chosen.append(index)
        nearest = torch.minimum(nearest, (points - points[index]).square().sum(dim=1))
        weights = nearest.cpu().clamp_min(1e-12)
    return points[chosen], nearest.mean()
