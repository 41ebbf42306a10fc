"""Draw images from captions: sample the image tokens one by one, then decode them with the dVAE (paper 2.6, F)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from dalle.errors import UserError
from dalle_kernels import philox

if TYPE_CHECKING:
    from dalle.dvae import DVAE
    from dalle.tokenizer import Tokenizer
    from dalle.transformer import DALLE, Decoding

PROMPT_ROWS = 2**32
"""Sample s of prompt p draws its noise from Philox row ``p * PROMPT_ROWS + s``, whatever else is drawn with it."""


class GeneratedImages(NamedTuple):
    """S samples of P prompts: ``tokens`` int64 ``[P, S, H, W]``, ``images`` ``[P, S, 3, height, width]`` in [0, 1]."""

    tokens: torch.Tensor
    images: torch.Tensor


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits.

    The logits are divided by ``temperature`` (1 is the paper's; 0 takes the most likely token). Then only the
    ``top_k`` most likely tokens stay, and of these the fewest whose probability reaches ``top_p``.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"expected a temperature of 0 (the most likely token) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"expected a top-k of at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"expected a top-p above 0 and at most 1, got {self.top_p}")

    def draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Tokens int64 ``[R]`` from logits ``[R, V]`` and one number in (0, 1) a row, ``uniform`` ``[R]``.

        The token is where the cumulative distribution passes the number, so one number a token is all the noise needed.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
        probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        order = None
        if self.top_k is not None or self.top_p is not None:
            vocab_size = logits.shape[-1]
            probabilities, order = probabilities.topk(min(self.top_k or vocab_size, vocab_size), dim=-1)
        cumulative = probabilities.double().cumsum(dim=-1)
        if self.top_p is not None:
            missing = cumulative - probabilities >= self.top_p * cumulative[:, -1:]
            cumulative = probabilities.double().masked_fill(missing, 0).cumsum(dim=-1)
        threshold = uniform.double()[:, None] * cumulative[:, -1:]
        # NaN probabilities, reported by the caller, must not give an index outside the vocabulary.
        index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[-1] - 1)
        return (index if order is None else order.gather(-1, index)).squeeze(-1)


def generate(
    model: DALLE,
    dvae: DVAE,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    samples_per_prompt: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prime: torch.Tensor | None = None,
    *,
    truncate: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> GeneratedImages:
    """Draw ``samples_per_prompt`` images for each prompt.

    The same seed gives the same images. Sample s of prompt number p depends on (seed, p, s) alone, not on how many
    others are drawn with it or on ``batch_size``, up to the rounding of matrix products of another size.

    Args:
        model, dvae, tokenizer: trained together (``dalle.checkpoint.load_dalle`` and ``load_dvae``).
        prompts: the captions, each of at most ``model.config.text_len`` tokens.
        temperature, top_k, top_p: see :class:`Sampler`.
        seed: 0 to 2**63 - 1.
        prime: image tokens that are given, from the first row on: int64 ``[n]`` for all prompts or ``[P, n]``; see
            :func:`prime_tokens`.
        truncate: cut off over-long prompts instead of refusing them.
        batch_size: how many images are drawn at once; bounds the memory.
        progress: show a progress bar.

    Raises:
        UserError: for an empty or over-long prompt, an option out of range, a dVAE of another vocabulary, or a model
            whose logits are not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise UserError("expected at least one prompt, got none")
    if dvae.config.vocab_size != model.config.image_vocab_size:
        raise UserError(
            f"expected a dVAE with the transformer's {model.config.image_vocab_size} image tokens, "
            f"got one with {dvae.config.vocab_size}: give the dVAE that it was trained with"
        )
    if tokenizer.vocab_size != model.config.text_vocab_size:
        raise UserError(
            f"expected a tokenizer with the transformer's {model.config.text_vocab_size} text tokens, "
            f"got one with {tokenizer.vocab_size}: give the tokenizer that it was trained with"
        )
    sampler = Sampler(temperature, top_k, top_p)
    text = tokenizer.encode_batch(prompts, model.config.text_len, truncate=truncate)
    tokens = draw_tokens(model, text, samples_per_prompt, sampler, seed, prime, batch_size, progress)
    device = next(dvae.parameters()).device
    with torch.no_grad():
        images = [dvae.decode(batch.to(device)) for batch in tokens.flatten(0, 1).split(batch_size)]
    return GeneratedImages(tokens, torch.cat(images).unflatten(0, tokens.shape[:2]))


def draw_tokens(
    model: DALLE,
    text: torch.Tensor,
    samples_per_prompt: int = 1,
    sampler: Sampler | None = None,
    seed: int = 0,
    prime: torch.Tensor | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """Image tokens int64 ``[P, samples_per_prompt, H, W]`` for texts int64 ``[P, text_len]``; see :func:`generate`."""
    for name, number in (("samples per prompt", samples_per_prompt), ("batch size", batch_size)):
        if number < 1:
            raise UserError(f"expected {name} of at least 1, got {number}")
    if not 0 <= seed < 2**63:
        raise UserError(f"expected a seed from 0 to 2**63 - 1, got {seed}")
    sampler = sampler or Sampler()
    config, device = model.config, model.start.device
    prime = _expand_prime(prime, len(text), config.image_len).to(device)
    given = prime.shape[1]
    tokens = torch.empty(len(text), samples_per_prompt, config.image_len, dtype=torch.int64, device=device)
    tokens[:, :, :given] = prime[:, None]
    batches = list(_batches(len(text), samples_per_prompt, batch_size))
    steps = len(batches) * (config.image_len - given)
    with tqdm(total=steps, desc="drawing", unit="token", disable=not progress, leave=False) as bar:
        for prompts, samples in batches:
            which = slice(prompts.start, prompts.stop), slice(samples.start, samples.stop)
            noise = _noise(seed, prompts, samples, config.image_len, device)
            texts, primes = text[which[0]].to(device), prime[which[0]]
            tokens[*which, given:] = _draw_batch(model, texts, primes, len(samples), noise, sampler, bar.update)
    return tokens.unflatten(-1, config.grid)


@torch.inference_mode()
def _draw_batch(
    model: DALLE,
    text: torch.Tensor,
    prime: torch.Tensor,
    samples: int,
    noise: torch.Tensor,
    sampler: Sampler,
    advance: Callable[[], object],
) -> torch.Tensor:
    """The tokens that follow ``prime`` ``[P, n]``: int64 ``[P, samples, H*W - n]``.

    ``noise`` is ``[P * samples, H*W]``; ``advance`` is called after every token.
    """
    logits, decoding = model.prefill(text, samples, prime)
    finite = torch.ones((), dtype=torch.bool, device=text.device)

    def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        finite.logical_and_(logits.sum(dtype=torch.float64).isfinite())
        return sampler.draw(logits, uniform)

    given, total = prime.shape[1], model.config.image_len
    graphed = text.is_cuda and decoding.layers is not None and given < total - 1
    step = GraphedStep(model, decoding, draw, noise) if graphed else partial(single_step, model, decoding, draw, noise)
    drawn = [draw(logits, noise[:, given])]
    advance()
    for _ in range(given + 1, total):
        drawn.append(step(drawn[-1]))
        advance()
    if not finite:  # looked at only here, because on a GPU the host waits for it
        raise UserError(
            "expected finite logits of the transformer, got NaN or infinity: "
            f"its weights are damaged, or too large for {model.start.dtype}"
        )
    return torch.stack(drawn, dim=-1).unflatten(0, (len(text), samples))


Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens int64 ``[rows]`` from logits and one uniform number a row."""


def single_step(
    model: DALLE, decoding: Decoding, draw: Draw, noise: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Give the next tokens int64 ``[rows]`` and draw those after them, by their column of ``noise``."""
    logits = model.decode_step(tokens, decoding)
    return draw(logits, noise[:, decoding.position])


class GraphedStep:
    """:func:`single_step` as a CUDA graph: captured once, replayed for every token, with no work for the host.

    A step of a small model is hundreds of short kernels, which a host launches more slowly than a GPU runs them.
    """

    @torch.inference_mode()
    def __init__(self, model: DALLE, decoding: Decoding, draw: Draw, noise: torch.Tensor):
        caches = decoding.caches
        rows, device = caches[0].step_shape[0], caches[0].device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.full((1,), decoding.position, device=device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Compiles and warms up. What it puts into the caches is where the first token's keys and values go.
            draw(model.decode_step_at(self.tokens, self.position, decoding), noise[:, 0])
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            logits = model.decode_step_at(self.tokens, self.position, decoding)
            self.position += 1
            self.drawn = draw(logits, noise.index_select(1, self.position).squeeze(1))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.drawn.clone()


def _noise(seed: int, prompts: range, samples: range, columns: int, device: torch.device) -> torch.Tensor:
    """Uniform numbers in (0, 1), fp32 ``[len(prompts) * len(samples), columns]``: see ``PROMPT_ROWS``."""
    rows = torch.tensor([p * PROMPT_ROWS + s for p in prompts for s in samples], device=device)
    return philox.complement_uniform(torch.tensor(seed, device=device), rows[:, None, None], columns).squeeze(-1)


def _batches(prompts: int, samples: int, batch_size: int) -> Iterator[tuple[range, range]]:
    """Ranges of prompts and of their samples that cover all, none with more than ``batch_size`` images."""
    prompt_step, sample_step = max(1, batch_size // samples), min(samples, batch_size)
    for prompt in range(0, prompts, prompt_step):
        for sample in range(0, samples, sample_step):
            yield range(prompt, min(prompts, prompt + prompt_step)), range(sample, min(samples, sample + sample_step))


def _expand_prime(prime: torch.Tensor | None, prompts: int, image_len: int) -> torch.Tensor:
    if prime is None:
        return torch.empty(prompts, 0, dtype=torch.int64)
    if prime.dtype != torch.int64:
        raise UserError(f"expected given image tokens of dtype torch.int64, got {prime.dtype}")
    if prime.dim() == 1:
        prime = prime.expand(prompts, -1)
    if prime.dim() != 2 or len(prime) != prompts or prime.shape[1] >= image_len:
        raise UserError(
            f"expected given image tokens of shape [n] or [{prompts}, n] with n < {image_len}, got {list(prime.shape)}"
        )
    return prime


def prime_tokens(dvae: DVAE, pixels: numpy.ndarray, rows: int, grid: tuple[int, int]) -> torch.Tensor:
    """The image tokens int64 ``[rows * W]`` of an image's top rows, for ``generate``'s ``prime``.

    ``pixels`` is uint8 RGB ``[height, width, 3]`` (``dalle.data.images.decode_image`` makes it from a file). The
    image is cropped at its centre to the aspect ratio of ``grid = (H, W)``, the transformer's, and resized (area) to
    what the dVAE encodes to that grid.
    """
    height, width = grid
    if not 1 <= rows < height:
        raise UserError(f"expected 1 to {height - 1} given rows of the {height} rows of tokens, got {rows}")
    factor = dvae.config.factor
    fitted = ImageOps.fit(Image.fromarray(pixels), (width * factor, height * factor), Image.Resampling.BOX)
    parameter = next(dvae.parameters())
    image = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1).to(parameter.device, parameter.dtype) / 255
    with torch.no_grad():
        return dvae.encode(image[None])[0, :rows].flatten()
