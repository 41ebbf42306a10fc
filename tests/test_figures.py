"""The figures of training runs can be drawn: a few updates of each, from pictures of noise."""

from __future__ import annotations

import sys

import pytest
from PIL import Image
from test_train import pictures

from dalle.figures import __main__ as command

__all__ = ["pictures"]  # a fixture


@pytest.mark.parametrize("name", command.FIGURES)
def test_a_figure_of_a_few_updates(name, pictures, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(command.FIGURES[name].MODEL, "layers", 2)
    out = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["dalle.figures", name, str(pictures), str(out), "--updates", "3"])
    assert command.main() == 0
    assert Image.open(out).width > 900
    assert capsys.readouterr().out.splitlines()[-1] == str(out)


def test_what_stops_a_figure_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dalle.figures", "adamw16", str(tmp_path / "none"), str(tmp_path / "figure.png")])
    assert command.main() == 2
    assert capsys.readouterr().err.startswith("dalle.figures: error: ")

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.FIGURES["adamw16"], "draw", interrupted)
    assert command.main() == 130
    assert capsys.readouterr().err == "dalle.figures: interrupted\n"
    sys.argv[-1] = str(tmp_path / "none" / "figure.png")
    with pytest.raises(SystemExit):
        command.main()
    assert "expected a path in an existing folder, got" in capsys.readouterr().err
