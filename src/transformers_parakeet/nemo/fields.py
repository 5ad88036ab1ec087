"""The two-way table between the settings of a `.nemo` file and the fields of our configurations and feature extractor.

Reading, writing and the list of known settings follow from the table. YAML is parsed and written by `settings.py`;
settings that have no field here are listed in `keys.py`.
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
from .archive import SETTINGS, NemoError
from .settings import Settings, find_section, find_setting

MODULES = "nemo.collections.asr.modules."

# for errors: what to do, and descriptions of models that are not implemented
NEEDS_NEMO = "such a model needs NeMo"
PROMPT = "a model that takes a prompt, such as a language, with the audio"
MULTI_TALKER = "a multi-talker model, which takes the activity of a speaker with the audio"

# samples per second of every released checkpoint
SAMPLING_RATE = 16000

# the only context of `chunked_limited_with_rc` that a file can have: NeMo does not read `att_context_size` for it
UNLIMITED_CHUNKS = (-1, -1, -1)

# heads that a row of the table applies to; a hybrid is a transducer with a CTC head
ANY_HEAD = ("ctc", "rnnt", "tdt")
TRANSDUCERS = ("rnnt", "tdt")


@dataclass(frozen=True)
class Field:
    """One row of the table: a field and the NeMo setting that stores it.

    Args:
        name: the field; None for a setting that NeMo derives from others, which is written but not read.
        setting: dotted path of the NeMo setting.
        default: value that NeMo uses if the setting is missing.
        aliases: other settings that NeMo reads if `setting` is missing.
        copies: other settings that repeat the value; they are written only if the file has them.
        heads: kinds of model that have the field: `"ctc"`, `"rnnt"`, `"tdt"`, and `"hybrid"` for a transducer with a
            CTC head.
        allowed: the implemented values of the setting; empty if every value can be read.
        read: `read(value, settings)` returns the field's value for the setting's value; None if they are equal.
        current: `current(owner)` returns the field's value in its owner, the configuration or feature extractor that
            has the field, restricted to what NeMo can express; None for the attribute `name`.
        write: `write(owner, settings)` returns the setting's value; None if it equals the field's current value.
    """

    name: str | None
    setting: str
    default: Any = None
    aliases: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    heads: tuple[str, ...] = ANY_HEAD
    allowed: tuple[Any, ...] = ()
    read: Callable[[Any, Settings], Any] | None = None
    current: Callable[[Any], Any] | None = None
    write: Callable[[Any, Settings], Any] | None = None

    def value_from_settings(self, settings: Settings) -> Any:
        """Return the value of the field for the resolved settings of a file."""
        value = find_setting(settings, self.setting, self.default)
        return value if self.read is None else self.read(value, settings)

    def value_from_owner(self, owner: Any) -> Any:
        """Return the value of the field in a configuration or feature extractor; a tuple is returned as a list."""
        value = getattr(owner, str(self.name)) if self.current is None else self.current(owner)
        return list(value) if isinstance(value, tuple) else value

    def value_for_nemo(self, owner: Any, settings: Settings) -> Any:
        """Return the value of the NeMo setting for a configuration or feature extractor.

        Args:
            owner: the configuration or feature extractor that has the field.
            settings: the resolved settings of the file that is written.
        """
        return self.value_from_owner(owner) if self.write is None else self.write(owner, settings)


def read_dropout(value: Any, settings: Settings) -> Any:
    """Return a dropout probability of the prediction or joint network; NeMo uses 0 if the setting is null."""
    return value or 0.0


def read_feed_forward_size(value: Any, settings: Settings) -> Any:
    """Return the width of the feed-forward modules for `ff_expansion_factor`."""
    return (find_setting(settings, "encoder.d_model") or 0) * value


def read_subsampling_channels(value: Any, settings: Settings) -> Any:
    """Return the channels of the subsampling; -1 means the width of the encoder."""
    return find_setting(settings, "encoder.d_model") if value == -1 else value


def read_conv_context(value: Any, settings: Settings) -> list[int] | None:
    """Return `conv_context_size` as frames before and after a frame; None if both are the same."""
    kernel_size = find_setting(settings, "encoder.conv_kernel_size", 31)
    context = [kernel_size - 1, 0] if value == "causal" else value
    return None if context is None or context[0] == context[1] else list(context)


def current_stochastic_depth_mode(encoder: Any) -> str:
    """Return the mode of stochastic depth that is nearest to an encoder's configuration.

    None, the LayerDrop of stock transformers, becomes `"uniform"`, or NeMo's default if no block is dropped.
    """
    return encoder.stochastic_depth_mode or ("uniform" if encoder.layerdrop else "linear")


def list_contexts(value: Any, settings: Settings) -> list[list[int]]:
    """Return every attention context of `att_context_size`; the first is the default.

    The setting is one context, a list of contexts, or null for unlimited attention.
    """
    if find_setting(settings, "encoder.att_context_style") == "chunked_limited_with_rc":
        return [list(UNLIMITED_CHUNKS)]
    contexts = value or [[-1, -1]]
    return [list(contexts)] if isinstance(contexts[0], int) else [list(context) for context in contexts]


def read_context(value: Any, settings: Settings) -> list[int]:
    """Return the default attention context of `att_context_size`."""
    return list_contexts(value, settings)[0]


def read_context_choices(value: Any, settings: Settings) -> list[list[int]] | None:
    """Return the attention contexts that a model was trained with; None if it has only one."""
    contexts = list_contexts(value, settings)
    return contexts if len(contexts) > 1 else None


def current_context(encoder: Any) -> list[int]:
    """Return the attention context of an encoder's configuration as far as a `.nemo` file can hold it."""
    if encoder.attention_context_style == "chunked_limited_with_rc":
        return list(UNLIMITED_CHUNKS)
    return list(encoder.attention_context_size)


def write_contexts(encoder: Any, settings: Settings) -> list[Any]:
    """Return `att_context_size`: the current context, followed by the others that the model was trained with.

    A context that the model was not trained with is written alone.
    """
    context, choices = current_context(encoder), encoder.attention_context_sizes or []
    if context not in choices or len(choices) == 1:
        return context
    return [context, *(choice for choice in choices if choice != context)]


def has_local_attention(settings: Settings) -> bool:
    """Return whether the settings choose NeMo's local attention."""
    return bool(find_setting(settings, "encoder.self_attention_model") == "rel_pos_local_attn")


def read_global_tokens(value: Any, settings: Settings) -> Any:
    """Return the number of global tokens; NeMo reads it for local attention only."""
    return value if has_local_attention(settings) else 0


def current_global_tokens(encoder: Any) -> int:
    """Return the number of global tokens; NeMo has none in attention without a limit."""
    return 0 if max(encoder.attention_context_size) < 0 else encoder.global_tokens


def current_self_attention_model(encoder: Any) -> str:
    """Return the attention model; attention without a limit is `rel_pos`, because NeMo limits all local attention."""
    return "rel_pos" if max(encoder.attention_context_size) < 0 else encoder.self_attention_model


def read_spec_augment(value: Any, settings: Settings) -> dict[str, Any] | None:
    """Return the options of SpecAugment without the class that NeMo builds from them; None if there are none."""
    return {key: option for key, option in value.items() if key != "_target_"} if value else None


def write_spec_augment(config: Any, settings: Settings) -> dict[str, Any] | None:
    """Return the section `spec_augment`; its class is the one in the settings, or else NeMo's default class."""
    if not config.spec_augment:
        return None
    target = find_setting(settings, "spec_augment._target_") or f"{MODULES}SpectrogramAugmentation"
    return {"_target_": target, **config.spec_augment}


def read_separators(value: Any, settings: Settings) -> list[str]:
    """Return the characters that end a segment, by default those of NeMo."""
    return list(value or (".", "?", "!"))


def read_reduction(value: Any, settings: Settings) -> str:
    """Return the reduction of a loss; NeMo's default replaces a missing or unknown one."""
    return value if value in LOSS_REDUCTIONS else "mean_batch"


def read_max_symbols(value: Any, settings: Settings) -> Any:
    """Return the limit on labels per frame; older files call it `max_symbols_per_step`."""
    return value or find_setting(settings, "decoding.greedy.max_symbols_per_step") or 10


def read_durations(value: Any, settings: Settings) -> list[int]:
    """Return the durations of a TDT model; the settings of the loss repeat those of decoding.

    Raises:
        KeyError: the file has neither.
    """
    return list(value or find_section(settings, "loss.tdt_kwargs")["durations"])


def read_activation(value: Any, settings: Settings) -> Any:
    """Return the activation of the joint network; NeMo ignores its case."""
    return value.lower()


def current_joint_size(config: Any) -> int:
    """Return the width of the joint network; None in the configuration means the prediction network's width."""
    return config.decoder_hidden_size if config.joint_hidden_size is None else config.joint_hidden_size


def count_samples(seconds: Any, settings: Settings, key: str) -> int:
    """Return a length of the preprocessor in samples.

    Args:
        seconds: value of `preprocessor.KEY`, or its default.
        settings: the resolved settings; `preprocessor.n_KEY` gives the length in samples instead.
        key: `"window_size"` or `"window_stride"`.

    Raises:
        NemoError: the file has both settings.
    """
    section = find_section(settings, "preprocessor")
    samples = section.get(f"n_{key}")
    if samples and key not in section:
        return int(samples)
    if samples and seconds:
        raise NemoError(f"only one of `preprocessor.{key}` and `preprocessor.n_{key}` may be given: remove one of them")
    return int(seconds * section.get("sample_rate", SAMPLING_RATE)) if seconds else int(samples or 0)


def read_window_length(value: Any, settings: Settings) -> int:
    """Return the length of the analysis window in samples for its length in seconds."""
    return count_samples(value, settings, "window_size")


def read_hop_length(value: Any, settings: Settings) -> int:
    """Return the samples between frames for the seconds between frames."""
    return count_samples(value, settings, "window_stride")


def read_n_fft(value: Any, settings: Settings) -> Any:
    """Return the points of the Fourier transform, by default the next power of two of the window length."""
    window_length = read_window_length(find_setting(settings, "preprocessor.window_size", 0.02), settings)
    return value or 1 << (window_length - 1).bit_length()


def read_normalization(value: Any, settings: Settings) -> str | None:
    """Return the normalisation of the features; NeMo applies none for unknown text such as `NA`.

    Raises:
        NemoError: features are normalised in a way that is not implemented.
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
    Field("intermediate_size", "encoder.ff_expansion_factor", 4, read=read_feed_forward_size,
          write=lambda encoder, settings: encoder.intermediate_size // encoder.hidden_size),
    # NeMo has one setting for both biases, `check_config` in writer.py refuses different values
    Field("attention_bias", "encoder.use_bias", True),
    Field("convolution_bias", "encoder.use_bias", True),
    Field("conv_kernel_size", "encoder.conv_kernel_size", 31),
    Field("subsampling_factor", "encoder.subsampling_factor", 4),
    Field("subsampling_conv_channels", "encoder.subsampling_conv_channels", -1, read=read_subsampling_channels),
    Field("num_mel_bins", "encoder.feat_in", copies=("preprocessor.features",)),
    Field("dropout", "encoder.dropout_pre_encoder", 0.1),
    Field("dropout_positions", "encoder.dropout_emb", 0.1),
    Field("layerdrop", "encoder.stochastic_depth_drop_prob", 0.0),
    # NeMo's `dropout` is both; the value inside the feed-forward modules is the one that is written
    Field("activation_dropout", "encoder.dropout", 0.1),
    Field("residual_dropout", "encoder.dropout", 0.1, current=lambda encoder: encoder.activation_dropout),
    Field("stochastic_depth_mode", "encoder.stochastic_depth_mode", "linear", allowed=("linear", "uniform"),
          current=current_stochastic_depth_mode),
    Field("stochastic_depth_start_layer", "encoder.stochastic_depth_start_layer", 1),
    Field("attention_dropout", "encoder.dropout_att", 0.0),
    Field("max_position_embeddings", "encoder.pos_emb_max_len", 5000),
    Field("scale_input", "encoder.xscaling", True),
    Field("conv_norm_type", "encoder.conv_norm_type", "batch_norm", allowed=CONV_NORM_TYPES),
    Field("conv_context_size", "encoder.conv_context_size", read=read_conv_context),
    Field("causal_downsampling", "encoder.causal_downsampling", False),
    Field("attention_context_style", "encoder.att_context_style", "regular", allowed=CONTEXT_STYLES),
    Field("attention_context_size", "encoder.att_context_size", read=read_context, current=current_context,
          write=write_contexts),
    Field("attention_context_sizes", "encoder.att_context_size", read=read_context_choices, write=write_contexts),
    Field("self_attention_model", "encoder.self_attention_model", "rel_pos", allowed=SELF_ATTENTION_MODELS,
          current=current_self_attention_model),
    Field("global_tokens", "encoder.global_tokens", 0, read=read_global_tokens, current=current_global_tokens),
    Field("global_tokens_spacing", "encoder.global_tokens_spacing", 1),
    Field("global_attn_separate", "encoder.global_attn_separate", False),
)  # fmt: skip

REDUCTION_VALUES = (None, *LOSS_REDUCTIONS)
MODEL_FIELDS = (
    Field("spec_augment", "spec_augment", read=read_spec_augment, write=write_spec_augment),
    # NeMo spells the setting this way
    Field("segment_separators", "decoding.segment_seperators", read=read_separators),
    Field("segment_gap_threshold", "decoding.segment_gap_threshold"),
    Field("ctc_loss_reduction", "ctc_reduction", heads=("ctc",), allowed=REDUCTION_VALUES, read=read_reduction),
    Field("ctc_loss_reduction", "aux_ctc.ctc_reduction", heads=("hybrid",), allowed=REDUCTION_VALUES,
          read=read_reduction),
    Field("ctc_loss_weight", "aux_ctc.ctc_loss_weight", 0.3, heads=("hybrid",)),
    Field("decoder_hidden_size", "decoder.prednet.pred_hidden", heads=TRANSDUCERS,
          copies=("joint.jointnet.pred_hidden", "model_defaults.pred_hidden")),
    Field("num_decoder_layers", "decoder.prednet.pred_rnn_layers", 1, heads=TRANSDUCERS),
    Field("decoder_dropout", "decoder.prednet.dropout", heads=TRANSDUCERS, read=read_dropout),
    Field("joint_hidden_size", "joint.jointnet.joint_hidden", heads=TRANSDUCERS,
          copies=("model_defaults.joint_hidden",), current=current_joint_size),
    Field("joint_dropout", "joint.jointnet.dropout", heads=TRANSDUCERS, read=read_dropout),
    Field("hidden_act", "joint.jointnet.activation", "relu", heads=TRANSDUCERS, allowed=("relu", "tanh", "sigmoid"),
          read=read_activation),
    Field("max_symbols_per_step", "decoding.greedy.max_symbols", heads=TRANSDUCERS,
          aliases=("decoding.greedy.max_symbols_per_step",), read=read_max_symbols),
    Field("loss_reduction", "rnnt_reduction", heads=TRANSDUCERS, allowed=REDUCTION_VALUES, read=read_reduction),
    Field("fastemit_lambda", "loss.warprnnt_numba_kwargs.fastemit_lambda", 0.0, heads=("rnnt",)),
    Field("fastemit_lambda", "loss.tdt_kwargs.fastemit_lambda", 0.0, heads=("tdt",)),
    Field("durations", "decoding.durations", heads=("tdt",), read=read_durations,
          copies=("loss.tdt_kwargs.durations", "model_defaults.tdt_durations")),
    Field(None, "joint.num_extra_outputs", heads=("tdt",), copies=("model_defaults.num_tdt_durations",),
          current=lambda config: len(config.durations)),
    Field("loss_sigma", "loss.tdt_kwargs.sigma", 0.0, heads=("tdt",)),
    Field("loss_omega", "loss.tdt_kwargs.omega", 0.0, heads=("tdt",)),
)  # fmt: skip

EXTRACTOR_FIELDS = (
    Field("feature_size", "preprocessor.features", 64),
    Field("sampling_rate", "preprocessor.sample_rate", SAMPLING_RATE, copies=("sample_rate",),
          allowed=(SAMPLING_RATE,)),
    Field("hop_length", "preprocessor.window_stride", 0.01, aliases=("preprocessor.n_window_stride",),
          read=read_hop_length, write=lambda extractor, settings: extractor.hop_length / extractor.sampling_rate),
    Field("win_length", "preprocessor.window_size", 0.02, aliases=("preprocessor.n_window_size",),
          read=read_window_length, write=lambda extractor, settings: extractor.win_length / extractor.sampling_rate),
    Field("n_fft", "preprocessor.n_fft", read=read_n_fft),
    Field("preemphasis", "preprocessor.preemph", 0.97),
    Field("normalize", "preprocessor.normalize", "per_feature", read=read_normalization,
          write=lambda extractor, settings: extractor.normalize or "NA"),
)  # fmt: skip

# settings that repeat the number of pieces, and settings that repeat the pieces
VOCABULARY_COUNTS = ("decoder.vocab_size", "decoder.num_classes", "joint.num_classes", "aux_ctc.decoder.num_classes")
VOCABULARY_LISTS = ("labels", "decoder.vocabulary", "joint.vocabulary", "aux_ctc.decoder.vocabulary")


def select_model_fields(kind: str, has_ctc_head: bool) -> list[Field]:
    """Return the rows of `MODEL_FIELDS` that a kind of model has.

    Args:
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.
        has_ctc_head: the model is a transducer with a CTC head.
    """
    heads = {kind, "hybrid"} if has_ctc_head else {kind}
    return [field for field in MODEL_FIELDS if heads & set(field.heads)]


def read_config_fields(settings: Settings, kind: str, has_ctc_head: bool) -> dict[str, Any]:
    """Return the fields of a model's configuration, with those of the encoder under `encoder_config`.

    Args:
        settings: the resolved settings, after `check_settings`.
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.
        has_ctc_head: the model is a transducer with a CTC head.

    Raises:
        NemoError: a value is not implemented.
        KeyError: a setting that has no default is missing.
    """
    encoder_fields = {field.name: field.value_from_settings(settings) for field in ENCODER_FIELDS}
    context = encoder_fields["attention_context_size"]
    if has_local_attention(settings) and max(context) <= 0:
        raise NemoError(
            "`encoder.att_context_size` must be above 0 on one side at least for rel_pos_local_attn, got "
            f"{context!r}: {NEEDS_NEMO}"
        )
    model_fields = {
        field.name: field.value_from_settings(settings)
        for field in select_model_fields(kind, has_ctc_head)
        if field.name is not None
    }
    return {**model_fields, "encoder_config": encoder_fields, **({"ctc_head": True} if has_ctc_head else {})}


def read_extractor_fields(settings: Settings) -> dict[str, Any]:
    """Return the arguments of the feature extractor.

    Args:
        settings: the resolved settings, after `check_settings`.

    Raises:
        NemoError: a value is not implemented, or contradicts another.
    """
    fields: dict[str, Any] = {str(field.name): field.value_from_settings(settings) for field in EXTRACTOR_FIELDS}
    num_mel_bins, hop_length, window_length = fields["feature_size"], fields["hop_length"], fields["win_length"]
    if hop_length != HOP_LENGTH:
        raise NemoError(f"`preprocessor.window_stride` must be {HOP_LENGTH} samples, got {hop_length}: {NEEDS_NEMO}")
    if num_mel_bins != find_setting(settings, "encoder.feat_in"):
        raise NemoError(
            f"`preprocessor.features` must equal `encoder.feat_in`, got {num_mel_bins!r}: correct {SETTINGS}"
        )
    # a transform of more than a second of audio is a mistake
    if not 0 < window_length <= fields["n_fft"] <= fields["sampling_rate"]:
        raise NemoError(
            f"`preprocessor.n_fft` must be from {window_length} to {fields['sampling_rate']}, got {fields['n_fft']!r}: "
            f"correct {SETTINGS}"
        )
    return fields
