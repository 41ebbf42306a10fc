"""The compiled kernels under the address and undefined-behaviour sanitizers: a short form of `make sanitize`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sanitize
import special_build

from dalle_kernels import _native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built"),
    pytest.mark.skipif(sanitize.runtime() is None, reason="needs GCC's libasan.so"),
    pytest.mark.skipif(special_build.find_tool("cmake") is None, reason="needs cmake"),
]
# One build with intrinsics and one without, which together take as long as a test may.
INSTRUCTION_SETS = [name for name in ("portable", "avx2") if name in sanitize.instruction_sets()]
FOLDER = sanitize.FOLDER / "short"


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("pybind11")
    sanitize.build(FOLDER, INSTRUCTION_SETS, optimization="-O0")
    return FOLDER


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_fuzzed_calls_read_and_write_within_bounds(library, instruction_set):
    done = sanitize.run_fuzz(library, instruction_set, seed=1, count=6)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"library {library}" in done.stdout and "FAILED" not in done.stdout


@pytest.mark.parametrize(
    ("sizes", "strides", "finding"),
    [([101], [1], "AddressSanitizer: heap-buffer-overflow"), ([3], [2**62], "signed integer overflow")],
)
def test_the_sanitizers_are_at_work(library, sizes, strides, finding):
    """A kernel is told of more memory than there is, and of a distance that no address has."""
    code = (
        "import torch\n"
        "from dalle_kernels import _native\n"
        "x, codes, nonfinite = torch.randn(100), torch.zeros(101).short(), torch.zeros(()).bool()\n"
        "_native.call('float16_encode', x.device, input=x.data_ptr(), dtype=0, codes=codes.data_ptr(),\n"
        f"             sizes={sizes}, strides={strides}, nonfinite=nonfinite.data_ptr(), format=0)\n"
    )
    environment = sanitize.environment(library, INSTRUCTION_SETS[-1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=library, capture_output=True, text=True)
    assert done.returncode != 0
    assert finding in done.stderr
