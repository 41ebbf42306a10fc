"""Settings for the whole suite."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Before torch is imported: two threads suffice to find what threads break, and leave a small machine usable.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads that wait in a loop would keep the threads of another test process from the core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import interpreter
import torch

# Before triton is imported, which reads it once: without a GPU its kernels run by its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Where there is a GPU, tests of Triton's kernels run on it and are its tests."""
    for item in items:
        if torch.cuda.is_available() and "triton_device" in item.fixturenames:
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def no_memory_kept_on_the_gpu():
    """What a test's tensors took goes back to the GPU, where the tests of other processes may need it."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")


def available(name: str) -> str:
    """``name`` again; skips the test where no build of that instruction set can run."""
    from dalle_kernels import _native

    if name not in _native.instruction_sets()[1]:
        pytest.skip(f"{name} is not built or this processor does not run it")
    return name


@pytest.fixture
def triton_device():
    """The device to try Triton's kernels on, with that provider forced: a GPU, else the CPU by the interpreter."""
    import dalle_kernels
    from dalle_kernels import _triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = _triton.unavailable(device)
    if reason is not None:
        pytest.skip(reason)
    if device == "cpu":
        interpreter.mend()
    with dalle_kernels.use("triton"):
        yield device


@pytest.fixture
def cuda_on_cpu():
    """The CUDA library's module, made to run on CPU tensors."""
    import on_cpu

    return on_cpu.library()


@pytest.fixture
def served_on_cpu(cuda_on_cpu, monkeypatch):
    """The same, which the operators then call for all that it holds."""
    import on_cpu

    on_cpu.serve(monkeypatch, cuda_on_cpu)
    return cuda_on_cpu


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Each instruction set that runs here, forced in this process."""
    from dalle_kernels import _native

    name, library = available(request.param), _native.library("cpu")
    used = _native.instruction_sets()[2]
    library.force_instruction_set(name)
    yield name
    library.force_instruction_set(used)


@pytest.fixture(params=INSTRUCTION_SETS)
def run_with_instruction_set(request):
    """A function that runs a program, its ``{isa}`` filled in, in a process that the environment forces to each set.

    The program can import the test files.
    """
    name = available(request.param)

    def run(program: str) -> None:
        path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "DALLE_KERNELS_ISA": name, "PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", program.format(isa=name)], check=True, env=environment)

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A world of this process alone."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("alone") / "store"), 1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
