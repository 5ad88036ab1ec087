"""Tests of exported folders: the package onnx-asr loads them and recognises the tokens of NeMo and of this package."""

import copy
import json
import sys

import numpy as np
import onnx_asr
import pytest
import torch
from conftest import ctc_model, encoder_fields, noise, tiny_tokenizer
from safetensors.torch import load_file

import transformers_parakeet as tp
from transformers_parakeet.onnx_export import count_different_clips, export_onnx, get_onnx_asr_type
from transformers_parakeet.onnx_export.comparison import check_graph_file
from transformers_parakeet.onnx_export.folder import build_graphs

# 1 to 40 s
NOISE_SECONDS = (1.0, 2.7, 40.0, 9.36, 15.0)
TRANSDUCER_FILES = ["config.json", "decoder_joint-model.onnx", "encoder-model.onnx", "vocab.txt"]


def load_in_onnx_asr(model, folder, decoder=None, features=None, quantize=None):
    """Load a folder with onnx-asr.

    Args:
        model: the exported model.
        folder: the folder.
        decoder: `"transducer"` or `"ctc"`; `None` for the default.
        features: (B, T, F) features and (B,) lengths that replace those that onnx-asr computes; `None` for the latter.
        quantize: `"int8"` or `None`.
    """
    recogniser = onnx_asr.load_model(get_onnx_asr_type(model, decoder), folder, quantization=quantize)
    if features is not None:
        arrays = features[0].transpose(1, 2).numpy(), features[1].numpy()
        recogniser.asr._preprocessor = lambda waveforms, lengths: arrays
    return recogniser.with_timestamps()


def recognise_tokens(recogniser, clips):
    """Recognise clips as a batch in onnx-asr and return the ids and the frames of the tokens of each clip."""
    # several ids can have the same piece
    vocabulary = recogniser.asr._vocab
    recogniser.asr._vocab = {token_id: str(token_id) for token_id in vocabulary}
    results = recogniser.recognize(list(clips))
    recogniser.asr._vocab = vocabulary
    frames = [[round(time / 0.08) for time in result.timestamps] for result in results]
    return [[int(token) for token in result.tokens] for result in results], frames


def generate_tokens(model, features, lengths, decoder):
    """Return the ids of the tokens and their frames that the model generates from features."""
    mask = torch.arange(features.shape[1]) < lengths[:, None]
    options = {"decoder": decoder, "return_dict_in_generate": True}
    hypotheses = model.generate(input_features=features, attention_mask=mask, **options).hypotheses
    rows = zip(hypotheses.tokens.tolist(), hypotheses.frames.tolist(), hypotheses.lengths.tolist(), strict=True)
    tokens, frames = zip(*((ids[:length], starts[:length]) for ids, starts, length in rows), strict=True)
    return list(tokens), list(frames)


def check_lengths(model, processor, folder, decoder):
    """Compare tokens and frames in onnx-asr with those of the model: noise of 1 to 40 s, alone and as a batch."""
    clips = [noise(seconds, seed) for seed, seconds in enumerate(NOISE_SECONDS)]
    for batch in [clips, *([clip] for clip in clips)]:
        inputs = processor(batch, sampling_rate=16000)
        features, lengths = inputs["input_features"], inputs["attention_mask"].sum(-1)
        recogniser = load_in_onnx_asr(model, folder, decoder, (features, lengths))
        expected = generate_tokens(model, features, lengths, decoder)
        assert recognise_tokens(recogniser, batch) == expected
        assert any(expected[0])


def check_golden(golden, name, decoder, folder):
    """Export a `.nemo` file, and compare tokens and frames in onnx-asr with those of NeMo."""
    configs = golden / "real_configs"
    model, processor = tp.load_nemo(configs / name / "model.nemo")
    export_onnx(model, processor, folder, decoder=decoder)
    expected = json.loads((configs / name / "expected.json").read_text())
    shared = load_file(configs / "features.safetensors")
    rows = [shared[f"{expected['features']}.{clip}"].float() for clip in expected["clips"]]
    features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    clips = [tp.load_audio(str(configs / "clips" / f"{clip}.wav")) for clip in expected["clips"]]
    tokens, frames = recognise_tokens(load_in_onnx_asr(model, folder, decoder, (features, lengths)), clips)
    nemo_results = expected["greedy"][decoder]
    assert tokens == [result["tokens"] for result in nemo_results]
    if decoder == "transducer":
        assert frames == [result["frames"] for result in nemo_results]
    # the scores have margins of at least 0.007, so the features that onnx-asr itself computes give the same tokens
    assert count_different_clips(model, processor, folder, clips, decoder=decoder) == 0
    check_lengths(model, processor, folder, decoder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("ctc", "ctc"),
        ("transducer", "transducer"),
        ("tdt_v3", "transducer"),
        ("hybrid_rnnt_ctc", "transducer"),
        ("hybrid_rnnt_ctc", "ctc"),
        ("hybrid_tdt_ctc", "transducer"),
        ("hybrid_tdt_ctc", "ctc"),
        ("unified", "transducer"),
    ],
)
def test_tokens_equal_those_of_nemo(golden, name, decoder, tmp_path):
    check_golden(golden, name, decoder, tmp_path / "exported")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("decoder", ["transducer", "ctc"])
def test_the_demo_model_gives_the_same_text_for_every_clip(decoder, quantize, tmp_path):
    clip_folder = tp.demo_model_path() / "clips"
    names = [clip["file"] for clip in json.loads((clip_folder / "manifest.json").read_text(encoding="utf-8"))]
    clips = [tp.load_audio(str(clip_folder / name)) for name in names]
    model, processor = tp.load_nemo(tp.demo_model_path())
    export_onnx(model, processor, tmp_path / "exported", decoder=decoder, quantize=quantize)
    assert (
        count_different_clips(model, processor, tmp_path / "exported", clips, decoder=decoder, quantize=quantize) == 0
    )
    recogniser = load_in_onnx_asr(model, tmp_path / "exported", decoder, quantize=quantize)
    inputs = processor(clips, sampling_rate=16000)
    output = model.generate(**inputs, decoder=decoder, return_dict_in_generate=True)
    texts = processor.batch_decode(output.sequences, skip_special_tokens=True)
    assert [result.text for result in recogniser.recognize(clips)] == texts
    assert sum(len(text.split()) for text in texts) >= 24


@pytest.fixture(scope="module")
def rnnt_model():
    """A random RNN-T with two LSTM layers, a limit of 3 labels per frame, and causal subsampling, and its processor."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("rnnt")
    config = tp.ParakeetRNNTConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        blank_token_id=len(tokenizer) - 1,
        decoder_hidden_size=16,
        joint_hidden_size=24,
        num_decoder_layers=2,
        max_symbols_per_step=3,
        encoder_config=encoder_fields(num_hidden_layers=1, causal_downsampling=True),
    )
    model = tp.ParakeetForRNNT(config).eval()
    with torch.no_grad():
        # blanks and labels in turn, so that some frames reach the limit
        model.joint.head.bias[-1] = 1.0
    return model, tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer, decoder_type="rnnt")


@pytest.fixture(scope="module")
def rnnt_folder(rnnt_model, tmp_path_factory):
    """The folder that was exported from `rnnt_model`; the model must not change."""
    model, processor = rnnt_model
    weights = copy.deepcopy(model.state_dict())
    folder = tmp_path_factory.mktemp("rnnt") / "new" / "exported"
    paths = export_onnx(model, processor, folder)
    assert paths == [folder / name for name in TRANSDUCER_FILES]
    assert sorted(folder.parent.iterdir()) == [folder]
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert all(map(torch.equal, model.decoder.lstm._flat_weights, model.decoder.lstm.parameters()))
    return folder


def test_rnnt_with_a_limit_of_labels_per_frame(rnnt_model, rnnt_folder):
    model, processor = rnnt_model
    check_lengths(model, processor, rnnt_folder, "transducer")


def test_vocabulary_and_configuration(rnnt_model, rnnt_folder):
    model, processor = rnnt_model
    lines = (rnnt_folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    pieces = processor.tokenizer.convert_ids_to_tokens(range(len(lines)))
    assert len(lines) == model.config.vocab_size
    assert lines[:-1] == [f"{piece} {token_id}" for token_id, piece in enumerate(pieces[:-1])]
    assert lines[-1] == f"<blk> {model.config.blank_token_id}"
    assert json.loads((rnnt_folder / "config.json").read_text()) == {
        "model_type": "nemo-conformer-rnnt",
        "features_size": 80,
        "subsampling_factor": 8,
        "max_tokens_per_step": 3,
    }


def test_files_hold_no_paths_of_this_machine(rnnt_folder):
    for name in ("encoder-model.onnx", "decoder_joint-model.onnx"):
        content = (rnnt_folder / name).read_bytes()
        assert b".py" not in content
        assert b"site-packages" not in content


def test_a_file_that_differs_from_the_model_is_refused(rnnt_model, rnnt_folder):
    model = copy.deepcopy(rnnt_model[0])
    with torch.no_grad():
        model.joint.head.bias[5] += 0.01
    graphs = build_graphs(model, "transducer")
    check_graph_file(graphs["encoder-model"], rnnt_folder / "encoder-model.onnx")
    with pytest.raises(ValueError, match=r"output outputs of decoder_joint-model.onnx must equal that of the model"):
        check_graph_file(graphs["decoder_joint-model"], rnnt_folder / "decoder_joint-model.onnx")


def test_an_existing_folder_needs_overwrite(rnnt_model, rnnt_folder):
    with pytest.raises(FileExistsError, match="exists: give an empty or a new folder, or set `overwrite`"):
        export_onnx(*rnnt_model, rnnt_folder)


@pytest.mark.slow
def test_int8_next_to_float32(rnnt_model, rnnt_folder, tmp_path):
    model, processor = rnnt_model
    (tmp_path / "encoder-model.onnx").write_bytes(b"float32 file of an export before")
    export_onnx(model, processor, tmp_path, quantize="int8", overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"encoder-model.onnx", "encoder-model.int8.onnx", "decoder_joint-model.int8.onnx"} < names
    assert (tmp_path / "encoder-model.onnx").read_bytes() == b"float32 file of an export before"
    clips = [noise(2.0)]
    outputs = []
    for folder, quantize in ((rnnt_folder, None), (tmp_path, "int8")):
        recogniser = load_in_onnx_asr(model, folder, quantize=quantize)
        outputs.append(recogniser.asr._encode(*recogniser.asr._preprocessor(np.stack(clips), np.array([32000])))[0])
    # measured: 0.014
    assert np.abs(outputs[0] - outputs[1]).max() < 0.03 * np.abs(outputs[0]).max()


def list_refused_changes():
    """List (changes of an exportable CTC model and its processor, decoder, part of the message) for each obstacle."""

    def set_encoder_field(name, value):
        return lambda model, processor: setattr(model.config.encoder_config, name, value)

    def set_feature_field(name, value):
        return lambda model, processor: setattr(processor.feature_extractor, name, value)

    return {
        "local": (set_encoder_field("attention_context_size", [4, 4]), "attention context is limited to [4, 4] frames"),
        "causal": (set_encoder_field("causal_downsampling", True), "its subsampling is causal"),
        "flex": (set_encoder_field("_attn_implementation_internal", "flex_attention"), "got 'flex_attention'"),
        "raw_features": (set_feature_field("normalize", None), "`normalize` of the features must be 'per_feature'"),
        "8_khz": (set_feature_field("sampling_rate", 8000), "`sampling_rate` of the features must be 16000, got 8000"),
        "64_bins": (set_feature_field("feature_size", 64), "number of mel bins must be 80 or 128, got 64"),
        "training": (lambda model, processor: model.encoder.layers[0].train(), "the model is in training mode"),
        "bfloat16": (lambda model, processor: model.bfloat16(), "the weights must be float32 on the CPU"),
    }


@pytest.mark.parametrize("name", list_refused_changes())
def test_what_onnx_asr_cannot_run_is_refused(name, tmp_path):
    change, message = list_refused_changes()[name]
    model, processor = ctc_model(num_hidden_layers=1)
    change(model, processor)
    with pytest.raises(ValueError) as error:
        export_onnx(model, processor, tmp_path / "exported")
    assert str(error.value).startswith("onnx-asr cannot run this model: ")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_durations_with_gaps_are_refused(tmp_path):
    tokenizer = tiny_tokenizer("tdt")
    config = tp.ParakeetTDTConfig(
        vocab_size=len(tokenizer),
        blank_token_id=len(tokenizer) - 1,
        decoder_hidden_size=16,
        durations=[0, 1, 2, 4],
        encoder_config=encoder_fields(),
    )
    processor = tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer, decoder_type="tdt")
    with pytest.raises(ValueError, match=r"durations must be 0, 1, 2 and so on, got \[0, 1, 2, 4\]"):
        export_onnx(tp.ParakeetForTDT(config).eval(), processor, tmp_path / "exported")


def test_a_piece_with_a_space_is_refused(tmp_path, monkeypatch):
    model, processor = ctc_model(num_hidden_layers=1)
    monkeypatch.setattr(
        processor.tokenizer, "convert_ids_to_tokens", lambda ids: ["a b" if token_id == 7 else "x" for token_id in ids]
    )
    with pytest.raises(ValueError, match=r"without spaces and line breaks for onnx-asr.* ids \[7\]"):
        export_onnx(model, processor, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused(tmp_path):
    model, processor = ctc_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="`quantize` must be None or 'int8', got 'int4'"):
        export_onnx(model, processor, tmp_path / "exported", quantize="int4")
    with pytest.raises(ValueError, match="`decoder` must be ctc for this model, got 'transducer'"):
        export_onnx(model, processor, tmp_path / "exported", decoder="transducer")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"the export needs the package {package}, .* install the extra `onnx`"):
        export_onnx(*ctc_model(num_hidden_layers=1), tmp_path / "exported")
