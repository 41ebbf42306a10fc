"""Linear cross-entropy of text and image, forward and backward, against torch and DALLE-pytorch's joint head."""

from __future__ import annotations

from functools import partial

import machine
import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Candidate, Case, Goal, Unavailable, compiled, runs
from torch import Tensor

from dalle_kernels import linear_cross_entropy
from dalle_kernels.testing import assert_accurate

EAGER = "torch, eager"
LIGER = "Liger-Kernel"
BATCH, TEXT, IMAGE = 4, 256, 1024
DIM = {"cpu": 512, "cuda": 3968}
TEXT_CLASSES, IMAGE_CLASSES = 16384, 8192
# Below this rate (operations a second) a call in 16 bit takes half a minute and more.
BEARABLE_RATE = 1e10


def eager(
    text: Tensor, image: Tensor, text_weight: Tensor, image_weight: Tensor, targets: tuple[Tensor, Tensor]
) -> Tensor:
    text_loss = F.cross_entropy(F.linear(text, text_weight), targets[0])
    image_loss = F.cross_entropy(F.linear(image, image_weight), targets[1])
    return text_loss / 8 + image_loss * (7 / 8)


def in_float32(*tensors_and_targets) -> Tensor:
    """As :func:`eager` on converted inputs: what a user picks where the processor has no 16-bit products."""
    *tensors, targets = tensors_and_targets
    return eager(*(tensor.float() for tensor in tensors), targets)


def ours(
    text: Tensor, image: Tensor, text_weight: Tensor, image_weight: Tensor, targets: tuple[Tensor, Tensor]
) -> Tensor:
    text_loss = linear_cross_entropy(text, text_weight, targets[0])
    image_loss = linear_cross_entropy(image, image_weight, targets[1])
    return text_loss / 8 + image_loss * (7 / 8)


def joint(
    text: Tensor, image: Tensor, text_weight: Tensor, image_weight: Tensor, targets: tuple[Tensor, Tensor]
) -> Tensor:
    """DALLE-pytorch's head: one vocabulary, the other stream's classes masked (``DALLE.forward``)."""
    hidden = torch.cat((text.unflatten(0, (BATCH, -1)), image.unflatten(0, (BATCH, -1))), dim=1)
    logits = F.linear(hidden, torch.cat((text_weight, image_weight)))
    is_text = torch.arange(TEXT + IMAGE)[:, None] < TEXT
    text_class = torch.arange(TEXT_CLASSES + IMAGE_CLASSES) < TEXT_CLASSES
    hidden_class = (is_text != text_class)[None].to(logits.device)
    logits = logits.masked_fill(hidden_class, -torch.finfo(logits.dtype).max).transpose(1, 2)
    labels = torch.cat((targets[0].view(BATCH, -1), targets[1].view(BATCH, -1) + TEXT_CLASSES), dim=1)
    text_loss = F.cross_entropy(logits[:, :, :TEXT], labels[:, :TEXT])
    image_loss = F.cross_entropy(logits[:, :, TEXT:], labels[:, TEXT:])
    return (text_loss + 7 * image_loss) / 8


def liger(tensors: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]) -> Candidate | Unavailable:
    """Liger-Kernel's chunked loss; its logits are in the inputs' dtype, its weight's gradient summed in float32."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        return Unavailable(LIGER, str(error))
    loss_of = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

    def both(text, image, text_weight, image_weight, targets):
        return loss_of(text_weight, text, targets[0]) / 8 + loss_of(image_weight, image, targets[1]) * (7 / 8)

    return runs(Candidate(LIGER, partial(with_gradients, both, tensors, targets)))


def with_gradients(function, tensors: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    loss = function(*tensors, targets)
    return loss.detach(), *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_text_and_image(side_by_side, device, dtype):
    dim = DIM[device]
    sizes = ((BATCH * TEXT, dim), (BATCH * IMAGE, dim), (TEXT_CLASSES, dim), (IMAGE_CLASSES, dim))
    scales = (1.0, 1.0, 2 / dim**0.5, 2 / dim**0.5)
    tensors = tuple(
        (scale * torch.randn(size, device=device)).to(dtype).requires_grad_() for size, scale in zip(sizes, scales)
    )
    targets = (
        torch.randint(0, TEXT_CLASSES, sizes[0][:1], device=device),
        torch.randint(0, IMAGE_CLASSES, sizes[1][:1], device=device),
    )
    rate = machine.product_rate(dtype, device)
    slow = rate < BEARABLE_RATE

    def check() -> None:
        rows = 16 if slow else BATCH * IMAGE
        some_targets = tuple(target[:rows] for target in targets)
        actual, near, exact = (
            with_gradients(
                function,
                tuple(tensor.detach()[:rows].to(kind).requires_grad_() for tensor in tensors[:2])
                + tuple(tensor.detach().to(kind).requires_grad_() for tensor in tensors[2:]),
                some_targets,
            )
            for function, kind in ((ours, dtype), (eager, dtype), (eager, torch.float64))
        )
        names = ("loss", "text", "image", "text weight", "image weight")
        for name, *results in zip(names, actual, near, exact, strict=True):
            assert_accurate(*results, f"linear_cross_entropy, {name}, {dtype}")

    def rival(name: str, function, **options) -> Candidate | Unavailable:
        if slow:
            return Unavailable(
                name, f"torch's 16-bit products reach {rate / 1e9:.1f} GFLOP/s here: a call takes minutes"
            )
        return Candidate(name, partial(with_gradients, function, tensors, targets), **options)

    name = "torch, compiled"
    others = [rival(EAGER, eager)]
    others.append(
        rival(name, eager) if slow else compiled(name, eager, partial(with_gradients, tensors=tensors, targets=targets))
    )
    others.append(rival("DALLE-pytorch's joint masked head", joint))
    if device == "cuda":
        others.append(liger(tensors, targets))
    if dtype != torch.float32 and device == "cpu":
        run = partial(with_gradients, in_float32, tensors, targets)
        others.append(Candidate("torch, eager, converted to float32", run))
    against = EAGER if not slow else "torch, eager, converted to float32"
    pairs = BATCH * (TEXT * TEXT_CLASSES + IMAGE * IMAGE_CLASSES)
    side_by_side(
        Case(
            family="cross_entropy",
            work="forward + backward",
            dtype=dtype,
            settings={
                "hidden": dim,
                "text": f"{BATCH * TEXT} of {TEXT_CLASSES}",
                "image": f"{BATCH * IMAGE} of {IMAGE_CLASSES}",
            },
            ours=Candidate(OURS, partial(with_gradients, ours, tensors, targets)),
            rivals=others,
            check=check,
            goals=[Goal("speed", 1.15, against), Goal("memory", 1 / 8, against)]
            if device == "cpu"
            else [Goal("speed", 1.1, LIGER), Goal("extra bytes", 60e6)],
            operations=6 * dim * pairs,  # three matrix products
            bytes_moved=2 * sum(tensor.nbytes for tensor in tensors),
            seconds=40,
        )
    )
