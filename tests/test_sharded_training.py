"""Training by several processes: the numbers of one process whatever the mesh, checkpoints for any number of them, and
a run that loses nothing when a process is killed.

"The same numbers" between meshes: the same samples in every update, and float32 sums in another order.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dalle.checkpoint import load_dalle
from dalle.cli import main
from dalle.config import DALLEConfig
from dalle.errors import UserError
from dalle.files import sha256_of_file
from dalle.plan import Job, plan_traffic
from dalle.train import shard_files, sharding
from dalle.train.checkpoints import latest_checkpoint, read_description
from dalle.train.collectives import sent_bytes
from dalle.train.dalle import DALLETraining
from dalle.train.sampling import EpochOrder
from dalle.train.team import ALONE, Alone, Compression
from dalle.train.torchrun import Team
from dalle.transformer import DALLE

TESTS = Path(__file__).parent
UPDATES = 5
MESHES = {"1x1": 1, "2x1": 2, "1x2": 2, "2x2": 4}

CONFIG = f"""
[dvae]
preset = "tiny"
[dvae_training]
batch_size = 4
[dalle]
preset = "tiny"
layers = 2
[dalle_training]
updates = {UPDATES}
batch_size = 4
average_every = 2
clip_norm = 2.5
warm_up_fraction = 0.3
plateau_fraction = 0.15
"""


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ``pictures``, ``config.toml`` and a trained ``dvae``."""
    place = tmp_path_factory.mktemp("place")
    (place / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for index in range(10):
        pixels = draw.integers(0, 256, (16 + index, 24 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "pictures" / f"{index:02d}.png")
        (place / "pictures" / f"{index:02d}.txt").write_text(f"a picture of number {index} in noise style")
    (place / "config.toml").write_text(CONFIG)
    (place / "half.toml").write_text(f'{CONFIG}precision = "float16"\noptimizer = "adamw16"\n')
    common = ["--data", str(place / "pictures"), "--config", str(place / "config.toml"), "--out", str(place / "dvae")]
    assert main(["train-dvae", *common, "--updates", "1", "--picture-every", "0"]) == 0
    return place


def arguments(place: Path, name: str, *others: str) -> list[str]:
    """The command that trains stage 2 in the run folder ``name``."""
    files = ("--data", place / "pictures", "--config", place / "config.toml", "--dvae", place / "dvae" / "model")
    driving = ("--out", place / name, "--device", "cpu", "--log-every", 1, "--picture-every", 0, "--peak-tflops", 1)
    return ["train", *map(str, (*files, *driving)), "--checkpoint-every", "3", *others]


@pytest.fixture(scope="module")
def said(place):
    """All runs but torchrun's own, in one start of Python; what each wrote to stderr, by the run folder's name."""
    jobs = {}

    def add(name: str, size: int, *others: str, **job) -> None:
        jobs[name] = {"size": size, "arguments": arguments(place, name, *others), **job}

    add("alone", 0)
    for mesh, size in MESHES.items():
        add(mesh, size, "--machines", mesh[0], "--picture-every", "5" if mesh == "2x2" else "0")
    add("stopped", 4, "--machines", "2", struck=[3, 3, signal.SIGINT], fails=True)
    for name, size in {"on 2x2": 4, "on 1x2": 2, "on one": 0}.items():
        add(name, size, "--resume", *(["--machines", name[3]] if size else []), begun=str(place / "stopped"))
    add("one stopped", 0, struck=[0, 3, signal.SIGINT], fails=True)
    add("one on 2x2", 4, "--resume", "--machines", "2", begun=str(place / "one stopped"))
    jobs["killed"] = {**jobs["1x2"], "arguments": arguments(place, "killed"), "struck": [1, 4, signal.SIGKILL]}
    jobs["restarted"] = {**jobs["1x2"], "arguments": arguments(place, "killed"), "restarts": 1}
    jobs["killed"]["fails"] = True
    compressed = ["--machines", "2", "--compression-rank", "8"]
    add("compressed", 4, *compressed)
    half = ["--config", str(place / "half.toml")]
    add("half alone", 0, *half, "--updates", "3")
    add("half 2x2", 4, *half, "--updates", "3", "--machines", "2")
    add("half stopped", 4, *half, *compressed, struck=[0, 3, signal.SIGINT], fails=True)
    add("half", 2, *half, *compressed, "--resume", begun=str(place / "half stopped"), told=True)
    add("three machines", 2, "--machines", "3", fails=True)
    add("no torchrun", 0, "--machines", "2", fails=True)
    stage_1 = ["train-dvae", "--data", str(place / "pictures"), "--out", str(place / "stage 1")]
    jobs["stage 1"] = {"size": 2, "arguments": stage_1, "fails": True}
    command = [sys.executable, str(TESTS / "worlds.py")]
    done = subprocess.run(
        command, input=json.dumps(list(jobs.values())), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, json.loads(done.stdout.splitlines()[-1])))


def losses(run: Path) -> list[dict[str, float]]:
    """What the log says of each update but its cost."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = ("update", "loss", "text_loss", "image_loss", "learning_rate", "gradient_norm")
    return [{name: entry[name] for name in names} for entry in entries]


def assert_same_numbers(run: Path, expected: Path) -> None:
    assert len(losses(run)) == len(losses(expected)) == UPDATES
    for entry, other in zip(losses(run), losses(expected)):
        assert entry == pytest.approx(other, rel=1e-5), (run.name, entry, other)
    weights, others = (load_file(folder / "model" / "dalle.safetensors") for folder in (run, expected))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, others[name], rtol=0, atol=1e-6), (run.name, name)


def assert_same_bits(run: Path, expected: Path) -> None:
    assert losses(run) == losses(expected)
    weights = [(folder / "model" / "dalle.safetensors").read_bytes() for folder in (run, expected)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_trains_to_the_numbers_of_one_process(mesh, place, said):
    assert_same_numbers(place / mesh, place / "alone")
    model, _ = load_dalle(place / mesh / "model")
    assert sum(p.numel() for p in model.parameters()) == sum(
        tensor.numel() for tensor in load_file(place / "alone" / "model" / "dalle.safetensors").values()
    )


def test_resblocks_in_16_bits_train_alike_on_a_mesh(place, said):
    """But for the sums of their gradients over processes, which are rounded to float16."""
    for entry, other in zip(losses(place / "half 2x2"), losses(place / "half alone"), strict=True):
        assert entry == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("name", ["on 2x2", "on 1x2", "on one", "one on 2x2"])
def test_a_checkpoint_is_for_any_number_of_processes(name, place, said):
    assert_same_numbers(place / name, place / "alone")


def test_the_same_mesh_resumes_to_the_same_bits(place, said):
    assert_same_bits(place / "on 2x2", place / "2x2")


@pytest.mark.parametrize("name", ["compressed", "half"])
def test_compressed_gradients_train_nearly_as_well(name, place, said):
    """On 2x2; and in 16 bits, stopped there after four updates, on to 2x1, which takes over the errors and scales."""
    compressed, exact = losses(place / name), losses(place / "alone")
    assert len(compressed) == len(exact) == UPDATES
    assert compressed[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-4)
    gained = exact[0]["loss"] - exact[-1]["loss"]
    assert 0 < abs(compressed[-1]["loss"] - exact[-1]["loss"]) < 0.1 * gained


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_errors_and_scales_are_taken_over(place, said):
    """By 2x1 from 2x2: the sums of the buffers, but for their rounding to 1-6-9, and scales that grew by 2^(1/1000)."""
    shards = latest_checkpoint(place / "half stopped") / "shards"
    saved = shard_files.read(shards, lambda _name, shape, dtype: torch.empty(shape, dtype=dtype), "error.")
    squares = {name.removeprefix("error."): total.square().sum().item() for name, total in saved.items()}
    taken = [json.loads(line.removeprefix("errors: ")) for line in said["half"].splitlines() if "errors: " in line]
    assert len(squares) == 8 and min(squares.values()) > 0
    assert taken == [pytest.approx(squares, rel=2**-8)] * 2
    entries = [json.loads(line) for line in (place / "half" / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        assert entry["scales"] == pytest.approx([2 ** (13 + entry["update"] / 1000)] * 4, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "machines", "gpus", "rank", "precision"),
    [
        ("2x1", 2, 1, 0, "float32"),
        ("1x2", 1, 2, 0, "float32"),
        ("2x2", 2, 2, 0, "float32"),
        ("compressed", 2, 2, 8, "float32"),
        ("half 2x2", 2, 2, 0, "paper"),
        ("half", 2, 1, 8, "paper"),
    ],
)
def test_what_is_sent_is_what_the_plan_says(name, machines, gpus, rank, precision, place, said):
    config = replace(DALLEConfig.preset("tiny"), layers=2)
    job = Job(config, machines, gpus, 4, rank, precision)
    planned = sum(item.sent(job.group_size(item.group)) for item in plan_traffic(job))
    # Beside it, the figures of the log, and the squared norms: of all, or of each resblock and of what is outside.
    figures = 4 * 8 + (8 if precision == "float32" else 4 * (2 * config.layers + 1))
    sent = planned + sent_bytes("all_reduce", figures, machines * gpus)
    *_, last = (place / name / "log.jsonl").read_text().splitlines()
    assert json.loads(last)["bytes_sent"] == sent


@pytest.mark.parametrize("name", ["alone", "2x2", "half"])
def test_one_process_exports_what_many_have_saved(name, place, said, tmp_path):
    command = ["export", str(place / name), str(tmp_path / "model"), "--dvae", str(place / "dvae" / "model")]
    assert main(command) == 0
    load_dalle(tmp_path / "model")
    for path in (place / name / "model").iterdir():
        if path.name != "dalle.json":  # which holds the time that it took
            assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes()


def test_a_flipped_bit_in_the_shards_is_noticed(place, said, tmp_path, capsys):
    folder = shutil.copytree(latest_checkpoint(place / "2x2"), tmp_path / "run" / "checkpoints" / "update-00000005")
    files = sorted((folder / "shards").iterdir())
    content = bytearray(files[2].read_bytes())
    content[len(content) // 2] ^= 4
    files[2].write_bytes(content)
    message = f"{files[2].name} is truncated or was changed: its SHA-256 differs"
    export = ["export", str(tmp_path / "run"), str(tmp_path / "model"), "--dvae", str(place / "dvae" / "model")]
    for command in (export, arguments(place, str(tmp_path / "run"), "--resume")):
        assert main(command) == 2
        assert message in capsys.readouterr().err
    digests = read_description(folder)["sha256"]
    assert sorted(digests) == [file.name for file in files] and len(files) == 5
    # Four processes look after one or two each, and one of them finds it.
    parts = [Team.divide(SimpleNamespace(rank=rank, size=4), sorted(digests.items())) for rank in range(4)]
    assert sorted(item for part in parts for item in part) == sorted(digests.items())
    for rank, part in enumerate(parts):
        with pytest.raises(UserError, match="SHA-256 differs") if rank == 2 else nullcontext():
            shard_files.check(folder / "shards", dict(part))


def test_a_signal_to_one_process_stops_all_after_its_update(place, said):
    assert [folder.name for folder in (place / "stopped" / "checkpoints").iterdir()] == [
        "update-00000003",
        "update-00000004",
    ]
    assert said["stopped"].count("dalle: interrupted") == 1


def test_only_the_leader_speaks_and_draws(place, said):
    assert said["2x2"].count("encoding images: 100%") == 1
    assert (place / "2x2" / "pictures" / "samples-00000005.png").exists()


def test_a_process_killed_in_an_update_costs_nothing(place, said):
    assert_same_bits(place / "killed", place / "1x2")


def test_a_process_killed_in_saving_costs_nothing(place, said):
    """And torchrun resumes by itself."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(TESTS / "killed.py")]
    train = arguments(place, "torchrun", "--machines", "1", "--checkpoint-every", "2", "--keep-checkpoints", "9")
    done = subprocess.run([*command, *train], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0 and "-9" in done.stderr, done.stderr
    assert_same_bits(place / "torchrun", place / "1x2")
    assert sorted(path.name for path in (place / "torchrun" / "checkpoints").iterdir()) == [
        f"update-{update:08d}" for update in (2, 4, 5)
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three machines", "--machines 3: expected a divisor of the number of processes, 2 by torchrun"),
        ("no torchrun", "--machines 2: expected several processes, started by torchrun, got one"),
        ("stage 1", "expected one process for this job, got 2; start it without torchrun"),
    ],
)
def test_wrong_numbers_of_processes_are_one_sentence(name, message, said):
    assert [line for line in said[name].splitlines() if "error" in line] == [f"dalle: error: {message}"]


@pytest.mark.parametrize(
    ("team", "rank", "message"),
    [
        (SimpleNamespace(size=3, machines=3), 0, "batch_size: expected a multiple of the 3 processes, got 4"),
        (
            SimpleNamespace(size=2, machines=1),
            8,
            "compression_rank: expected 0 for one machine, whose GPUs send gradients as they are, got 8; leave it out, "
            "or say by --machines how many there are",
        ),
        (
            ALONE,
            8,
            "compression_rank: expected 0 for one process, which sends nothing, got 8; leave it out, or start several "
            "by torchrun",
        ),
    ],
)
def test_what_does_not_fit_the_processes_is_one_sentence(team, rank, message):
    kind = Alone if team is ALONE else Team
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        kind.require_fitting(team, 4, rank)


def test_powersgd_gets_the_settings_of_its_factors(monkeypatch):
    given, made = {}, SimpleNamespace(attach=lambda block: None)
    monkeypatch.setattr(sharding, "PowerSGD", lambda model, rank, **named: given.update(named, rank=rank) or made)
    assert DALLETraining(p_divisor=8.0).compression is None
    chosen = DALLETraining(compression_rank=6, p_divisor=8.0, q_divisor=0.5).compression
    assert chosen == Compression(6, 8.0, 0.5)
    model = DALLE(replace(DALLEConfig.preset("tiny"), layers=2))
    assert sharding.compress(model, SimpleNamespace(get_group=lambda name: name), chosen) is made
    assert (given["rank"], given["p_divisor"], given["q_divisor"]) == (6, 8.0, 0.5)


@pytest.mark.parametrize("name", ["p_divisor", "q_divisor"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_factors_are_divided_by_positive_numbers(name, value):
    with pytest.raises(UserError, match=f"DALLETraining.{name}: expected a finite number of at least 1e-12, got"):
        DALLETraining(**{name: value})


def test_the_leader_alone_builds_the_parameters():
    for leads, kind in ((True, "cpu"), (False, "meta")):
        model = Team.build(SimpleNamespace(leads=leads), lambda: torch.nn.Linear(2, 3))
        assert model.weight.device.type == kind


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_out_every_sample_of_an_epoch_once(size):
    order = EpochOrder(10, seed=0)
    teams = [SimpleNamespace(size=size, rank=rank) for rank in range(size)]
    batches = [[Team.share(team, order.batch(update, 4)) for team in teams] for update in range(5)]
    assert all(len(part) == 4 // size for batch in batches for part in batch)
    seen = [pair for batch in batches for part in batch for pair in part]
    assert sorted(seen) == [(epoch, sample) for epoch in range(2) for sample in range(10)]
    assert seen == [pair for update in range(5) for pair in order.batch(update, 4)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_that_cannot_be_written_or_read_are_one_sentence(tmp_path, monkeypatch):
    digests = shard_files.write(tmp_path / "good", {"a": torch.arange(5.0)}, None)
    assert digests == {path.name: sha256_of_file(path) for path in (tmp_path / "good").iterdir()}
    read = shard_files.read(tmp_path / "good", lambda _name, shape, dtype: torch.empty(shape, dtype=dtype))
    assert torch.equal(read["a"], torch.arange(5.0))

    (damaged,) = (tmp_path / "good").glob("*.distcp")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=r"good is damaged \(.+\): remove its checkpoint to resume from the one before"):
        shard_files.read(tmp_path / "good", lambda _name, shape, dtype: torch.empty(shape, dtype=dtype))

    def full(*_arguments) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device; nothing that was there before is lost"):
        shard_files.write(tmp_path / "full", {"a": torch.arange(5.0)}, None)
