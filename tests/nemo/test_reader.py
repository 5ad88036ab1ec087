"""Models that are read from `.nemo` files, compared with NVIDIA NeMo, and settings and weights that are refused."""

import copy
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
from conftest import TESTS
from nemo_files import edited_archive, emissions, members, set_setting, write_members
from safetensors.torch import load_file
from torch import Tensor
from transformers import pipeline

from transformers_parakeet import NemoError, load_nemo
from transformers_parakeet.nemo.reader import read_tokenizer

HERE = TESTS
GOLDEN = HERE / "golden"
CTC = GOLDEN / "ctc" / "model.nemo"
MODELS = ["ctc", "rnnt", "tdt", "hybrid_tdt_ctc", "tdt_agg_tokenizer"]
TRANSDUCERS = MODELS[1:]
# NeMo has no word times for the aggregate tokenizer
TIMED = [
    ("ctc", "ctc"),
    ("rnnt", "transducer"),
    ("tdt", "transducer"),
    ("hybrid_tdt_ctc", "transducer"),
    ("hybrid_tdt_ctc", "ctc"),
]
CLIPS = ["speech0", "speech1", "speech2", "synthetic", "short"]
# argument of the pipeline that chooses the CTC head of a hybrid
CTC_OF_HYBRID = {"generate_kwargs": {"decoder": "ctc"}}


@cache
def golden(name: str) -> SimpleNamespace:
    """Return a model, its processor, and what NeMo computes with it. The result is shared: tests must not change it."""
    model, processor = load_nemo(GOLDEN / name / "model.nemo")
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    assert expected["clips"] == CLIPS
    batch = load_file(GOLDEN / "batch_features.safetensors")
    features = batch[f"features{expected['model']['mels']}"].transpose(1, 2)
    mask = (torch.arange(features.shape[1]) < batch["feature_lengths"][:, None]).long()
    arrays = load_file(GOLDEN / name / "arrays.safetensors")
    return SimpleNamespace(
        model=model, processor=processor, expected=expected, features=features, mask=mask, arrays=arrays, batch=batch
    )


@cache
def asr_pipeline(name: str) -> Any:
    """Return the pipeline of a golden model."""
    loaded = golden(name)
    parts = {"tokenizer": loaded.processor.tokenizer, "feature_extractor": loaded.processor.feature_extractor}
    return pipeline("automatic-speech-recognition", model=loaded.model, **parts)


@cache
def samples(clip: str) -> Any:
    """Return the samples of a golden clip."""
    return soundfile.read(GOLDEN / "clips" / f"{clip}.wav", dtype="float32")[0]


def audio(clip: str) -> dict[str, Any]:
    """Return a golden clip as the pipeline takes it."""
    return {"raw": samples(clip), "sampling_rate": 16000}


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_equals_nemo(name: str):
    tokenizer = golden(name).processor.tokenizer
    for case in golden(name).expected["tokenizer"]:
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"]
        # NeMo writes the unknown piece differently
        if 0 not in case["ids"]:
            assert tokenizer.decode(case["ids"], group_tokens=False) == case["decoded"].strip()
    assert sorted(golden(name).processor.punctuation) == golden(name).expected["punctuation"]


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "timestamp_cases.json").read_text())["real_encode"], ids=lambda case: case["text"][:12]
)
def test_a_released_tokenizer_equals_nemo(case: dict[str, Any]):
    content = (HERE / "data" / "parakeet-tdt-0.6b-v3.model").read_bytes()
    section = {"tokenizer": {"type": "bpe", "model_path": "nemo:tokenizer.model"}}
    tokenizer = read_tokenizer(section, lambda reference: content, "tdt")
    assert len(tokenizer) == 8193
    assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"]
    if 0 not in case["ids"]:
        assert tokenizer.decode(case["ids"], group_tokens=False) == case["decoded"]


@pytest.mark.parametrize("name", ["ctc", "tdt"])
def test_features_equal_nemo(name: str):
    loaded = golden(name)
    batch = loaded.processor.feature_extractor(
        [samples(clip) for clip in CLIPS], sampling_rate=16000, return_tensors="pt"
    )
    assert batch["attention_mask"].sum(-1).tolist() == loaded.batch["feature_lengths"].tolist()
    valid = loaded.mask.bool()
    # measured: 1.6e-4, where a bin is almost silent
    torch.testing.assert_close(batch["input_features"][valid], loaded.features[valid], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_encoder_output_equals_nemo(name: str):
    loaded = golden(name)
    out = loaded.model.encoder(input_features=loaded.features, attention_mask=loaded.mask)
    valid = out.attention_mask.bool()
    assert valid.sum(-1).tolist() == loaded.arrays["encoder_lengths"].tolist()
    truth = loaded.arrays["encoder_out"].transpose(1, 2)
    # measured: 1.4e-6; NOTES.md section 4 gives 1e-6 for NeMo itself against float64
    torch.testing.assert_close(out.last_hidden_state[valid], truth[valid], rtol=0, atol=2e-5)


@torch.no_grad()
def test_ctc_log_probabilities_equal_nemo():
    loaded = golden("ctc")
    logits = loaded.model(input_features=loaded.features, attention_mask=loaded.mask).logits
    valid = torch.arange(logits.shape[1]) < loaded.arrays["encoder_lengths"][:, None]
    # measured: 4.8e-5 on values of up to 90
    ours, truth = logits.log_softmax(-1)[valid], loaded.arrays["ctc_log_probs"][valid]
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", TRANSDUCERS)
@torch.no_grad()
def test_joint_logits_equal_nemo(name: str):
    loaded = golden(name)
    grid = loaded.expected["transducer"]["grid"]
    blank = torch.full((len(grid["rows"]), 1), loaded.model.config.blank_token_id)
    labels = torch.cat([blank, torch.tensor(grid["labels"])], dim=1)
    inputs = {"input_features": loaded.features[grid["rows"]], "attention_mask": loaded.mask[grid["rows"]]}
    logits = loaded.model(**inputs, decoder_input_ids=labels).logits[:, : grid["frames"]]
    # measured: 5.7e-5 on values of up to 90
    torch.testing.assert_close(logits, loaded.arrays["joint_logits"], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("name", TRANSDUCERS)
def test_greedy_decoding_equals_nemo(name: str, limit: int | None):
    loaded = golden(name)
    model, single = loaded.model, loaded.expected["transducer"]["single"]
    if limit is not None:
        # the shared model must not change
        model = copy.deepcopy(model)
        model.config.max_symbols_per_step = limit
    ids = model.config.blank_token_id, model.config.pad_token_id
    together = model.generate(loaded.features, attention_mask=loaded.mask)
    for row, clip in enumerate(CLIPS):
        truth = single[clip] if limit is None else single[clip]["max_symbols_1"]
        width = int(loaded.mask[row].sum())
        alone = model.generate(loaded.features[row : row + 1, :width])
        for output, output_row in ((together, row), (alone, 0)):
            tokens, frames, durations = emissions(output, output_row, *ids)
            assert (tokens, frames) == (truth["tokens"], truth["frames"]), clip
            # RNN-T has no durations; NeMo's durations are right for single clips only (NOTES.md section 6)
            assert durations == truth.get("durations", durations), clip


@pytest.mark.parametrize(("method", "key"), [("max_prob", "max_prob"), ("entropy", "entropy_default")])
@pytest.mark.parametrize("name", TRANSDUCERS)
def test_transducer_confidence_equals_nemo(name: str, method: str, key: str):
    loaded = golden(name)
    out = loaded.model.generate(loaded.features, attention_mask=loaded.mask, output_confidence=method)
    for row, clip in enumerate(CLIPS):
        token_ids, config = out.sequences[row], loaded.model.config
        is_label = (token_ids != config.blank_token_id) & (token_ids != config.pad_token_id)
        truth = loaded.expected["transducer"]["single"][clip][f"token_confidence.{key}"]
        # measured: 6.6e-6
        assert out.token_confidence[row][is_label].tolist() == pytest.approx(truth, abs=5e-5)
        assert not out.token_confidence[row][~is_label].any()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("name", "head"), TIMED)
def test_pipeline_text_times_and_confidence_equal_nemo(name: str, head: str, clip: str):
    truth = golden(name).expected[head]["single"][clip]
    options = CTC_OF_HYBRID if (name, head) == ("hybrid_tdt_ctc", "ctc") else {}
    for level in ("char", "word", "segment"):
        out = asr_pipeline(name)(audio(clip), return_timestamps=level, return_confidence=True, **options)
        assert out["text"] == truth["text"].strip()
        ours = [(chunk["text"].strip(), *chunk["timestamp"]) for chunk in out["chunks"]]
        assert ours == [
            ("".join(entry[level]).strip(), round(entry["start"], 3), round(entry["end"], 3)) for entry in truth[level]
        ]
        if level == "char":
            confidences = [chunk["confidence"] for chunk in out["chunks"]]
            # measured: 2.9e-5, which comes from the features of the clip of 60 ms
            assert confidences == pytest.approx(truth["token_confidence.max_prob"], abs=1e-4)
        elif confidences:
            # a word has the smallest confidence of its tokens by default
            assert min(chunk["confidence"] for chunk in out["chunks"]) == min(confidences)


@pytest.mark.parametrize(("name", "head"), TIMED)
def test_pipeline_texts_in_a_batch_equal_nemo(name: str, head: str):
    options = CTC_OF_HYBRID if (name, head) == ("hybrid_tdt_ctc", "ctc") else {}
    batch = asr_pipeline(name)([audio(clip) for clip in CLIPS], batch_size=len(CLIPS), **options)
    truth = golden(name).expected[head]["single"]
    assert [out["text"] for out in batch] == [truth[clip]["text"].strip() for clip in CLIPS]


AUGMENT = {"freq_masks": 2, "time_masks": 10, "freq_width": 27, "time_width": 0.05}
ENCODER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "conv_kernel_size": 9,
    "subsampling_factor": 8,
    "subsampling_conv_channels": 24,
    "max_position_embeddings": 5000,
    "dropout": 0.1,
    "dropout_positions": 0.0,
    "layerdrop": 0.0,
    "activation_dropout": 0.1,
    "residual_dropout": 0.1,
    "attention_dropout": 0.1,
    "stochastic_depth_mode": "linear",
    "stochastic_depth_start_layer": 1,
}
TRANSDUCER = {
    "decoder_hidden_size": 32,
    "decoder_dropout": 0.2,
    "joint_dropout": 0.2,
    "hidden_act": "relu",
    "max_symbols_per_step": 10,
    "fastemit_lambda": 0.0,
    "forced_blanks": True,
    "vocab_size": 129,
    "blank_token_id": 128,
}
TDT = {**TRANSDUCER, "durations": [0, 1, 2, 3, 4], "loss_omega": 0.1, "joint_hidden_size": 32}
CONFIGS = {
    "ctc": {"ctc_loss_reduction": "mean_volume", "vocab_size": 129, "pad_token_id": 128, "model_type": "parakeet_ctc"},
    "rnnt": {**TRANSDUCER, "loss_reduction": "mean_volume", "joint_hidden_size": 40, "num_decoder_layers": 1,
             "ctc_head": False, "model_type": "parakeet_rnnt"},
    "tdt": {**TDT, "loss_reduction": "mean_batch", "loss_sigma": 0.05, "num_decoder_layers": 2, "ctc_head": False,
            "model_type": "parakeet_tdt"},
    "hybrid_tdt_ctc": {**TDT, "loss_reduction": "mean_batch", "loss_sigma": 0.02, "num_decoder_layers": 1,
                       "ctc_head": True, "ctc_loss_weight": 0.3, "ctc_loss_reduction": "mean_batch",
                       "model_type": "parakeet_tdt"},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_become_fields_of_the_configuration(name: str):
    config = golden(name).model.config
    truth = {**CONFIGS[name], "spec_augment": AUGMENT, "segment_gap_threshold": None}
    assert {field: getattr(config, field) for field in truth} == truth
    bias, mels = (False, 128) if name == "tdt" else (True, 80)
    encoder = {**ENCODER, "attention_bias": bias, "convolution_bias": bias, "scale_input": bias, "num_mel_bins": mels}
    assert {field: getattr(config.encoder_config, field) for field in encoder} == encoder
    extractor = golden(name).processor.feature_extractor
    assert (extractor.feature_size, extractor.win_length, extractor.hop_length, extractor.n_fft) == (
        mels,
        400,
        160,
        512,
    )
    assert not golden(name).model.training


def edited(name: str, tmp_path: Path, *, settings: Callable | None = None, weights: Callable | None = None) -> Path:
    """Write a changed copy of a golden archive; see `edited_archive`."""
    return edited_archive(GOLDEN / name / "model.nemo", tmp_path, settings=settings, weights=weights)


REFUSED = [
    ("tdt", "encoder.self_attention_model", "abs_pos"),
    ("tdt", "encoder.att_context_style", "chunked"),
    ("tdt", "encoder.conv_norm_type", "group_norm8"),
    ("tdt", "encoder.subsampling", "striding"),
    ("tdt", "encoder.feat_out", 256),
    ("tdt", "encoder.reduction", "pooling"),
    ("tdt", "encoder.hyper_connections", 4),
    ("ctc", "preprocessor.sample_rate", 8000),
    ("ctc", "preprocessor.normalize", "all_features"),
    ("ctc", "preprocessor.window", "hamming"),
    ("ctc", "preprocessor.mag_power", 1.0),
    ("ctc", "preprocessor.lowfreq", 20),
    ("ctc", "preprocessor.log_zero_guard_type", "clamp"),
    ("ctc", "preprocessor.frame_splicing", 3),
    ("ctc", "preprocessor.echo", 1),
    ("rnnt", "decoder.normalization_mode", "layer"),
    ("rnnt", "decoder.blank_as_pad", False),
    ("rnnt", "decoder.prednet.rnn_hidden_size", 64),
    ("rnnt", "decoder.prednet.context_size", 2),
    ("rnnt", "joint.temperature", 2.0),
    ("rnnt", "decoder._target_", "nemo.collections.asr.modules.StatelessTransducerDecoder"),
    ("tdt", "encoder._target_", "nemo.collections.asr.modules.conformer_encoder.ConformerEncoderAdapter"),
    ("ctc", "target", "nemo.collections.asr.models.EncDecMultiTaskModel"),
    ("ctc", "tokenizer.type", "wpe"),
    ("ctc", "tokenizer.special_tokens", {"s": "<s>"}),
    ("rnnt", "decoding.big_blank_durations", [2, 4]),
]


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [
        ("encoder.self_attention_model", "rel_pos_local", r"change_attention_model\('rel_pos', \[-1, -1\]\)"),
        ("adapters", {"enabled": True}, "merge or remove the adapters in NeMo"),
        ("tokenizer.type", "wpe", "where `change_vocabulary` gives a bpe one"),
        ("encoder._target_", "x.ConformerEncoderAdapter", "merge or disable adapters in NeMo"),
        ("decoder._target_", "x.StatelessTransducerDecoder", "stateless prediction networks .* need NeMo"),
    ],
)
def test_an_error_says_what_to_do(setting: str, value: Any, advice: str, tmp_path: Path):
    with pytest.raises(NemoError, match=advice):
        load_nemo(edited("tdt", tmp_path, settings=set_setting(setting, value)))


@pytest.mark.parametrize(("name", "setting", "value"), REFUSED)
def test_a_setting_that_is_not_implemented_is_named(name: str, setting: str, value: Any, tmp_path: Path):
    with pytest.raises(NemoError) as raised:
        load_nemo(edited(name, tmp_path, settings=set_setting(setting, value)))
    assert setting in str(raised.value)
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("preprocessor.window_stride", 0.02, "window_stride.*320"),
        ("tokenizer.type", "wpe", "tokenizer.type.*'wpe'"),
        ("encoder.d_model", "${oc.env:WIDTH}", "encoder.d_model.*interpolation"),
        ("encoder", None, "no section `encoder`"),
        ("joint.jointnet.activation", "unknown_activation", "unknown_activation"),
    ],
)
def test_an_invalid_setting_is_named(setting: str, value: Any, words: str, tmp_path: Path):
    with pytest.raises((NemoError, KeyError), match=words):
        load_nemo(edited("rnnt", tmp_path, settings=set_setting(setting, value)))


def test_missing_settings_have_the_defaults_of_nemo(tmp_path: Path):
    def remove_settings(settings: dict) -> None:
        for key in ("xscaling", "use_bias", "causal_downsampling", "att_context_style", "conv_norm_type", "reduction"):
            settings["encoder"].pop(key, None)
        settings["preprocessor"].pop("n_fft")
        settings["decoding"]["greedy"] = {"max_symbols_per_step": 7}

    config = load_nemo(edited("rnnt", tmp_path, settings=remove_settings))[0].config
    assert config.encoder_config.scale_input
    assert config.encoder_config.attention_bias
    assert config.encoder_config.convolution_bias
    assert config.max_symbols_per_step == 7


def test_segment_settings_become_fields(tmp_path: Path):
    def change(settings: dict) -> None:
        settings["decoding"] |= {"segment_seperators": [";"], "segment_gap_threshold": 15}

    config = load_nemo(edited("tdt", tmp_path, settings=change))[0].config
    assert (config.segment_separators, config.segment_gap_threshold) == ([";"], 15)


@pytest.mark.parametrize(
    "kept_setting", ["decoding.durations", "decoding.model_type", "loss.loss_name", "joint.num_extra_outputs"]
)
def test_one_setting_of_tdt_is_enough_to_detect_it(kept_setting: str, tmp_path: Path):
    def keep_one(settings: dict) -> None:
        # the settings of the loss repeat the durations
        section, key = kept_setting.split(".")
        value = settings[section][key]
        for removed_section, removed_key in (
            ("decoding", "durations"),
            ("decoding", "model_type"),
            ("loss", "loss_name"),
            ("joint", "num_extra_outputs"),
        ):
            settings[removed_section].pop(removed_key)
        settings[section][key] = value

    model, processor = load_nemo(edited("tdt", tmp_path, settings=keep_one))
    assert (type(model).__name__, processor._decoder_type) == ("ParakeetForTDT", "tdt")
    assert model.config.durations == [0, 1, 2, 3, 4]


def test_the_joint_output_layer_has_another_index_without_dropout(tmp_path: Path):
    def renumber(state_dict: dict[str, Tensor]) -> None:
        for kind in ("weight", "bias"):
            state_dict[f"joint.joint_net.1.{kind}"] = state_dict.pop(f"joint.joint_net.2.{kind}")

    model, _ = load_nemo(
        edited("rnnt", tmp_path, settings=set_setting("joint.jointnet.dropout", 0.0), weights=renumber)
    )
    assert torch.equal(model.joint.head.weight, golden("rnnt").model.joint.head.weight)
    assert model.config.joint_dropout == 0.0


def test_an_unknown_weight_is_refused(tmp_path: Path):
    with pytest.raises(NemoError, match=r"'encoder\.out_proj\.weight' is not part of a supported model"):
        load_nemo(
            edited("ctc", tmp_path, weights=lambda state: state.update({"encoder.out_proj.weight": torch.ones(2)}))
        )


def test_a_weight_of_an_additional_layer_is_refused(tmp_path: Path):
    with pytest.raises(NemoError, match=r"`encoder\.n_layers` is 2, but the weights have 3"):
        load_nemo(
            edited(
                "ctc", tmp_path, weights=lambda state: state.update({"encoder.layers.2.norm_out.bias": torch.ones(48)})
            )
        )


def test_a_missing_weight_is_named(tmp_path: Path):
    with pytest.raises(NemoError, match=r"missing \['encoder\.layers\.1\.self_attn\.q_proj\.weight'\]"):
        load_nemo(
            edited("ctc", tmp_path, weights=lambda state: state.pop("encoder.layers.1.self_attn.linear_q.weight"))
        )


def test_a_wrong_shape_is_named(tmp_path: Path):
    with pytest.raises(NemoError, match=r"joint\.head\.bias has shape \[130\] instead of \[129\]"):
        load_nemo(
            edited("rnnt", tmp_path, weights=lambda state: state.update({"joint.joint_net.2.bias": torch.ones(130)}))
        )


def test_a_missing_buffer_of_the_feature_extractor_is_accepted(tmp_path: Path):
    model, _ = load_nemo(edited("ctc", tmp_path, weights=lambda state: state.pop("preprocessor.featurizer.window")))
    assert torch.equal(model.ctc_head.weight, golden("ctc").model.ctc_head.weight)


@pytest.mark.parametrize("missing", ["model_config.yaml", "model_weights.ckpt", "tokenizer.model"])
def test_a_missing_member_is_named(missing: str, tmp_path: Path):
    content = {name: value for name, value in members(CTC).items() if not name.endswith(missing)}
    with pytest.raises(NemoError, match=rf"has no member .*{missing}"):
        load_nemo(write_members(tmp_path / "incomplete.nemo", content))


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\x1f\x8b\x08\x00cut off"])
def test_a_file_that_is_not_an_archive_is_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "broken.nemo"
    path.write_bytes(content)
    with pytest.raises(NemoError, match=r"broken\.nemo is not a readable"):
        load_nemo(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.nemo"):
        load_nemo(tmp_path / "none.nemo")


def test_settings_that_are_not_a_mapping_are_refused(tmp_path: Path):
    with pytest.raises(NemoError, match="must be a mapping of settings, got list"):
        load_nemo(write_members(tmp_path / "list.nemo", {**members(CTC), "./model_config.yaml": b"[1, 2]"}))


def test_a_tokenizer_that_is_not_a_sentencepiece_model_is_refused(tmp_path: Path):
    content = {
        name: b"\xff\xfe junk" if name.endswith("tokenizer.model") else value for name, value in members(CTC).items()
    }
    with pytest.raises(NemoError, match="not a SentencePiece model"):
        load_nemo(write_members(tmp_path / "junk.nemo", content))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path):
    class Trap:
        """Creates a file when it is unpickled."""

        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    buffer = io.BytesIO()
    torch.save({"encoder.pre_encode.out.bias": Trap()}, buffer)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_nemo(write_members(tmp_path / "trap.nemo", {**members(CTC), "./model_weights.ckpt": buffer.getvalue()}))
    assert not (tmp_path / "sprung").exists()


def same_weights(path: Path, name: str) -> bool:
    """Return whether a file gives the weights of a golden model, bit for bit."""
    weights, expected = load_nemo(path)[0].state_dict(), golden(name).model.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


def test_gzip_archives_load(tmp_path: Path):
    assert same_weights(write_members(tmp_path / "old.nemo", members(CTC), compress=True), "ctc")


def test_members_without_a_leading_dot_load(tmp_path: Path):
    content = {name.removeprefix("./"): value for name, value in members(CTC).items()}
    assert same_weights(write_members(tmp_path / "plain.nemo", content), "ctc")


def test_a_model_root_in_the_settings_loads(tmp_path: Path):
    def nest(settings: dict) -> None:
        model_settings = dict(settings)
        settings.clear()
        settings["model"] = model_settings

    assert same_weights(edited("tdt", tmp_path, settings=nest), "tdt")


def test_members_with_paths_outside_the_archive_are_not_extracted(tmp_path: Path):
    content = {**members(CTC), "../escaped.txt": b"x", str(tmp_path / "absolute.txt"): b"x"}
    assert same_weights(write_members(tmp_path / "deep.nemo", content), "ctc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep.nemo"]
    assert not (tmp_path.parent / "escaped.txt").exists()
