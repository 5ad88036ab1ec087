"""`.nemo` files with the configurations of the released checkpoints and with local attention, compared with NeMo."""

import json
from functools import cache
from types import SimpleNamespace

import pytest
import soundfile
import torch
from conftest import TESTS
from nemo_files import edited_archive, emissions
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import pipeline

import transformers_parakeet as tp
from transformers_parakeet.nemo.archive import Archive

CONFIGS = TESTS / "golden" / "real_configs"
LOCAL = TESTS / "golden" / "local_attention"
NAMES = sorted(path.parent.name for path in CONFIGS.glob("*/model.nemo"))
MODELS = [name for name in NAMES if not name.startswith("old_") or name == "old_source"]
CASES = {
    name: case
    for name, case in json.loads((LOCAL / "expected.json").read_text())["cases"].items()
    if "failed" not in case
}

# measured: encoder outputs differ by up to 3e-6 from NeMo's, features by up to 1e-4
ENCODER_TOLERANCE, FEATURE_TOLERANCE = 1e-5, 2e-3


def pad_features(rows):
    """Return a padded (B, T, F) batch of (T, F) features and its (B, T) mask."""
    lengths = torch.tensor([len(row) for row in rows])
    batch = pad_sequence(rows, batch_first=True).float()
    return batch, (torch.arange(batch.shape[1]) < lengths[:, None]).long()


@cache
def golden(name):
    """Return a model, its processor, and what NeMo computes with it. The result is shared: tests must not change it."""
    expected = json.loads((CONFIGS / name / "expected.json").read_text())
    source = expected.get("same_as", name)
    expected = json.loads((CONFIGS / source / "expected.json").read_text())
    model, processor = tp.load_nemo(CONFIGS / name / "model.nemo")
    shared = load_file(CONFIGS / "features.safetensors")
    features, mask = pad_features([shared[f"{expected['features']}.{clip}"] for clip in expected["clips"]])
    return SimpleNamespace(
        model=model,
        processor=processor,
        greedy={head: expected["greedy"][head] for head in ("transducer", "ctc") if head in expected["greedy"]},
        features=features,
        mask=mask,
        arrays=load_file(CONFIGS / source / "arrays.safetensors"),
        waves=[soundfile.read(CONFIGS / "clips" / f"{clip}.wav", dtype="float32")[0] for clip in expected["clips"]],
    )


def check_encoder(model, loaded, key):
    """Compare the encoder's output on valid frames with NeMo's, the array `key` of the golden file."""
    with torch.no_grad():
        out = model.encoder(input_features=loaded.features, attention_mask=loaded.mask)
    valid = out.attention_mask.bool()
    assert valid.sum(-1).tolist() == loaded.arrays["encoder_lengths"].tolist()
    expected = loaded.arrays[key].transpose(1, 2)[:, : valid.shape[1]]
    torch.testing.assert_close(out.last_hidden_state[valid], expected[valid], atol=ENCODER_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_loads_without_a_warning(name, caplog):
    with caplog.at_level("WARNING"):
        model, _ = tp.load_nemo(CONFIGS / name / "model.nemo")
    assert caplog.messages == []
    assert isinstance(model, tp.ParakeetForCTC) == ("transducer" not in golden(name).greedy)
    assert isinstance(model, tp.ParakeetForTDT) == ("tdt" in name)


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_nemo(name):
    loaded = golden(name)
    batch = loaded.processor.feature_extractor(loaded.waves, sampling_rate=16000, return_tensors="pt")
    width = loaded.features.shape[1]
    assert batch["attention_mask"].sum(-1).tolist() == loaded.mask.sum(-1).tolist()
    valid = loaded.mask[..., None]
    ours, theirs = batch["input_features"][:, :width] * valid, loaded.features * valid
    torch.testing.assert_close(ours, theirs, atol=FEATURE_TOLERANCE, rtol=0)
    # padding is zero also without normalisation
    assert not (batch["input_features"] * ~batch["attention_mask"][..., None].bool()).any()


@pytest.mark.parametrize("name", NAMES)
def test_encoder_output_equals_nemo(name):
    check_encoder(golden(name).model, golden(name), "encoder_out")


@pytest.mark.parametrize(
    ("name", "context"), [("nemotron", (70, 0)), ("nemotron", (70, 1)), ("nemotron", (70, 6)), ("unified", (5, 2, 3)),
                          ("unified", (70, 0, 1)), ("unified", (70, 2, 2)), ("unified", (8, 1, 4))]
)  # fmt: skip
def test_encoder_output_with_another_context_equals_nemo(name, context):
    loaded = golden(name)
    model, _ = tp.load_nemo(CONFIGS / name / "model.nemo")
    model.set_attention_context(*context)
    left, right, *chunk = context
    key = "_".join(map(str, [left, *chunk, right]))
    check_encoder(model, loaded, f"encoder_out.context_{key}")


@pytest.mark.parametrize("name", [name for name in NAMES if "transducer" in golden(name).greedy])
def test_transducer_tokens_frames_and_durations_equal_nemo(name):
    loaded = golden(name)
    config = loaded.model.config
    out = loaded.model.generate(
        input_features=loaded.features, attention_mask=loaded.mask, return_dict_in_generate=True
    )
    for row, expected in enumerate(loaded.greedy["transducer"]):
        tokens, frames, durations = emissions(out, row, config.blank_token_id, config.pad_token_id)
        assert tokens == expected["tokens"]
        assert frames == expected["frames"]
        assert durations == expected.get("durations", durations)


@pytest.mark.parametrize(("name", "head"), [(name, head) for name in NAMES for head in golden(name).greedy])
def test_texts_equal_nemo(name, head):
    loaded = golden(name)
    pipe = pipeline(
        "automatic-speech-recognition",
        model=loaded.model,
        tokenizer=loaded.processor.tokenizer,
        feature_extractor=loaded.processor.feature_extractor,
    )
    options = {"generate_kwargs": {"decoder": "ctc"}} if head == "ctc" and "transducer" in loaded.greedy else {}
    for wave, expected in zip(loaded.waves, loaded.greedy[head], strict=True):
        # NeMo writes the unknown token as two question marks
        if 0 not in expected["tokens"]:
            assert pipe({"raw": wave, "sampling_rate": 16000}, **options)["text"].strip() == expected["text"].strip()


def encoder_config_dict(model):
    """Return the fields of the encoder's configuration without the dtype."""
    return {key: value for key, value in model.config.encoder_config.to_dict().items() if key != "dtype"}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_and_its_export_keep_configuration_and_output(name, tmp_path):
    loaded = golden(name)
    loaded.model.save_pretrained(tmp_path / "folder")
    loaded.processor.save_pretrained(tmp_path / "folder")
    model = type(loaded.model).from_pretrained(tmp_path / "folder").eval()
    processor = tp.ParakeetProcessor.from_pretrained(tmp_path / "folder")
    assert encoder_config_dict(model) == encoder_config_dict(loaded.model)
    assert processor.feature_extractor.normalize == loaded.processor.feature_extractor.normalize
    check_encoder(model, loaded, "encoder_out")
    tp.export_nemo(model, processor, tmp_path / "back.nemo")
    again, _ = tp.load_nemo(tmp_path / "back.nemo")
    check_encoder(again, loaded, "encoder_out")
    original = Archive(CONFIGS / name / "model.nemo")
    back = Archive(tmp_path / "back.nemo")
    assert back.read("model_config.yaml") == original.read("model_config.yaml")


@pytest.mark.parametrize("name", ["nemotron", "unified", "eou", "long_ctc", "ctc"])
def test_a_checkpoint_without_nemo_settings_can_be_exported(name, tmp_path):
    loaded = golden(name)
    model, processor = tp.load_nemo(CONFIGS / name / "model.nemo")
    model.config.nemo_config = None
    tp.export_nemo(model, processor, tmp_path / "back.nemo")
    again, extractor = tp.load_nemo(tmp_path / "back.nemo")
    assert encoder_config_dict(again) == encoder_config_dict(model)
    assert extractor.feature_extractor.normalize == processor.feature_extractor.normalize
    check_encoder(again, loaded, "encoder_out")


@cache
def local_inputs():
    """Return the features from which NeMo computed local attention, as a batch with its mask."""
    clips = json.loads((LOCAL / "expected.json").read_text())["clips"]
    given = load_file(LOCAL / "input.safetensors")
    return pad_features([given[f"features.{clip}"] for clip in clips])


def encode_local_inputs(model):
    """Return the encoder's output for `local_inputs` and the mask of valid frames."""
    features, mask = local_inputs()
    with torch.no_grad():
        out = model.encoder(input_features=features, attention_mask=mask, output_hidden_states=True)
    return out, out.attention_mask.bool()


@pytest.mark.parametrize("case", CASES)
def test_local_attention_equals_nemo_in_every_layer(case, tmp_path):
    change = CASES[case].get("encoder")
    if change is None:
        model, context = CASES[case]["change_attention_model"]
        change = {"self_attention_model": model, "att_context_size": context}
    source = LOCAL / CASES[case]["archive"]
    path = edited_archive(source, tmp_path, settings=lambda tree: tree["encoder"].update(change))
    out, valid = encode_local_inputs(tp.load_nemo(path)[0])
    assert valid.sum(-1).tolist() == CASES[case]["lengths"]
    truth = load_file(LOCAL / f"{case}.safetensors")
    stages = {"layer0": out.hidden_states[1], "encoder_out": out.last_hidden_state}
    for stage, hidden in stages.items():
        torch.testing.assert_close(hidden[valid], truth[stage], atol=ENCODER_TOLERANCE, rtol=0, msg=stage)


@pytest.mark.parametrize("width", [4, 16])
def test_a_model_with_full_attention_can_use_a_limited_context(width):
    model, _ = tp.load_nemo(LOCAL / "full.nemo")
    full, valid = encode_local_inputs(model)
    model.set_attention_context(width, width)
    out, _ = encode_local_inputs(model)
    truth = load_file(LOCAL / f"w{width}_{width}.safetensors")["encoder_out"]
    torch.testing.assert_close(out.last_hidden_state[valid], truth, atol=ENCODER_TOLERANCE, rtol=0)
    model.set_attention_context(-1, -1)
    back, _ = encode_local_inputs(model)
    assert torch.equal(back.last_hidden_state, full.last_hidden_state)


def test_a_model_with_local_attention_can_use_full_attention(tmp_path):
    source = CONFIGS / "long_transducer" / "model.nemo"
    features, mask = golden("long_transducer").features, golden("long_transducer").mask
    model, _ = tp.load_nemo(source)
    assert model.config.encoder_config.self_attention_model == "rel_pos_local_attn"
    model.set_attention_context(-1, -1)
    change = {"self_attention_model": "rel_pos", "att_context_size": [-1, -1]}
    full, _ = tp.load_nemo(edited_archive(source, tmp_path, settings=lambda tree: tree["encoder"].update(change)))
    with torch.no_grad():
        outputs = [m.encoder(features, attention_mask=mask).last_hidden_state for m in (model, full)]
    assert torch.equal(*outputs)
    tp.export_nemo(model, golden("long_transducer").processor, tmp_path / "full.nemo")
    assert tp.load_nemo(tmp_path / "full.nemo")[0].config.encoder_config.self_attention_model == "rel_pos"


def test_contexts_that_do_not_fit_the_style_are_refused():
    model = golden("nemotron").model
    with pytest.raises(ValueError, match=r"`left` a multiple of `right \+ 1`"):
        model.set_attention_context(70, 12)
    with pytest.raises(ValueError, match="`chunk` must be given if and only if"):
        model.set_attention_context(70, 6, chunk=2)
    with pytest.raises(ValueError, match="`chunk` must be given if and only if"):
        golden("unified").model.set_attention_context(70, 6)
    assert model.config.encoder_config.attention_context_size == [70, 13]


def test_only_models_with_ctc_weights_are_hybrids():
    assert not golden("tdt_v3").model.config.ctc_head
    assert golden("hybrid_tdt_ctc").model.config.ctc_head
    assert isinstance(golden("tdt_v3").model, tp.ParakeetForTDT)
    assert type(golden("nemotron").model) is tp.ParakeetForRNNT


def test_a_hybrid_class_without_its_head_is_refused(tmp_path):
    def drop(state):
        for key in [key for key in state if key.startswith("ctc_decoder.")]:
            del state[key]

    path = edited_archive(CONFIGS / "hybrid_tdt_ctc" / "model.nemo", tmp_path, weights=drop)
    with pytest.raises(tp.NemoError, match=r"must have a CTC head, but the file has no weights `ctc_decoder\.\*`"):
        tp.load_nemo(path)


def test_end_of_utterance_tokens_are_part_of_the_text():
    tokenizer = golden("eou").processor.tokenizer
    labels = len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens([labels - 2, labels - 1]) == ["<EOU>", "<EOB>"]
    assert "<EOU>" in tokenizer.decode([5, labels - 2], skip_special_tokens=True)


def test_an_empty_clip_in_a_batch_has_empty_text():
    loaded = golden("nemotron")
    features = loaded.processor.feature_extractor([loaded.waves[0], loaded.waves[0][:0]], sampling_rate=16000)
    out = loaded.model.generate(**features)
    assert features["attention_mask"].sum(-1)[1] == 0
    assert loaded.processor.batch_decode(out.sequences, skip_special_tokens=True)[1] == ""
    hidden = loaded.model.encoder(**features).last_hidden_state
    assert hidden.isfinite().all()
