"""What Triton's kernels stand on: providers, configurations, tables of many tensors, cases, the mended interpreter."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import fuzz
import pytest
import torch
import triton_cases

from dalle_kernels import _triton
from dalle_kernels._triton_configurations import DEFAULT, TABLE, Configuration, configuration, use_configuration

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted(path.parent.name for path in (ROOT / "dalle_kernels").glob("*/triton_kernels.py"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def test_reasons_are_told(monkeypatch):
    assert _triton.unavailable("mps") == "there are no Triton kernels for device type 'mps'"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "run on a GPU; on CPU tensors only under TRITON_INTERPRET=1" in _triton.unavailable("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _triton.unavailable("cuda") == "Triton is not installed; pip install 'dalle-kernels[triton]'"
    assert _triton.version() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
@needs_triton
def test_there_is_no_gpu_to_launch_on():
    assert _triton.unavailable("cuda") == "torch finds no CUDA GPU"
    assert _triton.architecture(torch.device("cpu")) == 0 and _triton.multiprocessors(torch.device("cpu")) == 1
    with _triton.assume(90, 132):
        assert _triton.architecture(torch.device("meta")) == 90
        assert _triton.multiprocessors(torch.device("meta")) == 132


def test_a_chip_takes_its_own_configuration_or_the_default(monkeypatch):
    default, own = Configuration({"BLOCK": 64}), Configuration({"BLOCK": 128}, num_warps=8, num_stages=3, maxnreg=128)
    monkeypatch.setitem(TABLE, ("test", "any"), {DEFAULT: default, 90: own})
    device = torch.device("cpu")
    for architecture, expected in ((80, default), (90, own), (120, default)):
        with _triton.assume(architecture, 1):
            assert configuration("test", "any", device) is expected
    assert own.options == {"BLOCK": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
    forced = Configuration({"BLOCK": 1})
    with use_configuration("test", "any", own), _triton.assume(80, 1):
        with use_configuration("test", "any", forced):
            assert configuration("test", "any", device) is forced
        assert configuration("test", "any", device) is own
    with pytest.raises(ValueError, match=r"expected a row among .*encode dense.*, got test some"):
        use_configuration("test", "some", own).__enter__()


def test_every_row_serves_any_chip():
    for key, row in TABLE.items():
        assert DEFAULT in row, key
        assert 80 not in row, "the gates hold DEFAULT's rows to account by compiling them for sm_80"


def jitted_functions() -> dict[str, tuple[ast.FunctionDef, set[str]]]:
    """Those of all families by their names, and which arguments Triton makes constants of where they are 1."""
    found = {}
    for path in (ROOT / "dalle_kernels").rglob("*triton*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            decorators = getattr(node, "decorator_list", [])
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(found) for found in decorators):
                kept = {leaf.value for root in decorators for leaf in ast.walk(root) if isinstance(leaf, ast.Constant)}
                arguments = {argument.arg for argument in node.args.args if argument.annotation is None}
                found[f"{path.stem}.{node.name}"] = node, arguments - kept
    return found


def name_called(call: ast.Call) -> str | None:
    return getattr(call.func, "id", None)


def methods_of_constants(functions, name: str, constants: set[str]) -> list[str]:
    """Where the function, or one that it calls, asks an argument that may be a constant for a method."""
    leaves = list(ast.walk(functions[name][0]))
    constants = constants - {
        leaf.id for leaf in leaves if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)
    }
    found = []
    for call in (leaf for leaf in leaves if isinstance(leaf, ast.Call)):
        if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", None) in constants:
            found.append(f"{name}: {ast.unparse(call)}")
        for other in (key for key in functions if key.endswith(f".{name_called(call)}")):
            given = zip(functions[other][0].args.args, call.args)
            passed = {argument.arg for argument, value in given if getattr(value, "id", None) in constants}
            found += methods_of_constants(functions, other, passed) if passed else []
    return found


def test_no_kernel_asks_a_constant_for_a_method_of_tensors():
    """Triton compiles for an integer that is 1 as a constant, which has no ``to``; the interpreter does not."""
    functions = jitted_functions()
    leaves = [leaf for node, _ in functions.values() for leaf in ast.walk(node)]
    called = {name_called(leaf) for leaf in leaves if isinstance(leaf, ast.Call)}
    kernels = [name for name in functions if name.rpartition(".")[2] not in called]
    assert len(kernels) >= 2 * len(FAMILIES)
    assert not [found for name in kernels for found in methods_of_constants(functions, name, functions[name][1])]


@needs_triton
def test_every_family_has_cases_and_gates():
    assert triton_cases.families() == FAMILIES
    rows = set()
    for family in FAMILIES:
        cases = triton_cases.cases(family)
        assert len({case.name for case in cases}) == len(cases)
        rows |= {row for case in cases for row in case.rows}
        for case in cases:
            for row, lists in case.rows.items():
                assert DEFAULT in lists, row
                blocks = set(TABLE[row][DEFAULT].blocks)
                assert all(set(candidate.blocks) == blocks for found in lists.values() for candidate in found), row
        assert (ROOT / "tests" / "gates" / f"{family}.json").exists()
    assert rows == set(TABLE), "a row of the table that no case tunes, or the other way round"


@needs_triton
def test_a_table_tells_where_many_tensors_lie(triton_device):
    from dalle_kernels._triton_tables import CHUNK, table

    sizes = [0, 5, 4, 0, 0, 1, 9, 0] * 30
    lists = [[torch.empty(size, device=triton_device) for size in sizes] for _ in range(3)]
    found = table(lists, block=4)
    assert len(sizes) * 5 > 2 * CHUNK
    rows = found.numbers[: 5 * len(sizes)].view(5, -1).tolist()
    assert rows[0] == sizes
    assert rows[2:] == [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    assert found.tensors == len(sizes) and found.blocks == sum(-(-size // 4) for size in sizes)
    owners = [tensor for tensor, size in enumerate(sizes) for _ in range(-(-size // 4))]
    assert found.owners.tolist() == owners
    for tensor, first in enumerate(rows[1]):
        assert first == sum(-(-size // 4) for size in sizes[:tensor])
    assert not table([[torch.zeros(9, device=triton_device)[1:]]], block=4).aligned


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
@needs_triton
class TestInterpreter:
    def builder(self):
        import interpreter
        from triton.runtime.interpreter import InterpreterBuilder

        interpreter.mend()
        return InterpreterBuilder()

    def handle(self, tensor: torch.Tensor):
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        if tensor.dtype == torch.bfloat16:
            return TensorHandle(tensor.view(torch.int16).numpy().view("uint16"), tl.bfloat16)
        return TensorHandle(tensor.numpy(), {torch.float32: tl.float32, torch.float64: tl.float64}[tensor.dtype])

    def test_rounds_to_bfloat16_as_torch_does(self):
        import triton.language as tl

        bits = torch.randint(-(2**31), 2**31, (100_000,)).int()
        x = torch.where(bits.view(torch.float32).isnan(), 1.0, bits.view(torch.float32))
        x[:2] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])  # ties
        builder = self.builder()
        rounded = builder.cast_impl(self.handle(x), tl.bfloat16)
        assert torch.equal(torch.from_numpy(rounded.data.view("int16")).view(torch.bfloat16), x.bfloat16())
        assert torch.equal(torch.from_numpy(builder.cast_impl(rounded, tl.float32).data), x.bfloat16().float())

    def test_multiplies_bfloat16_matrices(self):
        a, b = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16()
        product = self.builder().create_dot(*map(self.handle, (a, b, torch.ones(16, 16))), None, 0)
        torch.testing.assert_close(torch.from_numpy(product.data), a.float() @ b.float() + 1)

    def test_rounds_a_fused_multiply_add_once(self):
        a = 1 + torch.arange(1, 1000).float() * 2.0**-23
        product = self.builder().create_fma(*map(self.handle, (a, a, -(a * a))))
        assert torch.equal(torch.from_numpy(product.data), (a.double() * a.double() - (a * a).double()).float())
        # Halfway between two numbers but for a sum of far less: double rounding would go to the even one.
        numbers = [torch.tensor([value]) for value in (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-90)]
        assert self.builder().create_fma(*map(self.handle, numbers)).data.item() == 1 + 2.0**-11 + 2.0**-23


# Random calls of the other ops keep the interpreter busy for minutes: their own tests choose small ones.
CHEAP = ("encode_", "decode_fp", "scale_cast_filter", "filter_cast_unscale", "adamw16_step")


@pytest.mark.parametrize("op", fuzz.ops_of("triton", "cpu"))
def test_fuzzed_calls_agree_with_the_reference(op, triton_device):
    if triton_device == "cpu" and not op.startswith(CHEAP):
        pytest.skip("needs a GPU: by the interpreter it takes minutes")
    found = fuzz.fuzz(op, 8, seed=0, provider="triton", device=triton_device)
    assert found.passed, str(found)
