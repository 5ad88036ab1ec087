"""Checks configurations: fields and defaults of stock transformers, round trips through files, and invalid values."""

import json

import pytest
from conftest import encoder_fields, run_stock
from transformers import configuration_utils

import transformers_parakeet as tp

NAMES = ["ParakeetEncoderConfig", "ParakeetCTCConfig", "ParakeetRNNTConfig", "ParakeetTDTConfig"]

# fields that stock transformers does not have
ADDED = {
    "spec_augment", "segment_separators", "segment_gap_threshold", "joint_hidden_size", "forced_blanks",
    "decoder_dropout", "joint_dropout", "loss_reduction", "fastemit_lambda", "ctc_head", "ctc_loss_weight",
    "ctc_loss_reduction", "ctc_zero_infinity", "loss_sigma", "loss_omega", "kernel", "nemo_config",
    "attention_context_size", "attention_context_sizes", "attention_context_style", "self_attention_model",
    "global_tokens", "global_tokens_spacing", "global_attn_separate", "conv_norm_type", "conv_context_size",
    "causal_downsampling", "residual_dropout", "stochastic_depth_mode", "stochastic_depth_start_layer",
}  # fmt: skip


def test_fields_and_defaults_equal_those_of_stock_transformers():
    printed = run_stock(
        f"""
        import json, transformers
        print(json.dumps({{n: getattr(transformers, n)().to_dict() for n in {NAMES}}}, default=str))
        """
    )
    for name, stock in json.loads(printed).items():
        ours = json.loads(json.dumps(getattr(tp, name)().to_dict(), default=str))
        if "encoder_config" in ours:
            ours["encoder_config"] = {key: ours["encoder_config"][key] for key in stock["encoder_config"]}
        assert {key: ours[key] for key in stock} == stock, name
        assert ours.keys() - stock.keys() <= ADDED, name


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_a_file(name, tmp_path):
    fields = encoder_fields() if name == "ParakeetEncoderConfig" else {"encoder_config": encoder_fields()}
    config = getattr(tp, name)(**fields)
    config.save_pretrained(tmp_path)
    again = getattr(tp, name).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    # a property must not be written as a field
    assert "inputs_to_logits_ratio" not in json.loads((tmp_path / "config.json").read_text())


def test_samples_per_frame_follow_the_subsampling_factor():
    config = tp.ParakeetCTCConfig(encoder_config=encoder_fields(subsampling_factor=4))
    assert config.inputs_to_logits_ratio == 640
    assert tp.ParakeetTDTConfig().inputs_to_logits_ratio == 1280


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("ParakeetEncoderConfig", {"hidden_size": 30, "num_attention_heads": 4}, "hidden_size"),
        ("ParakeetEncoderConfig", {"conv_kernel_size": 8}, "conv_kernel_size"),
        ("ParakeetEncoderConfig", {"subsampling_factor": 6}, "subsampling_factor"),
        ("ParakeetEncoderConfig", {"conv_norm_type": "instance_norm"}, "conv_norm_type"),
        ("ParakeetEncoderConfig", {"conv_context_size": [9, 0]}, "conv_context_size"),
        ("ParakeetEncoderConfig", {"attention_context_style": "chunked"}, "attention_context_style"),
        ("ParakeetEncoderConfig", {"attention_context_size": [-2, 1]}, "attention_context_size"),
        ("ParakeetEncoderConfig", {"attention_context_size": [1, 1, 1]}, "attention_context_size"),
        (
            "ParakeetEncoderConfig",
            {"attention_context_size": [70, 12], "attention_context_style": "chunked_limited"},
            "a multiple of `right \\+ 1`",
        ),
        (
            "ParakeetEncoderConfig",
            {"attention_context_size": [4, 0, 1], "attention_context_style": "chunked_limited_with_rc"},
            "at least 1 frame",
        ),
        (
            "ParakeetEncoderConfig",
            {"attention_context_size": [4, -1], "self_attention_model": "rel_pos_local_attn"},
            "attention_context_size",
        ),
        ("ParakeetEncoderConfig", {"global_tokens": 1}, "global_tokens"),
        ("ParakeetEncoderConfig", {"subsampling_conv_stride": 1}, "subsampling_conv_stride"),
        ("ParakeetRNNTConfig", {"blank_token_id": 8193}, "blank_token_id"),
        ("ParakeetRNNTConfig", {"max_symbols_per_step": 0}, "max_symbols_per_step"),
        ("ParakeetTDTConfig", {"durations": [0]}, "durations"),
        ("ParakeetTDTConfig", {"durations": [-1, 1]}, "durations"),
    ],
)
def test_an_invalid_value_is_named_in_the_error(name, fields, message):
    with pytest.raises(ValueError, match=message):
        getattr(tp, name)(**fields)


@pytest.mark.parametrize("name", NAMES[1:])
def test_nested_configurations_are_described_for_the_installed_release(name):
    config = getattr(tp, name)
    spec = getattr(configuration_utils, "SubConfigSpec", None)
    if spec is None:
        assert config.sub_configs == {"encoder_config": tp.ParakeetEncoderConfig}
    else:
        described = config.sub_configs_defaults["encoder_config"]
        assert type(described) is spec
        assert described.config_class is tp.ParakeetEncoderConfig
    assert config(encoder_config={"hidden_size": 64}).encoder_config.hidden_size == 64
