"""The CUDA kernels of the built library, held to what is known of their machine code.

``python tests/cuda_gates.py [--update]`` reads from ``dalle_kernels._cuda``, for each architecture in it, what each
kernel needs: registers, shared memory beside what a launch asks for (on sm_90 with the 1,024 bytes that the system
takes of each block), wgmma products (HGMMA) and waits for them, bulk tensor copies (UTMALDG), products of a warp in 16
bits (HMMA) and in float64 (DMMA), copies of a thread (LDGSTS), spills. It prints a table, and ends with status 1 where
a kernel spills or differs from ``tests/gates/cuda.json``, which ``--update`` writes anew. More waits than are known
mean that the assembler has the products wait for each other. The file names the CUDA whose machine code it holds: of a
library that another one built only spills count, as the last line then says. It needs the library and the tools that
Triton's wheel carries; no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import machine_code
from machine_code import count

COMPILER = "CUDA"
"""The table's key, of no kernel, for the version of CUDA whose machine code it holds."""


@dataclass(frozen=True)
class Code:
    """What a kernel's machine code needs and how many instructions it has of each kind that counts."""

    registers: int
    shared: int
    hgmma: int
    waits: int
    utmaldg: int
    hmma: int
    dmma: int
    ldgsts: int
    spills: int

    @property
    def instructions(self) -> str:
        return (
            f"{self.hgmma} HGMMA in {self.waits} groups, {self.utmaldg} UTMALDG, {self.hmma} HMMA, "
            f"{self.dmma} DMMA and {self.ldgsts} LDGSTS"
        )

    def faults(self, known: Code | None) -> Iterator[str]:
        if self.spills:
            yield f"{self.spills} instructions for spilled registers or other local memory"
        if known is None:
            yield "not in the checked-in table; make gates UPDATE=1 puts it there"
            return
        if abs(self.registers - known.registers) > machine_code.REGISTER_SLACK:
            yield f"{self.registers} registers instead of {known.registers}"
        if self.shared != known.shared:
            yield f"{self.shared} bytes of shared memory instead of {known.shared}"
        if self.instructions != known.instructions:
            yield f"{self.instructions} instead of {known.instructions}"


def unavailable() -> str | None:
    """Why nothing can be read here, or None."""
    if importlib.util.find_spec("dalle_kernels._cuda") is None:
        return "the CUDA library is not built; DALLE_KERNELS_CUDA=on builds it where nvcc is"
    if importlib.util.find_spec("triton") is None:
        return "Triton, whose wheel carries the disassembler, is not installed"
    return None


def readable(mangled: list[str]) -> list[str]:
    """``kernel<numbers and types>`` of each mangled name, without namespaces, argument types and casts."""
    command = ["c++filt", *mangled]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = []
    for name in names:
        name = re.sub(r"^void |dalle::|cuda::|\(anonymous namespace\)::|_GLOBAL__N_+\w+::", "", name)
        found.append(re.sub(r"\([\w:]+\)(?=-?\d|true|false)", "", name).partition("(")[0])
    return found


def examine(cubin: Path) -> dict[str, Code]:
    """The kernels in a cubin by their mangled names."""
    needs = machine_code.resources(str(cubin))
    return {
        mangled: Code(
            registers=needs[mangled].registers,
            shared=needs[mangled].shared,
            hgmma=count(lines, "HGMMA"),
            # The last product of a group signals the scoreboard that the group's wait reads.
            waits=sum(line.startswith("HGMMA") and "gsb0" in line for line in lines),
            utmaldg=count(lines, "UTMALDG"),
            hmma=count(lines, "HMMA"),
            dmma=count(lines, "DMMA"),
            ldgsts=count(lines, "LDGSTS"),
            spills=machine_code.spills(lines),
        )
        for mangled, lines in machine_code.instructions(str(cubin)).items()
    }


def library() -> tuple[dict[str, Code], set[str], str]:
    """The kernels of the built library by name and architecture, the architectures, and the CUDA that built it."""
    with tempfile.TemporaryDirectory() as folder:
        built = importlib.util.find_spec("dalle_kernels._cuda").origin
        machine_code.tool("cuobjdump", "--extract-elf", "all", built, folder=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        compiler = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", cubins[0].read_bytes())
        with ThreadPoolExecutor(machine_code.PROCESSES) as pool:
            examined = list(pool.map(examine, cubins))
    codes: dict[str, Code] = {}
    for cubin, found in zip(cubins, examined, strict=True):
        architecture = cubin.suffixes[-2].lstrip(".")
        for name, code in zip(readable(list(found)) if found else [], found.values(), strict=True):
            key = f"{name} | {architecture}"
            if key in codes:
                raise SystemExit(f"two kernels are called {name}; the table needs a name for each")
            codes[key] = code
    return codes, {cubin.suffixes[-2].lstrip(".") for cubin in cubins}, compiler.group(1).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the checked-in table anew")
    options = parser.parse_args()
    reason = unavailable()
    if reason is not None:
        print(f"CUDA kernels are not checked: {reason}")
        return
    codes, architectures, compiler = library()
    if options.update:
        rows = {name: asdict(code) for name, code in codes.items()}
        machine_code.write_table("cuda", {COMPILER: {"version": compiler}, **rows})
    table = machine_code.read_table("cuda")
    held = table.pop(COMPILER, {}).get("version")
    known = {name: Code(**code) for name, code in table.items() if name.rpartition(" ")[2] in architectures}
    if held != compiler:
        known = codes
    width = max(map(len, codes))
    print(f"{'kernel':{width}}  registers  shared  HGMMA  groups  UTMALDG  HMMA  DMMA  LDGSTS  spills")
    wrong: list[str] = []
    for name, code in sorted(codes.items()):
        counts = f"{code.hgmma:5}  {code.waits:6}  {code.utmaldg:7}  {code.hmma:4}  {code.dmma:4}  {code.ldgsts:6}"
        print(f"{name:{width}}  {code.registers:9}  {code.shared:6}  {counts}  {code.spills:6}")
        wrong += [f"{name}: {fault}" for fault in code.faults(known.get(name))]
    wrong += [f"{name}: no longer in the library; make gates UPDATE=1" for name in sorted(known.keys() - codes.keys())]
    print(*(f"FAILED {fault}" for fault in wrong), sep="\n", flush=True)
    if held != compiler:
        print(f"CUDA {compiler} built the library and the table holds what CUDA {held} makes: only spills were checked")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
