"""Write the README's tables of measured figures from ``bench/results/*.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from compare import best_rival, extra_bytes, milliseconds
from machine import slug

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"
ONE_HEAD = "1 x 1"
"""Batch and heads of the cases that show what further threads bring to one head."""
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", None: ""}


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A Markdown table whose first ``left`` columns are text and whose others are figures, aligned right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def ours(case: dict) -> str:
    return milliseconds(case["candidates"][case["ours"]]["median_ms"])


def share(case: dict) -> str:
    """The share of the floor that was reached, with the goal where there is one."""
    if case["floor_ms"] is None:
        return "-"
    goal = next((goal for goal in case["goals"] if goal["measure"] == "share"), None)
    return f"{case['share_of_floor']:.0%}{_goal(goal, lambda bound: f'{bound:.0%}')}"


def _goal(goal: dict | None, show: Callable[[float], str]) -> str:
    if goal is None:
        return ""
    return f" ({'goal' if goal['met'] else '**missed**'} {show(goal['bound'])})"


def rival(case: dict, name: str | None, labelled: bool = False) -> str:
    """``107 · 4.4× (goal 1.5×)``: a rival's milliseconds, over ours, and the goal against it."""
    found = case["candidates"].get(name)
    if found is None:
        return "-"
    ratio = found["median_ms"] / case["candidates"][case["ours"]]["median_ms"]
    goals = [goal for goal in case["goals"] if goal["measure"] == "speed" and goal["against"] == name]
    # The best rival's goal belongs in the column of the best; another goal against the same one in its own.
    goal = goals[0] if goals else None
    label = f"{name}: " if labelled else ""
    return f"{label}{milliseconds(found['median_ms'])} · {times(ratio)}{_goal(goal, lambda bound: f'{bound:g}×')}"


def times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 99.5 else f"{ratio:.1f}×" if ratio >= 9.95 else f"{ratio:.2f}×"


def find(case: dict, start: str) -> str | None:
    """The name of the candidate that starts so."""
    return next((name for name in case["candidates"] if name.startswith(start)), None)


def memory(case: dict) -> str:
    """Memory beyond the results: ours, and that of the rival that the goal or eager torch names."""
    mine = extra_bytes(case["candidates"][case["ours"]])
    if mine is None:
        return "-"
    goal = next((goal for goal in case["goals"] if goal["measure"] in ("memory", "extra bytes")), None)
    against = case["candidates"].get((goal or {}).get("against") or find(case, "torch, eager"))
    other = f" of {extra_bytes(against) / 2**20:,.0f}" if against else ""
    missed = " (**missed**)" if goal and goal["met"] is False else ""
    return f"{mine / 2**20:,.1f}{other}{missed}"


def attention(cases: list[dict]) -> str:
    single = [case for case in cases if case["settings"]["batch x heads"] == ONE_HEAD]
    cases = [case for case in cases if case not in single]
    main = [case for case in cases if case["work"] in ("forward", "forward + backward") and _is_main(case)]
    header = [
        "pattern",
        "dtype",
        "work",
        "ours",
        "of the floor",
        "best rival of the same function",
        "dense causal SDPA",
    ]
    rows = [
        [
            case["settings"]["pattern"],
            SHORT[case["dtype"]],
            case["work"],
            ours(case),
            share(case),
            rival(case, best_rival(case), labelled=True),
            rival(case, "SDPA, dense causal"),
        ]
        for case in main
    ]
    steps = [case for case in cases if case["work"] == "decode step"]
    rows += [
        [
            case["settings"]["pattern"],
            SHORT[case["dtype"]],
            "decode, last token",
            ours(case),
            share(case),
            rival(case, best_rival(case), labelled=True),
            rival(case, "SDPA on the full cache"),
        ]
        for case in steps
    ]
    text = grid(header, rows, 3)
    others = [case for case in cases if case["work"] == "forward" and not _is_main(case)]
    parts = [text, *([_other_shapes(others)] if others else []), *([_one_head(single)] if single else [])]
    return "\n\n".join(parts)


def _one_head(cases: list[dict]) -> str:
    rows = [
        [
            case["settings"]["pattern"],
            SHORT[case["dtype"]],
            case["work"],
            ours(case),
            rival(case, f"{case['ours']}, one thread"),
        ]
        for case in cases
    ]
    return grid(["one head, batch 1", "dtype", "work", "all threads", "one thread"], rows, 3)


GPU_RIVALS = {
    "cuDNN's SDPA, dense causal": "cuDNN, dense causal",
    "FlashAttention-2 of SDPA, dense causal": "FlashAttention-2, dense causal",
    "SDPA, boolean mask": "SDPA, boolean mask",
    "FlexAttention, blocks of 128": "FlexAttention",
}


def attention_on_a_gpu(cases: list[dict]) -> str:
    """As :func:`attention`, with the rivals of a GPU; FlexAttention's best form, where it is another, in a column."""
    header = ["pattern", "work", "batch × heads", "ours", "of the floor", *GPU_RIVALS.values(), "FlexAttention, tuned"]
    rows = []
    for case in (case for case in cases if case["work"] in ("forward", "backward") and _is_main(case)):
        tuned = {
            name: found["median_ms"]
            for name, found in case["candidates"].items()
            if name.startswith("FlexAttention") and name not in GPU_RIVALS
        }
        settings = case["settings"]
        row = [settings["pattern"], case["work"], settings["batch x heads"].replace("x", "×"), ours(case), share(case)]
        row += [rival(case, name) for name in GPU_RIVALS]
        rows.append([*row, rival(case, min(tuned, key=tuned.get) if tuned else None)])
    text = grid(header, rows, 3)
    steps = [case for case in cases if case["work"] == "decode step"]
    if steps:
        rows = [
            [
                case["settings"]["pattern"],
                f"{case['settings']['batch x heads'].replace('x', '×')}"
                + (", samples of one text" if "samples of a prompt" in case["settings"] else ""),
                ours(case),
                share(case),
                rival(case, f"{case['ours']}, native"),
                rival(case, "SDPA on the full cache"),
                rival(case, "SDPA on the full cache, boolean mask"),
            ]
            for case in steps
        ]
        header = ["decode, last token", "rows × heads", "ours", "of the floor", "ours, compiled"]
        header += ["full-cache SDPA", "with the mask"]
        text += "\n\n" + grid(header, rows, 2)
    others = [case for case in cases if case["work"] == "forward" and not _is_main(case)]
    return text + ("\n\n" + _other_shapes(others) if others else "")


def _is_main(case: dict) -> bool:
    found = case["settings"]
    return (found["text"], found["grid"], found["head dim"]) == (256, "32x32", 64)


def _other_shapes(cases: list[dict]) -> str:
    """Forward at other shapes as one line of ratios each."""
    lines: dict[str, dict[tuple[str, str], str]] = {}
    for case in cases:
        found = case["settings"]
        name = f"text {found['text']}, grid {found['grid']}, {found['seq']} tokens, head dim {found['head dim']}"
        ratio = case["candidates"]["SDPA, boolean mask"]["median_ms"] / case["candidates"][case["ours"]]["median_ms"]
        lines.setdefault(name, {})[(found["pattern"], SHORT[case["dtype"]])] = times(ratio)
    columns = sorted({column for line in lines.values() for column in line}, key=_column_order)
    rows = [[name, *(line.get(column, "-") for column in columns)] for name, line in lines.items()]
    header = ["forward, times as fast as SDPA with the boolean mask", *(" ".join(column) for column in columns)]
    return grid(header, rows, 1)


def _column_order(column: tuple[str, str]) -> tuple[int, str]:
    return ["row", "column", "conv"].index(column[0]), column[1] != "fp32"


def _eager(case: dict) -> str:
    """Eager torch, which may have had to convert its inputs."""
    name = find(case, "torch, eager")
    note = "" if name is None else name.removeprefix("torch, eager").strip(", ")
    return rival(case, name) + (f", {note}" if note else "")


def losses(cases: list[dict]) -> str:
    """Ops with one work a row: ours, the floor, eager and compiled torch and whoever else is fastest."""
    header = ["op", "dtype", "ours", "of the floor", "torch, eager", "torch, compiled", "DALLE-pytorch's way", "MiB"]
    rows = [
        [
            ", ".join(filter(None, (f"`{case['family']}`", case["settings"].get("memory"), case["work"]))),
            SHORT[case["dtype"]],
            ours(case),
            share(case),
            _eager(case),
            rival(case, find(case, "torch, compiled")),
            rival(case, find(case, "DALLE-pytorch") or find(case, "as DALLE-pytorch")),
            memory(case),
        ]
        for case in cases
    ]
    return grid(header, rows, 2)


def generic(cases: list[dict]) -> str:
    """For families without a table of their own: one for each work that has settings of its own."""
    alike: dict[tuple, list[dict]] = {}
    for case in cases:
        alike.setdefault(tuple(case["settings"]), []).append(case)
    return "\n\n".join(map(generic_table, alike.values()))


def generic_table(cases: list[dict]) -> str:
    """A row a case and a column a rival; all cases have the same settings."""
    names = list(dict.fromkeys(name for case in cases for name in case["candidates"] if name != case["ours"]))
    shown = [key for key in cases[0]["settings"] if len({str(case["settings"][key]) for case in cases}) > 1]
    rows = [
        [
            case["work"],
            *(str(case["settings"][key]) for key in shown),
            SHORT[case["dtype"]],
            ours(case),
            share(case),
            *(rival(case, name) for name in names),
        ]
        for case in cases
    ]
    return grid(["work", *shown, "dtype", "ours", "of the floor", *names], rows, 2 + len(shown))


def float16(cases: list[dict]) -> str:
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for case in cases:
        key = case["settings"]["format"], SHORT[case["dtype"]]
        name = "copy of as many bytes"
        copy = case["candidates"][name]["median_ms"]
        mine = case["candidates"][case["ours"]]["median_ms"]
        goal = next((goal for goal in case["goals"] if goal["against"] == name), None)
        cell = f"{milliseconds(mine)} · {copy / mine:.0%}{_goal(goal, lambda bound: f'{bound:.0%}')}"
        lines.setdefault(key, {})[case["work"]] = cell
    rows = [[*key, line["encode"], line["decode"]] for key, line in lines.items()]
    return grid(["format", "dtype", "encode, of copy bandwidth", "decode, of copy bandwidth"], rows, 2)


def model(cases: list[dict]) -> str:
    names = list(dict.fromkeys(name for case in cases for name in case["candidates"] if name != case["ours"]))
    labels = [name.removeprefix("DALLE-pytorch, ") for name in names]
    rows = []
    for case in cases:
        mine = ours(case)
        rate = next((goal for goal in case["goals"] if goal["measure"] == "rate"), None)
        if case["unit"]:
            per_second = 1e3 / case["candidates"][case["ours"]]["median_ms"]
            mine = f"{mine}, {per_second:,.0f} {case['unit']}/s{_goal(rate, lambda bound: f'{bound:,.0f}')}"
        rows.append([f"{case['settings']['size']}, {case['work']}", mine, *(rival(case, name) for name in names)])
    return grid(["size, work", "ours", *labels], rows, 1)


def overhead(cases: list[dict]) -> str:
    """A call beside the smallest call of torch's own that took turns with it: by their ratio a slow machine is told."""
    rows = []
    for case in cases:
        found, goal = case["candidates"][case["ours"]]["median_ms"], case["goals"][0]
        verdict = "" if goal["met"] else " (**missed**)"
        row = [f"`{case['settings']['op']}`", f"{_duration(found)}{verdict}", _duration(goal["bound"])]
        yardstick = case["candidates"].get("torch.softmax")
        beside = ["-", "-"]
        if yardstick is not None:
            beside = [_duration(yardstick["median_ms"]), times(found / yardstick["median_ms"])]
        rows.append([*row, *beside])
    header = ["without gradient, smallest input", "takes", "goal, at most", "torch.softmax itself", "ours, over it"]
    return grid(header, rows, 1)


def _duration(found_ms: float) -> str:
    return f"{found_ms:.3g} ms" if found_ms > 1 else f"{1e3 * found_ms:.3g} µs"


SECTIONS: dict[tuple[str, ...], tuple[str, Callable[[list[dict]], str]]] = {
    ("attention",): (
        "**Attention**, batch × heads 4 × 8; where nothing else is said text 256, grid 32×32, head dim 64. Dense "
        "causal SDPA, at decoding on the full cache, computes another function, with more pairs.",
        attention,
    ),
    ("gumbel_softmax", "cross_entropy", "logit_laplace"): (
        "**Relaxation and losses**: 8192 rows of 8192 codes; 1024 text rows of 16384 classes and 4096 image rows of "
        "8192, hidden 512; 32 pictures of 256×256. MiB: peak memory beyond the results, ours of eager torch's.",
        losses,
    ),
    ("linear",): (
        "**Linear layer**, 512 inputs: few rows with weights from memory, and many of 16 bits in training.",
        generic,
    ),
    ("float16",): ("**16-bit formats**, 2^24 numbers, against a copy of as many bytes.", float16),
    ("model",): (
        "**Whole model**, fp32, against DALLE-pytorch of the same width, depth, heads, vocabularies and batch: *small* "
        "is dim 256, 6 layers, 32 + 8×8 tokens, batch 8; *large* dim 512, 8 layers, 256 + 32×32 tokens, batch 1. "
        "Generation is for one token of one image.",
        model,
    ),
    ("overhead",): (
        "**Overhead** of a call, and of the import beyond torch's own. A call's goal is for a machine on which "
        "torch.softmax of two numbers takes 1.6 µs: 9.4 of them.",
        overhead,
    ),
}


GPU_SECTIONS: dict[tuple[str, ...], tuple[str, Callable[[list[dict]], str]]] = {
    ("attention",): (
        "**Attention** in bfloat16; where nothing else is said text 256, grid 32×32, head dim 64. Dense causal "
        "attention, at decoding on the full cache, computes another function, with more pairs.",
        attention_on_a_gpu,
    ),
    ("gumbel_softmax", "cross_entropy", "logit_laplace"): (
        "**Relaxation and losses**: 8192 rows of 8192 codes; 1024 text rows of 16384 classes and 4096 image rows of "
        "8192, hidden 3968; 256 pictures of 256×256. MiB: peak memory beyond the results, ours of eager torch's.",
        losses,
    ),
    ("float16",): ("**16-bit formats**, 2^28 numbers, against a copy of as many bytes.", float16),
}


def machine_section(contents: list[tuple[Path, dict]]) -> str:
    """All the tables of one machine."""
    found = contents[0][1]["machine"]
    by_family = {content["family"]: (path, content["cases"]) for path, content in contents}
    parts = [_machine_line(found, [content["machine"]["peaks"] for _, content in contents])]
    figure = ROOT / "docs" / f"roofline-{slug(found)}.png"
    if figure.exists():
        parts.append(f"![How near each op comes to the machine's limits](docs/{figure.name})")
    sections = dict(GPU_SECTIONS if "gpu" in found else SECTIONS)
    for family in sorted(set(by_family) - {family for group in sections for family in group}):
        sections[(family,)] = (f"**{family}**", generic)
    for group, (caption, table) in sections.items():
        present = [by_family[family] for family in group if family in by_family]
        if present:
            links = ", ".join(f"[{path.stem}](bench/results/{path.name})" for path, _ in present)
            parts.append(f"{caption} {links}:\n\n{table([case for _, cases in present for case in cases])}")
    return "\n\n".join(parts)


def _machine_line(found: dict, peaks: list[dict[str, float]]) -> str:
    """The machine, and what its peaks were in the runs of the families: each run's own make its floors."""

    def span(name: str, unit: float, decimals: int = 0) -> str:
        ends = (f"{end / unit:.{decimals}f}" for end in (min(p[name] for p in peaks), max(p[name] for p in peaks)))
        return " to ".join(dict.fromkeys(ends))

    rates = f"GEMM {span('gemm_float32_per_s', 1e9)} GFLOP/s in fp32, copy {span('copy_bytes_per_s', 1e9)} GB/s"
    if "gpu" in found:
        rates = (
            f"GEMM {span('gemm_bfloat16_per_s', 1e12)} TFLOP/s in bf16, copy {span('copy_bytes_per_s', 1e12, 2)} TB/s"
        )
        return f"On {found['gpu']} (CUDA {found['cuda']}, torch {found['torch']}; {rates}):"
    rates += ", as each family's run found them"
    details = f"{found['threads']} threads, {found['instruction_set']}, torch {found['torch']}; {rates}"
    return f"On {found['processor']} ({details}):"


def device_runs(path: Path) -> str:
    """What a GPU showed while kernels were written: no run of the benchmarks, so a list of its own."""
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content["machine"]
    rows = []
    for row in content["rows"]:
        took = row["microseconds"]
        others = [f"{name} {_microseconds(time)} · {times(time / took)}" for name, time in row["others"].items()]
        rows.append([row["work"], row["shape"], row["dtype"], row["kernel"], _microseconds(took), "; ".join(others)])
    header = ["work", "shape", "dtype", "kernel", "µs", "beside it, µs · times ours"]
    copy, products = found["copy_bytes_per_s"] / 1e12, found["gemm_bfloat16_per_s"] / 1e12
    rates = f"copy {copy:.2f} TB/s, bf16 GEMM {products:.0f} TFLOP/s"
    link = path.relative_to(ROOT).as_posix()
    return (
        f"On {found['gpu']} (torch {found['torch']}, triton {found['triton']}; {rates}), [{path.stem}]({link}). "
        f"{content['how']} Dense causal attention is another function, with more pairs.\n\n{grid(header, rows, 4)}"
    )


def _microseconds(time: float) -> str:
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def tables(paths: Iterable[Path]) -> str:
    """The tables of all results files, machine by machine."""
    machines: dict[str, list[tuple[Path, dict]]] = {}
    for path in sorted(paths):
        content = json.loads(path.read_text(encoding="utf-8"))
        machines.setdefault(slug(content["machine"]), []).append((path, content))
    sections = [machine_section(contents) for contents in machines.values()]
    return "\n\n".join([*sections, *map(device_runs, sorted((RESULTS / "device_runs").glob("*.json")))])


def main() -> None:
    text = README.read_text(encoding="utf-8")
    text = re.sub(
        f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{tables(RESULTS.glob('*.json'))}\n{END}", text, flags=re.DOTALL
    )
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
