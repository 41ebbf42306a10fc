"""A compiled CUDA kernel comes before Triton's only where a figure in bench/results shows it ahead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dalle_kernels import _native, _triton, use
from dalle_kernels.adamw import ops as adamw
from dalle_kernels.attention import decode, ops
from dalle_kernels.grad_scale import ops as grad_scale
from dalle_kernels.gumbel_softmax import cuda as gumbel
from dalle_kernels.transformer import ops as layers

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
FILES = sorted(RESULTS.glob(f"*-sm-{_triton.MEASURED_ON}-*.json"))
CASES = [case for path in FILES for case in json.loads(path.read_text(encoding="utf-8"))["cases"]]
ROWS = json.loads((RESULTS / "device_runs" / "nvidia-h200.json").read_text(encoding="utf-8"))["rows"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def product(text: str) -> int:
    """Of both numbers of '8 x 62'."""
    first, second = map(int, re.findall(r"\d+", text)[:2])
    return first * second


def row_wins(row: dict) -> bool:
    return row["microseconds"] < row["others"]["Triton"]


def rows_of(*words: str) -> list[dict]:
    """The figures of CUDA beside Triton of which all the words are the work's."""
    beside = (row for row in ROWS if row["kernel"] == "CUDA" and "Triton" in row["others"])
    return [row for row in beside if all(word in row["work"] for word in words)]


def beside_triton(case: dict) -> tuple[float, float] | None:
    """What the compiled kernel and Triton's took; where one of them has no name of its own, it is what a call chose."""
    times = {name: found["median_ms"] for name, found in case["candidates"].items()}
    ours = times[case["ours"]]
    native, triton = (times.get(f"{case['ours']}, {provider}") for provider in ("native", "triton"))
    return (native or ours, triton or ours) if native or triton else None


def attention_figures(work: str) -> Iterator[tuple[tuple, int, bool]]:
    """The key of a table, heads of all samples, and whether CUDA was ahead."""
    for row in rows_of(f"attention {work}, "):
        key = row["work"].rpartition(" ")[2], DTYPES[row["dtype"]], int(re.search(r"of (\d+)", row["shape"])[1])
        yield key, product(row["shape"]), row_wins(row)
    for case in CASES:
        times, settings = beside_triton(case), case["settings"]
        if case["family"] == "attention" and case["work"] == work and times:
            key = settings["pattern"], DTYPES[case["dtype"]], settings["head dim"]
            if work == "decode step":
                key = *key, "samples of a prompt" in settings
            yield key, product(settings["batch x heads"]), times[0] < times[1]


@pytest.mark.parametrize(
    ("work", "table"),
    [("forward", ops.FORWARD_AHEAD), ("backward", ops.BACKWARD_AHEAD), ("decode step", decode.DECODE_AHEAD)],
)
def test_attention_is_ahead_from_so_many_heads_on(work, table):
    figures = list(attention_figures(work))
    for key, fewest in table.items():
        heads = {heads: ahead for found, heads, ahead in figures if found == key and heads >= fewest}
        assert fewest in heads and all(heads.values()), key


def test_wide_heads_beside_a_longer_text_are_left_to_triton(monkeypatch):
    monkeypatch.setattr(ops._triton, "left_to_triton", lambda _device, ahead: str(ahead))
    q = torch.empty(1, 248, 1, 128, dtype=torch.bfloat16, device="meta")
    for text_len in (256, 257):
        pattern = text_len, 32, 32, 11, 0.125
        left = ops._cuda_unsupported(q, "row", ops.FORWARD_AHEAD, "sparse_attention_refusal", (q, q, q), pattern)
        assert left == str(text_len == 256)


def test_steps_of_optimizers_and_casts_are_ahead():
    shown = {DTYPES[row["dtype"]] for row in rows_of("AdamW16 step") if row_wins(row)}
    assert shown >= adamw.AHEAD
    casts = [row for row in rows_of("cast") if row_wins(row)]
    assert {tuple(DTYPES[name] for name in row["dtype"].split(" to ")) for row in casts} >= grad_scale.AHEAD


def test_gumbel_softmax_is_ahead():
    shown = set()
    for case in (case for case in CASES if case["family"] == "gumbel_softmax"):
        times, settings = beside_triton(case), case["settings"]
        if times and times[0] < times[1]:
            columns, apart = settings["shape"].split("x")[settings["dim"]], settings["dim"] != -1
            parts = "_kl", "_kl_backward"
            for part in parts if "with KL, forward + backward" in case["work"] else ("",):
                shown.add((f"gumbel_softmax{part}", DTYPES[case["dtype"]], apart, int(columns)))
    for key, (least, _) in gumbel.AHEAD.items():
        assert (*key, least) in shown


def test_orthogonalization_is_ahead_and_layers_are_opt_in():
    rows = [row for row in ROWS if row["work"] == "orthogonalize" and row["kernel"] == "CUDA"]
    assert rows and all(row["microseconds"] < row["others"]["torch.linalg.qr"] for row in rows)
    assert not layers.DECODE_AHEAD


@pytest.fixture
def with_triton(monkeypatch):
    """As where there is a GPU that Triton serves; what is asked are checks of arguments alone."""
    monkeypatch.setattr(_triton, "_unavailable", lambda _device_type: None)


def test_on_other_gpus_and_unless_forced_triton_comes_first(with_triton, monkeypatch):
    device = torch.device("cuda")
    with _triton.assume(90, 132):
        assert _triton.left_to_triton(device, True) is None
        assert "use('native')" in _triton.left_to_triton(device, False)
        with use("native"):
            assert _triton.left_to_triton(device, False) is None
    for other in (80, 89, 100, 120):
        with _triton.assume(other, 132):
            assert _triton.left_to_triton(device, True) is not None
    monkeypatch.setattr(_triton, "_unavailable", lambda _device_type: "there is none")
    with _triton.assume(80, 108):
        assert _triton.left_to_triton(device, False) is None


@pytest.mark.parametrize(
    ("architecture", "dtype", "serves"), [(90, "bfloat16", True), (90, "float16", False), (80, "bfloat16", False)]
)
def test_each_family_asks_its_table(architecture, dtype, serves, with_triton, monkeypatch):
    served = SimpleNamespace(decode_attention_refusal=lambda *_: None, sparse_attention_refusal=lambda *_: None)
    monkeypatch.setattr(_native, "library", lambda _device_type: served)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    pattern = "column", 5, 32, 32, 11, 1.0
    with FakeTensorMode(), _triton.assume(architecture, 132):
        x = torch.empty(8, 62, 1, 64, dtype=DTYPES[dtype], device="cuda")
        text, image = (torch.empty(2, 8, 62, *size, 64, dtype=x.dtype, device="cuda") for size in ((5,), (1, 33)))
        scale = torch.empty((), device="cuda")
        refusals = [
            ops._forward_unsupported(x, x, x, *pattern),
            decode.cuda_unsupported(x, x, x, text, image, *pattern),
            adamw._native_unsupported([x], [x], [x], [x], [scale], None, ()),
            grad_scale._native_unsupported([x], scale),
        ]
    assert all((refusal is None) == serves for refusal in refusals), refusals
