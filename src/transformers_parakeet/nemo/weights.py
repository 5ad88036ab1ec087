"""Translates names of weights between NeMo and this package, and reads missing sizes from the shapes of the weights.

The weights are read by `archive.py` and put into a model by `reader.py`.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from .archive import SETTINGS, NemoError
from .fields import MULTI_TALKER, NEEDS_NEMO, PROMPT
from .settings import Settings, find_setting

# NeMo's name of a weight, and ours. A placeholder stands for the same text in both. Two occur in NeMo's names only:
# {ctc} is `ctc_` in a hybrid, and {head} is the index of the output layer, which follows an optional dropout layer
NAMES = (
    ("encoder.pre_encode.conv.{n}.{w}", "encoder.subsampling.layers.{n}.{w}"),
    ("encoder.pre_encode.out.{w}", "encoder.subsampling.linear.{w}"),
    ("encoder.layers.{n}.norm_{name}.{w}", "encoder.layers.{n}.norm_{name}.{w}"),
    ("encoder.layers.{n}.feed_forward{i}.linear{j}.{w}", "encoder.layers.{n}.feed_forward{i}.linear{j}.{w}"),
    ("encoder.layers.{n}.self_attn.linear_{qkv}.{w}", "encoder.layers.{n}.self_attn.{qkv}_proj.{w}"),
    ("encoder.layers.{n}.self_attn.global_{qkv}.{w}", "encoder.layers.{n}.self_attn.global_{qkv}_proj.{w}"),
    ("encoder.layers.{n}.self_attn.linear_out.{w}", "encoder.layers.{n}.self_attn.o_proj.{w}"),
    ("encoder.layers.{n}.self_attn.linear_pos.weight", "encoder.layers.{n}.self_attn.relative_k_proj.weight"),
    ("encoder.layers.{n}.self_attn.pos_bias_{uv}", "encoder.layers.{n}.self_attn.bias_{uv}"),
    ("encoder.layers.{n}.conv.{point}_conv{i}.{w}", "encoder.layers.{n}.conv.{point}_conv{i}.{w}"),
    ("encoder.layers.{n}.conv.depthwise_conv.{w}", "encoder.layers.{n}.conv.depthwise_conv.{w}"),
    ("encoder.layers.{n}.conv.batch_norm.{name}", "encoder.layers.{n}.conv.norm.{name}"),
    ("decoder.prediction.embed.weight", "decoder.embedding.weight"),
    ("decoder.prediction.dec_rnn.lstm.{name}", "decoder.lstm.{name}"),
    ("joint.enc.{w}", "encoder_projector.{w}"),
    ("joint.pred.{w}", "decoder.decoder_projector.{w}"),
    ("joint.joint_net.{head}.{w}", "joint.head.{w}"),
    ("{ctc}decoder.decoder_layers.0.{w}", "ctc_head.{w}"),
)
# placeholder -> regular expression of the text that it stands for
PLACEHOLDERS = {
    "n": r"\d+", "w": "weight|bias", "name": r"\w+", "i": "[12]", "j": "[12]", "qkv": "[qkv]", "uv": "[uv]",
    "point": "pointwise", "head": "[12]", "ctc": "(?:ctc_)?",
}  # fmt: skip

# buffers of NeMo's feature extractor, which ours computes: the window, then the mel filters
FEATURE_BUFFER_KEYS = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb")

# prefix of a weight's name -> description of the model that it belongs to
UNSUPPORTED_WEIGHTS = {"spk_kernels.": MULTI_TALKER, "bg_spk_kernels.": MULTI_TALKER, "prompt_kernel.": PROMPT}

# setting of a size -> weight and axis that have this size
SIZES = {
    "encoder.d_model": ("encoder.pre_encode.out.weight", 0),
    "encoder.feat_in": ("preprocessor.featurizer.fb", 1),
    "encoder.subsampling_conv_channels": ("encoder.pre_encode.conv.0.weight", 0),
    "encoder.n_heads": ("encoder.layers.0.self_attn.pos_bias_u", 0),
    "encoder.conv_kernel_size": ("encoder.layers.0.conv.depthwise_conv.weight", 2),
    "decoder.prednet.pred_hidden": ("decoder.prediction.embed.weight", 1),
    "joint.jointnet.joint_hidden": ("joint.enc.weight", 0),
}
# setting of a number of layers -> weights that have the index of the layer in their name
LAYERS = {
    "encoder.n_layers": r"encoder\.layers\.(\d+)\..*",
    "decoder.prednet.pred_rnn_layers": r"decoder\.prediction\.dec_rnn\.lstm\.weight_ih_l(\d+)",
}


@cache
def name_pattern(template: str) -> re.Pattern[str]:
    r"""Return the regular expression that matches the names of a template, with one named group per placeholder.

    `joint.enc.{w}` becomes `joint\.enc\.(?P<w>weight|bias)`.
    """
    pattern = ""
    # with a group in the pattern, `re.split` returns text and placeholders in turn
    for index, part in enumerate(re.split(r"\{(\w+)\}", template)):
        is_placeholder = index % 2 == 1
        pattern += f"(?P<{part}>{PLACEHOLDERS[part]})" if is_placeholder else re.escape(part)
    return re.compile(pattern)


def from_nemo_name(nemo_name: str) -> str:
    """Return our name of a weight for NeMo's name.

    Raises:
        NemoError: the weight belongs to a part that is not implemented.
    """
    for nemo_template, template in NAMES:
        match = name_pattern(nemo_template).fullmatch(nemo_name)
        if match:
            return template.format(**match.groupdict())
    for prefix, description in UNSUPPORTED_WEIGHTS.items():
        if nemo_name.startswith(prefix):
            raise NemoError(f"the weight {nemo_name!r} belongs to {description}: {NEEDS_NEMO}")
    advice = "merge or remove the adapters in NeMo and save again" if "adapter" in nemo_name else NEEDS_NEMO
    raise NemoError(f"the weight {nemo_name!r} belongs to no part that is implemented here: {advice}")


def to_nemo_name(name: str, *, is_transducer: bool, has_joint_dropout: bool) -> str:
    """Return NeMo's name of a weight for our name.

    Args:
        name: key of our state dict.
        is_transducer: `decoder` is the prediction network of the model, so NeMo calls its CTC head `ctc_decoder`.
        has_joint_dropout: the joint network has a dropout layer, which moves the index of its output layer by one.

    Raises:
        NemoError: NeMo has no such weight.
    """
    ctc, head = "ctc_" if is_transducer else "", "2" if has_joint_dropout else "1"
    for nemo_template, template in NAMES:
        match = name_pattern(template).fullmatch(name)
        if match:
            return nemo_template.format(**match.groupdict(), ctc=ctc, head=head)
    raise NemoError(f"NeMo has no weight for {name!r}: merge adapters (PEFT: `merge_and_unload()`) first")


def fill_missing_sizes(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a copy of the settings with every size that the weights determine.

    Sizes are compared with the weights before a model is built, so that a damaged file cannot exhaust the memory.

    Args:
        settings: the resolved settings.
        shapes: shapes of the weights by NeMo's names.

    Raises:
        NemoError: a size in the settings differs from the size of the weights.
    """
    sizes = {setting: shapes[key][axis] for setting, (key, axis) in SIZES.items() if len(shapes.get(key, ())) > axis}
    for setting, pattern in LAYERS.items():
        layer_indices = {match[1] for key in shapes if (match := re.fullmatch(pattern, key))}
        sizes[setting] = len(layer_indices)
    filled = copy.deepcopy(dict(settings))
    for setting, size in sizes.items():
        section_name, _, key = setting.rpartition(".")
        section = find_setting(filled, section_name)
        if not isinstance(section, dict):
            continue
        value = section.get(key)
        # NeMo's templates have 0 or -1 for a size that is not known yet
        if value is None or value in (0, -1):
            section[key] = size
        elif value != size:
            raise NemoError(f"`{setting}` is {value!r}, but the weights have {size}: correct it in {SETTINGS}")
    return filled
