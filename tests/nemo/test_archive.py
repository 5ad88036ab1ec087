"""Damaged and malicious `.nemo` files: each is refused with a reason, leaves no file behind and runs no code."""

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
from nemo_files import set_setting

from transformers_parakeet import NemoError, export_nemo, load_nemo
from transformers_parakeet.nemo.archive import Archive, write_archive

GOLDEN = TESTS / "golden"
ORIGINAL = (GOLDEN / "tdt" / "model.nemo").read_bytes()


def members(content=ORIGINAL):
    """Return the regular files of an archive by name."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar.getmembers() if info.isfile()}


def pack(files, special_members=()):
    """Return a tar archive of files, followed by members that are not regular files: (name, tar type, link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, value in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
        for name, kind, link in special_members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    return buffer.getvalue()


def members_without(suffix):
    """Return the regular files of the archive except those whose name ends in `suffix`."""
    return {key: value for key, value in members().items() if not key.endswith(suffix)}


def with_settings(change):
    """Return the archive after `change(settings)`, which changes the settings in place."""
    files = members()
    tree = yaml.safe_load(files["./model_config.yaml"])
    change(tree)
    return pack({**files, "./model_config.yaml": yaml.safe_dump(tree, allow_unicode=True).encode()})


def with_yaml(text):
    """Return the archive with another text as its settings."""
    return pack({**members(), "./model_config.yaml": text.encode()})


def torch_bytes(value):
    """Return the bytes that `torch.save` writes for an object."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_weights(change):
    """Return the archive after `change(state_dict)`, which changes the weights in place or returns others."""
    state_dict = torch.load(io.BytesIO(members()["./model_weights.ckpt"]), weights_only=True)
    new_state_dict = change(state_dict)
    return with_checkpoint(torch_bytes(state_dict if new_state_dict is None else new_state_dict))


def with_checkpoint(content):
    """Return the archive with another file of weights."""
    return pack({**members(), "./model_weights.ckpt": content})


class Trap:
    """Creates a file in the working directory when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("sprung",))


class LocalTrap:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch sprung",))


def rezipped(change=None, compression=zipfile.ZIP_STORED):
    """Return the file of weights with every record replaced by `change(name, content)`; None removes the record."""
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
    """Return the archive with another size in the tar header of its first regular file."""
    content = bytearray(ORIGINAL)
    with tarfile.open(fileobj=io.BytesIO(ORIGINAL)) as tar:
        first = next(info for info in tar if info.isfile())
    first.size = size
    content[first.offset : first.offset + 512] = first.tobuf(tarfile.GNU_FORMAT)[:512]
    return bytes(content)


def fill(key, value):
    """Return a function that fills one weight of a state dict with a value."""
    return lambda state_dict: {**state_dict, key: torch.full_like(state_dict[key], value)}


NORM = "encoder.layers.0.norm_out.weight"
JOINT, JOINT_BIAS = "joint.joint_net.2.weight", "joint.joint_net.2.bias"
OTHER_TOKENIZER = (GOLDEN.parent / "data" / "parakeet-tdt-0.6b-v3.model").read_bytes()
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
GROWTH = "x0: " + "y" * 1000 + "\n" + "".join(f"x{i + 1}: '${{x{i}}}${{x{i}}}'\n" for i in range(60))

# description -> (function that makes the archive, pattern of the error message)
INVALID = {
    "an empty file": (lambda: b"", "readable"),
    "text": (lambda: b"not a tar" * 1000, "readable"),
    "only a gzip header": (lambda: b"\x1f\x8b\x08\x00", "readable"),
    "a truncated gzip file": (lambda: gzip.compress(ORIGINAL, 1)[: len(ORIGINAL) // 2], "readable"),
    "a gzip file of something else": (lambda: gzip.compress(b"no tar" * 1000, 1), "readable"),
    "a gzip bomb": (lambda: gzip.compress(bytes(64 << 20)), "more than 20 times larger when decompressed"),
    "a zip file": (lambda: members()["./model_weights.ckpt"], "readable"),
    "truncated in the first header": (lambda: ORIGINAL[:300], "readable"),
    "truncated in the settings": (lambda: ORIGINAL[:3000], "readable|truncated"),
    "truncated in the weights": (lambda: ORIGINAL[: len(ORIGINAL) * 2 // 3], "truncated.*copy or download"),
    "truncated before the last block": (lambda: ORIGINAL[: ORIGINAL.rindex(b"PK\x05\x06")], "truncated"),
    "a member larger than the archive": (lambda: header_with_size(1 << 40), r"should have 1099511627776 bytes"),
    "a member of negative size": (lambda: header_with_size(-512), "truncated|readable|members"),
    "more than a thousand members": (lambda: pack({f"f{i}": b"" for i in range(1500)}), "more than 1000 members"),
    "no members": (lambda: pack({}), "has no member 'model_config.yaml'"),
    "no settings": (lambda: pack(members_without("config.yaml")), "has no member 'model_config.yaml'"),
    "no weights": (lambda: pack(members_without(".ckpt")), "has no member 'model_weights.ckpt'"),
    "no tokenizer": (lambda: pack(members_without("tokenizer.model")), "has no member '.*tokenizer.model'"),
    "two files of weights": (
        lambda: pack([*members().items(), ("model_weights.ckpt", b"other")]),
        "two members named 'model_weights.ckpt'",
    ),
    "weights behind a symbolic link": (
        lambda: pack(members_without(".ckpt"), [("./model_weights.ckpt", tarfile.SYMTYPE, "/etc/passwd")]),
        "model_weights.ckpt' is not read, because it is a link",
    ),
    "settings behind a hard link": (
        lambda: pack(members_without("config.yaml"), [("model_config.yaml", tarfile.LNKTYPE, "../config.yaml")]),
        "model_config.yaml' is not read, because it is a link",
    ),
    "weights from a device": (
        lambda: pack(members_without(".ckpt"), [("./model_weights.ckpt", tarfile.CHRTYPE, "")]),
        "model_weights.ckpt' is not read, because it is a link, a device",
    ),
    "a tokenizer outside the archive": (
        lambda: with_settings(set_setting("tokenizer.model_path", "/etc/passwd")),
        "has no member '/etc/passwd'",
    ),
    "a tokenizer in the parent folder": (
        lambda: pack({**members(with_settings(set_setting("tokenizer.model_path", "../up"))), "../up": b"x"}),
        "'../up' is not read, because its name points outside",
    ),
    "a pickled call": (lambda: with_weights(lambda state: {**state, NORM: Trap()}), "cannot be read as weights"),
    "a pickled command": (lambda: with_checkpoint(torch_bytes(LocalTrap())), "cannot be read as weights"),
    "a pickled call without a zip file": (
        lambda: with_checkpoint(__import__("pickle").dumps(Trap())),
        "cannot be read as weights",
    ),
    "weights that are a list": (
        lambda: with_checkpoint(torch_bytes([torch.ones(2)])), "must be a dict of tensors by name.*list"
    ),
    "a weight that is a number": (lambda: with_weights(lambda s: {**s, NORM: 3}), "must be a dense tensor, got int"),
    "a sparse weight": (
        lambda: with_weights(lambda s: {**s, NORM: torch.ones(48).to_sparse()}),
        "norm_out|cannot be read as weights",
    ),
    "quantised weights": (
        lambda: with_weights(lambda s: {**s, NORM: torch.ones(48, dtype=torch.int8)}),
        r"'encoder.layers.0.norm_out.weight' is torch.int8: quantised weights",
    ),
    "compressed records": (
        lambda: with_checkpoint(rezipped(compression=zipfile.ZIP_DEFLATED)),
        "compressed, but torch writes uncompressed records",
    ),
    "big-endian records": (
        lambda: with_checkpoint(rezipped(lambda name, data: b"big" if name.endswith("byteorder") else data)),
        "big-endian",
    ),
    "a record that is too short": (
        lambda: with_checkpoint(rezipped(lambda name, data: data[:8] if name.endswith("data/9") else data)),
        "larger than its record",
    ),
    "a record that is missing": (
        lambda: with_checkpoint(rezipped(lambda name, data: None if name.endswith("data/9") else data)),
        "cannot be read as weights|larger than its record",
    ),
    "a damaged zip directory": (
        lambda: with_checkpoint(members()["./model_weights.ckpt"][:-200] + bytes(200)),
        "cannot be read as weights",
    ),
    "NaN weights": (lambda: with_weights(fill(NORM, float("nan"))), "contains NaN or infinity.*damaged"),
    "infinite weights": (
        lambda: with_weights(fill(JOINT, float("-inf"))),
        "'joint.head.weight' contains NaN or infinity",
    ),
    "a wrong shape": (
        lambda: with_weights(lambda s: s.update({NORM: torch.ones(49)})),
        r"norm_out.weight has shape \[49\] instead of \[48\]",
    ),
    "an unknown weight": (
        lambda: with_weights(lambda s: s.update(extra=torch.ones(1))),
        "'extra' is not part of a supported model",
    ),
    "an adapter": (
        lambda: with_weights(lambda s: s.update({"encoder.layers.0.adapter_layer.a.weight": torch.ones(1)})),
        "adapter_layer.*merge or remove",
    ),
    "a missing weight": (
        lambda: with_weights(lambda s: {k: v for k, v in s.items() if k != JOINT}),
        "missing.*joint.head",
    ),
    "a head of another vocabulary": (
        lambda: with_weights(lambda s: s.update({JOINT: torch.ones(100, 32), JOINT_BIAS: torch.ones(100)})),
        r"joint.head.*\[100.*instead of \[134",
    ),
    "a number of pieces that differs from the tokenizer": (
        lambda: with_settings(set_setting("joint.num_classes", 127)),
        "joint.num_classes` is 127, but the tokenizer has 128 pieces",
    ),
    "a vocabulary that differs from the tokenizer": (
        lambda: with_settings(set_setting("joint.vocabulary", ["a", "b"])),
        "joint.vocabulary` has 2 entries, but the tokenizer has 128 pieces",
    ),
    "a tokenizer of another model": (
        lambda: pack({name: OTHER_TOKENIZER if "tokenizer.model" in name else v for name, v in members().items()}),
        "but the tokenizer has 8192 pieces",
    ),
    "a tokenizer without pieces": (
        lambda: pack({name: b"" if "tokenizer.model" in name else value for name, value in members().items()}),
        "it has no pieces",
    ),
    "an unknown setting": (
        lambda: with_settings(set_setting("encoder.hyper", 4)),
        "`encoder.hyper` is not a known setting, and its value 4",
    ),
    "more layers than there are weights": (
        lambda: with_settings(set_setting("encoder.n_layers", 10**9)),
        "n_layers` is 1000000000, but the weights have 2",
    ),
    "a width larger than the weights": (
        lambda: with_settings(set_setting("encoder.d_model", 10**9)), "d_model` is 1000000000, but the weights have 48"
    ),
    "a huge feed-forward factor": (
        lambda: with_settings(set_setting("encoder.ff_expansion_factor", 10**17)), "is too large"
    ),
    "a huge subsampling factor": (
        lambda: with_settings(set_setting("encoder.subsampling_factor", 2**62)), "do not match"
    ),
    "a huge Fourier transform": (
        lambda: with_settings(set_setting("preprocessor.n_fft", 10**12)), "n_fft` must be .* got 1000000000000"
    ),
    "a huge number of mel bins": (
        lambda: with_settings(set_setting("preprocessor.features", 10**9)), "features` must equal .* got 1000000000"
    ),
    "a setting of the wrong type": (
        lambda: with_settings(set_setting("encoder.d_model", "wide")), "is 'wide', but the weights have 48"
    ),
    "a section of the wrong type": (lambda: with_settings(set_setting("encoder", ["d_model"])), "no section `encoder`"),
    "a missing setting": (
        lambda: with_settings(lambda tree: tree["tokenizer"].pop("model_path")),
        "has no setting 'model_path'",
    ),
    "settings that are not YAML": (lambda: with_yaml("a: [1, 2"), "is not valid YAML"),
    "settings with a Python object": (
        lambda: with_yaml("a: !!python/object/apply:os.mkdir ['sprung']"), "is not valid YAML"
    ),
    "settings that are a list": (lambda: with_yaml("[1, 2]"), "must be a mapping of settings, got list"),
    "deeply nested settings": (lambda: with_yaml("[" * 20000), "is not valid YAML"),
    "aliases that multiply": (lambda: with_yaml(BOMB), "too large or too deep"),
    "interpolations that multiply": (lambda: with_yaml(GROWTH), "too long|too large"),
    "an interpolation of itself": (lambda: with_settings(set_setting("name", "${name}")), "refers to itself"),
    "an interpolation that points outside the file": (
        lambda: with_settings(set_setting("encoder.d_model", "${oc.env:HOME}")),
        "encoder.d_model` must be a value, got the interpolation '.*oc.env:HOME.*', which points outside",
    ),
}  # fmt: skip


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """Return an empty folder that is the working directory and the folder of temporary files."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_archive_is_refused_and_runs_no_code(name, working_folder, tmp_path):
    make_archive, reason = INVALID[name]
    path = tmp_path / "invalid.nemo"
    path.write_bytes(make_archive())
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NemoError, match=f"(?s){reason}") as raised:
            load_nemo(path)
    assert "invalid.nemo" in str(raised.value)
    assert list(working_folder.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [path, working_folder]
    assert path.read_bytes() == before


def test_at_least_fifty_invalid_archives_are_tested():
    assert len(INVALID) >= 50
    assert members().keys() == members(pack(members())).keys()


@pytest.mark.parametrize("seed", range(40))
def test_an_archive_with_damaged_bytes_is_refused_or_loads_finite_weights(seed, working_folder, tmp_path):
    content = bytearray(ORIGINAL)
    generator = torch.Generator().manual_seed(seed)
    starts = [ORIGINAL.index(b"tokenizer:"), ORIGINAL.index(b"PK\x03\x04"), ORIGINAL.index(b"PK\x01\x02"), 0]
    start = starts[seed % len(starts)]
    for _ in range(8):
        position = start + int(torch.randint(0, 2500, (1,), generator=generator))
        content[position] = int(torch.randint(0, 256, (1,), generator=generator))
    path = tmp_path / "damaged.nemo"
    path.write_bytes(content)
    model = None
    with contextlib.suppress(NemoError):
        model, _ = load_nemo(path)
    assert model is None or all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert list(working_folder.iterdir()) == []


def test_files_that_nemo_does_not_need_may_be_missing(tmp_path):
    path = tmp_path / "small.nemo"
    required = ("model_config.yaml", "model_weights.ckpt", "tokenizer.model")
    path.write_bytes(pack({name: content for name, content in members().items() if name.endswith(required)}))
    model, processor = load_nemo(path)
    assert model.config.vocab_size == len(processor.tokenizer) == 129
    export_nemo(model, processor, tmp_path / "full.nemo")
    assert members((tmp_path / "full.nemo").read_bytes()).keys() == members().keys()


def test_links_and_unsafe_names_in_a_valid_archive_are_ignored(working_folder, tmp_path):
    path = tmp_path / "odd.nemo"
    special_members = [
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("pipe", tarfile.FIFOTYPE, ""),
        ("/dev/x", tarfile.BLKTYPE, ""),
    ]
    path.write_bytes(pack({**members(), "/tmp/absolute": b"x", "a/../../up": b"x"}, special_members))
    model, _ = load_nemo(path)
    assert model.config.vocab_size == 129
    assert list(working_folder.iterdir()) == []


def test_weights_are_views_of_the_file_and_change_only_in_memory(tmp_path):
    path = tmp_path / "model.nemo"
    path.write_bytes(ORIGINAL)
    archive = Archive(path)
    weights = archive.read_weights()
    start = torch.frombuffer(archive.content, dtype=torch.uint8).data_ptr()
    assert all(start <= weight.data_ptr() < start + len(ORIGINAL) for weight in weights.values())
    truth = torch.load(io.BytesIO(members()["./model_weights.ckpt"]), weights_only=True)
    assert list(weights) == list(truth)
    for key, value in truth.items():
        archive.release_memory(weights[key])
        assert torch.equal(weights[key], value)
        weights[key].zero_()
    assert path.read_bytes() == ORIGINAL


def test_tied_weights_get_their_own_memory(tmp_path):
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
def test_weights_load_from_every_format_that_torch_writes(form, tmp_path):
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
    weights = Archive(path).read_weights()
    assert all(torch.equal(weights[key], value) for key, value in truth.items())
    assert load_nemo(path)[0].config.vocab_size == 129


def test_torch_before_2_7_copies_the_weights_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_parakeet.nemo.archive.get_checkpoint_offset", lambda fake: None)
    path = tmp_path / "model.nemo"
    path.write_bytes(ORIGINAL)
    with pytest.warns(UserWarning, match=r"copied, not memory-mapped: torch before 2\.7"):
        weights = Archive(path).read_weights()
    truth = torch.load(io.BytesIO(members()["./model_weights.ckpt"]), weights_only=True)
    assert all(torch.equal(weights[key], value) for key, value in truth.items())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.nemo"
    path.write_bytes(b"old")
    with pytest.raises(Exception, match=r"pickle|lambda"):
        write_archive(path, {"a": b"1"}, {"weight": lambda: None})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_archive_is_a_standard_tar_file(tmp_path):
    path = tmp_path / "model.nemo"
    weights = {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    write_archive(path, {"model_config.yaml": b"x: 1\n"}, weights)
    with tarfile.open(path, "r:") as tar:
        assert tar.getnames() == ["./model_config.yaml", "./model_weights.ckpt"]
        read = torch.load(io.BytesIO(tar.extractfile("./model_weights.ckpt").read()), weights_only=True)
    assert all(torch.equal(read[key], value) for key, value in weights.items())
