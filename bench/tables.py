"""Write the README's tables of measured figures from ``bench/results/*.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
NOT_SHOWN = ("times", "bytes_moved", "pairs")
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"


def table(path: Path) -> str:
    """One results file as a Markdown table: a row a case, a column a candidate, medians in milliseconds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    machine, cases = content["machine"], content["cases"]
    settings = [name for name, value in cases[0].items() if name not in NOT_SHOWN and not isinstance(value, dict)]
    shown = [name for name in settings if len({str(case[name]) for case in cases}) > 1]
    same = [f"{name.replace('_', ' ')} {cases[0][name]}" for name in settings if name not in shown]
    candidates = list(cases[0]["times"])
    lines = [
        f"`python bench/bench_{path.stem.rpartition('-')[0]}.py`, median milliseconds"
        + (f", {', '.join(same)}" if same else "")
        + f", on {machine.get('gpu', machine['processor'])} ({_details(machine)}), [JSON](bench/results/{path.name}):",
        "",
        "| " + " | ".join([*(name.replace("_", " ") for name in shown), *candidates]) + " |",
        "|" + "---|" * len(shown) + "---:|" * len(candidates),
    ]
    for case in cases:
        times = (_milliseconds(case["times"][name]["median_ms"]) for name in candidates)
        lines.append("| " + " | ".join([*(str(case[name]) for name in shown), *times]) + " |")
    return "\n".join(lines)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _details(machine: dict[str, object]) -> str:
    if "gpu" in machine:
        return f"CUDA {machine['cuda']}, torch {machine['torch']}"
    return f"{machine['threads']} threads, {machine['instruction_set']}, torch {machine['torch']}"


def main() -> None:
    tables = "\n\n".join(table(path) for path in sorted(RESULTS.glob("*.json")))
    text = README.read_text(encoding="utf-8")
    text = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{tables}\n{END}", text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
