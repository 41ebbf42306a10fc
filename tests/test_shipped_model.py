"""The model that comes with the package: small, credited, made by the shipped recipe, and drawn from by the demo."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from dalle.checkpoint import check_dvae, load_dalle, load_dvae, shipped
from dalle.cli import main
from dalle.cli.training_arguments import RECIPES, model_config
from dalle.config import DALLEConfig, DVAEConfig, read_toml
from dalle.train.dalle import DALLETraining
from dalle.train.dvae import DVAETraining


@pytest.fixture(scope="module")
def folder():
    return shipped("emoji")


def test_it_is_small_and_credited(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25e6
    credits_text = (folder / "CREDITS.md").read_text(encoding="utf-8")
    for needed in ("Apache-2.0", "MIT", "Google", "Microsoft", "@iconify-json/noto", "@iconify-json/fluent-emoji-flat"):
        assert needed in credits_text


def test_the_recipe_is_the_one_that_made_it(folder):
    recipe = read_toml(RECIPES / "emoji.toml")
    for stage, config, training in (("dvae", DVAEConfig, DVAETraining), ("dalle", DALLEConfig, DALLETraining)):
        description = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
        assert model_config(config, recipe[stage], "recipe").to_dict() == description["config"]
        # Settings that came later are not in its note: it had what their defaults are.
        assert training(**recipe[f"{stage}_training"]) == training(**description["note"]["training"])


def test_its_parts_belong_together(folder):
    model, tokenizer = load_dalle(folder)
    dvae = load_dvae(folder)
    check_dvae(folder, folder)
    assert dvae.config.grid == model.config.grid and tokenizer.vocab_size == model.config.text_vocab_size
    demo = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    tokenizer.encode_batch([*demo["seen"], *demo["held_out"]], model.config.text_len)


def test_the_demo_draws_the_same_grid_each_time(tmp_path, capsys):
    for name in ("first.png", "second.png"):
        assert main(["demo", "--samples", "1", "-o", str(tmp_path / "new" / name)]) == 0
    assert str(tmp_path / "new" / "second.png") in capsys.readouterr().out
    first, second = ((tmp_path / "new" / name).read_bytes() for name in ("first.png", "second.png"))
    assert first == second
    with Image.open(tmp_path / "new" / "first.png") as grid:
        assert min(grid.size) > 128
    assert main(["demo", "--samples", "0"]) == 2
