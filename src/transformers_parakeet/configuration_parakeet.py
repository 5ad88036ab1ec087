# Copyright 2026 The transformers-parakeet authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the Parakeet family, with the field names, defaults and model types of stock transformers.

The networks that the fields describe are in the sub-package `networks`, the models in `modeling_parakeet.py`.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, configuration_utils

# samples per mel frame: 10 ms at 16 kHz, the only frame rate of the released checkpoints
HOP_LENGTH = 160

# values of `ParakeetEncoderConfig` fields, spelled as in NeMo
SELF_ATTENTION_MODELS = ("rel_pos", "rel_pos_local_attn")
CONTEXT_STYLES = ("regular", "chunked_limited", "chunked_limited_with_rc")
CONV_NORM_TYPES = ("batch_norm", "layer_norm")
# values of `loss_reduction` and `ctc_loss_reduction`
LOSS_REDUCTIONS = ("none", "sum", "mean", "mean_batch", "mean_volume")


def _require(is_valid: bool, name: str, value: object, rule: str) -> None:
    """Raise an error about a field of a configuration unless its value is valid.

    Args:
        is_valid: whether the value is valid.
        name: name of the field.
        value: value of the field.
        rule: what the value must be, for the message "`name` must be ...".

    Raises:
        ValueError: the value is not valid.
    """
    if not is_valid:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}: correct it in the configuration")


@strict
class ParakeetEncoderConfig(PreTrainedConfig):
    """Configuration of a FastConformer encoder (arXiv 2305.05084).

    Args:
        hidden_size: width H of the encoder.
        num_hidden_layers: number of conformer blocks.
        num_attention_heads: number of attention heads; divides `hidden_size`.
        intermediate_size: width of the feed-forward modules.
        hidden_act: activation of the feed-forward and convolution modules.
        attention_bias: biases in attention and feed-forward projections.
        convolution_bias: biases in the convolution modules.
        conv_kernel_size: kernel size of the depthwise convolution in frames, odd.
        subsampling_factor: mel frames per encoder frame, a power of two.
        subsampling_conv_channels: number of channels of the subsampling convolutions.
        num_mel_bins: number of mel bins F of the features.
        subsampling_conv_kernel_size: kernel size of the subsampling convolutions.
        subsampling_conv_stride: stride of each subsampling convolution.
        dropout: dropout probability of the input of the first block.
        dropout_positions: dropout probability of the position embeddings.
        layerdrop: probability of dropping a block in training.
        activation_dropout: dropout probability inside the feed-forward modules.
        attention_dropout: dropout probability of the attention weights.
        max_position_embeddings: not used, because sinusoids have no maximum length; part of stock's file format.
        scale_input: multiply the subsampled input by sqrt(H).
        initializer_range: standard deviation of the initial weights.
        attention_context_size: encoder frames that a frame attends to: `[left, right]`, or `[left, chunk, right]` for
            the style `chunked_limited_with_rc`. -1 means unlimited.
        attention_context_sizes: all context sizes that the model was trained with; `None` if it was trained with
            `attention_context_size` only.
        attention_context_style: `"regular"`: the context is relative to each frame. `"chunked_limited"`: frames are
            grouped in chunks of `right + 1`, and a frame attends to its chunk and to `left` frames before the chunk.
            `"chunked_limited_with_rc"`: frames are grouped in chunks of `chunk`, and a frame attends to its chunk,
            `left` frames before and `right` frames after it.
        self_attention_model: `"rel_pos"`, or `"rel_pos_local_attn"` for NeMo's local attention, which differs from a
            regular context in its global tokens and in contexts with `left != right`.
        global_tokens: number of frames of local attention that attend to all frames and to which all frames attend.
        global_tokens_spacing: distance of the global tokens in frames; the first one is frame 0.
        global_attn_separate: global tokens have separate query, key and value projections.
        conv_norm_type: norm after the depthwise convolution, `"batch_norm"` or `"layer_norm"`.
        conv_context_size: `[left, right]` frames that the depthwise convolution reads; `None` for the same number on
            both sides.
        causal_downsampling: pad the subsampling convolutions by 2 before and 1 after, in time and in frequency.
        residual_dropout: dropout probability of the output of every residual branch of a block. NeMo's `dropout` sets
            this and `activation_dropout`.
        stochastic_depth_mode: `None`: every block is dropped with probability `layerdrop`, as in stock transformers.
            `"uniform"` and `"linear"` are NeMo's modes: the first `stochastic_depth_start_layer` blocks are never
            dropped, the others with probability `layerdrop`, or with a probability that grows linearly up to
            `layerdrop`. The residual of a block that is not dropped is divided by the probability of not dropping it.
        stochastic_depth_start_layer: number of blocks that these two modes never drop, at least 1.

    Raises:
        ValueError: no encoder can be built with the value of a field.
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
        """Complete and check the fields; `kwargs` are fields of the base class."""
        # transformers reads the attention's number of key and value heads
        self.num_key_value_heads = self.num_attention_heads
        self.attention_context_size = list(self.attention_context_size)
        self._check_subsampling()
        self._check_convolution()
        self._check_attention()
        self._check_stochastic_depth()
        super().__post_init__(**kwargs)

    def _check_subsampling(self) -> None:
        """Raise ValueError if the convolutions cannot shorten the features by `subsampling_factor`."""
        stride, factor = self.subsampling_conv_stride, self.subsampling_factor
        is_power_of_two = factor >= 2 and factor & (factor - 1) == 0
        _require(stride > 1, "subsampling_conv_stride", stride, "at least 2")
        _require(is_power_of_two, "subsampling_factor", factor, "a power of two, at least 2")

    def _check_convolution(self) -> None:
        """Raise ValueError if the fields of the convolution modules do not fit together."""
        kernel_size, context = self.conv_kernel_size, self.conv_context_size
        norm_types = " or ".join(CONV_NORM_TYPES)
        context_rule = f"two frame counts whose sum is `conv_kernel_size` - 1 ({kernel_size - 1})"
        fills_kernel = context is None or (len(context) == 2 and min(context) >= 0 and sum(context) + 1 == kernel_size)
        _require(kernel_size % 2 == 1, "conv_kernel_size", kernel_size, "odd")
        _require(self.conv_norm_type in CONV_NORM_TYPES, "conv_norm_type", self.conv_norm_type, norm_types)
        _require(fills_kernel, "conv_context_size", context, context_rule)

    def _check_attention(self) -> None:
        """Raise ValueError if the fields of the attention do not fit together."""
        style, attention_model = self.attention_context_style, self.self_attention_model
        spacing, num_heads = self.global_tokens_spacing, self.num_attention_heads
        is_local = attention_model == "rel_pos_local_attn"
        models = " or ".join(SELF_ATTENTION_MODELS)
        model_rule = f"'rel_pos' when `attention_context_style` is {style!r}"
        width_rule = f"a multiple of `num_attention_heads` ({num_heads})"
        global_rule = "0 unless `self_attention_model` is 'rel_pos_local_attn'"
        _require(self.hidden_size % num_heads == 0, "hidden_size", self.hidden_size, width_rule)
        _require(style in CONTEXT_STYLES, "attention_context_style", style, " or ".join(CONTEXT_STYLES))
        _require(attention_model in SELF_ATTENTION_MODELS, "self_attention_model", attention_model, models)
        _require(not is_local or style == "regular", "self_attention_model", attention_model, model_rule)
        check_attention_context(style, self.attention_context_size, attention_model)
        _require(self.global_tokens >= 0, "global_tokens", self.global_tokens, "at least 0")
        _require(spacing >= 1, "global_tokens_spacing", spacing, "at least 1")
        _require(is_local or not self.global_tokens, "global_tokens", self.global_tokens, global_rule)

    def _check_stochastic_depth(self) -> None:
        """Raise ValueError if the fields that choose the blocks dropped in training do not fit together."""
        mode, first_dropped, num_blocks = (
            self.stochastic_depth_mode,
            self.stochastic_depth_start_layer,
            self.num_hidden_layers,
        )
        _require(mode in (None, "linear", "uniform"), "stochastic_depth_mode", mode, "None, 'linear' or 'uniform'")
        if mode is None:
            return
        probability_rule = "at least 0 and below 1 with `stochastic_depth_mode`"
        start_rule = f"from 1 to `num_hidden_layers` ({num_blocks})"
        _require(0 <= self.layerdrop < 1, "layerdrop", self.layerdrop, probability_rule)
        _require(1 <= first_dropped <= num_blocks, "stochastic_depth_start_layer", first_dropped, start_rule)


def check_attention_context(style: str, context: Sequence[int], attention_model: str) -> None:
    """Check an attention context against the style of the context and the kind of attention.

    Args:
        style: value of `attention_context_style`.
        context: value of `attention_context_size`, in encoder frames.
        attention_model: value of `self_attention_model`.

    Raises:
        ValueError: the combination is not possible.
    """
    name = "attention_context_size"
    num_counts = 3 if style == "chunked_limited_with_rc" else 2
    rule = f"{num_counts} frame counts, each -1 or more, for the style {style!r}"
    _require(len(context) == num_counts and min(context) >= -1, name, context, rule)
    if style == "chunked_limited" and context[0] > 0:
        rule = "[left, right] with `left` a multiple of `right + 1`, the length of a chunk"
        _require(context[1] >= 0 and context[0] % (context[1] + 1) == 0, name, context, rule)
    if style == "chunked_limited_with_rc":
        rule = "[left, chunk, right] with a chunk of at least 1 frame, or [-1, -1, -1]"
        _require(context[1] > 0 or max(context) < 0, name, context, rule)
    if attention_model == "rel_pos_local_attn" and max(context) >= 0:
        rule = "[left, right] with no negative count and one above 0, or [-1, -1], for local attention"
        _require(min(context) >= 0 and max(context) > 0, name, context, rule)


def add_missing_fields(config: Any) -> None:
    """Add the fields that only this package has, with their defaults, to a configuration of stock transformers.

    A program gets such a configuration if it imported the class from transformers before it imported this package.

    Args:
        config: a `ParakeetEncoderConfig` of this package or of transformers; changed in place.
    """
    for field in fields(ParakeetEncoderConfig):
        if not hasattr(config, field.name):
            setattr(config, field.name, field.default)


def _sub_config_specs(**classes: type[PreTrainedConfig]) -> dict[str, Any]:
    """Describe nested configurations in the form that transformers 5.20 and newer read from `sub_configs_defaults`.

    Args:
        **classes: class of each nested configuration, by field name.

    Returns:
        A `SubConfigSpec` for each field; empty for older releases, which have no such class.
    """
    spec_class: Any = getattr(configuration_utils, "SubConfigSpec", None)
    if spec_class is None:
        return {}
    return {name: spec_class(config_class=config_class) for name, config_class in classes.items()}


class _HeadConfig(PreTrainedConfig):
    """Base of the configurations of models with a head: the nested configuration of the encoder and the frame rate."""

    # transformers up to 5.19 reads `sub_configs`, newer releases read `sub_configs_defaults`
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"encoder_config": ParakeetEncoderConfig}
    sub_configs_defaults: ClassVar[dict[str, Any]] = _sub_config_specs(encoder_config=ParakeetEncoderConfig)

    # a dict or `None` as argument, a `ParakeetEncoderConfig` after `__post_init__`
    encoder_config: Any = None

    def _build_encoder_config(self) -> None:
        """Replace an `encoder_config` that is `None` or a dict of fields by a configuration."""
        if self.encoder_config is None:
            self.encoder_config = ParakeetEncoderConfig()
        elif isinstance(self.encoder_config, dict):
            encoder_fields = {name: value for name, value in self.encoder_config.items() if name != "model_type"}
            self.encoder_config = ParakeetEncoderConfig(**encoder_fields)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples per encoder frame at 16 kHz, from which transformers' tools compute times."""
        return HOP_LENGTH * int(self.encoder_config.subsampling_factor)


@strict
class ParakeetCTCConfig(_HeadConfig):
    """Configuration of `ParakeetForCTC`.

    Args:
        vocab_size: number of tokens V with the blank.
        ctc_loss_reduction: `"mean"` (each loss divided by its number of labels, then the mean over clips), `"sum"`,
            `"none"`, or NeMo's `"mean_batch"` (mean over clips) and `"mean_volume"` (sum over clips divided by the
            number of labels of the batch).
        ctc_zero_infinity: replace the infinite loss of a transcript that is too long for its frames by 0.
        encoder_config: configuration of the encoder, or its fields as a dict.
        pad_token_id: id of the blank, which is also the padding.
        spec_augment: NeMo's SpecAugment settings for training: `freq_masks`, `freq_width`, `time_masks`, `time_width`.
        segment_separators: characters that end a segment in timestamps.
        segment_gap_threshold: number of frames between two words from which on the second begins a new segment; `None`
            to use the separators only.
        nemo_config: YAML of the `.nemo` file from which the checkpoint was converted; `export_nemo` writes it again.
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
        """Complete and check the fields; `kwargs` are fields of the base class."""
        self._build_encoder_config()
        super().__post_init__(**kwargs)
        self.initializer_range = self.encoder_config.initializer_range


@strict
class ParakeetRNNTConfig(_HeadConfig):
    """Configuration of `ParakeetForRNNT`; with `ctc_head=True`, of a hybrid of transducer and CTC.

    Args:
        vocab_size: number of tokens V with the blank.
        decoder_hidden_size: width P of the LSTM prediction network.
        num_decoder_layers: number of LSTM layers of the prediction network.
        joint_hidden_size: width J of the joint network; `None` means `decoder_hidden_size`.
        hidden_act: activation of the joint network.
        max_symbols_per_step: largest number of labels that greedy decoding emits on one frame.
        encoder_config: configuration of the encoder, or its fields as a dict.
        pad_token_id: id of the padding of labels and generated sequences; may be the blank.
        blank_token_id: id of the blank.
        forced_blanks: how `generate` returns an advance that `max_symbols_per_step` forces. `True`: as an additional
            blank step, so that durations are the predicted ones, as in NeMo. `False`: as part of the duration of the
            last label, as in stock transformers' RNN-T.
        decoder_dropout: dropout probability of the prediction network.
        joint_dropout: dropout probability of the joint network.
        loss_reduction: `"mean"`, `"mean_batch"`, `"mean_volume"`, `"sum"` or `"none"`, see `ctc_loss_reduction`.
        fastemit_lambda: FastEmit weight (arXiv 2010.11148).
        kernel: GPU kernel of the transducer loss: `"auto"` uses it where possible, `"off"` never, `"require"` always.
        ctc_head: the checkpoint is a hybrid, which has a CTC head and a transducer head.
        ctc_loss_weight: w in the hybrid loss (1 - w) * transducer loss + w * CTC loss.
        ctc_loss_reduction: as in `ParakeetCTCConfig`.
        ctc_zero_infinity: as in `ParakeetCTCConfig`.
        spec_augment: as in `ParakeetCTCConfig`.
        segment_separators: as in `ParakeetCTCConfig`.
        segment_gap_threshold: as in `ParakeetCTCConfig`.
        nemo_config: as in `ParakeetCTCConfig`.
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
        """Complete and check the fields; `kwargs` are fields of the base class."""
        self._build_encoder_config()
        super().__post_init__(**kwargs)
        self.initializer_range = self.encoder_config.initializer_range
        blank_id, blank_rule = self.blank_token_id, f"an id below `vocab_size` ({self.vocab_size})"
        _require(0 <= blank_id < self.vocab_size, "blank_token_id", blank_id, blank_rule)
        _require(self.kernel in ("auto", "off", "require"), "kernel", self.kernel, "auto, off or require")
        _require(self.max_symbols_per_step > 0, "max_symbols_per_step", self.max_symbols_per_step, "at least 1")


@strict
class ParakeetTDTConfig(ParakeetRNNTConfig):
    """Configuration of `ParakeetForTDT`: the fields of `ParakeetRNNTConfig` and the durations (arXiv 2304.06795).

    Args:
        durations: number of frames that each of the D duration outputs advances.
        loss_sigma: logit under-normalisation, subtracted from the log-probability of every token in the loss.
        loss_omega: probability of training a batch with the RNN-T loss of its token scores instead of the TDT loss.
    """

    model_type = "parakeet_tdt"

    durations: list[int] | tuple[int, ...] = (0, 1, 2, 3, 4)
    loss_reduction: str = "mean"
    loss_sigma: float | int = 0.0
    loss_omega: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete and check the fields; `kwargs` are fields of the base class."""
        super().__post_init__(**kwargs)
        rule = "a list of frame counts, none negative and at least one above 0"
        _require(max(self.durations, default=0) > 0 and min(self.durations) >= 0, "durations", self.durations, rule)


def kind_of(config: Any) -> str:
    """Return the kind of head that a configuration of this family describes: `"ctc"`, `"rnnt"` or `"tdt"`."""
    return str(config.model_type).removeprefix("parakeet_")


def blank_of(config: Any) -> int:
    """Return the id of the blank token; a CTC configuration stores it as `pad_token_id`."""
    return int(config.pad_token_id if kind_of(config) == "ctc" else config.blank_token_id)


__all__ = ["ParakeetCTCConfig", "ParakeetEncoderConfig", "ParakeetRNNTConfig", "ParakeetTDTConfig"]
