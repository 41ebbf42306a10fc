"""Sampling: seeded, independent of what else is drawn, of the right distribution; priming; clear errors."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy
import pytest
import torch

from dalle.config import DALLEConfig, DVAEConfig
from dalle.errors import UserError
from dalle.generation import GeneratedImages, Sampler, draw_tokens, generate, prime_tokens, single_step
from dalle.tokenizer import Tokenizer
from dalle.transformer import DALLE

PROMPTS = ["red apple", "snowman, noto style", "a cat"]


class StandInDVAE(torch.nn.Module):
    """The part of the dVAE's interface that generation uses; a token paints its square in a grey of its own."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        grey = torch.nn.functional.avg_pool2d(images, self.config.factor).mean(1)
        return (grey * (self.config.vocab_size - 1)).round().long()

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        grey = tokens[:, None] / (self.config.vocab_size - 1)
        return torch.nn.functional.interpolate(grey, scale_factor=self.config.factor).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(PROMPTS * 2, 300)


@pytest.fixture(scope="module")
def model() -> DALLE:
    torch.manual_seed(0)
    config = dataclasses.replace(DALLEConfig.preset("tiny"), text_len=20)
    model = DALLE(config).double()
    with torch.no_grad():  # far from uniform, so that the prompt and the earlier tokens matter
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def dvae() -> StandInDVAE:
    return StandInDVAE(DVAEConfig.preset("tiny"))


def test_generate_draws_grids_and_decodes_them(model, dvae, tokenizer):
    drawn = generate(model, dvae, tokenizer, PROMPTS, samples_per_prompt=2)
    assert isinstance(drawn, GeneratedImages)
    assert drawn.tokens.shape == (3, 2, 4, 4) and drawn.images.shape == (3, 2, 3, 16, 16)
    torch.testing.assert_close(drawn.images[1, 1], dvae.decode(drawn.tokens[1, 1:])[0])
    assert len({tuple(grid.flatten().tolist()) for grid in drawn.tokens.flatten(0, 1)}) == 6
    assert torch.equal(generate(model, dvae, tokenizer, PROMPTS[0]).tokens[0], drawn.tokens[0, :1])


def test_the_seed_decides(model, dvae, tokenizer):
    first, again, other = (generate(model, dvae, tokenizer, PROMPTS, seed=seed).tokens for seed in (3, 3, 2**63 - 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_a_sample_does_not_depend_on_what_is_drawn_with_it(model, tokenizer, batch_size):
    text = tokenizer.encode_batch(PROMPTS, 20)
    everything = draw_tokens(model, text, samples_per_prompt=3)
    assert torch.equal(draw_tokens(model, text, samples_per_prompt=3, batch_size=batch_size), everything)
    fewer = draw_tokens(model, text[:2], samples_per_prompt=2, batch_size=batch_size)
    assert torch.equal(fewer, everything[:2, :2])


def test_drawn_tokens_follow_the_models_distribution(model, tokenizer):
    text = tokenizer.encode_batch(PROMPTS[:1], 20)
    first = draw_tokens(model, text, samples_per_prompt=2000, batch_size=2000)[0, :, 0, 0]
    expected = model.prefill(text)[0].softmax(-1)[0]
    counts = torch.bincount(first, minlength=64)
    chi_squared = ((counts - 2000 * expected) ** 2 / (2000 * expected)).sum()
    assert chi_squared < 63 + 5 * (2 * 63) ** 0.5


LOGITS = torch.tensor([[0.0, 2.0, 1.0, 4.0, 3.0]]).log_softmax(-1)
UNIFORM = (torch.arange(4000) + 0.5) / 4000


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler(), [0, 1, 2, 3, 4]),
        (Sampler(top_k=2), [3, 4]),
        (Sampler(top_k=1), [3]),
        (Sampler(top_k=99), [0, 1, 2, 3, 4]),
        (Sampler(top_p=0.6), [3]),  # the most likely has 0.636
        (Sampler(top_p=0.7), [3, 4]),  # 0.636 + 0.234
        (Sampler(top_p=1.0), [0, 1, 2, 3, 4]),
        (Sampler(top_p=0.9), [1, 3, 4]),
        (Sampler(top_k=2, top_p=0.7), [3]),  # of the two, the first has 0.731
        (Sampler(temperature=0), [3]),
        (Sampler(temperature=1e-30), [3]),
        (Sampler(temperature=2.0), [0, 1, 2, 3, 4]),
        (Sampler(temperature=0.5, top_p=0.9), [3, 4]),
    ],
)
def test_sampler_keeps_the_right_tokens_in_the_right_proportion(sampler, kept):
    tokens = sampler.draw(LOGITS.expand(len(UNIFORM), -1), UNIFORM)
    counts = torch.bincount(tokens, minlength=5) / len(UNIFORM)
    assert counts.nonzero().flatten().tolist() == kept
    expected = torch.zeros(5)
    expected[kept] = (LOGITS[0, kept] / (sampler.temperature or 1)).softmax(-1)
    torch.testing.assert_close(counts, expected, atol=2 / len(UNIFORM), rtol=0)


def test_sampler_never_draws_what_the_model_excludes():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    uniform = torch.tensor([2.0**-33, 0.5, 1 - 2.0**-24])
    for sampler in (Sampler(), Sampler(top_k=4), Sampler(top_p=1.0)):
        assert set(sampler.draw(logits.expand(3, -1), uniform).tolist()) <= {1, 3}


def test_given_rows_stay_and_the_rest_follows_them(model, tokenizer):
    text = tokenizer.encode_batch(PROMPTS, 20)
    whole = draw_tokens(model, text, samples_per_prompt=2, seed=4)
    given = whole[:, 0].flatten(1)[:, :8]
    continued = draw_tokens(model, text, samples_per_prompt=2, seed=4, prime=given)
    assert torch.equal(continued.flatten(2)[:, :, :8], given[:, None].expand(-1, 2, -1))
    # The noise of a position is its own, so sample 0 draws again what it had drawn.
    assert torch.equal(continued[:, 0], whole[:, 0])
    assert not torch.equal(continued[:, 1, 2:], continued[:, 0, 2:])
    shared = draw_tokens(model, text, seed=4, prime=given[0])
    assert torch.equal(shared.flatten(2)[:, 0, :8], given[:1].expand(3, -1))


def test_prime_tokens_are_the_top_rows_of_the_encoded_image(dvae):
    pixels = numpy.zeros((32, 64, 3), dtype=numpy.uint8)
    pixels[8:] = 255
    pixels[:, :16] = 77  # cropped away: the grid is square
    assert prime_tokens(dvae, pixels, 3, (4, 4)).tolist() == [0] * 4 + [63] * 8
    for rows in (0, 4):
        with pytest.raises(UserError, match=f"1 to 3 given rows of the 4 rows of tokens, got {rows}"):
            prime_tokens(dvae, pixels, rows, (4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["red apple", " "]}, "at least one character"),
        ({"prompts": ["red apple " * 30]}, "at most 20 tokens"),
        ({"samples_per_prompt": 0}, "samples per prompt of at least 1, got 0"),
        ({"batch_size": 0}, "batch size of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature of 0"),
        ({"temperature": float("nan")}, "temperature of 0"),
        ({"top_k": 0}, "top-k of at least 1, got 0"),
        ({"top_p": 0.0}, "top-p above 0"),
        ({"top_p": 1.5}, "top-p above 0"),
        ({"seed": -1}, "seed from 0"),
        ({"seed": 2**63}, "seed from 0"),
        ({"prime": torch.zeros(16, dtype=torch.int64)}, r"shape \[n\] or \[1, n\] with n < 16, got \[1, 16\]"),
        ({"prime": torch.zeros(2, 3, dtype=torch.int64)}, r"got \[2, 3\]"),
        ({"prime": torch.zeros(4)}, "dtype torch.int64, got torch.float32"),
        ({"prime": torch.full((4,), 64)}, r"prime in 0\.\.63"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(model, dvae, tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        generate(model, dvae, tokenizer, **({"prompts": ["red apple"]} | arguments))


def test_over_long_prompts_can_be_cut_off(model, dvae, tokenizer):
    assert generate(model, dvae, tokenizer, "red apple " * 30, truncate=True).tokens.shape == (1, 1, 4, 4)


def test_parts_of_another_model_are_refused(model, dvae, tokenizer):
    other = StandInDVAE(dataclasses.replace(dvae.config, vocab_size=65))
    with pytest.raises(UserError, match="64 image tokens, got one with 65"):
        generate(model, other, tokenizer, "red apple")
    with pytest.raises(UserError, match="300 text tokens, got one with 301"):
        generate(model, dvae, Tokenizer.train(PROMPTS, 301), "red apple")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_model_is_reported(dvae, tokenizer, value):
    damaged = DALLE(dataclasses.replace(DALLEConfig.preset("tiny"), text_len=20))
    with torch.no_grad():
        damaged.image_unembedding.weight[5, 3] = value
    with pytest.raises(UserError, match="finite logits"):
        generate(damaged, dvae, tokenizer, "red apple")


def test_results_can_be_trained_on(model, dvae, tokenizer):
    tokens = generate(model, dvae, tokenizer, PROMPTS).tokens
    text = tokenizer.encode_batch(PROMPTS, 20)
    model(text, tokens.flatten(1)).loss.backward()
    model.zero_grad()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [0, 5])
def test_a_captured_step_draws_what_steps_one_by_one_draw(given, dtype, monkeypatch):
    config = DALLEConfig(
        text_len=5, text_vocab_size=40, grid=(4, 4), image_vocab_size=64, dim=64, heads=2, head_dim=32, layers=5,
        kernel_size=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DALLE(config).to("cuda", dtype).eval()
    text, prime = torch.randint(1, 40, (2, 5)), torch.randint(0, 64, (given,))
    graphed = draw_tokens(model, text, 3, seed=4, prime=prime if given else None)
    monkeypatch.setattr("dalle.generation.GraphedStep", lambda *arguments: partial(single_step, *arguments))
    assert torch.equal(draw_tokens(model, text, 3, seed=4, prime=prime if given else None), graphed)
    assert (graphed[..., 0, 0] != graphed[..., 3, 3]).any()
