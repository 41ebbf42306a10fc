"""Kernels of DALL-E's two-stage system as PyTorch ops (arXiv 2102.12092): compiled where possible, plain torch anywhere."""

from __future__ import annotations

from dalle_kernels._version import __version__

__all__ = ["__version__"]
