"""Translates names of weights, infers missing sizes from the shapes of the weights, and converts the dtype of weights.

`archive.py` reads the weights, and `reader.py` loads them into a model.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ..quantization_parakeet import release_file_pages
from .archive import SETTINGS_FILE, NemoError
from .fields import MULTI_TALKER_MODEL, NEEDS_NEMO, PROMPT_MODEL
from .settings import Settings, find_setting

# Pairs of NeMo's name and our name. A placeholder stands for the same text in both names. Two placeholders occur only
# in NeMo's names: {ctc} is `ctc_` in a hybrid and empty otherwise; {head} is the index of the output layer in
# `joint_net`, which is 2 if a dropout layer precedes the output layer, and 1 otherwise.
NAME_TEMPLATES = (
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
# placeholder -> regular expression that matches the text of the placeholder
PLACEHOLDER_PATTERNS = {
    "n": r"\d+", "w": "weight|bias", "name": r"\w+", "i": "[12]", "j": "[12]", "qkv": "[qkv]", "uv": "[uv]",
    "point": "pointwise", "head": "[12]", "ctc": "(?:ctc_)?",
}  # fmt: skip

# buffers of NeMo's feature extractor: the window and the mel filters; our feature extractor computes them
FEATURE_BUFFER_KEYS = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb")

# prefix of the name of an unsupported weight -> description of the models that have the weight
UNSUPPORTED_WEIGHTS = {
    "spk_kernels.": MULTI_TALKER_MODEL,
    "bg_spk_kernels.": MULTI_TALKER_MODEL,
    "prompt_kernel.": PROMPT_MODEL,
}

# setting that contains a size -> name of a weight and the axis that has the size
SIZE_SOURCES = {
    "encoder.d_model": ("encoder.pre_encode.out.weight", 0),
    "encoder.feat_in": ("preprocessor.featurizer.fb", 1),
    "encoder.subsampling_conv_channels": ("encoder.pre_encode.conv.0.weight", 0),
    "encoder.n_heads": ("encoder.layers.0.self_attn.pos_bias_u", 0),
    "encoder.conv_kernel_size": ("encoder.layers.0.conv.depthwise_conv.weight", 2),
    "decoder.prednet.pred_hidden": ("decoder.prediction.embed.weight", 1),
    "joint.jointnet.joint_hidden": ("joint.enc.weight", 0),
}
# setting that contains a number of layers -> pattern of weight names; group 1 is the index of the layer
LAYER_NAME_PATTERNS = {
    "encoder.n_layers": r"encoder\.layers\.(\d+)\..*",
    "decoder.prednet.pred_rnn_layers": r"decoder\.prediction\.dec_rnn\.lstm\.weight_ih_l(\d+)",
}


@cache
def compile_name_pattern(template: str) -> re.Pattern[str]:
    r"""Compile a name template to a regular expression with one named group per placeholder.

    For example, `joint.enc.{w}` becomes `joint\.enc\.(?P<w>weight|bias)`.

    Args:
        template: name of a weight with placeholders in braces.
    """
    pattern = ""
    # `re.split` with a group alternates between literal text and the name of a placeholder
    for index, token in enumerate(re.split(r"\{(\w+)\}", template)):
        is_placeholder = index % 2 == 1
        pattern += f"(?P<{token}>{PLACEHOLDER_PATTERNS[token]})" if is_placeholder else re.escape(token)
    return re.compile(pattern)


def convert_nemo_name(nemo_name: str) -> str:
    """Convert the name of a weight in NeMo to the name in this package.

    Args:
        nemo_name: name of the weight in the state dict of NeMo.

    Raises:
        NemoError: the weight is not part of a supported model.
    """
    for nemo_template, template in NAME_TEMPLATES:
        match = compile_name_pattern(nemo_template).fullmatch(nemo_name)
        if match:
            return template.format(**match.groupdict())
    for prefix, description in UNSUPPORTED_WEIGHTS.items():
        if nemo_name.startswith(prefix):
            raise NemoError(f"the weight {nemo_name!r} belongs to {description}: {NEEDS_NEMO}")
    advice = "merge or remove the adapters in NeMo and save again" if "adapter" in nemo_name else NEEDS_NEMO
    raise NemoError(f"the weight {nemo_name!r} is not part of a supported model: {advice}")


def to_nemo_name(name: str, *, is_transducer: bool, has_joint_dropout: bool) -> str:
    """Translate our name of a weight to NeMo's name.

    Args:
        name: our name, a key of the model's state dict.
        is_transducer: whether the model is a transducer. NeMo calls the CTC head `ctc_decoder` in a transducer, and
            `decoder` in a CTC model.
        has_joint_dropout: whether the joint network has a dropout layer, which increases the index of the output layer
            from 1 to 2.

    Raises:
        NemoError: NeMo has no corresponding weight.
    """
    ctc_prefix = "ctc_" if is_transducer else ""
    output_layer_index = "2" if has_joint_dropout else "1"
    for nemo_template, template in NAME_TEMPLATES:
        match = compile_name_pattern(template).fullmatch(name)
        if match:
            return nemo_template.format(**match.groupdict(), ctc=ctc_prefix, head=output_layer_index)
    raise NemoError(f"NeMo has no weight for {name!r}: merge adapters (PEFT: `merge_and_unload()`) first")


def fill_missing_sizes(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a copy of the settings in which missing sizes are inferred from the shapes of the weights.

    A size in the settings must agree with the weights. The check runs before the model is built, so a damaged file
    cannot exhaust the memory.

    Args:
        settings: resolved settings of the `.nemo` file.
        shapes: NeMo's name of each weight -> shape of the weight.

    Raises:
        NemoError: a size in the settings differs from the shape of a weight.
    """
    sizes = infer_sizes(shapes)
    filled_settings = copy.deepcopy(dict(settings))
    for setting, size in sizes.items():
        section_name, _, key = setting.rpartition(".")
        section = find_setting(filled_settings, section_name)
        if not isinstance(section, dict):
            continue
        value = section.get(key)
        # NeMo uses the placeholders 0 and -1 for an unknown size
        if value is None or value in (0, -1):
            section[key] = size
        elif value != size:
            raise NemoError(f"`{setting}` is {value!r}, but the weights have {size}: correct it in {SETTINGS_FILE}")
    return filled_settings


def infer_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Infer layer widths and numbers of layers from the weights.

    Args:
        shapes: NeMo's name of each weight -> shape of the weight.

    Returns:
        Dotted path of the setting -> size. Sizes of weights that do not exist are omitted.
    """
    sizes = {
        setting: shapes[weight_name][axis]
        for setting, (weight_name, axis) in SIZE_SOURCES.items()
        if len(shapes.get(weight_name, ())) > axis
    }
    for setting, pattern in LAYER_NAME_PATTERNS.items():
        layer_indices = {match[1] for weight_name in shapes if (match := re.fullmatch(pattern, weight_name))}
        sizes[setting] = len(layer_indices)
    return sizes


def convert_weights(model: Any, dtype: torch.dtype) -> None:
    """Convert the weights of a model that was just loaded, one after another, to another dtype.

    `from_pretrained(..., dtype=dtype)` gives the same weights, but keeps the whole mapped file in memory beside them.

    Args:
        model: model whose weights are mapped from a file; changed in place.
        dtype: dtype of the weights.
    """
    for parameter in model.parameters():
        weight = parameter.data
        # int8 weights keep their dtype
        if weight.is_floating_point() and weight.dtype != dtype:
            parameter.data = weight.to(dtype)
            # each release reads the list of mapped files; vectors are less than 1 % of the memory
            if weight.ndim > 1:
                release_file_pages(weight)
    # the buffers
    model.to(dtype)
    for config in (model.config, model.config.encoder_config):
        config.dtype = dtype
