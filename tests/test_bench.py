"""The benchmarks' own logic: taking turns, floors, goals, tables, and that rivals compute what their names say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import attention_rivals
import bench_model
import compare
import dalle_pytorch_rival
import gpu
import harness
import machine
import pytest
import tables
import torch
from harness import BEST_RIVAL, OURS, Candidate, Case, Contest, Goal, Unavailable

from dalle_kernels import AttentionPattern, sparse_attention

BENCH = Path(compare.__file__).parent
PEAKS = {"gemm_float32_per_s": 1e9, "gemm_bfloat16_per_s": 1e8, "copy_bytes_per_s": 1e6, "cache_bytes_per_s": 1e7}


def case(ours: Candidate, rivals=(), **options) -> Case:
    settings = {"family": "toy", "work": "forward", "dtype": torch.float32, "settings": {"size": 3}, "memory": False}
    return Case(ours=ours, rivals=rivals, check=lambda: None, **{**settings, **options})


def test_candidates_take_turns_and_ours_comes_at_the_end_of_each_round():
    calls = []
    names = (OURS, "a", "b", "c")
    ours, *rivals = (Candidate(name, lambda name=name: calls.append(name)) for name in names)
    contest = Contest(case(ours, rivals))
    rounds = contest.rounds(4)
    assert rounds == 4
    calls.clear()
    contest.begin(rounds)
    for _ in range(rounds):
        contest.rivals_turn()
        contest.our_turn()
    turns = ["".join(calls[i : i + 4]) for i in range(0, 16, 4)]
    assert turns == [f"{order}{OURS}" for order in ("abc", "bca", "cab", "abc")]
    found = contest.results()["candidates"]
    assert [found[name]["rounds"] for name in names] == [4] * 4


def test_a_slow_rival_takes_part_in_the_first_rounds_only():
    took = {OURS: 0.001, "slow": 5.0, "fast": 0.001}
    ours, *rivals = (Candidate(name, lambda: None, seconds=lambda name=name: took[name]) for name in took)
    contest = Contest(case(ours, rivals, seconds=1))
    rounds = contest.rounds(7)
    contest.begin(rounds)
    for _ in range(rounds):
        contest.rivals_turn()
        contest.our_turn()
    found = contest.results()["candidates"]
    assert {name: found[name]["rounds"] for name in took} == {OURS: 7, "slow": harness.SLOW_ROUNDS, "fast": 7}
    assert found["slow"]["median_ms"] == found["slow"]["p90_ms"] == 5000


def test_rounds_fit_the_time_of_the_case():
    def rounds(seconds: float, most: int) -> int:
        return Contest(case(Candidate(OURS, lambda: None, seconds=lambda: seconds), seconds=2)).rounds(most)

    assert rounds(0.1, 100) == 20 and rounds(0.1, 7) == 7
    assert rounds(0.9, 100) == harness.LEAST_ROUNDS and rounds(0.9, 2) == 2
    assert rounds(3.0, 100) == harness.SLOW_ROUNDS and rounds(3.0, 1) == 1


def test_time_is_of_one_unit_and_preparation_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def spend(seconds: float):
        now[0] += seconds

    candidate = Candidate(OURS, lambda: spend(6.0), before=lambda: spend(100.0), units=3)
    assert Contest(case(candidate, calls=2)).clock(candidate) == pytest.approx(2.0)


def test_names_must_differ():
    with pytest.raises(ValueError, match="different names"):
        Contest(case(Candidate(OURS, lambda: None), [Candidate(OURS, lambda: None)]))


def test_quantiles():
    found = harness.quantiles([0.001 * value for value in range(1, 12)])
    assert found == {
        "median_ms": pytest.approx(6),
        "p10_ms": pytest.approx(2),
        "p90_ms": pytest.approx(10),
        "rounds": 11,
    }


def measured_memory() -> dict[str, int]:
    def run() -> torch.Tensor:
        scratch = torch.ones(16 << 20)
        return scratch[: 4 << 20].clone()

    return harness.peak_memory(Candidate(OURS, run), "cpu")


def test_memory_of_a_call_is_seen_apart_from_its_results():
    # In a new process: memory that malloc holds after other tests, unable to give it back, would serve the call unseen.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(measured_memory).result()
    if not found:
        pytest.skip("this system does not tell a process's peak memory")
    assert found["result_bytes"] == 16 << 20
    assert found["peak_bytes"] == pytest.approx(80 << 20, rel=0.1)
    assert compare.extra_bytes(found) == pytest.approx(64 << 20, rel=0.1)


def test_results_count_each_storage_once():
    x = torch.zeros(10)
    assert harness.result_bytes((x, [x[:3], x.view(2, 5)], torch.zeros(2, dtype=torch.int16), None)) == 44


def measured(times: dict[str, float], **options) -> dict:
    """An ``extra_info`` as pytest-benchmark would keep it; a name with a star computes another function."""
    candidates = {
        name.rstrip("*"): {"median_ms": time, "same_function": not name.endswith("*"), "note": "", "rounds": 5}
        for name, time in times.items()
    }
    base = case(Candidate(OURS, lambda: None), **options).describe()
    return {**base, "candidates": candidates, "unavailable": {"gone": "not installed"}}


def goals(found: dict) -> list[tuple]:
    return [(goal["against"], goal["reached"], goal["met"]) for goal in compare.judge(found, PEAKS)["goals"]]


def test_speed_goals():
    wanted = [Goal("speed", 2, BEST_RIVAL), Goal("speed", 4, "dense"), Goal("speed", 2, "absent")]
    found = measured({OURS: 10, "dense*": 15, "slow": 30, "best": 21}, goals=wanted)
    assert goals(found) == [("best", 2.1, True), ("dense", 1.5, False), ("absent", None, None)]


def test_other_goals():
    wanted = [
        Goal("share", 0.5),
        Goal("share", 0.9),
        Goal("milliseconds", 3),
        Goal("rate", 400),
        Goal("memory", 0.125, "eager"),
        Goal("extra bytes", 50),
    ]
    found = measured({OURS: 2.5, "eager": 5}, goals=wanted, operations=2e6, unit="tokens")
    met = [(value, met) for _, value, met in goals(found)]
    assert met == [(0.8, True), (0.8, False), (2.5, True), (400, True), (None, None), (None, None)]
    found["candidates"][OURS] |= {"peak_bytes": 160, "result_bytes": 100}
    found["candidates"]["eager"] |= {"peak_bytes": 500, "result_bytes": 100}
    assert [(value, met) for _, value, met in goals(found)][4:] == [(0.15, False), (60, False)]


def test_floors():
    def floor(dtype: str, peaks=PEAKS, **options) -> float | None:
        return machine.floor_ms({"dtype": dtype, **options}, peaks)

    assert floor("float32", operations=5e6) == 5
    assert floor("float32", operations=5e6, bytes_moved=2e4) == 20
    assert floor("float32", bytes_moved=2e4, in_cache=True) == 2
    assert floor("bfloat16", operations=5e6) == 5  # no slower than the float32 products that it may be made of
    assert floor("bfloat16", {**PEAKS, "gemm_bfloat16_per_s": 2e9}, operations=5e6) == 2.5
    wide = {**PEAKS, "gemm_bfloat16_per_s": 2e9}
    assert floor("bfloat16", wide, operations=5e6, product_dtype="float32") == 5
    assert floor("float32") is None


def test_machine_names():
    found = {"processor": "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz", "instruction_set": "avx512", "threads": 2}
    assert machine.slug(found) == "intel-xeon-gold-6130-cpu-2-10ghz-avx512-2-threads"
    assert machine.slug({**found, "gpu": "NVIDIA H200, sm_90"}) == "nvidia-h200-sm-90"
    assert {"date", "processor", "cores", "load_average", "torch", "threads"} <= set(machine.describe("cpu"))


def report(*found: dict) -> dict:
    about = {
        **machine.describe("cpu"),
        "threads": 2,
        "instruction_set": "avx2",
        "processor": "Some CPU",
        "peaks": PEAKS,
    }
    return {"machine_info": {"side_by_side": about}, "benchmarks": [{"extra_info": each} for each in found]}


def test_results_files_by_family_and_the_ratio_table(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    found = report(
        measured({OURS: 10, "dense*": 15, "best": 21}, goals=[Goal("speed", 2, BEST_RIVAL)], operations=5e6),
        measured({OURS: 1, "best": 2}, family="other"),
    )
    families = compare.results([found])
    assert list(families) == ["toy", "other"]
    path = compare.write("toy", families["toy"], "some-cpu")
    assert path.name == "some-cpu-toy.json"
    content = json.loads(path.read_text())
    assert content["family"] == "toy" and content["cases"][0]["share_of_floor"] == 0.5
    parts = compare.results([found, found])
    assert [len(part["cases"]) for part in parts.values()] == [2, 2]
    table = compare.ratio_table(content["cases"][0])
    for words in (
        "2.10x",
        "another function",
        "not here: not installed",
        "goal 2.00x against best, reached 2.10x: met",
    ):
        assert words in table


def test_readme_tables_of_any_family(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    found = report(
        measured({OURS: 10, "best": 21, "dense*": 15}, goals=[Goal("speed", 3, "best")], operations=5e6),
        measured({OURS: 0.5, "best": 1}, settings={"size": 4}),
        measured({OURS: 2, "hook": 3}, settings={"gpus": 8}),
    )
    for family, content in compare.results([found]).items():
        compare.write(family, content, "some-cpu")
    text = tables.tables(tmp_path.glob("*.json"))
    assert text.startswith("On Some CPU (2 threads, avx2, torch ")
    assert "| work | size | dtype | ours | of the floor | best | dense |" in text
    assert "| forward | 3 | fp32 | 10 | 50% | 21 · 2.10× (**missed** 3×) | 15 · 1.50× |" in text
    assert "| forward | 4 | fp32 | 0.5 | - | 1 · 2.00× | - |" in text
    assert "| forward | fp32 | 2 | - | 3 · 1.50× |" in text  # other settings, another table


def test_one_head_has_a_table_of_its_own():
    shape = {"pattern": "row", "text": 256, "grid": "32x32", "head dim": 64}
    found = [
        compare.judge(measured(times, settings={**shape, "batch x heads": layout}, **options), PEAKS)
        for times, layout, options in (
            ({OURS: 4, "SDPA, dense causal*": 10}, "4 x 8", {"operations": 1e6}),
            ({OURS: 1, f"{OURS}, one thread": 1.7}, tables.ONE_HEAD, {}),
        )
    ]
    main, single = tables.attention(found).split("\n\n")
    assert "| row | fp32 | forward | 4 | 25% | - | 10 · 2.50× |" in main and "1.7" not in main
    assert single.endswith("| row | fp32 | forward | 1 | 1.7 · 1.70× |")


def test_the_roofline_of_any_family(tmp_path):
    pytest.importorskip("matplotlib")
    roofline = importlib.import_module("roofline")
    found = report(
        measured({OURS: 10, "best": 21}, operations=5e6, bytes_moved=1e3),
        measured({OURS: 10, "best": 21}, bytes_moved=1e3),
        measured({OURS: 10}, operations=5e6),
    )
    path = tmp_path / "roofline.png"
    roofline.draw(list(compare.results([found]).values()), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_committed_results_make_the_readme():
    paths = list(tables.RESULTS.glob("*.json"))
    assert f"{tables.BEGIN}\n{tables.tables(paths)}\n{tables.END}" in tables.README.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize(("text_len", "grid"), [(5, (12, 12)), (0, (11, 13)), (7, (16, 11))])
def test_rivals_see_the_same_pairs(kind, text_len, grid):
    pattern = AttentionPattern(kind, text_len, grid)
    where = torch.arange(pattern.seq_len)
    mask = attention_rivals.mask_rule(pattern)(0, 0, where[:, None], where)
    assert torch.equal(mask, pattern.mask())
    if kind == "column":
        order = attention_rivals.column_order(pattern)
        permuted = attention_rivals.permuted_column_rule(pattern)(0, 0, where[:, None], where)
        assert torch.equal(permuted, pattern.mask()[order[:, None], order])
    q, k, v = torch.randn(3, 2, 3, pattern.seq_len, 8, dtype=torch.float64)
    expected = sparse_attention(q, k, v, pattern)
    torch.testing.assert_close(attention_rivals.gathered(pattern, "cpu")(q, k, v), expected)
    torch.testing.assert_close(attention_rivals.masked(pattern, pattern.seq_len, "cpu")(q, k, v), expected)


def test_a_rival_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(dalle_pytorch_rival.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dalle_pytorch_rival.NotInstalled, match="make bench"):
        dalle_pytorch_rival.load.__wrapped__()


def test_what_cannot_run_is_told_with_its_reason():
    def run() -> None:
        raise RuntimeError("no C++ compiler\nand more")

    assert harness.compiles(Candidate("a", run)) == Unavailable("a", "it does not compile here: no C++ compiler")


TOY = """
import torch
from conftest import DEADLINE
from harness import OURS, Candidate, Case

def test_toy(side_by_side):
    work = Candidate(OURS, lambda: torch.ones(9)), [Candidate("a", lambda: torch.zeros(9))]
    side_by_side(Case("toy", "forward", torch.float32, {"size": 9}, *work, check=lambda: None))

def test_wrong(side_by_side):
    def check():
        raise AssertionError("wrong work")
    side_by_side(Case("toy", "forward", torch.float32, {"size": 9}, Candidate(OURS, lambda: None), [], check=check))

def test_late(side_by_side, request):
    request.config.stash[DEADLINE] = 0.0
    side_by_side(None)
"""


def test_a_benchmark_runs_under_pytest_and_wrong_work_has_no_time(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "conftest.py").write_text((BENCH / "conftest.py").read_text())
    (tmp_path / "test_toy.py").write_text(TOY)
    output = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"--rootdir={tmp_path}",
        f"--benchmark-json={output}",
        "--rounds=3",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])}
    environment.pop("PYTEST_XDIST_WORKER", None)  # by which a benchmark would take the machine for shared
    done = subprocess.run([*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    for told in ("2 failed, 1 passed", "wrong work", "the time is over: not measured"):
        assert told in done.stdout, done.stdout + done.stderr
    (toy,) = compare.results([json.loads(output.read_text())])["toy"]["cases"]
    assert {found["rounds"] for found in toy["candidates"].values()} == {3} and list(toy["candidates"]) == [OURS, "a"]


@pytest.mark.parametrize("rivals_installed", (True, False))
def test_generation_counts_the_tokens_that_each_draws(rivals_installed, monkeypatch):
    """Ours all of its images, DALLE-pytorch's a few of each, whether or not it is there."""

    def rival(*_):
        if not rivals_installed:
            raise dalle_pytorch_rival.NotInstalled
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(bench_model, "rival", rival)
    monkeypatch.setattr(dalle_pytorch_rival, "load", lambda: None)
    size = bench_model.Size("tiny", bench_model._config(5, 20, 4, 30, 64, 1, 3), 2, (), ())
    cases = []
    bench_model.test_generation(cases.append, "cpu", size)
    (found,) = cases
    assert found.ours.units == found.ours.run().numel() == 2 * 16
    drawn = [rival.units for rival in found.rivals if isinstance(rival, Candidate)]
    assert len(found.rivals) == 4 and drawn == [2 * bench_model.RivalGeneration.COUNT] * 4 * rivals_installed


def test_the_sanitizers_see_every_family_of_cuda_kernels():
    """And of attention's each kernel that is launched in a way of its own."""
    words = {
        "adamw": ["adamw_counts_steps"],
        "attention": ["matches_float64", "gradients_match_float64", "short_sequences_of_wide_heads", "short_caches"],
        "float16": ["codes_of_whole"],
        "grad_scale": ["casts_of_many"],
        "gumbel_softmax": ["bad_rows_stay_alone"],
        "powersgd": ["any_scale[Householder on CUDA", "any_scale[op on CUDA"],
        "transformer": ["short_layers"],
    }
    assert {path.parent.name for path in (BENCH.parent / "csrc").glob("*/*.cu")} - {"common"} == set(words)

    class Names:
        def pytest_collection_finish(self, session):
            self.found = " ".join(item.nodeid for item in session.items)

    names = Names()
    options = ["--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(BENCH.parent)]
    paths = [str(BENCH.parent / word) if word.endswith(".py") else word for word in gpu.SANITIZED]
    assert pytest.main([*options, *paths], plugins=[names]) == 0
    missing = [word for wanted in words.values() for word in wanted if word not in names.found]
    assert not missing
    assert all(f"'{kind}'" in names.found for kind in ("row", "column", "conv"))
