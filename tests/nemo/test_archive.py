"""Broken and hostile `.nemo` files: each is refused with a reason, leaves no file behind and runs nothing."""

import contextlib
import gzip
import io
import os
import tarfile
import tempfile
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
import yaml
from conftest import TESTS
from nemo_files import setter

from transformers_parakeet import NemoError, export_nemo, load_nemo
from transformers_parakeet.nemo.archive import Archive, write_archive

GOLDEN = TESTS / "golden"
ORIGINAL = (GOLDEN / "tdt" / "model.nemo").read_bytes()


def members(content=ORIGINAL):
    """The plain files of an archive by name."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar.getmembers() if info.isfile()}


def packed(files, extra=()):
    """A tar of files, then of entries that are no plain files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, value in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
        for name, kind, link in extra:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    return buffer.getvalue()


def without(name, **added):
    """The archive without the members that end so."""
    return {key: value for key, value in members().items() if not key.endswith(name)}


def with_settings(change):
    """The archive with its settings changed in place."""
    files = members()
    tree = yaml.safe_load(files["./model_config.yaml"])
    change(tree)
    return packed({**files, "./model_config.yaml": yaml.safe_dump(tree, allow_unicode=True).encode()})


def with_yaml(text):
    """The archive with other settings altogether."""
    return packed({**members(), "./model_config.yaml": text.encode()})


def saved(value):
    """What torch writes of an object."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_weights(change):
    """The archive with its weights changed in place."""
    state = torch.load(io.BytesIO(members()["./model_weights.ckpt"]), weights_only=True)
    changed = change(state)
    return with_checkpoint(saved(state if changed is None else changed))


def with_checkpoint(content):
    """The archive with another file of weights."""
    return packed({**members(), "./model_weights.ckpt": content})


class Trap:
    """Creates a file in the working directory when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("sprung",))


class LocalTrap:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch sprung",))


def rezipped(change=None, compression=zipfile.ZIP_STORED):
    """The file of weights, zipped anew with every record passed through `change(name, content)`."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(members()["./model_weights.ckpt"])) as source,
        zipfile.ZipFile(buffer, "w", compression) as target,
    ):
        for name in source.namelist():
            content = source.read(name)
            content = change(name, content) if change else content
            if content is not None:
                target.writestr(name, content)
    return buffer.getvalue()


def header_with_size(size):
    """The archive, the first plain member of which claims another size."""
    content = bytearray(ORIGINAL)
    with tarfile.open(fileobj=io.BytesIO(ORIGINAL)) as tar:
        first = next(info for info in tar if info.isfile())
    first.size = size
    content[first.offset : first.offset + 512] = first.tobuf(tarfile.GNU_FORMAT)[:512]
    return bytes(content)


def filled(key, value):
    """A change that fills one weight."""
    return lambda state: {**state, key: torch.full_like(state[key], value)}


NORM = "encoder.layers.0.norm_out.weight"
JOINT, JOINT_BIAS = "joint.joint_net.2.weight", "joint.joint_net.2.bias"
OTHER_TOKENIZER = (GOLDEN.parent / "data" / "parakeet-tdt-0.6b-v3.model").read_bytes()
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
GROWTH = "x0: " + "y" * 1000 + "\n" + "".join(f"x{i + 1}: '${{x{i}}}${{x{i}}}'\n" for i in range(60))

HOSTILE = {
    "an empty file": (lambda: b"", "readable"),
    "text": (lambda: b"not a tar" * 1000, "readable"),
    "a gzip header alone": (lambda: b"\x1f\x8b\x08\x00", "readable"),
    "a gzip file that is cut off": (lambda: gzip.compress(ORIGINAL, 1)[: len(ORIGINAL) // 2], "readable"),
    "gzip of something else": (lambda: gzip.compress(b"no tar" * 1000, 1), "readable"),
    "a gzip bomb": (lambda: gzip.compress(bytes(64 << 20)), "unpacks to more than 20 times"),
    "a zip": (lambda: members()["./model_weights.ckpt"], "readable"),
    "cut off in the first header": (lambda: ORIGINAL[:300], "readable"),
    "cut off in the settings": (lambda: ORIGINAL[:3000], "readable|cut off"),
    "cut off in the weights": (lambda: ORIGINAL[: len(ORIGINAL) * 2 // 3], "cut off.*copy or download"),
    "cut off before the last block": (lambda: ORIGINAL[: ORIGINAL.rindex(b"PK\x05\x06")], "cut off"),
    "a member larger than the archive": (lambda: header_with_size(1 << 40), r"claims 1099511627776 bytes"),
    "a member of negative size": (lambda: header_with_size(-512), "cut off|readable|members"),
    "too many members": (lambda: packed({f"f{i}": b"" for i in range(1500)}), "more than 1000 members"),
    "no members": (lambda: packed({}), "has no member 'model_config.yaml'"),
    "no settings": (lambda: packed(without("config.yaml")), "has no member 'model_config.yaml'"),
    "no weights": (lambda: packed(without(".ckpt")), "has no member 'model_weights.ckpt'"),
    "no tokenizer": (lambda: packed(without("tokenizer.model")), "has no member '.*tokenizer.model'"),
    "two weights": (
        lambda: packed([*members().items(), ("model_weights.ckpt", b"other")]),
        "two members named 'model_weights.ckpt'",
    ),
    "weights behind a symbolic link": (
        lambda: packed(without(".ckpt"), [("./model_weights.ckpt", tarfile.SYMTYPE, "/etc/passwd")]),
        "model_weights.ckpt' is not read, because it is a link",
    ),
    "settings behind a hard link": (
        lambda: packed(without("config.yaml"), [("model_config.yaml", tarfile.LNKTYPE, "../config.yaml")]),
        "model_config.yaml' is not read, because it is a link",
    ),
    "weights from a device": (
        lambda: packed(without(".ckpt"), [("./model_weights.ckpt", tarfile.CHRTYPE, "")]),
        "model_weights.ckpt' is not read, because it is a link, a device",
    ),
    "a tokenizer outside": (
        lambda: with_settings(setter("tokenizer.model_path", "/etc/passwd")),
        "has no member '/etc/passwd'",
    ),
    "a tokenizer above": (
        lambda: packed({**members(with_settings(setter("tokenizer.model_path", "../up"))), "../up": b"x"}),
        "'../up' is not read, because its name leads out",
    ),
    "a pickled call": (lambda: with_weights(lambda state: {**state, NORM: Trap()}), "holds no weights"),
    "a pickled command": (lambda: with_checkpoint(saved(LocalTrap())), "holds no weights"),
    "a pickled call, not zipped": (
        lambda: with_checkpoint(__import__("pickle").dumps(Trap())),
        "holds no weights",
    ),
    "weights that are a list": (lambda: with_checkpoint(saved([torch.ones(2)])), "must hold tensors by name.*list"),
    "a weight that is a number": (lambda: with_weights(lambda s: {**s, NORM: 3}), "is int: expected only dense"),
    "a sparse weight": (
        lambda: with_weights(lambda s: {**s, NORM: torch.ones(48).to_sparse()}),
        "norm_out|holds no weights",
    ),
    "quantised weights": (
        lambda: with_weights(lambda s: {**s, NORM: torch.ones(48, dtype=torch.int8)}),
        r"'encoder.layers.0.norm_out.weight' is torch.int8: quantised weights",
    ),
    "compressed records": (
        lambda: with_checkpoint(rezipped(compression=zipfile.ZIP_DEFLATED)),
        "compressed, torch writes it plain",
    ),
    "big-endian records": (
        lambda: with_checkpoint(rezipped(lambda name, data: b"big" if name.endswith("byteorder") else data)),
        "big-endian",
    ),
    "a record that is too short": (
        lambda: with_checkpoint(rezipped(lambda name, data: data[:8] if name.endswith("data/9") else data)),
        "does not lie in the file",
    ),
    "a record that is missing": (
        lambda: with_checkpoint(rezipped(lambda name, data: None if name.endswith("data/9") else data)),
        "holds no weights|does not lie",
    ),
    "a directory of the zip that is damaged": (
        lambda: with_checkpoint(members()["./model_weights.ckpt"][:-200] + bytes(200)),
        "holds no weights",
    ),
    "NaN weights": (lambda: with_weights(filled(NORM, float("nan"))), "holds NaN or infinity.*damaged"),
    "infinite weights": (
        lambda: with_weights(filled(JOINT, float("-inf"))),
        "'joint.head.weight' holds NaN or infinity",
    ),
    "a wrong shape": (
        lambda: with_weights(lambda s: s.update({NORM: torch.ones(49)})),
        r"norm_out.weight: \[49\], not \[48\]",
    ),
    "an unknown weight": (lambda: with_weights(lambda s: s.update(extra=torch.ones(1))), "'extra' belongs to nothing"),
    "an adapter": (
        lambda: with_weights(lambda s: s.update({"encoder.layers.0.adapter_layer.a.weight": torch.ones(1)})),
        "adapter_layer.*merge or remove",
    ),
    "a missing weight": (
        lambda: with_weights(lambda s: {k: v for k, v in s.items() if k != JOINT}),
        "missing.*joint.head",
    ),
    "a head that disagrees with the vocabulary": (
        lambda: with_weights(lambda s: s.update({JOINT: torch.ones(100, 32), JOINT_BIAS: torch.ones(100)})),
        r"joint.head.*\[100.*not \[134",
    ),
    "a count that disagrees with the tokenizer": (
        lambda: with_settings(setter("joint.num_classes", 127)),
        "joint.num_classes` is 127, but the tokenizer has 128 pieces",
    ),
    "a vocabulary that disagrees with the tokenizer": (
        lambda: with_settings(setter("joint.vocabulary", ["a", "b"])),
        "joint.vocabulary` has 2 entries, but the tokenizer 128 pieces",
    ),
    "a tokenizer of another model": (
        lambda: packed({name: OTHER_TOKENIZER if "tokenizer.model" in name else v for name, v in members().items()}),
        "but the tokenizer has 8192 pieces",
    ),
    "a tokenizer without pieces": (
        lambda: packed({name: b"" if "tokenizer.model" in name else value for name, value in members().items()}),
        "it has no pieces",
    ),
    "an unknown setting": (lambda: with_settings(setter("encoder.hyper", 4)), "`encoder.hyper` is 4"),
    "a number of layers that weights lack": (
        lambda: with_settings(setter("encoder.n_layers", 10**9)),
        "n_layers` is 1000000000, but the weights have 2",
    ),
    "a width that weights lack": (
        lambda: with_settings(setter("encoder.d_model", 10**9)), "d_model` is 1000000000, but the weights have 48"
    ),
    "a factor of the feed-forward without end": (
        lambda: with_settings(setter("encoder.ff_expansion_factor", 10**17)), "too large for any model"
    ),
    "a subsampling without end": (lambda: with_settings(setter("encoder.subsampling_factor", 2**62)), "do not fit"),
    "a transform without end": (lambda: with_settings(setter("preprocessor.n_fft", 10**12)), "n_fft` is 1000000000000"),
    "mel bins without end": (lambda: with_settings(setter("preprocessor.features", 10**9)), "features` is 1000000000"),
    "a setting of the wrong type": (
        lambda: with_settings(setter("encoder.d_model", "wide")), "is 'wide', but the weights have 48"
    ),
    "a section of the wrong type": (lambda: with_settings(setter("encoder", ["d_model"])), "no section `encoder`"),
    "a missing setting": (
        lambda: with_settings(lambda tree: tree["tokenizer"].pop("model_path")),
        "lacks the setting 'model_path'",
    ),
    "settings that are no YAML": (lambda: with_yaml("a: [1, 2"), "is no YAML"),
    "settings with an object": (lambda: with_yaml("a: !!python/object/apply:os.mkdir ['sprung']"), "is no YAML"),
    "settings that are a list": (lambda: with_yaml("[1, 2]"), "it holds list"),
    "settings that nest without end": (lambda: with_yaml("[" * 20000), "is no YAML"),
    "aliases that multiply": (lambda: with_yaml(BOMB), "too large or too deep"),
    "interpolations that multiply": (lambda: with_yaml(GROWTH), "too long|too large"),
    "interpolations in a circle": (lambda: with_settings(setter("name", "${name}")), "refers to itself"),
    "an interpolation out of the file": (
        lambda: with_settings(setter("encoder.d_model", "${oc.env:HOME}")),
        "encoder.d_model` is '.*oc.env:HOME.*', an interpolation that leads out",
    ),
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder that is the working directory and the place of temporary files."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused(name, workplace, tmp_path):
    make, reason = HOSTILE[name]
    path = tmp_path / "hostile.nemo"
    path.write_bytes(make())
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NemoError, match=f"(?s){reason}") as raised:
            load_nemo(path)
    assert "hostile.nemo" in str(raised.value)
    assert list(workplace.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [path, workplace]
    assert path.read_bytes() == before


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 25
    assert members().keys() == members(packed(members())).keys()


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_are_refused_or_harmless(seed, workplace, tmp_path):
    content = bytearray(ORIGINAL)
    generator = torch.Generator().manual_seed(seed)
    starts = [ORIGINAL.index(b"tokenizer:"), ORIGINAL.index(b"PK\x03\x04"), ORIGINAL.index(b"PK\x01\x02"), 0]
    start = starts[seed % len(starts)]
    for _ in range(8):
        place = start + int(torch.randint(0, 2500, (1,), generator=generator))
        content[place] = int(torch.randint(0, 256, (1,), generator=generator))
    path = tmp_path / "damaged.nemo"
    path.write_bytes(content)
    model = None
    with contextlib.suppress(NemoError):
        model, _ = load_nemo(path)
    assert model is None or all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert list(workplace.iterdir()) == []


def test_optional_files_may_be_absent(tmp_path):
    path = tmp_path / "small.nemo"
    needed = ("model_config.yaml", "model_weights.ckpt", "tokenizer.model")
    path.write_bytes(packed({name: content for name, content in members().items() if name.endswith(needed)}))
    model, processor = load_nemo(path)
    assert model.config.vocab_size == len(processor.tokenizer) == 129
    export_nemo(model, processor, tmp_path / "full.nemo")
    assert members((tmp_path / "full.nemo").read_bytes()).keys() == members().keys()


def test_links_and_odd_names_beside_a_good_archive_are_ignored(workplace, tmp_path):
    path = tmp_path / "odd.nemo"
    extra = [("link", tarfile.SYMTYPE, "/etc/passwd"), ("pipe", tarfile.FIFOTYPE, ""), ("/dev/x", tarfile.BLKTYPE, "")]
    path.write_bytes(packed({**members(), "/tmp/absolute": b"x", "a/../../up": b"x"}, extra))
    model, _ = load_nemo(path)
    assert model.config.vocab_size == 129
    assert list(workplace.iterdir()) == []


def test_weights_are_views_of_the_file_and_change_only_in_memory(tmp_path):
    path = tmp_path / "model.nemo"
    path.write_bytes(ORIGINAL)
    archive = Archive(path)
    weights = archive.weights()
    base = torch.frombuffer(archive.view, dtype=torch.uint8).data_ptr()
    assert all(base <= weight.data_ptr() < base + len(ORIGINAL) for weight in weights.values())
    truth = torch.load(io.BytesIO(members()["./model_weights.ckpt"]), weights_only=True)
    assert list(weights) == list(truth)
    for key, value in truth.items():
        archive.release(weights[key])
        assert torch.equal(weights[key], value)
        weights[key].zero_()
    assert path.read_bytes() == ORIGINAL


def test_weights_that_share_a_storage_are_separate_afterwards(tmp_path):
    path = tmp_path / "tied.nemo"

    def tie(state):
        state["encoder.layers.1.self_attn.pos_bias_u"] = state["encoder.layers.0.self_attn.pos_bias_u"]

    path.write_bytes(with_weights(tie))
    model, _ = load_nemo(path)
    first, second = (layer.self_attn.bias_u for layer in model.encoder.layers)
    assert torch.equal(first, second)
    with torch.no_grad():
        first += 1
    assert not torch.equal(first, second)


@pytest.mark.parametrize("form", ["old format", "transposed", "ordered", "parameters"])
def test_forms_of_checkpoints(form, tmp_path):
    state = torch.load(io.BytesIO(members()["./model_weights.ckpt"]), weights_only=True)
    truth = {key: value.clone() for key, value in state.items()}
    buffer = io.BytesIO()
    if form == "old format":
        torch.save(state, buffer, _use_new_zipfile_serialization=False)
    elif form == "transposed":
        torch.save({k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in state.items()}, buffer)
    elif form == "parameters":
        torch.save({k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}, buffer)
    else:
        torch.save(OrderedDict(state), buffer)
    path = tmp_path / "form.nemo"
    path.write_bytes(with_checkpoint(buffer.getvalue()))
    weights = Archive(path).weights()
    assert all(torch.equal(weights[key], value) for key, value in truth.items())
    assert load_nemo(path)[0].config.vocab_size == 129


def test_a_torch_that_does_not_say_where_weights_lie_copies_them(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_parakeet.nemo.archive.offset_of", lambda fake: None)
    path = tmp_path / "model.nemo"
    path.write_bytes(ORIGINAL)
    with pytest.warns(UserWarning, match=r"copied, not mapped: torch before 2\.7"):
        weights = Archive(path).weights()
    truth = torch.load(io.BytesIO(members()["./model_weights.ckpt"]), weights_only=True)
    assert all(torch.equal(weights[key], value) for key, value in truth.items())


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.nemo"
    path.write_bytes(b"old")
    with pytest.raises(Exception, match=r"pickle|lambda"):
        write_archive(path, {"a": b"1"}, {"weight": lambda: None})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_a_tar_that_others_read(tmp_path):
    path = tmp_path / "model.nemo"
    weights = {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    write_archive(path, {"model_config.yaml": b"x: 1\n"}, weights)
    with tarfile.open(path, "r:") as tar:
        assert tar.getnames() == ["./model_config.yaml", "./model_weights.ckpt"]
        read = torch.load(io.BytesIO(tar.extractfile("./model_weights.ckpt").read()), weights_only=True)
    assert all(torch.equal(read[key], value) for key, value in weights.items())
