"""``dalle generate`` from a model folder to a PNG, and one sentence for what a user may get wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from PIL import Image

from dalle.checkpoint import dalle_files, save_dvae
from dalle.cli import main
from dalle.config import DALLEConfig, DVAEConfig
from dalle.dvae import DVAE
from dalle.files import atomic_write_folder
from dalle.tokenizer import Tokenizer
from dalle.transformer import DALLE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder of the tiny presets, untrained."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    save_dvae(root / "dvae", DVAE(DVAEConfig.preset("tiny")))
    config = dataclasses.replace(DALLEConfig.preset("tiny"), text_len=20)
    tokenizer = Tokenizer.train(["red apple"] * 2, config.text_vocab_size)
    atomic_write_folder(root / "dalle", dalle_files(DALLE(config), tokenizer, root / "dvae"))
    return root / "dalle"


def test_it_writes_the_picture_and_the_tokens(folder, tmp_path, capsys):
    out, tokens = tmp_path / "out.png", tmp_path / "tokens.safetensors"
    command = ["generate", "red apple", "a cat", "--checkpoint", str(folder), "--samples", "3", "--top-p", "0.9"]
    assert main([*command, "-o", str(out), "--tokens-out", str(tokens)]) == 0
    assert str(out) in capsys.readouterr().out
    first = numpy.asarray(Image.open(out))
    drawn = safetensors.torch.load_file(tokens)["tokens"]
    assert drawn.shape == (2, 3, 4, 4)
    main([*command, "-o", str(out)])
    assert numpy.array_equal(first, numpy.asarray(Image.open(out)))
    main([*command, "-o", str(out), "--seed", "1"])
    assert not numpy.array_equal(first, numpy.asarray(Image.open(out)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "tokens.safetensors"]


def test_given_rows_are_kept(folder, tmp_path):
    image = tmp_path / "image.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(image)
    out = str(tmp_path / "out.png")
    command = ["generate", "red apple", "--checkpoint", str(folder), "-o", out, "--prime", str(image)]
    tokens = []
    for extra in ([], ["--seed", "1"], ["--seed", "1", "--prime-rows", "3"]):
        assert main([*command, *extra, "--tokens-out", str(tmp_path / "tokens")]) == 0
        tokens.append(safetensors.torch.load_file(tmp_path / "tokens")["tokens"])
    assert torch.equal(tokens[0][:, :, :2], tokens[1][:, :, :2]) and not torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[2][:, :, :2], tokens[1][:, :, :2]) and (tokens[2][0, :, :3] == tokens[2][0, :1, :3]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "at least one character"),
        (["apple " * 60], "at most 20 tokens"),
        (["a", "--samples", "0"], "at least 1, got 0"),
        (["a", "--temperature", "-1"], "temperature"),
        (["a", "--top-k", "0"], "top-k"),
        (["a", "--seed", "-1"], "seed"),
        (["a", "--scale", "0"], "scale"),
        (["a", "--device", "abacus"], "abacus"),
        (["a", "--device", "meta"], "--device: expected cpu, cuda or cuda:N of a GPU that is there, got 'meta'"),
        (["a", "--prime-rows", "2"], "--prime IMAGE"),
        (["a", "--prime", "missing.png"], "missing.png"),
        (["a", "--prime", __file__], "not a PNG"),
        (["a", "--tokens-out", "missing/tokens"], "no folder missing"),
        (["a", "--tokens-out", "."], "it is a folder"),
        (["a", "--checkpoint", "missing"], "missing"),
    ],
)
def test_mistakes_end_in_one_sentence_and_no_file(folder, tmp_path, capsys, arguments, message):
    out = tmp_path / "out.png"
    assert main(["generate", "--checkpoint", str(folder), "-o", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle: error: ") and message in error and error.count("\n") == 1
    assert not out.exists()


def test_tokens_do_not_take_the_place_of_the_picture(folder, tmp_path, capsys):
    (tmp_path / "link").symlink_to("out")
    command = ["generate", "a", "--checkpoint", str(folder), "-o", str(tmp_path / "out")]
    assert main([*command, "--tokens-out", str(tmp_path / "link")]) == 2
    assert "expected another file for --tokens-out than for the picture" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.png"
    out.write_bytes(b"the picture before")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert main(["generate", "red apple", "--checkpoint", str(folder), "-o", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert out.read_bytes() == b"the picture before" and len(list(tmp_path.iterdir())) == 1
