"""Stage 2 in 16 bits: the model against float64, what decodes of it, its optimizer, and runs that skip and resume."""

from __future__ import annotations

import math

import pytest
import torch
from test_train import (
    DALLE_CONFIG,
    QUIET,
    dalle_stage,
    final_tensors,
    interrupt_after,
    pictures,
    timeless,
    trained_dvae,
)
from test_transformer import CONFIG, build, draw

from dalle.errors import UserError
from dalle.train.dalle import DALLETraining
from dalle.train.loop import run
from dalle.train.precision import OUTSIDE, make_optimizer, parameter_groups, prepare_scaled_step
from dalle.train.team import ALONE
from dalle.transformer import DALLE
from dalle_kernels import AdamW16, GradScales, mlp
from dalle_kernels.testing import assert_accurate, measure_errors

HALVES = (torch.float16, torch.bfloat16)
__all__ = ["pictures", "trained_dvae"]  # fixtures


def lowered(dtype: torch.dtype, config=CONFIG, replicas: int = 1) -> tuple[DALLE, GradScales]:
    model = build(config, torch.float32)
    scales = GradScales(2 * config.layers, replicas)
    model.set_precision(dtype, scales.scales)
    return model, scales


def gradients(model: DALLE, text, image) -> list[torch.Tensor]:
    """Of all parameters, the resblocks' unscaled, in float64."""
    model.zero_grad()
    model(text, image).loss.backward()
    scaled = {id(p) for block in model.resblocks() for p in block.parameters()}
    factor = 2.0**13 if model.layers[0].scaling else 1.0
    return [p.grad.double() / (factor if id(p) in scaled else 1.0) for p in model.parameters()]


def plainly_narrow(model: DALLE, dtype: torch.dtype) -> DALLE:
    """The same weights, the resblocks wholly in ``dtype``, with no scale, on a residual stream in float32."""
    plain = build(dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    for layer in plain.layers:
        layer.to(dtype)

        def forward(x, layer=layer):
            x = x + layer.attention(x.to(dtype)).float()
            return x + layer.mlp(x.to(dtype)).float()

        layer.forward = forward
    return plain


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_loss_and_gradients_follow_float64(dtype):
    model, _ = lowered(dtype)
    exact = build()
    exact.load_state_dict(model.state_dict())
    models = model, plainly_narrow(model, dtype), exact
    batches = [draw(seed=seed) for seed in range(30)]
    with torch.no_grad():
        assert_accurate(*([each(*batch).loss for batch in batches] for each in models), "loss")
    results = [[gradients(each, *batch) for batch in batches[:12]] for each in models]
    # A rounding that goes the other way early on shows in all of a batch's gradients: what is largest is a matter of
    # luck in each parameter, but not in all of them together, each brought to the same size.
    together: tuple[list, list, list] = [], [], []
    for place, (name, _) in enumerate(model.named_parameters()):
        drawn = [torch.stack([of_batch[place] for of_batch in of_model]) for of_model in results]
        report = measure_errors(*drawn, name)
        assert report.errors[1] <= report.limits[1], str(report)
        for pooled, tensor in zip(together, drawn, strict=True):
            pooled.append(tensor / drawn[-1].abs().max())
    assert_accurate(*together, "gradients")


def test_names_stay_and_only_the_resblocks_matrices_are_narrow():
    model, _ = lowered(torch.float16)
    assert model.state_dict().keys() == build().state_dict().keys()
    for name, parameter in model.named_parameters():
        narrow = name.startswith("layers.") and parameter.dim() == 2
        assert parameter.dtype == (torch.float16 if narrow else torch.float32), name
    text, image = draw()
    model(text, image).loss.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    assert all(logits.dtype == torch.float32 for logits in model.logits(text, image))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_checkpointing_gives_the_same_bits(dtype):
    model, batch = lowered(dtype)[0], draw()
    plain = gradients(model, *batch)
    for layer in model.layers:
        layer.checkpoint_activations = True
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, *batch), plain, strict=True))


def test_the_loss_compiles_without_a_graph_break():
    model, batch = lowered(torch.bfloat16)[0], draw()
    expected = gradients(model, *batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(*batch).loss.backward()
    blocks = {id(p) for block in model.resblocks() for p in block.parameters()}
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        got = parameter.grad.double() / (2.0**13 if id(parameter) in blocks else 1.0)
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item())


def test_it_decodes_what_its_forward_predicts():
    model, (text, image) = lowered(torch.float16)[0], draw()
    with torch.no_grad():
        _, expected = model.logits(text, image)
        logits, decoding = model.prefill(text)
        assert decoding.layers is None and decoding.caches[0].dtype == torch.float16
        steps = [logits, *(model.decode_step(image[:, i], decoding) for i in range(CONFIG.image_len - 1))]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=2e-2, atol=2e-2)


def test_only_linear_weights_decay_and_only_the_resblocks_have_16_bit_moments():
    model = build()
    for by_resblock, count in ((False, 3), (True, 2 * 2 * CONFIG.layers + 2)):
        groups = parameter_groups(model, model, 0.1, by_resblock)
        assert len(groups) == count
        found = {id(p): group for group in groups for p in group["params"]}
        assert len(found) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
        for name, parameter in model.named_parameters():
            group, matrix = found[id(parameter)], parameter.dim() == 2 and "layers" in name
            assert group["weight_decay"] == (0.1 if matrix or "unembedding" in name else 0.0), name
            assert group["moments"] == ("float16" if matrix else "float32"), name
            number = 2 * int(name.split(".")[1]) + ("mlp" in name) if "layers" in name else OUTSIDE
            assert group["resblock"] == (number if by_resblock else OUTSIDE), name


def test_the_optimizer_is_the_one_asked_for():
    model = build(CONFIG, torch.float32)
    for name, kind in (("adamw", torch.optim.AdamW), ("adamw16", AdamW16)):
        assert type(make_optimizer(model, model, DALLETraining(optimizer=name))) is kind


def test_stochastic_rounding_is_off_unless_asked_for_and_differs_between_parts():
    model, _ = lowered(torch.float16)

    def seeds(part=0, **settings):
        training = DALLETraining(precision="float16", optimizer="adamw16", **settings)
        return {group["rounding_seed"] for group in make_optimizer(model, model, training, part).param_groups}

    assert seeds() == {None}
    runs = [seeds(stochastic_rounding=True, part=part, seed=seed) for part, seed in ((0, 0), (1, 0), (0, 1))]
    assert all(len(run) == 1 for run in runs) and len(set.union(*runs)) == 3


def scaled_training() -> tuple[DALLE, GradScales, AdamW16]:
    model, scales = lowered(torch.float16)
    optimizer = make_optimizer(model, model, DALLETraining(precision="float16", optimizer="adamw16"))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    model(*draw()).loss.backward()
    return model, scales, optimizer


def test_a_step_is_that_of_unscaled_clipped_gradients():
    model, scales, optimizer = scaled_training()
    other = build(CONFIG, torch.float32)
    other.load_state_dict(model.state_dict())
    plain = make_optimizer(other, other, DALLETraining(optimizer="adamw16"))
    blocks = {id(p) for block in model.resblocks() for p in block.parameters()}
    for parameter, own in zip(other.parameters(), model.parameters(), strict=True):
        parameter.grad = own.grad.float() / (2.0**13 if id(own) in blocks else 1.0)
    norm, figures = prepare_scaled_step(optimizer, scales, clip_norm=0.5, team=ALONE)
    assert figures == {"skipped_updates": 0.0} and (scales.scales > 2**13).all()
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5).item(), rel=1e-5)
    for group in plain.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    plain.step()
    for parameter, own in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.float(), parameter.to(own.dtype).float(), rtol=2e-3, atol=1e-6)


def test_a_nonfinite_gradient_skips_the_step_and_lowers_its_blocks_scale_alone():
    model, scales, optimizer = scaled_training()
    model.layers[1].mlp.projection.weight.grad[0, 0] = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    norm, figures = prepare_scaled_step(optimizer, scales, clip_norm=4.0, team=ALONE)
    optimizer.step()
    assert figures["skipped_updates"] == 1 and norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    moved = scales.scales / 2**13
    assert moved[3] == pytest.approx(0.5**0.5) and (moved > 1).sum() == 2 * CONFIG.layers - 1


def test_a_nonfinite_gradient_outside_of_resblocks_is_told_by_the_norm():
    model, scales, optimizer = scaled_training()
    model.text_embedding.weight.grad[0, 0] = math.nan
    norm, figures = prepare_scaled_step(optimizer, scales, clip_norm=4.0, team=ALONE)
    assert norm.isnan() and figures["skipped_updates"] == 0


def test_precision_can_be_taken_back():
    model, _ = lowered(torch.float16)
    model.set_precision(torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(layer.scaling is None and layer.weights() is not None for layer in model.layers)


def test_mlp_biases_in_float32_do_not_reach_the_op_that_wants_one_dtype():
    block = lowered(torch.bfloat16)[0].layers[0].mlp
    with pytest.raises(TypeError, match="expected bias of x's dtype"):
        mlp(torch.ones(2, 24).bfloat16(), block.expansion.weight, block.expansion.bias, block.projection.weight, None)
    assert block(torch.ones(2, 24).bfloat16()).dtype == torch.bfloat16


def test_16_bit_resblocks_need_adamw16():
    with pytest.raises(UserError, match="expected adamw16 for a precision of float16, got adamw: torch's"):
        DALLETraining(precision="float16")
    with pytest.raises(UserError, match="precision: expected one of float32, float16, bfloat16, got 'int8'"):
        DALLETraining(precision="int8")
    with pytest.raises(UserError, match=r"precision: expected one of float32, float16, bfloat16, got \['float16'\]"):
        DALLETraining(precision=["float16"])
    with pytest.raises(UserError, match="optimizer: expected one of adamw, adamw16, got 'sgd'"):
        DALLETraining(optimizer="sgd")
    for value in (True, "no"):
        with pytest.raises(UserError, match=f"stochastic_rounding: expected false, or true .* got {value!r} for one"):
            DALLETraining(stochastic_rounding=value)


@pytest.mark.parametrize(("precision", "rounding"), [("float32", False), ("float16", True), ("bfloat16", False)])
def test_interrupted_and_resumed_equals_uninterrupted(precision, rounding, pictures, trained_dvae, tmp_path):
    def stage():
        settings = {"precision": precision, "optimizer": "adamw16", "stochastic_rounding": rounding}
        return dalle_stage(pictures, trained_dvae, tmp_path, **settings)

    run(stage(), tmp_path / "whole", QUIET)
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_after(stage(), 5), tmp_path / "parts", QUIET)
    run(stage(), tmp_path / "parts", QUIET, resume=True)
    whole, parts = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    moments = whole["optimizer.layers.0.mlp.expansion.weight.first_moment"]
    assert moments.dtype == torch.int16
    logs = [timeless(tmp_path / name) for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert all(tensor.dtype == torch.float32 for name, tensor in whole.items() if name.startswith("average."))
    if precision != "float32":
        assert logs[0][-1]["skipped_updates"] == 0 and len(logs[0][-1]["scales"]) == 2 * DALLE_CONFIG.layers
