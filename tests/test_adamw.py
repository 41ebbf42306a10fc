"""AdamW16 against float64 arithmetic of its own, its compiled kernel against the reference, and as an optimizer."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import dalle_kernels
from dalle_kernels import AdamW16, _native, decode_fp0610, decode_fp169, encode_fp0610, encode_fp169
from dalle_kernels.adamw.ops import adamw16_step, adamw16_step_op
from dalle_kernels.testing import assert_accurate

NATIVE = _native.unavailable("cpu") is None
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled library is not built")
PROVIDERS = [pytest.param("native", marks=needs_native), "reference"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODED, PLAIN = (torch.int16, torch.int16), (torch.float32, torch.float32)


@pytest.fixture(params=PROVIDERS)
def provider(request):
    with dalle_kernels.use(request.param):
        yield request.param


def gradients(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Of widely different sizes: the moments flush to zero, keep their codes, and saturate or are clipped."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-36, 6, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def tensors(shape, dtype=torch.float32, moments=CODED, seed=0) -> list[torch.Tensor]:
    """A parameter, a gradient, both moments and the step, such as a few steps leave behind."""
    generator = torch.Generator().manual_seed(seed + 1)
    param = torch.randn(shape, generator=generator).to(dtype)
    mean, variance = gradients(shape, seed=seed + 2) / 8, gradients(shape, seed=seed + 3).square().clamp(max=5)
    first = encode_fp169(mean) if moments[0] == torch.int16 else mean
    second = encode_fp0610(variance) if moments[1] == torch.int16 else variance
    return [param, gradients(shape, dtype, seed), first, second, torch.tensor(3.0)]


def step(columns: list[torch.Tensor], **settings) -> None:
    adamw16_step(*[[tensor] for tensor in columns], **{"lr": 1e-2, **settings})


def copied(columns):
    return [tensor.clone() for tensor in columns]


def assert_same(columns, expected) -> None:
    assert all(torch.equal(a, b) for a, b in zip(columns, expected, strict=True))


def values(columns) -> list[np.ndarray]:
    """Parameter, gradient and moments in float64, codes decoded."""
    decoders = (None, None, decode_fp169, decode_fp0610)
    return [
        (decode(tensor, torch.float64) if tensor.dtype == torch.int16 else tensor.double()).numpy()
        for tensor, decode in zip(columns, decoders)
    ]


def oracle(columns, lr, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, max_variance=5.0, grad_scale=1.0):
    """Parameter and moments after a step, by the textbook in float64."""
    param, grad, mean, variance = values(columns)
    count = columns[4].item() + 1
    grad = grad / float(grad_scale)
    mean = beta1 * mean + (1 - beta1) * grad
    variance = np.minimum(beta2 * variance + (1 - beta2) * grad**2, max_variance)
    root = np.sqrt(variance / (1 - beta2**count)) + eps
    return param - lr * weight_decay * param - lr * mean / (1 - beta1**count) / root, mean, variance


def plain(columns, lr, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, max_variance=5.0, grad_scale=1.0):
    """As :func:`oracle`, in torch's float32, the parameter rounded to its dtype: what a user would write."""
    param, grad, mean, variance = (torch.from_numpy(x).float() for x in values(columns))
    count = columns[4].item() + 1
    grad = grad / float(grad_scale)
    mean = mean.lerp(grad, 1 - beta1)
    variance = (variance * beta2).addcmul(grad, grad, value=1 - beta2).clamp(max=max_variance)
    root = variance.sqrt() / (1 - beta2**count) ** 0.5 + eps
    value = (param * (1 - lr * weight_decay)).addcdiv(mean, root, value=-lr / (1 - beta1**count))
    return value.to(columns[0].dtype), mean, variance


SETTINGS = (
    {"lr": 1e-2},
    {"lr": 0.5, "beta1": 0.5, "beta2": 0.999, "eps": 1e-3, "weight_decay": 0.0, "max_variance": math.inf},
    {"lr": 3e-4, "max_variance": 0.25, "grad_scale": torch.tensor(1.37 * 2**20)},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parameters_and_float32_moments_meet_the_error_rule(dtype, settings, provider):
    columns = tensors((61, 67), dtype, PLAIN)
    exact, near = oracle(columns, **settings), plain(columns, **settings)
    step(columns, **settings)
    for name, actual, p, e in zip(("param", "mean", "variance"), (columns[0], *columns[2:4]), near, exact, strict=True):
        assert_accurate(actual, p, torch.from_numpy(e), name)
    assert columns[4].item() == 4


@pytest.mark.parametrize("grad_scale", (1.0, 1.37 * 2**20))
def test_codes_are_those_of_the_moments_but_for_one_rounding(grad_scale, provider):
    """The moments are rounded to float32 before they are encoded: a code is off by one where that crosses a tie.

    With decays that float32 holds and that are no simple fractions: nine tenths of a code often lie at a tie.
    """
    columns = tensors((61, 67))
    beta1, beta2 = float(np.float32(0.8437891)), float(np.float32(0.9612347))
    settings = {"lr": 1e-2, "beta1": beta1, "beta2": beta2, "grad_scale": torch.tensor(grad_scale)}
    _, mean, variance = oracle(columns, **settings)
    step(columns, **settings)
    for codes, expected in (
        (columns[2], encode_fp169(torch.from_numpy(mean))),
        (columns[3], encode_fp0610(torch.from_numpy(variance))),
    ):
        apart = (codes.int() & 0xFFFF) - (expected.int() & 0xFFFF)
        assert apart.abs().max() <= 1 and apart.count_nonzero() <= 4


@needs_native
@pytest.mark.parametrize("moments", (CODED, PLAIN, CODED[:1] + PLAIN[1:], PLAIN[:1] + CODED[1:]))
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_gives_the_bits_of_the_reference(dtype, grad_dtype, moments):
    for size in (0, 1, 7, 15, 16, 17, 33, 4099):
        columns = tensors((size,), dtype, moments, seed=size)
        columns[1] = columns[1].to(grad_dtype)
        expected = copied(columns)
        for round_ in range(2):
            columns[1].copy_(gradients((size,), seed=round_))
            expected[1].copy_(columns[1])
            with dalle_kernels.use("native"):
                step(columns)
            with dalle_kernels.use("reference"):
                step(expected)
        assert_same(columns, expected)


@needs_native
def test_many_tensors_take_one_call_and_any_number_of_threads_gives_the_same_bits():
    shapes = [(1,), (0,), (3, 5), (70_001,), (64,), (129, 65), (2, 0, 3), (5,)] + [(7,)] * 300
    rows = [tensors(shape, torch.bfloat16, seed=index) for index, shape in enumerate(shapes)]
    for index, row in enumerate(rows):
        row[4].fill_(index % 3)  # parameters without a gradient now and then fall behind
    expected = [copied(row) for row in rows]
    for row in expected:
        step(row)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            again = [copied(row) for row in rows]
            with dalle_kernels.use("native"):
                adamw16_step(*map(list, zip(*again)), lr=1e-2)
            for row, wanted in zip(again, expected, strict=True):
                assert_same(row, wanted)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_the_kernel_writes_within_bounds():
    whole = [torch.cat([tensor[:3], tensor, tensor[:3]]) for tensor in tensors((1000,), torch.bfloat16)[:4]]
    before = copied(whole)
    step([*(tensor[3:-3] for tensor in whole), torch.zeros(())])
    for tensor, old in zip(whole, before, strict=True):
        assert torch.equal(tensor[:3], old[:3]) and torch.equal(tensor[-3:], old[-3:])


def layouts():
    base = torch.randn(12, 10, 6)
    return {
        "transposed": (base.transpose(0, 2).clone(memory_format=torch.preserve_format), True),
        "channels last": (torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        "with holes": (base[::2, :, ::3], False),
        "one column": (torch.randn(5, 7)[:, 2:3], False),
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_strides(layout):
    param, dense = layouts()[layout]
    columns = tensors(param.shape)
    expected = copied(columns)
    strided = [torch.empty_strided(param.shape, param.stride(), dtype=x.dtype).copy_(x) for x in columns[:4]]
    args = [*([x] for x in (*strided, columns[4])), 1e-2, 0.9, 0.96, 1e-8, 0.0, 5.0, None, None]
    assert not NATIVE or dalle_kernels.explain("adamw16_step", *args).runs == ("native" if dense else "reference")
    step([*strided, columns[4]])
    step(expected)
    assert_same([*strided, columns[4]], expected)
    # Strides of a gradient's own.
    other = tensors(param.shape)
    other[1] = torch.empty(param.shape[::-1]).permute(*range(param.dim() - 1, -1, -1)).copy_(other[1])
    step(other)
    assert_same(other, expected)


def test_found_nonfinite_changes_nothing(provider):
    for moments in (CODED, PLAIN):
        columns = tensors((1000,), torch.bfloat16, moments)
        columns[1][::3] = math.inf
        before = copied(columns)
        step(columns, found_nonfinite=torch.tensor(True))
        assert_same(columns, before)
        columns[1].fill_(0.5)
        step(columns, found_nonfinite=torch.tensor([False]), grad_scale=torch.tensor([8.0]))
        expected = [before[0], columns[1] / 8, *before[2:]]
        step(expected)
        assert_same(columns[:1] + columns[2:], expected[:1] + expected[2:])


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
def test_a_nonfinite_gradient_ruins_only_its_own_element(bad, provider):
    for dtype in FLOATS:
        columns, expected = tensors((100,), dtype), tensors((100,), dtype)
        columns[1][37] = bad
        step(columns)
        step(expected)
        others = torch.arange(100) != 37
        assert_same([x[others] for x in columns[:4:2]], [x[others] for x in expected[:4:2]])
        assert not columns[0][37].isfinite()
        # Codes hold no NaN: they end at their largest.
        assert decode_fp169(columns[2])[37] == math.copysign(15.984375, bad if bad == -math.inf else 1)
        assert decode_fp0610(columns[3])[37] == 5.0


def test_opcheck_and_one_graph(provider):
    columns = [[x.clone() for x in tensors((5, 6), torch.bfloat16)] for _ in range(2)]
    settings = (1e-2, 0.9, 0.96, 1e-8, 0.045, 5.0, torch.tensor(2.0), torch.tensor(False))
    torch.library.opcheck(adamw16_step_op.overload, (*map(list, zip(*columns)), *settings))

    def update(*lists):
        adamw16_step_op(*lists, *settings)
        return lists[0][0] * 2

    expected = [copied(row) for row in columns]
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*map(list, zip(*columns))), update(*map(list, zip(*expected))))
    for row, wanted in zip(columns, expected, strict=True):
        assert_same(row, wanted)


def test_autograd_notices_that_parameters_change(provider):
    param = torch.nn.Parameter(torch.randn(5))
    loss = (param * param).sum()
    optimizer = AdamW16([param], lr=0.1)
    param.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- The optimizer


def regression(optimize, dtype=torch.float32, steps=300) -> float:
    """The last loss of a small regression with a hidden layer, in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator).to(dtype)
    y = torch.sin(x.float() @ torch.randn(16, 4, generator=generator) / 4)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)).to(dtype)
    optimizer = optimize(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x).float() - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_converges_as_adamw_does():
    expected = regression(lambda params: torch.optim.AdamW(params, 3e-3, (0.9, 0.96), weight_decay=1e-2))
    for moments in ("float16", "float32"):
        got = regression(lambda params, m=moments: AdamW16(params, 3e-3, weight_decay=1e-2, moments=m))
        assert got < 1.15 * expected + 1e-4, (moments, got, expected)
    assert expected < 0.02
    assert regression(lambda params: AdamW16(params, 3e-3, weight_decay=1e-2), torch.bfloat16) < 0.05


def test_float32_moments_follow_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-2, 2, 1001)) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.96), "weight_decay": 0.1}
    optimizers = (
        AdamW16([ours], moments="float32", max_variance=math.inf, **settings),
        torch.optim.AdamW([theirs], **settings),
    )
    for _ in range(20):
        ours.grad = torch.randn(1001)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_fourteen_bytes_a_parameter():
    param = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = AdamW16([param], lr=1e-3)
    optimizer.step()
    state = optimizer.state[param]
    moments = state["first_moment"].nbytes + state["second_moment"].nbytes
    # Read: parameter, gradient, moments. Written: parameter, moments.
    assert (2 * param.nbytes + param.grad.nbytes + 2 * moments) / param.numel() == 14
    assert state["step"].numel() == 1


def groups_of_two():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(9, 4).bfloat16()), torch.nn.Parameter(torch.randn(5).bfloat16())]
    bias = torch.nn.Parameter(torch.randn(4))
    unused = torch.nn.Parameter(torch.randn(3))
    return [{"params": weights}, {"params": [bias, unused], "moments": "float32", "weight_decay": 0.0}], [
        *weights,
        bias,
    ]


def test_groups_dtypes_and_parameters_without_a_gradient(monkeypatch):
    groups, used = groups_of_two()
    unused = groups[1]["params"][1]
    optimizer, before = AdamW16(groups, lr=0.1), unused.clone()
    calls = []
    monkeypatch.setattr("dalle_kernels.adamw.optimizer.adamw16_step_op", lambda *args: calls.append(args[0]))
    for param in used:
        param.grad = torch.ones_like(param)
    optimizer.step()
    monkeypatch.undo()
    assert [len(params) for params in calls] == [2, 1]  # one call for each dtype and group
    optimizer.step()
    assert torch.equal(unused, before) and unused not in optimizer.state
    assert {optimizer.state[p]["first_moment"].dtype for p in used} == {torch.int16, torch.float32}
    assert all(optimizer.state[p]["step"] == 1 for p in used)
    optimizer.zero_grad()
    before = [p.clone() for p in used]
    optimizer.step()  # with no gradient at all
    assert_same(used, before)


def test_state_dict_round_trip(tmp_path):
    def run(optimizer, params, seeds):
        for seed in seeds:
            for param in params:
                param.grad = gradients(param.shape, param.dtype, seed)
            optimizer.step()

    groups, params = groups_of_two()
    optimizer = AdamW16(groups, lr=0.1)
    run(optimizer, params, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = [p.detach().clone() for p in params]
    run(optimizer, params, range(3, 6))

    other_groups, others = groups_of_two()
    for param, value in zip(others, kept, strict=True):
        param.data.copy_(value)
    resumed = AdamW16(other_groups, lr=0.7)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == 0.1 and resumed.param_groups[1]["moments"] == "float32"
    assert resumed.state[others[0]]["first_moment"].dtype == torch.int16
    assert resumed.state[others[0]]["step"].dtype == torch.float32
    run(resumed, others, range(3, 6))
    assert_same(others, params)
    # Copies, as of an averaged or forked training, keep working.
    run(copy.deepcopy(resumed), [], [0])
    unlike = AdamW16([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        unlike.load_state_dict(saved)


def test_a_state_that_does_not_fit_is_not_loaded():
    """The step writes to the moments' addresses, as far as the parameter reaches."""
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
    optimizer = AdamW16(params, lr=0.1)
    params[0].grad = torch.ones(8)
    optimizer.step()
    good = optimizer.state_dict()
    for name, wrong, message in (
        (
            "first_moment",
            torch.zeros(4).short(),
            r"first_moment of parameter 0 .*shape \(8,\), got torch.int16 .*\(4,\)",
        ),
        ("second_moment", torch.zeros(8).bfloat16(), "second_moment of .* int16 or float32 .* got torch.bfloat16"),
        ("step", torch.zeros(2), r"step of parameter 0 as float32 of one element, got torch.float32 of shape \(2,\)"),
        ("step", None, "step of parameter 0 as float32 of one element, got NoneType"),
    ):
        bad = {**good, "state": {0: {**good["state"][0], name: wrong}}}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match="expected groups of an AdamW16's state dict, got one without 'max_variance'"):
        optimizer.load_state_dict(torch.optim.AdamW(params).state_dict())
    optimizer.load_state_dict(good)
    assert params[1] not in optimizer.state  # which had no gradient
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


def test_a_parameter_that_has_grown_since_its_last_step_is_not_updated(provider):
    """``param.data`` may be given another size at any time; the moments' memory ends where it did."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW16([param], lr=0.1)
    param.grad = torch.ones(4)
    optimizer.step()
    param.data, param.grad = torch.ones(7), None
    param.grad = torch.ones(7)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert torch.equal(param, torch.ones(7))


def test_closure_and_its_loss():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW16([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (param < 1).all()


def test_grad_scaler_scales_and_skips():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    scaled, unscaled = (AdamW16([p], lr=0.1) for p in params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        for param, optimizer in zip(params, (scaled, unscaled), strict=True):
            optimizer.zero_grad()
            loss = param.square().sum()
            (scaler.scale(loss) if optimizer is scaled else loss).backward()
        scaler.step(scaled)
        unscaled.step()
        scaler.update()
    assert_same(params[:1], params[1:])
    before = params[0].detach().clone()
    scaled.zero_grad()
    scaler.scale((params[0] * math.inf).sum()).backward()
    scaler.step(scaled)
    scaler.update()
    assert torch.equal(params[0], before) and scaled.state[params[0]]["step"] == 3
    assert scaler.get_scale() == 512.0


def test_works_with_schedulers_and_hooks():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW16([param], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda index: 0.0 if index == 0 else 1.0)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(param, torch.ones(3)) and seen
    scheduler.step()
    optimizer.step()
    assert (param < 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "expected lr at or above 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "expected betas from 0 to below 1"),
        ({"eps": -1e-8}, "expected eps at or above 0"),
        ({"weight_decay": math.nan}, "expected weight_decay at or above 0, got nan"),
        ({"max_variance": 0.0}, "expected max_variance above 0"),
        ({"moments": "int8"}, "expected moments among float16, float32, got 'int8'"),
    ],
)
def test_settings_out_of_range(settings, message):
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        AdamW16([param], **{"lr": 0.1, **settings})
    with pytest.raises(ValueError, match=message):
        AdamW16([{"params": [param], **settings}], lr=0.1)


def test_mistakes_get_one_clear_sentence():
    with pytest.raises(TypeError, match="expected lr as a number, got a tensor"):
        AdamW16([torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(0.1))
    with pytest.raises(TypeError, match=r"expected dense parameters of float32.*got one of torch.complex64"):
        AdamW16([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))], lr=0.1)
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW16(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"expected dense gradients, got one of layout torch.sparse_coo"):
        optimizer.step()
    good = [[tensor] for tensor in tensors((4,))]
    for index, wrong, message in (
        (1, torch.zeros(5), r"expected a gradient of its param's shape \(4,\), got \(5,\)"),
        (1, torch.zeros(4, dtype=torch.int64), "expected each gradient as a dense tensor of float32 or"),
        (2, torch.zeros(4, dtype=torch.bfloat16), "expected each first moment as a dense tensor of int16 or float32"),
        (3, torch.zeros(4, device="meta"), "expected each second moment on cpu, got one on meta"),
        (4, torch.zeros(2), "expected each step as a tensor of one element"),
    ):
        lists = list(good)
        lists[index] = [wrong]
        with pytest.raises((TypeError, ValueError), match=message):
            adamw16_step(*lists, lr=0.1)
    with pytest.raises(ValueError, match="expected as many grads as params, 1, got 2"):
        adamw16_step(good[0], good[1] * 2, *good[2:], lr=0.1)
    with pytest.raises(TypeError, match="expected each grad_scale as a dense tensor of float32"):
        adamw16_step(*good, lr=0.1, grad_scale=torch.tensor(2.0, dtype=torch.float64))
    adamw16_step([], [], [], [], [], lr=0.1)


CHECK_ONE_INSTRUCTION_SET = """
import torch, dalle_kernels
from dalle_kernels import _native
from test_adamw import CODED, PLAIN, assert_same, copied, step, tensors
assert _native.instruction_sets()[2] == {isa!r}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for moments in (CODED, PLAIN):
        columns = tensors((50_003,), dtype, moments)
        expected = copied(columns)
        for provider, lists in (("native", columns), ("reference", expected)):
            with dalle_kernels.use(provider):
                step(lists, grad_scale=torch.tensor(1.3))
        assert_same(columns, expected)
"""


@needs_native
def test_every_instruction_set_gives_the_bits_of_the_reference(run_with_instruction_set):
    run_with_instruction_set(CHECK_ONE_INSTRUCTION_SET)
