"""Gumbel-softmax sampling of the dVAE's codes, with the KL to the uniform prior and the product with the codebook."""

from dalle_kernels.gumbel_softmax.ops import gumbel_codebook, gumbel_softmax, gumbel_softmax_kl

__all__ = ["gumbel_codebook", "gumbel_softmax", "gumbel_softmax_kl"]
