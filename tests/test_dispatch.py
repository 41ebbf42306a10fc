"""The way from an op's name to the provider that runs it: forcing, explaining, failing, and what torch sees."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import uuid

import pytest
import torch

import dalle_kernels
from dalle_kernels import _native
from dalle_kernels.__main__ import main, openmp_runtimes
from dalle_kernels._dispatch import Op

NATIVE = _native.unavailable("cpu") is None
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled library is not built")


@pytest.fixture
def double() -> Op:
    """An op of one's own: its native provider serves only rank 1 on CPU, its triton provider only CUDA."""
    op = Op(f"test_double_{uuid.uuid4().hex}(Tensor x) -> Tensor", torch.empty_like)
    op.calls = []

    def provider(name):
        def run(x):
            op.calls.append(name)
            return x * 2

        return run

    op.provide(
        "native",
        provider("native"),
        unavailable=lambda device_type: None if device_type == "cpu" else "it is for CPU only",
        unsupported=lambda x: None if x.dim() == 1 else f"it takes one dimension, got {x.dim()}",
    )
    op.provide(
        "triton",
        provider("triton"),
        unavailable=lambda device_type: None if device_type == "cuda" else "it is for CUDA only",
    )
    op.provide("reference", provider("reference"))
    yield op
    del dalle_kernels._dispatch.OPS[op.name]


def test_takes_the_fastest_provider_that_can_serve(double):
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    double(torch.ones(3, 3))
    assert double.calls == ["native", "reference"]


def test_use_forces_nests_and_restores(double):
    with dalle_kernels.use("reference"):
        double(torch.ones(3))
        with dalle_kernels.use("native"):
            double(torch.ones(3))
        double(torch.ones(3))
    double(torch.ones(3))
    assert double.calls == ["reference", "native", "reference", "native"]
    with pytest.raises(RuntimeError, match="stop"), dalle_kernels.use("reference"):
        raise RuntimeError("stop")
    double(torch.ones(3))
    assert double.calls[-1] == "native"


def test_a_forced_provider_that_cannot_serve_says_why(double):
    with dalle_kernels.use("native"), pytest.raises(RuntimeError, match="forced but it takes one dimension, got 2"):
        double(torch.ones(3, 3))
    with dalle_kernels.use("triton"), pytest.raises(RuntimeError, match="forced but it is for CUDA only"):
        double(torch.ones(3))
    assert double.calls == []
    del double.providers[1]
    with dalle_kernels.use("triton"), pytest.raises(dalle_kernels.ProviderError, match="the op only has: native, ref"):
        double(torch.ones(3))


def test_the_environment_variable_forces_too(double, monkeypatch):
    forget = dalle_kernels._dispatch._provider_of_environment.cache_clear  # it is read once a process
    monkeypatch.setenv("DALLE_KERNELS_PROVIDER", "reference")
    forget()
    try:
        double(torch.ones(3))
        with dalle_kernels.use("native"):
            double(torch.ones(3))
        assert double.calls == ["reference", "native"]
        monkeypatch.setenv("DALLE_KERNELS_PROVIDER", "fastest")
        forget()
        with pytest.raises(dalle_kernels.ProviderError, match="one of native, triton, reference, got 'fastest'"):
            double(torch.ones(3))
    finally:
        forget()


def test_the_environment_variable_reaches_a_process():
    code = "import torch, dalle_kernels as d; d.encode_fp169(torch.ones(3)); print(d.explain('encode_fp169').runs)"
    assert run_python(code, DALLE_KERNELS_PROVIDER="reference").stdout == "reference\n"
    wrong = run_python(code, DALLE_KERNELS_PROVIDER="fastest")
    assert "DALLE_KERNELS_PROVIDER: expected one of native, triton, reference, got 'fastest'; unset it" in wrong.stderr


def test_use_refuses_an_unknown_provider():
    with pytest.raises(ValueError, match="expected a provider among native, triton, reference, got 'cuda'"):
        dalle_kernels.use("cuda").__enter__()


def test_explain_tells_what_runs_and_why_not_something_faster(double):
    assert dalle_kernels.explain(double.name).runs == "native"
    found = dalle_kernels.explain(double.name, torch.ones(2, 2))
    assert found.runs == "reference"
    assert found.rejected == (("native", "it takes one dimension, got 2"), ("triton", "it is for CUDA only"))
    assert "native: it takes one dimension, got 2" in str(found)
    assert dalle_kernels.explain(double.name, device_type="cuda").rejected == (("native", "it is for CPU only"),)
    with dalle_kernels.use("reference"):
        assert dict(dalle_kernels.explain(double.name).rejected)["native"] == "'reference' is forced"
    with pytest.raises(ValueError, match=r"expected an op among .*encode_fp169.*, got 'encode_fp170'"):
        dalle_kernels.explain("encode_fp170")


def test_explain_names_a_kernel_that_runs_only_where_it_is_forced(double):
    double.providers[0], double.providers[1] = double.providers[1], double.providers[0]
    double.providers[0] = dataclasses.replace(double.providers[0], unavailable=lambda device_type: None)
    found = dalle_kernels.explain(double.name, device_type="cuda")
    assert found.runs == "triton" and found.optional == ()  # native is for CPU only
    double.providers[1] = dataclasses.replace(double.providers[1], unavailable=lambda device_type: None)
    found = dalle_kernels.explain(double.name, device_type="cuda")
    assert found.runs == "triton" and found.rejected == () and found.optional == ("native",)
    assert "native: not shown to be faster here; dalle_kernels.use('native') takes it" in str(found)
    with dalle_kernels.use("native"):
        assert dalle_kernels.explain(double.name, device_type="cuda").optional == ()


def test_every_op_ends_with_its_reference_which_runs_anywhere():
    assert set(dalle_kernels.ops()) >= {"encode_fp169", "sparse_attention", "gumbel_softmax", "linear_cross_entropy"}
    for name, op in dalle_kernels.ops().items():
        assert op.providers[-1].name == "reference", name
        assert op.providers[-1].unavailable("cpu") is None and op.providers[-1].unavailable("cuda") is None, name


def test_fakes_stand_for_every_provider(double):
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 5)
        assert double(x).shape == (4, 5)
        codes, nonfinite = dalle_kernels.encode_fp169_checked(x.t())
        assert (codes.shape, codes.stride(), codes.dtype) == ((5, 4), (4, 1), torch.int16)
        assert (nonfinite.shape, nonfinite.dtype) == ((), torch.bool)
    assert double.calls == []


def test_the_function_gumbel_softmax_and_its_folder_live_together():
    from dalle_kernels.gumbel_softmax.ops import gumbel_softmax

    assert dalle_kernels.gumbel_softmax is gumbel_softmax


def test_every_public_name_exists():
    for name in dalle_kernels.__all__:
        assert getattr(dalle_kernels, name) is not None


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_import_succeeds_without_the_compiled_library_and_first_use_explains():
    result = run_python(
        "import sys\n"
        "sys.modules['dalle_kernels._cpu'] = None\n"  # as if it were not built
        "import torch, dalle_kernels\n"
        "dalle_kernels.encode_fp169(torch.ones(3))\n"
        "print(dalle_kernels.explain('encode_fp169'))\n"
        "with dalle_kernels.use('native'):\n"
        "    try: dalle_kernels.encode_fp169(torch.ones(3))\n"
        "    except dalle_kernels.ProviderError as error: print('forced:', error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "encode_fp169: reference runs\n" in result.stdout
    assert "\n  native: the compiled CPU library is not built; reinstall" in result.stdout
    assert (
        "forced: encode_fp169: provider 'native' was forced but the compiled CPU library is not built" in result.stdout
    )


@needs_native
def test_forcing_an_instruction_set_that_cannot_run_is_an_error():
    result = run_python(
        "import torch, dalle_kernels; dalle_kernels.encode_fp169(torch.ones(3))", DALLE_KERNELS_ISA="avx9"
    )
    assert result.returncode != 0
    assert "expected DALLE_KERNELS_ISA to be one of portable" in result.stderr and "got 'avx9'" in result.stderr


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kernels_share_torchs_openmp_runtime_and_its_number_of_threads():
    result = run_python(
        "import os, torch, dalle_kernels\n"
        "from dalle_kernels import _native\n"
        "from dalle_kernels.__main__ import openmp_runtimes\n"
        "def threads(): return len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(3)\n"
        "dalle_kernels.encode_fp169(torch.ones(1 << 20))\n"
        "assert _native.library('cpu').has_openmp()\n"
        "after_ours = threads()\n"
        "torch.ones(1 << 20).exp_()\n"
        "print(len(openmp_runtimes()), after_ours, threads())\n",
        OMP_NUM_THREADS="1",
    )
    runtimes, after_ours, after_torch = map(int, result.stdout.split())
    assert runtimes == len(openmp_runtimes()) == 1
    assert after_ours == after_torch  # torch's work ran on the threads that ours had started: one pool
    assert after_ours >= 3


def test_command_prints_versions_and_every_op(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert dalle_kernels.__version__ in printed and torch.__version__ in printed
    for name in dalle_kernels.ops():
        assert f"\n{name} " in printed
    if NATIVE:
        assert f"uses {_native.instruction_sets()[2]}" in printed


@pytest.mark.parametrize(
    "call",
    [
        lambda x: dalle_kernels.gumbel_softmax(x),
        lambda x: dalle_kernels.logit_laplace_loss(torch.full((3, 5), 0.5), x, torch.zeros(3, 5)),
        lambda x: dalle_kernels.linear_cross_entropy(x, torch.ones(7, 5), torch.tensor([1, 2, 3])),
        lambda x: dalle_kernels.linear_cross_entropy(x, torch.ones(7, 5), torch.tensor([1, 2, 3]), reduction="none"),
        lambda x: dalle_kernels.sparse_attention(
            *[x[None, None]] * 3, dalle_kernels.AttentionPattern("row", 1, (1, 2))
        ),
    ],
    ids=["gumbel_softmax", "logit_laplace", "cross_entropy", "cross_entropy_rows", "attention"],
)
def test_a_second_derivative_is_refused_and_not_zero(call):
    x = torch.randn(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(x).sum(), x)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="is differentiable once"):
        torch.autograd.grad(call(x).sum(), x, create_graph=True)
