"""The sections of known settings: documentation, unknown keys, and models that are not implemented."""

import importlib.util
import random
import string

import pytest
import torch
from conftest import TESTS
from nemo_files import edited_archive, set_setting

import transformers_parakeet as tp
from transformers_parakeet.nemo.keys import SECTIONS
from transformers_parakeet.nemo.settings import find_setting

ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
HYBRID = GOLDEN / "hybrid_tdt_ctc" / "model.nemo"
CONFIGS = GOLDEN / "real_configs"


def load_script(path):
    """Import a script that is not part of the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documentation_shows_the_table_of_settings():
    text = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    # to update the page: python conversion/settings_table.py
    assert load_script(ROOT / "conversion" / "settings_table.py").settings_table() in text


def test_a_key_is_either_read_or_ignored_or_refused():
    for name, section in SECTIONS.items():
        keys = [*section.allowed_values, *section.ignored, *section.refused]
        assert sorted(keys) == sorted(set(keys)), name


def random_setting(seed):
    """Return a random section, an unknown key, and a value of a random type."""
    generator = random.Random(seed)
    section = generator.choice(list(SECTIONS))
    key = "x_" + "".join(generator.choices(string.ascii_lowercase, k=8))
    value = generator.choice([None, 0, 1.5, True, "text", [1, 2], {"a": 1}, "${oc.env:HOME}"])
    return section, key, value


@pytest.mark.parametrize("seed", range(60))
def test_an_unknown_key_is_refused_or_named_in_a_warning(seed, tmp_path, caplog):
    section, key, value = random_setting(seed)
    setting = f"{section}.{key}".removeprefix(".")

    def change(settings):
        for name in section.split(".") if section else ():
            settings[name] = settings = settings.get(name) or {}
        settings[key] = value

    path = edited_archive(HYBRID, tmp_path, settings=change)
    if SECTIONS[section].is_strict:
        with pytest.raises(tp.NemoError, match=setting):
            tp.load_nemo(path)
    else:
        with caplog.at_level("WARNING"):
            model, _ = tp.load_nemo(path)
        (message,) = caplog.messages
        assert message.endswith(f"ignored: {setting}")
        expected = tp.load_nemo(HYBRID)[0].state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_the_random_settings_cover_the_sections():
    sections = {random_setting(seed)[0] for seed in range(60)}
    assert {name for name in SECTIONS if name not in sections} <= {"test_ds", "optim", "trainer"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "nemo.x.EncDecRNNTBPEModelWithPrompt"}, "takes a prompt"),
        ({"target": "nemo.x.EncDecHybridRNNTCTCBPEModelWithPrompt"}, "takes a prompt"),
        ({"target": "nemo.x.EncDecMultiTalkerRNNTBPEModel"}, "multi-talker"),
        ({"target": "nemo.x.EncDecMultiTaskModel"}, "multitask model such as Canary"),
        ({"target": "nemo.x.EncDecCTCModel"}, "character model without a tokenizer"),
        ({"target": "nemo.x.SomethingElse"}, "must be EncDecCTCModelBPE or"),
        ({"num_prompts": 128}, "takes a prompt"),
        ({"spk_kernel_type": "ff"}, "multi-talker"),
    ],
)
def test_the_error_describes_a_model_class_that_is_not_implemented(change, words, tmp_path):
    path = edited_archive(
        CONFIGS / "nemotron" / "model.nemo", tmp_path, settings=lambda settings: settings.update(change)
    )
    with pytest.raises(tp.NemoError, match=words):
        tp.load_nemo(path)


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("decoder", "multisoftmax", "multi-softmax"),
        ("joint", "language_keys", "multi-softmax"),
        ("tokenizer", "custom_tokenizer", "such as Canary"),
    ],
)
def test_the_error_describes_the_model_that_a_setting_belongs_to(section, key, words, tmp_path):
    def change(settings):
        settings[section][key] = ["en"]

    path = edited_archive(CONFIGS / "nemotron" / "model.nemo", tmp_path, settings=change)
    with pytest.raises(tp.NemoError, match=words):
        tp.load_nemo(path)


@pytest.mark.parametrize(
    ("prefix", "words"), [("spk_kernels.0.1.weight", "multi-talker"), ("prompt_kernel.0.weight", "takes a prompt")]
)
def test_the_error_describes_the_model_that_a_weight_belongs_to(prefix, words, tmp_path):
    path = edited_archive(
        CONFIGS / "nemotron" / "model.nemo",
        tmp_path,
        weights=lambda state_dict: state_dict.update({prefix: torch.ones(2)}),
    )
    with pytest.raises(tp.NemoError, match=words):
        tp.load_nemo(path)


@pytest.mark.parametrize(
    "setting", ["encoder.d_model", "encoder.n_layers", "encoder.n_heads", "encoder.feat_in", "encoder.conv_kernel_size",
                "decoder.prednet.pred_hidden", "decoder.prednet.pred_rnn_layers", "joint.jointnet.joint_hidden"]
)  # fmt: skip
def test_a_missing_size_is_read_from_the_weights(setting, tmp_path):
    *sections, key = setting.split(".")
    section = ".".join(sections)
    path = edited_archive(HYBRID, tmp_path, settings=lambda settings: find_setting(settings, section).pop(key))
    config, expected = tp.load_nemo(path)[0].config.to_dict(), tp.load_nemo(HYBRID)[0].config.to_dict()
    assert {**config, "nemo_config": None} == {**expected, "nemo_config": None}
    with pytest.raises(tp.NemoError, match=rf"`{setting}` is 1000000000, but the weights have"):
        tp.load_nemo(edited_archive(HYBRID, tmp_path, settings=set_setting(setting, 10**9)))


def test_window_lengths_can_be_given_in_samples(tmp_path):
    def change(settings):
        del settings["preprocessor"]["window_size"], settings["preprocessor"]["window_stride"]
        settings["preprocessor"].update(n_window_size=320, n_window_stride=160)

    _, processor = tp.load_nemo(edited_archive(HYBRID, tmp_path, settings=change))
    assert processor.feature_extractor.win_length == 320
    with pytest.raises(
        tp.NemoError, match=r"only one of `preprocessor\.window_size` and `preprocessor\.n_window_size`"
    ):
        tp.load_nemo(edited_archive(HYBRID, tmp_path, settings=set_setting("preprocessor.n_window_size", 320)))


def test_an_unknown_loss_is_named_in_a_warning(tmp_path, caplog):
    path = edited_archive(HYBRID, tmp_path, settings=set_setting("loss.loss_name", "graph_rnnt"))
    with caplog.at_level("WARNING"):
        tp.load_nemo(path)
    assert caplog.messages[0].endswith("ignored: loss.loss_name")
