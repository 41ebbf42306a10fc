"""The ``dalle`` command as a whole: it answers at once, and ends as commands end when something is in its way."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dalle import cli
from dalle.cli import data, main
from dalle_kernels import _dispatch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_help_of_every_job_needs_nothing_heavy():
    program = """
import sys
from dalle.cli import build_parser
commands = next(action for action in build_parser()._actions if action.dest == "command")
for job in commands.choices.values():
    assert len(job.format_help()) > 100 and job.description[0].isupper() and job.description.endswith("."), job.prog
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "PIL", "dalle_kernels"}))
"""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.parametrize("argv", [[], ["paint"], ["data"], ["generate"], ["train", "--updates", "many"]])
def test_what_is_no_command_is_explained(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "dalle: interrupted"),
        (MemoryError(), 2, "dalle: error: there is not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "there is not enough memory"),
    ],
)
def test_what_stops_a_job_is_one_line(error, status, message, monkeypatch, capsys):
    def stop(_args):
        raise error

    monkeypatch.setattr(data, "run", stop)
    assert main(["data", "check", "somewhere"]) == status
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def stop(_args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(data, "run", stop)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["data", "check", "somewhere"])


def test_the_reader_may_leave(tmp_path):
    for index in range(3000):
        (tmp_path / f"{index}.png").write_bytes(b"")
    command = f"{sys.executable} -m dalle data check {tmp_path} --list | head -n 1"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_every_job_is_listed():
    folder = os.path.dirname(cli.__file__)
    shared = {"__init__.py", "training_arguments.py"}
    modules = {name for name in os.listdir(folder) if name.endswith(".py")} - shared
    assert modules == {f"{name}.py" for name in cli.JOBS}


@pytest.fixture
def environment_is_read_anew():
    """The provider that the environment forces is read once a process, which other tests have used."""
    _dispatch._provider_of_environment.cache_clear()
    yield
    _dispatch._provider_of_environment.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DALLE_KERNELS_PROVIDER", "fastest", "DALLE_KERNELS_PROVIDER: expected one of native, triton, reference"),
        ("DALLE_KERNELS_PROVIDER", "triton", "provider 'triton' was forced but"),
    ],
)
def test_a_provider_that_cannot_serve_is_one_sentence(
    monkeypatch, tmp_path, capsys, environment_is_read_anew, variable, value, message
):
    monkeypatch.setenv(variable, value)
    assert main(["demo", "-o", str(tmp_path / "demo.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle: error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "demo.png").exists()
