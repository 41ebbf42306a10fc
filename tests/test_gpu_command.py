"""What `make gpu` goes by, on a machine without a GPU: its clock, its logs and the names of tests that failed."""

from __future__ import annotations

import sys
import time

import gpu
import pytest

FAILING = """
import time

def test_good():
    pass

def test_bad():
    assert 1 + 1 == 3

def test_long():
    time.sleep(600)
"""


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")


def test_a_run_that_its_time_ends_has_named_what_failed(tmp_path, logs, monkeypatch, capfd):
    (tmp_path / "test_failing.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", str(gpu.ROOT / "bench"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "failures_at_once")
    budget = gpu.Budget(60, time.time())
    begin = time.monotonic()
    assert not budget.run("tests", *pytest_, "test_failing.py", seconds=4)
    assert time.monotonic() - begin < 40
    assert [line.partition(" - ")[0] for line in gpu.failures("tests")] == ["FAILED test_failing.py::test_bad (call)"]
    assert "stopped: the time is over" in capfd.readouterr().out


def test_time_counts_from_when_the_build_began(logs):
    budget = gpu.Budget(100, time.time() - 90)
    assert 5 < budget.left <= 10
    assert gpu.Budget(100, time.time() - 200).left == 1.0
    assert budget.run("fine", sys.executable, "-c", "print('done')")
    assert gpu.log("fine").read_text() == "done\n" and gpu.failures("fine") == [] == gpu.failures("never run")


def test_each_family_gets_its_share_of_the_time(monkeypatch):
    taken = {}

    class Budget:
        left = 240.0

        def run(self, name, *command, seconds):
            share = float(command[-1].removeprefix("--seconds="))
            taken[name] = share
            self.left -= min(share, 1e9 if name == "a" else 10)
            return name != "b"

    assert gpu.measure(Budget(), list("abcd")) == ["b"]
    assert taken == {"a": 120, "b": 80, "c": 110, "d": 100}


def test_a_missing_sanitizer_is_not_passed(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    (missing,) = gpu.sanitize(gpu.Budget(1, time.time()))
    assert missing == "memcheck, racecheck, synccheck (compute-sanitizer is not installed)"
