"""Descriptions of checkpoints without their weights, compared with the loaded models and with the YAML of NeMo."""

import shutil
import tarfile

import pytest
import torch
import yaml
from conftest import TESTS, ctc_model

import transformers_parakeet as tp
from transformers_parakeet import load_nemo
from transformers_parakeet.long_audio import DEFAULT_WINDOW_S, estimate_peak_memory
from transformers_parakeet.model_info import describe_config, read_model_info
from transformers_parakeet.nemo import load_config

REAL_CONFIGS = TESTS / "golden" / "real_configs"
NAMES = sorted(
    path.parent.name for path in REAL_CONFIGS.glob("*/model.nemo") if not path.parent.name.startswith("old_")
)
# models whose YAML has chunked attention and causal convolutions
CACHE_AWARE = {"eou", "nemotron", "streaming_ctc", "streaming_hybrid", "streaming_transducer"}
HYBRIDS = {"hybrid_rnnt_ctc", "hybrid_tdt_ctc", "streaming_hybrid", "tdt_ctc_1b"}


def read_yaml(name):
    """Return the settings in the `.nemo` file of a released configuration."""
    with tarfile.open(REAL_CONFIGS / name / "model.nemo") as tar:
        (member,) = [entry for entry in tar.getnames() if entry.endswith("model_config.yaml")]
        return yaml.safe_load(tar.extractfile(member).read())


@pytest.mark.parametrize("name", NAMES)
def test_the_description_of_a_nemo_file_is_that_of_its_yaml_and_of_the_loaded_model(name):
    path, settings = REAL_CONFIGS / name / "model.nemo", read_yaml(name)
    info = read_model_info(path)
    model, processor = load_nemo(path)
    encoder = settings["encoder"]
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.vocab_size == len(processor.tokenizer)
    assert (info.num_layers, info.hidden_size, info.num_heads) == (
        encoder["n_layers"],
        encoder["d_model"],
        encoder["n_heads"],
    )
    assert info.num_mel_bins == settings["preprocessor"]["features"]
    durations = settings.get("model_defaults", {}).get("tdt_durations")
    assert info.durations == (tuple(durations) if durations else None)
    assert info.is_local_attention == (encoder["self_attention_model"] == "rel_pos_local_attn")
    assert info.is_cache_aware == (name in CACHE_AWARE)
    assert ("ctc" in info.decoders) == (name in HYBRIDS or info.head == "CTC")
    assert ("transducer" in info.decoders) == (info.head != "CTC")
    assert info.nemo_export_error is None
    context = encoder["att_context_size"]
    contexts = context if isinstance(context[0], list) else [context]
    # NeMo does not read the context of this style: the model starts with full attention
    if info.attention_style != "chunked_limited_with_rc":
        assert info.trained_contexts == tuple(map(tuple, contexts))
        assert info.attention_context == tuple(contexts[0])


def test_a_configuration_is_read_without_weights(tmp_path, golden, monkeypatch):
    expected = load_nemo(golden / "hybrid_tdt_ctc" / "model.nemo")[0].config.to_dict()
    for name in ("config.json", "processor_config.json"):
        shutil.copy(tp.demo_model_path() / name, tmp_path)
    (tmp_path / "model.safetensors").touch()
    without_weights = load_config(tmp_path).to_dict()
    with_weights = load_nemo(tp.demo_model_path())[0].config.to_dict()
    # loading the model sets the dtype of the encoder, too
    without_weights["encoder_config"]["dtype"] = "float32"
    for fields in (without_weights, with_weights):
        fields.pop("_name_or_path")
    assert without_weights == with_weights

    def fail(*arguments):
        """Fail if weights are loaded."""
        raise AssertionError

    monkeypatch.setattr("transformers_parakeet.nemo.reader.load_weights", fail)
    config = load_config(golden / "hybrid_tdt_ctc" / "model.nemo")
    assert config.dtype == torch.float32
    fields = config.to_dict()
    assert fields.pop("dtype") == "float32"
    expected.pop("dtype")
    assert fields == expected


def test_memory_is_that_of_the_weights_and_of_the_planner():
    model, _ = ctc_model()
    info = describe_config(model.config, "model")
    size = sum(parameter.numel() for parameter in model.parameters())
    assert info.weight_bytes == {"float32": 4 * size, "bfloat16": 2 * size}
    assert info.peak_bytes[60.0] == estimate_peak_memory(model.config, 60 * 16000)
    assert info.peak_bytes[3600.0] == estimate_peak_memory(model.config, 3600 * 16000)
    assert info.window_peak_bytes == estimate_peak_memory(model.config, int(DEFAULT_WINDOW_S * 16000))
    model.config.dtype = torch.bfloat16
    half = describe_config(model.config, "model")
    assert half.dtype == "bfloat16"
    assert half.peak_bytes[3600.0] == estimate_peak_memory(model.config, 3600 * 16000, dtype_bytes=2)


def test_a_model_that_nemo_cannot_represent_says_why():
    model, _ = ctc_model(subsampling_conv_kernel_size=5)
    assert "subsampling_conv_kernel_size` must be 3" in describe_config(model.config, "model").nemo_export_error
