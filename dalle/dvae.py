"""The discrete VAE of stage 1 (paper 2.1, A.1 to A.3): an image becomes a grid of tokens, and a grid an image.

The parameters carry the names and shapes of the public ``dall_e`` release: ``blocks.input.{w,b}``,
``blocks.group_G.block_I.{id_path,res_path.conv_J}.{w,b}`` and ``blocks.output.conv.{w,b}``, in ``encoder`` and in
``decoder``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.config import DVAEConfig
from dalle.errors import UserError
from dalle_kernels import gumbel_codebook, logit_laplace_loss, map_pixels, unmap_pixels

CHANNELS = 3
_ENCODER_KERNELS = (3, 3, 3, 1)
_DECODER_KERNELS = (1, 3, 3, 3)
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class Convolution(nn.Module):
    """A convolution of stride 1 that keeps the image's size (zero padding); ``w`` [n_out, n_in, k, k], ``b`` [n_out].

    ``w`` starts normal with standard deviation 1/sqrt(n_in k²), ``b`` at zero. With ``full_precision`` it computes in
    float32 at least, under autocast and with 16-bit parameters too: the paper's rule for the layers at the relaxation.
    """

    def __init__(self, n_in: int, n_out: int, kernel_size: int, full_precision: bool = False):
        super().__init__()
        self.full_precision = full_precision
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.zeros(n_out))
        if not self.w.is_meta:  # nothing to fill there, and torch would import much to do so
            nn.init.normal_(self.w, std=(n_in * kernel_size**2) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        padding = self.w.shape[-1] // 2
        if not self.full_precision:
            return F.conv2d(x, self.w, self.b, padding=padding)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(at_least_float32(x), at_least_float32(self.w), at_least_float32(self.b), padding=padding)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 where it is a 16-bit tensor, else ``x`` itself."""
    return x.float() if x.dtype in _LOW_PRECISION else x


class ResidualBlock(nn.Module):
    """``id_path(x) + post_gain * res_path(x)``: four convolutions, each after a ReLU, a quarter of the width inside.

    ``post_gain = 1 / n_layers²`` with ``n_layers`` the number of blocks in the whole network. ``id_path`` is a 1x1
    convolution where the widths differ. With ``upsample`` the block computes what it would of the nearest-neighbour x2
    enlargement of ``x``; its first convolutions are 1x1 then, and commute with the enlargement, so they run before it,
    on a quarter of the positions, and what is enlarged is narrower.
    """

    def __init__(self, n_in: int, n_out: int, kernel_sizes: tuple[int, ...], n_layers: int, upsample: bool = False):
        super().__init__()
        if upsample and (kernel_sizes[0] != 1 or n_in == n_out):
            raise ValueError(
                "upsample needs a first kernel size of 1 and differing widths: only 1x1 layers commute with it"
            )
        self.post_gain = 1 / n_layers**2
        self.upsample = upsample
        self.id_path = Convolution(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, *[n_out // 4] * 3, n_out)
        self.res_path = nn.ModuleDict(
            {
                f"conv_{j}": Convolution(widths[j - 1], widths[j], kernel_size)
                for j, kernel_size in enumerate(kernel_sizes, start=1)
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = self.id_path(x)
        first, *others = self.res_path.values()
        residual = first(F.relu(x))
        if self.upsample:
            identity, residual = upsample_twice(identity), upsample_twice(residual)
        for convolution in others:
            # In place: a convolution's gradient needs its input, never its output.
            residual = convolution(F.relu_(residual))
        return torch.add(identity, residual, alpha=self.post_gain)


def upsample_twice(x: Tensor) -> Tensor:
    """Nearest-neighbour enlargement by 2 of ``x`` [B, C, H, W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class _Output(nn.Module):
    def __init__(self, n_in: int, n_out: int, full_precision: bool = False):
        super().__init__()
        self.conv = Convolution(n_in, n_out, 1, full_precision=full_precision)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x))


class Encoder(nn.Module):
    """Images to logits over the codebook; ``group_count - 1`` times 2x2 max-pooling in between.

    Input [B, 3, H, W], pixels after ``dalle_kernels.map_pixels``; output [B, vocab_size, H / factor,
    W / factor], float32 at least.
    """

    def __init__(self, config: DVAEConfig):
        super().__init__()
        n_layers = config.group_count * config.n_blk_per_group
        self.blocks = nn.ModuleDict({"input": Convolution(CHANNELS, config.n_hid, 7)})
        width = config.n_hid
        for group in range(config.group_count):
            n_out = config.n_hid * 2**group
            widths = (width, *[n_out] * config.n_blk_per_group)
            self.blocks[f"group_{group + 1}"] = nn.ModuleDict(
                {
                    f"block_{i}": ResidualBlock(widths[i - 1], widths[i], _ENCODER_KERNELS, n_layers)
                    for i in range(1, config.n_blk_per_group + 1)
                }
            )
            width = n_out
        self.blocks["output"] = _Output(width, config.vocab_size, full_precision=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks["input"](x)
        for name, group in self.blocks.items():
            if not name.startswith("group_"):
                continue
            if name != "group_1":
                x = F.max_pool2d(x, kernel_size=2)
            for block in group.values():
                x = block(x)
        return self.blocks["output"](x)


class Decoder(nn.Module):
    """Embedded codes to the parameters of the pixels' distribution; ``group_count - 1`` times enlarged by 2 in between.

    Input [B, n_init, H, W], the output of the release's first layer, ``blocks.input``: that layer is a 1x1 convolution
    of one-hot (or relaxed) codes, so its columns are the codebook, and :class:`DVAE` looks codes up instead.
    Output [B, 6, H * factor, W * factor]: three channels of mu, three of ln b.
    """

    def __init__(self, config: DVAEConfig):
        super().__init__()
        n_layers = config.group_count * config.n_blk_per_group
        self.blocks = nn.ModuleDict({"input": Convolution(config.vocab_size, config.n_init, 1, full_precision=True)})
        width = config.n_init
        for group in range(config.group_count):
            n_out = config.n_hid * 2 ** (config.group_count - 1 - group)
            widths = (width, *[n_out] * config.n_blk_per_group)
            self.blocks[f"group_{group + 1}"] = nn.ModuleDict(
                {
                    f"block_{i}": ResidualBlock(
                        widths[i - 1], widths[i], _DECODER_KERNELS, n_layers, upsample=group > 0 and i == 1
                    )
                    for i in range(1, config.n_blk_per_group + 1)
                }
            )
            width = n_out
        self.blocks["output"] = _Output(width, 2 * CHANNELS)

    @property
    def codebook(self) -> Tensor:
        """One row a code, [vocab_size, n_init]: a view of ``blocks.input.w``, in float32 at least."""
        return at_least_float32(self.blocks["input"].w.flatten(1).t())

    @property
    def codebook_bias(self) -> Tensor:
        """What is added to every embedded code, [n_init], in float32 at least."""
        return at_least_float32(self.blocks["input"].b)

    def forward(self, x: Tensor) -> Tensor:
        for name, group in self.blocks.items():
            if name.startswith("group_"):
                for block in group.values():
                    x = block(x)
        return self.blocks["output"](x)


@dataclass(frozen=True)
class DVAEOutput:
    """What a training step needs; both fields are float32 scalars (at least) that carry gradients.

    ``reconstruction``: the negative log-likelihood of the pixels under the logit-Laplace distribution (paper A.3), in
    nats, averaged over the batch and over the ``values_per_image = 3 * S * S`` values of an image.
    ``kl``: the divergence of the encoder's distribution from the uniform prior, in nats, summed over the token
    positions of an image and averaged over the batch.
    """

    reconstruction: Tensor
    kl: Tensor
    values_per_image: int

    def loss(self, beta: float | Tensor) -> Tensor:
        """The paper's loss (A.2), ``(sum of reconstruction + beta * sum of KL) / (3 * S * S)``, averaged over images.

        That is ``reconstruction + beta * kl / (3 * S * S)``; with 256x256 images and 32x32 tokens, KL averaged over
        positions would weigh beta / 192.
        """
        return self.reconstruction + beta * self.kl / self.values_per_image


class DVAE(nn.Module):
    """The discrete VAE: ``encoder`` (phi) and ``decoder`` (theta) around a grid of tokens.

    Images are floating point RGB in [0, 1], [B, 3, H, W], of the parameters' dtype and device (values outside [0, 1]
    are not looked for: they cost a pass over the pixels). Tokens are int64 in [0, vocab_size), of shape
    [B, H / factor, W / factor]. Encoding and decoding work on any height and width that the factor divides; training on
    squares of ``config.image_size``. Mistakes raise :class:`dalle.errors.UserError`.
    """

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_logits(self, images: Tensor) -> Tensor:
        """Logits over the codes, float32 at least, [B, vocab_size, H / factor, W / factor]."""
        self._check_images(images)
        return self.encoder(map_pixels(images).contiguous(memory_format=torch.channels_last))

    def encode(self, images: Tensor) -> Tensor:
        """The most likely token at each position, without noise (paper 2.2): int64 [B, H / factor, W / factor]."""
        return self.encode_logits(images).argmax(dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, H * factor, W * factor] in [0, 1] of tokens [B, H, W]: ``phi^-1(sigmoid(mu))``, ln b unused."""
        self._check_tokens(tokens)
        mu, _ = self._decode_embedding(F.embedding(tokens, self.decoder.codebook))
        return unmap_pixels(torch.sigmoid(mu))

    def reconstruct(self, images: Tensor) -> Tensor:
        """``decode(encode(images))``: what survives of images [B, 3, H, W] when only their tokens are kept."""
        return self.decode(self.encode(images))

    def forward(self, images: Tensor, tau: float, generator: torch.Generator | None = None) -> DVAEOutput:
        """The two terms of the bound for images [B, 3, S, S], S = ``config.image_size`` (paper 2.1).

        ``tau`` > 0 is the temperature of the Gumbel-softmax relaxation; ``generator`` seeds its noise. The relaxed
        one-hot codes are never stored.
        """
        side = self.config.image_size
        if images.ndim == 4 and images.shape[-2:] != (side, side):
            raise UserError(
                f"expected training images of {side}x{side} pixels (config.image_size), got "
                f"{images.shape[-2]}x{images.shape[-1]}; resize them, or encode and decode them without training"
            )
        # One row a position, its codes side by side in memory: that is how the channels-last encoder leaves its logits.
        rows = self.encode_logits(images).permute(0, 2, 3, 1)
        embedding, kl = gumbel_codebook(rows, self.decoder.codebook, tau=tau, generator=generator)
        mu, log_b = self._decode_embedding(embedding)
        reconstruction = logit_laplace_loss(at_least_float32(map_pixels(images)), mu, log_b)
        return DVAEOutput(reconstruction, kl.sum() / images.shape[0], images[0].numel())

    def _decode_embedding(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """mu and ln b, each [B, 3, H * factor, W * factor] and float32 at least, of code vectors [B, H, W, n_init]."""
        embedding = (embedding + self.decoder.codebook_bias).to(self.decoder.blocks["output"].conv.w.dtype)
        parameters = self.decoder(embedding.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last))
        mu, log_b = at_least_float32(parameters).chunk(2, dim=1)
        return mu, log_b

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != CHANNELS:
            raise UserError(f"expected RGB images of shape [batch, 3, height, width], got {list(images.shape)}")
        parameter = self.encoder.blocks["input"].w
        if images.dtype != parameter.dtype:
            raise UserError(
                f"expected images in [0, 1] of dtype {parameter.dtype}, the model's, got {images.dtype}; "
                "convert them (8-bit images: divide by 255)"
            )
        if images.device != parameter.device:
            raise UserError(f"expected images on {parameter.device}, where the model is, got {images.device}; move one")
        factor = self.config.factor
        height, width = images.shape[-2:]
        if images.shape[0] == 0 or height == 0 or width == 0 or height % factor or width % factor:
            raise UserError(
                f"expected at least one image with a height and width that {factor} divides, got shape "
                f"{list(images.shape)}; crop or resize"
            )

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 3 or tokens.numel() == 0:
            raise UserError(
                f"expected tokens of shape [batch, height, width], none of them 0, got {list(tokens.shape)}"
            )
        if tokens.dtype != torch.int64:
            raise UserError(f"expected tokens of dtype torch.int64, got {tokens.dtype}; convert them with .long()")
        parameter = self.decoder.blocks["input"].w
        if tokens.device != parameter.device:
            raise UserError(f"expected tokens on {parameter.device}, where the model is, got {tokens.device}; move one")
        low, high = (int(bound) for bound in torch.aminmax(tokens))
        if low < 0 or high >= self.config.vocab_size:
            raise UserError(
                f"expected tokens from 0 to {self.config.vocab_size - 1}, got {low} to {high}; "
                "they come from another dVAE, or are not image tokens"
            )
