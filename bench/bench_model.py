"""The whole stage-2 model, a training step and generation, against DALLE-pytorch at two sizes.

Both have the same width, depth, heads, vocabularies and batch; their layers differ (DALLE-pytorch gates its MLP, shifts
tokens and rotates queries and keys), and so do the numbers of parameters, which are recorded. DALLE-pytorch runs as
shipped, with its sparse mix (full, axial row, axial column, convolutional) or dense attention and without its cache,
which ``generate_images`` never passes on; and with that one line repaired.

A training step is loss, gradients and torch's fused AdamW. Generation is timed for one token of every image: ours over
whole images, prompt included, DALLE-pytorch's over a few tokens in the middle of the image, prompt excluded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import dalle_pytorch_rival
import pytest
import torch
from harness import OURS, Candidate, Case, Goal, Unavailable

import dalle_kernels
from dalle.config import DALLEConfig
from dalle.generation import draw_tokens
from dalle.transformer import DALLE
from dalle_kernels.testing import assert_accurate

SPARSE = "DALLE-pytorch, sparse mix as shipped"
DENSE = "DALLE-pytorch, dense"
SPARSE_CACHED = "DALLE-pytorch, sparse mix, cache repaired"
DENSE_CACHED = "DALLE-pytorch, dense, cache repaired"
LAYERS = {SPARSE: ("full", "axial_row", "axial_col", "conv_like"), DENSE: ("full",)}


@dataclass(frozen=True)
class Size:
    name: str
    config: DALLEConfig
    batch: int
    training: float
    generation: tuple[Goal, ...]


def _config(text_len, text_vocab_size, side, image_vocab_size, dim, heads, layers) -> DALLEConfig:
    return DALLEConfig(
        text_len=text_len,
        text_vocab_size=text_vocab_size,
        grid=(side, side),
        image_vocab_size=image_vocab_size,
        dim=dim,
        heads=heads,
        head_dim=64,
        layers=layers,
        kernel_size=11,
        checkpoint_activations=False,
    )


SIZES = (
    Size("small", _config(32, 1000, 8, 1024, 256, 4, 6), 8, 2.0, (Goal("speed", 20, SPARSE), Goal("rate", 2000))),
    Size(
        "large",
        _config(256, 16384, 32, 8192, 512, 8, 8),
        1,
        2.3,
        (Goal("speed", 100, SPARSE), Goal("speed", 3, DENSE_CACHED), Goal("rate", 100)),
    ),
)

each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)


def tokens(size: Size, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts without padding, and images."""
    config = size.config
    text = torch.randint(1, config.text_vocab_size, (size.batch, config.text_len), device=device)
    return text, torch.randint(0, config.image_vocab_size, (size.batch, config.image_len), device=device)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def rival(size: Size, layers: tuple[str, ...], device: str) -> torch.nn.Module:
    """DALLE-pytorch's model of this size; its dVAE is as small as can be, since it only decodes at the end."""
    module, config = dalle_pytorch_rival.load(), size.config
    side = config.grid[0]
    vae = module.DiscreteVAE(
        image_size=2 * side, num_layers=1, num_tokens=config.image_vocab_size, codebook_dim=8, hidden_dim=8
    )
    return module.DALLE(
        dim=config.dim,
        vae=vae,
        num_text_tokens=config.text_vocab_size,
        text_seq_len=config.text_len,
        depth=config.layers,
        heads=config.heads,
        dim_head=config.head_dim,
        attn_types=layers,
        rotary_emb=True,
    ).to(device)


def settings(size: Size, model: DALLE) -> dict[str, object]:
    config = size.config
    return {
        "size": size.name,
        "dim": config.dim,
        "layers": config.layers,
        "heads": config.heads,
        "text": config.text_len,
        "grid": "x".join(map(str, config.grid)),
        "batch": size.batch,
        "parameters": parameters(model),
    }


def check(model: DALLE, text: torch.Tensor, image: torch.Tensor) -> None:
    """Hold the image logits to the error rule, teacher forced and decoded one token after a primed half image."""
    half = image.shape[1] // 2
    with torch.no_grad():
        actual = model.logits(text, image)[1]
        _, state = model.prefill(text, prime=image[:, :half])
        step = model.decode_step(image[:, half], state)
        with dalle_kernels.use("reference"):
            plain = model.logits(text, image)[1]
            exact = model.double().logits(text, image)[1]
        model.float()
    assert_accurate(actual, plain, exact, name="image logits")
    assert_accurate(step, plain[:, half + 1], exact[:, half + 1], name="decoded logits")


@each_size
def test_training_step(side_by_side, device, size):
    text, image = tokens(size, device)
    ours = DALLE(size.config).to(device)

    def step(model: torch.nn.Module, loss) -> Candidate:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def run() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return run

    others: list[Candidate | Unavailable] = []
    for name, layers in LAYERS.items():
        try:
            model = rival(size, layers, device)
        except dalle_pytorch_rival.NotInstalled as error:
            others.append(Unavailable(name, str(error)))
            continue
        run = step(model, partial(model, text, image, return_loss=True))
        others.append(Candidate(name, run, same_function=False, note=f"{parameters(model)} parameters"))
    side_by_side(
        Case(
            family="model",
            work="training step",
            dtype=torch.float32,
            settings=settings(size, ours),
            ours=Candidate(OURS, step(ours, lambda: ours(text, image).loss)),
            rivals=others,
            check=partial(check, ours, text, image),
            goals=[Goal("speed", size.training, SPARSE)],
        )
    )


class RivalGeneration:
    """A few tokens in the middle of the image, drawn as DALLE-pytorch's ``generate_images`` draws them."""

    COUNT = 4

    def __init__(self, model: torch.nn.Module, text: torch.Tensor, image: torch.Tensor, cached: bool):
        self.model, self.cached = model.eval(), cached
        self.text, self.image = text, image[:, : image.shape[1] // 2]
        self.sampling = dalle_pytorch_rival.load()
        self.cache: dict | None = None

    @torch.no_grad()
    def before(self) -> None:
        if self.cached:
            self.cache = {}
            self.model(self.text, self.image[:, :-1], cache=self.cache)

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        image = self.image
        for _ in range(self.COUNT):
            logits = self.model(self.text, image, cache=self.cache)[:, -1, :]
            sample = self.sampling.gumbel_sample(self.sampling.top_k(logits, thres=0.5))
            image = torch.cat((image, (sample - self.model.num_text_tokens)[:, None]), dim=-1)
        return image


@each_size
def test_generation(side_by_side, device, size):
    text, image = tokens(size, device)
    ours = DALLE(size.config).to(device).eval()
    others: list[Candidate | Unavailable] = []
    for name, cached_name in ((SPARSE, SPARSE_CACHED), (DENSE, DENSE_CACHED)):
        try:
            model = rival(size, LAYERS[name], device)
        except dalle_pytorch_rival.NotInstalled as error:
            others += [Unavailable(each, str(error)) for each in (name, cached_name)]
            continue
        for each, cached in ((name, False), (cached_name, True)):
            drawing = RivalGeneration(model, text, image, cached)
            units, note = RivalGeneration.COUNT * size.batch, f"{parameters(model)} parameters"
            others.append(Candidate(each, drawing.run, drawing.before, units, same_function=False, note=note))
    side_by_side(
        Case(
            family="model",
            work="generation of a token",
            dtype=torch.float32,
            settings=settings(size, ours),
            ours=Candidate(OURS, partial(draw_tokens, ours, text), units=size.config.image_len * size.batch),
            rivals=others,
            check=partial(check, ours, text, image),
            goals=size.generation,
            unit="tokens",
            memory=False,
        )
    )
