"""The whole stage-2 model, a training step and generation, against DALLE-pytorch at two sizes.

Both have the same width, depth, heads, vocabularies and batch; their layers differ (DALLE-pytorch gates its MLP, shifts
tokens and rotates queries and keys), and so do the numbers of parameters, which are recorded. DALLE-pytorch runs as
shipped, with its sparse mix (full, axial row, axial column, convolutional) or dense attention and without its cache,
which ``generate_images`` never passes on; and with that one line repaired.

On a GPU there is one size, of a billion parameters, under autocast to bfloat16 in training and in bfloat16 in
generation, held to what the GPU could do at most: DALLE-pytorch is not run there.

A training step is loss, gradients and torch's fused AdamW, on a GPU AdamW16. Generation is timed for one token of every
image: ours over whole images, prompt included, DALLE-pytorch's over a few tokens in the middle of the image, prompt
excluded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import dalle_pytorch_rival
import torch
from harness import OURS, Candidate, Case, Goal, Unavailable

import dalle_kernels
from dalle.config import DALLEConfig
from dalle.generation import draw_tokens
from dalle.transformer import DALLE, mask_schedule
from dalle_kernels import AdamW16, AttentionPattern
from dalle_kernels.testing import assert_accurate
from dalle_kernels.transformer import ops as layers_ops

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
    training: tuple[Goal, ...]
    generation: tuple[Goal, ...]
    dtype: torch.dtype = torch.float32

    @property
    def narrow(self) -> bool:
        return self.dtype != torch.float32


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


SIZES = {
    "cpu": (
        Size(
            "small",
            _config(32, 1000, 8, 1024, 256, 4, 6),
            8,
            (Goal("speed", 2.0, SPARSE),),
            (Goal("speed", 20, SPARSE), Goal("rate", 2000)),
        ),
        Size(
            "large",
            _config(256, 16384, 32, 8192, 512, 8, 8),
            1,
            (Goal("speed", 2.3, SPARSE),),
            (Goal("speed", 100, SPARSE), Goal("speed", 3, DENSE_CACHED), Goal("rate", 100)),
        ),
    ),
    "cuda": (
        Size("1 B", DALLEConfig.preset("large"), 16, (Goal("share", 0.5),), (Goal("share", 0.8),), torch.bfloat16),
    ),
}


def pytest_generate_tests(metafunc):
    sizes = SIZES[metafunc.config.getoption("--device")]
    metafunc.parametrize("size", sizes, ids=lambda size: size.name)


def pairs(config: DALLEConfig, queries: str = "all") -> int:
    """Pairs of query and key that all layers' patterns allow, of all queries or the image's alone."""
    found = 0
    for kind in mask_schedule(config.layers):
        pattern = AttentionPattern(kind, config.text_len + 1, config.grid, config.kernel_size)
        seq = config.text_len + config.image_len
        found += pattern.pairs(seq) - (pattern.pairs(config.text_len + 1) if queries == "image" else 0)
    return found


def matrix_elements(config: DALLEConfig) -> int:
    """Of all layers' matrices."""
    return config.layers * 4 * config.dim * (config.heads * config.head_dim + 2 * config.dim)


def training_operations(size: Size) -> float:
    """Of the matrix products and the attention of a step, forward and backward."""
    config = size.config
    tokens = config.text_len + config.image_len
    classes = config.text_len * (config.text_vocab_size + config.text_len) + config.image_len * config.image_vocab_size
    attention = 14 * config.heads * config.head_dim * pairs(config)
    return size.batch * (6 * (matrix_elements(config) * tokens + config.dim * classes) + attention)


def generation_bytes(size: Size) -> float:
    """Of one token: its share of the weights, read once a step, and the keys and values that it sees."""
    config = size.config
    weights = matrix_elements(config) + config.dim * config.image_vocab_size
    seen = 2 * config.heads * config.head_dim * pairs(config, "image") / config.image_len
    return size.dtype.itemsize * (weights / size.batch + seen)


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


def autocast(size: Size, device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=size.narrow)


def check(model: DALLE, text: torch.Tensor, image: torch.Tensor, size: Size) -> None:
    """Hold the image logits to the error rule, teacher forced and decoded one token after a primed half image."""
    half, dtype = image.shape[1] // 2, model.start.dtype
    text, image = text[: 1 if size.narrow else None], image[: 1 if size.narrow else None]
    with torch.no_grad():
        with autocast(size, text.device.type):
            actual = model.logits(text, image)[1]
            _, state = model.prefill(text, prime=image[:, :half])
            step = model.decode_step(image[:, half], state)
            with dalle_kernels.use("reference"):
                plain = model.logits(text, image)[1]
        with dalle_kernels.use("reference"):
            exact = model.double().logits(text, image)[1]
        model.to(dtype)
    assert_accurate(actual, plain, exact, name="image logits")
    assert_accurate(step, plain[:, half + 1], exact[:, half + 1], name="decoded logits")


def test_training_step(side_by_side, device, size):
    text, image = tokens(size, device)
    with torch.device(device):
        ours = DALLE(size.config)

    def step(model: torch.nn.Module, loss) -> Candidate:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AdamW16(trained, lr=1e-4) if size.narrow else torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def run() -> None:
            optimizer.zero_grad()
            with autocast(size, device):
                found = loss()
            found.backward()
            optimizer.step()

        return run

    others: list[Candidate | Unavailable] = []
    for name, layers in LAYERS.items() if device == "cpu" else ():
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
            dtype=size.dtype,
            settings=settings(size, ours),
            ours=Candidate(OURS, step(ours, lambda: ours(text, image).loss)),
            rivals=others,
            check=partial(check, ours, text, image, size),
            goals=size.training,
            operations=training_operations(size) if size.narrow else None,
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


def by_compiled_layers(run: Callable[[], object], units: int) -> Candidate:
    """Generation with a GPU's compiled kernels for a step's layers, whether or not they are its choice."""

    def forced() -> object:
        with mock.patch.dict(layers_ops.DECODE_AHEAD, {torch.bfloat16: 0}):
            return run()

    return Candidate(f"{OURS}, compiled layers", forced, units=units)


def test_generation(side_by_side, device, size):
    text, image = tokens(size, device)
    with torch.device(device):
        ours = DALLE(size.config).to(size.dtype).eval()
    run, units = partial(draw_tokens, ours, text), size.config.image_len * size.batch
    others: list[Candidate | Unavailable] = [by_compiled_layers(run, units)] if device == "cuda" else []
    for name, cached_name in ((SPARSE, SPARSE_CACHED), (DENSE, DENSE_CACHED)) if device == "cpu" else ():
        try:
            model = rival(size, LAYERS[name], device)
        except dalle_pytorch_rival.NotInstalled as error:
            others += [Unavailable(each, str(error)) for each in (name, cached_name)]
            continue
        note = f"{parameters(model)} parameters"
        for each, cached in ((name, False), (cached_name, True)):
            drawing = RivalGeneration(model, text, image, cached)
            drawn = RivalGeneration.COUNT * size.batch
            others.append(Candidate(each, drawing.run, drawing.before, drawn, same_function=False, note=note))
    side_by_side(
        Case(
            family="model",
            work="generation of a token",
            dtype=size.dtype,
            settings=settings(size, ours),
            ours=Candidate(OURS, run, units=units),
            rivals=others,
            check=partial(check, ours, text, image, size),
            goals=size.generation,
            bytes_moved=generation_bytes(size) if size.narrow else None,
            unit="tokens",
            memory=False,
        )
    )
