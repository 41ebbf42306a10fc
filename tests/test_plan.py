"""The plan of a training job: its counts against the model's own, its traffic against the collectives that run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from dalle import plan_check
from dalle.cli import main
from dalle.config import DALLEConfig
from dalle.errors import UserError
from dalle.plan import (
    PRECISIONS,
    Hardware,
    Job,
    block_activations,
    compression_rate,
    forward_flops,
    link_bytes,
    model_flops,
    network_bytes,
    paper_rank,
    parameter_count,
    plan,
    plan_memory,
    plan_traffic,
    resblocks,
)
from dalle.train.collectives import CollectiveCounter
from dalle.transformer import DALLE, mask_schedule
from dalle_kernels import AttentionPattern

PAPER = DALLEConfig.preset("12b")
TWO_LAYERS = dataclasses.replace(PAPER, layers=2)


@pytest.mark.parametrize("preset", ["tiny", "emoji", "12b"])
def test_parameters_are_the_models(preset):
    config = DALLEConfig.preset(preset)
    with torch.device("meta"):
        model = DALLE(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    first = model.layers[0]
    for block, module in zip(resblocks(config), (first.attention, first.mlp)):
        assert block.size == sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
        assert block.vectors == sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 1)


@pytest.mark.parametrize(("dim", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_compression_is_that_of_the_papers_table_1(dim, rank, percent):
    config = dataclasses.replace(PAPER, dim=dim, heads=dim // 64)
    rate = compression_rate(config, 8, rank)
    assert rate == pytest.approx(1 - 5 * rank / (8 * dim), rel=1e-12)
    assert round(100 * rate) == percent


def test_table_1_is_printed(capsys):
    assert main(["plan", "--table-1"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[1:] for line in lines] == [
        ["1920", "512", "83.3%", "83%"],
        ["2688", "640", "85.1%", "85%"],
        ["3968", "896", "85.9%", "86%"],
    ]


def test_flops_are_counted_pair_by_pair():
    config = DALLEConfig.preset("tiny")
    length = config.text_len + config.image_len
    products, attention, logits = forward_flops(config)
    with torch.device("meta"):
        layer = DALLE(config).layers[0]
    assert products == 2 * length * config.layers * sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    masks = [
        AttentionPattern(kind, config.text_len + 1, config.grid, config.kernel_size).mask(length)
        for kind in mask_schedule(config.layers)
    ]
    assert attention == sum(int(mask.sum()) for mask in masks) * config.heads * config.head_dim * 2 * 2
    classes = config.text_vocab_size + config.text_len
    assert logits == 2 * config.dim * (config.text_len * classes + config.image_len * config.image_vocab_size)
    assert model_flops(config) == 3 * (products + attention + logits)


@pytest.mark.parametrize("precision", ["paper", "mixed"])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_activations_are_what_autograd_keeps(kind, precision):
    config = DALLEConfig.preset("emoji")
    model = DALLE(config)
    x = torch.randn(1, config.text_len + config.image_len, config.dim, requires_grad=True)
    if precision == "paper":
        model.set_precision(torch.float16, torch.ones(2 * config.layers))
        x = x.detach().half().requires_grad_()
    block = getattr(model.layers[0], kind)
    weights = {parameter.shape for parameter in block.parameters()}
    weights |= {parameter.mT.shape for parameter in block.parameters() if parameter.dim() == 2}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        # Not the resblock's input, nor weights that autocast has cast.
        if storage.data_ptr() != x.untyped_storage().data_ptr() and tensor.shape not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        out = block(x)  # held: the addresses of what is freed would be given out again
    assert out.shape == x.shape and sum(kept.values()) == block_activations(config, kind, PRECISIONS[precision])


def test_memory_of_the_papers_job():
    memory = plan_memory(Job(PAPER, machines=128, gpus=8, batch=1024))
    matrices = 64 * 12 * 3968**2 // 8
    assert memory["parameters of resblocks"] == memory["error buffers"] == 2 * matrices
    assert memory["moments of resblocks"] == 4 * matrices
    assert memory["inputs of resblocks"] == 128 * 1280 * 3968 * 2
    # P in float32 and Q's codes, of 112 columns: four matrices d x d / 8 and two twice d x d / 2 long.
    assert memory["factors of gradients"] == 64 * 112 * 3968 * (4 * (4 / 8 + 2 / 2) + 2 * (4 + 2))
    assert "gradients of resblocks" not in memory
    # Sharded twice as finely, half; what is gathered stays.
    finer = plan_memory(Job(PAPER, machines=64, gpus=16, batch=1024))
    assert finer["error buffers"] * 2 == memory["error buffers"]
    assert finer["gathered embeddings"] == memory["gathered embeddings"]


def test_memory_by_precision_and_choices():
    plain = plan_memory(Job(PAPER, 1, 8, 8, precision="float32"))
    mixed = plan_memory(Job(PAPER, 1, 8, 8, precision="mixed"))
    kept = plan_memory(Job(PAPER, 1, 8, 8, precision="mixed", checkpoint=False))
    assert plain["parameters of resblocks"] == mixed["parameters of resblocks"] == plain["gradients of resblocks"]
    assert plain["gathered resblocks, two"] == 2 * mixed["gathered resblocks, two"]
    assert "fixed Q" not in plain and "error buffers" not in plain
    blocks = [block_activations(PAPER, kind, PRECISIONS["mixed"]) for kind in ("attention", "mlp")]
    assert mixed["activations of resblocks"] == max(blocks) and kept["activations of resblocks"] == 64 * sum(blocks)


@pytest.mark.parametrize(("precision", "rank"), [("paper", 896), ("float32", 0)])
def test_memory_is_enough_for_a_backward(precision, rank):
    job = Job(TWO_LAYERS, 4, 8, 32, rank, precision)
    tracker = plan_check.step(job, FSDPMemTracker)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    found = plan(job)
    planned = found.memory_at_once - sum(count for part, count in found.memory.items() if part.startswith("moments"))
    assert peak["Total"] < planned < 1.2 * peak["Total"]


def test_the_papers_job_fits_its_gpus():
    found = plan(Job(PAPER, machines=128, gpus=8, batch=1024))
    assert found.memory_at_once == sum(found.memory.values()) - found.memory["factors of gradients"] < 16 * 2**30
    uncompressed = plan(Job(PAPER, machines=1, gpus=8, batch=8))
    assert uncompressed.memory_at_once == sum(uncompressed.memory.values()) - uncompressed.memory["inputs of resblocks"]


def test_traffic_is_linear_in_the_layers():
    def traffic(layers):
        job = Job(dataclasses.replace(PAPER, layers=layers), 128, 8, 1024)
        return {(item.purpose, item.kind): (item.calls, item.bytes) for item in plan_traffic(job)}

    two, three, whole = traffic(2), traffic(3), traffic(64)
    for name, counted in whole.items():
        assert counted == tuple(a + 62 * (b - a) for a, b in zip(two[name], three[name]))


def test_floor_is_the_slowest_resource():
    job = Job(PAPER, 128, 8, 1024)
    found = plan(job, Hardware(peak_tflops=1000, network=1, link=2, memory_bandwidth=4))
    assert found.seconds == {
        "operations": found.work.flops / 1e15,
        "memory traffic": found.work.bytes / 4e9,
        "links in a machine": link_bytes(job, found.traffic) / 2e9,
        "network": network_bytes(job, found.traffic) / 1e9,
    }
    assert found.floor == max(found.seconds.values())
    assert found.work.model_flops == model_flops(PAPER) < found.work.flops
    uncompressed = plan(dataclasses.replace(job, rank=0))
    sent = {item.purpose: item.sent(128) for item in uncompressed.traffic if item.group == "machine"}
    factors = sum(item.sent(128) for item in found.traffic if "1-6-9" in item.purpose)
    assert 1 - factors / sent["gradients of resblocks"] == pytest.approx(found.compression_rate, abs=1e-4)


@pytest.mark.parametrize(
    ("machines", "gpus", "rank", "precision"),
    [
        (1, 1, 0, "paper"),
        (2, 1, 0, "paper"),
        (1, 2, 0, "float32"),
        (2, 2, 0, "mixed"),
        (2, 2, 4, "float32"),
        (3, 4, 8, "paper"),
        (3, 1, 40, "paper"),
    ],
)
def test_collectives_of_a_small_model_are_as_planned(machines, gpus, rank, precision):
    config = dataclasses.replace(DALLEConfig.preset("tiny"), layers=2)
    compared = plan_check.compare(Job(config, machines, gpus, 12, rank, precision))
    assert bool(compared) == (machines * gpus > 1)
    for row in compared:
        assert row.planned == row.counted, row


def test_the_next_resblock_is_gathered_before_one_has_computed():
    """How many all-gathers have begun, the first of the embeddings, as each of four resblocks ends, there and back."""
    begun = {"forward": [], "backward": []}

    def watch(model):
        counter = CollectiveCounter()

        def note(direction):
            begun[direction].append(sum(item.kind == "all_gather" for item in counter.collectives))

        for block in model.resblocks():
            block.register_forward_hook(lambda *_: note("forward"))
            block.register_full_backward_hook(lambda *_: note("backward"))
        return counter

    config = dataclasses.replace(DALLEConfig.preset("tiny"), layers=2)
    plan_check.step(Job(config, 1, 2, 2, checkpoint=False), watch)
    assert begun == {"forward": [1 + 2, 1 + 3, 1 + 4, 1 + 4], "backward": [5 + 2, 5 + 3, 5 + 4, 5 + 4]}


@pytest.mark.parametrize("rank", [0, 896])
def test_collectives_of_1024_ranks_are_as_planned(rank):
    compared = plan_check.compare(Job(TWO_LAYERS, 128, 8, 1024, rank))
    kinds = {("all_gather", "gpu"), ("reduce_scatter", "gpu"), ("all_reduce", "machine"), ("all_reduce", "world")}
    factors = {("all_to_all", "machine"), ("all_gather", "machine"), ("all_reduce", "gpu")}
    assert {(row.kind, row.group) for row in compared} == kinds | (factors if rank else set())
    for row in compared:
        assert row.planned == row.counted, row


def test_counted_collectives_have_the_papers_compression():
    sent = {
        rank: sum(
            item.sent
            for item in plan_check.count_collectives(Job(dataclasses.replace(PAPER, layers=1), 4, 8, 32, rank))
            if item.ranks == (0, 8, 16, 24) and item.dtype != torch.float32  # fp32: embeddings, the norm
        )
        for rank in (0, 896)
    }
    assert 1 - sent[896] / sent[0] == pytest.approx(1 - 5 * 896 / (8 * 3968), abs=1e-5)


@pytest.mark.slow
def test_collectives_of_the_12b_model_are_as_planned():
    # The other 58 repeat these; `dalle plan --preset 12b --verify` takes all of them, and a minute and a half.
    for row in plan_check.compare(Job(dataclasses.replace(PAPER, layers=6), 128, 8, 1024)):
        assert row.planned == row.counted, row


def test_the_command_prints_writes_and_verifies(tmp_path, capsys):
    flags = ["--preset", "tiny", "--machines", "2", "--gpus", "2", "--batch", "8", "--rank", "0", "--network", "1"]
    assert main(["plan", *flags, "--json", str(tmp_path / "plan.json"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert (
        "75,232 parameters" in said and "fits in 17.18 GB" in said and said.count("agree") == 4 and "DIFFER" not in said
    )
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["hardware"]["network"] == 1 and written["job"]["config"]["dim"] == 32
    assert written["floor_seconds"] == max(written["seconds"].values())


def test_the_command_says_where_collectives_differ(monkeypatch, capsys):
    counted = plan_check.count_collectives
    monkeypatch.setattr(plan_check, "count_collectives", lambda job: counted(job)[1:])
    flags = ["--preset", "tiny", "--machines", "2", "--gpus", "2", "--batch", "8", "--rank", "0"]
    assert main(["plan", *flags, "--verify"]) == 1
    assert capsys.readouterr().out.count("DIFFER") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 3}, "batch: expected a multiple of the 2 x 2 GPUs, got 3"),
        ({"machines": 0}, "machines: expected a whole number of at least 1, got 0"),
        ({"gpus": 5, "batch": 10}, "gpus: expected both sides of query, 32 x 32"),
        ({"rank": 3}, "rank: expected a multiple of the 2 GPUs of a machine, got 3"),
        ({"machines": 1, "rank": 2}, "rank: expected 0 on one machine"),
        ({"precision": "half"}, "precision: expected one of paper, mixed, float32, got 'half'"),
    ],
)
def test_an_impossible_job_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Job(DALLEConfig.preset("tiny"), **{"machines": 2, "gpus": 2, "batch": 4, **settings})


def test_impossible_hardware_is_refused():
    with pytest.raises(UserError, match="link: expected a positive number, got 0"):
        Hardware(link=0)


def test_the_default_rank_is_the_papers():
    assert Job(PAPER, 128, 8, 1024).rank == 896 and Job(PAPER, 1, 8, 8).rank == 0
    assert paper_rank(32, 8) == 8 and paper_rank(3968, 7) % 7 == 0
