"""CUDA kernels of products and of copies ahead, compiled for sm_90a and held to what is known of their machine code.

``python tests/cuda_gates.py [--update]`` compiles the sources that include such kernels and reads what each kernel
needs: registers, wgmma products (HGMMA), bulk tensor copies (UTMALDG), products of a warp (HMMA), copies of a thread
(LDGSTS), spills. It ends with status 1 where a kernel spills, has its products wait for each other, or differs from
``tests/gates/cuda.json``, which ``--update`` writes anew.
It needs nvcc, and the disassembler that Triton's wheel carries; no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "gates" / "cuda.json"
NVCC = "13.0"
"""Whose machine code the checked-in table holds; of another version only spills and waiting products count."""
REGISTER_SLACK = 8


@dataclass(frozen=True)
class Code:
    """What a kernel's machine code holds; ``registers`` is the highest number that an instruction names."""

    registers: int
    hgmma: int
    utmaldg: int
    hmma: int = 0
    ldgsts: int = 0
    spills: int = 0

    @property
    def instructions(self) -> str:
        return f"{self.hgmma} HGMMA, {self.utmaldg} UTMALDG, {self.hmma} HMMA and {self.ldgsts} LDGSTS"


def unavailable() -> str | None:
    """Why nothing can be compiled and read here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if importlib.util.find_spec("triton") is None:
        return "Triton, whose wheel carries the disassembler, is not installed"
    return None


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def sources() -> list[Path]:
    """The .cu files that include such kernels, which are in headers of their own."""
    found = sorted((ROOT / "csrc").rglob("*.cu"))
    kernels = re.compile(r"/(hopper_\w+|decode_(rows|samples)|few_rows)\.h")
    return [path for path in found if kernels.search(path.read_text(encoding="utf-8"))]


def name_of(mangled: str) -> str:
    """``kernel<numbers and types>`` of a mangled name, without the namespaces, one of which is the file's alone."""
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    name = re.sub(r"^void |dalle::|cuda::|\(anonymous namespace\)::|_GLOBAL__N_+\w+::", "", name.partition("(dalle")[0])
    return re.sub(r"\(\w+\)", "", name)


def compiled(source: Path) -> tuple[dict[str, Code], list[str]]:
    """The kernels of a source by name, and what the assembler complains of."""
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        command = ["nvcc", "-std=c++17", "-O3", "-I", str(ROOT / "csrc"), "-arch=sm_90a", "-cubin", "-o", cubin]
        done = subprocess.run([*command, str(source)], check=True, capture_output=True, text=True)
        text = subprocess.run([tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    codes = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", part, re.MULTILINE)
        codes[name_of(re.match(r"[\w$]+", part).group())] = Code(
            registers=max(map(int, re.findall(r"\bR(\d+)\b", part)), default=0),
            hgmma=sum(opcode.startswith("HGMMA") for opcode in opcodes),
            utmaldg=sum(opcode.startswith("UTMALDG") for opcode in opcodes),
            hmma=sum(opcode.startswith("HMMA") for opcode in opcodes),
            ldgsts=sum(opcode.startswith("LDGSTS") for opcode in opcodes),
            spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        )
    return codes, re.findall(r"wgmma\.mma_async instructions are serialized.*", done.stdout + done.stderr)


def faults(name: str, code: Code, known: Code | None) -> list[str]:
    wrong = [f"{code.spills} instructions for spilled registers"] if code.spills else []
    if known is None:
        wrong.append("not in the checked-in table; make gates UPDATE=1 puts it there")
        known = code
    if abs(code.registers - known.registers) > REGISTER_SLACK:
        wrong.append(f"{code.registers} registers instead of {known.registers}")
    if code.instructions != known.instructions:
        wrong.append(f"{code.instructions} instead of {known.instructions}")
    return [f"{name}: {fault}" for fault in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the checked-in table anew")
    options = parser.parse_args()
    reason = unavailable()
    if reason is not None:
        print(f"CUDA kernels are not checked: {reason}")
        return
    codes: dict[str, Code] = {}
    wrong: list[str] = []
    for source in sources():
        found, complaints = compiled(source)
        codes |= found
        wrong += [f"{source.name}: {complaint}" for complaint in complaints]
    if options.update:
        rows = [f"  {json.dumps(name)}: {json.dumps(asdict(code))}" for name, code in sorted(codes.items())]
        TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    known = {name: Code(**code) for name, code in json.loads(TABLE.read_text(encoding="utf-8")).items()}
    if nvcc_version() != NVCC:
        known = codes
    width = max(map(len, codes))
    print(f"{'kernel':{width}}  registers  HGMMA  UTMALDG  HMMA  LDGSTS  spills")
    for name, code in sorted(codes.items()):
        counts = f"{code.hgmma:5}  {code.utmaldg:7}  {code.hmma:4}  {code.ldgsts:6}  {code.spills:6}"
        print(f"{name:{width}}  {code.registers:9}  {counts}")
        wrong += faults(name, code, known.get(name))
    wrong += [f"{name}: no longer compiled; make gates UPDATE=1" for name in sorted(known.keys() - codes.keys())]
    print(*(f"FAILED {fault}" for fault in wrong), sep="\n", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
