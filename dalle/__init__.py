"""Text to image in two stages, after DALL·E (Ramesh et al. 2021): a thin layer over :mod:`dalle_kernels`.

Stage 1 is :class:`DVAE`, stage 2 is :class:`DALLE`; ``python -m dalle`` (or the ``dalle`` command) trains and samples
them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import dalle` and `dalle --help` must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'dalle' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
