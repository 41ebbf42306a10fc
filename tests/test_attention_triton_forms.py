"""What the table of configurations may ask of Triton's attention on Hopper: kept text, and loads by descriptors."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch
from test_attention import check
from test_attention_triton import check_random, random_inputs

from dalle_kernels import AttentionPattern, sparse_attention
from dalle_kernels._triton_configurations import key_blocks, query_blocks, use_configuration
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.attention.tiles import stream

SMALL, OF_THE_TABLE = (16, 16, 16, 4, 1), (64, 64, 32, 4, 3)
"""Blocks of queries, text and keys, warps and stages."""


@contextmanager
def hopper_forms(run, descriptors, blocks=SMALL):
    """Within the block 16-bit calls in heads of up to 64 run so.

    Gives what launches were made with, as a dict: of tiles of queries how many tiles of text they kept and whether they
    had descriptors, of tiles of keys the latter.
    """
    from dalle_kernels.attention import triton_kernels

    queries, _, keys, *rest = blocks
    of_queries = query_blocks(*blocks, run=run, descriptors=descriptors)
    rows = {
        ("sparse_attention", "16-bit 64"): of_queries,
        ("sparse_attention_backward", "dq 16-bit 64"): of_queries,
        ("sparse_attention_backward", "dk 16-bit 64"): key_blocks(queries, keys, *rest, descriptors=descriptors),
    }
    seen = {"queries": set(), "keys": set()}
    made, kernel = triton_kernels.query_launches, triton_kernels.key_gradients_kernel

    def noted(*arguments):
        for launch in made(*arguments):
            seen["queries"].add((launch.options["KEPT"], launch.options["DESCRIPTORS"]))
            yield launch

    class NotedKernel:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen["keys"].add(options["DESCRIPTORS"])
                return kernel[grid](*arguments, **options)

            return launch

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "_ENOUGH_PROGRAMS", 1)
        patch.setattr(triton_kernels, "query_launches", noted)
        patch.setattr(triton_kernels, "key_gradients_kernel", NotedKernel())
        for row, chosen in rows.items():
            stack.enter_context(use_configuration(*row, chosen))
        yield seen


def check_forms(device, pattern, shape, run, descriptors, kept, blocks=SMALL):
    with hopper_forms(run, descriptors, blocks) as seen:
        check_random(device, pattern, -0.25, *shape, dtype=torch.bfloat16)
    text = {(0, descriptors)} if pattern.kind != "causal" and (kept or descriptors) else set()
    assert seen["queries"] == {(kept, descriptors)} | text
    assert seen["keys"] == {descriptors and pattern.kind != "column"}


@pytest.mark.parametrize(("run", "descriptors"), [(0, True), (2, False), (3, True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_text_and_descriptors(kind, run, descriptors, triton_device):
    # Two tiles a column; text that ends within a tile, and for other kinds a prefix that ends within a row.
    pattern = AttentionPattern(kind, 17 if kind != "row" else 32, (32, 2), 3)
    seq = pattern.seq_len - (0 if kind == "column" else 7)
    check_forms(triton_device, pattern, (1, 1, seq, 16), run, descriptors, 2 if run and kind != "causal" else 0)


@pytest.mark.parametrize("kind", ("row", "column"))
def test_kept_text_and_descriptors_of_several_samples_and_heads(kind, triton_device):
    check_forms(triton_device, AttentionPattern(kind, 17, (16, 2)), (2, 2, 49, 16), 1, True, 2)


@pytest.mark.parametrize("run", (0, 4))
@pytest.mark.parametrize(("kind", "text_len"), [("row", 256), ("column", 77), ("conv", 257)])
def test_kept_text_and_descriptors_by_blocks_for_hopper(kind, text_len, run, triton_device):
    if triton_device == "cpu":
        pytest.skip("takes the interpreter minutes; for a GPU")
    pattern = AttentionPattern(kind, text_len, (32, 32))
    kept = -(-text_len // 64) if run else 0
    check_forms(triton_device, pattern, (2, 4, pattern.seq_len, 64), run, True, kept, OF_THE_TABLE)


def test_what_is_hidden_is_not_read_by_descriptors(triton_device):
    """Nor is it where text ends within a tile: zeros are there instead, and 0 times NaN would be NaN."""
    pattern = AttentionPattern("row", 17, (4, 5))
    q, k, v = random_inputs(triton_device, 1, 1, pattern.seq_len, 16, dtype=torch.bfloat16, count=3)
    expected = sparse_attention(q, k, v, pattern)[:, :, :17]
    k[:, :, 17:], v[:, :, 17:] = torch.nan, torch.inf
    with hopper_forms(0, True) as seen:
        out = sparse_attention(q, k, v, pattern)[:, :, :17]
    assert seen["queries"] == {(0, True)}
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("kind", "text_len", "grid", "missing", "head_dim", "expected"),
    [
        ("row", 16, (16, 3), 0, 20, {(1, False), (0, False)}),  # no descriptors of such a head
        ("column", 16, (16, 3), 1, 16, {(1, False), (0, False)}),  # nor of an image whose last row is incomplete
        ("column", 16, (24, 2), 0, 16, {(1, False), (0, False)}),  # nor of tiles of two columns
        ("conv", 145, (16, 3), 0, 16, {(0, True)}),  # text of too many tiles
        ("row", 16, (16, 3), 48, 16, {(0, True)}),  # text alone
    ],
)
def test_forms_that_do_not_serve(kind, text_len, grid, missing, head_dim, expected, triton_device):
    pattern = AttentionPattern(kind, text_len, grid, 3)
    shape = 1, 1, pattern.seq_len - missing, head_dim
    with hopper_forms(2, True) as seen:
        check_random(triton_device, pattern, 0.3, *shape, dtype=torch.float16)
    assert seen["queries"] == expected


def test_nothing_after_kept_text_has_influence(triton_device):
    """Beside logits of -1e3 a key that is not there, of zeros, would have a weight of infinity."""
    torch.manual_seed(5)
    pattern = AttentionPattern("row", 17, (4, 4))
    q, k, v, grad_out = random_inputs(triton_device, 1, 1, pattern.seq_len, 16, dtype=torch.bfloat16)
    with hopper_forms(2, True) as seen:
        check([(8 * q.abs(), -8 * k.abs(), v, grad_out)], pattern, 1.0)
    assert (2, True) in seen["queries"]


def test_descriptors_of_strided_views_and_of_addresses_that_have_none(triton_device):
    torch.manual_seed(2)
    pattern = AttentionPattern("column", 17, (16, 2))
    joint = torch.randn(1, pattern.seq_len, 4, 2, 16).bfloat16().to(triton_device)
    shifted = torch.randn(4, 1, 2, pattern.seq_len, 24).bfloat16().to(triton_device)[..., 1:17]
    for draw, described in ((joint.permute(2, 0, 3, 1, 4), True), (shifted, False)):
        with hopper_forms(0, True) as seen:
            check([draw.unbind()], pattern, 0.3)
        assert seen["queries"] == {(0, described)}


@pytest.mark.parametrize(
    ("text_len", "heads", "head_dim", "kept"),
    [(256, 64, 64, 4), (512, 64, 64, 8), (513, 64, 64, 0), (256, 8, 64, 0), (192, 64, 128, 3), (320, 64, 128, 0)],
)
def test_text_is_kept_where_it_fits_and_programs_are_enough(text_len, heads, head_dim, kept, triton_device):
    from dalle_kernels.attention.triton_kernels import query_launches

    k = torch.empty(1, heads, text_len + 1024, head_dim, dtype=torch.bfloat16, device="meta")
    part = stream("row", k.shape[2], text_len, 32, 11)
    image, *text = query_launches(k, k, part, query_blocks(64, 64, 32, 4, 3, run=4))
    assert image.options["KEPT"] == kept and len(text) == (kept > 0)
    # All tiles of queries are launched once.
    assert sum(launch.numbers[-1] for launch in (image, *text)) == part.tiles(64)
    assert image.grid == (heads * (4 if kept else part.tiles(64)),)
