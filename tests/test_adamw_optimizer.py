"""AdamW16 as an optimizer: it converges, keeps and loads its state, and works with what surrounds an optimizer."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from test_adamw import PROVIDERS, assert_same, gradients

import dalle_kernels
from dalle_kernels import AdamW16


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


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_parameter_that_has_grown_since_its_last_step_is_not_updated(provider):
    """``param.data`` may be given another size at any time; the moments' memory ends where it did."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW16([param], lr=0.1)
    param.grad = torch.ones(4)
    with dalle_kernels.use(provider):
        optimizer.step()
    param.data, param.grad = torch.ones(7), None
    param.grad = torch.ones(7)
    with dalle_kernels.use(provider), pytest.raises(RuntimeError):
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


def test_each_group_may_have_a_scale_of_its_own():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    plain = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW16([{"params": [param]} for param in params], lr=0.1)
    optimizer.grad_scale = torch.tensor([4.0, 64.0]).unbind()
    reference = AdamW16(plain, lr=0.1)
    for param, other, scale in zip(params, plain, (4.0, 64.0), strict=True):
        other.grad = torch.randn(3)
        param.grad = scale * other.grad
    optimizer.step()
    reference.step()
    assert_same(params, plain)
    optimizer.grad_scale = optimizer.grad_scale[:1]
    with pytest.raises(ValueError, match="expected one tensor, or one for each of 2 parameter groups, got 1"):
        optimizer.step()


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


@pytest.mark.parametrize("provider", PROVIDERS)
def test_autograd_notices_that_parameters_change(provider):
    param = torch.nn.Parameter(torch.randn(5))
    loss = (param * param).sum()
    optimizer = AdamW16([param], lr=0.1)
    param.grad = torch.ones(5)
    with dalle_kernels.use(provider):
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "expected lr at or above 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "expected betas as two numbers from 0 to below 1"),
        ({"betas": (0.9,)}, "expected betas as two numbers from 0 to below 1"),
        ({"betas": (0.9, 0.96, 0.99)}, "expected betas as two numbers from 0 to below 1"),
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


def test_scales_and_flags_have_one_element():
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    for name in ("grad_scale", "found_inf"):
        for wrong, got in ((torch.ones(2), r"one of shape \(2,\)"), (2.0, "float")):
            optimizer = AdamW16([param], lr=0.1)
            setattr(optimizer, name, wrong)
            with pytest.raises(ValueError, match=f"AdamW16.{name}: expected a tensor of one element, got {got}"):
                optimizer.step()


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))))
def test_a_copy_takes_up_the_state_of_its_original(copied):
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = AdamW16([param], lr=0.1)
    optimizer.step()
    state = optimizer.state_dict()
    for other in (copied(optimizer), optimizer):
        other.load_state_dict(state)
        other.load_state_dict(other.state_dict())
    missing = copy.deepcopy(state)
    del missing["param_groups"][0]["moments"]
    with pytest.raises(ValueError, match="got one without 'moments'"):
        copied(optimizer).load_state_dict(missing)
