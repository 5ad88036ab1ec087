"""`.nemo` files that are written: unchanged settings, changed fields, and models that NeMo cannot express."""

import io
from functools import cache

import pytest
import torch
import yaml
from conftest import TESTS, noise
from nemo_files import members, write_members

from transformers_parakeet import NemoError, export_nemo, load_nemo
from transformers_parakeet.nemo.convert import compute_outputs_on_noise
from transformers_parakeet.nemo.reader import load_folder
from transformers_parakeet.nemo.sentencepiece import SENTENCEPIECE_MODELS_KEY

GOLDEN = TESTS / "golden"
KINDS = ["ctc", "rnnt", "tdt", "hybrid_tdt_ctc", "tdt_agg_tokenizer"]


def read_weights(files):
    """Return the state dict in the members of an archive."""
    return torch.load(io.BytesIO(files["./model_weights.ckpt"]), weights_only=True)


def read_settings(path):
    """Return the settings of a `.nemo` file as plain YAML."""
    return yaml.safe_load(members(path)["./model_config.yaml"])


@cache
def original(kind):
    """Return a golden model and its processor. The result is shared: tests must not change it."""
    return load_nemo(GOLDEN / kind / "model.nemo")


def fresh(kind):
    """Return a golden model and its processor, which a test may change."""
    return load_nemo(GOLDEN / kind / "model.nemo")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_and_its_export_change_nothing(kind, tmp_path):
    model, processor = original(kind)
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    export_nemo(*load_folder(tmp_path / "first"), tmp_path / "back.nemo")
    actual, expected = members(tmp_path / "back.nemo"), members(GOLDEN / kind / "model.nemo")
    assert actual.keys() == expected.keys()
    weights, expected_weights = read_weights(actual), read_weights(expected)
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key], value), key
    # settings, SentencePiece models and vocabularies, byte for byte
    text_files = [name for name in expected if "weights" not in name]
    assert {name: actual[name] for name in text_files} == {name: expected[name] for name in text_files}
    reloaded, reloaded_processor = load_nemo(tmp_path / "back.nemo")
    reloaded.save_pretrained(tmp_path / "second")
    reloaded_processor.save_pretrained(tmp_path / "second")
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "processor_config.json",
    ):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    before, after = compute_outputs_on_noise(model, processor), compute_outputs_on_noise(reloaded, reloaded_processor)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_gives_the_same_texts_and_times(kind, tmp_path):
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


def common_settings(settings, reference):
    """Return the settings whose keys the reference also has, with the values of `settings`."""
    if not isinstance(settings, dict) or not isinstance(reference, dict):
        return settings
    return {key: common_settings(value, reference[key]) for key, value in settings.items() if key in reference}


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_checkpoint_that_did_not_come_from_a_nemo_file_can_be_exported(kind, tmp_path):
    model, processor = fresh(kind)
    ignored = ("nemo_config", "architectures", "dtype")
    expected_fields = {name: value for name, value in model.config.to_dict().items() if name not in ignored}
    model.config.nemo_config = None
    del processor.tokenizer.init_kwargs[SENTENCEPIECE_MODELS_KEY]
    export_nemo(model, processor, tmp_path / "new.nemo")
    reloaded, reloaded_processor = load_nemo(tmp_path / "new.nemo")
    assert {name: reloaded.config.to_dict()[name] for name in expected_fields} == expected_fields
    assert reloaded_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    new, golden = tmp_path / "new.nemo", GOLDEN / kind / "model.nemo"
    assert read_weights(members(new)).keys() == read_weights(members(golden)).keys()
    settings, expected = read_settings(new), read_settings(golden)
    assert settings["target"] == expected["target"]
    for section in ("encoder", "preprocessor", "decoder", "joint", "decoding", "aux_ctc", "model_defaults"):
        actual_section, expected_section = settings.get(section, {}), expected.get(section, {})
        assert common_settings(actual_section, expected_section) == common_settings(expected_section, actual_section)


def test_only_changed_fields_are_written(tmp_path):
    model, processor = fresh("hybrid_tdt_ctc")
    config = model.config
    config.max_symbols_per_step, config.loss_sigma, config.fastemit_lambda = 7, 0.125, 0.005
    config.ctc_loss_weight, config.ctc_loss_reduction, config.loss_reduction = 0.5, "sum", "mean_volume"
    config.segment_gap_threshold, config.segment_separators = 20, (";",)
    config.encoder_config.attention_dropout, config.encoder_config.layerdrop = 0.25, 0.05
    config.encoder_config.stochastic_depth_mode, config.encoder_config.stochastic_depth_start_layer = "uniform", 2
    config.spec_augment = {**config.spec_augment, "time_masks": 3}
    export_nemo(model, processor, tmp_path / "changed.nemo")
    expected = read_settings(GOLDEN / "hybrid_tdt_ctc" / "model.nemo")
    expected["decoding"] |= {"segment_gap_threshold": 20, "segment_seperators": [";"]}
    expected["decoding"]["greedy"]["max_symbols"] = 7
    expected["loss"]["tdt_kwargs"] |= {"sigma": 0.125, "fastemit_lambda": 0.005}
    expected["aux_ctc"] |= {"ctc_loss_weight": 0.5, "ctc_reduction": "sum"}
    expected["rnnt_reduction"] = "mean_volume"
    expected["encoder"] |= {"dropout_att": 0.25, "stochastic_depth_drop_prob": 0.05}
    expected["encoder"] |= {"stochastic_depth_mode": "uniform", "stochastic_depth_start_layer": 2}
    expected["spec_augment"]["time_masks"] = 3
    assert read_settings(tmp_path / "changed.nemo") == expected


@pytest.mark.parametrize(("layerdrop", "mode"), [(0.1, "uniform"), (0.0, "linear")])
def test_layerdrop_of_stock_transformers_becomes_uniform_stochastic_depth(layerdrop, mode, tmp_path):
    model, processor = fresh("ctc")
    encoder = model.config.encoder_config
    encoder.layerdrop, encoder.stochastic_depth_mode = layerdrop, None
    export_nemo(model, processor, tmp_path / "stock.nemo")
    written = read_settings(tmp_path / "stock.nemo")["encoder"]
    assert (written["stochastic_depth_drop_prob"], written["stochastic_depth_mode"]) == (layerdrop, mode)


def test_interpolations_are_written_back_unchanged(tmp_path):
    files = members(GOLDEN / "tdt" / "model.nemo")
    settings = yaml.safe_load(files["./model_config.yaml"])
    settings["encoder"]["d_model"] = "${model_defaults.enc_hidden}"
    settings["joint"]["jointnet"]["encoder_hidden"] = "${....encoder.d_model}"
    settings["train_ds"] = {"manifest_filepath": "${oc.env:DATA}/train.json", "name": "${..encoder.n_layers} layers"}
    files["./model_config.yaml"] = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False).encode()
    path = write_members(tmp_path / "interpolated.nemo", files)
    model, processor = load_nemo(path)
    assert model.config.encoder_config.hidden_size == settings["model_defaults"]["enc_hidden"]
    model.config.loss_sigma = 0.5
    export_nemo(model, processor, tmp_path / "back.nemo")
    settings["loss"]["tdt_kwargs"]["sigma"] = 0.5
    assert read_settings(tmp_path / "back.nemo") == settings


def test_trained_weights_are_written(tmp_path):
    model, processor = fresh("ctc")
    model.train()
    inputs = processor(noise(2.0), text="the song", sampling_rate=16000)
    model(**inputs).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    export_nemo(model, processor, tmp_path / "tuned.nemo")
    reloaded, _ = load_nemo(tmp_path / "tuned.nemo")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in reloaded.state_dict().items())
    assert not torch.equal(reloaded.ctc_head.weight, original("ctc")[0].ctc_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_and_written(dtype, tmp_path):
    model, processor = load_nemo(GOLDEN / "tdt" / "model.nemo", dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    expected = original("tdt")[0].state_dict()
    floats = [key for key, value in expected.items() if value.is_floating_point()]
    assert all(torch.equal(model.state_dict()[key], expected[key].to(dtype)) for key in floats)
    export_nemo(model, processor, tmp_path / "half.nemo")
    reloaded, _ = load_nemo(tmp_path / "half.nemo")
    assert all(torch.equal(reloaded.state_dict()[key], model.state_dict()[key]) for key in floats)


def test_two_models_from_one_file_do_not_share_changes():
    model, _ = fresh("tdt")
    second_model, _ = fresh("tdt")
    with torch.no_grad():
        model.joint.head.weight.zero_()
    assert second_model.joint.head.weight.abs().sum() > 0
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def set_fields(**fields):
    """Return a function that sets fields of a model's configuration; `encoder_` before a name means the encoder's."""

    def change(model, processor):
        for name, value in fields.items():
            config = model.config.encoder_config if name.startswith("encoder_") else model.config
            setattr(config, name.removeprefix("encoder_"), value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_fields(blank_token_id=3), "blank must be the last token in NeMo, with the id 128, got the id 3"),
        (set_fields(encoder_hidden_act="relu"), "encoder_config.hidden_act` must be 'silu' in NeMo, got 'relu'"),
        (set_fields(encoder_subsampling_conv_kernel_size=5), "subsampling_conv_kernel_size` must be 3 in NeMo, got 5"),
        (set_fields(encoder_convolution_bias=True), "`attention_bias` and `convolution_bias` must be equal"),
        (
            set_fields(encoder_intermediate_size=100),
            "`intermediate_size` must be a multiple of .*48.* in NeMo, got 100",
        ),
        (
            set_fields(hidden_act="gelu"),
            "`hidden_act` must be relu, tanh or sigmoid in NeMo's joint network, got 'gelu'",
        ),
        (lambda model, processor: model.register_buffer("extra", torch.ones(1)), "NeMo has no weight for 'extra'"),
    ],
)
def test_a_model_that_nemo_cannot_express_is_refused(change, words, tmp_path):
    model, processor = fresh("tdt")
    change(model, processor)
    with pytest.raises(NemoError, match=words):
        export_nemo(model, processor, tmp_path / "model.nemo")
    assert list(tmp_path.iterdir()) == []


def test_invalid_paths_are_refused(tmp_path):
    with pytest.raises(NemoError, match=r"must end in \.nemo"):
        export_nemo(*original("ctc"), tmp_path / "model.tar")
    with pytest.raises(FileNotFoundError, match="create it"):
        export_nemo(*original("ctc"), tmp_path / "none" / "model.nemo")
