"""Stage 2: the autoregressive sparse transformer over one stream of text and image tokens (paper 2.2, B.1, B.2).

The stream is a start token, ``text_len`` text tokens and the image tokens in raster order; position i predicts the next
token, so every text token (its padding too) and every image token is predicted. Each layer is an attention resblock
and an MLP resblock of width 4 x dim.

The paper does not publish everything. Chosen here, as in the GPT-2 and GPT-3 that it builds on: LayerNorm before each
resblock's matrices and one after the last resblock, GELU, biases everywhere but in the unembeddings, weights drawn
with a standard deviation of 0.02, divided by sqrt(2 x layers) in the matrix that ends a resblock, no dropout. Padding
tokens are predicted like other text tokens: the text unembedding has ``text_vocab_size + text_len`` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from dalle.config import DALLEConfig
from dalle.errors import UserError
from dalle_kernels import (
    AttentionPattern,
    KVCache,
    LayerWeights,
    Linear,
    decode_attention,
    decode_layers,
    linear,
    linear_cross_entropy,
    mlp,
    scaled_resblock,
    sparse_attention,
)

TEXT_WEIGHT = 1 / 8
IMAGE_WEIGHT = 7 / 8
INIT_STD = 0.02
NORM_EPSILON = 1e-5


class DALLELoss(NamedTuple):
    """Cross-entropies in nats a token, fp32 scalars: ``loss = text_loss / 8 + 7 / 8 * image_loss`` (paper 2.2)."""

    loss: torch.Tensor
    text_loss: torch.Tensor
    image_loss: torch.Tensor


def mask_schedule(layers: int) -> list[str]:
    """The kind of attention mask of each layer (paper B.1, Fig. 11).

    Counting layers from 1, layer i is "column" where (i - 2) mod 4 = 0 and else "row"; the last is "conv". So 64 layers
    are row, column, row, row, row, column, ..., conv.
    """
    return ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers)] + ["conv"]


class AttentionBlock(nn.Module):
    """The branch of an attention resblock: LayerNorm, sparse self-attention, projection."""

    def __init__(self, config: DALLEConfig, pattern: AttentionPattern):
        super().__init__()
        self.pattern = pattern
        self.heads, self.head_dim = config.heads, config.head_dim
        self.norm = nn.LayerNorm(config.dim, NORM_EPSILON)
        self.query_key_value = Linear(config.dim, 3 * config.heads * config.head_dim)
        self.projection = Linear(config.heads * config.head_dim, config.dim)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """``[B, N, dim]`` to ``[B, N, dim]``; N may be any prefix of the pattern's stream.

        With a cache: an empty one keeps the keys and values of x, the first tokens of the stream; after that x is one
        more token of each row, ``[B * samples_per_prompt, 1, dim]``.
        """
        q, k, v = self._query_key_value(x)
        if cache is not None and cache.length:
            return self._project(decode_attention(*(tensor.to(cache.dtype) for tensor in (q, k, v)), cache))
        if cache is not None:
            cache.prefill(k.to(cache.dtype), v.to(cache.dtype))
        return self._project(sparse_attention(q, k, v, self.pattern))

    def new_cache(self, x: torch.Tensor, samples_per_prompt: int, dtype: torch.dtype) -> KVCache:
        """An empty cache in ``dtype`` for prompts ``[B, N, dim]``, on their device."""
        return KVCache(self.pattern, len(x), self.heads, self.head_dim, dtype, x.device, samples_per_prompt)

    def _query_key_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, length, _ = x.shape
        joint = self.query_key_value(_normalized(self.norm, x)).view(batch, length, 3, self.heads, self.head_dim)
        # Apart first and turned afterwards: in the backward one copy then joins their gradients for the product.
        q, k, v = joint.unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _project(self, out: torch.Tensor) -> torch.Tensor:
        return self.projection(out.transpose(1, 2).flatten(2))


class MLPBlock(nn.Module):
    """The branch of an MLP resblock: LayerNorm, dim to 4 x dim, GELU, back to dim."""

    def __init__(self, config: DALLEConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, NORM_EPSILON)
        self.expansion = Linear(config.dim, 4 * config.dim)
        self.projection = Linear(4 * config.dim, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, dim]`` to ``[B, N, dim]``."""
        x, expansion, projection = _normalized(self.norm, x), self.expansion, self.projection
        # By their weights where nobody is to see the two layers called; a compiler fuses the modules by itself.
        if not torch.compiler.is_compiling() and all(
            _is_plain(linear, Linear) and linear.bias is not None and linear.bias.dtype == linear.weight.dtype
            for linear in (expansion, projection)
        ):
            return mlp(x, expansion.weight, expansion.bias, projection.weight, projection.bias)
        return projection(F.gelu(expansion(x)))


class Scaling(NamedTuple):
    """Of a layer's two resblocks: the dtype that they run in, and the loss scale of each (paper 2.4)."""

    dtype: torch.dtype
    attention: torch.Tensor
    mlp: torch.Tensor


class Layer(nn.Module):
    """One layer: the attention resblock ``x + attention(x)``, then the MLP resblock ``x + mlp(x)``.

    With a ``scaling`` each is a ``scaled_resblock``: x stays in float32, the branches run in 16 bits.
    """

    def __init__(self, config: DALLEConfig, pattern: AttentionPattern):
        super().__init__()
        self.attention = AttentionBlock(config, pattern)
        self.mlp = MLPBlock(config)
        self.checkpoint_activations = config.checkpoint_activations
        self.scaling: Scaling | None = None

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """As :class:`AttentionBlock`, ``[B, N, dim]`` to ``[B, N, dim]``."""
        # By its name, so that hooks see x as the only argument, as they do where there is no cache.
        attention = self._branch(self.attention) if cache is None else partial(self.attention, cache=cache)
        if self.scaling is None:
            x = x + attention(x)
            return x + self._branch(self.mlp)(x)
        x = scaled_resblock(attention, x, self.scaling.attention, self.scaling.dtype)
        return scaled_resblock(self._branch(self.mlp), x, self.scaling.mlp, self.scaling.dtype)

    def weights(self) -> LayerWeights | None:
        """For ``decode_layers``, which does what :meth:`forward` does to one more token, from a cache.

        None where that is not so: where the layer has a scaling, or one of its modules has been replaced, or has hooks,
        a forward of its own, no bias or another epsilon.
        """
        attention, mlp = self.attention, self.mlp
        if self.scaling is not None or not (
            _is_plain(self, Layer) and _is_plain(attention, AttentionBlock) and _is_plain(mlp, MLPBlock)
        ):
            return None
        norms = (attention.norm, mlp.norm)
        if not all(_is_plain(norm, nn.LayerNorm) and norm.eps == NORM_EPSILON for norm in norms):
            return None
        linears = (attention.query_key_value, attention.projection, mlp.expansion, mlp.projection)
        if not all(_is_plain(module, Linear) for module in linears):
            return None
        branches = (norms[0], *linears[:2], norms[1], *linears[2:])
        tensors = [tensor for module in branches for tensor in (module.weight, module.bias)]
        return None if any(tensor is None for tensor in tensors) else LayerWeights(*tensors)

    def _branch(self, block: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return partial(checkpoint, block, use_reentrant=False)
        return block


def _normalized(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``norm(x)`` in x's dtype, though its gain and bias, and so its arithmetic, may be float32 beside a 16-bit x."""
    gain = getattr(norm, "weight", None)
    return norm(x) if gain is None or gain.dtype == x.dtype else norm(x.to(gain.dtype)).to(x.dtype)


def _is_plain(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    changed = any(hooks) or "forward" in vars(module)
    return type(module) is expected and not changed and not _has_any_global_hook()


@dataclass
class Decoding:
    """What :meth:`DALLE.prefill` starts and :meth:`DALLE.decode_step` goes on with.

    ``layers`` holds the weights of each layer, all of which one call then serves; or it is None, where some layer is
    not what :class:`Layer` makes it, hooks included: then every step calls the layers' modules. ``caches`` are the
    layers', ``position`` counts the image tokens that they hold. Weights, modules and hooks are looked up once, by
    ``prefill``.
    """

    layers: list[LayerWeights] | None
    caches: list[KVCache]
    image_positions: torch.Tensor
    position: int = 0


class DALLE(nn.Module):
    """The transformer of stage 2.

    ``forward(text, image_tokens)`` gives the training loss, ``logits`` the predictions, ``prefill`` and
    ``decode_step`` draw image tokens one at a time with a key-value cache. ``text`` is int64 ``[B, text_len]`` as
    :class:`dalle.Tokenizer` pads it: position i without text holds ``text_vocab_size + i``. ``image_tokens`` is int64
    ``[B, H*W]`` in raster order.

    It is written to run under ``torch.autocast``: the residual stream, the embeddings and the logits stay in the
    parameters' dtype (fp32), the resblocks' matrices, the attention and the operands of the loss take autocast's.
    :meth:`set_precision` is the paper's way to 16 bits instead.
    """

    def __init__(self, config: DALLEConfig):
        super().__init__()
        self.config = config
        height, width = config.grid
        self.start = nn.Parameter(torch.empty(config.dim))
        self.text_embedding = nn.Embedding(config.text_vocab_size + config.text_len, config.dim)
        self.text_position_embedding = nn.Embedding(config.text_len, config.dim)
        self.image_embedding = nn.Embedding(config.image_vocab_size, config.dim)
        self.row_embedding = nn.Embedding(height, config.dim)
        self.column_embedding = nn.Embedding(width, config.dim)
        self.layers = nn.ModuleList(
            Layer(config, AttentionPattern(kind, config.text_len + 1, config.grid, config.kernel_size))
            for kind in mask_schedule(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim, NORM_EPSILON)
        self.text_unembedding = Linear(config.dim, config.text_vocab_size + config.text_len, bias=False)
        self.image_unembedding = Linear(config.dim, config.image_vocab_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        if self.start.is_meta:  # nothing to fill there, and torch would import much to do so
            return
        residual_std = INIT_STD / (2 * self.config.layers) ** 0.5
        nn.init.normal_(self.start, std=INIT_STD)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=residual_std if name.endswith("projection") else INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def resblocks(self) -> list[AttentionBlock | MLPBlock]:
        """The branches of the resblocks, two a layer, in the order in which they run."""
        return [block for layer in self.layers for block in (layer.attention, layer.mlp)]

    def set_precision(self, dtype: torch.dtype, scales: torch.Tensor | None = None) -> None:
        """From now on train the resblocks in ``dtype``, each under a loss scale of its own (paper 2.4, App. D).

        Their matrices become ``dtype``, float16 or bfloat16; gains, biases, embeddings, unembeddings, the residual
        stream and the logits stay in float32, and all names stay. ``scales``, float32 ``[2 * layers]`` in the order of
        :meth:`resblocks`, is kept and may change in place between updates. What the resblocks' parameters get as
        gradients is multiplied by them. With float32 and no scales the model is again as it was made.
        """
        for block in self.resblocks():
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    parameter.data = parameter.data.to(dtype)
        pairs = [None] * len(self.layers) if scales is None else scales.view(-1, 2)
        for layer, pair in zip(self.layers, pairs, strict=True):
            layer.scaling = None if pair is None else Scaling(dtype, *pair)

    def forward(self, text: torch.Tensor, image_tokens: torch.Tensor) -> DALLELoss:
        """The training loss of a batch; raises :class:`UserError` for a wrong shape, dtype, device or token."""
        text_hidden, image_hidden = self._hidden(text, image_tokens)
        text_loss = self._cross_entropy(text_hidden, self.text_unembedding, text)
        image_loss = self._cross_entropy(image_hidden, self.image_unembedding, image_tokens)
        return DALLELoss(TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss, text_loss, image_loss)

    def logits(self, text: torch.Tensor, image_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits that predict each token from those before it.

        Returns text logits ``[B, text_len, text_vocab_size + text_len]`` and image logits ``[B, H*W,
        image_vocab_size]``.
        """
        text_hidden, image_hidden = self._hidden(text, image_tokens)
        text_logits = self._unembed(text_hidden, self.text_unembedding)
        image_logits = self._unembed(image_hidden, self.image_unembedding)
        return text_logits.unflatten(0, (len(text), -1)), image_logits.unflatten(0, (len(text), -1))

    def _hidden(self, text: torch.Tensor, image_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last hidden states that predict the text ``[B*text_len, dim]`` and the image ``[B*H*W, dim]``."""
        config = self.config
        self._check("text", text, config.text_len, config.text_vocab_size + config.text_len)
        self._check("image_tokens", image_tokens, config.image_len, config.image_vocab_size)
        if len(text) != len(image_tokens):
            raise UserError(f"expected as many texts as images, got {len(text)} texts and {len(image_tokens)} images")
        # The last image token predicts nothing, so it is no input.
        image = self.image_embedding(image_tokens[:, :-1]) + self._image_positions()[:-1]
        x = torch.cat((self._embed_text(text), image), dim=1)
        for layer in self.layers:
            x = layer(x)
        text_hidden, image_hidden = self.norm(x).split((config.text_len, config.image_len), dim=1)
        return text_hidden.flatten(0, 1), image_hidden.flatten(0, 1)

    def _embed_text(self, text: torch.Tensor) -> torch.Tensor:
        """The start token and the text: ``[B, text_len + 1, dim]``."""
        embedded = self.text_embedding(text) + self.text_position_embedding.weight
        return torch.cat((self.start.expand(len(text), 1, -1), embedded), dim=1)

    def _image_positions(self) -> torch.Tensor:
        """Row plus column embedding of every image token: ``[H*W, dim]``."""
        return (self.row_embedding.weight[:, None] + self.column_embedding.weight).flatten(0, 1)

    def _cross_entropy(self, hidden: torch.Tensor, unembedding: nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
        """By products of autocast's dtype, as everywhere under autocast, whose results, the logits, are fp32."""
        weight, device = unembedding.weight, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return linear_cross_entropy(hidden, weight, tokens.flatten())

    def _unembed(self, hidden: torch.Tensor, unembedding: nn.Linear) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            weight = unembedding.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)  # the paper keeps the logits in 32 bit
            return linear(hidden.to(weight.dtype), weight, dtype=dtype)

    def _check(self, name: str, tokens: torch.Tensor, length: int, vocab_size: int) -> None:
        if tokens.dim() != 2 or tokens.shape[1] != length:
            raise UserError(f"expected {name} of shape [batch, {length}], got {list(tokens.shape)}")
        _check_tokens(name, tokens, vocab_size, self.start.device)

    def prefill(
        self, text: torch.Tensor, samples_per_prompt: int = 1, prime: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Decoding]:
        """Read the prompts once and start to draw ``samples_per_prompt`` images for each.

        ``prime``, int64 ``[B, n]`` with n < H*W, gives the first n image tokens of every sample. Returns the logits
        of the next image token, fp32 ``[B * samples_per_prompt, image_vocab_size]`` with a prompt's samples next to
        each other, and the state for :meth:`decode_step`. The samples of a prompt share its keys and values.
        """
        config = self.config
        self._check("text", text, config.text_len, config.text_vocab_size + config.text_len)
        x = self._embed_text(text)
        image_positions = self._image_positions()
        length = 0
        if prime is not None:
            length = prime.shape[-1]
            if prime.dim() != 2 or len(prime) != len(text) or length >= config.image_len:
                raise UserError(
                    f"expected prime of shape [{len(text)}, n] with n < {config.image_len}, got {list(prime.shape)}"
                )
            _check_tokens("prime", prime, config.image_vocab_size, self.start.device)
            x = torch.cat((x, self.image_embedding(prime) + image_positions[:length]), dim=1)
        dtypes = [layer.scaling.dtype if layer.scaling else x.dtype for layer in self.layers]
        caches = [layer.attention.new_cache(x, samples_per_prompt, dtype) for layer, dtype in zip(self.layers, dtypes)]
        for layer, cache in zip(self.layers, caches):
            x = layer(x, cache=cache)
        logits = self._unembed(self.norm(x[:, -1]), self.image_unembedding)
        weights = [layer.weights() for layer in self.layers]
        decoding = Decoding(None if None in weights else weights, caches, image_positions, length)
        return logits.repeat_interleave(samples_per_prompt, dim=0), decoding

    @torch.no_grad()
    def decode_step(self, tokens: torch.Tensor, decoding: Decoding) -> torch.Tensor:
        """Give the next image token of every row, int64 ``[rows]``, and get the logits of the one after it.

        The logits are fp32 ``[rows, image_vocab_size]``. ``decoding`` moves on by one token. Nothing here records a
        gradient, and the layers take the parameters' dtype also under autocast.
        """
        if decoding.position >= self.config.image_len - 1:
            raise UserError(f"expected at most {self.config.image_len - 1} decode steps: the image is complete")
        x = self.image_embedding(tokens) + decoding.image_positions[decoding.position]
        if decoding.layers is not None:
            x = decode_layers(x, decoding.layers, decoding.caches, epsilon=NORM_EPSILON)
        else:
            x = self._decode_by_modules(x, decoding.caches)
        decoding.position += 1
        return self._unembed(self.norm(x), self.image_unembedding)

    @torch.no_grad()
    def decode_step_at(self, tokens: torch.Tensor, position: torch.Tensor, decoding: Decoding) -> torch.Tensor:
        """:meth:`decode_step` at the place that ``position``, int64 ``[1]`` on the device, holds when this runs.

        It counts image tokens; the caller counts it on, and ``decoding``, whose ``layers`` must be there, stays as it
        is. So one CUDA graph serves every step.
        """
        x = self.image_embedding(tokens) + decoding.image_positions[position]
        place = position + (self.config.text_len + 1)
        x = decode_layers(x, decoding.layers, decoding.caches, epsilon=NORM_EPSILON, position=place)
        return self._unembed(self.norm(x), self.image_unembedding)

    def _decode_by_modules(self, x: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
        """As ``decode_layers``, by the layers' own modules."""
        x = x[:, None]
        with torch.autocast(x.device.type, enabled=False):
            for layer, cache in zip(self.layers, caches):
                x = layer(x, cache=cache)
        return x[:, 0]


def _check_tokens(name: str, tokens: torch.Tensor, vocab_size: int, device: torch.device) -> None:
    if tokens.dtype != torch.int64:
        raise UserError(f"expected {name} of dtype torch.int64, got {tokens.dtype}")
    if tokens.device != device:
        raise UserError(f"expected {name} on the model's device {device}, got {tokens.device}")
    # On a GPU reading the values back would make the host wait; there the embedding's own assertion stops the kernel.
    if device.type != "cpu" or torch.compiler.is_compiling() or tokens.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in tokens.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise UserError(f"expected {name} in 0..{vocab_size - 1}, got values from {lowest} to {highest}")
