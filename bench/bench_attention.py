"""Sparse attention against scaled_dot_product_attention, by the mask and dense causal (another function)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import arguments, measure, report

import dalle_kernels
from dalle_kernels import AttentionPattern, sparse_attention
from dalle_kernels.testing import assert_accurate

KINDS = ("row", "column", "conv")


def attend(call: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], backward: bool) -> tuple:
    """The output, or the gradients of q, k and v for an output gradient of v."""
    if not backward:
        with torch.no_grad():
            return (call(*inputs),)
    out = call(*inputs)
    return torch.autograd.grad(out, inputs, inputs[2].detach())


def candidates(pattern: AttentionPattern, mask: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    return {
        "dalle_kernels": lambda q, k, v: sparse_attention(q, k, v, pattern),
        "SDPA with the mask": partial(F.scaled_dot_product_attention, attn_mask=mask),
        "SDPA dense causal (another function)": partial(F.scaled_dot_product_attention, is_causal=True),
    }


def check(pattern: AttentionPattern, mask: torch.Tensor, inputs: tuple[torch.Tensor, ...], backward: bool) -> None:
    """Hold the op to the error rule on the first batch entry of the inputs that are timed."""
    few = tuple(x[:1].detach().requires_grad_(backward) for x in inputs)
    exact_inputs = tuple(x.detach().double().requires_grad_(backward) for x in few)
    masked = candidates(pattern, mask)
    actual = attend(masked["dalle_kernels"], few, backward)
    with dalle_kernels.use("reference"):
        plain = attend(masked["dalle_kernels"], few, backward)
    exact = attend(masked["SDPA with the mask"], exact_inputs, backward)
    for results in zip(actual, plain, exact, strict=True):
        assert_accurate(*results, name=f"{pattern.kind}, backward {backward}")


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--text-len", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--side", type=int, default=32, help="of the grid (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = []
    for kind in KINDS:
        pattern = AttentionPattern(kind, options.text_len, (options.side, options.side))
        mask = pattern.mask().to(options.device)
        for dtype in (torch.float32, torch.bfloat16):
            shape = (options.batch, options.heads, pattern.seq_len, options.head_dim)
            for backward in (False, True):
                inputs = tuple(
                    torch.randn(shape, device=options.device).to(dtype).requires_grad_(backward) for _ in range(3)
                )
                calls = candidates(pattern, mask)
                times = measure(
                    {name: partial(attend, call, inputs, backward) for name, call in calls.items()},
                    check=partial(check, pattern, mask, inputs, backward),
                    device=options.device,
                    rounds=options.rounds,
                )
                work = "forward + backward" if backward else "forward"
                cases.append(
                    {
                        "batch x heads": f"{options.batch} x {options.heads}",
                        "text": options.text_len,
                        "grid": f"{options.side}x{options.side}",
                        "head dim": options.head_dim,
                        "pattern": kind,
                        "dtype": str(dtype).removeprefix("torch."),
                        "work": work,
                        "pairs": pattern.pairs(),
                        "times": times,
                    }
                )
                medians = "  ".join(f"{name} {found['median_ms']:.1f} ms" for name, found in times.items())
                print(f"{kind:7} {cases[-1]['dtype']:9} {work:19} {medians}", flush=True)
    report("attention", options.device, cases)


if __name__ == "__main__":
    main()
