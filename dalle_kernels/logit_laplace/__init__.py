"""The logit-Laplace loss of the dVAE's decoder and the map of pixels into its open interval."""

from dalle_kernels.logit_laplace.ops import logit_laplace_loss, map_pixels, unmap_pixels

__all__ = ["logit_laplace_loss", "map_pixels", "unmap_pixels"]
