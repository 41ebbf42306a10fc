"""The discrete VAE against the public release's names and shapes, hand-written expressions and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dalle.config import DVAEConfig
from dalle.dvae import DVAE, ResidualBlock
from dalle.errors import UserError

SMALL = DVAEConfig(image_size=16, vocab_size=24, n_hid=8, n_init=12, group_count=3, n_blk_per_group=2)


def make_dvae(config: DVAEConfig = SMALL, dtype: torch.dtype = torch.float64, seed: int = 0) -> DVAE:
    """A model whose biases are not zero and whose residual paths are not negligible, so that a missing one shows."""
    torch.manual_seed(seed)
    dvae = DVAE(config).to(dtype)
    with torch.no_grad():
        for name, parameter in dvae.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(std=0.5)
            elif "res_path" in name:
                parameter.mul_(2)
    return dvae


def make_images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def convolve(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    weight = state[f"{name}.w"]
    return F.conv2d(x, weight, state[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)


def release_block(state: dict[str, torch.Tensor], name: str, x: torch.Tensor, n_layers: int) -> torch.Tensor:
    """A resblock as the paper writes it: relu, conv, relu, conv, relu, conv, relu, conv beside the identity."""
    residual = x
    for j in (1, 2, 3, 4):
        residual = convolve(state, f"{name}.res_path.conv_{j}", torch.relu(residual))
    identity = convolve(state, f"{name}.id_path", x) if f"{name}.id_path.w" in state else x
    return identity + residual / n_layers**2


def release_encoder(dvae: DVAE, x: torch.Tensor) -> torch.Tensor:
    state, config = dvae.encoder.state_dict(), dvae.config
    x = convolve(state, "blocks.input", x)
    for group in range(1, config.group_count + 1):
        for block in range(1, config.n_blk_per_group + 1):
            x = release_block(
                state, f"blocks.group_{group}.block_{block}", x, config.group_count * config.n_blk_per_group
            )
        if group < config.group_count:
            x = F.max_pool2d(x, 2)
    return convolve(state, "blocks.output.conv", torch.relu(x))


def release_decoder(dvae: DVAE, codes: torch.Tensor) -> torch.Tensor:
    """``codes`` [B, K, H, W] go through the first layer as a convolution, and every enlargement follows its group."""
    state, config = dvae.decoder.state_dict(), dvae.config
    x = convolve(state, "blocks.input", codes)
    for group in range(1, config.group_count + 1):
        for block in range(1, config.n_blk_per_group + 1):
            x = release_block(
                state, f"blocks.group_{group}.block_{block}", x, config.group_count * config.n_blk_per_group
            )
        if group < config.group_count:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return convolve(state, "blocks.output.conv", torch.relu(x))


def expected_shapes(
    part: str, widths: list[int], kernels: tuple[int, ...], ends: dict[str, list[int]]
) -> dict[str, list[int]]:
    """Names and shapes of an encoder or decoder whose groups have the given widths; ``widths[0]`` enters group 1."""
    shapes = {f"{part}.{name}.w": shape for name, shape in ends.items()}
    for group, n_out in enumerate(widths[1:], start=1):
        for block in (1, 2):
            name, n_in = f"{part}.blocks.group_{group}.block_{block}", widths[group - 1] if block == 1 else n_out
            quarter = n_out // 4
            layers = [(quarter, n_in), (quarter, quarter), (quarter, quarter), (n_out, quarter)]
            for j, ((rows, columns), kernel) in enumerate(zip(layers, kernels, strict=True), start=1):
                shapes[f"{name}.res_path.conv_{j}.w"] = [rows, columns, kernel, kernel]
            if n_in != n_out:
                shapes[f"{name}.id_path.w"] = [n_out, n_in, 1, 1]
    biases = {f"{name[:-1]}b": shape[:1] for name, shape in shapes.items()}
    return shapes | biases


def test_parameters_have_the_public_names_and_shapes():
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    encoder_ends = {"blocks.input": [256, 3, 7, 7], "blocks.output.conv": [8192, 2048, 1, 1]}
    decoder_ends = {"blocks.input": [128, 8192, 1, 1], "blocks.output.conv": [6, 256, 1, 1]}
    expected = expected_shapes("encoder", [256, 256, 512, 1024, 2048], (3, 3, 3, 1), encoder_ends)
    expected |= expected_shapes("decoder", [128, 2048, 1024, 512, 256], (1, 3, 3, 3), decoder_ends)
    assert {name: list(value.shape) for name, value in dvae.state_dict().items()} == expected
    # The sizes of the public files, encoder.pkl and decoder.pkl.
    assert sum(p.numel() for p in dvae.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in dvae.decoder.parameters()) == 43_829_766
    assert all(p.dtype == torch.float32 for p in dvae.parameters())


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        DVAEConfig(image_size=8, vocab_size=5, n_hid=4, n_init=3, group_count=2, n_blk_per_group=1),
        DVAEConfig(image_size=4, vocab_size=7, n_hid=4, n_init=4, group_count=1, n_blk_per_group=3),
        DVAEConfig(image_size=16, vocab_size=9, n_hid=4, n_init=6, group_count=4, n_blk_per_group=1),
    ],
    ids=lambda config: f"factor{config.factor}",
)
def test_network_equals_the_expression_of_the_paper(config):
    dvae, factor = make_dvae(config), config.factor
    images = make_images(2, 3, 3 * factor, 5 * factor)
    logits = dvae.encode_logits(images)
    torch.testing.assert_close(logits, release_encoder(dvae, 0.1 + 0.8 * images), rtol=1e-12, atol=1e-12)

    tokens = torch.randint(config.vocab_size, (2, 3, 5), generator=torch.Generator().manual_seed(2))
    one_hot = F.one_hot(tokens, config.vocab_size).permute(0, 3, 1, 2).double()
    mu = release_decoder(dvae, one_hot)[:, :3]
    expected = ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(dvae.decode(tokens), expected, rtol=1e-12, atol=1e-12)


def test_enlarging_inside_a_block_equals_enlarging_before_it():
    torch.manual_seed(3)
    block = ResidualBlock(8, 4, (1, 3, 3, 3), n_layers=2, upsample=True).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    expected = release_block({f"block.{n}": p for n, p in block.state_dict().items()}, "block", x, n_layers=2)
    assert not torch.allclose(block(x)[..., ::2, ::2], expected)  # 3x3 layers see the enlarged neighbours
    enlarged = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = release_block({f"block.{n}": p for n, p in block.state_dict().items()}, "block", enlarged, n_layers=2)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_in, kernels", [(8, (3, 3, 3, 1)), (4, (1, 3, 3, 3))])
def test_enlarging_inside_a_block_needs_layers_that_commute_with_it(n_in, kernels):
    with pytest.raises(ValueError, match="commute"):
        ResidualBlock(n_in, 4, kernels, n_layers=1, upsample=True)


def test_post_gain_is_the_inverse_square_of_the_number_of_blocks():
    gains = {block.post_gain for block in DVAE(SMALL).modules() if isinstance(block, ResidualBlock)}
    assert gains == {1 / 36}
    with torch.device("meta"):
        assert DVAE(DVAEConfig()).encoder.blocks["group_1"]["block_1"].post_gain == 1 / 64


def test_weights_start_as_the_paper_says():
    torch.manual_seed(4)
    dvae = DVAE(DVAEConfig(image_size=16, vocab_size=512, n_hid=64, n_init=64, group_count=3, n_blk_per_group=1))
    for name, parameter in dvae.named_parameters():
        if name.endswith(".b"):
            assert not parameter.any(), name
        else:
            scaled = parameter * math.sqrt(parameter[0].numel())
            tolerance = 5 / math.sqrt(parameter.numel())
            assert abs(scaled.std() - 1) < tolerance and abs(scaled.mean()) < tolerance, name


def test_kl_is_the_divergence_from_the_uniform_prior():
    dvae = make_dvae()
    images = make_images(3, 3, 16, 16)
    q = dvae.encode_logits(images).softmax(dim=1)
    per_position = (q * (q * SMALL.vocab_size).log()).sum(dim=1)
    output = dvae(images, tau=0.7)
    torch.testing.assert_close(output.kl, per_position.sum(dim=(1, 2)).mean(), rtol=1e-10, atol=1e-10)
    assert output.values_per_image == 3 * 16 * 16
    torch.testing.assert_close(output.loss(6.6), output.reconstruction + 6.6 * output.kl / 768)


def test_reconstruction_is_the_logit_laplace_likelihood_of_the_pixels():
    # With one code there is nothing to sample, so the likelihood can be written down.
    config = DVAEConfig(image_size=16, vocab_size=1, n_hid=8, n_init=12, group_count=3, n_blk_per_group=1)
    dvae = make_dvae(config)
    images = make_images(3, 3, 16, 16)
    mu, log_b = release_decoder(dvae, torch.ones(3, 1, 4, 4, dtype=torch.float64)).split(3, dim=1)
    x = 0.1 + 0.8 * images
    density = torch.exp(-(torch.logit(x) - mu).abs() / log_b.exp()) / (2 * log_b.exp() * x * (1 - x))
    output = dvae(images, tau=1.0)
    torch.testing.assert_close(output.reconstruction, -density.log().mean(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.kl, torch.zeros_like(output.kl), rtol=0, atol=1e-12)


def test_a_small_temperature_gives_the_likelihood_of_sampled_codes():
    # Nearly certain logits: the relaxed codes are the argmax whatever the noise, so forward agrees with decode's path.
    dvae = make_dvae()
    with torch.no_grad():
        dvae.encoder.blocks["output"].conv.w.mul_(1e4)
    images = make_images(2, 3, 16, 16)
    one_hot = F.one_hot(dvae.encode(images), SMALL.vocab_size).permute(0, 3, 1, 2).double()
    mu, log_b = release_decoder(dvae, one_hot).split(3, dim=1)
    x = 0.1 + 0.8 * images
    expected = ((torch.logit(x) - mu).abs() * torch.exp(-log_b) + log_b + (2 * x * (1 - x)).log()).mean()
    torch.testing.assert_close(dvae(images, tau=1 / 16).reconstruction, expected, rtol=1e-8, atol=1e-8)


def test_gradient_agrees_with_finite_differences():
    dvae = make_dvae()
    images = make_images(2, 3, 16, 16)

    def loss() -> torch.Tensor:
        return dvae(images, tau=0.8, generator=torch.Generator().manual_seed(5)).loss(6.6)

    loss().backward()
    step = 1e-6
    for name, parameter in dvae.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
        direction /= direction.norm()
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                parameter += sign * step * direction
                values.append(loss())
            parameter += step * direction
        difference = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((parameter.grad * direction).sum(), difference, rtol=1e-4, atol=1e-7, msg=name)


def test_every_parameter_is_trained():
    dvae = make_dvae(dtype=torch.float32)
    images = make_images(2, 3, 16, 16, dtype=torch.float32)
    optimizer = torch.optim.AdamW(dvae.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(dvae(images, tau=1.0, generator=torch.Generator().manual_seed(7)).loss(0.1))
        losses[-1].backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in dvae.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3


def test_noise_comes_from_the_generator():
    dvae = make_dvae(dtype=torch.float32)
    images = make_images(2, 3, 16, 16, dtype=torch.float32)
    first, again, other = (dvae(images, 1.0, torch.Generator().manual_seed(seed)).reconstruction for seed in (8, 8, 9))
    assert first == again
    assert first != other


def test_encoding_has_no_noise_and_takes_the_likeliest_token():
    dvae = make_dvae(dtype=torch.float32)
    images = make_images(2, 3, 20, 12, dtype=torch.float32)
    tokens = dvae.encode(images)
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 5, 3)
    assert torch.equal(tokens, dvae.encode(images))
    logits = dvae.encode_logits(images)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], logits.amax(dim=1))
    assert torch.equal(dvae.reconstruct(images), dvae.decode(tokens))
    assert dvae.reconstruct(images).shape == images.shape


def test_layout_of_the_images_does_not_matter():
    dvae = make_dvae()
    images = make_images(2, 3, 16, 16)
    strided = make_images(2, 16, 3, 32).transpose(1, 2)[..., ::2].copy_(images)
    torch.testing.assert_close(dvae.encode_logits(strided), dvae.encode_logits(images), rtol=1e-12, atol=1e-12)
    before = strided.clone()
    dvae(strided, tau=1.0).loss(1.0).backward()
    assert torch.equal(strided, before)


def test_autocast_keeps_the_layers_at_the_relaxation_in_float32():
    dvae = make_dvae(dtype=torch.float32)
    images = make_images(2, 3, 16, 16, dtype=torch.float32)
    features = []
    output_layer = dvae.encoder.blocks["output"].conv
    handle = output_layer.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = dvae.encode_logits(images)
        output = dvae(images, tau=1.0)
    handle.remove()
    assert features[0].dtype == torch.bfloat16
    assert logits.dtype == output.reconstruction.dtype == output.kl.dtype == torch.float32
    expected = F.conv2d(features[0].float(), output_layer.w, output_layer.b)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    output.loss(1.0).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in dvae.parameters())


def test_16_bit_parameters_still_give_float32_logits():
    dvae = make_dvae(dtype=torch.bfloat16)
    images = make_images(2, 3, 16, 16, dtype=torch.bfloat16)
    assert dvae.encode_logits(images).dtype == torch.float32
    assert dvae(images, tau=1.0).reconstruction.dtype == torch.float32
    assert dvae.reconstruct(images).isfinite().all()


def test_decoded_images_lie_in_the_unit_interval():
    dvae = make_dvae()
    with torch.no_grad():
        dvae.decoder.blocks["output"].conv.w.mul_(100)
    images = dvae.decode(torch.arange(24).reshape(1, 4, 6))
    assert images.min() == 0 and images.max() == 1


@pytest.mark.parametrize(
    "images, sentence",
    [
        (torch.rand(3, 16, 16), r"expected RGB images of shape \[batch, 3, height, width\], got \[3, 16, 16\]"),
        (torch.rand(1, 1, 16, 16), r"got \[1, 1, 16, 16\]"),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
            "dtype torch.float32, the model's, got torch.uint8.*divide by 255",
        ),
        (torch.rand(1, 3, 16, 16, dtype=torch.float64), "got torch.float64"),
        (torch.rand(1, 3, 16, 18), "that 4 divides"),
        (torch.rand(1, 3, 0, 16), "that 4 divides"),
        (torch.rand(0, 3, 16, 16), "at least one image"),
        (torch.rand(1, 3, 16, 16, device="meta"), "expected images on cpu, where the model is, got meta"),
    ],
)
def test_wrong_images_are_named(images, sentence):
    dvae = make_dvae(dtype=torch.float32)
    for job in (dvae.encode, dvae.reconstruct, dvae.encode_logits):
        with pytest.raises(UserError, match=sentence):
            job(images)
    with pytest.raises(UserError):
        dvae(images, 1.0)


def test_training_images_have_the_configured_size():
    with pytest.raises(UserError, match=r"training images of 16x16 pixels.*got 16x20"):
        make_dvae(dtype=torch.float32)(torch.rand(1, 3, 16, 20), 1.0)


@pytest.mark.parametrize(
    "tokens, sentence",
    [
        (torch.zeros(2, 4, dtype=torch.int64), r"shape \[batch, height, width\], none of them 0, got \[2, 4\]"),
        (torch.zeros(1, 0, 4, dtype=torch.int64), r"got \[1, 0, 4\]"),
        (torch.zeros(1, 4, 4, dtype=torch.int32), "dtype torch.int64, got torch.int32"),
        (torch.full((1, 4, 4), 24), "tokens from 0 to 23, got 24 to 24"),
        (torch.arange(-1, 15).reshape(1, 4, 4), "got -1 to 14"),
        (torch.zeros(1, 4, 4, dtype=torch.int64, device="meta"), "expected tokens on cpu"),
    ],
)
def test_wrong_tokens_are_named(tokens, sentence):
    with pytest.raises(UserError, match=sentence):
        make_dvae(dtype=torch.float32).decode(tokens)
