"""PowerSGD between four gloo processes, started once (powersgd_ranks.py), against the simulation in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import powersgd_ranks as ranks
import pytest
import torch
from torch import Tensor, nn

import dalle_kernels
from dalle_kernels import PowerSGD, decode_fp169, shard_longer_axis
from dalle_kernels.powersgd.compression import fixed_gaussian
from dalle_kernels.powersgd.reference import Simulation
from dalle_kernels.powersgd.shards import LocalShard, local_shards
from dalle_kernels.testing import assert_accurate

TESTS = Path(__file__).parent
SECONDS = 240

Update = dict[str, Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> list[dict]:
    """What each of the four ranks found in every case."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(TESTS / "powersgd_ranks.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(ranks.WORLD)]
    try:
        assert all(process.wait(timeout=SECONDS) == 0 for process in running)
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks.WORLD)]


class Twin:
    """The simulation of all machines' hooks on a model, or on what one GPU of each machine holds of it."""

    def __init__(self, shards: Sequence[LocalShard], machines: int, rank: int, seed: int = 0, **settings):
        self.shards = shards
        fixed = {}
        for shard in shards:
            if shard.matrices is not None:
                Q = decode_fp169(fixed_gaussian(shard, min(rank, *shard.matrices[1:]), seed))
                fixed.update(zip(keys(shard), Q))
        self.simulation = Simulation(machines, fixed, **settings)

    def update(self, gradients: Sequence[Update], scales: dict[str, float] | None = None) -> Update:
        """The sums by parameter, and "norm", in the settings' dtype."""
        own = [
            {key: part for shard in self.shards for key, part in zip(keys(shard), parts(shard, gradient[shard.name]))}
            for gradient in gradients
        ]
        by_key = {key: (scales or {}).get(shard.name, 1.0) for shard in self.shards for key in keys(shard)}
        sums, square = self.simulation.update(own, by_key)
        return {**self._joined(sums), "norm": square.sqrt()}

    def errors(self, machine: int) -> Update:
        return self._joined(self.simulation.errors[machine])

    def _joined(self, by_key: Update) -> Update:
        shards = [shard for shard in self.shards if keys(shard)[0] in by_key]
        return {shard.name: torch.stack([by_key[key] for key in keys(shard)]).view(shard.shape) for shard in shards}


def keys(shard: LocalShard) -> list[str]:
    return [f"{shard.name}/{i}" for i in range(1 if shard.matrices is None else shard.matrices[0])]


def parts(shard: LocalShard, gradient: Tensor) -> Sequence[Tensor]:
    return [gradient] if shard.matrices is None else gradient.view(shard.matrices)


def twins(shards: Sequence[LocalShard], machines: int, rank: int, **settings) -> tuple[Twin, Twin]:
    """The plain one, in float32 and rounded as the paper rounds, and the exact one."""
    plain = Twin(shards, machines, rank, dtype=torch.float32, coded=True, **settings)
    return plain, Twin(shards, machines, rank, **settings)


def assert_alike(actual: Sequence[Update], plain: Sequence[Update], exact: Sequence[Update], dtype=None) -> None:
    """The error rule for each name, all updates of it together."""
    for name in exact[0]:
        results = [[update[name].view(-1) for update in updates] for updates in (actual, plain, exact)]
        if dtype is not None and name != "norm":
            results[1] = [result.to(dtype) for result in results[1]]
        assert_accurate(*results, name)


def assert_same_on(world: Sequence[dict], case: str, *path: str) -> None:
    """All ranks have the same bits."""

    def flat(found):
        for key in (case, *path):
            found = found[key]
        return [tensor for update in found for tensor in update.values()]

    for other in world[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(flat(world[0]), flat(other), strict=True))


def by_hook_settings(model: nn.Module) -> list[LocalShard]:
    return local_shards(model, None, ranks.PIECES, {})


@pytest.mark.parametrize("machines", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_updates_and_errors_are_the_simulations(world, dtype, machines):
    case, model = f"{dtype} {machines}", ranks.matrices(dtype)
    plain, exact = twins(by_hook_settings(model), machines, ranks.RANK, **ranks.SETTINGS)
    expected = ([], [])
    for step in range(ranks.STEPS):
        own = [ranks.gradients(model, rank, step) for rank in range(machines)]
        for twin, updates in zip((plain, exact), expected):
            updates.append(twin.update(own, ranks.scales(model)))
    assert_alike(world[0][case]["sums"], *expected, dtype)
    for rank in range(machines):
        assert_alike([world[rank][case]["errors"]], [plain.errors(rank)], [exact.errors(rank)])
    assert_same_on(world[:machines], case, "sums")


@pytest.mark.parametrize("machines", [2, 4])
def test_the_saved_sum_is_the_sum_of_all_errors(world, machines):
    found = [rank[f"{torch.float32} {machines}"] for rank in world[:machines]]
    for name, total in found[0]["state"]["errors"].items():
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, sum(one["errors"][name] for one in found))
        assert all(torch.equal(one["state"]["errors"][name], total) for one in found)


def test_two_pairs_of_machines_that_do_the_same_get_the_same_bits(world):
    for mine, its in zip(world[0][f"{torch.float32} 2"]["sums"], world[2][f"{torch.float32} 2"]["sums"]):
        assert all(torch.equal(mine[name], its[name]) for name in mine)


class Spoiled(Simulation):
    """One that finds an infinity in P (sum 0) or Q (sum 1) of the first matrix of machine 1, while it is told to."""

    spoiled: int | None = None
    sums = 0

    def _sum(self, factors, divisor):
        if self.sums == self.spoiled:
            factors[1][0, 0] = torch.inf
        self.sums += 1
        return super()._sum(factors, divisor)


@pytest.mark.parametrize("kind", ranks.NONFINITE)
def test_nonfinite_numbers_of_one_rank_skip_the_update_and_keep_what_can_be_kept(world, kind):
    model = ranks.matrices()
    twin = Twin(local_shards(model, None, {}, {}), 2, ranks.RANK, dtype=torch.float32, coded=True)
    twin.simulation.__class__ = Spoiled
    found = [rank["nonfinite"][kind] for rank in world[:2]]
    for step in range(3):
        twin.simulation.sums = 0
        twin.simulation.spoiled = {"project": 0, "project_back": 1}.get(ranks.NONFINITE[kind][0]) if step == 1 else None
        own = [ranks.gradients(model, rank, step) for rank in range(2)]
        scale, _ = [ranks.spoil(gradients, kind, rank, step) for rank, gradients in enumerate(own)]
        sums = twin.update(own, {"tall.weight": scale})
        assert sums["norm"].isfinite() == (step != 1)
        for rank, one in enumerate(found):
            assert torch.equal(one["sums"][step]["norm"], found[0]["sums"][step]["norm"])
            torch.testing.assert_close(one["sums"][step]["norm"], sums["norm"], rtol=0.01, atol=0)
            for name, error in twin.errors(rank).items():
                torch.testing.assert_close(one["errors"][step][name], error, rtol=0.05, atol=5e-4)
            if step != 1:
                torch.testing.assert_close(one["sums"][step]["tall.weight"], sums["tall.weight"], rtol=0.1, atol=2e-3)


def test_what_step_12_keeps_and_what_it_zeroes(world):
    """By table, for the buffer of ``tall.weight`` in the step that is skipped."""
    own = {rank: ranks.gradients(ranks.matrices(), rank, 1)["tall.weight"] for rank in (0, 1)}
    for kind, added in [("P", {0: own[0], 1: own[1]}), ("Q", {0: own[0], 1: own[1]}), ("an error buffer", {0: own[0]})]:
        for rank in (0, 1):
            before, after = (world[rank]["nonfinite"][kind]["errors"][step]["tall.weight"] for step in (0, 1))
            kept = before + added[rank] if rank in added else torch.zeros_like(before)
            torch.testing.assert_close(after, kept, rtol=2**-9, atol=0)
    for kind in ("a gradient", "an infinite gradient"):
        before, after = (world[1]["nonfinite"][kind]["errors"][step]["tall.weight"] for step in (0, 1))
        taken = world[1]["nonfinite"][kind]["sums"][1]["tall.weight"] / 2
        torch.testing.assert_close(after, before - taken, rtol=2**-9, atol=1e-6)


def test_sums_beyond_the_largest_code_saturate(world):
    model = ranks.matrices()
    plain, exact = twins(local_shards(model, None, {}, {}), 2, ranks.RANK)
    for step in range(2):
        own = [ranks.gradients(model, rank, step, size=40.0) for rank in range(2)]
        sums, unbound = plain.update(own), exact.update(own)
        found = world[0]["saturated"]["sums"][step]
        assert found["norm"] < unbound["norm"] / 2
        assert found["norm"].isfinite()
    largest = max(error.abs().max().item() for error in world[0]["saturated"]["errors"].values())
    assert largest == 15.984375
    assert sums["norm"] < unbound["norm"] / 2
    assert_same_on(world[:2], "saturated", "sums")


def test_which_parameters_are_exempt(world):
    found = world[0]["exempt"]
    linear = [f"{name}.weight" for name in ranks.SHAPES]
    assert found["none"]["compressed"] == ["a.weight", "b.weight"]
    assert found["all"]["compressed"] == []
    assert found["names"]["compressed"] == [name for name in linear if name not in ("square.weight", "tall.weight")]
    assert found["predicate"]["compressed"] == ["embedding.weight"]
    for name, sums in found.items():
        assert_same_on(world[:2], "exempt", name, "sums")
        own = [ranks.gradients(ranks.ONLY_MATRICES, rank, 0) for rank in range(2)]
        if name == "all":
            for key, gradient in own[0].items():
                torch.testing.assert_close(sums["sums"][0][key], (gradient + own[1][key]) / 2)


@pytest.mark.parametrize("machines", [4, 1])
def test_other_numbers_of_machines_resume_from_the_sum(world, machines):
    found = [rank["resumed"] for rank in world]
    saved = found[0]["saved"]
    for one in found[:machines]:
        for name, total in saved.items():
            torch.testing.assert_close(one[machines]["errors"][name], total / machines, rtol=2**-9, atol=0)
            torch.testing.assert_close(one[machines]["saved"][name], total, rtol=2**-9, atol=0)
    if machines > 1:
        assert_same_on([one[machines] for one in found], "sums")
    # Q is that of the saved seed: the next update is what machines with these errors would have made of it.
    model = ranks.matrices()
    plain, exact = twins(by_hook_settings(model), machines, ranks.RANK, seed=3, gradient_divisor=machines)
    own = [ranks.gradients(model, rank, 2) for rank in range(machines)]
    for twin in (plain, exact):
        for errors in twin.simulation.errors:
            for shard in twin.shards:
                if shard.matrices is not None:
                    start = (saved[shard.name] / machines).to(twin.simulation.dtype)
                    errors.update(zip(keys(shard), parts(shard, start)))
    assert_alike(found[0][machines]["sums"], [plain.update(own)], [exact.update(own)])


def backward_gradients(rank: int, step: int, dtype: torch.dtype) -> Update:
    model = ranks.mlp().to(dtype)
    ranks.loss(model, rank, step).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_ddp_with_many_buckets(world):
    shards = local_shards(ranks.mlp(), None, {}, {})
    pair, expected = twins(shards, ranks.WORLD, ranks.RANK, gradient_divisor=ranks.WORLD), ([], [])
    for step in range(ranks.STEPS):
        for twin, updates in zip(pair, expected):
            own = [backward_gradients(rank, step, twin.simulation.dtype) for rank in range(ranks.WORLD)]
            updates.append(twin.update(own))
    assert world[0]["ddp"]["buckets"] > 1
    assert_alike(world[0]["ddp"]["sums"], *expected)
    assert_same_on(world, "ddp", "sums")


def of_ordinal(tensor: Tensor, gpus: int, ordinal: int) -> Tensor:
    """The part of a parameter or gradient that this GPU of a machine holds."""
    axis = shard_longer_axis(tensor).dim
    chunks = tensor.detach().chunk(gpus, axis)
    return chunks[ordinal] if ordinal < len(chunks) else chunks[0].narrow(axis, 0, 0)


def shards_of_ordinal(gpus: int, ordinal: int) -> list[LocalShard]:
    shards = local_shards(ranks.mlp(), ["3"], {}, {})
    for shard in shards:
        shard.shape = of_ordinal(shard.parameter, gpus, ordinal).shape
        shard.matrices = shard.matrices and (1, *shard.shape)
    return shards


def fsdp_updates(twins_of_ordinals: Sequence[Twin], machines: int) -> list[list[Update]]:
    """For each ordinal its updates, with the norm over all ordinals."""
    gpus = len(twins_of_ordinals)
    expected = [[] for _ in range(gpus)]
    for step in range(ranks.STEPS):
        dtype = twins_of_ordinals[0].simulation.dtype
        by_rank = [backward_gradients(rank, step, dtype) for rank in range(machines * gpus)]
        of_machines = [by_rank[first : first + gpus] for first in range(0, machines * gpus, gpus)]
        own = [{name: sum(one[name] for one in machine) for name in by_rank[0]} for machine in of_machines]
        found = [
            twin.update([{name: of_ordinal(gradient, gpus, k) for name, gradient in one.items()} for one in own])
            for k, twin in enumerate(twins_of_ordinals)
        ]
        norm = torch.stack([update["norm"] for update in found]).norm()
        for updates, update in zip(expected, found):
            updates.append({**update, "norm": norm})
    return expected


@pytest.mark.parametrize("mesh", ranks.MESHES, ids=str)
def test_fsdp_compresses_each_shard_by_itself(world, mesh):
    machines, gpus = mesh
    case = f"fsdp {mesh}"
    settings = {"gradient_divisor": float(machines * gpus)}
    kinds = zip(*(twins(shards_of_ordinal(gpus, k), machines, 2 * ranks.RANK // gpus, **settings) for k in range(gpus)))
    expected = [fsdp_updates(of_ordinals, machines) for of_ordinals in kinds]
    for rank in range(machines * gpus):
        assert_alike(world[rank][case]["sums"], *(updates[rank % gpus] for updates in expected))
    for gpu in range(gpus):
        assert_same_on([world[rank] for rank in range(gpu, machines * gpus, gpus)], case, "sums")


@pytest.mark.parametrize("mesh", ranks.MESHES, ids=str)
def test_fsdp_saves_whole_sums_and_loads_them(world, mesh):
    found = world[0][f"fsdp {mesh}"]
    sizes = {name: parameter.shape for name, parameter in ranks.mlp().named_parameters()}
    for name, total in found["full"].items():
        assert total.shape == sizes[name] and total.abs().max() > 0
        torch.testing.assert_close(found["loaded"][name], total, rtol=2**-9, atol=0)


def test_without_gradients_training_goes_as_with_them(world):
    """To the same bits, over an update that is skipped; and what is not compressed is all that is held."""
    for rank in world:
        kept, factors = rank["kept True"], rank["kept False"]
        for mine, its in zip(factors["parameters"], kept["parameters"], strict=True):
            assert torch.equal(mine, its)
        assert all(torch.equal(error, kept["errors"][name]) for name, error in factors["errors"].items())
        assert factors["norms"] == kept["norms"]
        assert [norm.isinf().item() for norm in kept["norms"]] == [False, True, False, False]
        assert set(factors["held"]) == {factors["exempt"]}
        assert min(kept["held"]) > 5 * factors["exempt"]


def test_scales_are_given_back_where_the_optimizer_divides_by_them(alone):
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 20))
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=draw) for p in model.parameters()]
    sizes = {name: 2.0 ** (4 + place) for place, (name, _) in enumerate(model.named_parameters())}
    scales = {name: torch.tensor([size]) for name, size in sizes.items()}
    given = {}
    for keep_scale in (False, True):
        powersgd = PowerSGD(model, rank=4, scales=scales, keep_scale=keep_scale, gradient_divisor=1.5)
        given[keep_scale] = [size * gradient for size, gradient in zip(sizes.values(), gradients)]
        powersgd._reduce(powersgd.shards, given[keep_scale])
        norm = powersgd.gradient_norm()
    assert norm.isfinite()
    for size, kept, unscaled in zip(sizes.values(), given[True], given[False], strict=True):
        torch.testing.assert_close(kept, size * unscaled, rtol=1e-6, atol=0)
    for bias in (1, 3):
        torch.testing.assert_close(given[False][bias], gradients[bias] / 1.5)

    bad = [torch.ones_like(gradient) for gradient in gradients]
    bad[0][3, 5] = torch.inf
    powersgd._reduce(powersgd.shards, bad)
    assert all(bad[matrix].isinf().all() for matrix in (0, 2)) and powersgd.gradient_norm().isinf()


def test_a_gradient_beyond_float16_is_not_finite(alone):
    """With what the buffers hold it would be 80,000 after its scale is given back."""
    model = nn.Linear(24, 16, bias=False, dtype=torch.float16)
    for held, fits in ((0.0, True), (1.0, False)):
        powersgd = PowerSGD(model, 4, scales={"weight": torch.tensor([4e4])}, keep_scale=True)
        powersgd.load_state_dict({"seed": 0, "errors": {"weight": torch.full((16, 24), held)}})
        sums = ranks.reduced(powersgd, model, {"weight": torch.full((16, 24), 4e4, dtype=torch.float16)})
        assert sums["norm"].isfinite() == fits == sums["weight"].isfinite().all()


@pytest.mark.parametrize("example", [0, 1], ids=["DDP", "FSDP2"])
def test_examples_of_the_readme_train(world, example):
    """All processes end with the same parameters, none of which is where it began."""
    ends = [rank[f"readme {example}"]["parameters"] for rank in world]
    for begin, *end in zip(ranks.mlp().parameters(), *ends):
        assert all(torch.equal(one, end[0]) for one in end)
        assert not torch.equal(end[0], begin) and end[0].isfinite().all()


def test_attach_says_what_it_cannot_serve(world):
    said = world[0]["mistakes"]["said"]
    assert "found no FSDP unit" in said[0]
    assert "a mesh of one axis" in said[1]


def test_the_norm_takes_in_what_others_have_summed(alone):
    model = nn.Linear(4, 3)
    own = ranks.gradients(model, 0, 0)
    norms = []
    for rest in (None, torch.tensor(9.0), torch.tensor(torch.nan)):
        powersgd = PowerSGD(model, 2)
        PowerSGD.ddp_hook(powersgd, ranks.bucket(model, own))
        norms.append(powersgd.gradient_norm(rest))
    torch.testing.assert_close(norms[1], (norms[0].square() + 9).sqrt())
    assert norms[2] == torch.inf


def test_every_rank_draws_the_same_normal_numbers_for_a_parameter():
    model = ranks.matrices()
    shards = [shard for shard in local_shards(model, None, ranks.PIECES, {}) if shard.matrices is not None]
    drawn = [decode_fp169(fixed_gaussian(shard, 40, seed=1)) for shard in shards]
    assert all(torch.equal(Q, decode_fp169(fixed_gaussian(shard, 40, seed=1))) for shard, Q in zip(shards, drawn))
    rows = torch.cat([Q.flatten(0, 1) for Q in drawn])
    assert len(rows.unique(dim=0)) == len(rows)
    assert not torch.equal(drawn[0], decode_fp169(fixed_gaussian(shards[0], 40, seed=2)))
    assert abs(rows.mean()) < 4 / rows.numel() ** 0.5
    assert abs(rows.square().mean() - 1) < 6 / rows.numel() ** 0.5
    assert abs((rows.abs() < 1).float().mean() - 0.6827) < 2 / rows.numel() ** 0.5


def test_mistakes_get_one_clear_sentence(alone):
    model = ranks.matrices()
    for message, settings in [
        ("a rank that 1 GPUs divide evenly, got 0", {"rank": 0}),
        ("p_divisor above 0 and finite, got 0.0", {"p_divisor": 0.0}),
        ("q_divisor above 0 and finite, got inf", {"q_divisor": float("inf")}),
        ("eps at or above 0 and finite, got -1", {"eps": -1}),
        ("names of the model's parameters, got 'fused'", {"pieces": {"fused": 3}}),
        ("names of the model's parameters, got 'x'", {"scales": {"x": torch.ones(1)}}),
        ("the 37 rows that are here of tall.weight to make 2 equal matrices", {"pieces": {"tall.weight": 2}}),
        ("exempt names of the model's parameters or modules, got 'tal'", {"exempt": ["tal"]}),
    ]:
        with pytest.raises(ValueError, match=message):
            PowerSGD(model, **{"rank": 4, **settings})
    with pytest.raises(TypeError, match=r"parameter weight is torch\.float64"):
        PowerSGD(nn.Linear(3, 2, dtype=torch.float64), 1)
    with pytest.raises(TypeError, match=r"one element, that of row.weight is torch.float32 of shape \[2\]"):
        PowerSGD(model, 4, scales={"row.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="expected keep_gradients with DDP"):
        ranks.reduced(PowerSGD(model, 4, keep_gradients=False), model, ranks.gradients(model, 0, 0))
    powersgd = PowerSGD(model, 4)
    with pytest.raises(RuntimeError, match="no gradient was reduced"):
        powersgd.gradient_norm()
    errors = powersgd.state_dict()["errors"]
    with pytest.raises(ValueError, match=r"the errors of tall.weight of shape \[37, 21\], got None"):
        powersgd.load_state_dict({"seed": 0, "errors": {k: v for k, v in errors.items() if k != "tall.weight"}})
    with pytest.raises(ValueError, match=r"the errors of tall.weight of shape \[37, 21\], got \[21, 37\]"):
        powersgd.load_state_dict({"seed": 0, "errors": {**errors, "tall.weight": errors["tall.weight"].mT}})


@pytest.mark.parametrize("provider", ["reference", "native"])
def test_each_provider_serves_the_hook(alone, provider):
    model = ranks.matrices()
    found = []
    for forced in (provider, "reference"):
        with dalle_kernels.use(forced):
            powersgd = PowerSGD(model, ranks.RANK, pieces=ranks.PIECES)
            found.append([ranks.reduced(powersgd, model, ranks.gradients(model, 0, step)) for step in range(2)])
    for mine, its in zip(*found):
        torch.testing.assert_close(mine, its, rtol=0.02, atol=2e-4)
