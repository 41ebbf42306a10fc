"""A step of every public function and module, its gradients included, to be captured, traced or run again.

``STEPS[name](device)`` draws the inputs, the same ones each time, and gives a function without arguments: it calls what
has this name in ``dalle_kernels`` and returns copies of all that came of it, outputs, gradients and what was changed in
place. Steps of what has a state go on from where the last one ended. Without gradients it gives the outputs alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from fuzz import flat
from fuzz_calls import as_tuple
from test_decode_layers import draw_layers
from torch import Tensor, nn

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, LayerWeights

Step = Callable[[], list[Tensor]]

OTHERWISE = {
    "AttentionPattern", "Explanation", "KVCache", "LayerWeights", "NativeError", "ProviderError", "explain", "ops",
    "philox", "shard_longer_axis", "use",  # compute nothing on a device, or within the steps of others
    "PowerSGD",  # needs other processes: tests/test_powersgd_hooks.py
}  # fmt: skip
NOISY = ("gumbel_softmax", "gumbel_softmax_kl", "gumbel_codebook")
"""Draw other noise in each step."""

PATTERN = AttentionPattern("conv", 7, (6, 6), 3)
HEADS, HEAD_DIM = 2, 64
STEPS: dict[str, Callable[[torch.device | str], Step]] = {}


def step_of(*names: str):
    """Register what makes the steps of these names, which it is given before the device."""

    def register(make: Callable) -> Callable:
        for name in names:
            STEPS[name] = lambda device, name=name: make(name, device)
        return make

    return register


def randn(*shape: int, device, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def differentiated(function: Callable, leaves: list[Tensor], *settings) -> Step:
    """The outputs and the gradients of their squares."""
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def step() -> list[Tensor]:
        outputs = flat(as_tuple(function(*leaves, *settings)))
        if not torch.is_grad_enabled():
            return outputs
        total = sum(output.float().square().sum() for output in outputs)
        return [output.detach() for output in outputs] + list(torch.autograd.grad(total, leaves))

    return step


def repeated(function: Callable, *arguments) -> Step:
    return lambda: flat(as_tuple(function(*arguments)))


@step_of("sparse_attention")
def attention_step(name: str, device) -> Step:
    shape = 2, HEADS, PATTERN.seq_len, HEAD_DIM
    inputs = [randn(*shape, device=device, dtype=torch.bfloat16) for _ in range(3)]
    return differentiated(dalle_kernels.sparse_attention, inputs, PATTERN)


@step_of("SparseSelfAttention", "Linear")
def module_step(name: str, device) -> Step:
    dim = HEADS * HEAD_DIM
    arguments = (dim, HEADS, PATTERN) if name == "SparseSelfAttention" else (dim, 24)
    with torch.device(device):
        module = getattr(dalle_kernels, name)(*arguments)
    x = randn(2, PATTERN.seq_len, dim, device=device)
    return differentiated(lambda x, *_parameters: module(x), [x, *module.parameters()])


def filled_cache(kind: str, device, dtype: torch.dtype) -> KVCache:
    cache = KVCache(dataclasses.replace(PATTERN, kind=kind), 2, HEADS, HEAD_DIM, dtype, device)
    for held in (cache.text, cache.image):
        held.normal_()
    return cache


@step_of("decode_attention")
def decode_step(name: str, device) -> Step:
    cache = filled_cache("conv", device, torch.bfloat16)
    tokens = randn(3, *cache.step_shape, device=device, dtype=torch.bfloat16)
    position = torch.full((1,), PATTERN.text_len, device=device)

    def step() -> list[Tensor]:
        out = dalle_kernels.decode_attention(*tokens, cache, position=position)
        position.add_(1)
        tokens.mul_(0.9)
        return [out, position.clone()]

    return step


@step_of("decode_layers")
def layers_step(name: str, device) -> Step:
    caches = [filled_cache(kind, device, torch.bfloat16) for kind in ("row", "column")]
    dim = 64
    drawn = draw_layers(dim, HEADS, HEAD_DIM, 96, torch.bfloat16, len(caches))
    layers = [LayerWeights(*(tensor.to(device) for tensor in layer)) for layer in drawn]
    x, position = randn(2, dim, device=device, dtype=torch.bfloat16), torch.full((1,), PATTERN.text_len, device=device)

    def step() -> list[Tensor]:
        out = dalle_kernels.decode_layers(x, layers, caches, position=position)
        position.add_(1)
        return [out, position.clone()]

    return step


@step_of("gumbel_softmax", "gumbel_softmax_kl")
def gumbel_step(name: str, device) -> Step:
    return differentiated(getattr(dalle_kernels, name), [randn(3, 130, 2, 5, device=device)], 0.7, False, 1)


@step_of("gumbel_codebook")
def codebook_step(name: str, device) -> Step:
    inputs = [randn(5, 130, device=device), randn(130, 24, device=device)]
    return differentiated(dalle_kernels.gumbel_codebook, inputs, 0.7)


@step_of("linear_cross_entropy")
def cross_entropy_step(name: str, device) -> Step:
    target = torch.randint(130, (2, 33), device=device)
    return differentiated(
        lambda hidden, weight, bias: dalle_kernels.linear_cross_entropy(hidden, weight, target, bias),
        [randn(2, 33, 24, device=device), randn(130, 24, device=device), randn(130, device=device)],
    )


@step_of("logit_laplace_loss")
def laplace_step(name: str, device) -> Step:
    x = torch.rand(2, 3, 5, 7, device=device) * 0.8 + 0.1
    inputs = [randn(2, 3, 5, 7, device=device) for _ in range(2)]
    return differentiated(lambda mu, log_b: dalle_kernels.logit_laplace_loss(x, mu, log_b), inputs)


@step_of("map_pixels", "unmap_pixels")
def pixels_step(name: str, device) -> Step:
    return differentiated(getattr(dalle_kernels, name), [torch.rand(2, 3, 5, 7, device=device)])


@step_of("linear")
def linear_step(name: str, device) -> Step:
    inputs = [randn(3, 24, device=device), randn(33, 24, device=device), randn(33, device=device)]
    return differentiated(dalle_kernels.linear, inputs)


@step_of("mlp")
def mlp_step(name: str, device) -> Step:
    shapes = (5, 24), (48, 24), (48,), (24, 48), (24,)
    return differentiated(dalle_kernels.mlp, [randn(*shape, device=device) for shape in shapes])


@step_of("encode_fp169", "encode_fp169_checked", "encode_fp0610", "encode_fp0610_checked")
def encode_step(name: str, device) -> Step:
    return repeated(getattr(dalle_kernels, name), randn(33, 130, device=device))


@step_of("decode_fp169", "decode_fp0610")
def decode_codes_step(name: str, device) -> Step:
    return repeated(getattr(dalle_kernels, name), torch.arange(-5000, 5000, dtype=torch.int16, device=device))


@step_of("scale_cast_filter", "filter_cast_unscale")
def casts_step(name: str, device) -> Step:
    tensors = [randn(*shape, device=device) for shape in ((33, 130), (7,), ())]
    return repeated(getattr(dalle_kernels, name), tensors, torch.full((), 8192.0, device=device))


@step_of("squared_norms")
def norms_step(name: str, device) -> Step:
    blocks = [[randn(33, 130, device=device), randn(7, device=device)], [randn(5, device=device).half()]]
    return repeated(dalle_kernels.squared_norms, blocks)


@step_of("scaled_resblock", "ScaledResBlock")
def resblock_step(name: str, device) -> Step:
    scale, x = torch.full((), 128.0, device=device), randn(5, 24, device=device)
    block = nn.Linear(24, 24, dtype=torch.float16, device=device)
    if name == "scaled_resblock":
        return differentiated(lambda x, *_: dalle_kernels.scaled_resblock(block, x, scale), [x, *block.parameters()])
    module = dalle_kernels.ScaledResBlock(block, scale)
    return differentiated(lambda x, *_: module(x), [x, *module.parameters()])


@step_of("GradScales")
def scales_step(name: str, device) -> Step:
    scales = dalle_kernels.GradScales(3, device=device)
    nonfinite = torch.arange(3, device=device) == 1

    def step() -> list[Tensor]:
        scales.update(nonfinite)
        return [scales.scales.clone(), *scales.state_dict().values()]

    return step


@step_of("orthogonalize")
def orthogonalize_step(name: str, device) -> Step:
    return repeated(dalle_kernels.orthogonalize, randn(2, 300, 20, device=device))


@step_of("AdamW16")
def adamw_step(name: str, device) -> Step:
    params = [nn.Parameter(randn(*shape, device=device)) for shape in ((33, 130), (7,), ())]
    optimizer = dalle_kernels.AdamW16(params, 1e-2)
    for param in params:
        param.grad = torch.randn_like(param)

    def step() -> list[Tensor]:
        optimizer.step()
        return [param.detach().clone() for param in params]

    return step
