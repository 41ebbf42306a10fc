"""Text to image in two stages, after DALL·E (Ramesh et al. 2021): a thin layer over :mod:`dalle_kernels`.

Stage 1 is :class:`DVAE`, stage 2 is :class:`DALLE`; ``python -m dalle`` (or the ``dalle`` command) trains and samples
them.
"""

from __future__ import annotations

from dalle.lazy import lazy_attributes

_HOMES = {
    "DALLE": "dalle.transformer",
    "DALLEConfig": "dalle.config",
    "DVAE": "dalle.dvae",
    "DVAEConfig": "dalle.config",
    "Tokenizer": "dalle.tokenizer",
    "UserError": "dalle.errors",
    "generate": "dalle.generation",
}

__all__ = sorted(_HOMES)

# `import dalle` and `dalle --help` must not wait for torch.
__getattr__ = lazy_attributes(__name__, {**_HOMES, "__version__": "dalle_kernels"})
