"""Maps the settings of a `.nemo` file to the fields of our configurations and feature extractor, in both directions.

The reader, the writer and the list of known settings use these tables. `settings.py` parses and writes the YAML, and
`keys.py` lists the settings that have no field.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..configuration_parakeet import (
    CONTEXT_STYLES,
    CONV_NORM_TYPES,
    HOP_LENGTH,
    LOSS_REDUCTIONS,
    SELF_ATTENTION_MODELS,
)
from .archive import SETTINGS_FILE, NemoError
from .settings import Settings, find_section, find_setting

NEMO_MODULES_PREFIX = "nemo.collections.asr.modules."

# for error messages: advice, and descriptions of models that are not supported
NEEDS_NEMO = "such a model needs NeMo"
PROMPT_MODEL = "a model that takes a prompt, such as a language, with the audio"
MULTI_TALKER_MODEL = "a multi-talker model, which takes the activity of a speaker with the audio"

# sampling rate of every released checkpoint, in Hz
SAMPLING_RATE = 16000

# NeMo does not read `att_context_size` for the style `chunked_limited_with_rc`, so a file always means this context
UNLIMITED_CHUNK_CONTEXT = (-1, -1, -1)

# values of `Field.heads`; a hybrid is a transducer with a CTC head
ANY_HEAD = ("ctc", "rnnt", "tdt")
TRANSDUCERS = ("rnnt", "tdt")


@dataclass(frozen=True)
class Field:
    """A field of a configuration or feature extractor, and the NeMo setting that stores it.

    The owner of a field is the configuration or feature extractor that has the field.

    Args:
        name: name of the field; None for a setting that is written but not read, because other settings determine it.
        setting: dotted path of the NeMo setting.
        default: value that NeMo uses if the setting is missing.
        aliases: dotted paths of settings that NeMo reads if `setting` is missing.
        copies: dotted paths of settings that repeat the value; they are written only if the file has them.
        heads: types of head for which the field exists: `"ctc"`, `"rnnt"`, `"tdt"`, or `"hybrid"` for a transducer with
            a CTC head.
        allowed_values: supported values of the setting; empty if every value is supported.
        read: `read(value, settings)` converts the value of the setting to the value of the field; None if the two
            values are equal.
        get_current: `get_current(owner)` returns the value of the field, or the nearest value that NeMo supports; None
            to use the attribute `name` of the owner.
        write: `write(owner, settings)` returns the value of the setting; None if the setting has the same value as the
            field.
    """

    name: str | None
    setting: str
    default: Any = None
    aliases: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    heads: tuple[str, ...] = ANY_HEAD
    allowed_values: tuple[Any, ...] = ()
    read: Callable[[Any, Settings], Any] | None = None
    get_current: Callable[[Any], Any] | None = None
    write: Callable[[Any, Settings], Any] | None = None

    def get_value_from_settings(self, settings: Settings) -> Any:
        """Read the value of the field from the resolved settings of a `.nemo` file.

        Args:
            settings: resolved settings of a `.nemo` file.
        """
        value = find_setting(settings, self.setting, self.default)
        return value if self.read is None else self.read(value, settings)

    def get_value_from_owner(self, owner: Any) -> Any:
        """Return the value of the field in a configuration or feature extractor, with a tuple converted to a list.

        Args:
            owner: configuration or feature extractor that has the field.
        """
        value = getattr(owner, str(self.name)) if self.get_current is None else self.get_current(owner)
        return list(value) if isinstance(value, tuple) else value

    def get_nemo_value(self, owner: Any, settings: Settings) -> Any:
        """Convert the value of the field to the value of the NeMo setting.

        Args:
            owner: configuration or feature extractor that has the field.
            settings: resolved settings of the `.nemo` file that is written.
        """
        return self.get_value_from_owner(owner) if self.write is None else self.write(owner, settings)


def _read_dropout(value: Any, settings: Settings) -> Any:
    """Read a dropout probability of the prediction or joint network; null means 0, as in NeMo."""
    return value or 0.0


def _read_feed_forward_size(value: Any, settings: Settings) -> Any:
    """Convert `ff_expansion_factor` to the width of the feed-forward modules."""
    return (find_setting(settings, "encoder.d_model") or 0) * value


def _read_subsampling_channels(value: Any, settings: Settings) -> Any:
    """Read the number of channels of the subsampling convolutions; -1 means the width of the encoder."""
    return find_setting(settings, "encoder.d_model") if value == -1 else value


def _read_conv_context(value: Any, settings: Settings) -> list[int] | None:
    """Read `conv_context_size` as [left, right] frames of convolution context; None if both sides are equal."""
    kernel_size = find_setting(settings, "encoder.conv_kernel_size", 31)
    context = [kernel_size - 1, 0] if value == "causal" else value
    return None if context is None or context[0] == context[1] else list(context)


def _get_stochastic_depth_mode(encoder_config: Any) -> str:
    """Return NeMo's mode of stochastic depth for an encoder configuration.

    The mode None means the LayerDrop of stock transformers. It becomes `"uniform"`, or NeMo's default `"linear"` if no
    block is dropped.
    """
    return encoder_config.stochastic_depth_mode or ("uniform" if encoder_config.layerdrop else "linear")


def _list_contexts(value: Any, settings: Settings) -> list[list[int]]:
    """Read `att_context_size` as a list of attention contexts; the first one is the default.

    Args:
        value: one context [left, right] in encoder frames, a list of contexts, or None for unlimited attention.
        settings: resolved settings of the `.nemo` file.
    """
    # NeMo ignores `att_context_size` in this style and starts with an unlimited context
    if find_setting(settings, "encoder.att_context_style") == "chunked_limited_with_rc":
        return [list(UNLIMITED_CHUNK_CONTEXT)]
    contexts = value or [[-1, -1]]
    return [list(contexts)] if isinstance(contexts[0], int) else [list(context) for context in contexts]


def _read_context(value: Any, settings: Settings) -> list[int]:
    """Read the default attention context from `att_context_size`, the first one of a list."""
    return _list_contexts(value, settings)[0]


def _read_trained_contexts(value: Any, settings: Settings) -> list[list[int]] | None:
    """Read the attention contexts that a model was trained with; None if there is only one context."""
    contexts = _list_contexts(value, settings)
    return contexts if len(contexts) > 1 else None


def _get_exportable_context(encoder_config: Any) -> list[int]:
    """Return the attention context that NeMo will use; the style `chunked_limited_with_rc` is always unlimited."""
    if encoder_config.attention_context_style == "chunked_limited_with_rc":
        return list(UNLIMITED_CHUNK_CONTEXT)
    return list(encoder_config.attention_context_size)


def _write_contexts(encoder_config: Any, settings: Settings) -> list[Any]:
    """Return the value of `att_context_size` for an encoder configuration.

    Returns:
        A list that starts with the current attention context, followed by the other contexts that the model was trained
        with. If the model was trained with one context or with different contexts, only the current context.
    """
    current_context = _get_exportable_context(encoder_config)
    trained_contexts = encoder_config.attention_context_sizes or []
    if current_context not in trained_contexts or len(trained_contexts) == 1:
        return current_context
    return [current_context, *(context for context in trained_contexts if context != current_context)]


def _has_local_attention(settings: Settings) -> bool:
    """Return whether the encoder uses NeMo's local attention."""
    return bool(find_setting(settings, "encoder.self_attention_model") == "rel_pos_local_attn")


def _read_global_tokens(value: Any, settings: Settings) -> Any:
    """Read the number of global tokens; NeMo uses the setting only with local attention."""
    return value if _has_local_attention(settings) else 0


def _get_num_global_tokens(encoder_config: Any) -> int:
    """Return the number of global tokens that NeMo will use; it is 0 for unlimited attention."""
    return 0 if max(encoder_config.attention_context_size) < 0 else encoder_config.global_tokens


def _get_self_attention_model(encoder_config: Any) -> str:
    """Return NeMo's attention model; unlimited attention is `rel_pos`, because NeMo's local attention needs a limit."""
    return "rel_pos" if max(encoder_config.attention_context_size) < 0 else encoder_config.self_attention_model


def _read_spec_augment(value: Any, settings: Settings) -> dict[str, Any] | None:
    """Read the options of SpecAugment without NeMo's class name; None if SpecAugment is not used."""
    return {key: option for key, option in value.items() if key != "_target_"} if value else None


def _write_spec_augment(config: Any, settings: Settings) -> dict[str, Any] | None:
    """Return the section `spec_augment`, with the class from the settings or NeMo's default class; None if unused."""
    if not config.spec_augment:
        return None
    target = find_setting(settings, "spec_augment._target_") or f"{NEMO_MODULES_PREFIX}SpectrogramAugmentation"
    return {"_target_": target, **config.spec_augment}


def _read_separators(value: Any, settings: Settings) -> list[str]:
    """Read the characters that end a segment; the default characters are taken from NeMo."""
    return list(value or (".", "?", "!"))


def _read_reduction(value: Any, settings: Settings) -> str:
    """Read the reduction of a loss; a missing or unknown reduction means `"mean_batch"`, as in NeMo."""
    return value if value in LOSS_REDUCTIONS else "mean_batch"


def _read_max_symbols(value: Any, settings: Settings) -> Any:
    """Read the maximum number of labels per frame; older files call the setting `max_symbols_per_step`."""
    return value or find_setting(settings, "decoding.greedy.max_symbols_per_step") or 10


def _read_durations(value: Any, settings: Settings) -> list[int]:
    """Read the durations of a TDT model from `decoding.durations`, or else from `loss.tdt_kwargs.durations`.

    Raises:
        KeyError: both settings are missing.
    """
    return list(value or find_section(settings, "loss.tdt_kwargs")["durations"])


def _read_activation(value: Any, settings: Settings) -> Any:
    """Read the activation of the joint network in lower case, because NeMo ignores the case."""
    return value.lower()


def _get_joint_size(config: Any) -> int:
    """Return the width of the joint network; by default it equals the width of the prediction network."""
    return config.decoder_hidden_size if config.joint_hidden_size is None else config.joint_hidden_size


def _count_samples(seconds: Any, settings: Settings, key: str) -> int:
    """Compute the window length or hop length of the feature extractor in samples.

    The setting `preprocessor.window_size` (or `window_stride`) is in seconds. A file may instead contain
    `preprocessor.n_window_size` (or `n_window_stride`) in samples.

    Args:
        seconds: value of the setting in seconds, or NeMo's default if it is missing; None for no value.
        settings: resolved settings of the `.nemo` file.
        key: name of the setting in seconds, `"window_size"` or `"window_stride"`.

    Raises:
        NemoError: both settings have a value.
    """
    section = find_section(settings, "preprocessor")
    num_samples = section.get(f"n_{key}")
    if num_samples and key not in section:
        return int(num_samples)
    if num_samples and seconds:
        raise NemoError(f"only one of `preprocessor.{key}` and `preprocessor.n_{key}` may be set: remove one of them")
    return int(seconds * section.get("sample_rate", SAMPLING_RATE)) if seconds else int(num_samples or 0)


def _read_window_length(value: Any, settings: Settings) -> int:
    """Convert the length of the analysis window from seconds to samples."""
    return _count_samples(value, settings, "window_size")


def _read_hop_length(value: Any, settings: Settings) -> int:
    """Convert the hop length from seconds to samples."""
    return _count_samples(value, settings, "window_stride")


def _read_n_fft(value: Any, settings: Settings) -> Any:
    """Read the size of the Fourier transform; the default is the smallest power of two that holds the window."""
    window_length = _read_window_length(find_setting(settings, "preprocessor.window_size", 0.02), settings)
    return value or 1 << (window_length - 1).bit_length()


def _read_normalization(value: Any, settings: Settings) -> str | None:
    """Read the normalisation of the features; unknown text such as `NA` means None (no normalisation), as in NeMo.

    Raises:
        NemoError: the normalisation is not supported.
    """
    if value == "all_features" or not isinstance(value, (str, type(None))):
        raise NemoError(f"`preprocessor.normalize` must be per_feature, or NA for none, got {value!r}: {NEEDS_NEMO}")
    return "per_feature" if value == "per_feature" else None


ENCODER_FIELDS = (
    Field("hidden_size", "encoder.d_model",
          copies=("decoder.feat_in", "aux_ctc.decoder.feat_in", "joint.jointnet.encoder_hidden",
                  "model_defaults.enc_hidden")),
    Field("num_hidden_layers", "encoder.n_layers"),
    Field("num_attention_heads", "encoder.n_heads", 4),
    Field("intermediate_size", "encoder.ff_expansion_factor", 4, read=_read_feed_forward_size,
          write=lambda encoder_config, settings: encoder_config.intermediate_size // encoder_config.hidden_size),
    # NeMo has one setting for both biases; `check_encoder_config` in writer.py raises an error for different values
    Field("attention_bias", "encoder.use_bias", True),
    Field("convolution_bias", "encoder.use_bias", True),
    Field("conv_kernel_size", "encoder.conv_kernel_size", 31),
    Field("subsampling_factor", "encoder.subsampling_factor", 4),
    Field("subsampling_conv_channels", "encoder.subsampling_conv_channels", -1, read=_read_subsampling_channels),
    Field("num_mel_bins", "encoder.feat_in", copies=("preprocessor.features",)),
    Field("dropout", "encoder.dropout_pre_encoder", 0.1),
    Field("dropout_positions", "encoder.dropout_emb", 0.1),
    Field("layerdrop", "encoder.stochastic_depth_drop_prob", 0.0),
    # NeMo has one setting for both dropout probabilities; `activation_dropout` is the one that is written
    Field("activation_dropout", "encoder.dropout", 0.1),
    Field("residual_dropout", "encoder.dropout", 0.1,
          get_current=lambda encoder_config: encoder_config.activation_dropout),
    Field("stochastic_depth_mode", "encoder.stochastic_depth_mode", "linear", allowed_values=("linear", "uniform"),
          get_current=_get_stochastic_depth_mode),
    Field("stochastic_depth_start_layer", "encoder.stochastic_depth_start_layer", 1),
    Field("attention_dropout", "encoder.dropout_att", 0.0),
    Field("max_position_embeddings", "encoder.pos_emb_max_len", 5000),
    Field("scale_input", "encoder.xscaling", True),
    Field("conv_norm_type", "encoder.conv_norm_type", "batch_norm", allowed_values=CONV_NORM_TYPES),
    Field("conv_context_size", "encoder.conv_context_size", read=_read_conv_context),
    Field("causal_downsampling", "encoder.causal_downsampling", False),
    Field("attention_context_style", "encoder.att_context_style", "regular", allowed_values=CONTEXT_STYLES),
    Field("attention_context_size", "encoder.att_context_size", read=_read_context, get_current=_get_exportable_context,
          write=_write_contexts),
    Field("attention_context_sizes", "encoder.att_context_size", read=_read_trained_contexts, write=_write_contexts),
    Field("self_attention_model", "encoder.self_attention_model", "rel_pos", allowed_values=SELF_ATTENTION_MODELS,
          get_current=_get_self_attention_model),
    Field("global_tokens", "encoder.global_tokens", 0, read=_read_global_tokens, get_current=_get_num_global_tokens),
    Field("global_tokens_spacing", "encoder.global_tokens_spacing", 1),
    Field("global_attn_separate", "encoder.global_attn_separate", False),
)  # fmt: skip

REDUCTION_VALUES = (None, *LOSS_REDUCTIONS)
MODEL_FIELDS = (
    Field("spec_augment", "spec_augment", read=_read_spec_augment, write=_write_spec_augment),
    # NeMo misspells `segment_separators`
    Field("segment_separators", "decoding.segment_seperators", read=_read_separators),
    Field("segment_gap_threshold", "decoding.segment_gap_threshold"),
    Field("ctc_loss_reduction", "ctc_reduction", heads=("ctc",), allowed_values=REDUCTION_VALUES, read=_read_reduction),
    Field("ctc_loss_reduction", "aux_ctc.ctc_reduction", heads=("hybrid",), allowed_values=REDUCTION_VALUES,
          read=_read_reduction),
    Field("ctc_loss_weight", "aux_ctc.ctc_loss_weight", 0.3, heads=("hybrid",)),
    Field("decoder_hidden_size", "decoder.prednet.pred_hidden", heads=TRANSDUCERS,
          copies=("joint.jointnet.pred_hidden", "model_defaults.pred_hidden")),
    Field("num_decoder_layers", "decoder.prednet.pred_rnn_layers", 1, heads=TRANSDUCERS),
    Field("decoder_dropout", "decoder.prednet.dropout", heads=TRANSDUCERS, read=_read_dropout),
    Field("joint_hidden_size", "joint.jointnet.joint_hidden", heads=TRANSDUCERS,
          copies=("model_defaults.joint_hidden",), get_current=_get_joint_size),
    Field("joint_dropout", "joint.jointnet.dropout", heads=TRANSDUCERS, read=_read_dropout),
    Field("hidden_act", "joint.jointnet.activation", "relu", heads=TRANSDUCERS,
          allowed_values=("relu", "tanh", "sigmoid"), read=_read_activation),
    Field("max_symbols_per_step", "decoding.greedy.max_symbols", heads=TRANSDUCERS,
          aliases=("decoding.greedy.max_symbols_per_step",), read=_read_max_symbols),
    Field("loss_reduction", "rnnt_reduction", heads=TRANSDUCERS, allowed_values=REDUCTION_VALUES, read=_read_reduction),
    Field("fastemit_lambda", "loss.warprnnt_numba_kwargs.fastemit_lambda", 0.0, heads=("rnnt",)),
    Field("fastemit_lambda", "loss.tdt_kwargs.fastemit_lambda", 0.0, heads=("tdt",)),
    Field("durations", "decoding.durations", heads=("tdt",), read=_read_durations,
          copies=("loss.tdt_kwargs.durations", "model_defaults.tdt_durations")),
    Field(None, "joint.num_extra_outputs", heads=("tdt",), copies=("model_defaults.num_tdt_durations",),
          get_current=lambda config: len(config.durations)),
    Field("loss_sigma", "loss.tdt_kwargs.sigma", 0.0, heads=("tdt",)),
    Field("loss_omega", "loss.tdt_kwargs.omega", 0.0, heads=("tdt",)),
)  # fmt: skip

EXTRACTOR_FIELDS = (
    Field("feature_size", "preprocessor.features", 64),
    Field("sampling_rate", "preprocessor.sample_rate", SAMPLING_RATE, copies=("sample_rate",),
          allowed_values=(SAMPLING_RATE,)),
    Field("hop_length", "preprocessor.window_stride", 0.01, aliases=("preprocessor.n_window_stride",),
          read=_read_hop_length, write=lambda extractor, settings: extractor.hop_length / extractor.sampling_rate),
    Field("win_length", "preprocessor.window_size", 0.02, aliases=("preprocessor.n_window_size",),
          read=_read_window_length, write=lambda extractor, settings: extractor.win_length / extractor.sampling_rate),
    Field("n_fft", "preprocessor.n_fft", read=_read_n_fft),
    Field("preemphasis", "preprocessor.preemph", 0.97),
    Field("normalize", "preprocessor.normalize", "per_feature", read=_read_normalization,
          write=lambda extractor, settings: extractor.normalize or "NA"),
)  # fmt: skip

# settings that contain the number of SentencePiece pieces, and settings that list the pieces
VOCABULARY_COUNTS = ("decoder.vocab_size", "decoder.num_classes", "joint.num_classes", "aux_ctc.decoder.num_classes")
VOCABULARY_LISTS = ("labels", "decoder.vocabulary", "joint.vocabulary", "aux_ctc.decoder.vocabulary")


def select_model_fields(head_type: str, has_ctc_head: bool) -> list[Field]:
    """Return the entries of `MODEL_FIELDS` that apply to a model.

    Args:
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`.
        has_ctc_head: whether the transducer also has a CTC head.
    """
    # "hybrid" marks the fields of the additional CTC head
    model_kinds = {head_type, "hybrid"} if has_ctc_head else {head_type}
    return [field for field in MODEL_FIELDS if model_kinds & set(field.heads)]


def read_config_fields(settings: Settings, head_type: str, has_ctc_head: bool) -> dict[str, Any]:
    """Read the fields of the model configuration from the settings of a `.nemo` file.

    Args:
        settings: resolved settings, already checked by `check_settings`.
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`.
        has_ctc_head: whether the transducer also has a CTC head.

    Returns:
        Field name -> value. The fields of the encoder are a dict under `encoder_config`.

    Raises:
        NemoError: a value is not supported.
        KeyError: a setting that has no default is missing.
    """
    encoder_fields = {field.name: field.get_value_from_settings(settings) for field in ENCODER_FIELDS}
    context = encoder_fields["attention_context_size"]
    if _has_local_attention(settings) and max(context) <= 0:
        raise NemoError(
            "`encoder.att_context_size` must be positive on at least one side for rel_pos_local_attn, got "
            f"{context!r}: {NEEDS_NEMO}"
        )
    model_fields = {
        field.name: field.get_value_from_settings(settings)
        for field in select_model_fields(head_type, has_ctc_head)
        if field.name is not None
    }
    return {**model_fields, "encoder_config": encoder_fields, **({"ctc_head": True} if has_ctc_head else {})}


def read_extractor_fields(settings: Settings) -> dict[str, Any]:
    """Read the arguments of the feature extractor from the settings of a `.nemo` file.

    Args:
        settings: resolved settings, already checked by `check_settings`.

    Returns:
        Argument name -> value.

    Raises:
        NemoError: a value is not supported, or two values contradict each other.
    """
    fields: dict[str, Any] = {str(field.name): field.get_value_from_settings(settings) for field in EXTRACTOR_FIELDS}
    num_mel_bins, hop_length, window_length = fields["feature_size"], fields["hop_length"], fields["win_length"]
    if hop_length != HOP_LENGTH:
        raise NemoError(f"`preprocessor.window_stride` must be {HOP_LENGTH} samples, got {hop_length}: {NEEDS_NEMO}")
    if num_mel_bins != find_setting(settings, "encoder.feat_in"):
        raise NemoError(
            f"`preprocessor.features` must equal `encoder.feat_in`, got {num_mel_bins!r}: correct {SETTINGS_FILE}"
        )
    # a Fourier transform over more than one second of audio is a mistake in the file
    if not 0 < window_length <= fields["n_fft"] <= fields["sampling_rate"]:
        raise NemoError(
            f"`preprocessor.n_fft` must be between {window_length} and {fields['sampling_rate']}, got "
            f"{fields['n_fft']!r}: correct {SETTINGS_FILE}"
        )
    return fields
