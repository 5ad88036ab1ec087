"""The settings of `.nemo` files: reads and writes their YAML, and translates them to the fields of a configuration.

Which settings are refused is in `nemo_keys.py`, the way back in `nemo_export.py`, weights in `nemo.py`.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from ..configuration_parakeet import HOP_LENGTH
from ..losses import REDUCTIONS
from .archive import SETTINGS, NemoError
from .keys import ELSE, MODEL_CLASSES, last_name, lookup, refuse

# a YAML tree may have so many nodes once interpolations are resolved, and a string so many characters
MAX_NODES, MAX_STRING = 1_000_000, 100_000
# and so many levels, interpolations that lead to one another included
MAX_DEPTH = 100


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # chosen at run time
    """Safe YAML with the scalars of OmegaConf, which NeMo uses: `1e-5` is a number, a date is text."""


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # chosen at run time
    """Writes what `Loader` reads: text that looks like a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal lists out in full, as NeMo does."""
        return True


# YAML 1.2 numbers: https://yaml.org/spec/1.2.2/#10214-floating-point
EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for scalars in (Loader, Dumper):
    scalars.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in scalars.yaml_implicit_resolvers.items()
    }
    scalars.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))
# these are text, but OmegaConf quotes them as YAML 1.1 wants
Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("[yYnN]$"), list("yYnN"))


def parse_settings(content: bytes) -> dict[str, Any]:
    """Read the YAML file; return its model section, with `cls` and `params` of old files in the layout of new ones.

    Raises:
        NemoError: it is no YAML, or holds no settings.
    """
    try:
        settings = yaml.load(content, Loader)  # a safe loader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise NemoError(f"{SETTINGS} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise NemoError(f"{SETTINGS} must hold settings by name, it holds {type(settings).__name__}")
    root = settings.get("model", settings) if "encoder" not in settings else settings
    if not isinstance(root, dict):
        raise NemoError(f"`model` in {SETTINGS} must hold settings by name, it holds {type(root).__name__}")
    return modern_layout(root)


def modern_layout(section: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Replace `cls` and `params`, which NeMo wrote before version 1.0, by `_target_` and the parameters beside it."""
    if depth > MAX_DEPTH:
        raise NemoError(f"{SETTINGS} is too deep")
    if isinstance(section.get("params"), dict) and "cls" in section:
        own = {key: value for key, value in section.items() if key not in ("cls", "params")}
        section = {"_target_": section["cls"], **section["params"], **own}
    return {
        key: modern_layout(value, depth + 1) if isinstance(value, dict) else value for key, value in section.items()
    }


def dump_settings(settings: Mapping[str, Any]) -> bytes:
    """Return settings as the YAML that NeMo reads."""
    return bytes(yaml.dump(dict(settings), None, Dumper, allow_unicode=True, sort_keys=False, encoding="utf-8"))


class Resolver:
    """Replaces interpolations `${a.b}` by what they refer to in the same file; others stay as they are.

    Args:
        settings: the whole tree.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.nodes = 0

    def visit(self, value: Any, path: tuple[str, ...] = (), trail: tuple[str, ...] = ()) -> Any:
        """Return a copy of a subtree without interpolations.

        Args:
            value: the subtree.
            path: keys that lead to it.
            trail: interpolations that are being resolved.
        """
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) + len(trail) > MAX_DEPTH:
            raise NemoError(f"{SETTINGS} is too large or too deep once its aliases and interpolations are resolved")
        if isinstance(value, dict):
            return {key: self.visit(item, (*path, str(key)), trail) for key, item in value.items()}
        if isinstance(value, list):
            return [self.visit(item, (*path, str(index)), trail) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        whole = re.fullmatch(r"\$\{([^${}]+)\}", value)
        if whole:
            return self._target(whole[1], value, path, trail)
        text = re.sub(r"\$\{([^${}]+)\}", lambda match: str(self._target(match[1], match[0], path, trail)), value)
        if len(text) > MAX_STRING:
            raise NemoError(f"`{'.'.join(path)}` in {SETTINGS} is too long once its interpolations are resolved")
        return text

    def _target(self, reference: str, text: str, path: tuple[str, ...], trail: tuple[str, ...]) -> Any:
        """Return what a reference leads to, or its own text where it does not lead into the file."""
        name = reference.strip()
        dots = len(name) - len(name.lstrip("."))
        # one leading dot is a sibling, two are a sibling of the parent
        keys = (*path[: max(len(path) - dots, 0)], *name.lstrip(".").split(".")) if dots else tuple(name.split("."))
        if keys[0] == "model" and "model" not in self.settings:
            # written for the tree that holds this one
            keys = keys[1:]
        name = ".".join(keys)
        if name in trail:
            raise NemoError(f"`{'.'.join(path)}` in {SETTINGS} refers to itself by `{text}`: write its value there")
        found: Any = self.settings
        for depth, key in enumerate(keys):
            if isinstance(found, str):
                # a section that is an interpolation itself
                found = self.visit(found, keys[:depth], (*trail, name))
            if not isinstance(found, dict) or key not in found:
                return text
            found = found[key]
        return self.visit(found, keys, (*trail, name))


def head_kind(settings: Mapping[str, Any]) -> str:
    """Tell CTC, RNN-T and TDT apart; the class of a file does not say which transducer it is."""
    if "joint" not in settings:
        return "ctc"
    decoding, loss = section_of(settings, "decoding"), section_of(settings, "loss")
    is_tdt = bool(decoding.get("durations")) or decoding.get("model_type") == "tdt" or loss.get("loss_name") == "tdt"
    return "tdt" if is_tdt or section_of(settings, "joint").get("num_extra_outputs") else "rnnt"


def has_ctc_head(settings: Mapping[str, Any], weights: Iterable[str]) -> bool:
    """Tell whether a transducer has a CTC head, too.

    NeMo builds one for its hybrid classes only; other classes may carry a section `aux_ctc` that nothing reads.

    Args:
        settings: the resolved settings.
        weights: names of the weights, which decide where the file names no class.

    Raises:
        NemoError: the class has such a head, but the file has no weights for it.
    """
    name = last_name(settings.get("target") or "")
    has_weights = any(key.startswith("ctc_decoder.") for key in weights)
    if MODEL_CLASSES.get(name) and not has_weights:
        raise NemoError(
            f"a model of the class {name} must have a CTC head, but the file has no weights `ctc_decoder.*`: save it "
            "again, or set `target` to EncDecRNNTBPEModel"
        )
    return has_weights


# size -> weight and axis that have it
SIZES = {
    "encoder.d_model": ("encoder.pre_encode.out.weight", 0),
    "encoder.feat_in": ("preprocessor.featurizer.fb", 1),
    "encoder.subsampling_conv_channels": ("encoder.pre_encode.conv.0.weight", 0),
    "encoder.n_heads": ("encoder.layers.0.self_attn.pos_bias_u", 0),
    "encoder.conv_kernel_size": ("encoder.layers.0.conv.depthwise_conv.weight", 2),
    "decoder.prednet.pred_hidden": ("decoder.prediction.embed.weight", 1),
    "joint.jointnet.joint_hidden": ("joint.enc.weight", 0),
}
LAYERS = {
    "encoder.n_layers": r"encoder\.layers\.(\d+)\..*",
    "decoder.prednet.pred_rnn_layers": r"decoder\.prediction\.dec_rnn\.lstm\.weight_ih_l(\d+)",
}


def with_sizes(settings: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return settings whose sizes are those of the weights, before modules of these sizes are built.

    Args:
        settings: the resolved settings.
        shapes: shapes of the weights by NeMo's names.

    Raises:
        NemoError: a size differs from that of the weights.
    """
    sizes = {setting: shapes[key][axis] for setting, (key, axis) in SIZES.items() if len(shapes.get(key, ())) > axis}
    for setting, pattern in LAYERS.items():
        sizes[setting] = len({match[1] for key in shapes if (match := re.fullmatch(pattern, key))})
    result = copy.deepcopy(dict(settings))
    for setting, size in sizes.items():
        section, _, key = setting.rpartition(".")
        values = lookup(result, section)
        if not isinstance(values, dict):
            continue
        value = values.get(key)
        # 0 and -1 stand in NeMo's templates for a size that is not known yet
        if value is None or value in (0, -1):
            values[key] = size
        elif value != size:
            raise NemoError(f"`{setting}` is {value!r}, but the weights have {size}: correct it in {SETTINGS}")
    return result


def section_of(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section by its dotted path; an absent one is empty."""
    section = lookup(settings, name)
    return section if isinstance(section, dict) else {}


def encoder_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the encoder section; absent settings have the defaults of NeMo's ConformerEncoder."""
    encoder = section_of(settings, "encoder")
    width, channels = encoder.get("d_model"), encoder.get("subsampling_conv_channels", -1)
    kernel, dropout = encoder.get("conv_kernel_size", 31), encoder.get("dropout", 0.1)
    return {
        "hidden_size": width,
        "num_hidden_layers": encoder.get("n_layers"),
        "num_attention_heads": encoder.get("n_heads", 4),
        "intermediate_size": (width or 0) * encoder.get("ff_expansion_factor", 4),
        "attention_bias": encoder.get("use_bias", True),
        "convolution_bias": encoder.get("use_bias", True),
        "conv_kernel_size": kernel,
        "subsampling_factor": encoder.get("subsampling_factor", 4),
        "subsampling_conv_channels": width if channels == -1 else channels,
        "num_mel_bins": encoder.get("feat_in"),
        "dropout": encoder.get("dropout_pre_encoder", 0.1),
        "dropout_positions": encoder.get("dropout_emb", 0.1),
        "layerdrop": encoder.get("stochastic_depth_drop_prob", 0.0),
        "activation_dropout": dropout,
        "residual_dropout": dropout,
        "stochastic_depth_mode": encoder.get("stochastic_depth_mode", "linear"),
        "stochastic_depth_start_layer": encoder.get("stochastic_depth_start_layer", 1),
        "attention_dropout": encoder.get("dropout_att", 0.0),
        "max_position_embeddings": encoder.get("pos_emb_max_len", 5000),
        "scale_input": encoder.get("xscaling", True),
        "conv_norm_type": encoder.get("conv_norm_type", "batch_norm"),
        "conv_context_size": conv_context(encoder.get("conv_context_size"), kernel),
        "causal_downsampling": encoder.get("causal_downsampling", False),
        **attention_fields(encoder),
    }


def attention_fields(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the settings of the encoder's attention."""
    style = encoder.get("att_context_style", "regular")
    contexts = encoder.get("att_context_size") or [[-1, -1]]
    if isinstance(contexts[0], int):
        contexts = [contexts]
    if style == "chunked_limited_with_rc":
        # NeMo does not read the setting, and chooses full attention
        contexts = [[-1, -1, -1]]
    model = encoder.get("self_attention_model", "rel_pos")
    if model == "rel_pos_local_attn" and max(contexts[0]) <= 0:
        raise refuse("encoder.att_context_size", contexts[0], "it must be above 0 for rel_pos_local_attn")
    return {
        "attention_context_size": list(contexts[0]),
        "attention_context_sizes": [list(context) for context in contexts] if len(contexts) > 1 else None,
        "attention_context_style": style,
        "self_attention_model": model,
        # nothing reads the setting in the other attention
        "global_tokens": encoder.get("global_tokens", 0) if model == "rel_pos_local_attn" else 0,
        "global_tokens_spacing": encoder.get("global_tokens_spacing", 1),
        "global_attn_separate": encoder.get("global_attn_separate", False),
    }


def conv_context(value: Any, kernel: int) -> list[int] | None:
    """Return `conv_context_size` as frames before and after; `None` where both are the same."""
    context = [kernel - 1, 0] if value == "causal" else value
    return None if context is None or context[0] == context[1] else list(context)


def config_fields(settings: Mapping[str, Any], kind: str, hybrid: bool) -> dict[str, Any]:
    """Translate all settings of a model to fields of its configuration, `encoder_config` among them.

    Args:
        settings: the resolved settings, checked.
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.
        hybrid: the model is a transducer with a CTC head.

    Raises:
        NemoError: a setting is not implemented.
        KeyError: a setting that has no default is missing.
    """
    decoding = section_of(settings, "decoding")
    augment = settings.get("spec_augment")
    fields = {
        "encoder_config": encoder_fields(settings),
        "spec_augment": {k: v for k, v in augment.items() if k != "_target_"} if augment else None,
        # NeMo spells it so
        "segment_separators": list(decoding.get("segment_seperators") or (".", "?", "!")),
        "segment_gap_threshold": decoding.get("segment_gap_threshold"),
    }
    if kind == "ctc":
        return {**fields, "ctc_loss_reduction": reduction(settings.get("ctc_reduction"))}
    return {**fields, **transducer_fields(settings, kind), **(hybrid_fields(settings) if hybrid else {})}


def reduction(value: Any) -> str:
    """Return the reduction of a loss; NeMo's default where there is none that is known."""
    return value if value in REDUCTIONS else "mean_batch"


def transducer_fields(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Translate prediction network, joint, decoding and loss."""
    prediction, joint = section_of(settings, "decoder.prednet"), section_of(settings, "joint.jointnet")
    greedy, loss = section_of(settings, "decoding.greedy"), section_of(settings, "loss")
    fields = {
        "decoder_hidden_size": prediction.get("pred_hidden"),
        "num_decoder_layers": prediction.get("pred_rnn_layers", 1),
        "decoder_dropout": prediction.get("dropout") or 0.0,
        "joint_hidden_size": joint.get("joint_hidden"),
        "joint_dropout": joint.get("dropout") or 0.0,
        "hidden_act": joint.get("activation", "relu").lower(),
        "max_symbols_per_step": greedy.get("max_symbols") or greedy.get("max_symbols_per_step") or 10,
        "loss_reduction": reduction(settings.get("rnnt_reduction")),
        "fastemit_lambda": section_of(loss, "warprnnt_numba_kwargs").get("fastemit_lambda", 0.0),
    }
    if kind == "tdt":
        options = section_of(loss, "tdt_kwargs")
        fields["durations"] = list(lookup(settings, "decoding.durations") or options["durations"])
        fields["loss_sigma"] = options.get("sigma", 0.0)
        fields["loss_omega"] = options.get("omega", 0.0)
        fields["fastemit_lambda"] = options.get("fastemit_lambda", 0.0)
    return fields


def hybrid_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the section of a second, CTC head."""
    section = section_of(settings, "aux_ctc")
    return {
        "ctc_head": True,
        "ctc_loss_weight": section.get("ctc_loss_weight", 0.3),
        "ctc_loss_reduction": reduction(section.get("ctc_reduction")),
    }


def extractor_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the preprocessor section to fields of the feature extractor."""
    section = section_of(settings, "preprocessor")
    rate, bins = section.get("sample_rate", 16000), section.get("features", 64)
    hop = samples_of(section, "window_stride", 0.01, rate)
    if hop != HOP_LENGTH:
        raise NemoError(f"`preprocessor.window_stride` gives {hop} samples, implemented are only {HOP_LENGTH}: {ELSE}")
    if bins != section_of(settings, "encoder").get("feat_in"):
        raise NemoError(f"`preprocessor.features` is {bins!r}, `encoder.feat_in` must be the same: correct {SETTINGS}")
    window = samples_of(section, "window_size", 0.02, rate)
    n_fft = section.get("n_fft") or 1 << (window - 1).bit_length()
    # a transform of more than a second is a mistake
    if not 0 < window <= n_fft <= rate:
        raise NemoError(f"`preprocessor.n_fft` is {n_fft!r}, it must be from {window} to {rate}: correct {SETTINGS}")
    return {
        "feature_size": bins,
        "sampling_rate": rate,
        "hop_length": hop,
        "n_fft": n_fft,
        "win_length": window,
        "preemphasis": section.get("preemph", 0.97),
        "normalize": normalization(section.get("normalize", "per_feature")),
    }


def samples_of(section: Mapping[str, Any], key: str, default: float, rate: int) -> int:
    """Return a length in samples: in seconds under its key, or in samples under the key with `n_` before it."""
    seconds, samples = section.get(key, default), section.get(f"n_{key}")
    if key not in section and samples:
        return int(samples)
    if seconds and samples:
        raise NemoError(f"`preprocessor.{key}` and `preprocessor.n_{key}` are both given: remove one of them")
    return int(seconds * rate) if seconds else int(samples or 0)


def normalization(value: Any) -> str | None:
    """Return the normalisation of the features; NeMo takes any text that it does not know, such as NA, for none."""
    if value == "per_feature":
        return "per_feature"
    if value == "all_features" or not isinstance(value, (str, type(None))):
        raise refuse("preprocessor.normalize", value, "implemented is only per_feature, or NA for none")
    return None


# where the file repeats the number of pieces
COUNTS = ("decoder.vocab_size", "decoder.num_classes", "joint.num_classes", "aux_ctc.decoder.num_classes")
# and where the pieces themselves
LISTS = ("labels", "decoder.vocabulary", "joint.vocabulary", "aux_ctc.decoder.vocabulary")


def check_vocabulary(settings: Mapping[str, Any], pieces: int) -> None:
    """Refuse a file whose tokenizer has another number of pieces than its settings say."""
    for path in COUNTS:
        count = lookup(settings, path)
        # NeMo's templates hold -1 and 0
        if isinstance(count, int) and count > 0 and count != pieces:
            raise NemoError(f"`{path}` is {count}, but the tokenizer has {pieces} pieces: the file mixes two models")
    for path in LISTS:
        names = lookup(settings, path)
        if isinstance(names, list) and names and len(names) != pieces:
            raise NemoError(
                f"`{path}` has {len(names)} entries, but the tokenizer {pieces} pieces: the file mixes two models"
            )
