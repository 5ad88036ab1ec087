"""The table of settings: it is complete, the documentation shows it, and unknown keys are refused or named."""

import random
import string

import pytest
import torch
from conftest import TESTS
from nemo_files import edited_archive

import transformers_parakeet as tp
from transformers_parakeet.nemo.keys import SECTIONS, lookup, settings_table

ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
HYBRID = GOLDEN / "hybrid_tdt_ctc" / "model.nemo"
CONFIGS = GOLDEN / "real_configs"


def test_the_documentation_shows_the_table():
    text = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    # to write it again: python conversion/settings_table.py
    assert settings_table() in text


def test_no_key_has_two_uses():
    for name, section in SECTIONS.items():
        keys = [*section.read.split(), *section.ignored.split(), *section.only, *section.refused]
        assert sorted(keys) == sorted(set(keys)), name


def random_settings(seed):
    """A section, a key that no file has, and a value of any type."""
    generator = random.Random(seed)
    section = generator.choice(list(SECTIONS))
    key = "x_" + "".join(generator.choices(string.ascii_lowercase, k=8))
    value = generator.choice([None, 0, 1.5, True, "text", [1, 2], {"a": 1}, "${oc.env:HOME}"])
    return section, key, value


@pytest.mark.parametrize("seed", range(60))
def test_a_random_key_is_refused_or_named(seed, tmp_path, caplog):
    section, key, value = random_settings(seed)
    setting = f"{section}.{key}".removeprefix(".")

    def change(tree):
        for part in section.split(".") if section else ():
            tree[part] = tree = tree.get(part) or {}
        tree[key] = value

    path = edited_archive(HYBRID, tmp_path, settings=change)
    if SECTIONS[section].strict:
        with pytest.raises(tp.NemoError, match=setting):
            tp.load_nemo(path)
    else:
        with caplog.at_level("WARNING"):
            model, _ = tp.load_nemo(path)
        (message,) = caplog.messages
        assert message.endswith(f"ignored: {setting}")
        expected = tp.load_nemo(HYBRID)[0].state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_every_section_is_tried():
    tried = {random_settings(seed)[0] for seed in range(60)}
    assert {name for name in SECTIONS if name not in tried} <= {"test_ds", "optim", "trainer"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "nemo.x.EncDecRNNTBPEModelWithPrompt"}, "takes a prompt"),
        ({"target": "nemo.x.EncDecHybridRNNTCTCBPEModelWithPrompt"}, "takes a prompt"),
        ({"target": "nemo.x.EncDecMultiTalkerRNNTBPEModel"}, "multi-talker"),
        ({"target": "nemo.x.EncDecMultiTaskModel"}, "multitask model such as Canary"),
        ({"target": "nemo.x.EncDecCTCModel"}, "characters without a tokenizer"),
        ({"target": "nemo.x.SomethingElse"}, "implemented is only EncDecCTCModelBPE or"),
        ({"num_prompts": 128}, "takes a prompt"),
        ({"spk_kernel_type": "ff"}, "multi-talker"),
    ],
)
def test_models_of_other_kinds_are_named(change, words, tmp_path):
    path = edited_archive(CONFIGS / "nemotron" / "model.nemo", tmp_path, settings=lambda tree: tree.update(change))
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
def test_sections_of_other_models_are_named(section, key, words, tmp_path):
    def change(tree):
        tree[section][key] = ["en"]

    path = edited_archive(CONFIGS / "nemotron" / "model.nemo", tmp_path, settings=change)
    with pytest.raises(tp.NemoError, match=words):
        tp.load_nemo(path)


@pytest.mark.parametrize(
    ("prefix", "words"), [("spk_kernels.0.1.weight", "multi-talker"), ("prompt_kernel.0.weight", "takes a prompt")]
)
def test_weights_of_other_models_are_named(prefix, words, tmp_path):
    path = edited_archive(
        CONFIGS / "nemotron" / "model.nemo",
        tmp_path,
        weights=lambda state: state.update({prefix: torch.ones(2)}),
    )
    with pytest.raises(tp.NemoError, match=words):
        tp.load_nemo(path)


@pytest.mark.parametrize(
    "setting", ["encoder.d_model", "encoder.n_layers", "encoder.n_heads", "encoder.feat_in", "encoder.conv_kernel_size",
                "decoder.prednet.pred_hidden", "decoder.prednet.pred_rnn_layers", "joint.jointnet.joint_hidden"]
)  # fmt: skip
def test_missing_sizes_come_from_the_weights(setting, tmp_path):
    *sections, key = setting.split(".")
    path = edited_archive(HYBRID, tmp_path, settings=lambda tree: lookup(tree, ".".join(sections)).pop(key))
    assert tp.load_nemo(path)[0].config.to_diff_dict().keys() == tp.load_nemo(HYBRID)[0].config.to_diff_dict().keys()
    with pytest.raises(tp.NemoError, match=rf"`{setting}` is 1000000000, but the weights have"):
        tp.load_nemo(
            edited_archive(
                HYBRID, tmp_path, settings=lambda tree: lookup(tree, ".".join(sections)).update({key: 10**9})
            )
        )


def test_a_window_in_samples(tmp_path):
    def change(tree):
        del tree["preprocessor"]["window_size"], tree["preprocessor"]["window_stride"]
        tree["preprocessor"].update(n_window_size=320, n_window_stride=160)

    _, processor = tp.load_nemo(edited_archive(HYBRID, tmp_path, settings=change))
    assert processor.feature_extractor.win_length == 320
    with pytest.raises(tp.NemoError, match="are both given"):
        tp.load_nemo(
            edited_archive(HYBRID, tmp_path, settings=lambda tree: tree["preprocessor"].update(n_window_size=320))
        )


def test_an_unknown_loss_is_only_named(tmp_path, caplog):
    path = edited_archive(HYBRID, tmp_path, settings=lambda tree: tree["loss"].update(loss_name="graph_rnnt"))
    with caplog.at_level("WARNING"):
        tp.load_nemo(path)
    assert caplog.messages[0].endswith("ignored: loss.loss_name")
