"""Model folders: round trips, atomic writes, and every way in which files can be missing or damaged."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dalle.checkpoint as checkpoint
from dalle.cli import main
from dalle.config import DALLEConfig, DVAEConfig
from dalle.dvae import DVAE
from dalle.errors import UserError
from dalle.files import atomic_write, atomic_write_folder, sha256
from dalle.tokenizer import Tokenizer
from dalle.transformer import DALLE


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    dvae, dalle = DVAE(DVAEConfig.preset("tiny")), DALLE(DALLEConfig.preset("tiny"))
    tokenizer = Tokenizer.train(["a cat", "a dog"], dalle.config.text_vocab_size)
    checkpoint.save_dvae(tmp_path / "dvae", dvae, note={"data": "noise"})
    folder = tmp_path / "dalle"
    atomic_write_folder(folder, checkpoint.dalle_files(dalle, tokenizer, tmp_path / "dvae"))
    return folder, dvae, dalle, tokenizer


def test_models_come_back_bit_for_bit(model_folder):
    folder, dvae, dalle, tokenizer = model_folder
    loaded_dalle, loaded_tokenizer = checkpoint.load_dalle(folder)
    for model, loaded in ((dvae, checkpoint.load_dvae(folder)), (dalle, loaded_dalle)):
        assert not loaded.training and loaded.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded_tokenizer.to_json() == tokenizer.to_json()
    assert json.loads((folder / "dvae.json").read_text())["note"] == {"data": "noise"}


def test_sixteen_bit_weights_are_half_as_large_and_load_as_float32(tmp_path):
    dvae = DVAE(DVAEConfig.preset("tiny"))
    checkpoint.save_dvae(tmp_path / "full", dvae)
    checkpoint.save_dvae(tmp_path / "half", dvae, torch.float16)
    sizes = [(tmp_path / name / "dvae.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.65 * sizes[0]
    loaded = checkpoint.load_dvae(tmp_path / "half")
    for name, tensor in dvae.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())


@pytest.mark.parametrize("name", ["dalle.safetensors", "dvae.safetensors", "tokenizer.json", "dalle.json", "dvae.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_one_sentence(model_folder, name, damage, capsys):
    folder = model_folder[0]
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "truncated":
        (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        checkpoint.load_dvae(folder)
        checkpoint.load_dalle(folder)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    command = ["generate", "a cat", "--checkpoint", str(folder), "-o", str(folder / "out.png")]
    assert main(command) == 2
    assert name in capsys.readouterr().err and not (folder / "out.png").exists()


def test_weights_that_do_not_fit_the_config_are_named(model_folder):
    folder = model_folder[0]
    description = json.loads((folder / "dvae.json").read_text())
    description["config"]["n_init"] = 12
    (folder / "dvae.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"decoder\.blocks\.\S+ is expected as \("):
        checkpoint.load_dvae(folder)


def test_another_kind_or_format_is_refused(model_folder, tmp_path):
    folder = model_folder[0]
    (folder / "dvae.json").write_text((folder / "dalle.json").read_text())
    with pytest.raises(UserError, match="expected the description of a dvae model in format 1, got kind 'dalle'"):
        checkpoint.load_dvae(folder)
    (folder / "dvae.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_dvae(folder)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load_dvae(tmp_path / "absent")


def test_a_pickle_is_not_read_as_weights(model_folder):
    folder = model_folder[0]
    torch.save({"w": torch.ones(2)}, folder / "dvae.safetensors")
    description = json.loads((folder / "dvae.json").read_text())
    description["sha256"] = sha256((folder / "dvae.safetensors").read_bytes())
    (folder / "dvae.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="not a safetensors file"):
        checkpoint.load_dvae(folder)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    for wanted in (b"first", b"second"):  # the first time there is no such file
        link.unlink(missing_ok=True)
        link.symlink_to("target")
        atomic_write(link, wanted)
        assert link.is_symlink() and target.read_bytes() == wanted
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_bytes)
        atomic_write(pipe, b"told")
        assert read.result(30) == b"told" and pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_a_failed_folder_write_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    atomic_write_folder(folder, {"a": b"old"})
    replace = os.replace

    def fail_the_last(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_the_last)
    with pytest.raises(UserError, match="Input/output error"):
        atomic_write_folder(folder, {"a": b"new"})
    assert (folder / "a").read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    monkeypatch.undo()
    atomic_write_folder(folder, {"a": b"new", "b": b"new"})
    assert sorted(entry.name for entry in folder.iterdir()) == ["a", "b"]


def test_a_folder_that_holds_other_files_is_not_replaced(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"dear to somebody")
    with pytest.raises(UserError, match=r"already holds holiday\.png, which would be lost: choose another folder"):
        atomic_write_folder(tmp_path, {"dvae.json": b"{}"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.png"]
    with pytest.raises(UserError, match="Not a directory"):
        atomic_write_folder(tmp_path / "holiday.png", {"dvae.json": b"{}"})


@pytest.mark.parametrize("name", [".", "..", "", "x" * 300, "file/below"])
def test_paths_that_cannot_be_written_are_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(name, b"new")
    with pytest.raises(UserError):
        atomic_write_folder(name, {"a": b"new"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_interruption_leaves_no_litter(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "file", b"new")
    with pytest.raises(KeyboardInterrupt):
        atomic_write_folder(tmp_path / "folder", {"a": b"new"})
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_sixteen_bits_stay_finite(tmp_path):
    dvae = DVAE(DVAEConfig.preset("tiny"))
    with torch.no_grad():
        dvae.encoder.blocks["output"].conv.b.fill_(1e6)
    checkpoint.save_dvae(tmp_path / "half", dvae, torch.float16)
    loaded = checkpoint.load_dvae(tmp_path / "half")
    assert torch.equal(loaded.encoder.blocks["output"].conv.b, dvae.encoder.blocks["output"].conv.b)
    assert torch.equal(loaded.encoder.blocks["input"].w, dvae.encoder.blocks["input"].w.half().float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is damaged"),
        ({"config": None}, "is damaged: expected a config"),
        ({"sha256": None}, "is damaged: expected a config"),
        ({"config": {"n_hid": 4 * 10**9}}, "n_hid: expected a positive whole number of at most"),
        ({"config": {"n_hid": 2**19, "vocab_size": 2**20}}, "is expected as"),
        ({"config": {"width": 3}}, "unknown setting width"),
    ],
)
def test_hostile_descriptions_are_one_sentence(model_folder, content, message):
    path = model_folder[0] / "dvae.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        checkpoint.load_dvae(model_folder[0])


def test_an_unknown_shipped_checkpoint_names_the_known(tmp_path):
    with pytest.raises(UserError, match="no shipped checkpoint named 'photos'"):
        checkpoint.shipped("photos")


def test_a_transformer_with_the_dvae_of_another_is_refused(model_folder, capsys):
    folder = model_folder[0]
    for name, content in checkpoint.dvae_files(DVAE(DVAEConfig.preset("tiny"))).items():
        (folder / name).write_bytes(content)
    assert main(["generate", "a cat", "--checkpoint", str(folder), "-o", str(folder / "out.png")]) == 2
    error = capsys.readouterr().err
    assert "wrong dVAE for this transformer" in error and error.count("\n") == 1
