"""``dalle plot`` draws each figure that a log holds where it belongs, and says what is wrong with a log."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import plot
from dalle.cli import main
from dalle.errors import UserError
from dalle.plot import plot_log
from dalle.train.telemetry import exponent_counts, exponent_shares

pytest.importorskip("matplotlib")


def record(update: int) -> dict:
    draw = torch.Generator().manual_seed(update)
    return {
        "update": update,
        "loss": 5 / update,
        "text_loss": 6 / update,
        "image_loss": 4 / update,
        "learning_rate": 1e-3,
        "gradient_norm": 100 / update**2,
        "scales": [2.0**13 * block * update for block in (1, 2, 3)],
        "gradient_exponents": exponent_shares(exponent_counts([torch.randn(999, generator=draw) * 1e-6]).tolist()),
        "skipped_updates": 0.25,
        "bytes_sent": 3_000_000,
        "tokens_per_second": 1e6,
        "share_of_peak": 0.5,
        "seconds": 7200.0 * update,
    }


def write(path, records, rest=""):
    path.write_text("\n".join(map(json.dumps, records)) + "\n" + rest)
    return path


def drawn(log, monkeypatch):
    """The figure of a log."""
    figures = []
    png = plot.figure_png
    monkeypatch.setattr(plot, "figure_png", lambda figure: figures.append(figure) or png(figure))
    picture = Image.open(io.BytesIO(plot_log(log)))
    assert picture.format == "PNG" and picture.width > 1000
    return figures[0]


def panels(figure):
    return {axes.get_title().partition(" (")[0]: axes for axes in figure.axes if axes.get_title()}


def test_all_that_is_logged_is_drawn(tmp_path, monkeypatch):
    records = [record(update) for update in range(1, 30)]
    records.append({"update": 20, "held_out_image_loss": 1.0})
    figure = drawn(write(tmp_path / "log.jsonl", records), monkeypatch)
    assert figure.get_suptitle() == f"{tmp_path.name}, 29 updates in 2 days, 10:00:00"
    found = panels(figure)
    assert list(found) == [
        "Loss",
        "Loss scales of the resblocks",
        "Exponents of the gradients",
        "Learning rate",
        "Gradient norm",
        "Speed",
        "Share of the devices' peak",
        "Skipped updates",
        "Sent by a process in an update",
    ]
    losses = {line.get_label(): line for line in found["Loss"].get_lines()}
    assert list(losses) == ["loss", "text loss", "image loss", "held out image loss"]
    assert np.array_equal(losses["loss"].get_xydata(), [(update, 5 / update) for update in range(1, 30)])
    assert losses["held out image loss"].get_xydata().tolist() == [[20, 1.0]]
    assert losses["image loss"].get_color() == losses["held out image loss"].get_color()
    scales = found["Loss scales of the resblocks"].get_lines()
    assert [line.get_ydata()[1] for line in scales] == [2.0**14, 2.0**15, 3 * 2.0**14]
    assert found["Gradient norm"].get_yscale() == "log"
    assert found["Share of the devices' peak"].get_lines()[0].get_ydata()[0] == 50
    assert found["Skipped updates"].get_lines()[0].get_ydata()[0] == 25
    assert all(axes.get_xlim() == (0, 29) for axes in found.values())


@pytest.mark.parametrize("lines", [1, 2, 7, 10, 11])
def test_exponents_stand_at_their_updates(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "MOST_COLUMNS", 4)
    spreads = [
        {"zeros": 0.0, "nonfinite": 0.0, "lowest": -30 + line % 3, "shares": [0.5, 0.5]} for line in range(lines)
    ]
    records = [{"update": 5 * (line + 1), "gradient_exponents": spread} for line, spread in enumerate(spreads)]
    axes = panels(drawn(write(tmp_path / "log.jsonl", records), monkeypatch))["Exponents of the gradients"]
    mesh = axes.collections[0]
    edges, exponents = mesh.get_coordinates()[0, :, 0], mesh.get_coordinates()[:, 0, 1]
    step = -(-lines // 4)
    assert edges.tolist() == [5 * (line + 1) for line in range(-1, lines - 1, step)] + [5 * lines] or lines == 1
    assert len(edges) == -(-lines // step) + 1 and exponents.tolist() == list(range(-30, -30 + min(lines, 3) + 2))
    shares = mesh.get_array()
    assert np.allclose(shares.sum(0), 100)
    first = spreads[:step]
    assert shares[0, 0] == pytest.approx(sum(50 for spread in first if spread["lowest"] == -30) / len(first))


def test_what_has_no_panel_of_its_own_gets_one(tmp_path, monkeypatch):
    records = [{"update": update, "kl_per_token": 1.0, "temperature": -0.5, "note": "none"} for update in (1, 2)]
    assert list(panels(drawn(write(tmp_path / "log.jsonl", records), monkeypatch))) == [
        "KL to the uniform prior",
        "Temperature",
    ]


def test_a_damaged_part_is_left_out(tmp_path, monkeypatch):
    records = [record(1), record(2)]
    records[0] |= {"scales": [1.0, "many"], "gradient_exponents": {"lowest": 0.5, "shares": [1]}, "loss": float("nan")}
    records.append({"update": 3, "gradient_exponents": {"lowest": -3, "shares": None}, "scales": 7})
    log = write(tmp_path / "log.jsonl", records, '[1]\n{"upd')
    found = panels(drawn(log, monkeypatch))
    assert [len(line.get_xdata()) for line in found["Loss scales of the resblocks"].get_lines()] == [1, 1, 1]
    assert [len(line.get_xdata()) for line in found["Loss"].get_lines()] == [2, 2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got an empty one"),
        ("no log\n[1, 2]\n", "got a damaged one: none of its lines is a JSON object with an update"),
        ('{"loss": 1.0}\n', "got a damaged one"),
        ('{"update": 3}\n', "expected figures beside the updates' numbers"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_explained(content, message, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    with pytest.raises(UserError, match=message):
        plot_log(log)


def test_the_command_takes_a_file_or_a_run(tmp_path, capsys):
    log = write(tmp_path / "log.jsonl", [record(1), record(2)])
    assert main(["plot", str(log)]) == main(["plot", str(tmp_path)]) == 0
    assert main(["plot", str(log), "-o", str(tmp_path / "other.png")]) == 0
    assert f"wrote {tmp_path / 'log.png'}" in capsys.readouterr().out
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("log.png", "other.png")]
    assert np.array_equal(*pixels)
    assert main(["plot", str(tmp_path / "none")]) == 2
    assert "cannot be read: No such file or directory" in capsys.readouterr().err
