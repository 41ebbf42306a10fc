"""Sparse attention against its rivals at the main shape, and against SDPA with the boolean mask at others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import attention_rivals as rivals
import dalle_pytorch_rival
import pytest
import torch
from harness import BEST_RIVAL, OURS, Candidate, Case, Goal, Unavailable, by_provider, by_triton, compiles, runs

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, decode_attention, sparse_attention
from dalle_kernels.testing import assert_accurate, measure_errors

KINDS = ("row", "column", "conv")
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
LAYOUTS = {"cpu": ((4, 8),), "cuda": ((8, 62), (32, 16))}
"""Batch and heads."""
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
# Multiplications and additions for each allowed pair and head dimension.
OPERATIONS = {FORWARD: 4, BACKWARD: 10, BOTH: 14}
DALLE_PYTORCH_KIND = {"row": "axial_row", "column": "column", "conv": "conv_corner"}

each_kind = pytest.mark.parametrize("kind", KINDS)


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--device")
    for name, values in (("dtype", DTYPES), ("layout", LAYOUTS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values[device], ids=lambda value: str(value).removeprefix("torch."))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each case compiles for itself: torch stops to compile a function anew after some settings of it."""
    torch._dynamo.reset()


class Problem:
    """Random q, k, v of one pattern, the exact result, and what each candidate must do with them."""

    def __init__(
        self,
        pattern: AttentionPattern,
        seq: int,
        head_dim: int,
        dtype: torch.dtype,
        work: str,
        device: str,
        layout: tuple[int, int],
    ):
        self.pattern, self.seq, self.dtype, self.work, self.device = pattern, seq, dtype, work, device
        batch, heads = layout
        shape = (batch, heads, seq, head_dim)
        self.inputs = tuple(
            torch.randn(shape, device=device).to(dtype).requires_grad_(work != FORWARD) for _ in range(3)
        )
        self.settings = {
            "pattern": pattern.kind,
            "text": pattern.text_len,
            "grid": "x".join(map(str, pattern.grid)),
            "seq": seq,
            "head dim": head_dim,
            "batch x heads": f"{batch} x {heads}",
        }
        self.operations = OPERATIONS[work] * head_dim * pattern.pairs(seq) * batch * heads
        tensors = {FORWARD: 4, BACKWARD: 8, BOTH: 12}[work]
        self.bytes_moved = tensors * self.inputs[0].nbytes
        self._checks: list[tuple[str, Callable[[], tuple], AttentionPattern]] = []

    def ours(self) -> Candidate:
        return self.candidate(OURS, lambda q, k, v: sparse_attention(q, k, v, self.pattern))

    def by_triton(self) -> list[Candidate]:
        """Ours by Triton on a GPU, where it may not be the default: ``_AHEAD`` in the ops rests on these figures."""
        ours = self.ours()
        found = [replace(way, before=ours.before) for way in by_triton(self.device, ours.run)]
        self._checks += [(OURS, way.run, self.pattern) for way in found]
        return found

    def candidate(
        self, name: str, attend: rivals.Attention, *, order: torch.Tensor | None = None, **options
    ) -> Candidate:
        """``attend`` on the inputs, or on their tokens in another ``order`` (arranged beforehand)."""
        inputs = self.inputs
        if order is not None:
            inputs = tuple(x.detach()[:, :, order].requires_grad_(x.requires_grad) for x in inputs)
        if options.get("same_function", True):
            back = None if order is None else order.argsort()
            self._checks.append((name, lambda: _in_order(_work(attend, inputs, self.work), back), self.pattern))
        return _candidate(name, attend, inputs, self.work, **options)

    def forget(self, name: str) -> None:
        """Check ``name`` no more: it cannot run here."""
        self._checks = [check for check in self._checks if check[0] != name]

    def dalle_pytorch(self) -> Candidate | Unavailable:
        """Its layer of the nearest kind, between the projections, on the stream of a start token more."""
        kind = DALLE_PYTORCH_KIND[self.pattern.kind]
        name = f"DALLE-pytorch's {kind} layer (other pairs)"
        _, heads, _, head_dim = self.inputs[0].shape
        nearest = AttentionPattern(kind, self.pattern.text_len + 1, self.pattern.grid, 11)
        try:
            core = dalle_pytorch_rival.attention_core(kind, heads, head_dim, nearest.text_len, nearest.grid[0])
        except dalle_pytorch_rival.NotInstalled as error:
            return Unavailable(name, str(error))
        joined = dalle_pytorch_rival.join(*self.inputs).requires_grad_(self.work != FORWARD)
        note = f"{nearest.pairs(self.seq)} pairs instead of {self.pattern.pairs(self.seq)}"
        if self.work == FORWARD:
            self._checks.append((name, lambda: (_split(core(joined.detach()), heads),), nearest))
        return _candidate(name, core, (joined,), self.work, same_function=False, note=note)

    @property
    def name(self) -> str:
        return f"{self.pattern.kind}, {self.dtype}, {self.work}"

    def check(self) -> None:
        """Hold ours to the error rule, and the rivals to ten times the plain error, on the first batch entry."""
        first = tuple(x.detach()[:1].requires_grad_(x.requires_grad) for x in self.inputs)
        work = BOTH if self.work == BACKWARD else self.work
        known = {}
        for name, run, pattern in self._checks:
            if pattern not in known:
                plain = _work(self._plain(pattern), first, work)
                double = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in first)
                known[pattern] = plain, _work(rivals.masked(pattern, self.seq, self.device), double, work)
            plain, exact = known[pattern]
            for actual, nearly, right in zip(run(), plain, exact, strict=True):
                if name == OURS:
                    assert_accurate(actual[:1], nearly, right, name=self.name)
                else:
                    report = measure_errors(actual[:1], nearly, right, f"{name}, {self.name}")
                    assert report.errors[1] <= 10 * max(report.plain_errors[1], report.floors[1]), str(report)

    def _plain(self, pattern: AttentionPattern) -> rivals.Attention:
        """What errors are measured by: on a GPU, whose tensor cores take weights of 16 bits, torch in that dtype."""
        if self.device == "cuda":
            return rivals.eager(pattern, self.seq, self.device)

        def attend(*inputs: torch.Tensor) -> torch.Tensor:
            with dalle_kernels.use("reference"):
                return sparse_attention(*inputs, pattern)

        return attend

    def case(self, ours: Candidate, others: Sequence[Candidate | Unavailable], goals=(), **options) -> Case:
        return Case(
            family="attention",
            work=self.work,
            dtype=self.dtype,
            settings=self.settings,
            ours=ours,
            rivals=others,
            check=self.check,
            goals=goals,
            operations=self.operations,
            bytes_moved=self.bytes_moved,
            **options,
        )


def _work(attend: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], work: str) -> tuple:
    """The output, or the gradients of the inputs for an output gradient of v."""
    if work == FORWARD:
        with torch.no_grad():
            return (attend(*inputs),)
    out = attend(*inputs)
    return torch.autograd.grad(out, inputs, _output_gradient(out, inputs))


def _output_gradient(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The values of v in the output's shape."""
    last = inputs[-1].detach()
    return last if last.shape == out.shape else last[..., -out.shape[-1] :]


def _candidate(name, attend, inputs, work, **options) -> Candidate:
    if work != BACKWARD:
        return Candidate(name, partial(_work, attend, inputs, work), **options)
    graph = []

    def forward() -> None:
        graph[:] = [attend(*inputs)]

    def backward() -> tuple:
        (out,) = graph
        graph.clear()
        return torch.autograd.grad(out, inputs, _output_gradient(out, inputs))

    return Candidate(name, backward, forward, **options)


def _in_order(results: tuple, order: torch.Tensor | None) -> tuple:
    return results if order is None else tuple(x[:, :, order] for x in results)


def _split(joined: torch.Tensor, heads: int) -> torch.Tensor:
    return joined.unflatten(-1, (heads, -1)).transpose(1, 2)


# On a GPU: bounds for row, column and conv, by work and rival.
GPU_GOALS = {
    FORWARD: {
        "FlashAttention-2 of SDPA, dense causal": (2.5, 2.6, 1.9),
        "cuDNN's SDPA, dense causal": (2.0, 2.1, 1.5),
        "FlexAttention, blocks of 128": (1.4, 2.4, 1.25),
        BEST_RIVAL: (1.1, 1.05, 1.05),
        rivals.MASKED: (5.0, 5.0, 4.0),
    },
    BACKWARD: {
        "cuDNN's SDPA, dense causal": (1.4, 1.5, 1.05),
        "FlexAttention, blocks of 128": (1.4, 2.4, 1.25),
        BEST_RIVAL: (1.1, 1.05, 1.05),
    },
}


def goals(work: str, dtype: torch.dtype, kind: str, device: str) -> list[Goal]:
    if device == "cuda":
        column = KINDS.index(kind)
        return [Goal("speed", bounds[column], against) for against, bounds in GPU_GOALS.get(work, {}).items()]
    wide = dtype == torch.float32
    if work == FORWARD:
        best, dense, share = (1.5, 2.5, 0.55) if wide else (2.0, 3.5, 0.35)
        found = [Goal("speed", best, BEST_RIVAL), Goal("speed", dense, rivals.DENSE_CAUSAL)]
        return [*found, Goal("share", share)] if kind == "row" else found
    return [Goal("speed", 2.2 if wide else 3.0, rivals.DENSE_CAUSAL)] if work == BOTH else []


def flex_rivals(problem: Problem) -> list[Candidate | Unavailable]:
    """FlexAttention with blocks of 64 and 128, for column also on permuted tokens, as far as it compiles here."""
    rule = rivals.mask_rule(problem.pattern)
    forms = [(f"FlexAttention, blocks of {block}", rule, block, None) for block in (64, 128)]
    if problem.pattern.kind == "column":
        order = rivals.column_order(problem.pattern)
        rule = rivals.permuted_column_rule(problem.pattern)
        forms += [(f"FlexAttention, blocks of {block}, permuted", rule, block, order) for block in (64, 128)]
    found: list[Candidate | Unavailable] = []
    for name, rule, block, order in forms:
        if problem.device == "cpu" and problem.work != FORWARD:
            found.append(Unavailable(name, "FlexAttention has no backward on a CPU"))
            continue
        attend = rivals.flex(rule, problem.seq, block, problem.device)
        candidate = problem.candidate(name, attend, order=order)
        found.append(compiles(candidate))
        if isinstance(found[-1], Unavailable):
            problem.forget(name)
    return found


def dense_rivals(problem: Problem) -> list[Candidate | Unavailable]:
    """Dense causal attention, which computes more pairs: SDPA's choice on a CPU, each of its fast ways on a GPU."""
    ways = {name: rivals.of_backend(name) for name in rivals.BACKENDS}
    if problem.device == "cpu":
        ways = {rivals.DENSE_CAUSAL: rivals.dense_causal}
    return [runs(problem.candidate(name, attend, same_function=False)) for name, attend in ways.items()]


@pytest.mark.parametrize("work", (FORWARD, BOTH))
@each_kind
def test_main_shape(side_by_side, device, kind, dtype, layout, work):
    pattern = AttentionPattern(kind, 256, (32, 32))
    problem = Problem(pattern, pattern.seq_len, 64, dtype, work, device, layout)
    others = [
        *dense_rivals(problem),
        problem.candidate(rivals.MASKED, rivals.masked(pattern, problem.seq, device)),
        *flex_rivals(problem),
        *problem.by_triton(),
    ]
    if device == "cpu":
        gathered = problem.candidate("SDPA on gathered windows", rivals.gathered(pattern, device))
        others += [gathered, problem.dalle_pytorch()]
    side_by_side(problem.case(problem.ours(), others, goals(work, dtype, kind, device)))


@each_kind
def test_backward_alone(side_by_side, device, kind, dtype, layout):
    pattern = AttentionPattern(kind, 256, (32, 32))
    problem = Problem(pattern, pattern.seq_len, 64, dtype, BACKWARD, device, layout)
    others = dense_rivals(problem)
    if device == "cuda":
        others += [*flex_rivals(problem), *problem.by_triton()]
    # What backward computes is checked with the forward before it, in one go.
    ours = problem.ours()
    attend = partial(sparse_attention, pattern=pattern)
    problem._checks = [(OURS, partial(_work, attend, problem.inputs, BOTH), pattern)]
    side_by_side(problem.case(ours, others, goals(BACKWARD, dtype, kind, device), seconds=5))


@pytest.mark.parametrize("work", (FORWARD, BOTH))
@each_kind
def test_one_head_is_shared_out(side_by_side, device, kind, dtype, work):
    """What further threads bring where there is one head for all of them."""
    threads = torch.get_num_threads()
    if device == "cuda" or threads == 1:
        pytest.skip("measured on several threads of a CPU only")
    pattern = AttentionPattern(kind, 256, (32, 32))
    problem = Problem(pattern, pattern.seq_len, 64, dtype, work, device, (1, 1))
    ours = problem.ours()

    def on_one_thread() -> object:
        torch.set_num_threads(1)
        try:
            return ours.run()
        finally:
            torch.set_num_threads(threads)

    side_by_side(problem.case(ours, [Candidate(f"{OURS}, one thread", on_one_thread)], seconds=1, memory=False))


OTHER_SHAPES = {
    "a start token": (AttentionPattern("row", 257, (32, 32)), 1280, 64),
    "16x16": (AttentionPattern("row", 256, (16, 16)), 512, 64),
    "head dim 32": (AttentionPattern("row", 256, (32, 32)), 1280, 32),
    "head dim 80": (AttentionPattern("row", 256, (32, 32)), 1280, 80),
    "head dim 128": (AttentionPattern("row", 256, (32, 32)), 1280, 128),
    "24x40": (AttentionPattern("row", 77, (24, 40)), 1037, 64),
}


@each_kind
@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_other_shapes(side_by_side, device, shape, kind, dtype):
    row, seq, head_dim = OTHER_SHAPES[shape]
    pattern = AttentionPattern(kind, row.text_len, row.grid)
    problem = Problem(pattern, seq, head_dim, dtype, FORWARD, device, LAYOUTS[device][0])
    others = [problem.candidate(rivals.MASKED, rivals.masked(pattern, seq, device)), *problem.by_triton()]
    side_by_side(problem.case(problem.ours(), others, seconds=1, memory=False))


# Prompts, samples of each and heads.
STEPS = {"cpu": ((4, 1, 8),), "cuda": ((8, 1, 62), (1, 32, 62))}


@pytest.mark.parametrize("step", range(2))
@each_kind
def test_decode_at_the_last_token(side_by_side, device, kind, dtype, step):
    if step >= len(STEPS[device]):
        pytest.skip("measured on a GPU only")
    prompts, samples, heads = STEPS[device][step]
    pattern, head_dim = AttentionPattern(kind, 256, (32, 32)), 64
    last, rows = pattern.seq_len - 1, prompts * samples
    q, k, v = (torch.randn(rows, heads, pattern.seq_len, head_dim, device=device).to(dtype) for _ in range(3))
    for x in (k, v):  # the samples of a prompt have its text
        x[:, :, :256] = x[::samples, :, :256].repeat_interleave(samples, 0)
    token = tuple(x[:, :, last:].contiguous() for x in (q, k, v))
    cache = KVCache(pattern, prompts, heads, head_dim, dtype, device, samples_per_prompt=samples)
    cache.prefill(*(x[::samples, :, :256] for x in (k, v)))
    for position in range(256, last):
        decode_attention(*(x[:, :, position : position + 1].contiguous() for x in (q, k, v)), cache)
    whole_k, whole_v = k.clone(), v.clone()
    row = pattern.mask()[last:].to(device)

    def ours() -> torch.Tensor:
        cache.length = last
        return decode_attention(*token, cache)

    # Of these two the call above takes one.
    compiled = [runs(by_provider("native", ours)), *by_triton(device, ours)] if device == "cuda" else []

    def full_cache(mask: torch.Tensor | None) -> torch.Tensor:
        whole_k[:, :, last:], whole_v[:, :, last:] = token[1:]
        return torch.nn.functional.scaled_dot_product_attention(token[0], whole_k, whole_v, attn_mask=mask)

    def check() -> None:
        few = [x[:2] for x in (q, k, v)]
        with dalle_kernels.use("reference"):
            plain = sparse_attention(*few, pattern)[:, :, last:]
        exact = rivals.masked(pattern, pattern.seq_len, device)(*(x.double() for x in few))[:, :, last:]
        for run in (ours, *(way.run for way in compiled if isinstance(way, Candidate))):
            assert_accurate(run()[:2], plain, exact, name=f"decode, {kind}, {dtype}")

    image_keys = int(row.sum()) - 256
    with torch.no_grad():
        side_by_side(
            Case(
                family="attention",
                work="decode step",
                dtype=dtype,
                settings={
                    "pattern": kind,
                    "text": 256,
                    "grid": "32x32",
                    "head dim": 64,
                    "batch x heads": f"{rows} x {heads}",
                    **({"samples of a prompt": samples} if samples > 1 else {}),
                },
                ours=Candidate(OURS, ours),
                rivals=[
                    Candidate("SDPA on the full cache", partial(full_cache, None), same_function=False),
                    Candidate("SDPA on the full cache, boolean mask", partial(full_cache, row)),
                    *compiled,
                ],
                check=check,
                goals=[
                    Goal("speed", 10.0 if samples > 1 else 3.3 if device == "cuda" else 3.0, "SDPA on the full cache")
                ],
                operations=4 * head_dim * (256 + image_keys) * rows * heads,
                bytes_moved=2 * head_dim * (256 * prompts + image_keys * rows) * heads * q.element_size(),
                in_cache=device == "cpu",  # one layer's keys and values, a few MiB, stay there
                calls=20 if device == "cpu" else 1,
                memory=False,
                seconds=2,
            )
        )
