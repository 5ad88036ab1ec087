"""Names of weights, translated to this package and back to NeMo."""

import pytest
import torch
from conftest import TESTS
from nemo_files import members

from transformers_parakeet import NemoError
from transformers_parakeet.nemo.archive import Archive
from transformers_parakeet.nemo.settings import find_setting, parse_settings, resolve_interpolations
from transformers_parakeet.nemo.weights import FEATURE_BUFFER_KEYS, convert_nemo_name, fill_missing_sizes, to_nemo_name

GOLDEN = TESTS / "golden"
FILES = [GOLDEN / name / "model.nemo" for name in ("ctc", "rnnt", "tdt", "hybrid_tdt_ctc")]
FILES += sorted((GOLDEN / "real_configs").glob("*/model.nemo"))


def read_settings(path):
    """Return the resolved settings of a `.nemo` file."""
    (content,) = [content for name, content in members(path).items() if name.endswith("model_config.yaml")]
    return resolve_interpolations(parse_settings(content))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_name_is_translated_and_translated_back(path):
    settings = read_settings(path)
    options = {
        "is_transducer": "joint" in settings,
        "has_joint_dropout": bool(find_setting(settings, "joint.jointnet.dropout")),
    }
    nemo_names = [name for name in Archive(path).read_weights() if name not in FEATURE_BUFFER_KEYS]
    names = [convert_nemo_name(name) for name in nemo_names]
    assert len(set(names)) == len(names)
    assert [to_nemo_name(name, **options) for name in names] == nemo_names


@pytest.mark.parametrize("name", ["encoder.layers.0.unknown.weight", "encoder.layers.x.norm_out.weight", "joint.enc"])
def test_an_unknown_name_is_refused_in_both_directions(name):
    with pytest.raises(NemoError, match="is not part of a supported model"):
        convert_nemo_name(name)
    with pytest.raises(NemoError, match="NeMo has no weight for"):
        to_nemo_name(name, is_transducer=True, has_joint_dropout=False)


def test_sizes_of_zero_and_minus_one_are_read_from_the_weights():
    settings = {"encoder": {"d_model": -1, "n_layers": 0}, "decoder": {}}
    shapes = {
        "encoder.pre_encode.out.weight": torch.Size([48, 96]),
        "encoder.layers.0.norm_out.bias": torch.Size([48]),
        "encoder.layers.1.norm_out.bias": torch.Size([48]),
    }
    filled = fill_missing_sizes(settings, shapes)
    assert (filled["encoder"]["d_model"], filled["encoder"]["n_layers"]) == (48, 2)
    assert settings["encoder"]["d_model"] == -1
