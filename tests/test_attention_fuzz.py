"""sparse_attention on shapes drawn at random, against float64; and the scratch memory of its compiled kernel.

DALLE_KERNELS_FUZZ sets the number of cases (60 unless told), DALLE_KERNELS_FUZZ_SEED another start.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from test_attention import DTYPES, check, needs_native, random_inputs

import dalle_kernels
from dalle_kernels import AttentionPattern, _native
from dalle_kernels.attention.ops import MAX_HEAD_DIM
from dalle_kernels.attention.pattern import KINDS

CASES = int(os.environ.get("DALLE_KERNELS_FUZZ", "60"))
SEED = int(os.environ.get("DALLE_KERNELS_FUZZ_SEED", "0"))


def laid_out(tensor, layout):
    """The same values in another memory layout with a unit last stride; NaN lies between the rows."""
    batch, heads, seq, head_dim = tensor.shape
    if layout == "contiguous":
        return tensor
    if layout == "token first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    pitched = torch.full((seq, heads, batch, head_dim + 5), torch.nan, dtype=tensor.dtype)
    return pitched.permute(2, 1, 0, 3)[..., 2 : 2 + head_dim].copy_(tensor)


def random_case(draw):
    grid = draw.randint(1, 12), draw.randint(1, 40)
    text_len = draw.choice((0, 1, 2, 7, 15, 16, 17, 33, 64, 65, draw.randint(0, 90)))
    pattern = AttentionPattern(draw.choice(KINDS), text_len, grid, draw.choice((1, 3, 5, 7, 11, 21)))
    seq = min(pattern.seq_len, 200)
    seq = draw.choice((seq, draw.randint(1, seq)))
    head_dim = draw.choice((1, 2, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 128, draw.randint(1, MAX_HEAD_DIM)))
    size = draw.choice(((1, 1), (1, 3), (2, 2), (3, 3), (1, 9)))
    scale = draw.choice((None, None, None, 0.0, draw.uniform(-1, 1) * head_dim**-0.5))
    layouts = [draw.choice(("contiguous", "token first", "pitched")) for _ in range(4)]
    return pattern, (*size, seq, head_dim, draw.choice(DTYPES)), scale, draw.randint(1, 3), layouts


@needs_native
@pytest.mark.parametrize("part", range(10))
def test_random_shapes(part):
    before = torch.get_num_threads()
    try:
        with dalle_kernels.use("native"):
            for index in range(part, CASES, 10):
                check_case(f"{SEED}-{index}")
    finally:
        torch.set_num_threads(before)


def check_case(seed):
    pattern, shape, scale, threads, layouts = random_case(random.Random(seed))
    torch.set_num_threads(threads)
    torch.manual_seed(sum(map(ord, seed)))
    size = shape[0] * shape[1] * shape[2] * shape[3]
    failures = []
    # As in test_attention.check_random: of small results, the ratio of two largest errors is beyond 2 now and then.
    for _ in range(3):
        draws = [
            [laid_out(x, layout) for x, layout in zip(random_inputs(*shape), layouts)]
            for _ in range(max(1, min(20, 20_000 // size)))
        ]
        try:
            check(draws, pattern, scale)
        except AssertionError as error:
            failures.append(str(error))
            continue
        if not failures:
            return
    assert len(failures) < 2, (seed, shape, scale, threads, layouts, failures)


def workspace(pattern, batch, heads, head_dim, backward, threads):
    numbers = KINDS.index(pattern.kind), pattern.text_len, *pattern.grid, pattern.kernel_size
    shape = (batch, heads, pattern.seq_len, head_dim)
    return _native.library("cpu").sparse_attention_workspace(0, shape, *numbers, backward, threads)


@needs_native
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scratch_memory_is_linear_in_the_length_and_the_threads(kind, backward):
    sizes = [AttentionPattern(kind, 64, (side, 32), 11) for side in (32, 64, 128)]
    for batch, heads, threads in ((1, 1, 1), (1, 1, 2), (4, 8, 2)):
        small, middle, large = (workspace(pattern, batch, heads, 64, backward, threads) for pattern in sizes)
        assert 0 < small < middle < large
        assert large - middle <= 2.1 * (middle - small)
        # Each thread: packed keys and values, the tile's scores (at most 64 queries by all keys, twice for the
        # backward), and the sums of their gradients; segments where heads are few.
        packed = 2 * sizes[2].seq_len * 64 * 4
        scores = 2 * 64 * sizes[2].seq_len * 4
        copies = 8 + 1 if backward and batch * heads < 8 else 2 * threads if backward else threads
        assert large <= copies * packed + threads * (2 if backward else 1) * scores + 2**20
    assert workspace(sizes[0], 8, 64, 64, backward, 2) == workspace(sizes[0], 4, 8, 64, backward, 2)
    assert workspace(sizes[0], 0, 8, 64, backward, 2) == 0


@needs_native
def test_a_call_takes_no_more_memory_than_its_scratch_space():
    """Peak resident memory of a process before and after one call: no N x N matrix, which would take 180 MB here."""
    pattern = AttentionPattern("causal", 64, (64, 104))
    code = (
        "import resource, torch\n"
        "from dalle_kernels import AttentionPattern, sparse_attention, use\n"
        "pattern = AttentionPattern('causal', 64, (64, 104))\n"
        "x = torch.zeros(1, 1, pattern.seq_len, 16, requires_grad=True)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "with use('native'):\n"
        "    y = x[:, :, :70]; sparse_attention(y, y, y, pattern).sum().backward()\n"
        "    before = peak()\n"
        "    sparse_attention(x, x, x, pattern).sum().backward()\n"
        "print(peak() - before)\n"
    )
    done = run_python(code)
    scratch = workspace(pattern, 1, 1, 16, True, 2) + workspace(pattern, 1, 1, 16, False, 2)
    tensors = 12 * pattern.seq_len * 16 * 4
    assert int(done) <= scratch + tensors + 2**24
    assert scratch + tensors + 2**24 < 4 * pattern.seq_len**2


def run_python(code):
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
