"""Model sizes: presets, round trips, and one sentence for every number that cannot be."""

from __future__ import annotations

import pytest

from dalle.config import DALLEConfig, DVAEConfig
from dalle.errors import UserError

PRESETS = ("tiny", "emoji", "small", "medium", "large", "12b")


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_of_both_stages_fit_each_other(name):
    dvae, dalle = DVAEConfig.preset(name), DALLEConfig.preset(name)
    assert dvae.grid == dalle.grid and dvae.vocab_size == dalle.image_vocab_size
    assert DVAEConfig.from_dict(dvae.to_dict()) == dvae and DALLEConfig.from_dict(dalle.to_dict()) == dalle


@pytest.mark.parametrize("config", [DVAEConfig, DALLEConfig])
def test_an_unknown_preset_names_the_known(config):
    with pytest.raises(UserError, match=r"unknown (dVAE|transformer) preset 'huge'; expected one of tiny, .*, 12b"):
        config.preset("huge")


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (DALLEConfig, {"head_dim": 0}, r"DALLEConfig\.head_dim: expected a positive whole number .*, got 0"),
        (DALLEConfig, {"kernel_size": 4}, r"DALLEConfig\.kernel_size: expected an odd number, got 4"),
        (DALLEConfig, {"layers": 10**9}, r"layers: expected a positive whole number of at most 1024, got 1000000000"),
        (DALLEConfig, {"heads": True}, "heads: expected a positive whole number"),
        (DALLEConfig, {"dim": 3.5}, "dim: expected a positive whole number .*, got 3.5"),
        (DALLEConfig, {"grid": 7}, "grid: expected two whole numbers"),
        (DALLEConfig, {"grid": [8]}, "grid: expected two whole numbers"),
        (DALLEConfig, {"grid": [8, 0]}, "grid: expected two whole numbers"),
        (DALLEConfig, {"depth": 3}, "unknown setting depth; expected some of text_len"),
        (DVAEConfig, {"n_hid": 6}, "n_hid: expected a multiple of 4"),
        (DVAEConfig, {"image_size": 60}, "image_size: expected a multiple of the downsampling factor 8, got 60"),
        (DVAEConfig, {"vocab_size": "many"}, "vocab_size: expected a positive whole number .*, got 'many'"),
        (DVAEConfig, {"group_count": 60}, "group_count: expected a positive whole number of at most 16, got 60"),
    ],
)
def test_impossible_sizes_are_one_sentence(config, values, message):
    with pytest.raises(UserError, match=message) as caught:
        config.from_dict(values)
    assert "\n" not in str(caught.value)
