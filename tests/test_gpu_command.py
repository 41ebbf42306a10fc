"""What `make gpu` goes by, on a machine without a GPU: its clock, its logs and the names of tests that failed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import gpu
import pytest
import tune
from turns import Turns

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


def test_families_share_the_gpu_and_the_largest_has_it_alone(logs, monkeypatch):
    commands, published = {}, []

    class Budget:
        left = 200.0

        def run(self, name, *command, seconds):
            options = {option.partition("=")[0]: option.partition("=")[2] for option in command if "=" in option}
            commands[name] = {**options, "seconds": seconds}
            if name != "attention -k row":
                Path(options["--benchmark-json"]).write_text(json.dumps({"of": name}))
            self.left = 90.0 if name == "float16" else self.left
            return name != "attention -k row"

    monkeypatch.setattr(gpu, "MEASURED_AT_ONCE", 1)  # in order
    monkeypatch.setattr(gpu.compare, "publish", lambda reports: published.extend(report["of"] for report in reports))
    assert gpu.measure(Budget(), ["attention", "model", "float16"]) == ["attention -k row"]
    together = ["attention -k row", "attention -k column", "attention -k conv", "float16"]
    assert list(commands) == [*together, "model"]
    assert published == ["attention -k column", "attention -k conv", "float16", "model"]
    for name in together:
        assert commands[name]["seconds"] == 150 and commands[name]["--seconds"] == str(150 - gpu.OF_A_CASE)
    assert len({commands[name]["--turns"] for name in together}) == 1 and "--turns" not in commands["model"]
    assert commands["model"]["seconds"] == 90


def test_one_measures_while_nobody_prepares(tmp_path):
    """Threads stand for processes: a lock belongs to the file that each has opened."""
    active, faults, made, together = set(), [], [], threading.Barrier(4, timeout=30)

    @contextmanager
    def present(number):
        active.add(number)
        yield
        time.sleep(0.002)
        active.remove(number)

    def take_turns(number):
        turns = Turns(tmp_path / "gpu")
        for round_ in range(5):
            with turns.preparing():
                with present(number):
                    if round_ == 0:
                        together.wait()  # all of them prepare at once
                with turns.measuring(), present(number):
                    made.append(turns.once("peak", lambda: number))
                    faults.extend(active - {number})
                with present(number):
                    pass

    threads = [threading.Thread(target=take_turns, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults and not together.broken and len(made) == 20 and len(set(made)) == 1


def test_without_others_there_is_nothing_to_wait_for():
    turns = Turns(None)
    with turns.preparing(), turns.measuring():
        assert not turns.shared and turns.once("peak", lambda: 3) == 3


def test_a_missing_sanitizer_is_not_passed(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    (missing,) = gpu.sanitize(gpu.Budget(1, time.time()))
    assert missing == "memcheck, racecheck, synccheck (compute-sanitizer is not installed)"


def test_the_table_has_what_was_measured_since(tmp_path, monkeypatch):
    case = {
        "ours": "dalle_kernels", "family": "linear", "work": "forward", "dtype": "float32", "settings": {"rows": 3},
        "unit": "", "floor_ms": 1.0, "share_of_floor": 0.5,
        "candidates": {"dalle_kernels": {"median_ms": 2.0, "same_function": True}},
    }  # fmt: skip
    for name, device, written in (("old", "cuda", 100), ("new", "cuda", 300), ("processor", "cpu", 300)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"machine": {"device": device}, "cases": [{**case, "work": name}]}))
        os.utime(path, (written, written))
    monkeypatch.setattr(gpu.compare, "RESULTS", tmp_path)
    (line,) = gpu.table(200).splitlines()
    assert "new" in line and "2 ms" in line and "50% of the floor" in line
    assert gpu.table(400) == ""


def test_tuning_takes_turns_and_leaves_out_who_cannot_run(monkeypatch, capsys):
    calls, chosen = [], []

    @contextmanager
    def use_configuration(family, row, candidate):
        chosen.append(candidate)
        yield
        chosen.pop()

    def device_seconds(call, calls_at_once=1, host=0.0):
        if chosen[-1] == "large":
            raise RuntimeError("out of resource: shared memory\nand more")
        calls.append((chosen[-1], host))
        return {"slow": 2e-3, "fast": 1e-3}[chosen[-1]]

    monkeypatch.setattr(tune, "use_configuration", use_configuration)
    monkeypatch.setattr(tune, "device_seconds", device_seconds)
    monkeypatch.setattr(tune, "host_seconds", lambda candidate: 0.25)
    monkeypatch.setattr(tune, "described", str)
    assert tune.measure(lambda: None, ("linear", "row"), ["slow", "large", "fast"]) == {0: 2.0, 2: 1.0}
    assert "large: out of resource: shared memory\n" in capsys.readouterr().out
    rounds = calls[2:]
    assert rounds[:4] == [("slow", 0.25), ("fast", 0.25), ("fast", 0.25), ("slow", 0.25)]
    assert len(rounds) == 2 * tune.ROUNDS
    assert tune.measure(lambda: None, ("linear", "row"), ["large"]) == {}
