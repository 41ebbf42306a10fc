"""Training runs: exact resumption, interruption, a full disk, and the mistakes that a run refuses."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from dalle.checkpoint import check_dvae, load_dalle, load_dvae, to_safetensors
from dalle.cli import main
from dalle.config import DALLEConfig, DVAEConfig
from dalle.data import open_dataset
from dalle.errors import UserError
from dalle.files import atomic_write_folder
from dalle.tokenizer import Tokenizer
from dalle.train.dalle import DALLEStage, DALLETraining
from dalle.train.dvae import DVAEStage, DVAETraining
from dalle.train.journal import Journal
from dalle.train.loop import RunSettings, _one_update, latest_checkpoint, run
from dalle.train.team import Alone
from dalle.train.telemetry import Telemetry

QUIET = RunSettings(log_every=1, picture_every=0, checkpoint_every=3, keep_checkpoints=2)
DVAE_CONFIG = DVAEConfig.preset("tiny")
DALLE_CONFIG = DALLEConfig.preset("tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of sixteen captioned pictures, 24x16 to 40x32 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for index in range(16):
        pixels = draw.integers(0, 256, (16 + index, 24 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"a picture of number {index} in noise style")
    return folder


def dvae_stage(pictures, **settings):
    training = DVAETraining(**{"updates": 7, "batch_size": 3, "temperature_fraction": 1.0, **settings})
    return DVAEStage(DVAE_CONFIG, training, open_dataset(pictures))


@pytest.fixture(scope="module")
def trained_dvae(pictures, tmp_path_factory):
    return run(dvae_stage(pictures, stored_dtype="float16"), tmp_path_factory.mktemp("stage1") / "run", QUIET)


def dalle_stage(pictures, dvae, folder, **settings):
    training = DALLETraining(**{"updates": 7, "batch_size": 3, "average_every": 2, **settings})
    return DALLEStage(DALLE_CONFIG, training, open_dataset(pictures), dvae, folder / "cache")


def interrupt_after(stage, updates, number=signal.SIGINT):
    """Send this process SIGINT, as Ctrl-C does, or another signal, from inside the given update."""
    loss = stage.loss

    def interrupting(update):
        if update == updates - 1:
            os.kill(os.getpid(), number)
        return loss(update)

    stage.loss = interrupting
    return stage


def final_tensors(folder):
    return load_file(latest_checkpoint(folder) / "training.safetensors")


CLOCKED = {"seconds", "tokens_per_second", "share_of_peak"}
"""What the log says of the time, which no two runs share."""


def timeless(folder):
    return [{name: value for name, value in entry.items() if name not in CLOCKED} for entry in log(folder)]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("which", ["dvae", "dalle"])
def test_interrupted_and_resumed_equals_uninterrupted(which, pictures, trained_dvae, tmp_path):
    def stage():
        if which == "dvae":
            return dvae_stage(pictures, code_sharpness=2.0)
        # A window of one update makes the plateau rule act, so its state matters to the numbers.
        return dalle_stage(pictures, trained_dvae, tmp_path, plateau_fraction=1 / 7, crops=2)

    run(stage(), tmp_path / "whole", QUIET)
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_after(stage(), 5), tmp_path / "parts", QUIET)
    assert latest_checkpoint(tmp_path / "parts").name == "update-00000005"
    run(stage(), tmp_path / "parts", QUIET, resume=True)

    whole, parts = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert any(name.startswith("optimizer.") for name in whole) and any(name.startswith("average.") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    for path in (tmp_path / "whole" / "model").iterdir():
        if path.suffix != ".json":  # The description holds the wall-clock time.
            assert path.read_bytes() == (tmp_path / "parts" / "model" / path.name).read_bytes()
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_a_log_after_the_checkpoint_is_made_again_once(pictures, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_after(dvae_stage(pictures), 4, signal.SIGTERM), tmp_path, QUIET)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"update": 5, "loss": 0.0}\n')
    for killed in (".update-00000006.123.tmp", ".update-00000006.saving"):  # as a process or several leave them
        (tmp_path / "checkpoints" / killed / "shards").mkdir(parents=True)
    run(dvae_stage(pictures), tmp_path, QUIET, resume=True)
    assert [entry["update"] for entry in log(tmp_path)] == list(range(1, 8))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_the_log_averages_over_an_interruption(pictures, tmp_path):
    every = RunSettings(log_every=3, picture_every=0, checkpoint_every=100)
    run(dvae_stage(pictures), tmp_path / "whole", every)
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_after(dvae_stage(pictures), 5), tmp_path / "parts", every)
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:
        file.write('null\n{"loss": 1.0}\n{"update": 4, "lo')
    run(dvae_stage(pictures), tmp_path / "parts", every, resume=True)
    whole, parts = timeless(tmp_path / "whole"), timeless(tmp_path / "parts")
    assert whole == parts and [entry["update"] for entry in parts] == [3, 6, 7]


def test_only_the_last_checkpoints_are_kept(pictures, tmp_path):
    run(dvae_stage(pictures), tmp_path, QUIET)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["update-00000006", "update-00000007"]


def test_updates_go_on_while_a_checkpoint_is_written(pictures, tmp_path, monkeypatch):
    stage = dvae_stage(pictures, updates=4)
    loss, later, writing = stage.loss, threading.Event(), atomic_write_folder

    def noted(update):
        if update == 3:
            later.set()
        return loss(update)

    def write(folder, files):
        assert later.wait(60), "the update after the checkpoint's has begun"
        writing(folder, files)

    stage.loss = noted
    monkeypatch.setattr("dalle.train.checkpoints.atomic_write_folder", write)
    run(stage, tmp_path, QUIET)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["update-00000003", "update-00000004"]


def test_a_full_disk_loses_nothing(pictures, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_after(dvae_stage(pictures), 3), tmp_path, QUIET)
    before = {path.name: path.read_bytes() for path in latest_checkpoint(tmp_path).iterdir()}
    real_open = builtins.open

    def full_disk(path, mode="r", *args, **kwargs):
        if "w" in mode and "training.safetensors" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full_disk)
    with pytest.raises(UserError, match="No space left on device; nothing that was there before is lost"):
        run(dvae_stage(pictures), tmp_path, QUIET, resume=True)
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in latest_checkpoint(tmp_path).iterdir()}
    assert after == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["update-00000003"]
    run(dvae_stage(pictures), tmp_path, QUIET, resume=True)


def test_runs_are_neither_overwritten_nor_mixed(pictures, trained_dvae, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        run(dvae_stage(pictures), tmp_path, QUIET, resume=True)
    run(dvae_stage(pictures, updates=3), tmp_path, QUIET)
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        run(dvae_stage(pictures, updates=3), tmp_path, QUIET)
    with pytest.raises(UserError, match=r"its training.kl_weight is 6.6, this command's is 1.0"):
        run(dvae_stage(pictures, updates=3, kl_weight=1.0), tmp_path, QUIET, resume=True)
    with pytest.raises(UserError, match="of another stage, a run of dvae, where this command trains dalle"):
        run(dalle_stage(pictures, trained_dvae, tmp_path), tmp_path, QUIET, resume=True)


def test_a_run_of_before_a_setting_resumes_at_its_default(pictures, trained_dvae, tmp_path):
    def stage(**settings):
        return dalle_stage(pictures, trained_dvae, tmp_path, updates=4, **settings)

    every = RunSettings(log_every=1, picture_every=0, checkpoint_every=2)
    run(stage(), tmp_path / "whole", every)
    old = shutil.copytree(tmp_path / "whole", tmp_path / "old")
    shutil.rmtree(old / "checkpoints" / "update-00000004")
    path = latest_checkpoint(old) / "checkpoint.json"
    description = json.loads(path.read_text())
    for name in ("precision", "optimizer", "stochastic_rounding", "compression_rank", "p_divisor", "q_divisor"):
        del description["identity"]["training"][name]
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"its training\.optimizer is 'adamw', this command's is 'adamw16'"):
        run(stage(optimizer="adamw16"), old, every, resume=True)
    run(stage(), old, every, resume=True)
    whole, resumed = final_tensors(tmp_path / "whole"), final_tensors(old)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_damaged_checkpoint_is_refused(pictures, tmp_path):
    run(dvae_stage(pictures, updates=3), tmp_path, QUIET)
    path = latest_checkpoint(tmp_path) / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        run(dvae_stage(pictures, updates=3), tmp_path, QUIET, resume=True)


def test_a_checkpoint_is_exported_as_the_run_would_have_ended(trained_dvae, pictures, tmp_path, capsys):
    def export(folder, *others):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        status = main(["export", str(folder), str(tmp_path / "model"), *map(str, others)])
        return capsys.readouterr().err if status else ""

    for folder in (trained_dvae.parent, latest_checkpoint(trained_dvae.parent)):
        assert not export(folder)
        exported, ended = ((path / "dvae.safetensors").read_bytes() for path in (tmp_path / "model", trained_dvae))
        assert exported == ended and load_dvae(tmp_path / "model").config == DVAE_CONFIG
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_after(dalle_stage(pictures, trained_dvae, tmp_path), 2), tmp_path / "begun", QUIET)
    assert not export(tmp_path / "begun", "--dvae", trained_dvae)
    model, average = load_dalle(tmp_path / "model")[0], final_tensors(tmp_path / "begun")
    assert all(torch.equal(tensor, average[f"average.{name}"]) for name, tensor in model.state_dict().items())

    assert "expected --dvae, the model folder that its run was given" in export(tmp_path / "begun")
    other = run(dvae_stage(pictures, updates=1, seed=1), tmp_path / "other", QUIET)
    assert "wrong dVAE for this transformer" in export(tmp_path / "begun", "--dvae", other)
    assert "expected a run folder with a checkpoint, or a checkpoint, got" in export(tmp_path / "cache")
    (latest_checkpoint(tmp_path / "begun") / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is truncated or was changed" in export(tmp_path / "begun", "--dvae", trained_dvae)
    path = latest_checkpoint(other.parent) / "checkpoint.json"
    description = json.loads(path.read_text())
    del description["identity"]["training"]
    path.write_text(json.dumps(description))
    assert "checkpoint.json is damaged: expected what it says of the run" in export(other.parent)


def test_a_loss_that_is_not_finite_stops_the_run(pictures, tmp_path):
    stage = dvae_stage(pictures)
    loss = stage.loss

    def diverging(update):
        value, figures = loss(update)
        return (value * float("nan") if update == 4 else value), figures

    stage.loss = diverging
    with pytest.raises(UserError, match="the loss became nan in update 5"):
        run(stage, tmp_path, QUIET)
    assert latest_checkpoint(tmp_path).name == "update-00000003"


def test_no_checkpoint_holds_parameters_that_are_not_finite(pictures, tmp_path):
    # The gradient alone is bad, in the very update that a checkpoint follows and long before the next line of the log.
    stage = dvae_stage(pictures)
    loss = stage.loss

    def diverging(update):
        value, figures = loss(update)
        if update == 3:
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value, figures

    stage.loss = diverging
    every = RunSettings(log_every=100, picture_every=0, checkpoint_every=1, keep_checkpoints=1)
    with pytest.raises(UserError, match=r"the gradient norm became (nan|inf) in update 4"):
        run(stage, tmp_path, every)
    assert latest_checkpoint(tmp_path).name == "update-00000003"
    assert all(tensor.isfinite().all() for tensor in final_tensors(tmp_path).values())


@pytest.fixture
def late(monkeypatch):
    """As on a GPU, figures are read some updates later."""
    monkeypatch.setattr("dalle.train.journal.lag_on", lambda device: 3)


def test_figures_that_are_read_late_give_the_same_numbers_and_log(pictures, trained_dvae, tmp_path, monkeypatch):
    every = RunSettings(log_every=2, picture_every=0, checkpoint_every=5)
    for name, lag in (("at once", 0), ("late", 3)):
        monkeypatch.setattr("dalle.train.journal.lag_on", lambda device, lag=lag: lag)
        stage = dalle_stage(pictures, trained_dvae, tmp_path, plateau_fraction=2 / 7)
        stage.plateau.threshold = 1.0  # no window is good enough
        run(stage, tmp_path / name, every)
    once, late = timeless(tmp_path / "at once"), timeless(tmp_path / "late")
    assert once == late and [entry["update"] for entry in late] == [2, 4, 6, 7]
    assert once[-1]["learning_rate"] < once[0]["learning_rate"]
    once, late = final_tensors(tmp_path / "at once"), final_tensors(tmp_path / "late")
    assert all(torch.equal(tensor, late[name]) for name, tensor in once.items())


def test_an_interruption_that_is_read_late_stops_later_and_loses_nothing(pictures, tmp_path, late):
    def stage():
        return dvae_stage(pictures, batch_size=1)

    every = RunSettings(log_every=1, picture_every=0, checkpoint_every=100)
    run(stage(), tmp_path / "whole", every)
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_after(stage(), 2), tmp_path / "parts", every)
    assert latest_checkpoint(tmp_path / "parts").name == "update-00000005"
    run(stage(), tmp_path / "parts", every, resume=True)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_updates_that_are_not_finite_change_nothing_until_that_is_read(pictures, tmp_path, late):
    stage = dvae_stage(pictures, batch_size=1)
    loss, before = stage.loss, {}

    def diverging(update):
        if update == 2:
            before.update({name: tensor.clone() for name, tensor in stage.model.state_dict().items()})
        value, figures = loss(update)
        return (value * float("nan") if update == 2 else value), figures

    stage.loss = diverging
    with pytest.raises(UserError, match="the loss became nan in update 3"):
        run(stage, tmp_path, RunSettings(log_every=100, picture_every=0, checkpoint_every=100))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_host_waits_for_no_update(precision, pictures, trained_dvae, tmp_path):
    settings = {"updates": 7, "batch_size": 3, "precision": precision, "optimizer": "adamw16"}
    images = open_dataset(pictures)
    stage = DALLEStage(
        DALLE_CONFIG, DALLETraining(**settings), images, trained_dvae, tmp_path / "cache", team=Alone("cuda")
    )
    journal = Journal(stage, tmp_path, [], tqdm(disable=True))
    telemetry = Telemetry(stage, peak=1e12)
    try:
        for update in range(1, 6):
            # What is made once may wait: kernels are compiled, memory is pinned.
            torch.cuda.set_sync_debug_mode("default" if update < 3 else "error")
            with telemetry.update():
                figures = _one_update(stage, update, lambda: False)
            journal.add(update, figures, telemetry.line())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    journal.catch_up()
    assert [entry["update"] for entry in log(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_changed_checkpoint_is_refused(pictures, tmp_path):
    run(dvae_stage(pictures, updates=3), tmp_path, QUIET)
    path = latest_checkpoint(tmp_path) / "training.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"training\.safetensors is truncated or was changed"):
        run(dvae_stage(pictures, updates=3), tmp_path, QUIET, resume=True)


def test_a_run_keeps_its_tokenizer_and_its_dvae(pictures, trained_dvae, tmp_path):
    def stage(tokenizer=None, dvae=trained_dvae):
        images = open_dataset(pictures)
        training = DALLETraining(updates=3, batch_size=3)
        return DALLEStage(DALLE_CONFIG, training, images, dvae, tmp_path / "cache", tokenizer=tokenizer)

    tokenizer = Tokenizer.train(["another set of captions"] * 2, DALLE_CONFIG.text_vocab_size)
    run(stage(tokenizer), tmp_path / "run", QUIET)
    with pytest.raises(UserError, match="its tokenizer_sha256 is"):
        run(stage(), tmp_path / "run", QUIET, resume=True)
    with pytest.raises(UserError, match="wrong tokenizer for this transformer: expected a vocabulary of 300"):
        stage(Tokenizer.train(["a picture"], 301))

    moved = shutil.copytree(trained_dvae, tmp_path / "dvae")
    begun = stage(dvae=moved)
    shutil.rmtree(moved)
    shutil.copytree(run(dvae_stage(pictures, updates=1, seed=1), tmp_path / "other", QUIET), moved)
    with pytest.raises(UserError, match="no longer the one that this run began with"):
        run(begun, tmp_path / "begun", QUIET)
    assert latest_checkpoint(tmp_path / "begun").name == "update-00000003"


def test_processes_with_other_data_than_the_first_are_refused(pictures, trained_dvae, tmp_path):
    class Second(Alone):
        def from_leader(self, make):
            return "the first one's"

    images = open_dataset(pictures)
    with pytest.raises(UserError, match="expected the same data in all processes, got other files or captions than"):
        DALLEStage(DALLE_CONFIG, DALLETraining(updates=1), images, trained_dvae, tmp_path, team=Second())


def test_too_few_images_for_the_codes_are_one_sentence(pictures):
    images = open_dataset(pictures)
    images.samples = images.samples[:3]
    with pytest.raises(UserError, match="at least 64 patches to start the codes from, got 48; give more images"):
        DVAEStage(DVAE_CONFIG, DVAETraining(updates=1, code_sharpness=1.0), images)


def test_the_transformer_is_bound_to_its_dvae(pictures, trained_dvae, tmp_path):
    model_folder = run(dalle_stage(pictures, trained_dvae, tmp_path, updates=1), tmp_path / "run", QUIET)
    model, tokenizer = load_dalle(model_folder)
    assert model.config == DALLE_CONFIG and tokenizer.vocab_size == DALLE_CONFIG.text_vocab_size
    assert load_dvae(model_folder).config == DVAE_CONFIG
    check_dvae(model_folder, trained_dvae)
    other = run(dvae_stage(pictures, updates=1, seed=1), tmp_path / "other", QUIET)
    with pytest.raises(UserError, match="wrong dVAE for this transformer"):
        check_dvae(model_folder, other)
    larger = DALLEConfig.from_dict({**DALLE_CONFIG.to_dict(), "grid": [8, 8]})
    with pytest.raises(UserError, match=r"wrong dVAE for this transformer: expected a grid of \(8, 8\)"):
        DALLEStage(larger, DALLETraining(updates=1), open_dataset(pictures), trained_dvae, tmp_path)


def test_tokens_are_encoded_once(pictures, trained_dvae, tmp_path, monkeypatch):
    first = dalle_stage(pictures, trained_dvae, tmp_path).tokens
    monkeypatch.setattr("dalle.dvae.DVAE.encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(dalle_stage(pictures, trained_dvae, tmp_path).tokens, first)
    assert first.shape == (16, 1, DALLE_CONFIG.image_len)


def test_damaged_tokens_are_encoded_again(pictures, trained_dvae, tmp_path):
    first = dalle_stage(pictures, trained_dvae, tmp_path).tokens
    (cached,) = (tmp_path / "cache").iterdir()
    content = cached.read_bytes()
    for damaged in (content[:50], to_safetensors({"tokens": first[:3]}), to_safetensors({"other": first})):
        cached.write_bytes(damaged)
        assert torch.equal(dalle_stage(pictures, trained_dvae, tmp_path).tokens, first)
        assert cached.read_bytes() == content
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        dalle_stage(pictures, trained_dvae, tmp_path / "file")


def test_the_loop_runs_outside_the_main_thread(pictures, tmp_path):
    thread = threading.Thread(target=run, args=(dvae_stage(pictures, updates=1), tmp_path, QUIET))
    thread.start()
    thread.join()
    assert (tmp_path / "model" / "dvae.json").exists()
