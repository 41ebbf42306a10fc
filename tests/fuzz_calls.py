"""Random calls of every op, for tests/fuzz.py: one function a family draws the arguments of its ops."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.testing import ODD_SIZES, strided_views

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALL = tuple(size for size in ODD_SIZES if size <= 33)


@dataclass
class Call:
    """One call of an op: its arguments, and those of the float64 reference (by default the same in float64).

    ``bits``: the outputs must equal the reference's bit for bit instead of keeping the error rule. ``products``: there
    are matrix products of torch's inside, whose last bits depend on the number of threads.

    ``terms``: for each output the size of the terms that it is a sum of, where all of a small output may cancel; none
    where that cannot be. Errors are judged beside the largest number of an output, or beside its terms if they are
    larger. Terms are known to some units of their last place, however little is left of them. Beside what is left, an
    output of one or two elements would once in some hundred calls be worse by orders of magnitude than all others are.
    The largest error of all calls would then be that call's alone, ours as the plain expression's, and of two errors of
    one size, drawn once each, one is more than twice the other in six cases of ten. More calls would not help, for they
    bring worse ones. Beside the terms all calls err alike, and the largest error is one of many.

    ``plain`` computes the outputs on a device by a plain expression of torch's in the inputs' dtype, where the
    reference computes in float32 inside. Kernels for tensor cores are held to that: like it, they round the factors of
    16-bit products to 16 bits.
    """

    args: tuple
    exact: tuple | None = None
    bits: bool = False
    products: bool = False
    terms: tuple[float, ...] = ()
    plain: Callable[[str], tuple[Tensor, ...]] | None = None

    def __post_init__(self) -> None:
        if self.exact is None:
            self.exact = doubled(self.args)


def doubled(args: tuple) -> tuple:
    """The arguments with floating-point tensors in float64."""
    return tuple(
        arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else doubled(arg) if is_list(arg) else arg
        for arg in args
    )


def largest(tensor: Tensor) -> float:
    """The largest magnitude; 0 of an empty tensor."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def is_list(arg: object) -> bool:
    return isinstance(arg, (list, tuple))


def reference(op: str, *args) -> tuple:
    """The op by its reference, always as a tuple."""
    with dalle_kernels.use("reference"):
        return as_tuple(dalle_kernels.ops()[op](*args))


def as_tuple(output: object) -> tuple:
    return tuple(output) if is_list(output) else (output,)


def laid_out(draw: random.Random, tensor: Tensor, unit_last: bool = False) -> Tensor:
    """The tensor, or equal values in another memory layout."""
    views = [view for _, view in strided_views(tensor) if not unit_last or view.dim() == 0 or view.stride(-1) == 1]
    return draw.choice([tensor, *views])


def shape_of(draw: random.Random, lowest: int, highest: int, elements: int = 1 << 15) -> list[int]:
    """Sizes of ``lowest`` to ``highest`` dimensions, now and then an empty one, ``elements`` in all at most."""
    sizes: list[int] = []
    for _ in range(draw.randint(lowest, highest)):
        room = [size for size in ODD_SIZES if size <= elements]
        sizes.append(draw.choice(room) if draw.random() > 0.03 else 0)
        elements //= max(1, sizes[-1])
    return sizes


def float16_call(op: str, draw: random.Random) -> Call:
    shape = shape_of(draw, 0, 5)
    dtype = draw.choice((*FLOATS, torch.float64))
    if op.startswith("decode"):
        return Call((laid_out(draw, torch.randint(-(2**15), 2**15, shape).short()), dtype), bits=True)
    values = (torch.randn(shape) * torch.exp2(torch.empty(shape).uniform_(-70, 8))).to(dtype)
    if draw.random() < 0.3:
        values[torch.rand(shape) < 0.1] = draw.choice((torch.nan, torch.inf, -torch.inf))
    return Call((laid_out(draw, values),), bits=True)


@dataclass(frozen=True)
class Room:
    """What attention, decoding and a decoding step's layers are drawn of: by default all that any kernel serves."""

    dtypes: tuple[torch.dtype, ...] = FLOATS
    head_dims: tuple[int, ...] = (1, 3, 8, 16, 20, 33, 64, 80, 128)
    layers: tuple[tuple[int, ...], ...] = ((1, 8, 13, 33, 64),) * 4
    """Their width, heads, head_dim and hidden width."""
    lay_out: Callable[..., Tensor] = laid_out


ANY = Room()
TENSOR_CORES = Room(
    (torch.bfloat16, torch.float16), (64, 128), ((32, 160), (1, 5), (64, 128), (64, 96)), lambda _, x, **__: x
)
"""Where the compiled kernels for CUDA serve most of the calls."""


def attention_call(op: str, draw: random.Random, room: Room = ANY) -> Call:
    pattern = AttentionPattern(
        draw.choice(KINDS), draw.randint(0, 40), (draw.randint(1, 12), draw.randint(1, 12)), draw.choice((1, 3, 5, 11))
    )
    batch, heads, seq = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, pattern.seq_len)
    shape, dtype = (batch, heads, seq, draw.choice(room.head_dims)), draw.choice(room.dtypes)
    scale = draw.choice((shape[-1] ** -0.5, draw.uniform(-2, 2)))
    settings = (pattern.kind, pattern.text_len, *pattern.grid, pattern.kernel_size, scale)
    tensors = [room.lay_out(draw, torch.randn(shape).to(dtype), unit_last=True) for _ in range(4)]
    if op == "sparse_attention":
        return Call((*tensors[:3], *settings))
    *inputs, grad_out = tensors

    def plain(device: str) -> tuple[Tensor, ...]:
        leaves = [tensor.to(device).requires_grad_() for tensor in inputs]
        q, k, v = leaves
        hidden = ~pattern.mask(seq, device)
        out = ((q @ k.transpose(-2, -1)) * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return torch.autograd.grad(out, leaves, grad_out.to(device))

    saved = reference("sparse_attention", *inputs, *settings)
    exact = reference("sparse_attention", *doubled(tuple(inputs)), *settings)
    doubles = (grad_out.double(), *doubled(tuple(inputs)), *exact)
    return Call((grad_out, *inputs, *saved, *settings), (*doubles, *settings), plain=plain)


def decode_call(op: str, draw: random.Random, room: Room = ANY) -> Call:
    pattern = AttentionPattern(
        draw.choice(KINDS),
        draw.choice((0, 1, 7, 40, 300)),
        (draw.randint(1, 12), draw.randint(1, 12)),
        draw.choice((3, 5)),
    )
    prompts, heads, samples = draw.randint(1, 3), draw.randint(1, 3), draw.choice((1, 1, 2, 5, 33))
    head_dim, dtype = draw.choice(room.head_dims), draw.choice(room.dtypes)
    cache = KVCache(pattern, prompts, heads, head_dim, dtype, samples_per_prompt=samples)
    tokens = [room.lay_out(draw, torch.randn(prompts * samples, heads, 1, head_dim).to(dtype)) for _ in range(3)]
    held = [torch.randn(tensor.shape).to(dtype) for tensor in (cache.text, cache.image)]
    position = draw.randrange(0 if samples == 1 else pattern.text_len, pattern.seq_len)
    if op == "decode_attention_at":
        position = torch.tensor(position, dtype=draw.choice((torch.int32, torch.int64)))
    return Call(
        (*tokens, *held, position, *cache.pattern_arguments, draw.choice((head_dim**-0.5, draw.uniform(-2, 2))))
    )


def linear_call(op: str, draw: random.Random) -> Call:
    rows, inputs, outputs = draw.choice((0, *ODD_SIZES)), draw.choice((*ODD_SIZES, 1100)), draw.choice(ODD_SIZES)
    dtype = draw.choice(FLOATS)
    x, weight = (laid_out(draw, torch.randn(n, inputs).to(dtype), unit_last=True) for n in (rows, outputs))
    tensors = (x, weight, torch.randn(outputs).to(dtype) if draw.random() < 0.7 else None)
    return Call((*tensors, draw.choice((dtype, torch.float32))), (*doubled(tensors), torch.float64))


def mlp_call(op: str, draw: random.Random) -> Call:
    dim, width, outputs = (draw.choice((*ODD_SIZES, 300)) for _ in range(3))
    shape, dtype = (*shape_of(draw, 0, 2, 300), dim), draw.choice(FLOATS)
    x = laid_out(draw, torch.randn(shape).to(dtype))
    expansion, contraction = (torch.randn(n, m) * m**-0.5 for n, m in ((width, dim), (outputs, width)))
    weights = [tensor.to(dtype) for tensor in (expansion, torch.randn(width), contraction, torch.randn(outputs))]
    if op == "mlp":
        return Call((x, *weights), products=True)
    grad_out = laid_out(draw, torch.randn(*shape[:-1], outputs).to(dtype))
    _, hidden = reference("mlp", x, *weights)
    # GELU's derivative is a sum of two terms, which cancel near -0.75.
    reaching = largest(grad_out.double().reshape(-1, outputs) @ contraction.double())
    terms = (reaching * largest(expansion), reaching * largest(x), reaching, 0.0, 0.0)
    return Call((grad_out, x, hidden, *weights[:3]), products=True, terms=terms)


def decode_layers_call(op: str, draw: random.Random, room: Room = ANY) -> Call:
    dim, heads, head_dim, hidden = (draw.choice(sizes) for sizes in room.layers)
    heads = min(heads, 8)
    text_len, grid, dtype = draw.randint(0, 20), (draw.randint(1, 5), draw.randint(1, 5)), draw.choice(room.dtypes)
    prompts, samples, kinds = draw.randint(1, 3), draw.choice((1, 2, 5)), [draw.choice(KINDS) for _ in range(2)]
    outputs = {"query_key_value": (3 * heads * head_dim, dim), "projection": (dim, heads * head_dim)}
    outputs |= {"expansion": (hidden, dim), "contraction": (dim, hidden)}
    weights, held = [], []
    for kind in kinds:
        for name in ("attention_norm", "query_key_value", "projection", "mlp_norm", "expansion", "contraction"):
            rows, inputs = outputs.get(name, (dim, None))
            weights.append(torch.randn(rows) if inputs is None else torch.randn(rows, inputs) * inputs**-0.5)
            weights.append(torch.randn(rows))
        pattern = AttentionPattern(kind, text_len, grid, 3)
        cache = KVCache(pattern, prompts, heads, head_dim, dtype, samples_per_prompt=samples)
        held += [torch.randn(tensor.shape).to(dtype) for tensor in (cache.text, cache.image)]
    x = room.lay_out(draw, torch.randn(prompts * samples, dim).to(dtype))
    position = draw.randrange(0 if samples == 1 else text_len, pattern.seq_len)
    if op == "decode_layers_at":
        position = torch.tensor(position, dtype=draw.choice((torch.int32, torch.int64)))
    settings = (",".join(kinds), *cache.pattern_arguments[1:], head_dim**-0.5, draw.choice((1e-5, 0.1)))
    return Call((x, [weight.to(dtype) for weight in weights], held, position, *settings))


def gumbel_softmax_call(op: str, draw: random.Random) -> Call:
    shape, dtype = shape_of(draw, 1, 4), draw.choice(FLOATS)
    dim = draw.randrange(-len(shape), len(shape))
    shape[dim] = draw.choice(ODD_SIZES[1:])
    logits = laid_out(draw, (torch.randn(shape) * draw.choice((0.1, 1, 10))).to(dtype))
    seed, offset = torch.tensor(draw.getrandbits(62)), torch.tensor(draw.choice((0, 3, 2**40)))
    noise = (seed, offset, torch.tensor(draw.choice((0.07, 0.5, 1.0, 1.7))))
    if "codebook" in op:
        codebook = torch.randn(shape[dim], draw.choice(SMALL)).to(draw.choice((dtype, torch.float32)))
        forward = (logits, laid_out(draw, codebook), *noise, dim)
    else:
        forward = (logits, *noise, draw.random() < 0.3, dim)
    if not op.endswith("_backward"):
        # A weight hangs on a difference of logits plus noise, some 4 each, over tau, by a slope of at most 1/4.
        # Codes of weights that sum to 1 may cancel, and ln K less an entropy.
        weight = max(1.0, (largest(logits) + 4) / (4 * noise[2].item()))
        return Call(forward, terms=(weight * (largest(codebook) if "codebook" in op else 1.0), math.log(shape[dim])))
    call = _backward_of(op, draw, forward, saved=() if "codebook" in op else (1,))
    if "codebook" not in op:
        return call
    # Of a weight times what a code and its gradient give, over tau, the weights' mean is taken away.
    given = call.exact[0].movedim(dim, -1) @ codebook.double().mT
    weights = reference("gumbel_softmax", logits.double(), *noise, False, dim)[0].movedim(dim, -1)
    return replace(call, terms=(largest(weights * given) / noise[2].item(), 0.0))


def _backward_of(op: str, draw: random.Random, forward: tuple, saved: tuple[int, ...]) -> Call:
    """Gradients of the forward's outputs, the forward's arguments, and its first output after the logits if saved."""
    name = op.removesuffix("_backward")
    outputs, exact = reference(name, *forward), reference(name, *doubled(forward))
    gradients = tuple(laid_out(draw, torch.randn(output.shape).to(output.dtype)) for output in outputs)

    def arguments(inputs: tuple, results: tuple) -> tuple:
        return (*inputs[:1], *results[: len(saved)], *inputs[1:])

    args = (*gradients, *arguments(forward, outputs))
    return Call(args, (*doubled(gradients), *arguments(doubled(forward), exact)))


def cross_entropy_call(op: str, draw: random.Random) -> Call:
    rows, width, classes = draw.choice((0, *ODD_SIZES)), draw.choice(ODD_SIZES), draw.choice((*ODD_SIZES, 1000))
    dtype = draw.choice(FLOATS)
    if op.endswith(("_scaled_gradient", "_scale_gradient_")):
        return Call((laid_out(draw, torch.randn(rows, width).to(dtype)), torch.randn(())))
    hidden = laid_out(draw, torch.randn(rows, width).to(dtype))
    weight = laid_out(draw, (torch.randn(classes, width) * width**-0.5).to(draw.choice((dtype, torch.float32))))
    bias = laid_out(draw, torch.randn(classes).to(dtype)) if draw.random() < 0.5 else None
    target = torch.randint(classes, (rows,))
    target[torch.rand(rows) < draw.choice((0, 0.2))] = -100
    inputs = (hidden, weight, laid_out(draw, target), bias, -100)
    wanted = [draw.random() < 0.7, draw.random() < 0.7, bias is not None and draw.random() < 0.7]
    logits = largest(torch.nn.functional.linear(*doubled((hidden, weight, bias))))
    if op.endswith("_backward"):
        grad_loss = laid_out(draw, torch.randn(rows))
        reaching = largest(grad_loss[target != -100])
        terms = (reaching * largest(weight), reaching * largest(hidden), reaching)

        def plain(device: str) -> tuple[Tensor, ...]:
            """By logits in the inputs' dtype; empty where no gradient is wanted."""
            leaves = [None if x is None else x.to(device).requires_grad_() for x in (hidden, weight, bias)]
            losses = torch.nn.functional.cross_entropy(
                torch.nn.functional.linear(*leaves), target.to(device), reduction="none"
            )
            found = torch.autograd.grad(losses, leaves[: 2 + (bias is not None)], grad_loss.to(losses))
            return tuple(x if want else x.new_empty(0) for x, want in zip((*found, *found[:1]), wanted))

        one_dtype = hidden.dtype == weight.dtype
        return Call((grad_loss, *inputs, wanted), products=True, terms=terms, plain=plain if one_dtype else None)
    if op.endswith(("_with_gradient", "_reduced")):
        reduction, kept = draw.choice(("mean", "sum")), int((target != -100).sum())
        reaching = 1 / max(kept, 1) if reduction == "mean" else 1.0
        terms = (reaching * logits, reaching * largest(weight), reaching * largest(hidden), reaching)
        if op.endswith("_reduced"):
            return Call((*inputs, reduction), products=True, terms=terms[:1])
        return Call((*inputs, reduction, wanted), products=True, terms=terms)
    return Call(inputs, products=True, terms=(logits,))


def logit_laplace_call(op: str, draw: random.Random) -> Call:
    shape, dtype = shape_of(draw, 0, 4), draw.choice(FLOATS)
    x = torch.empty(shape).uniform_(0.1, 0.9).to(draw.choice((dtype, torch.float32)))
    tensors = [laid_out(draw, t) for t in (x, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))]
    reduction = draw.choice(("none", "mean", "sum"))
    if not op.endswith("_backward"):
        return Call((*tensors, reduction), terms=(2.0,))
    grad = laid_out(draw, torch.randn(shape)) if reduction == "none" else torch.randn(())
    terms = (0.0, largest(grad) / (max(1, x.numel()) if reduction == "mean" else 1))  # of grad * (1 - |d| / b)
    return Call((grad, *tensors, reduction), terms=terms)


def adamw_call(op: str, draw: random.Random) -> Call:
    shapes = [shape_of(draw, 0, 3, 1 << 12) for _ in range(draw.randint(1, 5))]
    dtype, grad_dtype = draw.choice(FLOATS), draw.choice(FLOATS)
    coded = draw.random() < 0.7, draw.random() < 0.7
    rows = []
    for shape in shapes:
        sizes = torch.exp2(torch.empty(3, *shape).uniform_(-30, 3))
        first, second = torch.randn(shape) * sizes[1], (torch.randn(shape) * sizes[2]).square().clamp(max=5)
        row = (
            torch.randn(shape).to(dtype),
            (torch.randn(shape) * sizes[0]).to(grad_dtype),
            dalle_kernels.encode_fp169(first) if coded[0] else first,
            dalle_kernels.encode_fp0610(second) if coded[1] else second,
        )
        if draw.random() < 0.1:
            row = tuple(laid_out(draw, tensor) for tensor in row)
        rows.append((*row, torch.tensor(float(draw.choice((0, 1, 100, 10**6))))))
    settings = (draw.choice((0.0, 1e-3, 0.5)), draw.choice((0.0, 0.9)), draw.choice((0.96, 0.999)), 1e-8)
    settings += (draw.choice((0.0, 0.1)), draw.choice((5.0, 0.01, torch.inf)))
    scale = torch.tensor(draw.choice((1.3, 2.0**17))) if draw.random() < 0.5 else None
    found = torch.tensor(draw.random() < 0.2) if draw.random() < 0.5 else None
    seed = draw.randrange(2**63) if draw.random() < 0.5 else None
    numbers = [draw.randrange(2**31) for _ in rows]
    return Call((*map(list, zip(*rows)), *settings, scale, found, seed, numbers), bits=True)


def grad_scale_call(op: str, draw: random.Random) -> Call:
    dtype = draw.choice(FLOATS)
    tensors = []
    for _ in range(draw.randint(1, 5)):
        shape = shape_of(draw, 0, 3, 1 << 12)
        tensor = (torch.randn(shape) * torch.exp2(torch.empty(shape).uniform_(-30, 16))).to(dtype)
        if draw.random() < 0.3:
            tensor[torch.rand(shape) < 0.05] = draw.choice((torch.nan, torch.inf, -torch.inf))
        tensors.append(laid_out(draw, tensor) if draw.random() < 0.1 else tensor)
    scale = torch.tensor(draw.choice((1.0, 1.3 * 2**13)))
    dtypes = (draw.choice(FLOATS),) if op == "scale_cast_filter" else ()
    return Call((tensors, scale, *dtypes), bits=True)


def orthogonalize_call(op: str, draw: random.Random) -> Call:
    columns = draw.choice(SMALL)
    # Far from square, or the condition and with it everyone's error would be another one in each draw.
    rows = draw.choice([size for size in (*ODD_SIZES, 300) if size >= 3 * columns])
    P = torch.randn(*shape_of(draw, 0, 2, 4), rows, columns).to(draw.choice(FLOATS))
    return Call((laid_out(draw, P * draw.choice((1e-3, 1.0, 1e3))), draw.choice((0.0, 1e-6))), products=True)


SAMPLERS: dict[str, Callable[[str, random.Random], Call]] = {
    **dict.fromkeys([f"{job}_{form}" for job in ("encode", "decode") for form in ("fp169", "fp0610")], float16_call),
    **dict.fromkeys(["sparse_attention", "sparse_attention_backward"], attention_call),
    **dict.fromkeys(["decode_attention", "decode_attention_at"], decode_call),
    **dict.fromkeys(["decode_layers", "decode_layers_at"], decode_layers_call),
    "linear": linear_call,
    **dict.fromkeys(["mlp", "mlp_backward"], mlp_call),
    **dict.fromkeys(
        [f"gumbel_{name}{way}" for name in ("softmax", "softmax_kl", "codebook") for way in ("", "_backward")],
        gumbel_softmax_call,
    ),
    **dict.fromkeys(
        [f"linear_cross_entropy{name}" for name in ("", "_backward", "_with_gradient", "_reduced", "_scaled_gradient")],
        cross_entropy_call,
    ),
    "linear_cross_entropy_scale_gradient_": cross_entropy_call,
    **dict.fromkeys(["logit_laplace_loss", "logit_laplace_loss_backward"], logit_laplace_call),
    "adamw16_step": adamw_call,
    **dict.fromkeys(["scale_cast_filter", "filter_cast_unscale"], grad_scale_call),
    "orthogonalize": orthogonalize_call,
}

OF_TENSOR_CORES: dict[str, Callable[[str, random.Random], Call]] = {
    op: partial(SAMPLERS[op], room=TENSOR_CORES)
    for op in SAMPLERS
    if op.startswith(("sparse_attention", "decode_attention", "decode_layers"))
}
"""For the ops whose compiled CUDA kernels serve few of the calls that ``SAMPLERS`` draws."""
