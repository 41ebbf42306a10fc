"""Draw ``docs/roofline-<machine>.png`` from ``bench/results/*.json``: how near to the machine's limits each op comes.

Left: works with a known number of operations, over their intensity, under the roofs of measured bandwidth and matrix
products. Right: works bounded by memory, as the share of a copy's bandwidth that they reach.
"""

from __future__ import annotations

import json
from pathlib import Path

from compare import best_rival
from machine import slug
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import ONE_HEAD

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
COLOURS = {"row": "#1f77b4", "column": "#ff7f0e", "conv": "#2ca02c", "cross_entropy": "#d62728", "linear": "#9467bd"}
MARKERS = {"forward": "o", "backward": "v", "forward + backward": "s", "decode step": "^"}


def shown(case: dict) -> bool:
    """The main shape stands for attention; other shapes would only crowd the picture."""
    settings = case["settings"]
    if case["family"] != "attention":
        return True
    main = (settings["text"], settings["grid"], settings["head dim"]) == (256, "32x32", 64)
    return main and settings["batch x heads"] != ONE_HEAD


def _name(case: dict) -> str:
    return case["settings"].get("pattern", case["family"])


def draw_roofs(axes: Axes, cases: list[dict], peaks: dict[str, float], on_gpu: bool) -> None:
    low, high = 0.2, max([1000.0, *(2 * case["operations"] / case["bytes_moved"] for case in cases)])
    dtype = "bfloat16" if on_gpu else "float32"
    products = peaks[f"gemm_{dtype}_per_s"] / 1e9
    # A GPU's cache is faster than the launch that its peak would be measured by.
    roofs = (("copy", "memory", "-", 0.5), ("cache", "cache", "--", 0.25))[: 1 if on_gpu else 2]
    for name, label, style, place in roofs:
        bandwidth = peaks[f"{name}_bytes_per_s"] / 1e9
        axes.plot([low, products / bandwidth, high], [low * bandwidth, products, products], style, color="black")
        corner = place * products / bandwidth
        axes.annotate(
            f"{label}, {bandwidth:.0f} GB/s",
            (corner, corner * bandwidth),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=8,
        )
    axes.text(high, products * 1.06, f"{dtype} GEMM, {products:.0f} GFLOP/s", ha="right", fontsize=8)
    for case in cases:
        intensity = case["operations"] / case["bytes_moved"]
        colour = COLOURS.get(_name(case), "black")
        style = {"color": colour, "fillstyle": "full" if case["dtype"] == "float32" else "none"}
        ours = case["operations"] / case["candidates"][case["ours"]]["median_ms"] / 1e6
        axes.plot(intensity, ours, MARKERS.get(case["work"], "D"), **style)
        best = best_rival(case)
        if best is not None:
            theirs = case["operations"] / case["candidates"][best]["median_ms"] / 1e6
            axes.plot([intensity, intensity], [theirs, ours], color=colour, linewidth=0.6, alpha=0.6)
            axes.plot(intensity, theirs, "_", color=colour, markersize=9)
    for name in dict.fromkeys(map(_name, cases)):
        axes.plot([], [], "-", color=COLOURS.get(name, "black"), label=name)
    for work in dict.fromkeys(case["work"] for case in cases):
        axes.plot([], [], MARKERS.get(work, "D"), color="grey", label=work)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations a byte (ideal)", ylabel="GFLOP/s (ideal)")
    axes.grid(which="both", linewidth=0.3, alpha=0.5)
    axes.legend(fontsize=8, loc="upper left" if on_gpu else "lower center")
    axes.set_title("Full markers fp32, open ones bf16; dashes: the best rival of the same function", fontsize=9)


def draw_shares(axes: Axes, cases: list[dict]) -> None:
    names, shares, theirs = [], [], []
    for case in cases:
        settings = case["settings"]
        detail = settings.get("format")
        names.append(" ".join(filter(None, (case["family"], detail, case["dtype"], case["work"]))))
        shares.append(100 * case["share_of_floor"])
        best = best_rival(case)
        theirs.append(100 * case["floor_ms"] / case["candidates"][best]["median_ms"] if best else None)
    positions = range(len(names))
    axes.barh(positions, shares, color="#1f77b4", height=0.7)
    for position, value in zip(positions, theirs):
        if value is not None:
            axes.plot([value, value], [position - 0.35, position + 0.35], color="black", linewidth=1.5)
    axes.set_yticks(positions, names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="grey", linewidth=0.8)
    axes.set_xlabel("% of a copy's bandwidth (ideal bytes)")
    axes.set_title("Bounded by memory; black: the best rival", fontsize=9)


def draw(contents: list[dict], path: Path) -> None:
    """One machine's results as a picture."""
    found = contents[0]["machine"]
    cases = [case for content in contents for case in content["cases"] if case.get("bytes_moved") and shown(case)]
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_roofs(left, [case for case in cases if case["operations"]], found["peaks"], "gpu" in found)
    draw_shares(right, [case for case in cases if not case["operations"]])
    where = found.get("gpu") or f"{found['processor']}, {found['threads']} threads, {found['instruction_set']}"
    figure.suptitle(f"{where}, torch {found['torch']}", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    machines: dict[str, list[dict]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        machines.setdefault(slug(content["machine"]), []).append(content)
    for name, contents in machines.items():
        path = DOCS / f"roofline-{name}.png"
        draw(contents, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
