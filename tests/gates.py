"""Triton's kernels compiled for chips that need not be here, and held to what is known of their machine code.

``python tests/gates.py [--update] [--candidates] [FAMILY ...]`` makes every call of ``bench/triton_<family>.py`` on
meta tensors for sm_80 and sm_90, compiles each launch just as it would run there and reads its machine code. It prints
a table, and ends with status 1 where a kernel spills registers, multiplies float32 as tf32, or differs from
``tests/gates/<family>.json``: registers and shared memory may differ by a little, the number of tensor-core
instructions not at all. Nor may a launch on sm_80, whose configurations serve all other chips too, take more shared
memory than the least of them has. ``--update`` writes these files anew. ``--candidates`` compiles instead what ``make
tune`` would choose among, and ends with status 1 where one spills, multiplies as tf32 or needs more shared memory than
the chip has. Compiled kernels are kept in Triton's own cache, so a second run takes seconds. What random calls launch
is compiled by tests/gates_fuzz.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

# Also in the processes that compile: kernels are compiled only where the interpreter is off.
os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import machine_code
from machine_code import count
from triton_cases import cases, described, families

from dalle_kernels import _triton
from dalle_kernels._triton_configurations import use_configuration

CHIPS = {80: 108, 90: 132}
"""Architectures, and how many multiprocessors the chip has that stands for each (A100, H100)."""
MOST_SHARED = {80: 163 << 10, 90: 227 << 10}
"""The shared memory that a block may have on these architectures."""
MOST_OF_DEFAULT = 99 << 10
"""And on sm_86, 89 and 120, which take the same rows of the table of configurations as sm_80: DEFAULT's."""
TRITON = "3.6.0"
"""Whose machine code the checked-in tables hold; of another version only spills and tf32 count."""
SHARED_SLACK = 1024


@dataclass(frozen=True)
class Code:
    """What the machine code of one launch needs: ``hmma`` and ``hgmma`` count tensor-core instructions, ``utmaldg``
    loads by tensor descriptors."""

    registers: int
    shared: int
    hmma: int
    hgmma: int
    tf32: int
    spills: int
    utmaldg: int = 0

    def own_faults(self, most_shared: int) -> Iterator[str]:
        """What no kernel may do; ``most_shared``: the bytes of shared memory that a block may have."""
        if self.spills:
            yield f"{self.spills} instructions for spilled registers or other local memory"
        if self.tf32:
            yield f"{self.tf32} products in tf32"
        if self.shared > most_shared:
            yield f"{self.shared} bytes of shared memory, where a block may have {most_shared}"

    def faults(self, known: Code | None, most_shared: int) -> Iterator[str]:
        yield from self.own_faults(most_shared)
        if known is None:
            yield "not in the checked-in table; make gates UPDATE=1 puts it there"
            return
        if abs(self.registers - known.registers) > machine_code.REGISTER_SLACK:
            yield f"{self.registers} registers instead of {known.registers}"
        if abs(self.shared - known.shared) > SHARED_SLACK:
            yield f"{self.shared} bytes of shared memory instead of {known.shared}"
        if (self.hmma, self.hgmma) != (known.hmma, known.hgmma):
            yield f"{self.hmma} HMMA and {self.hgmma} HGMMA instead of {known.hmma} and {known.hgmma}"
        if self.utmaldg != known.utmaldg:
            yield f"{self.utmaldg} loads by tensor descriptors instead of {known.utmaldg}"


class Driver:
    """Stands for Triton's driver of a GPU that is not here, for compiling only."""

    def __init__(self, architecture: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def examine(kernel) -> Code:
    """The code of a compiled Triton kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (needs,) = machine_code.resources(file.name).values()
        (lines,) = machine_code.instructions(file.name).values()
    return Code(
        registers=needs.registers,
        shared=kernel.metadata.shared,
        hmma=count(lines, "HMMA"),
        hgmma=count(lines, "HGMMA"),
        utmaldg=count(lines, "UTMALDG"),
        tf32=sum("TF32" in line.split()[0] for line in lines),
        spills=machine_code.spills(lines),
    )


Choice = tuple[tuple[str, str], int]
"""A row of the table of configurations, and the number of the candidate to take for it."""


Launches = dict[str, tuple[str, object]]
"""By the hash of the code: the kernel's name, and what it was compiled to."""


@contextmanager
def compiling(architecture: int) -> Iterator[Launches]:
    """Within the block kernels are compiled for the architecture instead of launched, and gathered."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: Launches = {}
    run = JITFunction.run

    def compile_only(function, *args, grid, warmup, **options):
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        # A call may launch a kernel many times, for chunks say, mostly in the same compiled form.
        found[kernel.hash] = function.__name__.strip("_"), kernel
        return kernel

    driver.set_active(Driver(architecture))
    # A kernel keeps its compiled forms by device, of which all are device 0 here.
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("dalle_kernels"):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
    JITFunction.run = compile_only
    try:
        with _triton.assume(architecture, CHIPS[architecture]):
            yield found
    finally:
        JITFunction.run = run


def compile_case(family: str, number: int, architecture: int, choice: Choice | None = None) -> list[tuple[str, Code]]:
    """What the launches of the family's case compile to, by a name for each: case, kernel, architecture, form."""
    case = cases(family)[number]
    with ExitStack() as stack:
        found = stack.enter_context(compiling(architecture))
        if choice is not None:
            row, candidate = choice
            chosen = case.candidates(row, architecture)[candidate]
            stack.enter_context(use_configuration(*row, chosen))
        case.prepare("meta")()
    if not found:
        raise ValueError(f"{case.name}: no Triton kernel was launched")
    seen: dict[str, int] = {}
    codes = []
    for kernel_name, kernel in found.values():
        name = f"{case.name} | {kernel_name} | sm_{architecture}"
        seen[name] = seen.get(name, 0) + 1
        codes.append((f"{name} | form {seen[name]}" if seen[name] > 1 else name, examine(kernel)))
    return codes


def known_codes(family: str) -> dict[str, Code]:
    return {name: Code(**code, tf32=0, spills=0) for name, code in machine_code.read_table(family).items()}


def write(family: str, codes: dict[str, Code]) -> None:
    kept = {name: asdict(code) for name, code in codes.items()}
    for code in kept.values():
        del code["tf32"], code["spills"]
        if not code["utmaldg"]:  # as of most
            del code["utmaldg"]
    machine_code.write_table(family, kept)


def compile_families(families: list[str]) -> dict[str, dict[str, Code]]:
    codes: dict[str, dict[str, Code]] = {family: {} for family in families}
    with ProcessPoolExecutor(machine_code.PROCESSES, get_context("spawn")) as pool:
        jobs = [
            (family, pool.submit(compile_case, family, number, architecture))
            for architecture in CHIPS
            for family in families
            for number, case in enumerate(cases(family))
            if architecture in case.architectures
        ]
        for family, job in jobs:
            codes[family].update(job.result())
    return codes


def report(family: str, codes: dict[str, Code], update: bool) -> int:
    """Print the family's table and what is wrong; how many faults there are."""
    known = codes if update or _triton.version() != TRITON else known_codes(family)
    width = max(map(len, codes))
    print(f"{'launch':{width}}  registers  shared  HMMA  HGMMA  spills")
    faults = [f"{name}: no longer launched; make gates UPDATE=1" for name in sorted(known.keys() - codes.keys())]
    for name, code in sorted(codes.items()):
        print(f"{name:{width}}  {code.registers:9}  {code.shared:6}  {code.hmma:4}  {code.hgmma:5}  {code.spills:6}")
        most_shared = MOST_OF_DEFAULT if "| sm_80" in name else MOST_SHARED[90]
        faults += [f"{name}: {fault}" for fault in code.faults(known.get(name), most_shared)]
    print(*(f"FAILED {fault}" for fault in faults), sep="\n", flush=True)
    return len(faults)


def check_candidates(families: list[str]) -> int:
    """Print what each candidate for a row of the table compiles to; how many faults there are."""
    faults = 0
    with ProcessPoolExecutor(machine_code.PROCESSES, get_context("spawn")) as pool:
        jobs = []
        for architecture in CHIPS:
            for family in families:
                for number, case in enumerate(cases(family)):
                    for row in case.rows:
                        for candidate, chosen in enumerate(case.candidates(row, architecture)):
                            job = pool.submit(compile_case, family, number, architecture, (row, candidate))
                            jobs.append((f"{' '.join(row)} | {described(chosen)}", architecture, job))
        for choice, architecture, job in jobs:
            for name, code in job.result():
                wrong = list(code.own_faults(MOST_SHARED[architecture]))
                print(f"{choice} | {name}: {'; '.join(wrong) or f'{code.registers} registers'}", flush=True)
                faults += len(wrong)
    return faults


def main() -> None:
    if _triton.version() is None:
        sys.exit("make gates: Triton is not installed, so there is nothing to compile; pip install 'triton>=3.6'")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help=f"of {', '.join(families())} (default: all)")
    parser.add_argument("--update", action="store_true", help="write the checked-in tables anew")
    parser.add_argument("--candidates", action="store_true", help="check what make tune chooses among instead")
    options = parser.parse_args()
    chosen = options.families or families()
    if options.candidates:
        sys.exit(1 if check_candidates(chosen) else 0)
    faults = 0
    for family, codes in compile_families(chosen).items():
        faults += report(family, codes, options.update)
        if options.update:
            write(family, codes)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
