"""Run the benchmarks, print how everyone compares with us, and write ``bench/results/<machine>-<family>.json``.

    python bench/compare.py                                  every family (what `make bench` does)
    python bench/compare.py attention --rounds 3             one family, quickly
    python bench/compare.py attention -k "row and forward"   a part of one; no file is written
    python bench/compare.py --from a.json b.json             what earlier runs wrote with --benchmark-json

Each family runs in a process of its own, which measures the machine's peaks too; floors come from the highest of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import machine
from harness import BEST_RIVAL

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
PASSED_ON = ("rounds", "threads", "seconds", "device")


def families() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py"))


def command(family: str, options: Sequence[str], output: Path) -> list[str]:
    """What runs one family's benchmarks into ``output``; it ends well unless a check or a benchmark failed."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--benchmark-quiet"]
    return [*pytest, f"--benchmark-json={output}", *options, str(BENCH / f"bench_{family}.py")]


def measure(family: str, options: Sequence[str], output: Path) -> bool:
    return subprocess.run(command(family, options, output), cwd=BENCH.parent, check=False).returncode == 0


def best_rival(case: dict) -> str | None:
    """The fastest of the others that compute the same function."""
    times = {
        name: found["median_ms"]
        for name, found in case["candidates"].items()
        if not name.startswith(case["ours"]) and found["same_function"]
    }
    return min(times, key=times.get) if times else None


def extra_bytes(found: dict) -> int | None:
    """Peak memory of a call beyond its results; None where it was not measured."""
    return max(0, found["peak_bytes"] - found["result_bytes"]) if "peak_bytes" in found else None


def reached(goal: dict, case: dict) -> tuple[float | None, str | None]:
    """What was reached on a goal's measure, and against whom; None where it was not measured."""
    ours = case["candidates"][case["ours"]]
    against = best_rival(case) if goal["against"] == BEST_RIVAL else goal["against"]
    rival = case["candidates"].get(against)
    if goal["against"] is not None and rival is None:
        return None, against
    match goal["measure"]:
        case "speed":
            return rival["median_ms"] / ours["median_ms"], against
        case "memory" if extra_bytes(rival):
            return extra_bytes(ours) / extra_bytes(rival), against
        case "extra bytes" if "peak_bytes" in ours:
            return extra_bytes(ours), None
        case "share" if case["floor_ms"] is not None:
            return case["floor_ms"] / ours["median_ms"], None
        case "milliseconds":
            return ours["median_ms"], None
        case "rate":
            return 1e3 / ours["median_ms"], None
    return None, against


def judge(case: dict, peaks: dict[str, float]) -> dict:
    """The case with its floor, the share of it that was reached, and what became of each goal."""
    case = {"ours": next(iter(case["candidates"])), **case}
    case["floor_ms"] = machine.floor_ms(case, peaks)
    if case["floor_ms"] is not None:
        case["share_of_floor"] = case["floor_ms"] / case["candidates"][case["ours"]]["median_ms"]
    goals = []
    for goal in case["goals"]:
        value, against = reached(goal, case)
        at_least = goal["measure"] in ("speed", "share", "rate")
        met = None if value is None else (value >= goal["bound"] if at_least else value <= goal["bound"])
        goals.append({**goal, "against": against, "reached": value, "met": met})
    return {**case, "goals": goals}


def results(reports: Iterable[dict]) -> dict[str, dict]:
    """The results files' contents by family, from what runs of pytest-benchmark wrote on one machine.

    Floors come from the highest peaks that any of the runs saw: a peak measured beside other work is none. A family
    measured in parts keeps the rest of the machine's description from the first.
    """
    reports = list(reports)
    peaks: dict[str, float] = {}
    for report in reports:
        for name, rate in report["machine_info"]["side_by_side"]["peaks"].items():
            peaks[name] = max(rate, peaks.get(name, rate))
    by_family: dict[str, dict] = {}
    for report in reports:
        found = {**report["machine_info"]["side_by_side"], "peaks": peaks}
        for benchmark in report["benchmarks"]:
            case = judge(benchmark["extra_info"], peaks)
            by_family.setdefault(case["family"], {"machine": found, "cases": []})["cases"].append(case)
    return by_family


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def describe(case: dict) -> str:
    settings = " ".join(f"{name} {value}" for name, value in case["settings"].items())
    return ", ".join(part for part in (case["family"], settings, case["dtype"], case["work"]) if part)


def describe_goal(goal: dict, unit: str) -> str:
    """One goal in words, such as ``goal: 2.5x against SDPA, reached 2.7x: met``."""
    formats = {
        "speed": lambda value: f"{value:.2f}x",
        "memory": lambda value: f"{value:.3f} of the memory beyond the results",
        "extra bytes": lambda value: f"{value / 2**20:.1f} MiB beyond the results",
        "share": lambda value: f"{value:.0%} of the floor",
        "milliseconds": lambda value: f"{milliseconds(value)} ms",
        "rate": lambda value: f"{value:,.0f} {unit}/s",
    }
    show = formats[goal["measure"]]
    verdict = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
    against = f" against {goal['against']}" if goal["against"] else ""
    got = "" if goal["reached"] is None else f", reached {show(goal['reached'])}"
    return f"goal {show(goal['bound'])}{against}{got}: {verdict}"


def ratio_table(case: dict) -> str:
    """One case for the eye: every candidate's median, its ratio to ours, its extra memory; the floor; the goals."""
    ours = case["candidates"][case["ours"]]["median_ms"]
    lines = [describe(case)]
    for name, found in case["candidates"].items():
        memory = f"  {extra_bytes(found) / 2**20:8.1f} MiB" if "peak_bytes" in found else ""
        other = "" if found["same_function"] else "  (another function)"
        lines.append(
            f"  {name:58} {milliseconds(found['median_ms']):>9} ms  {found['median_ms'] / ours:7.2f}x{memory}{other}"
        )
    lines += [f"  {name:58} not here: {reason}" for name, reason in case["unavailable"].items()]
    if case["floor_ms"] is not None:
        lines.append(f"  {'floor':58} {milliseconds(case['floor_ms']):>9} ms  {case['share_of_floor']:7.0%} reached")
    lines += [f"  {describe_goal(goal, case['unit'])}" for goal in case["goals"]]
    return "\n".join(lines)


def write(family: str, content: dict, name: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{family}.json"
    path.write_text(json.dumps({"family": family, **content}, indent=1) + "\n", encoding="utf-8")
    return path


def publish(reports: Iterable[dict], name: str | None = None, write_files: bool = True) -> None:
    """Print everyone's figures and the goals that were missed, and write the results files of the machine ``name``."""
    missed = []
    for family, content in results(reports).items():
        for case in content["cases"]:
            print(ratio_table(case), end="\n\n")
            failing = [goal for goal in case["goals"] if goal["met"] is False]
            missed += [f"{describe(case)}: {describe_goal(goal, case['unit'])}" for goal in failing]
        if write_files:
            print(f"wrote {write(family, content, name or machine.slug(content['machine']))}\n")
    if missed:
        print("goals missed:", *missed, sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Other options go to pytest, such as -k row; then no file is written.",
    )
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(families())} (default: all)")
    parser.add_argument(
        "--from",
        dest="reports",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="read what pytest wrote with --benchmark-json, of a family in parts maybe; measure nothing",
    )
    parser.add_argument("--machine", help="its name in the files' names (default: made from the processor's)")
    parser.add_argument("--dry", action="store_true", help="print, write no file")
    for name in PASSED_ON:
        parser.add_argument(f"--{name}", help=f"as pytest's --{name} of bench/conftest.py")
    options, others = parser.parse_known_args()
    unknown = sorted(set(options.families) - set(families()))
    if unknown:
        parser.error(f"expected families among {', '.join(families())}, got {', '.join(unknown)}")
    values = {name: getattr(options, name) for name in PASSED_ON}
    passed = [f"--{name}={value}" for name, value in values.items() if value]
    failed, reports = [], [json.loads(path.read_text(encoding="utf-8")) for path in options.reports]
    with tempfile.TemporaryDirectory() as folder:
        for family in () if reports else options.families or families():
            output = Path(folder) / f"{family}.json"
            if not measure(family, [*passed, *others], output):
                failed.append(family)
            if output.exists() and output.stat().st_size:
                reports.append(json.loads(output.read_text(encoding="utf-8")))
    publish(reports, options.machine, not options.dry and not others)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
