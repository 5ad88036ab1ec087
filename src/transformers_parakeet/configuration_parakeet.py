# Copyright 2026 The transformers-parakeet authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the Parakeet family, with the field names, defaults and model types of stock transformers.

What the fields build is decided in `attention.py`, `conformer.py` and `transducer.py`.
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


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise when a field holds a value that no model can be built from."""
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}: correct it in the configuration")


@strict
class ParakeetEncoderConfig(PreTrainedConfig):
    """Configuration of a FastConformer encoder (arXiv 2305.05084).

    Args:
        hidden_size: width D of the encoder.
        num_hidden_layers: number of conformer blocks.
        num_attention_heads: number of attention heads; divides `hidden_size`.
        intermediate_size: width of the feed-forward modules.
        hidden_act: activation of the feed-forward and convolution modules.
        attention_bias: biases in attention and feed-forward projections.
        convolution_bias: biases in the convolution modules.
        conv_kernel_size: frames seen by the depthwise convolution, odd.
        subsampling_factor: mel frames per encoder frame, a power of two.
        subsampling_conv_channels: channels of the subsampling convolutions.
        num_mel_bins: mel bins F of the features.
        subsampling_conv_kernel_size: kernel of the subsampling convolutions.
        subsampling_conv_stride: stride of each subsampling convolution.
        dropout: probability before the first block.
        dropout_positions: probability on the position embeddings.
        layerdrop: probability of dropping a block in training.
        activation_dropout: probability inside the feed-forward modules.
        attention_dropout: probability on the attention weights.
        max_position_embeddings: kept for the file format; the sinusoids have no limit.
        scale_input: multiply the subsampled input by sqrt(D).
        initializer_range: standard deviation of the initial weights.
        attention_context_size: encoder frames that a frame attends to: `[left, right]`, or `[left, chunk, right]` for
            the style `chunked_limited_with_rc`. -1 means unlimited.
        attention_context_sizes: all context sizes that the model was trained with; `None` for that one alone.
        attention_context_style: `"regular"`: each frame has its own window. `"chunked_limited"`: frames are grouped in
            chunks of `right + 1`, and a frame attends to its own chunk and to `left` frames before it.
            `"chunked_limited_with_rc"`: the same with chunks of `chunk` and `right` frames after the chunk.
        self_attention_model: `"rel_pos"`, or `"rel_pos_local_attn"` for NeMo's local attention, which differs from a
            regular context in its global tokens and in windows with `left != right`.
        global_tokens: first frames that every frame attends to in local attention; they attend to all frames.
        global_tokens_spacing: frames from one global token to the next.
        global_attn_separate: global tokens have query, key and value projections of their own.
        conv_norm_type: norm after the depthwise convolution, `"batch_norm"` or `"layer_norm"`.
        conv_context_size: `[left, right]` frames that the depthwise convolution sees; `None` for as many on each side.
        causal_downsampling: pad the subsampling convolutions by 2 before and 1 after, in time and in frequency.
        residual_dropout: probability on the output of every residual branch of a block; NeMo's `dropout` is this and
            `activation_dropout`.
        stochastic_depth_mode: `None`: every block is dropped with probability `layerdrop`, as in stock transformers.
            As in NeMo, `"linear"`, where the probability grows with depth up to `layerdrop`, and `"uniform"` drop no
            block before `stochastic_depth_start_layer`, and divide what other blocks add by the chance of keeping it.
        stochastic_depth_start_layer: number of blocks that are never dropped in these two modes, at least 1.

    Raises:
        ValueError: a field holds a value that no encoder can be built from.
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
        self.num_key_value_heads = self.num_attention_heads
        self.attention_context_size = list(self.attention_context_size)
        factor, stride = self.subsampling_factor, self.subsampling_conv_stride
        _check(self.hidden_size % self.num_attention_heads == 0, "hidden_size", self.hidden_size,
               f"a multiple of `num_attention_heads` ({self.num_attention_heads})")  # fmt: skip
        _check(self.conv_kernel_size % 2 == 1, "conv_kernel_size", self.conv_kernel_size, "odd")
        _check(stride > 1, "subsampling_conv_stride", stride, "at least 2")
        _check(factor >= 2 and factor & (factor - 1) == 0, "subsampling_factor", factor, "a power of two, at least 2")
        _check(self.conv_norm_type in CONV_NORM_TYPES, "conv_norm_type", self.conv_norm_type,
               " or ".join(CONV_NORM_TYPES))  # fmt: skip
        context = self.conv_context_size
        fits = context is None or (
            len(context) == 2 and min(context) >= 0 and sum(context) + 1 == self.conv_kernel_size
        )
        _check(fits, "conv_context_size", context,
               f"two frame counts whose sum is `conv_kernel_size` - 1 ({self.conv_kernel_size - 1})")  # fmt: skip
        self._check_attention()
        self._check_stochastic_depth()
        super().__post_init__(**kwargs)

    def _check_stochastic_depth(self) -> None:
        """Check the fields that say which blocks are dropped in training."""
        mode, start, layers = self.stochastic_depth_mode, self.stochastic_depth_start_layer, self.num_hidden_layers
        _check(mode in (None, "linear", "uniform"), "stochastic_depth_mode", mode, "None, 'linear' or 'uniform'")
        if mode is not None:
            _check(0 <= self.layerdrop < 1, "layerdrop", self.layerdrop,
                   "at least 0 and below 1 with `stochastic_depth_mode`")  # fmt: skip
            _check(
                1 <= start <= layers, "stochastic_depth_start_layer", start, f"from 1 to `num_hidden_layers` ({layers})"
            )

    def _check_attention(self) -> None:
        """Check the fields of the attention."""
        style, model = self.attention_context_style, self.self_attention_model
        _check(style in CONTEXT_STYLES, "attention_context_style", style, " or ".join(CONTEXT_STYLES))
        _check(model in SELF_ATTENTION_MODELS, "self_attention_model", model, " or ".join(SELF_ATTENTION_MODELS))
        _check(model == "rel_pos" or style == "regular", "self_attention_model", model,
               f"'rel_pos' when `attention_context_style` is {style!r}")  # fmt: skip
        check_attention_context(style, self.attention_context_size, model)
        _check(self.global_tokens >= 0, "global_tokens", self.global_tokens, "at least 0")
        _check(self.global_tokens_spacing >= 1, "global_tokens_spacing", self.global_tokens_spacing, "at least 1")
        _check(not self.global_tokens or model == "rel_pos_local_attn", "global_tokens", self.global_tokens,
               "0 unless `self_attention_model` is 'rel_pos_local_attn'")  # fmt: skip


def check_attention_context(style: str, context: Sequence[int], model: str) -> None:
    """Check a context size against the style of the context.

    Args:
        style: `attention_context_style`.
        context: `attention_context_size`.
        model: `self_attention_model`.

    Raises:
        ValueError: the style has no such context.
    """
    name = "attention_context_size"
    numbers = 3 if style == "chunked_limited_with_rc" else 2
    _check(len(context) == numbers and min(context) >= -1, name, context,
           f"{numbers} frame counts, each -1 or more, for the style {style!r}")  # fmt: skip
    if style == "chunked_limited" and context[0] > 0:
        _check(context[1] >= 0 and context[0] % (context[1] + 1) == 0, name, context,
               "[left, right] with `left` a multiple of `right + 1`, the length of a chunk")  # fmt: skip
    if style == "chunked_limited_with_rc":
        _check(context[1] > 0 or max(context) < 0, name, context,
               "[left, chunk, right] with a chunk of at least 1 frame, or [-1, -1, -1]")  # fmt: skip
    if model == "rel_pos_local_attn" and max(context) >= 0:
        _check(min(context) >= 0 and max(context) > 0, name, context,
               "[left, right] with no negative count and one above 0, or [-1, -1], for local attention")  # fmt: skip


def add_missing_fields(config: Any) -> None:
    """Give a configuration of transformers' own encoder the fields that only ours has, with their defaults.

    Such a configuration comes from a class that a program took from transformers before it imported this package.
    """
    for field in fields(ParakeetEncoderConfig):
        if not hasattr(config, field.name):
            setattr(config, field.name, field.default)


def _sub_config_specs(**classes: type[PreTrainedConfig]) -> dict[str, Any]:
    """Describe the configurations inside another one, by field name, as transformers wants them from 5.20 on.

    5.20 calls methods of `SubConfigSpec`; 5.21 and newer also accept a class. Older releases have no such description.
    """
    spec: Any = getattr(configuration_utils, "SubConfigSpec", None)
    return {} if spec is None else {name: spec(config_class=config) for name, config in classes.items()}


class _HeadConfig(PreTrainedConfig):
    """What the heads share: the encoder's configuration, the frame rate, and settings that a `.nemo` file carries."""

    # transformers reads the first up to 5.19, the second from 5.20 on
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"encoder_config": ParakeetEncoderConfig}
    sub_configs_defaults: ClassVar[dict[str, Any]] = _sub_config_specs(encoder_config=ParakeetEncoderConfig)

    # a `ParakeetEncoderConfig` once built
    encoder_config: Any = None

    def _build_encoder_config(self, given: Any) -> Any:
        """Turn a missing or plain-dict `encoder_config` into a configuration."""
        if given is None:
            return ParakeetEncoderConfig()
        if isinstance(given, dict):
            return ParakeetEncoderConfig(**{key: value for key, value in given.items() if key != "model_type"})
        return given

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples per encoder frame at 16 kHz, by which stock tools turn frames into seconds."""
        return HOP_LENGTH * int(self.encoder_config.subsampling_factor)


@strict
class ParakeetCTCConfig(_HeadConfig):
    """Configuration of `ParakeetForCTC`.

    Args:
        vocab_size: number of tokens V, the blank included.
        ctc_loss_reduction: `"mean"` (over labels, then clips), `"sum"`, `"none"`, or NeMo's `"mean_batch"` (over clips)
            and `"mean_volume"` (sum over clips divided by the number of labels).
        ctc_zero_infinity: count a transcript that does not fit into its frames as zero loss.
        encoder_config: configuration of the encoder, or its fields as a dict.
        pad_token_id: the blank, which also pads.
        spec_augment: NeMo's SpecAugment settings for training: `freq_masks`, `freq_width`, `time_masks`, `time_width`.
        segment_separators: characters that end a segment in timestamps.
        segment_gap_threshold: frames of silence that end a segment instead, as in NeMo.
        nemo_config: YAML of the `.nemo` file that the checkpoint came from; `export_nemo` gives them back.
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
        self.encoder_config = self._build_encoder_config(self.encoder_config)
        super().__post_init__(**kwargs)
        self.initializer_range = self.encoder_config.initializer_range


@strict
class ParakeetRNNTConfig(_HeadConfig):
    """Configuration of `ParakeetForRNNT`; with `ctc_head=True`, of a hybrid of transducer and CTC.

    Args:
        vocab_size: number of tokens V, the blank included.
        decoder_hidden_size: width of the LSTM prediction network.
        num_decoder_layers: number of its layers.
        joint_hidden_size: width of the joint network; `None` means `decoder_hidden_size`.
        hidden_act: activation of the joint network.
        max_symbols_per_step: labels that greedy decoding emits at most on one frame.
        encoder_config: configuration of the encoder, or its fields as a dict.
        pad_token_id: pads labels and generated sequences; may be the blank.
        blank_token_id: the blank.
        forced_blanks: how `generate` returns a move that `max_symbols_per_step` forces. `True`: as an additional blank
            step, so that durations are the predicted ones, as in NeMo. `False`: as part of the last label's duration,
            as in stock transformers' RNN-T.
        decoder_dropout: dropout of the prediction network, in training.
        joint_dropout: dropout of the joint network, in training.
        loss_reduction: `"mean"`, `"mean_batch"`, `"mean_volume"`, `"sum"` or `"none"`.
        fastemit_lambda: FastEmit weight (arXiv 2010.11148).
        kernel: of the transducer loss: `"auto"` (on a GPU, where it can be used), `"off"` or `"require"`.
        ctc_head: the checkpoint is a hybrid, with a CTC head beside the transducer.
        ctc_loss_weight: w in the hybrid loss (1 - w) * transducer + w * CTC.
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
        self.encoder_config = self._build_encoder_config(self.encoder_config)
        super().__post_init__(**kwargs)
        self.initializer_range = self.encoder_config.initializer_range
        _check(0 <= self.blank_token_id < self.vocab_size, "blank_token_id", self.blank_token_id,
               f"an id below `vocab_size` ({self.vocab_size})")  # fmt: skip
        _check(self.kernel in ("auto", "off", "require"), "kernel", self.kernel, "auto, off or require")
        _check(self.max_symbols_per_step > 0, "max_symbols_per_step", self.max_symbols_per_step, "at least 1")


@strict
class ParakeetTDTConfig(ParakeetRNNTConfig):
    """Configuration of `ParakeetForTDT`: the fields of `ParakeetRNNTConfig` and the durations (arXiv 2304.06795).

    Args:
        durations: frames that a step may advance, in the order of the duration outputs; their values count.
        loss_sigma: logit under-normalisation subtracted from every token score in the loss.
        loss_omega: probability of training a minibatch with the plain RNN-T loss.
    """

    model_type = "parakeet_tdt"

    durations: list[int] | tuple[int, ...] = (0, 1, 2, 3, 4)
    loss_reduction: str = "mean"
    loss_sigma: float | int = 0.0
    loss_omega: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check(any(d > 0 for d in self.durations) and all(d >= 0 for d in self.durations), "durations", self.durations,
               "a list of frame counts, none negative and at least one above 0")  # fmt: skip


def kind_of(config: Any) -> str:
    """Return the kind of head: `"ctc"`, `"rnnt"` or `"tdt"`."""
    return str(config.model_type).removeprefix("parakeet_")


def blank_of(config: Any) -> int:
    """Return the id of the blank; that of a CTC model also pads."""
    return int(config.pad_token_id if kind_of(config) == "ctc" else config.blank_token_id)


__all__ = ["ParakeetCTCConfig", "ParakeetEncoderConfig", "ParakeetRNNTConfig", "ParakeetTDTConfig"]
