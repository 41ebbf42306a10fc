"""The transformer: its schedule, size, loss and errors; no token sees a later one; decoding equals the full forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from dalle.config import DALLEConfig
from dalle.errors import UserError
from dalle.transformer import DALLE, INIT_STD, Layer, mask_schedule
from dalle_kernels import AttentionPattern
from dalle_kernels.attention.pattern import KINDS

# Not square, not a multiple of anything, heads * head_dim different from dim.
CONFIG = DALLEConfig(
    text_len=5,
    text_vocab_size=30,
    grid=(4, 3),
    image_vocab_size=20,
    dim=24,
    heads=3,
    head_dim=10,
    layers=6,
    kernel_size=3,
)


def build(config: DALLEConfig = CONFIG, dtype: torch.dtype = torch.float64, seed: int = 0) -> DALLE:
    torch.manual_seed(seed)
    model = DALLE(config).to(dtype)
    with torch.no_grad():  # larger weights than at the start of a training, so that every path matters
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def draw(config: DALLEConfig = CONFIG, batch: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.text_vocab_size, (batch, config.text_len), generator=generator)
    padding = config.text_vocab_size + torch.arange(config.text_len)
    lengths = torch.randint(1, config.text_len + 1, (batch, 1), generator=generator)
    text = torch.where(torch.arange(config.text_len) < lengths, text, padding)
    return text, torch.randint(config.image_vocab_size, (batch, config.image_len), generator=generator)


def test_mask_schedule_of_64_layers():
    kinds = mask_schedule(64)
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"]
    assert kinds[-1] == "conv" and kinds.count("conv") == 1
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 63, 4))
    assert mask_schedule(1) == ["conv"]


def test_the_12b_preset_has_12_billion_parameters():
    with torch.device("meta"):
        model = DALLE(DALLEConfig.preset("12b"))
    assert 12.0e9 <= sum(parameter.numel() for parameter in model.parameters()) <= 12.4e9


def test_initial_weights_are_small_and_smaller_in_front_of_the_residual():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, dim=128, layers=8)
    model = DALLE(config)
    layer = model.layers[3]
    for weight in (layer.attention.query_key_value.weight, layer.mlp.expansion.weight, model.image_unembedding.weight):
        assert weight.std().item() == pytest.approx(INIT_STD, rel=0.1)
    for weight in (layer.attention.projection.weight, layer.mlp.projection.weight):
        assert weight.std().item() == pytest.approx(INIT_STD / 4, rel=0.1)
    _, text_loss, image_loss = model(*draw(config))
    assert text_loss.item() == pytest.approx(torch.tensor(35.0).log().item(), rel=0.05)
    assert image_loss.item() == pytest.approx(torch.tensor(20.0).log().item(), rel=0.05)


def test_loss_is_the_weighted_cross_entropy_of_the_logits():
    model, (text, image) = build(), draw(batch=3)
    text_logits, image_logits = model.logits(text, image)
    assert text_logits.shape == (3, 5, 35) and image_logits.shape == (3, 12, 20)
    loss = model(text, image)
    text_loss = F.cross_entropy(text_logits.flatten(0, 1), text.flatten())
    image_loss = F.cross_entropy(image_logits.flatten(0, 1), image.flatten())
    torch.testing.assert_close(loss.text_loss, text_loss)
    torch.testing.assert_close(loss.image_loss, image_loss)
    torch.testing.assert_close(loss.loss, text_loss / 8 + 7 * image_loss / 8)


@pytest.mark.parametrize("position", range(17))
def test_a_token_changes_no_earlier_logit_and_some_later_one(position):
    model, (text, image) = build(), draw()
    with torch.no_grad():
        before = model.logits(text, image)
        if position < CONFIG.text_len:
            text[:, position] = (text[:, position] + 1) % CONFIG.text_vocab_size
        else:
            token = position - CONFIG.text_len
            image[:, token] = (image[:, token] + 1) % CONFIG.image_vocab_size
        after = model.logits(text, image)
    changed = torch.cat([(a != b).any(-1).any(0) for a, b in zip(before, after, strict=True)])
    # Logit i predicts token i, so token `position` may change the logits from position + 1 on.
    assert not changed[: position + 1].any()
    if position < 16:
        assert changed[position + 1]


def test_every_image_token_is_predicted_from_the_text_alone_at_first():
    model, (text, image) = build(), draw()
    other = draw(seed=7)[1]
    with torch.no_grad():
        first, second = model.logits(text, image)[1], model.logits(text, other)[1]
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[:, 1], second[:, 1])


def test_padding_tokens_have_embeddings_and_classes_of_their_own():
    model, (text, image) = build(), draw(batch=1)
    padding = CONFIG.text_vocab_size + torch.arange(CONFIG.text_len)
    text[0, 2:] = padding[2:]
    model(text, image).loss.backward()
    used = model.text_embedding.weight.grad.abs().sum(1) > 0
    assert used[padding[2:]].all() and not used[padding[:2]].any()
    assert model.text_unembedding.weight.shape[0] == CONFIG.text_vocab_size + CONFIG.text_len


def test_every_parameter_gets_a_gradient_that_finite_differences_confirm():
    model, (text, image) = build(), draw()
    model(text, image).loss.backward()
    generator = torch.Generator().manual_seed(3)
    step = 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = model(text, image).loss
            parameter.sub_(direction, alpha=2 * step)
            below = model(text, image).loss
            parameter.add_(direction, alpha=step)
        expected = (above - below) / (2 * step)
        torch.testing.assert_close((parameter.grad * direction).sum(), expected, rtol=1e-5, atol=1e-8, msg=name)


def test_checkpointing_gives_the_same_gradients():
    text, image = draw()
    plain = build(dtype=torch.float32)
    checkpointed = build(dataclasses.replace(CONFIG, checkpoint_activations=True), dtype=torch.float32)
    for model in (plain, checkpointed):
        model(text, image).loss.backward()
    for expected, found in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad)


def test_a_few_steps_overfit_a_batch():
    torch.manual_seed(0)
    model, (text, image) = DALLE(CONFIG), draw(batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(text, image).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(text, image).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


def test_autocast_keeps_the_losses_in_fp32_and_close():
    model, (text, image) = build(dtype=torch.float32), draw()
    expected = model(text, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(text, image)
        logits = model.logits(text, image)[1]
    assert found.loss.dtype == torch.float32 and logits.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.05, atol=0)


def test_the_loss_compiles_without_a_graph_break():
    model, (text, image) = build(dataclasses.replace(CONFIG, layers=2), torch.float32), draw()
    expected = model(text, image).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(text, image).loss
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients)


def layer_of(kind: str) -> Layer:
    return Layer(CONFIG, AttentionPattern(kind, CONFIG.text_len + 1, CONFIG.grid, CONFIG.kernel_size))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_on_a_gpu_is_traced_without_a_graph_break_where_there_is_none(kind):
    """Without gradients, of which a torch that is built without CUDA keeps no record."""
    layer, graphs = layer_of(kind), []

    def backend(graph: torch.fx.GraphModule, _inputs) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                module._parameters[name] = nn.Parameter(fake)
        x = torch.empty(2, CONFIG.text_len + CONFIG.image_len, CONFIG.dim, dtype=torch.bfloat16, device="cuda")
        out = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert out.device.type == "cuda" and out.shape == x.shape and out.dtype == x.dtype
    assert len(graphs) == 1
    assert torch.ops.dalle_kernels.sparse_attention.default in {node.target for node in graphs[0].graph.nodes}


def assert_compiles(layer: Layer, x: torch.Tensor, backend: str) -> None:
    """Forward and backward in one graph each, close to what eager calls give."""
    torch._dynamo.reset()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        inputs = x.clone().requires_grad_()
        out = function(inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])))
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        # A dozen roundings, each by at most half an eps, that mostly do not add up.
        assert (found - expected).norm() <= 2 * torch.finfo(x.dtype).eps * expected.norm()


@pytest.mark.slow
def test_a_layer_compiles_by_inductor():
    torch.manual_seed(0)
    x = torch.randn(2, CONFIG.text_len + CONFIG.image_len, CONFIG.dim)
    assert_compiles(layer_of("conv"), x, "inductor")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("kind", "backend"), [*((kind, "aot_eager") for kind in KINDS), ("row", "inductor")])
def test_a_layer_compiles_on_a_gpu(kind, backend):
    torch.manual_seed(0)
    layer = layer_of(kind).to("cuda", torch.bfloat16)
    x = torch.randn(2, CONFIG.text_len + CONFIG.image_len, CONFIG.dim, dtype=torch.bfloat16, device="cuda")
    assert_compiles(layer, x, backend)


# float32 takes the compiled step through all layers, float64 the plain one.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, {}), (torch.float32, {"rtol": 1e-4, "atol": 1e-4})])
@pytest.mark.parametrize("samples_per_prompt", [1, 3])
@pytest.mark.parametrize("grid", [(4, 3), (2, 5)])
def test_decoding_equals_the_full_forward_at_every_position(samples_per_prompt, grid, dtype, tolerance):
    config = dataclasses.replace(CONFIG, grid=grid)
    model = build(config, dtype)
    text, _ = draw(config)
    rows = len(text) * samples_per_prompt
    image = draw(config, batch=rows)[1]
    with torch.inference_mode():
        expected = model.logits(text.repeat_interleave(samples_per_prompt, 0), image)[1]
        logits, decoding = model.prefill(text, samples_per_prompt)
        torch.testing.assert_close(logits, expected[:, 0], **tolerance)
        for position in range(config.image_len - 1):
            logits = model.decode_step(image[:, position], decoding)
            torch.testing.assert_close(logits, expected[:, position + 1], **tolerance)
        with pytest.raises(UserError, match="complete"):
            model.decode_step(image[:, -1], decoding)


@pytest.mark.parametrize("samples_per_prompt", [1, 3])
def test_a_step_finds_its_place_in_a_tensor(samples_per_prompt):
    model, (text, _) = build(), draw()
    image = draw(batch=len(text) * samples_per_prompt)[1]
    with torch.inference_mode():
        (_, counted), (_, placed) = (model.prefill(text, samples_per_prompt) for _ in range(2))
        position = torch.zeros(1, dtype=torch.int64)
        for tokens in image[:, :-1].unbind(1):
            expected = model.decode_step(tokens, counted)
            torch.testing.assert_close(model.decode_step_at(tokens, position, placed), expected)
            position += 1
    assert placed.position == 0 and all(cache.length == model.config.text_len + 1 for cache in placed.caches)


@pytest.mark.parametrize("length", [0, 1, 6, 11])
def test_given_image_tokens_continue_as_if_they_had_been_drawn(length):
    model, (text, image) = build(), draw()
    with torch.inference_mode():
        expected = model.logits(text, image)[1].repeat_interleave(2, 0)
        logits, decoding = model.prefill(text, 2, image[:, :length])
        torch.testing.assert_close(logits, expected[:, length])
        for position in range(length, CONFIG.image_len - 1):
            logits = model.decode_step(image[:, position].repeat_interleave(2), decoding)
            torch.testing.assert_close(logits, expected[:, position + 1])


def test_given_image_tokens_are_checked():
    model, (text, image) = build(), draw()
    for prime, message in [
        (image, r"\[2, n\] with n < 12, got \[2, 12\]"),
        (image[:1, :3], r"\[2, n\]"),
        (image[0], r"\[2, n\]"),
        (image[:, :3] + 20, r"prime in 0\.\.19"),
        (image[:, :3].int(), "prime of dtype"),
    ]:
        with pytest.raises(UserError, match=message):
            model.prefill(text, prime=prime)


def test_a_half_precision_model_decodes_to_fp32_logits():
    model = build(dtype=torch.bfloat16)
    text, image = draw()
    with torch.inference_mode():
        expected = model.logits(text, image)[1]
        logits, decoding = model.prefill(text)
        after = model.decode_step(image[:, 0], decoding)
    assert logits.dtype == after.dtype == torch.float32
    torch.testing.assert_close(logits, expected[:, 0], rtol=0.05, atol=0.5)
    torch.testing.assert_close(after, expected[:, 1], rtol=0.05, atol=0.5)


def test_decoding_under_autocast_reads_the_prompt_in_half_precision_and_stays_close():
    model, (text, image) = build(dtype=torch.float32), draw()
    with torch.inference_mode():
        expected = model.logits(text, image)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, decoding = model.prefill(text)
            after = model.decode_step(image[:, 0], decoding)
    assert logits.dtype == after.dtype == torch.float32
    torch.testing.assert_close(logits, expected[:, 0], rtol=0.05, atol=0.5)
    torch.testing.assert_close(after, expected[:, 1], rtol=0.05, atol=0.5)


def decoded(model: DALLE, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The logits of every image token, one step each, and whether one call served all layers of a step."""
    with torch.inference_mode():
        logits, decoding = model.prefill(text)
        steps = [logits, *(model.decode_step(tokens, decoding) for tokens in image[:, :-1].unbind(1))]
    return torch.stack(steps, dim=1), decoding.layers is not None


class TwiceLinear(torch.nn.Module):
    """Another class in a linear layer's place, as an adapter or a quantized layer is."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


class Twice(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def double_output(module, args, output):
    return 2 * output


def double_input(module, args):
    (x,) = args
    return (2 * x,)


def replace_linear(layer):
    layer.mlp.projection = TwiceLinear(layer.mlp.projection)


def replace_forward(layer):
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * forward(x)


def without_bias(layer):
    layer.attention.query_key_value.bias = None


CHANGES = {
    "hook of a layer": lambda layer: layer.register_forward_hook(double_output),
    "hook of its attention": lambda layer: layer.attention.register_forward_pre_hook(double_input),
    "hook of its normalization": lambda layer: layer.mlp.norm.register_forward_hook(double_output),
    "hook of a matrix": lambda layer: layer.attention.projection.register_forward_pre_hook(double_input),
    "hook of every module": lambda layer: torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
    "parametrization": lambda layer: parametrize.register_parametrization(layer.mlp.expansion, "weight", Twice()),
    "another class": replace_linear,
    "a forward of its own": replace_forward,
    "another epsilon": lambda layer: setattr(layer.attention.norm, "eps", 1.0),
    "no bias": without_bias,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_user_changes_in_a_layer_holds_while_decoding(change):
    model, (text, image) = build(), draw()
    before, at_once = decoded(model, text, image)
    assert at_once
    handle = CHANGES[change](model.layers[2])
    try:
        found, at_once = decoded(model, text, image)
        with torch.inference_mode():
            expected = model.logits(text, image)[1]
    finally:
        if change == "hook of every module":
            handle.remove()
    assert not at_once
    torch.testing.assert_close(found, expected)
    assert change == "hook of every module" or not torch.allclose(found, before)


@pytest.mark.parametrize("register", ("register_forward_hook", "register_full_backward_hook"))
def test_hooks_of_the_mlps_matrices_run_in_training(register):
    model, (text, image) = build(), draw()
    expected = model(text, image).loss
    calls = []
    getattr(model.layers[2].mlp.expansion, register)(lambda *_: calls.append(1))
    loss = model(text, image).loss
    loss.backward()
    assert calls == [1]
    torch.testing.assert_close(loss, expected)


def test_decoding_by_modules_is_the_call_through_all_layers_also_under_autocast_and_in_half_precision():
    for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        model, (text, image) = build(dtype=dtype), draw()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, _ = decoded(model, text, image)
            calls = []
            model.layers[-1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            found, at_once = decoded(model, text, image)
        assert not at_once and len(calls) == CONFIG.image_len  # the prompt and every step
        tolerance = 0.3 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


TEXT, IMAGE = draw()


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        (TEXT[0], IMAGE, r"text of shape \[batch, 5\], got \[5\]"),
        (TEXT[:, :3], IMAGE, r"text of shape \[batch, 5\], got \[2, 3\]"),
        (TEXT, IMAGE.view(2, 4, 3), r"image_tokens of shape \[batch, 12\], got \[2, 4, 3\]"),
        (TEXT, IMAGE[:, :9], r"image_tokens of shape \[batch, 12\], got \[2, 9\]"),
        (TEXT.int(), IMAGE, "text of dtype torch.int64, got torch.int32"),
        (TEXT, IMAGE.float(), "image_tokens of dtype torch.int64, got torch.float32"),
        (TEXT.to("meta"), IMAGE, "text on the model's device cpu, got meta"),
        (TEXT + 30, IMAGE, r"text in 0..34, got values from \d+ to \d+"),
        (TEXT, IMAGE - 20, r"image_tokens in 0..19, got values from -\d+ to -\d+"),
        (TEXT[:1], IMAGE, "as many texts as images, got 1 texts and 2 images"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(text, image, message):
    with pytest.raises(UserError, match=message):
        build()(text, image)
