"""decode_attention, compiled and reference: every step against float64, layouts, threads, instruction sets."""

from __future__ import annotations

import itertools

import pytest
import torch
from peak_memory import needs_peaks, peak_growth
from torch._dynamo.testing import CompileCounterWithBackend

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, _native, decode_attention, sparse_attention
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.attention.slots import slot_count, slot_table
from dalle_kernels.testing import assert_accurate, poisoned_allocations

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
native_only = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")


def draw(pattern, prompts, samples, heads, head_dim, dtype, shared=None):
    """q, k, v ``[rows, heads, seq, head_dim]`` as a model makes them, strided.

    A prompt's samples share their first tokens, by default the text.
    """
    shared = pattern.text_len if shared is None else shared
    joint = torch.randn(prompts, samples, pattern.seq_len, 3, heads, head_dim)
    joint[:, :, :shared] = joint[:, :1, :shared]
    return joint.to(dtype).flatten(0, 1).permute(2, 0, 3, 1, 4).unbind()


def decode_all(pattern, q, k, v, samples, given, scale=None):
    """Every token from ``given`` on, one by one; what must be written before it is read is NaN at first."""
    rows, heads, _, head_dim = q.shape
    with poisoned_allocations():
        cache = KVCache(pattern, rows // samples, heads, head_dim, q.dtype, samples_per_prompt=samples)
        if given:
            cache.prefill(k[::samples, :, :given], v[::samples, :, :given])
        steps = [
            decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache, scale) for i in range(given, q.shape[2])
        ]
    return torch.cat(steps, dim=2)


def assert_every_step(pattern, prompts, samples, heads, head_dim, dtype, given=None, draws=3):
    """Hold every step from ``given`` tokens on to the error rule, several draws together."""
    given = pattern.text_len if given is None else given
    results = []
    for seed in range(draws):
        torch.manual_seed(seed)
        q, k, v = draw(pattern, prompts, samples, heads, head_dim, dtype, given)
        actual = decode_all(pattern, q, k, v, samples, given)
        with dalle_kernels.use("reference"):
            plain = decode_all(pattern, q, k, v, samples, given)
            exact = sparse_attention(q.double(), k.double(), v.double(), pattern)[:, :, given:]
        results.append((actual, plain, exact))
    assert_accurate(*zip(*results), str(pattern))


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text_len", "grid", "kernel_size", "head_dim"),
    [
        (5, (4, 6), 3, 16),
        (0, (3, 5), 5, 5),
        (1, (5, 3), 7, 80),
        (3, (1, 7), 3, 3),
        (2, (6, 1), 5, 33),
        (17, (9, 11), 11, 64),
    ],
)
def test_every_step_meets_the_error_rule(kind, text_len, grid, kernel_size, head_dim, dtype):
    pattern = AttentionPattern(kind, text_len, grid, kernel_size)
    for samples, given in ((1, 0), (3, text_len)):
        assert_every_step(pattern, 2, samples, 2, head_dim, dtype, given)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("samples", [1, 2, 4, 5, 33, 70])
def test_samples_of_a_prompt_are_taken_together(samples, dtype):
    assert_every_step(AttentionPattern("row", 70, (2, 3)), 2, samples, 1, 24, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 3])
def test_keys_are_split_where_heads_are_few(kind, samples):
    assert_every_step(AttentionPattern(kind, 500, (3, 4), 3), 1, samples, 1, 16, torch.float32)
    pattern = AttentionPattern(kind, 2, (20, 20), 19)  # the visible image alone is long enough
    assert_every_step(pattern, 1, samples, 1, 16, torch.float32, given=370)


@pytest.mark.parametrize("scale", [300.0, -300.0, 0.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(scale, dtype):
    torch.manual_seed(3)
    pattern = AttentionPattern("conv", 200, (3, 4), 3)
    q, k, v = draw(pattern, 2, 1, 1, 16, dtype)
    actual = decode_all(pattern, q, k, v, 1, 200, scale)
    exact = sparse_attention(q.double(), k.double(), v.double(), pattern, scale)[:, :, 200:]
    # float32 logits of 1e4 are off by up to 1e-3, which then is the relative error of a probability.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def test_any_strides():
    torch.manual_seed(4)
    pattern = AttentionPattern("column", 3, (4, 5))
    q, k, v = draw(pattern, 2, 1, 3, 10, torch.float32)
    expected = decode_all(pattern, q, k, v, 1, 0)
    wide = [torch.full((*x.shape[:3], 21), torch.nan) for x in (q, k, v)]
    stepped = [w[..., 1::2].copy_(x) for w, x in zip(wide, (q, k, v))]
    assert torch.equal(decode_all(pattern, *stepped, 1, 0), expected)
    constant = torch.ones(1, 1, 1, 1).expand_as(q)
    assert torch.equal(decode_all(pattern, q, k, constant, 1, 0), decode_all(pattern, q, k, constant.clone(), 1, 0))


@native_only
def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    try:
        for prompts, heads, samples in ((1, 1, 1), (2, 3, 2), (1, 1, 40)):
            pattern = AttentionPattern("conv", 300, (3, 5), 3)
            q, k, v = draw(pattern, prompts, samples, heads, 32, torch.float32)
            results = []
            for count in (1, 2, 5, 1):
                torch.set_num_threads(count)
                results.append(decode_all(pattern, q, k, v, samples, 300))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


@native_only
@needs_peaks
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_a_step_takes_no_more_memory_than_its_scratch_space(dtype):
    """The scores of each thread's samples; text keys for each sample, or in float32, would take 32 MiB and more."""
    text_len, samples, head_dim = 16_384, 32, 32
    pattern = AttentionPattern("row", text_len, (2, 2))
    cache = KVCache(pattern, 1, 8, head_dim, dtype, samples_per_prompt=samples)
    text = torch.zeros(1, 8, text_len, head_dim, dtype=dtype)
    cache.prefill(text, text)
    token = torch.zeros(samples, 8, 1, head_dim, dtype=dtype)
    with dalle_kernels.use("native"):
        grown = peak_growth(lambda: decode_attention(token, token, token, cache))
    scratch = torch.get_num_threads() * samples * (2 * head_dim + text_len + 1) * 4
    assert grown <= scratch + token.nbytes + 2**21


def operator_arguments(dtype=torch.float32):
    pattern = AttentionPattern("conv", 3, (3, 4), 3)
    cache = KVCache(pattern, 2, 3, 8, dtype, samples_per_prompt=2)
    q, k, v = draw(pattern, 2, 2, 3, 8, dtype, shared=8)
    cache.prefill(k[::2, :, :8], v[::2, :, :8])
    token = (x[:, :, 8:9] for x in (q, k, v))
    return cache, (*token, cache.text, cache.image, 8, *cache.pattern_arguments, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.dalle_kernels.decode_attention.default, operator_arguments(dtype)[1])


@native_only
def test_which_provider_runs_and_why():
    assert dalle_kernels.explain("decode_attention", *operator_arguments()[1]).runs == "native"
    found = dalle_kernels.explain("decode_attention", *operator_arguments(torch.float64)[1])
    assert found.runs == "reference" and "got float64" in str(found)
    found = dalle_kernels.explain("decode_attention", device_type="cuda")
    assert found.runs == "reference" and "torch finds no CUDA GPU" in str(found)


def test_a_step_compiles_into_one_graph_that_serves_every_position():
    torch._dynamo.reset()
    pattern = AttentionPattern("row", 2, (3, 3))
    q, k, v = draw(pattern, 2, 1, 2, 8, torch.float32)
    expected = decode_all(pattern, q, k, v, 1, 0)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda q, k, v, cache: decode_attention(q + 0, k, v, cache), fullgraph=True, backend=counter)
    cache = KVCache(pattern, 2, 2, 8)
    with torch.no_grad():
        steps = [step(*(x[:, :, i : i + 1] for x in (q, k, v)), cache) for i in range(pattern.seq_len)]
    assert torch.equal(torch.cat(steps, dim=2), expected) and cache.length == pattern.seq_len
    assert counter.frame_count <= 4  # the first, and then for any position, before and after the text


def test_no_gradient_is_recorded():
    pattern = AttentionPattern("row", 0, (2, 2))
    q = torch.randn(1, 1, 1, 4, requires_grad=True)
    assert not decode_attention(q, q, q, KVCache(pattern, 1, 1, 4)).requires_grad


def decode_by_tensor(pattern, q, k, v, samples, given, dtype):
    """As `decode_all`, the position counted in a tensor."""
    with poisoned_allocations():
        cache = KVCache(pattern, len(q) // samples, q.shape[1], q.shape[3], q.dtype, samples_per_prompt=samples)
        if given:
            cache.prefill(k[::samples, :, :given], v[::samples, :, :given])
        position, steps = torch.full((1,), given, dtype=dtype), []
        for i in range(given, q.shape[2]):
            steps.append(decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache, position=position))
            position += 1
    assert cache.length == given
    return torch.cat(steps, dim=2)


@pytest.mark.parametrize("provider", ["native", "reference"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_position_in_a_tensor_meets_the_error_rule(kind, samples, provider):
    if provider == "native" and _native.unavailable("cpu") is not None:
        pytest.skip("the compiled library is not built")
    pattern, results = AttentionPattern(kind, 3, (4, 5), 3), []
    for seed in range(3):
        torch.manual_seed(seed)
        given, dtype = (0, torch.int32) if samples == 1 else (3, torch.int64)
        q, k, v = draw(pattern, 2, samples, 2, 8, torch.float32)
        with dalle_kernels.use(provider):
            actual = decode_by_tensor(pattern, q, k, v, samples, given, dtype)
        with dalle_kernels.use("reference"):
            plain = decode_all(pattern, q, k, v, samples, given)
            exact = sparse_attention(q.double(), k.double(), v.double(), pattern)[:, :, given:]
        results.append((actual, plain, exact))
    assert_accurate(*zip(*results), str(pattern))


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_a_place_without_a_step_gives_nan_and_leaves_the_cache(provider):
    if provider == "native" and _native.unavailable("cpu") is not None:
        pytest.skip("the compiled library is not built")
    assert_no_step("cpu", provider)


def assert_no_step(device, provider, dtype=torch.float32, head_dim=4):
    pattern = AttentionPattern("column", 3, (2, 2))
    for samples, places in ((1, (-1, 7, 100)), (2, (0, 2, 7))):
        cache = KVCache(pattern, 1, 2, head_dim, dtype, device, samples)
        for held in (cache.text, cache.image):
            held.normal_()
        before = cache.text.clone(), cache.image.clone()
        token = torch.randn(samples, 2, 1, head_dim, device=device).to(dtype)
        for place in places:
            position = torch.tensor(place, device=device)
            with dalle_kernels.use(provider):
                assert decode_attention(token, token, token, cache, position=position).isnan().all()
            assert torch.equal(cache.text, before[0]) and torch.equal(cache.image, before[1])


def test_wrong_positions():
    cache, token = KVCache(AttentionPattern("row", 0, (2, 2)), 1, 1, 4), torch.zeros(1, 1, 1, 4)
    for position, message in ((3, "int32 or int64, or None, got int"), (torch.zeros(1), "got torch.float32")):
        with pytest.raises(TypeError, match=message):
            decode_attention(token, token, token, cache, position=position)
    with pytest.raises(ValueError, match=r"expected position as a tensor of one element, got one of shape \[2\]"):
        decode_attention(token, token, token, cache, position=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected position on the cache's device cpu, got meta"):
        decode_attention(token, token, token, cache, position=torch.zeros(1, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_a_position_in_a_tensor(dtype):
    *tensors, position, kind, text_len, height, width, kernel_size, scale = operator_arguments(dtype)[1]
    pattern = kind, text_len, height, width, kernel_size, scale
    torch.library.opcheck(
        torch.ops.dalle_kernels.decode_attention_at.default, (*tensors, torch.tensor(position), *pattern)
    )


CHECK_ONE_INSTRUCTION_SET = """
import torch
from test_decode import *
from dalle_kernels import _native
assert _native.instruction_sets()[2] == {isa!r}
for dtype in HALF_AND_FULL:
    for kind, head_dim in (("row", 64), ("conv", 80), ("column", 7)):
        pattern = AttentionPattern(kind, 19, (5, 7), 3)
        for samples in (1, 6):
            assert_every_step(pattern, 1, samples, 2, head_dim, dtype)
    assert_every_step(AttentionPattern("row", 400, (2, 2)), 1, 1, 1, 16, dtype)
"""


@native_only
def test_every_instruction_set_meets_the_error_rule(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)


@native_only
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_s_arithmetic_finds_the_slots_that_are_seen(kind):
    """Of each token of many grids; what it sees is a run of slots or a list."""
    slots_of = _native.library("cpu").decode_slots
    for grid, kernel_size in itertools.product(
        itertools.product((1, 2, 3, 5, 8, 13), (1, 2, 3, 4, 7, 11)), (1, 3, 5, 7, 11) if "conv" in kind else (3,)
    ):
        pattern = AttentionPattern(kind, 2, grid, kernel_size)
        settings = 2, *grid, kernel_size
        for token, slots in enumerate(slot_table(torch.device("cpu"), kind, *settings)):
            seen = range(slots.first, slots.first + slots.count) if slots.listed is None else slots.listed.tolist()
            own, *others = slots_of(KINDS.index(kind), *settings, slot_count(pattern), token)
            assert own == slots.own_slot and sorted([own, *others]) == sorted(seen), (pattern, token)
