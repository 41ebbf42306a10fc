"""Reading data sets: folders and shards, what is skipped and named, filters, bounds on hostile files."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from dalle.cli import data as command
from dalle.data import Filters, Limits, NothingUsable, load_arrays, open_dataset
from dalle.data import images as image_decoding
from dalle.data.images import ImageError, decode_image
from dalle.data.shards import EncodedSample, read_manifest, write_manifest, write_shards
from dalle.errors import UserError


def noise(height=12, width=12, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A small, well-formed PNG file whose header claims a huge picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def add(tar: tarfile.TarFile, name: str, content: bytes, **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def write_pair(folder, name: str, content: bytes, caption: str | None = "a red apple") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def reasons(dataset) -> dict[str, str]:
    return {name: reason.split(":")[0] for name, reason in dataset.skipped}


def test_folder_is_read_recursively_in_order_with_captions_tidied(tmp_path):
    write_pair(tmp_path, "b/two.PNG", encoded(noise(seed=2)), "  two\n pears ")
    write_pair(tmp_path, "a.png", encoded(noise(seed=1)), "one apple")
    write_pair(tmp_path, "c.webp", encoded(noise(seed=3), "WEBP", lossless=True), "three figs")
    (tmp_path / "notes.md").write_text("not a sample")
    dataset = open_dataset(tmp_path)
    assert dataset.captions == ["one apple", "three figs", "two pears"]
    for index, seed in enumerate((1, 3, 2)):
        pixels, caption, metadata = dataset[index]
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, noise(seed=seed))
        assert caption == dataset.captions[index] and metadata == {}
    assert dataset.skipped == [] and "3 images, none skipped" in dataset.summary()


def test_what_is_unusable_is_skipped_counted_and_named(tmp_path):
    good = encoded(noise(40, 40))
    write_pair(tmp_path, "good.png", good)
    write_pair(tmp_path, "truncated.png", good[: len(good) // 2])
    write_pair(tmp_path, "garbage.jpg", b"\xff\xd8\xff" + bytes(range(256)))
    write_pair(tmp_path, "empty.png", b"")
    write_pair(tmp_path, "bomb.png", png_claiming(50_000, 50_000))
    write_pair(tmp_path, "long.png", good + bytes(20_000))
    write_pair(tmp_path, "mute.png", good, caption=None)
    write_pair(tmp_path, "wide.png", encoded(noise(10, 21)))
    dataset = open_dataset(tmp_path, limits=Limits(max_bytes=16_000))
    assert [sample.name for sample in dataset.samples] == ["good.png"]
    assert reasons(dataset) == {
        "truncated.png": "corrupt or truncated",
        "garbage.jpg": "corrupt or truncated",
        "empty.png": "corrupt or truncated",
        "bomb.png": "too many pixels",
        "long.png": "file too large",
        "mute.png": "no caption",
        "wide.png": "aspect ratio",
    }
    summary = dataset.summary()
    assert "1 images; skipped 7: 3 corrupt or truncated (" in summary and "wide.png" in summary and "\n" not in summary


def test_names_and_captions_that_are_no_text_can_be_read_and_printed(tmp_path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        add(tar, "good.png", encoded(noise()))
        add(tar, "good.json", b'{"caption": "half a pair \\ud800"}')
        add(tar, "bad\udcff\x1b[31m\n.png", b"no image")
        add(tar, "bad\udcff\x1b[31m\n.txt", b"a caption")
    dataset = open_dataset(shard)
    assert dataset.captions == ["half a pair ?"]
    assert dataset.summary().encode().isascii() and "a.tar:bad\\udcff\\x1b[31m\\n.png" in dataset.summary()
    write_pair(tmp_path / "folder", "caf\udce9.png", encoded(noise()))
    assert [sample.name for sample in open_dataset(tmp_path / "folder").samples] == ["caf\\udce9.png"]


def test_what_is_no_file_is_skipped_and_not_waited_for(tmp_path):
    write_pair(tmp_path, "good.png", encoded(noise()))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "pipe.txt").write_text("nobody writes")
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    assert reasons(open_dataset(tmp_path)) == {"pipe.png": "not a plain file", "lost.png": "unreadable"}


def test_pixel_bound_is_checked_before_decoding(monkeypatch):
    def refuse(*_args):
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    for width, height in ((9_000, 9_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(ImageError, match="too many pixels"):
            decode_image(png_claiming(width, height))
    with pytest.raises(ImageError, match="too many pixels: 12 x 12, at most 143"):
        decode_image(encoded(noise()), Limits(max_pixels=143))
    assert image_decoding.image_size(encoded(noise(5, 7))) == (5, 7)
    with pytest.raises(ImageError, match="the picture was decoded"):
        decode_image(encoded(noise()))


def test_every_truncation_of_an_image_is_an_image_error():
    for kind in ("PNG", "JPEG", "WEBP"):
        content = encoded(noise(20, 20), kind)
        for length in range(0, len(content) - 40, 37):
            with pytest.raises(ImageError, match="corrupt or truncated"):
                decode_image(content[:length])


def test_transparency_becomes_white_and_modes_become_rgb():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (10, 20, 30, 255)
    decoded = decode_image(encoded(pixels))
    assert (decoded[:2] == (10, 20, 30)).all() and (decoded[2:] == 255).all()
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert np.array_equal(decode_image(encoded(grey)), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(decode_image(encoded(grey.astype(np.uint16) * 257)), np.repeat(grey[..., None], 3, 2))


def test_photographs_are_turned_upright():
    buffer = io.BytesIO()
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.fromarray(noise(6, 10)).save(buffer, "PNG", exif=orientation)
    assert np.array_equal(decode_image(buffer.getvalue()), np.rot90(noise(6, 10), -1))


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        ("Photographed on 12 May 2014", "boilerplate"),
        ("photo taken on Monday, March 3rd, 2011 at 10:30 am.", "boilerplate"),
        ("uploaded on 2014-05-12", "boilerplate"),
        ("IMG_1234.JPG", "boilerplate"),
        ("a cat photographed on a mat", None),
        ("on marzipan", None),
        ("cat", None),
        ("no", "too short"),
        ("12:30 !!", "too short"),
        ("кот на столе", "not English"),
        ("a café on the corner", None),
        ("on " + "1" * 200_000 + "x", None),
    ],
)
def test_caption_filters(caption, problem):
    found = Filters().caption_problem(caption)
    assert found is None if problem is None else problem in found


def test_aspect_ratio_filter_takes_its_bounds_in():
    filters = Filters()
    assert filters.shape_problem(10, 20) is None and filters.shape_problem(20, 10) is None
    assert filters.shape_problem(10, 21) and filters.shape_problem(21, 10)


def test_filters_apply_to_folders_and_not_to_shards_unless_asked(tmp_path):
    write_pair(tmp_path / "folder", "keep.png", encoded(noise()))
    write_pair(tmp_path / "folder", "drop.png", encoded(noise()), "on 12 May 2014")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        add(tar, "keep.png", encoded(noise()))
        add(tar, "keep.txt", b"a red apple")
        add(tar, "drop.png", encoded(noise()))
        add(tar, "drop.txt", b"on 12 May 2014")
    assert reasons(open_dataset(tmp_path / "folder")) == {"drop.png": "boilerplate caption"}
    assert len(open_dataset(tmp_path / "folder", filters=False)) == 2
    assert len(open_dataset(tmp_path / "shards")) == 2
    assert reasons(open_dataset(tmp_path / "shards", filters=True)) == {"a.tar:drop.png": "boilerplate caption"}


def test_shards_of_others_are_read(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "deep/00001.jpg", encoded(noise(), "JPEG"))
        add(tar, "deep/00001.json", json.dumps({"caption": "from json", "url": "x"}).encode())
        add(tar, "deep/00001.txt", b"from txt")
        add(tar, "00002.json", json.dumps({"text": "json only"}).encode())
        add(tar, "00002.seg.png", encoded(noise()))
        add(tar, "00002.JPEG", encoded(noise(), "JPEG"))
        add(tar, "00002.jpeg", encoded(noise(), "JPEG"))
        add(tar, "00002.txt", b"same key again")
        add(tar, "00003.cls", b"7")
        add(tar, "00004.webp", encoded(noise(), "WEBP"))
        add(tar, "00004.json", b"[1, 2]")
        add(tar, "00005.png", encoded(noise()))
        add(tar, "00005.json", b"{" * 100_000)
    dataset = open_dataset(tmp_path)
    assert dataset.captions == ["from txt", "json only", "same key again"]
    assert dataset[0][2] == {"caption": "from json", "url": "x"}
    assert reasons(dataset) == {"00000.tar:00004.webp": "bad metadata", "00000.tar:00005.png": "bad metadata"}
    assert open_dataset(tmp_path / "00000.tar").fingerprint == dataset.fingerprint


def test_unsafe_members_are_refused_and_nothing_is_written(tmp_path):
    outside = tmp_path / "outside.png"
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w") as tar:
        add(tar, "../outside.png", encoded(noise()))
        add(tar, "../outside.txt", b"climbs out")
        add(tar, str(outside), encoded(noise()))
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "good.png", encoded(noise()))
        add(tar, "good.txt", b"stays in")
    before = sorted(tmp_path.rglob("*"))
    dataset = open_dataset(tmp_path / "set")
    assert dataset.captions == ["stays in"]
    assert sorted(reasons(dataset).values()) == ["not a plain file", "unsafe name", "unsafe name", "unsafe name"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_shard_gives_what_came_before_the_cut(tmp_path):
    samples = [EncodedSample(f"{i}", encoded(noise(seed=i)), "png", {"caption": f"number {i}"}) for i in range(8)]
    write_shards(tmp_path, "train", samples, 8)
    shard = tmp_path / "train-000000.tar"
    content = shard.read_bytes()
    whole = len(open_dataset(tmp_path))
    for length in (700, 2048, 5000, 9000, len(content) // 2):
        shard.write_bytes(content[:length])
        try:
            dataset = open_dataset(tmp_path)
        except UserError as error:
            assert "corrupt or truncated" in str(error)
            continue
        assert 0 < len(dataset) < whole
        assert dataset.captions == [f"number {i}" for i in range(len(dataset))]
        assert "train-000000.tar" in dict(dataset.skipped)
    shard.write_bytes(content[:4096] + b"\xff" * 512 + content[4608:])
    assert "corrupt or truncated" in open_dataset(tmp_path).summary()


def test_splits_of_shards_and_folders(tmp_path):
    for split in ("train", "heldout"):
        write_shards(tmp_path, split, [EncodedSample("k", encoded(noise()), "png", {"caption": f"is {split}"})])
        write_pair(tmp_path / "folder" / split, "k.png", encoded(noise()), f"is {split}")
    for path in (tmp_path, tmp_path / "folder"):
        assert open_dataset(path).captions == ["is train"]
        assert open_dataset(path, "heldout").captions == ["is heldout"]
        with pytest.raises(UserError, match="holds no split 'test'"):
            open_dataset(path, "test")


def test_fingerprint_follows_content_and_not_place(tmp_path):
    for place, seed, caption in (("a", 0, "one fig"), ("b", 0, "one fig"), ("c", 1, "one fig"), ("d", 0, "two figs")):
        write_pair(tmp_path / place, "x.png", encoded(noise(seed=seed)), caption)
    first, same, other_pixels, other_caption = (open_dataset(tmp_path / place).fingerprint for place in "abcd")
    assert first == same and len({first, other_pixels, other_caption}) == 3


def test_unverified_sets_fail_by_name_when_the_image_is_read(tmp_path):
    content = encoded(noise(40, 40))
    write_pair(tmp_path, "cut.png", content[: len(content) // 2])
    dataset = open_dataset(tmp_path, verify=False)
    with pytest.raises(UserError, match=r"cannot read the image cut\.png \(corrupt or truncated"):
        dataset[0]


def test_images_kept_in_memory_are_not_changed_by_their_users(tmp_path):
    write_pair(tmp_path, "x.png", encoded(noise()))
    dataset = open_dataset(tmp_path)
    dataset.image(0)[:] = 0
    assert np.array_equal(dataset.image(-1), noise())


def test_load_arrays_cuts_the_central_square(tmp_path):
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = np.repeat(np.repeat(noise(4, 4), 2, 0), 2, 1)
    write_pair(tmp_path, "a.png", encoded(pixels))
    images, captions, report = load_arrays(tmp_path, image_size=4)
    assert images.dtype == torch.uint8 and images.shape == (1, 3, 4, 4)
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), noise(4, 4))
    assert captions == ["a red apple"] and report == "1 images, none skipped"


def test_images_alone_are_enough_for_stage_1(tmp_path):
    write_pair(tmp_path, "a.png", encoded(noise()), caption=None)
    assert len(open_dataset(tmp_path, captions=False)) == 1
    with pytest.raises(UserError, match=r"no usable captioned image .*1 no caption \(a\.png\)"):
        open_dataset(tmp_path)


def test_the_command_lists_what_is_wrong_where_nothing_is_usable(tmp_path, capsys):
    write_pair(tmp_path, "a.png", encoded(noise()), caption=None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError, match="no usable captioned image"):
        command.run(parser.parse_args(["check", str(tmp_path), "--list"]))
    assert json.loads(capsys.readouterr().out) == {"name": "a.png", "reason": "no caption"}
    with pytest.raises(NothingUsable, match="no usable captioned image") as caught:
        command.run(parser.parse_args(["check", str(tmp_path)]))
    assert capsys.readouterr().out == ""
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes out of another process
    assert str(again) == str(caught.value) and again.skipped == [("a.png", "no caption")]


def test_wrong_paths_and_manifests_are_one_clear_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no data set at"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UserError, match="is not a data set: expected"):
        open_dataset(tmp_path / "file.txt")
    (tmp_path / "bad.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(UserError, match=r"corrupt or truncated \(bad\.tar\)"):
        open_dataset(tmp_path / "bad.tar")
    shards = write_shards(tmp_path, "train", [EncodedSample("k", encoded(noise()), "png", {"caption": "a fig"})])
    write_manifest(tmp_path, {"splits": {"train": {"shards": [*shards, {"file": "train-000001.tar"}]}}})
    with pytest.raises(UserError, match=r"lacks the shard train-000001\.tar"):
        open_dataset(tmp_path)
    for splits in ([], {"train": {}}, {"train": {"shards": [7]}}, {"train": {"shards": [{"file": 7}]}}):
        write_manifest(tmp_path, {"splits": splits})
        with pytest.raises(UserError, match=r"the manifest in .* is damaged"):
            open_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "of another program", "splits": [1]}')
    assert len(open_dataset(tmp_path)) == 1
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a readable manifest"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "dalle-image-text-shards", "format_version": 99}')
    with pytest.raises(UserError, match="format version 99, expected 1"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a readable manifest"):
        open_dataset(tmp_path)
