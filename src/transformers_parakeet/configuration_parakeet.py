# Copyright 2026 The transformers-parakeet authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the Parakeet family, with the field names, defaults and model types of stock transformers.

The networks are in the sub-package `networks`, the models in `modeling_parakeet.py`.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, configuration_utils
from transformers.utils import logging

logger = logging.get_logger(__name__)

# samples between two mel frames: 10 ms at 16 kHz, as in all released checkpoints
HOP_LENGTH = 160
# mel frames per encoder frame in every released checkpoint
SUBSAMPLING_FACTOR = 8

# allowed values of fields of `ParakeetEncoderConfig`, spelled as in NeMo
SELF_ATTENTION_MODELS = ("rel_pos", "rel_pos_local_attn")
CONTEXT_STYLES = ("regular", "chunked_limited", "chunked_limited_with_rc")
CONV_NORM_TYPES = ("batch_norm", "layer_norm")
# allowed values of `loss_reduction` and `ctc_loss_reduction`
LOSS_REDUCTIONS = ("none", "sum", "mean", "mean_batch", "mean_volume")


def _require(is_valid: bool, field_name: str, value: object, rule: str) -> None:
    """Raise a ValueError if a configuration field has an invalid value.

    Args:
        is_valid: whether the value is valid.
        field_name: name of the field.
        value: value of the field.
        rule: description of the valid values, which completes the message "`field_name` must be ...".
    """
    if not is_valid:
        raise ValueError(f"`{field_name}` must be {rule}, got {value!r}: correct it in the configuration")


@strict
class ParakeetEncoderConfig(PreTrainedConfig):
    """Configuration of a FastConformer encoder (arXiv 2305.05084).

    Args:
        hidden_size: width H of the encoder.
        num_hidden_layers: number of Conformer blocks.
        num_attention_heads: number of attention heads; must divide `hidden_size`.
        intermediate_size: width of the feed-forward modules.
        hidden_act: activation of the feed-forward and convolution modules.
        attention_bias: whether the linear layers of the attention and feed-forward modules have biases.
        convolution_bias: whether the convolutions of the convolution modules have biases.
        conv_kernel_size: kernel size of the depthwise convolution in frames; must be odd.
        subsampling_factor: number of mel frames per encoder frame, a power of two.
        subsampling_conv_channels: number of channels of the subsampling convolutions.
        num_mel_bins: number of mel bins F of the features.
        subsampling_conv_kernel_size: kernel size of the subsampling convolutions.
        subsampling_conv_stride: stride of each subsampling convolution.
        dropout: dropout probability of the input of the first block.
        dropout_positions: dropout probability of the position embeddings.
        layerdrop: probability of dropping a block in training; see `stochastic_depth_mode`.
        activation_dropout: dropout probability inside the feed-forward modules.
        attention_dropout: dropout probability of the attention weights.
        max_position_embeddings: unused, because sinusoidal embeddings have no maximum length; kept for compatibility
            with the configuration files of stock transformers.
        scale_input: whether to multiply the output of the subsampling by sqrt(`hidden_size`).
        initializer_range: standard deviation of the initial weights.
        attention_context_size: number of encoder frames that a frame attends to: `[left, right]`, or
            `[left, chunk, right]` for the style `chunked_limited_with_rc`. -1 means unlimited.
        attention_context_sizes: all values of `attention_context_size` that the model was trained with; `None` if the
            model was trained with the present value only.
        attention_context_style: `"regular"`: a frame attends to `left` frames before and `right` frames after it.
            `"chunked_limited"`: frames are grouped in chunks of `right + 1` frames, and a frame attends to its chunk
            and to `left` frames before the chunk. `"chunked_limited_with_rc"`: frames are grouped in chunks of `chunk`
            frames, and a frame attends to its chunk, `left` frames before and `right` frames after the chunk.
        self_attention_model: `"rel_pos"`, or `"rel_pos_local_attn"` for NeMo's local attention. Local attention can
            have global tokens, and computes position scores differently if `left != right`.
        global_tokens: number of global tokens in local attention: frames that attend to all frames, and to which all
            frames attend.
        global_tokens_spacing: number of frames from one global token to the next; the first one is frame 0.
        global_attn_separate: whether global tokens have separate query, key and value projections.
        conv_norm_type: norm after the depthwise convolution, `"batch_norm"` or `"layer_norm"`.
        conv_context_size: `[left, right]` number of frames that the depthwise convolution reads before and after a
            frame; `None` for (`conv_kernel_size` - 1) / 2 on both sides.
        causal_downsampling: whether the subsampling convolutions are padded by kernel size - 1 before and by
            stride - 1 after, in time and frequency, instead of equally.
        residual_dropout: dropout probability of the output of each residual branch of a block. NeMo's `dropout` sets
            this field and `activation_dropout`.
        stochastic_depth_mode: `None`: every block is dropped with probability `layerdrop`, as in stock transformers.
            `"uniform"` and `"linear"` are NeMo's modes: the first `stochastic_depth_start_layer` blocks are never
            dropped. The remaining blocks are dropped with probability `layerdrop` (`"uniform"`), or with a probability
            that increases linearly to `layerdrop` (`"linear"`). The residual of a block that is not dropped is divided
            by the probability of not dropping it.
        stochastic_depth_start_layer: number of blocks that are never dropped if `stochastic_depth_mode` is set; at
            least 1.

    Raises:
        ValueError: a field has an invalid value.
    """

    model_type = "parakeet_encoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    intermediate_size: int = 4096
    hidden_act: str = "silu"
    attention_bias: bool = True
    convolution_bias: bool = True
    conv_kernel_size: int = 9
    subsampling_factor: int = 8
    subsampling_conv_channels: int = 256
    num_mel_bins: int = 80
    subsampling_conv_kernel_size: int = 3
    subsampling_conv_stride: int = 2
    dropout: float | int = 0.1
    dropout_positions: float | int = 0.0
    layerdrop: float | int = 0.1
    activation_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    max_position_embeddings: int = 5000
    scale_input: bool = True
    initializer_range: float = 0.02
    attention_context_size: list[int] | tuple[int, ...] = (-1, -1)
    attention_context_sizes: list[list[int]] | None = None
    attention_context_style: str = "regular"
    self_attention_model: str = "rel_pos"
    global_tokens: int = 0
    global_tokens_spacing: int = 1
    global_attn_separate: bool = False
    conv_norm_type: str = "batch_norm"
    conv_context_size: list[int] | tuple[int, ...] | None = None
    causal_downsampling: bool = False
    residual_dropout: float | int = 0.0
    stochastic_depth_mode: str | None = None
    stochastic_depth_start_layer: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        """Set derived fields and check all fields; `kwargs` are the fields of `PreTrainedConfig`."""
        # attention functions of transformers read this attribute
        self.num_key_value_heads = self.num_attention_heads
        self.attention_context_size = list(self.attention_context_size)
        self._check_subsampling()
        self._check_convolution()
        self._check_attention()
        self._check_stochastic_depth()
        super().__post_init__(**kwargs)

    def _check_subsampling(self) -> None:
        """Raise a ValueError if `subsampling_conv_stride` or `subsampling_factor` is invalid."""
        stride, factor = self.subsampling_conv_stride, self.subsampling_factor
        is_power_of_two = factor >= 2 and factor & (factor - 1) == 0
        _require(stride > 1, "subsampling_conv_stride", stride, "at least 2")
        _require(is_power_of_two, "subsampling_factor", factor, "a power of two, at least 2")

    def _check_convolution(self) -> None:
        """Raise a ValueError if the fields of the convolution modules are invalid or inconsistent."""
        kernel_size, context = self.conv_kernel_size, self.conv_context_size
        norm_rule = " or ".join(CONV_NORM_TYPES)
        context_rule = f"two frame counts whose sum is `conv_kernel_size` - 1 ({kernel_size - 1})"
        # the context and the frame itself must fill the kernel
        is_valid_context = context is None or (
            len(context) == 2 and min(context) >= 0 and sum(context) + 1 == kernel_size
        )
        _require(kernel_size % 2 == 1, "conv_kernel_size", kernel_size, "odd")
        _require(self.conv_norm_type in CONV_NORM_TYPES, "conv_norm_type", self.conv_norm_type, norm_rule)
        _require(is_valid_context, "conv_context_size", context, context_rule)

    def _check_attention(self) -> None:
        """Raise a ValueError if the fields of the attention are invalid or inconsistent."""
        style, attention_model = self.attention_context_style, self.self_attention_model
        spacing, num_heads = self.global_tokens_spacing, self.num_attention_heads
        is_local = attention_model == "rel_pos_local_attn"
        width_rule = f"a multiple of `num_attention_heads` ({num_heads})"
        style_rule = " or ".join(CONTEXT_STYLES)
        model_rule = " or ".join(SELF_ATTENTION_MODELS)
        local_style_rule = f"'rel_pos' when `attention_context_style` is {style!r}"
        global_rule = "0 unless `self_attention_model` is 'rel_pos_local_attn'"
        _require(self.hidden_size % num_heads == 0, "hidden_size", self.hidden_size, width_rule)
        _require(style in CONTEXT_STYLES, "attention_context_style", style, style_rule)
        _require(attention_model in SELF_ATTENTION_MODELS, "self_attention_model", attention_model, model_rule)
        # local attention supports only the regular style
        _require(not is_local or style == "regular", "self_attention_model", attention_model, local_style_rule)
        check_attention_context(style, self.attention_context_size, attention_model)
        _require(self.global_tokens >= 0, "global_tokens", self.global_tokens, "at least 0")
        _require(spacing >= 1, "global_tokens_spacing", spacing, "at least 1")
        _require(is_local or not self.global_tokens, "global_tokens", self.global_tokens, global_rule)

    def _check_stochastic_depth(self) -> None:
        """Raise a ValueError if the stochastic-depth fields are invalid or inconsistent."""
        mode = self.stochastic_depth_mode
        start_layer, num_layers = self.stochastic_depth_start_layer, self.num_hidden_layers
        _require(mode in (None, "linear", "uniform"), "stochastic_depth_mode", mode, "None, 'linear' or 'uniform'")
        if mode is None:
            return
        layerdrop_rule = "in [0, 1) when `stochastic_depth_mode` is set"
        start_rule = f"from 1 to `num_hidden_layers` ({num_layers})"
        _require(0 <= self.layerdrop < 1, "layerdrop", self.layerdrop, layerdrop_rule)
        _require(1 <= start_layer <= num_layers, "stochastic_depth_start_layer", start_layer, start_rule)


def check_attention_context(context_style: str, context_size: Sequence[int], attention_model: str) -> None:
    """Check that an attention context is valid for its style and for the type of attention.

    Args:
        context_style: value of `attention_context_style`.
        context_size: value of `attention_context_size`, in encoder frames.
        attention_model: value of `self_attention_model`.

    Raises:
        ValueError: the combination is not supported.
    """
    field_name = "attention_context_size"
    num_values = 3 if context_style == "chunked_limited_with_rc" else 2
    rule = f"{num_values} frame counts, each -1 or more, for the style {context_style!r}"
    _require(len(context_size) == num_values and min(context_size) >= -1, field_name, context_size, rule)
    if context_style == "chunked_limited" and context_size[0] > 0:
        left, right = context_size
        rule = "[left, right] with `left` a multiple of `right + 1`, the length of a chunk"
        _require(right >= 0 and left % (right + 1) == 0, field_name, context_size, rule)
    if context_style == "chunked_limited_with_rc":
        rule = "[left, chunk, right] with a chunk of at least 1 frame, or [-1, -1, -1]"
        _require(context_size[1] > 0 or max(context_size) < 0, field_name, context_size, rule)
    if attention_model == "rel_pos_local_attn" and max(context_size) >= 0:
        rule = "[left, right] with two counts of at least 0 that are not both 0, or [-1, -1], for local attention"
        _require(min(context_size) >= 0 and max(context_size) > 0, field_name, context_size, rule)


def change_attention_context(config: Any, left: int, right: int, chunk: int | None) -> None:
    """Change the attention context of an encoder configuration; warn if the model was not trained with it.

    Args:
        config: configuration of the encoder; changed in place.
        left: left context in frames, counted from the frame or from its chunk; -1 for no limit.
        right: right context in frames, counted from the frame or from its chunk; -1 for no limit.
        chunk: number of frames in a chunk for the style `chunked_limited_with_rc`, -1 for no limit; `None` for
            the other styles.

    Raises:
        ValueError: `config.attention_context_style` does not allow these numbers.
    """
    style = config.attention_context_style
    needs_chunk = style == "chunked_limited_with_rc"
    if needs_chunk and chunk is None and (left, right) == (-1, -1):
        chunk = -1
    if needs_chunk != (chunk is not None):
        raise ValueError(
            "`chunk` must be given if and only if the context style is chunked_limited_with_rc, "
            f"got {chunk!r} for the style {style}: {'pass' if needs_chunk else 'omit'} `chunk`"
        )
    context_size = [left, right] if chunk is None else [left, chunk, right]
    check_attention_context(style, context_size, config.self_attention_model)
    trained_sizes = config.attention_context_sizes or [config.attention_context_size]
    if context_size not in trained_sizes and max(context_size) >= 0:
        logger.warning_once(
            f"The model was not trained with the attention context {context_size}, only with {trained_sizes}: the "
            "word error rate may increase."
        )
    # keep a record of the context used in training
    if config.attention_context_sizes is None and context_size != config.attention_context_size:
        config.attention_context_sizes = [config.attention_context_size]
    config.attention_context_size = context_size


def add_missing_fields(config: Any) -> None:
    """Add the fields that only this package defines to an encoder configuration of stock transformers.

    The new fields get their defaults. A program has such a configuration if it imported `ParakeetEncoderConfig` from
    transformers before it imported this package.

    Args:
        config: a `ParakeetEncoderConfig` of this package or of transformers; changed in place.
    """
    for field in fields(ParakeetEncoderConfig):
        if not hasattr(config, field.name):
            setattr(config, field.name, field.default)


def _build_sub_config_specs(**config_classes: type[PreTrainedConfig]) -> dict[str, Any]:
    """Build the class attribute `sub_configs_defaults`, from which transformers >= 5.20 reads nested configurations.

    Args:
        **config_classes: field name to class of the nested configuration.

    Returns:
        Field name to `SubConfigSpec`; an empty dict with older releases of transformers, which have no `SubConfigSpec`.
    """
    spec_class: Any = getattr(configuration_utils, "SubConfigSpec", None)
    if spec_class is None:
        return {}
    return {field_name: spec_class(config_class=config_class) for field_name, config_class in config_classes.items()}


class _HeadConfig(PreTrainedConfig):
    """Base class of the configurations of models with a head: nested encoder configuration and frame rate.

    Args:
        encoder_config: configuration of the encoder, or a dict of its fields; `None` for the default fields.
    """

    # transformers up to 5.19 reads `sub_configs`, newer releases read `sub_configs_defaults`
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"encoder_config": ParakeetEncoderConfig}
    sub_configs_defaults: ClassVar[dict[str, Any]] = _build_sub_config_specs(encoder_config=ParakeetEncoderConfig)

    # a dict or `None` as argument, a `ParakeetEncoderConfig` after `__post_init__`
    encoder_config: Any = None

    def _build_encoder_config(self) -> None:
        """Build a `ParakeetEncoderConfig` if `self.encoder_config` is `None` or a dict of fields."""
        if self.encoder_config is None:
            self.encoder_config = ParakeetEncoderConfig()
        elif isinstance(self.encoder_config, dict):
            # saved dicts contain `model_type`, which is not a field
            encoder_fields = {name: value for name, value in self.encoder_config.items() if name != "model_type"}
            self.encoder_config = ParakeetEncoderConfig(**encoder_fields)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Number of samples per encoder frame at 16 kHz; tools of transformers compute times with it."""
        return HOP_LENGTH * int(self.encoder_config.subsampling_factor)


@strict
class ParakeetCTCConfig(_HeadConfig):
    """Configuration of `ParakeetForCTC`.

    Args:
        vocab_size: number of tokens V with the blank.
        ctc_loss_reduction: `"mean"` (the loss of each clip is divided by its number of labels and then averaged over
            clips), `"sum"`, `"none"`, or NeMo's `"mean_batch"` (average over clips) and `"mean_volume"` (sum over clips
            divided by the number of labels in the batch).
        ctc_zero_infinity: whether to replace the infinite loss of a clip with too few frames for its transcript by 0.
        encoder_config: configuration of the encoder, or a dict of its fields; `None` for the default fields.
        pad_token_id: id of the blank, which is also the padding token.
        spec_augment: NeMo's SpecAugment settings for training: `freq_masks`, `freq_width`, `time_masks`, `time_width`;
            `None` for no SpecAugment.
        segment_separators: characters that end a segment in timestamps.
        segment_gap_threshold: minimum number of frames between two words that starts a new segment; `None` to end
            segments at separators only.
        nemo_config: YAML of the `.nemo` file from which the checkpoint was converted, used by `export_nemo`; `None` if
            the checkpoint was not converted.
    """

    model_type = "parakeet_ctc"

    vocab_size: int = 1025
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = True
    pad_token_id: int = 1024
    spec_augment: dict[str, Any] | None = None
    segment_separators: list[str] | tuple[str, ...] = (".", "?", "!")
    segment_gap_threshold: int | None = None
    nemo_config: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Set derived fields and check all fields; `kwargs` are the fields of `PreTrainedConfig`."""
        self._build_encoder_config()
        super().__post_init__(**kwargs)
        self.initializer_range = self.encoder_config.initializer_range


@strict
class ParakeetRNNTConfig(_HeadConfig):
    """Configuration of `ParakeetForRNNT`, or of a hybrid model with an additional CTC head.

    Args:
        vocab_size: number of tokens V with the blank.
        decoder_hidden_size: width of the prediction network.
        num_decoder_layers: number of LSTM layers of the prediction network.
        joint_hidden_size: width J of the joint network; `None` for `decoder_hidden_size`.
        hidden_act: activation of the joint network.
        max_symbols_per_step: maximum number of labels that greedy decoding emits on one frame.
        encoder_config: configuration of the encoder, or a dict of its fields; `None` for the default fields.
        pad_token_id: id of the padding token of labels and generated sequences; may be the blank.
        blank_token_id: id of the blank.
        is_encoder_decoder: must be True; transformers' `generate` then runs the encoder before decoding.
        forced_blanks: whether `generate` returns a blank step for each advance that `max_symbols_per_step` forces, and
            keeps the predicted durations of the labels, as in NeMo. If False, the advance is added to the duration of
            the last label, as in stock transformers' RNN-T.
        decoder_dropout: dropout probability of the prediction network.
        joint_dropout: dropout probability of the joint network.
        loss_reduction: reduction of the transducer loss: `"mean"`, `"mean_batch"`, `"mean_volume"`, `"sum"` or
            `"none"`, defined as for `ctc_loss_reduction` of `ParakeetCTCConfig`.
        fastemit_lambda: FastEmit weight (arXiv 2010.11148).
        kernel: use of the GPU kernel of the transducer loss: `"auto"` (if possible), `"off"` (never) or `"require"`
            (raise an error if the kernel cannot be used).
        ctc_head: whether the transducer also has a CTC head (hybrid model).
        ctc_loss_weight: weight w in the hybrid loss (1 - w) * transducer loss + w * CTC loss.
        ctc_loss_reduction: reduction of the CTC loss, as in `ParakeetCTCConfig`.
        ctc_zero_infinity: whether to replace an infinite CTC loss by 0, as in `ParakeetCTCConfig`.
        spec_augment: SpecAugment settings, as in `ParakeetCTCConfig`.
        segment_separators: characters that end a segment in timestamps.
        segment_gap_threshold: minimum number of frames between segments, as in `ParakeetCTCConfig`.
        nemo_config: YAML of the `.nemo` file, as in `ParakeetCTCConfig`.
    """

    model_type = "parakeet_rnnt"

    vocab_size: int = 8193
    decoder_hidden_size: int = 640
    num_decoder_layers: int = 2
    joint_hidden_size: int | None = None
    hidden_act: str = "relu"
    max_symbols_per_step: int = 10
    pad_token_id: int = 2
    blank_token_id: int = 8192
    is_encoder_decoder: bool = True
    forced_blanks: bool = False
    decoder_dropout: float | int = 0.0
    joint_dropout: float | int = 0.0
    loss_reduction: str = "mean_volume"
    fastemit_lambda: float | int = 0.0
    kernel: str = "auto"
    ctc_head: bool = False
    ctc_loss_weight: float | int = 0.3
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = True
    spec_augment: dict[str, Any] | None = None
    segment_separators: list[str] | tuple[str, ...] = (".", "?", "!")
    segment_gap_threshold: int | None = None
    nemo_config: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Set derived fields and check all fields; `kwargs` are the fields of `PreTrainedConfig`."""
        self._build_encoder_config()
        super().__post_init__(**kwargs)
        self.initializer_range = self.encoder_config.initializer_range
        blank_id, blank_rule = self.blank_token_id, f"an id below `vocab_size` ({self.vocab_size})"
        _require(0 <= blank_id < self.vocab_size, "blank_token_id", blank_id, blank_rule)
        _require(self.kernel in ("auto", "off", "require"), "kernel", self.kernel, "auto, off or require")
        _require(self.max_symbols_per_step > 0, "max_symbols_per_step", self.max_symbols_per_step, "at least 1")


@strict
class ParakeetTDTConfig(ParakeetRNNTConfig):
    """Configuration of `ParakeetForTDT`: all fields of `ParakeetRNNTConfig`, and the fields of TDT (arXiv 2304.06795).

    Args:
        durations: number of frames that each of the D duration outputs stands for.
        loss_reduction: reduction of the TDT loss, as in `ParakeetRNNTConfig`, but with another default.
        loss_sigma: logit under-normalisation, subtracted from the token log-probabilities in the loss.
        loss_omega: probability that a batch is trained with the RNN-T loss of the token logits instead of the TDT loss.
    """

    model_type = "parakeet_tdt"

    durations: list[int] | tuple[int, ...] = (0, 1, 2, 3, 4)
    loss_reduction: str = "mean"
    loss_sigma: float | int = 0.0
    loss_omega: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Set derived fields and check all fields; `kwargs` are the fields of `PreTrainedConfig`."""
        super().__post_init__(**kwargs)
        rule = "a list of frame counts that are all at least 0 and not all 0"
        _require(max(self.durations, default=0) > 0 and min(self.durations) >= 0, "durations", self.durations, rule)


def get_head_type(config: Any) -> str:
    """Return the head type of a Parakeet configuration: `"ctc"`, `"rnnt"` or `"tdt"`.

    Args:
        config: configuration of a model with a head.
    """
    return str(config.model_type).removeprefix("parakeet_")


def get_blank_id(config: Any) -> int:
    """Return the id of the blank token, which a CTC configuration stores as `pad_token_id`.

    Args:
        config: configuration of a model with a head.
    """
    return int(config.pad_token_id if get_head_type(config) == "ctc" else config.blank_token_id)


__all__ = ["ParakeetCTCConfig", "ParakeetEncoderConfig", "ParakeetRNNTConfig", "ParakeetTDTConfig"]
