"""DALLE-pytorch (lucidrains), imported without what its models do not use, and its attention layers' cores."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache

import torch
from torch import nn

NOT_INSTALLED = "DALLE-pytorch is not installed: `make bench` installs bench/rivals.txt"


class NotInstalled(ImportError):
    """DALLE-pytorch or something that it imports is missing."""


@cache
def load(module: str = "dalle_pytorch") -> types.ModuleType:
    """``dalle_pytorch.<module>``.

    The package's own ``__init__`` and ``vae`` import torchvision, taming-transformers and a Lightning module that was
    removed, all for pretrained dVAEs that no benchmark uses. So the package is entered without its ``__init__``, and
    empty classes stand for the two pretrained dVAEs.
    """
    specification = importlib.util.find_spec("dalle_pytorch")
    if specification is None:
        raise NotInstalled(NOT_INSTALLED)
    if "dalle_pytorch" not in sys.modules:
        package = types.ModuleType("dalle_pytorch")
        package.__path__ = list(specification.submodule_search_locations)
        vae = types.ModuleType("dalle_pytorch.vae")
        vae.OpenAIDiscreteVAE, vae.VQGanVAE = type("OpenAIDiscreteVAE", (), {}), type("VQGanVAE", (), {})
        sys.modules |= {"dalle_pytorch": package, "dalle_pytorch.vae": vae}
    try:
        return importlib.import_module(f"dalle_pytorch.{module}")
    except ImportError as error:
        raise NotInstalled(f"DALLE-pytorch cannot be imported: {error}") from error


def attention_core(kind: str, heads: int, head_dim: int, text_len: int, side: int) -> nn.Module:
    """Its layer for ``axial_row``, ``column`` or ``conv_corner`` (kernel size 11) between the two projections.

    It takes q, k and v joined as ``[batch, text_len + side**2 - 1, 3 * heads * head_dim]``, on the stream of
    ``text_len`` text tokens, the start token among them, and all image tokens but the last.
    """
    attention = load("attention")
    sizes = {"dim": 1, "seq_len": text_len - 1 + side * side, "image_size": side, "heads": heads, "dim_head": head_dim}
    if kind == "conv_corner":
        layer = attention.SparseConvCausalAttention(kernel_size=11, **sizes)
    else:
        layer = attention.SparseAxialCausalAttention(axis=0 if kind == "axial_row" else 1, **sizes)
    layer.to_qkv = layer.to_out = nn.Identity()
    return layer


def join(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q, k, v ``[batch, heads, seq, head_dim]`` as the one tensor that :func:`attention_core` takes."""
    return torch.cat([x.detach().transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
