"""The way back to `.nemo` files: what comes back as it was, what follows a change, what NeMo has no place for."""

import io
import json
import tarfile
from functools import cache

import pytest
import torch
import yaml
from conftest import TESTS, noise
from nemo_files import members
from tokenizers import Tokenizer

import transformers_parakeet as tp
from transformers_parakeet import NemoError, export_nemo, load_nemo
from transformers_parakeet.nemo.convert import computed
from transformers_parakeet.nemo.hub import load_folder
from transformers_parakeet.nemo.sentencepiece import MODELS, build_tokenizer, sentencepiece_models
from transformers_parakeet.nemo.settings import Resolver, dump_settings, parse_settings

GOLDEN = TESTS / "golden"
KINDS = ["ctc", "rnnt", "tdt", "hybrid_tdt_ctc", "tdt_agg_tokenizer"]
RELEASED = TESTS / "data" / "parakeet-tdt-0.6b-v3.model"


def checkpoint(files):
    return torch.load(io.BytesIO(files["./model_weights.ckpt"]), weights_only=True)


@cache
def original(kind):
    return load_nemo(GOLDEN / kind / "model.nemo")


def fresh(kind):
    """A copy that may be changed."""
    return load_nemo(GOLDEN / kind / "model.nemo")


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_changes_nothing(kind, tmp_path):
    model, processor = original(kind)
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    export_nemo(*load_folder(tmp_path / "first"), tmp_path / "back.nemo")
    ours, theirs = members(tmp_path / "back.nemo"), members(GOLDEN / kind / "model.nemo")
    assert ours.keys() == theirs.keys()
    weights, truth = checkpoint(ours), checkpoint(theirs)
    assert weights.keys() == truth.keys()
    for key, value in truth.items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key], value), key
    # settings, SentencePiece models and vocabularies, byte for byte
    assert {k: v for k, v in ours.items() if "weights" not in k} == {
        k: v for k, v in theirs.items() if "weights" not in k
    }
    again, other = load_nemo(tmp_path / "back.nemo")
    again.save_pretrained(tmp_path / "second")
    other.save_pretrained(tmp_path / "second")
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "processor_config.json",
    ):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    before, after = computed(model, processor), computed(again, other)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "scores")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_times_survive(kind, tmp_path):
    export_nemo(*original(kind), tmp_path / "back.nemo")
    texts = []
    for model, processor in (original(kind), load_nemo(tmp_path / "back.nemo")):
        inputs = processor([noise(2.0, seed) for seed in range(2)], sampling_rate=16000)
        out = model.generate(**inputs)
        if kind == "ctc":
            texts.append(processor.batch_decode(out if torch.is_tensor(out) else out.sequences))
        else:
            texts.append(processor.decode(out.sequences, durations=out.durations, skip_special_tokens=True))
    assert texts[0] == texts[1]
    assert "".join(texts[0][0] if kind != "ctc" else texts[0])


def shared(tree, other):
    """What two trees have settings for, as the first has it."""
    if not isinstance(tree, dict) or not isinstance(other, dict):
        return tree
    return {key: shared(value, other[key]) for key, value in tree.items() if key in other}


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_checkpoint_that_never_was_a_nemo_file(kind, tmp_path):
    model, processor = fresh(kind)
    truth = {k: v for k, v in model.config.to_dict().items() if k not in ("nemo_config", "architectures", "dtype")}
    model.config.nemo_config = None
    del processor.tokenizer.init_kwargs[MODELS]
    export_nemo(model, processor, tmp_path / "new.nemo")
    again, other = load_nemo(tmp_path / "new.nemo")
    assert {name: again.config.to_dict()[name] for name in truth} == truth
    assert other.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    ours, theirs = members(tmp_path / "new.nemo"), members(GOLDEN / kind / "model.nemo")
    assert checkpoint(ours).keys() == checkpoint(theirs).keys()
    tree, given = (yaml.safe_load(files["./model_config.yaml"]) for files in (ours, theirs))
    assert tree["target"] == given["target"]
    for section in ("encoder", "preprocessor", "decoder", "joint", "decoding", "aux_ctc", "model_defaults"):
        assert shared(tree.get(section, {}), given.get(section, {})) == shared(
            given.get(section, {}), tree.get(section, {})
        )


def test_changed_fields_are_written_and_others_stay(tmp_path):
    model, processor = fresh("hybrid_tdt_ctc")
    config = model.config
    config.max_symbols_per_step, config.loss_sigma, config.fastemit_lambda = 7, 0.125, 0.005
    config.ctc_loss_weight, config.ctc_loss_reduction, config.loss_reduction = 0.5, "sum", "mean_volume"
    config.segment_gap_threshold, config.segment_separators = 20, (";",)
    config.encoder_config.attention_dropout, config.encoder_config.layerdrop = 0.25, 0.05
    config.encoder_config.stochastic_depth_mode, config.encoder_config.stochastic_depth_start_layer = "uniform", 2
    config.spec_augment = {**config.spec_augment, "time_masks": 3}
    export_nemo(model, processor, tmp_path / "changed.nemo")
    tree = yaml.safe_load(members(tmp_path / "changed.nemo")["./model_config.yaml"])
    expected = yaml.safe_load(members(GOLDEN / "hybrid_tdt_ctc" / "model.nemo")["./model_config.yaml"])
    expected["decoding"] |= {"segment_gap_threshold": 20, "segment_seperators": [";"]}
    expected["decoding"]["greedy"]["max_symbols"] = 7
    expected["loss"]["tdt_kwargs"] |= {"sigma": 0.125, "fastemit_lambda": 0.005}
    expected["aux_ctc"] |= {"ctc_loss_weight": 0.5, "ctc_reduction": "sum"}
    expected["rnnt_reduction"] = "mean_volume"
    expected["encoder"] |= {"dropout_att": 0.25, "stochastic_depth_drop_prob": 0.05}
    expected["encoder"] |= {"stochastic_depth_mode": "uniform", "stochastic_depth_start_layer": 2}
    expected["spec_augment"]["time_masks"] = 3
    assert tree == expected


@pytest.mark.parametrize(("layerdrop", "mode"), [(0.1, "uniform"), (0.0, "linear")])
def test_layerdrop_of_stock_becomes_the_nearest_that_nemo_has(layerdrop, mode, tmp_path):
    model, processor = fresh("ctc")
    encoder = model.config.encoder_config
    encoder.layerdrop, encoder.stochastic_depth_mode = layerdrop, None
    export_nemo(model, processor, tmp_path / "stock.nemo")
    written = yaml.safe_load(members(tmp_path / "stock.nemo")["./model_config.yaml"])["encoder"]
    assert (written["stochastic_depth_drop_prob"], written["stochastic_depth_mode"]) == (layerdrop, mode)


def test_interpolations_come_back_as_they_were(tmp_path):
    files = members(GOLDEN / "tdt" / "model.nemo")
    tree = yaml.safe_load(files["./model_config.yaml"])
    tree["encoder"]["d_model"] = "${model_defaults.enc_hidden}"
    tree["joint"]["jointnet"]["encoder_hidden"] = "${....encoder.d_model}"
    tree["train_ds"] = {"manifest_filepath": "${oc.env:DATA}/train.json", "name": "${..encoder.n_layers} layers"}
    files["./model_config.yaml"] = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode()
    path = tmp_path / "interpolated.nemo"
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    model, processor = load_nemo(path)
    assert model.config.encoder_config.hidden_size == tree["model_defaults"]["enc_hidden"]
    model.config.loss_sigma = 0.5
    export_nemo(model, processor, tmp_path / "back.nemo")
    back = yaml.safe_load(members(tmp_path / "back.nemo")["./model_config.yaml"])
    tree["loss"]["tdt_kwargs"]["sigma"] = 0.5
    assert back == tree


def test_interpolations_are_resolved():
    tree = {
        "a": {"b": 3, "c": "${.b}", "d": "${..e}", "f": ["${a.b}", "x${a.c}y"], "i": "${a.d.h}"},
        "e": {"b": "${a.c}", "h": 1.5},
    }
    assert Resolver(tree).visit(tree) == {
        "a": {"b": 3, "c": 3, "d": {"b": 3, "h": 1.5}, "f": [3, "x3y"], "i": 1.5},
        "e": {"b": 3, "h": 1.5},
    }
    assert Resolver({}).visit({"x": "${now:%Y}", "y": "${no.where}"}) == {"x": "${now:%Y}", "y": "${no.where}"}


def test_yaml_reads_and_writes_what_nemo_does():
    text = "lr: 1e-5\nday: 2024-01-02\npiece: '1e5'\nother: 'y'\n'no': 'no'\nn: 12\nnone: null\n"
    tree = parse_settings(text.encode())
    assert tree == {"lr": 1e-5, "day": "2024-01-02", "piece": "1e5", "other": "y", "no": "no", "n": 12, "none": None}
    written = dump_settings(tree).decode()
    assert parse_settings(written.encode()) == tree
    assert "piece: '1e5'" in written
    assert "other: 'y'" in written


def test_a_trained_checkpoint_carries_its_weights(tmp_path):
    model, processor = fresh("ctc")
    model.train()
    inputs = processor(noise(2.0), text="the song", sampling_rate=16000)
    model(**inputs).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    export_nemo(model, processor, tmp_path / "tuned.nemo")
    again, _ = load_nemo(tmp_path / "tuned.nemo")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert not torch.equal(again.ctc_head.weight, original("ctc")[0].ctc_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, tmp_path):
    model, processor = load_nemo(GOLDEN / "tdt" / "model.nemo", dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    truth = original("tdt")[0].state_dict()
    floats = [key for key, value in truth.items() if value.is_floating_point()]
    assert all(torch.equal(model.state_dict()[key], truth[key].to(dtype)) for key in floats)
    assert model.encoder.encode_positions.inv_freq.dtype == torch.float32
    export_nemo(model, processor, tmp_path / "half.nemo")
    again, _ = load_nemo(tmp_path / "half.nemo")
    assert all(torch.equal(again.state_dict()[key], model.state_dict()[key]) for key in floats)


def test_weights_loaded_from_nemo_are_on_their_own():
    model, _ = fresh("tdt")
    other, _ = fresh("tdt")
    with torch.no_grad():
        model.joint.head.weight.zero_()
    assert other.joint.head.weight.abs().sum() > 0
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(
        model.encoder.encode_positions.inv_freq, tp.ParakeetForTDT(model.config).encoder.encode_positions.inv_freq
    )


def changed(**fields):
    def change(model, processor):
        for name, value in fields.items():
            place = model.config.encoder_config if name.startswith("encoder_") else model.config
            setattr(place, name.removeprefix("encoder_"), value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(blank_token_id=3), "blank must be the last of 129 tokens, it is 3"),
        (changed(encoder_hidden_act="relu"), "encoder_config.hidden_act` is 'relu'"),
        (changed(encoder_subsampling_conv_kernel_size=5), "subsampling_conv_kernel_size` is 5"),
        (changed(encoder_convolution_bias=True), "`attention_bias` and `convolution_bias` differ"),
        (changed(encoder_intermediate_size=100), "`intermediate_size` is 100, NeMo needs a multiple of 48"),
        (changed(hidden_act="gelu"), "`hidden_act` is 'gelu', NeMo's joint network"),
        (lambda model, processor: model.register_buffer("extra", torch.ones(1)), "no place for the weight 'extra'"),
    ],
)
def test_what_nemo_has_no_place_for(change, words, tmp_path):
    model, processor = fresh("tdt")
    change(model, processor)
    with pytest.raises(NemoError, match=words):
        export_nemo(model, processor, tmp_path / "model.nemo")
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_no_sentencepiece_model_splits_like(tmp_path):
    model, processor = fresh("tdt")
    backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    made = ["".join(pair) for pair in backend["model"]["merges"]]
    # one of two ways to the same piece
    del backend["model"]["merges"][next(i for i, piece in enumerate(made) if made.count(piece) > 1)]
    processor.tokenizer = tp.ParakeetTokenizer(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), unk_token="<unk>"
    )
    with pytest.raises(NemoError, match=r"merges are not those of a SentencePiece model: train one"):
        export_nemo(model, processor, tmp_path / "model.nemo")
    backend["normalizer"] = {"type": "NFKC"}
    processor.tokenizer = tp.ParakeetTokenizer(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), unk_token="<unk>"
    )
    with pytest.raises(NemoError, match=r"no normalizer NFKC: train a model with it"):
        export_nemo(model, processor, tmp_path / "model.nemo")
    backend["pre_tokenizer"] = {"type": "Whitespace"}
    processor.tokenizer = tp.ParakeetTokenizer(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), unk_token="<unk>"
    )
    with pytest.raises(NemoError, match=r"no splitter Whitespace"):
        export_nemo(model, processor, tmp_path / "model.nemo")


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(NemoError, match=r"must end in \.nemo"):
        export_nemo(*original("ctc"), tmp_path / "model.tar")
    with pytest.raises(FileNotFoundError, match="create it"):
        export_nemo(*original("ctc"), tmp_path / "none" / "model.nemo")


@pytest.mark.parametrize("source", ["released", *KINDS[:4]])
def test_a_rebuilt_sentencepiece_model_splits_like_the_original(source):
    sentencepiece = pytest.importorskip("sentencepiece")
    if source == "released":
        content = RELEASED.read_bytes()
        tokenizer = build_tokenizer([content], "tdt")
    else:
        tokenizer = fresh(source)[1].tokenizer
        (content,) = sentencepiece_models(tokenizer, len(tokenizer) - 1)
    del tokenizer.init_kwargs[MODELS]
    (rebuilt,) = sentencepiece_models(tokenizer, len(tokenizer) - 1)
    assert rebuilt != content
    ours, theirs = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in (rebuilt, content))
    assert [ours.id_to_piece(i) for i in range(len(ours))] == [theirs.id_to_piece(i) for i in range(len(theirs))]
    cases = json.loads((GOLDEN / "timestamp_cases.json").read_text())["real_encode"]
    texts = [case["text"] for case in cases] + ["a  b ", " ﬁne", "Größe", "12:30, o'clock?", "日本"]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
