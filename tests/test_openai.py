"""Reading the public release's pickles: stand-ins of their form load exactly, all else is refused and not run."""

from __future__ import annotations

import functools
import io
import os
import pickle
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

from dalle.cli import main
from dalle.config import DVAEConfig
from dalle.dvae import DVAE
from dalle.errors import UserError
from dalle.openai import load_openai_dvae

CONFIG = DVAEConfig(image_size=256, vocab_size=24, n_hid=8, n_init=12, group_count=3, n_blk_per_group=2)
RELEASE = {
    "dall_e.utils": ("Conv2d",),
    "dall_e.encoder": ("Encoder", "EncoderBlock"),
    "dall_e.decoder": ("Decoder", "DecoderBlock"),
}


@contextmanager
def importable_release() -> Iterator[types.SimpleNamespace]:
    """Modules with the names of the public package's, importable for the time of the context; their classes by name."""
    classes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
        for module_name, names in RELEASE.items():
            module = types.ModuleType(module_name)
            patch.setitem(sys.modules, module_name, module)
            for name in names:
                classes[name] = type(name, (nn.Module,), {"__module__": module_name})
                setattr(module, name, classes[name])
        yield types.SimpleNamespace(**classes)


@pytest.fixture
def release():
    with importable_release() as classes:
        yield classes


def as_release(release, module: nn.Module, kind: str) -> nn.Module:
    """``module``, the encoder or decoder of a DVAE, as the tree of modules and attributes that the release pickles."""

    def convolution(ours) -> nn.Module:
        theirs = release.Conv2d()
        theirs.n_out, theirs.n_in, theirs.kw, _ = ours.w.shape
        theirs.use_float16, theirs.device, theirs.requires_grad_ = True, torch.device("cpu"), False
        theirs.w, theirs.b = nn.Parameter(ours.w.detach().clone()), nn.Parameter(ours.b.detach().clone())
        return theirs

    def block(ours) -> nn.Module:
        theirs = getattr(release, f"{kind}Block")()
        theirs.post_gain = ours.post_gain
        theirs.id_path = convolution(ours.id_path) if hasattr(ours.id_path, "w") else nn.Identity()
        layers = [
            pair
            for j, layer in enumerate(ours.res_path.values(), start=1)
            for pair in ((f"relu_{j}", nn.ReLU()), (f"conv_{j}", convolution(layer)))
        ]
        theirs.res_path = nn.Sequential(OrderedDict(layers))
        return theirs

    root = getattr(release, kind)()
    root.group_count, root.device, root.make_conv = 3, torch.device("cpu"), functools.partial(release.Conv2d)
    blocks = OrderedDict(input=convolution(module.blocks["input"]))
    for name, group in module.blocks.items():
        if name.startswith("group_"):
            resize = nn.MaxPool2d(2) if kind == "Encoder" else nn.Upsample(scale_factor=2, mode="nearest")
            layers = OrderedDict((block_name, block(ours)) for block_name, ours in group.items())
            blocks[name] = nn.Sequential(layers | OrderedDict(resize=resize))
    output = OrderedDict(relu=nn.ReLU(), conv=convolution(module.blocks["output"].conv))
    blocks["output"] = nn.Sequential(output)
    root.blocks = nn.Sequential(blocks)
    return root


def make_dvae(config: DVAEConfig = CONFIG) -> DVAE:
    torch.manual_seed(0)
    dvae = DVAE(config)
    for name, parameter in dvae.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter)
    return dvae


@pytest.fixture(scope="module")
def saved() -> tuple[DVAE, bytes, bytes]:
    dvae = make_dvae()
    contents = []
    with importable_release() as release:
        for kind in ("Encoder", "Decoder"):
            buffer = io.BytesIO()
            torch.save(as_release(release, getattr(dvae, kind.lower()), kind), buffer)
            contents.append(buffer.getvalue())
    return dvae, *contents


@pytest.fixture
def files(saved, tmp_path) -> tuple[DVAE, Path, Path]:
    """A dVAE and its release files ``encoder.pkl`` and ``decoder.pkl``."""
    dvae, *contents = saved
    paths = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return dvae, *paths


def rewrite(path: Path, change) -> None:
    """Write the archive anew with ``change(name, data)`` for every record's data; None drops the record."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            if (changed := change(name.partition("/")[2], data)) is not None:
                archive.writestr(name, changed)


def replace_pickle(path: Path, data: bytes) -> None:
    rewrite(path, lambda name, old: data if name == "data.pkl" else old)


def test_weights_and_outputs_are_the_same(files):
    dvae, encoder, decoder = files
    loaded = load_openai_dvae(encoder, decoder)
    assert loaded.config == CONFIG and not loaded.training
    assert not any(name.startswith("dall_e") for name in sys.modules)
    state = loaded.state_dict()
    assert list(state) == list(dvae.state_dict())
    for name, tensor in dvae.state_dict().items():
        assert torch.equal(state[name], tensor) and state[name].is_contiguous(), name
    images = torch.rand(2, 3, 16, 24)
    assert torch.equal(loaded.encode_logits(images), dvae.encode_logits(images))
    assert torch.equal(loaded.reconstruct(images), dvae.reconstruct(images))


def test_weights_may_be_strided_views_of_a_shared_storage(release, tmp_path):
    dvae = make_dvae()
    encoder = as_release(release, dvae.encoder, "Encoder")
    weight = encoder.blocks.input.w.detach()
    storage = torch.zeros(2, *weight.shape[::-1])
    storage[1] = weight.permute(3, 2, 1, 0)
    encoder.blocks.input.w = nn.Parameter(storage[1].permute(3, 2, 1, 0))
    encoder.blocks.output.conv.b = nn.Parameter(storage[0].flatten()[:24])
    torch.save(encoder, tmp_path / "encoder.pkl")
    torch.save(as_release(release, dvae.decoder, "Decoder"), tmp_path / "decoder.pkl")
    loaded = load_openai_dvae(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl").encoder
    assert torch.equal(loaded.blocks["input"].w, weight)
    assert not loaded.blocks["output"].conv.b.any()


def test_command_writes_a_model_folder(files, tmp_path, capsys):
    from dalle.checkpoint import load_dvae

    dvae, encoder, decoder = files
    assert main(["import-openai", str(encoder), str(decoder), str(tmp_path / "out")]) == 0
    assert "24 codes" in capsys.readouterr().out
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(load_dvae(tmp_path / "out").reconstruct(images), dvae.reconstruct(images))
    encoder.write_bytes(b"not a model")
    assert main(["import-openai", str(encoder), str(decoder), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith("dalle: error: ")
    assert not (tmp_path / "other").exists()
    before = {path: path.read_bytes() for path in encoder.parent.iterdir() if path.is_file()}
    assert main(["import-openai", str(encoder), str(decoder), str(encoder.parent)]) == 2
    assert "which would be lost: choose another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in encoder.parent.iterdir() if path.is_file()} == before


class Call:
    """Pickles as the call ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, arguments, name",
    [
        (os.system, ("touch MARKER",), "system"),
        (eval, ("open('MARKER', 'w')",), "builtins.eval"),
        (exec, ("open('MARKER', 'w')",), "builtins.exec"),
        (getattr, (os, "system"), "builtins.getattr"),
        (open, ("MARKER", "w"), "io.open"),
        (shutil.rmtree, ("MARKER",), "shutil.rmtree"),
        (torch.load, ("MARKER",), "torch.serialization.load"),
        (torch.hub.load, ("MARKER", "model"), "torch.hub.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_forbidden_name_is_refused_and_not_run(files, tmp_path, function, arguments, name, protocol):
    _, encoder, decoder = files
    marker = tmp_path / "marker"
    arguments = tuple(a.replace("MARKER", str(marker)) if isinstance(a, str) else a for a in arguments)
    arguments = tuple("os" if isinstance(a, types.ModuleType) else a for a in arguments)
    replace_pickle(encoder, pickle.dumps(Call(function, *arguments), protocol=protocol))
    with pytest.raises(UserError, match=rf"{name}, which no file of the public dall_e release does: it was refused"):
        load_openai_dvae(encoder, decoder)
    assert not marker.exists()


def test_a_dotted_name_does_not_reach_through_an_allowed_one(files):
    _, encoder, decoder = files
    # Protocol 4 resolves "a.b" by attributes: collections, OrderedDict.fromkeys must not pass as OrderedDict.
    replace_pickle(encoder, b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.")
    with pytest.raises(UserError, match=r"names collections\.OrderedDict\.fromkeys"):
        load_openai_dvae(encoder, decoder)


def test_allowed_names_are_inert(files):
    _, encoder, decoder = files
    # functools.partial is allowed as an attribute of the release's modules; calling one must call nothing.
    for call in (Call(functools.partial, "print", 1), Call(torch.device, "no such device"), Call(set, ["a"])):
        replace_pickle(encoder, pickle.dumps(call, protocol=2))
        with pytest.raises(UserError, match=r"holds a (partial|device|set), expected the Encoder"):
            load_openai_dvae(encoder, decoder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}.",
        b"\x80\x02K\x01.",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # a memo index of 2³¹ - 1, for which a table would take 32 GiB
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",  # a bytearray of 2⁶⁰ bytes
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0fK\x01.",  # a frame of 2⁶⁰ bytes
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"(" * 5_000 + b"l" * 5_000 + b".",
        b"\x80\x02cdall_e.encoder\nEncoder\n)\x81.",  # an encoder without a state
        b"\x80\x02cdall_e.encoder\nEncoder\n)\x81}b.",
        b"\x80\x02cdall_e.encoder\nEncoder\n}b.",  # state set on the class instead of an instance
        b"\x80\x02ccollections\nOrderedDict\nN}U\x05itemsK\x01s\x86b)\x81.",
    ],
    ids=lambda data: data[:24].hex(),
)
def test_a_hostile_pickle_is_one_sentence(files, data):
    _, encoder, decoder = files
    replace_pickle(encoder, data)
    with pytest.raises(UserError, match=r"encoder\.pkl (is damaged|holds a)"):
        load_openai_dvae(encoder, decoder)


def test_a_module_inside_itself_is_refused(release, files):
    dvae, encoder, decoder = files
    module = as_release(release, dvae.encoder, "Encoder")
    module.blocks.again = module.blocks
    torch.save(module, encoder)
    with pytest.raises(UserError, match="is damaged or not a file"):
        load_openai_dvae(encoder, decoder)


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        # The first layer's weight, [8, 3, 7, 7]: its storage's length, its sizes, its strides, its offset.
        (b"M\x98\x04", b"M\x60\xea", "storage 0 of 60000 values in a record of 4704 bytes"),
        (b"(K\x08K\x03K\x07K\x07t", b"(K\x09K\x03K\x07K\x07t", "does not fit its storage"),
        (b"(K\x08K\x03K\x07K\x07t", b"(K\x08K\x00K\x07K\x07t", "does not fit its storage"),
        (b"(K\x08K\x03K\x07K\x07t", b"(K\x04K\x03K\x07K\x07t", r"res_path.conv_1.b as \(2,\) where \(1,\) is expected"),
        (b"(K\x93K1K\x07K\x01t", b"(K\xffK1K\x07K\x01t", "reaches beyond its storage"),
        (b"(K\x93K1K\x07K\x01t", b"(J\xff\xff\xff\xffK1K\x07K\x01t", "impossible sizes"),
        (b"QK\x00(K\x08K\x03", b"QK\x01(K\x08K\x03", "reaches beyond its storage"),
        (b"QK\x00(K\x08K\x03", b"QJ\xff\xff\xff\xff(K\x08K\x03", "impossible sizes"),
    ],
)
def test_tensors_that_claim_more_than_the_file_holds_are_refused(files, old, new, sentence):
    _, encoder, decoder = files

    def change(name: str, data: bytes) -> bytes:
        if name != "data.pkl":
            return data
        assert old in data
        return data.replace(old, new, 1)

    rewrite(encoder, change)
    with pytest.raises(UserError, match=sentence):
        load_openai_dvae(encoder, decoder)


def test_the_two_files_in_the_wrong_order(files):
    _, encoder, decoder = files
    with pytest.raises(UserError, match="holds a Decoder, expected the Encoder"):
        load_openai_dvae(decoder, encoder)


def test_files_of_different_models_do_not_fit(release, files, tmp_path):
    _, encoder, _ = files
    other = make_dvae(DVAEConfig(image_size=256, vocab_size=30, n_hid=8, n_init=12, group_count=3, n_blk_per_group=2))
    torch.save(as_release(release, other.decoder, "Decoder"), tmp_path / "other.pkl")
    with pytest.raises(UserError, match=r"other.pkl .* blocks.input.w as \(12, 30, 1, 1\) where \(12, 24, 1, 1\)"):
        load_openai_dvae(encoder, tmp_path / "other.pkl")


@pytest.mark.parametrize("change", ["missing", "extra", "buffer", "half", "nan"])
def test_modules_that_differ_from_the_release_are_refused(release, files, change):
    dvae, encoder, decoder = files
    module = as_release(release, dvae.encoder, "Encoder")
    if change == "missing":
        del module.blocks.group_2.block_1.id_path
        sentence = "group_2.block_1.id_path.b as absent where"
    elif change == "extra":
        module.blocks.group_1.block_1.id_path = as_release(release, dvae.encoder, "Encoder").blocks.input
        sentence = r"group_1.block_1.id_path.b as \(8,\) where nothing is expected"
    elif change == "buffer":
        module.blocks.register_buffer("mean", torch.zeros(3))
        sentence = "buffers in blocks"
    elif change == "half":
        module.half()
        sentence = "names torch.HalfStorage"
    else:
        module.blocks.input.b.data[0] = float("nan")
        sentence = "weights that are not finite"
    torch.save(module, encoder)
    with pytest.raises(UserError, match=sentence):
        load_openai_dvae(encoder, decoder)


def test_files_that_are_no_archive_of_torch_save(files, tmp_path):
    _, encoder, decoder = files
    whole = encoder.read_bytes()
    for share in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        encoder.write_bytes(whole[:share])
        with pytest.raises(UserError, match="truncated or not a file of the public dall_e release"):
            load_openai_dvae(encoder, decoder)
    with pytest.raises(UserError, match=r"cannot read .*absent\.pkl: No such file"):
        load_openai_dvae(tmp_path / "absent.pkl", decoder)
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        load_openai_dvae(tmp_path, decoder)
    with zipfile.ZipFile(encoder, "w") as archive:
        archive.writestr("photo.png", b"")
    with pytest.raises(UserError, match=r"holds no data\.pkl"):
        load_openai_dvae(encoder, decoder)


def test_the_legacy_format_is_named(files):
    _, encoder, decoder = files
    torch.save(torch.zeros(3), encoder, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before version 1\.6"):
        load_openai_dvae(encoder, decoder)


def test_damaged_records_are_refused(files):
    _, encoder, decoder = files
    whole = encoder.read_bytes()
    with zipfile.ZipFile(encoder) as archive:
        record = archive.getinfo("archive/data/0")
        first = whole.index(archive.read(record))
    encoder.write_bytes(whole[:first] + b"\xff" + whole[first + 1 :])  # the checksum no longer holds
    with pytest.raises(UserError, match="no intact record data/0"):
        load_openai_dvae(encoder, decoder)
    encoder.write_bytes(whole)
    rewrite(encoder, lambda name, data: None if name == "data/0" else data)
    with pytest.raises(UserError, match="storage 0 of 1176 values in a record of None bytes"):
        load_openai_dvae(encoder, decoder)
    encoder.write_bytes(whole)
    rewrite(encoder, lambda name, data: b"big" if name == "byteorder" else data)
    with pytest.raises(UserError, match="big-endian"):
        load_openai_dvae(encoder, decoder)


def test_archives_that_would_unpack_to_more_than_they_are_get_refused(files):
    _, encoder, decoder = files
    whole = encoder.read_bytes()
    with zipfile.ZipFile(encoder) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(encoder, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records:
            archive.writestr(name, data)
    with pytest.raises(UserError, match="compressed records"):
        load_openai_dvae(encoder, decoder)

    encoder.write_bytes(whole)
    replace_pickle(encoder, b"\x80\x02K\x01." + b"\0" * (4 * 2**20))
    with pytest.raises(UserError, match=r"data\.pkl of 4194309 bytes where at most 4194304 belong"):
        load_openai_dvae(encoder, decoder)

    with zipfile.ZipFile(encoder, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02K\x01.")
    content = bytearray(encoder.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (10**9).to_bytes(4, "little") * 2  # both sizes in the central directory
    encoder.write_bytes(content)
    with pytest.raises(UserError, match="claims records of 1000000000 bytes in a file of"):
        load_openai_dvae(encoder, decoder)


def test_changed_bytes_anywhere_give_a_user_error_or_a_model(files):
    _, encoder, decoder = files
    whole = encoder.read_bytes()
    with zipfile.ZipFile(encoder) as archive:
        pickled = archive.read("archive/data.pkl")
    directory = whole.index(b"PK\x01\x02")
    random = Random(0)
    for trial in range(90):
        encoder.write_bytes(whole)
        if trial % 3:
            changed = bytearray(whole)
            changed[random.randrange(directory if trial % 3 == 1 else 0, len(whole))] = random.randrange(256)
            encoder.write_bytes(changed)
        else:
            changed = bytearray(pickled)
            changed[random.randrange(len(pickled))] = random.randrange(256)
            replace_pickle(encoder, bytes(changed))
        try:
            load_openai_dvae(encoder, decoder)
        except UserError as error:
            assert "\n" not in str(error) and str(error).isprintable()


def test_names_from_the_file_are_printed_without_control_characters(files):
    _, encoder, decoder = files
    replace_pickle(encoder, b"\x80\x02cos\n\x1b[2J" + b"x" * 10_000 + b"\n.")
    with pytest.raises(UserError) as caught:
        load_openai_dvae(encoder, decoder)
    assert str(caught.value).isprintable() and r"os.\x1b[2Jxx" in str(caught.value)
    assert len(str(caught.value)) < 1000
