"""The table of fields: every row is read from settings and written back to the same settings."""

import inspect

import pytest
from conftest import TESTS
from nemo_files import edited_archive, members, set_setting

import transformers_parakeet as tp
from transformers_parakeet.nemo.fields import ENCODER_FIELDS, EXTRACTOR_FIELDS, MODEL_FIELDS
from transformers_parakeet.nemo.settings import find_setting, parse_settings, resolve_interpolations
from transformers_parakeet.nemo.writer import list_fields_with_owners

GOLDEN = TESTS / "golden"
FILES = [GOLDEN / name / "model.nemo" for name in ("ctc", "rnnt", "tdt", "hybrid_tdt_ctc")]
FILES += sorted((GOLDEN / "real_configs").glob("*/model.nemo"))


def test_every_row_names_a_field_that_exists():
    assert {field.name for field in ENCODER_FIELDS} <= vars(tp.ParakeetEncoderConfig()).keys()
    model_names = vars(tp.ParakeetTDTConfig()).keys() | vars(tp.ParakeetCTCConfig()).keys()
    assert {field.name for field in MODEL_FIELDS} - {None} <= model_names
    assert {field.name for field in EXTRACTOR_FIELDS} <= inspect.signature(
        tp.ParakeetFeatureExtractor
    ).parameters.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_row_writes_the_value_that_was_read(path):
    model, processor = tp.load_nemo(path)
    (content,) = [content for name, content in members(path).items() if name.endswith("model_config.yaml")]
    settings = resolve_interpolations(parse_settings(content))
    for field, owner in list_fields_with_owners(model.config, processor.feature_extractor):
        value = find_setting(settings, field.setting)
        # a missing setting, or one of the spellings that NeMo has for the same value, is not repeated
        if value not in (None, -1, 0, "causal") and field.name != "normalize":
            written = field.get_nemo_value(owner, settings)
            assert field.read is not None or written == value, field.setting
            assert field.get_value_from_owner(owner) == field.get_value_from_settings(settings), field.setting


# setting -> a value that differs from that of the golden hybrid, and the field with its value
CHANGES = {
    "encoder.dropout_emb": (0.25, "dropout_positions", 0.25),
    "encoder.pos_emb_max_len": (6000, "max_position_embeddings", 6000),
    "encoder.conv_context_size": ([6, 2], "conv_context_size", [6, 2]),
    "encoder.stochastic_depth_mode": ("uniform", "stochastic_depth_mode", "uniform"),
    "encoder.att_context_size": ([[7, 7], [3, 3]], "attention_context_sizes", [[7, 7], [3, 3]]),
    "decoding.segment_gap_threshold": (9, "segment_gap_threshold", 9),
    "loss.tdt_kwargs.fastemit_lambda": (0.01, "fastemit_lambda", 0.01),
    "aux_ctc.ctc_reduction": ("sum", "ctc_loss_reduction", "sum"),
    "joint.jointnet.activation": ("tanh", "hidden_act", "tanh"),
}


@pytest.mark.parametrize("setting", CHANGES)
def test_a_setting_survives_reading_and_a_new_export(setting, tmp_path):
    value, name, field_value = CHANGES[setting]
    source = GOLDEN / "hybrid_tdt_ctc" / "model.nemo"
    model, processor = tp.load_nemo(edited_archive(source, tmp_path, settings=set_setting(setting, value)))
    config = model.config.encoder_config if setting.startswith("encoder.") else model.config
    assert getattr(config, name) == field_value
    # without the original settings, the value comes from the table
    model.config.nemo_config = None
    tp.export_nemo(model, processor, tmp_path / "exported.nemo")
    settings = parse_settings(members(tmp_path / "exported.nemo")["./model_config.yaml"])
    assert find_setting(settings, setting) == value
