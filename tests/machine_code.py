"""What GPU machine code holds, read by the CUDA tools in Triton's wheel; and the checked-in tables of it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "gates"
REGISTER_SLACK = 8
"""How many registers more or fewer than are known a kernel may need."""
PROCESSES = 2


def tool(name: str, *arguments: str, folder: str | None = None) -> str:
    """What one of the CUDA tools in Triton's wheel prints."""
    path = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True, cwd=folder).stdout


class Resources(NamedTuple):
    """What a kernel takes: registers a thread, and bytes of shared memory that no launch asks for."""

    registers: int
    shared: int


def resources(cubin: str) -> dict[str, Resources]:
    """Of each kernel in the file ``cubin``, by its mangled name."""
    usage = tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
    return {name: Resources(int(registers), int(shared)) for name, registers, shared in found}


def instructions(cubin: str) -> dict[str, list[str]]:
    """The instructions, without predicates, of each kernel in the file ``cubin``, by its mangled name."""
    # To follow the branches and name where they lead would take a third longer.
    code = tool("nvdisasm", "--print-code", "--no-dataflow", cubin)
    parts = re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]
    line = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z].*)", re.MULTILINE)
    return {re.match(r"[\w$]+", part).group(): line.findall(part) for part in parts}


def count(lines: list[str], *opcodes: str) -> int:
    """How many of the instructions have one of these opcodes, with whatever suffix."""
    return sum(line.startswith(opcodes) for line in lines)


def spills(lines: list[str]) -> int:
    """How many of the instructions move spilled registers or other local memory."""
    return count(lines, "LDL", "STL")


def read_table(name: str) -> dict[str, dict[str, Any]]:
    """What is known of the launches or kernels of ``gates/<name>.json``; {} where there is none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_table(name: str, codes: Mapping[str, dict[str, Any]]) -> None:
    """One line a launch or kernel, so that a change shows as one."""
    rows = [f"  {json.dumps(key)}: {json.dumps(codes[key])}" for key in sorted(codes)]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
