"""The settings of `.nemo` files as far as they are read: which one becomes which field, and which are refused.

The way back is in `nemo_export.py`; weights are for `nemo.py`, SentencePiece models for `subwords.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from .archive import SETTINGS, NemoError
from .configuration_parakeet import HOP_LENGTH
from .feature_extraction_parakeet import LOG_ZERO_GUARD
from .losses import REDUCTIONS

# section -> setting -> the values that are implemented
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "encoder": {
        "subsampling": ("dw_striding",),
        "causal_downsampling": (False,),
        "self_attention_model": ("rel_pos",),
        "att_context_size": (None, [-1, -1], [[-1, -1]]),
        "att_context_style": ("regular",),
        "conv_norm_type": ("batch_norm",),
        "conv_context_size": (None,),
        "feat_out": (-1, 0),
        "reduction": (None,),
    },
    "preprocessor": {
        "sample_rate": (16000,),
        "window": ("hann",),
        "normalize": ("per_feature",),
        "mag_power": (2.0,),
        "mel_norm": ("slaney",),
        "lowfreq": (0,),
        "highfreq": (None, 8000),
        "log": (True,),
        "log_zero_guard_type": ("add",),
        "log_zero_guard_value": (LOG_ZERO_GUARD,),
        "frame_splicing": (1,),
        "nb_augmentation_prob": (0.0,),
        "exact_pad": (False,),
        "use_torchaudio": (False,),
    },
    "decoder": {"normalization_mode": (None,), "blank_as_pad": (True,), "random_state_sampling": (False,)},
    "decoder.prednet": {"rnn_hidden_size": (-1, 0, None), "forget_gate_bias": (1.0, None), "norm": (None,)},
    "joint": {"log_softmax": (None,), "masking_prob": (-1, None)},
    "joint.jointnet": {"activation": ("relu", "tanh", "sigmoid")},
    "decoding": {"big_blank_durations": (None, [])},
    "decoding.greedy": {},
    "loss": {"loss_name": ("default", "warprnnt", "warprnnt_numba", "pytorch", "tdt", "tdt_pytorch")},
    "aux_ctc": {},
    "aux_ctc.decoder": {},
    "": {
        "rnnt_reduction": (None, *REDUCTIONS),
        "ctc_reduction": (None, *REDUCTIONS),
    },
}

# settings that do not change what is computed here, or are read below; `""` is the root of the file
KNOWN: dict[str, str] = {
    "encoder": (
        "_target_ att_chunk_context_size att_context_probs conv_kernel_size d_model dropout dropout_att "
        "dropout_emb dropout_pre_encoder feat_in ff_expansion_factor global_attn_separate global_tokens "
        "global_tokens_spacing n_heads n_layers pos_emb_max_len reduction_factor reduction_position "
        "stochastic_depth_drop_prob stochastic_depth_mode stochastic_depth_start_layer "
        "subsampling_conv_channels subsampling_conv_chunking_factor subsampling_factor sync_max_audio_length "
        "untie_biases use_bias use_pytorch_sdpa use_pytorch_sdpa_backends xscaling"
    ),
    "preprocessor": (
        "_target_ dither features mel_norm n_fft n_window_size n_window_stride nb_max_freq pad_to pad_value "
        "preemph rng stft_conv stft_exact_pad window_size window_stride"
    ),
    "decoder": "_target_ add_blank feat_in init_mode num_classes prednet vocab_size vocabulary",
    "decoder.prednet": ("dropout hidden_hidden_bias_scale pred_hidden pred_rnn_layers t_max weights_init_scale"),
    "joint": (
        "_target_ experimental_fuse_loss_wer fuse_loss_wer fused_batch_size jointnet num_classes "
        "num_extra_outputs preserve_memory vocabulary"
    ),
    "joint.jointnet": "dropout encoder_hidden joint_hidden pred_hidden",
    "decoding": (
        "batch_dim_index beam compute_hypothesis_token_set compute_langs compute_timestamps confidence_cfg "
        "ctc_timestamp_type durations fused_batch_size greedy model_type preserve_alignments "
        "rnnt_timestamp_type segment_gap_threshold segment_seperators strategy tdt_include_duration "
        "tdt_include_token_duration temperature word_seperator"
    ),
    "decoding.greedy": (
        "allow_cuda_graphs boosting_tree boosting_tree_alpha compute_timestamps confidence_method_cfg "
        "enable_per_stream_biasing fusion_models fusion_models_alpha include_duration loop_labels "
        "max_batch_size max_symbols max_symbols_per_step ngram_lm_alpha ngram_lm_model preserve_alignments "
        "preserve_frame_confidence preserve_step_confidence tdt_include_duration_confidence "
        "use_cuda_graph_decoder"
    ),
    "loss": "_target_ tdt_kwargs warprnnt_numba_kwargs",
    "aux_ctc": "ctc_loss_weight ctc_reduction decoder decoding use_cer",
    "aux_ctc.decoder": "_target_ add_blank feat_in init_mode num_classes vocabulary",
    "": (
        "aux_ctc compute_eval_loss decoder decoding encoder interctc joint labels log_prediction loss "
        "model_defaults name nemo_version optim preprocessor restore_timestamps sample_rate skip_nan_grad "
        "spec_augment target test_ds tokenizer train_ds use_cer validation_ds variational_noise"
    ),
}

# section -> the classes that are implemented, whatever module NeMo keeps them in
CLASSES: dict[str, tuple[str, ...]] = {
    "encoder": ("ConformerEncoder",),
    "preprocessor": ("AudioToMelSpectrogramPreprocessor",),
    "decoder": ("RNNTDecoder", "ConvASRDecoder"),
    "joint": ("RNNTJoint",),
    "aux_ctc.decoder": ("ConvASRDecoder",),
}
MODEL_CLASSES = ("EncDecCTCModelBPE", "EncDecRNNTBPEModel", "EncDecHybridRNNTCTCBPEModel")

# setting -> what to do when its value is refused
ADVICE = {
    "encoder.self_attention_model": (
        "call `model.change_attention_model('rel_pos', [-1, -1])` in NeMo and save again; the weights are the same"
    ),
    "encoder.att_context_size": "models of limited context (streaming) need NeMo; full context is [-1, -1]",
    "encoder.att_context_style": "models of limited context (streaming) need NeMo; full context is 'regular'",
    "encoder.causal_downsampling": "models with causal convolutions (streaming) need NeMo",
    "encoder.conv_context_size": "models with causal convolutions (streaming) need NeMo",
    "encoder._target_": "merge or disable adapters in NeMo and save again; other encoders need NeMo",
    "decoder._target_": "stateless prediction networks and other decoders need NeMo",
    "adapters": "merge or remove the adapters in NeMo and save again",
    "target": "multitask and character models need NeMo; of a class derived from these, set `target` to its base",
    "tokenizer.type": "WordPiece (wpe) and character vocabularies need NeMo; `change_vocabulary` there gives a bpe one",
}
ELSE = "such a model needs NeMo"

# a YAML tree may have so many nodes once interpolations are resolved, and a string so many characters
MAX_NODES, MAX_STRING = 1_000_000, 100_000


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
    """Read the YAML file; return its model section as it was written.

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
    return root


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
        if self.nodes > MAX_NODES or len(path) + len(trail) > 100:
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


def last_name(target: Any) -> str:
    """Return the class of a path such as `nemo.collections.asr.modules.ConformerEncoder`."""
    return str(target).rpartition(".")[2]


def refuse(setting: str, value: Any, rule: str) -> NemoError:
    """Return the error that names a setting, its value, what would do, and what to do."""
    name = setting.removeprefix(".")
    return NemoError(f"`{name}` is {value!r}, {rule}: {ADVICE.get(name, ELSE)}")


def lookup(settings: Mapping[str, Any], path: str) -> Any:
    """Return a setting by its dotted path; `None` where there is none."""
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def check_section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of the YAML, `""` for its root, after refusing what is not implemented in it."""
    section = lookup(settings, name) if name else settings
    if not isinstance(section, dict):
        raise NemoError(f"the file has no section `{name}`")
    for key, value in section.items():
        setting = f"{name}.{key}"
        if isinstance(value, str) and "${" in value:
            raise NemoError(f"`{setting}` is {value!r}: resolve the interpolation in {SETTINGS} first")
        allowed = ONLY[name].get(key)
        if allowed is not None and value not in allowed:
            raise refuse(setting, value, f"implemented is only {' or '.join(map(repr, allowed))}")
        if key == "_target_" and last_name(value) not in CLASSES.get(name, (last_name(value),)):
            raise refuse(setting, value, f"implemented is only {' or '.join(CLASSES[name])}")
        if allowed is None and key not in KNOWN[name].split():
            raise refuse(setting, value, "which is not a setting that is known here")
    if name == "" and last_name(section.get("target") or MODEL_CLASSES[0]) not in MODEL_CLASSES:
        raise refuse("target", section["target"], f"implemented is only {' or '.join(MODEL_CLASSES)}")
    return section


def head_kind(settings: Mapping[str, Any]) -> str:
    """Tell CTC, RNN-T and TDT apart; the class of a file does not say which transducer it is."""
    if "joint" not in settings:
        return "ctc"
    decoding = settings.get("decoding") or {}
    loss = (settings.get("loss") or {}).get("loss_name")
    is_tdt = bool(decoding.get("durations")) or decoding.get("model_type") == "tdt" or loss == "tdt"
    return "tdt" if is_tdt or settings["joint"].get("num_extra_outputs", 0) else "rnnt"


def optional_section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a checked section, or nothing where the file has none."""
    return check_section(settings, name) if lookup(settings, name) else {}


def encoder_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the encoder section."""
    encoder = check_section(settings, "encoder")
    width, channels = encoder["d_model"], encoder.get("subsampling_conv_channels", -1)
    dropout = encoder.get("dropout", 0.1)
    return {
        "hidden_size": width,
        "num_hidden_layers": encoder["n_layers"],
        "num_attention_heads": encoder.get("n_heads", 4),
        "intermediate_size": width * encoder.get("ff_expansion_factor", 4),
        "attention_bias": encoder.get("use_bias", True),
        "convolution_bias": encoder.get("use_bias", True),
        "conv_kernel_size": encoder.get("conv_kernel_size", 31),
        "subsampling_factor": encoder.get("subsampling_factor", 4),
        "subsampling_conv_channels": width if channels == -1 else channels,
        "num_mel_bins": encoder["feat_in"],
        "dropout": encoder.get("dropout_pre_encoder", dropout),
        "dropout_positions": encoder.get("dropout_emb", dropout),
        "layerdrop": encoder.get("stochastic_depth_drop_prob", 0.0),
        "activation_dropout": dropout,
        "attention_dropout": encoder.get("dropout_att", dropout),
        "max_position_embeddings": encoder.get("pos_emb_max_len", 5000),
        "scale_input": encoder.get("xscaling", True),
    }


def config_fields(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Translate all settings of a model to fields of its configuration, `encoder_config` among them.

    Args:
        settings: the resolved settings.
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.

    Raises:
        NemoError: a setting is not implemented.
        KeyError: a setting that has no default is missing.
    """
    decoding = optional_section(settings, "decoding")
    augment = settings.get("spec_augment")
    fields = {
        "encoder_config": encoder_fields(settings),
        "spec_augment": {k: v for k, v in augment.items() if k != "_target_"} if augment else None,
        # NeMo spells it so
        "segment_separators": list(decoding.get("segment_seperators") or (".", "?", "!")),
        "segment_gap_threshold": decoding.get("segment_gap_threshold"),
    }
    if kind == "ctc":
        check_section(settings, "decoder")
        return {**fields, "ctc_loss_reduction": settings.get("ctc_reduction") or "mean_batch"}
    return {**fields, **transducer_fields(settings, kind), **hybrid_fields(settings)}


def transducer_fields(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Translate prediction network, joint, decoding and loss."""
    check_section(settings, "decoder")
    check_section(settings, "joint")
    prediction = check_section(settings, "decoder.prednet")
    joint = check_section(settings, "joint.jointnet")
    decoding, greedy = optional_section(settings, "decoding"), optional_section(settings, "decoding.greedy")
    loss = optional_section(settings, "loss")
    fields = {
        "decoder_hidden_size": prediction["pred_hidden"],
        "num_decoder_layers": prediction.get("pred_rnn_layers", 1),
        "decoder_dropout": prediction.get("dropout") or 0.0,
        "joint_hidden_size": joint["joint_hidden"],
        "joint_dropout": joint.get("dropout") or 0.0,
        "hidden_act": joint.get("activation", "relu").lower(),
        "max_symbols_per_step": greedy.get("max_symbols") or greedy.get("max_symbols_per_step") or 10,
        "loss_reduction": settings.get("rnnt_reduction") or "mean_batch",
        "fastemit_lambda": (loss.get("warprnnt_numba_kwargs") or {}).get("fastemit_lambda", 0.0),
    }
    if kind == "tdt":
        options = loss.get("tdt_kwargs") or {}
        fields["durations"] = list(decoding.get("durations") or options["durations"])
        fields["loss_sigma"] = options.get("sigma", 0.0)
        fields["loss_omega"] = options.get("omega", 0.0)
        fields["fastemit_lambda"] = options.get("fastemit_lambda", 0.0)
    return fields


def hybrid_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the section of a second, CTC head."""
    aux = optional_section(settings, "aux_ctc")
    if not aux:
        return {}
    check_section(settings, "aux_ctc.decoder")
    return {
        "ctc_head": True,
        "ctc_loss_weight": aux.get("ctc_loss_weight", 0.3),
        "ctc_loss_reduction": aux.get("ctc_reduction") or "mean_batch",
    }


def extractor_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the preprocessor section to fields of the feature extractor."""
    section = check_section(settings, "preprocessor")
    rate, bins = section.get("sample_rate", 16000), section.get("features", 64)
    hop = int(section.get("window_stride", 0.01) * rate)
    if hop != HOP_LENGTH:
        raise NemoError(f"`preprocessor.window_stride` gives {hop} samples, implemented are only {HOP_LENGTH}: {ELSE}")
    if bins != check_section(settings, "encoder")["feat_in"]:
        raise NemoError(f"`preprocessor.features` is {bins!r}, `encoder.feat_in` must be the same: correct {SETTINGS}")
    window = int(section.get("window_size", 0.02) * rate)
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
    }


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
