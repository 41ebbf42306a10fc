"""``dalle train-dvae`` and ``dalle train`` as commands: what they write, and what they say of a mistake."""

from __future__ import annotations

import pytest
from test_train import log, pictures

from dalle.cli import main

__all__ = ["pictures"]  # a fixture


def test_both_stages_learn_from_the_command_line(pictures, tmp_path, capsys):
    config = tmp_path / "tiny.toml"
    config.write_text(
        '[dvae]\npreset = "tiny"\nn_init = 16\n[dvae_training]\nbatch_size = 4\ncode_sharpness = 2.0\n'
        '[dalle]\npreset = "tiny"\ntext_len = 24\n[dalle_training]\nbatch_size = 4\n'
    )
    common = ["--data", str(pictures), "--config", str(config), "--log-every", "1", "--picture-every", "2"]
    assert main(["train-dvae", *common, "--out", str(tmp_path / "1"), "--updates", "2"]) == 0
    model = tmp_path / "1" / "model"
    arguments = ["train", *common, "--out", str(tmp_path / "2"), "--dvae", str(model)]
    assert main([*arguments, "--updates", "2"]) == 0
    printed = capsys.readouterr().out
    assert "16 images, none skipped" in printed and str(tmp_path / "2" / "model") in printed
    assert (tmp_path / "1" / "pictures" / "reconstructions-00000002.png").exists()
    assert (tmp_path / "2" / "pictures" / "samples-00000002.png").exists()
    assert {"loss", "image_loss", "text_loss", "learning_rate", "seconds"} <= log(tmp_path / "2")[0].keys()
    assert main([*arguments, "--updates", "2"]) == 2
    assert capsys.readouterr().err.startswith("dalle: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "unknown dVAE preset 'huge'; expected one of tiny"),
        (["--config", "absent.toml"], "cannot read the config file absent.toml: No such file"),
        (["--updates", "0"], "updates: expected a whole number of at least 1"),
        (["--learning-rate", "-1"], "learning_rate: expected a finite number of at least"),
        (["--learning-rate", "inf"], "learning_rate: expected a finite number of at least"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N of a GPU that is there, got 'tpu'"),
        (["--threads", "0"], "--threads: expected from 1 to 1024, got 0"),
        (["--threads", "100000"], "--threads: expected from 1 to 1024, got 100000"),
        (["--log-every", "0"], "log_every: expected a whole number of at least 1"),
    ],
)
def test_wrong_flags_are_one_sentence(arguments, message, pictures, tmp_path, capsys):
    command = ["train-dvae", "--data", str(pictures), "--out", str(tmp_path / "run"), "--updates", "1", *arguments]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle: error: ") and message in error and "Traceback" not in error


def test_wrong_config_files_are_one_sentence(tmp_path, pictures, capsys):
    config = tmp_path / "config.toml"
    for content, message in [
        ("[dvae]\nwidth = 3\n", "unknown setting width; expected some of image_size"),
        ("[model]\n", "unknown section model"),
        ('dvae = "tiny"\n', "expected dvae as a section, [dvae], got 'tiny'"),
        ("[[dvae_training]]\n", "expected dvae_training as a section, [dvae_training], got [{}]"),
        ("[dvae\n", "is not valid TOML"),
        ('[dvae_training]\nstored_dtype = "int8"\n', "stored_dtype: expected one of float32"),
    ]:
        config.write_text(content)
        command = ["train-dvae", "--data", str(pictures), "--out", str(tmp_path / "run"), "--config", str(config)]
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert main(["train-dvae", "--data", str(pictures), "--out", str(config)]) == 2
    assert f"cannot use the run folder {config}: Not a directory" in capsys.readouterr().err
