"""The tokenizer: any text survives, dropout is seeded and has the right statistics, padding has an id per position."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.errors import UserError
from dalle.tokenizer import BYTES, Tokenizer

STYLES = ("noto style", "fluent style", "flat style")
THINGS = ("red apple", "green apple", "roller coaster", "grinning cat", "house with garden", "Café au lait", "snowman")
CAPTIONS = [f"{thing}, {style}" for thing in THINGS for style in STYLES]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=320)


def test_training_learns_merges_and_is_reproducible(tokenizer):
    again = Tokenizer.train(CAPTIONS, vocab_size=320)
    assert again.to_json() == tokenizer.to_json()
    assert len(tokenizer.library.get_vocab()) == 320
    caption = "red apple, noto style"
    assert len(tokenizer.encode(caption)) < len(caption) // 3


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), dropout=st.sampled_from([0.0, 0.1, 0.9]), seed=st.integers(0, 99))
def test_any_text_survives_the_round_trip(tokenizer, text, dropout, seed):
    expected = tokenizer.normalize(text)
    if not expected:
        with pytest.raises(UserError, match="at least one character"):
            tokenizer.encode(text)
        return
    ids = tokenizer.encode(text, dropout, random.Random(seed))
    assert tokenizer.decode(ids) == expected
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_text_is_lowercased_and_stripped(tokenizer):
    assert tokenizer.encode("  RED\t apple \n") == tokenizer.encode("red apple")
    assert tokenizer.encode("ﬁsh") == tokenizer.encode("fish")


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aeplrstocn ,dhougé✓"), min_size=1, max_size=60))
def test_own_merge_loop_equals_the_library_without_dropout(tokenizer, text):
    normalized = tokenizer.normalize(text)
    if not normalized:
        return
    words = tokenizer.library.pre_tokenizer.pre_tokenize_str(normalized)
    generator = random.Random(0)
    tokens = [token for word, _ in words for token in tokenizer._merge(word, 0.0, generator)]
    assert tokens == tokenizer.library.encode(normalized).tokens


def test_dropout_is_reproducible_with_a_generator(tokenizer):
    def draw(seed):
        return tokenizer.encode_batch(CAPTIONS, 64, dropout=0.3, generator=random.Random(seed))

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


def test_dropout_passes_over_a_merge_at_its_rate():
    # One merge only, so that a word is cut exactly when that merge is passed over.
    alphabet = sorted(Tokenizer.train([], 256).library.get_vocab())
    tokenizer = Tokenizer([*alphabet, "ab"], [("a", "b")], vocab_size=257)
    generator = random.Random(1)
    rate, count = 0.1, 4000
    cut = sum(len(tokenizer.encode("ab", rate, generator)) == 3 for _ in range(count))  # " ", "a", "b"
    assert len(tokenizer.encode("ab")) == 2
    assert abs(cut / count - rate) < 4 * (rate * (1 - rate) / count) ** 0.5


def test_padding_has_an_id_per_position(tokenizer):
    ids = tokenizer.encode("red apple")
    batch = tokenizer.encode_batch(["red apple", "snowman, flat style"], 24)
    assert batch.shape == (2, 24) and batch.dtype == torch.int64
    assert batch[0, : len(ids)].tolist() == ids
    assert batch[0, len(ids) :].tolist() == [320 + position for position in range(len(ids), 24)]
    assert tokenizer.decode(batch[1]) == "snowman, flat style"
    assert tokenizer.encode_batch([], 24).shape == (0, 24)


def test_padding_ids_do_not_depend_on_how_much_was_learned():
    tokenizer = Tokenizer.train(["tiny"], vocab_size=1000)
    assert len(tokenizer.library.get_vocab()) < 1000
    assert tokenizer.encode_batch(["a"], 16)[0, -1] == 1000 + 15


def test_over_long_text_names_the_count_and_the_limit(tokenizer):
    text = "house with garden, " * 8
    count = len(tokenizer.encode(text))
    with pytest.raises(UserError, match=rf"at most 4 tokens, got {count}"):
        tokenizer.encode_batch([text], 4)
    assert tokenizer.encode_batch([text], 4, truncate=True).tolist() == [tokenizer.encode(text)[:4]]


@pytest.mark.parametrize("text", ["", " \n\t", "\u3000"])
def test_empty_text_is_refused(tokenizer, text):
    with pytest.raises(UserError, match="at least one character"):
        tokenizer.encode_batch([text], 8)


def test_bad_arguments_are_refused(tokenizer):
    with pytest.raises(UserError, match="dropout"):
        tokenizer.encode("apple", dropout=1.0)
    with pytest.raises(UserError, match="valid Unicode"):
        tokenizer.encode("apple \udc80")
    with pytest.raises(UserError, match="str"):
        tokenizer.encode(7)
    with pytest.raises(UserError, match=f"at least {BYTES}"):
        Tokenizer.train(CAPTIONS, vocab_size=100)


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert [loaded.encode(caption) for caption in CAPTIONS] == [tokenizer.encode(caption) for caption in CAPTIONS]
    assert loaded.encode(CAPTIONS[0], 0.5, random.Random(3)) == tokenizer.encode(CAPTIONS[0], 0.5, random.Random(3))


def _edit(**changes):
    def damage(text: str) -> str:
        return json.dumps(json.loads(text) | changes)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: "\x00\xff" * 40,
        _edit(format="another"),
        _edit(vocab_size="320"),
        _edit(vocab_size=12),
        _edit(vocabulary=["a"] * 300),
        _edit(vocabulary=[f"word {index}" for index in range(300)]),
        _edit(merges=[["a", "missing"]]),
        _edit(merges=[["a"]]),
        _edit(merges=7),
    ],
)
def test_damaged_file_is_refused_by_name(tokenizer, tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    path.write_text(damage(tokenizer.to_json()), encoding="latin-1", errors="ignore")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_missing_and_oversized_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path / "missing.json")
    monkeypatch.setattr("dalle.tokenizer.MAX_FILE_BYTES", 10)
    (tmp_path / "large.json").write_text("x" * 11)
    with pytest.raises(UserError, match="at most 10 bytes"):
        Tokenizer.load(tmp_path / "large.json")
