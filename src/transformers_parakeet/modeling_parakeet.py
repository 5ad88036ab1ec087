"""The Parakeet models: a base class, the encoder, and the models with CTC, RNN-T and TDT heads.

The networks are in the sub-package `networks`, the losses in `losses`, and `generate` is in `generation_parakeet.py`.
"""

import math
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .augmentation import spec_augment
from .configuration_parakeet import (
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
    add_missing_fields,
    check_attention_context,
)
from .generation_parakeet import ParakeetCTCGenerationMixin, ParakeetTransducerGenerationMixin, get_frame_lengths
from .losses import TransducerLoss, compact_labels, ctc_loss, select_loss
from .networks import (
    ParakeetEncoderAttention,
    ParakeetEncoderBlock,
    ParakeetEncoderRelPositionalEncoding,
    ParakeetEncoderSubsamplingConv2D,
    ParakeetRNNTDecoder,
    ParakeetRNNTJointNetwork,
    drop_block,
    drop_probabilities,
    length_mask,
    pointwise,
    subsampled_lengths,
)

logger = logging.get_logger(__name__)


@dataclass
class ParakeetEncoderModelOutput(BaseModelOutputWithPooling):
    """Output of the encoder.

    Args:
        last_hidden_state: (B, N, H) frames.
        pooler_output: (B, N, J) frames projected for the joint network, in transducers.
        hidden_states: input of the first block and output of every block, with `output_hidden_states`.
        attentions: (B, heads, N, N) weights of every block, with `output_attentions`.
        attention_mask: (B, N) int mask of the valid frames; `None` if the input had no mask.
    """

    attention_mask: Tensor | None = None


class ParakeetPreTrainedModel(PreTrainedModel):
    """Base class of the Parakeet models: initialisation, attention context, SpecAugment, and lengths in frames."""

    config: ParakeetCTCConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = "audio"
    # the loss is that of a batch: `Trainer` must average over batches and devices, and not pass a number of labels
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ParakeetEncoderBlock"]
    _supports_flat_attention_mask = True
    _supports_sdpa = True
    _supports_flex_attn = True
    # relative positions are a bias of the scores, which flash attention does not accept
    _supports_flash_attn = False
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": ParakeetEncoderBlock,
        "attentions": ParakeetEncoderAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the parameters and buffers of one module of a new model, called by transformers."""
        super()._init_weights(module)
        if isinstance(module, ParakeetEncoderAttention):
            std = self.config.initializer_range
            init.normal_(module.bias_u, mean=0.0, std=std)
            init.normal_(module.bias_v, mean=0.0, std=std)
        elif isinstance(module, ParakeetEncoderRelPositionalEncoding):
            init.copy_(module.inv_freq, module.frequencies(module.config))

    @property
    def _encoder_config(self) -> Any:
        """Configuration of the encoder, which is `config` itself if the model is an encoder."""
        return getattr(self.config, "encoder_config", self.config)

    def set_attention_context(self, left: int, right: int, chunk: int | None = None) -> None:
        """Set how many encoder frames a frame attends to; `save_pretrained` writes the setting.

        `set_attention_context(-1, -1)` gives full attention. The context of a model trained with full attention can be
        limited as well: each frame then attends to the frames around it. A context that is limited on both sides needs
        memory linear in the length of a clip.

        Args:
            left: number of frames before a frame (or before its chunk); -1 for no limit.
            right: number of frames after it; -1 for no limit. With the style `chunked_limited` this is the look-ahead,
                and chunks have `right + 1` frames.
            chunk: number of frames of a chunk; required with the style `chunked_limited_with_rc` only.

        Raises:
            ValueError: the context style of the model does not permit these numbers.
        """
        config = self._encoder_config
        has_chunk_size = config.attention_context_style == "chunked_limited_with_rc"
        if has_chunk_size and chunk is None and (left, right) == (-1, -1):
            chunk = -1
        if has_chunk_size is (chunk is None):
            raise ValueError(
                f"`chunk` must be given only for the context style chunked_limited_with_rc, got {chunk!r} for the "
                f"style {config.attention_context_style}: {'give' if has_chunk_size else 'leave out'} `chunk`"
            )
        context = [left, right] if chunk is None else [left, chunk, right]
        check_attention_context(config.attention_context_style, context, config.self_attention_model)
        trained = config.attention_context_sizes or [config.attention_context_size]
        if context not in trained and max(context) >= 0:
            logger.warning_once(
                f"The model was not trained with the attention context {context}, only with {trained}: more words may "
                "be recognised wrongly."
            )
        if config.attention_context_sizes is None and context != config.attention_context_size:
            config.attention_context_sizes = [config.attention_context_size]
        config.attention_context_size = context

    def _augment(self, features: Any, attention_mask: Tensor | None) -> Any:
        """Apply `config.spec_augment` to (B, T, F) features in training; otherwise return them unchanged."""
        if not (self.training and self.config.spec_augment):
            return features
        if attention_mask is None:
            lengths = features.new_full((len(features),), features.shape[1])
        else:
            lengths = attention_mask.sum(-1)
        return spec_augment(features, lengths, self.config.spec_augment)

    def _get_subsampling_output_length(self, input_lengths: Tensor) -> Tensor:
        """Convert numbers of mel frames to numbers of encoder frames; the name is that in stock transformers."""
        return subsampled_lengths(input_lengths, self._encoder_config)

    def _get_output_attention_mask(self, attention_mask: Tensor, target_length: int | None = None) -> Tensor:
        """Convert a mask of mel frames to a mask of encoder frames; the name is that in stock transformers.

        Args:
            attention_mask: (B, T), 1 on valid mel frames.
            target_length: number of encoder frames N; `None` for the number of the longest clip.

        Returns:
            (B, N) boolean mask.
        """
        lengths = self._get_subsampling_output_length(attention_mask.sum(-1))
        return length_mask(lengths, int(lengths.max()) if target_length is None else target_length)


class ParakeetEncoder(ParakeetPreTrainedModel):
    """FastConformer encoder (arXiv 2305.05084)."""

    config: ParakeetEncoderConfig
    base_model_prefix = "encoder"

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        add_missing_fields(config)
        super().__init__(config)
        self.gradient_checkpointing = False
        self.input_scale = math.sqrt(config.hidden_size) if config.scale_input else 1.0
        self.subsampling = ParakeetEncoderSubsamplingConv2D(config)
        self.encode_positions = ParakeetEncoderRelPositionalEncoding(config)
        self.layers = nn.ModuleList([ParakeetEncoderBlock(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        output_attention_mask: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ParakeetEncoderModelOutput:
        """Encode a batch of log-mel features.

        Args:
            input_features: (B, T, F) features; cast to the model's dtype.
            attention_mask: (B, T), 1 on valid mel frames; `None` if all frames are valid.
            output_attention_mask: also return the mask of the encoder frames.
            **kwargs: `output_hidden_states`, `output_attentions` (eager attention), `return_dict`.

        Returns:
            `last_hidden_state` (B, N, H) and `attention_mask` (B, N).
        """
        lengths = None if attention_mask is None else attention_mask.sum(-1)
        hidden = self.subsampling(input_features.to(self.dtype), lengths)
        if self.config.scale_input:
            hidden = hidden * self.input_scale
        positions = self.encode_positions(hidden)
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        positions = F.dropout(positions, self.config.dropout_positions, self.training)
        valid = None if attention_mask is None else self._get_output_attention_mask(attention_mask, hidden.shape[1])
        for layer, probability in zip(self.layers, drop_probabilities(self.config), strict=True):
            # gradient checkpointing runs a block again in the backward pass
            checkpointing = {"pass_counter": count()} if layer.gradient_checkpointing and self.training else {}
            output = layer(hidden, attention_mask=valid, position_embeddings=positions, **checkpointing, **kwargs)
            if self.training:
                output = drop_block(hidden, output, probability, self.config.stochastic_depth_mode is not None)
            hidden = output
        return ParakeetEncoderModelOutput(
            last_hidden_state=hidden,
            attention_mask=valid.int() if valid is not None and output_attention_mask else None,
        )


class ParakeetForCTC(ParakeetPreTrainedModel, ParakeetCTCGenerationMixin):
    """FastConformer encoder with a CTC head.

    Args:
        config: configuration of the model.
    """

    config: ParakeetCTCConfig

    def __init__(self, config: ParakeetCTCConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.ctc_head = nn.Conv1d(config.encoder_config.hidden_size, config.vocab_size, kernel_size=1)
        self.post_init()

    def ctc_logits(self, hidden: Tensor) -> Tensor:
        """Return the (B, N, V) logits of the CTC head for (B, N, H) encoder states."""
        return pointwise(self.ctc_head, hidden)

    @can_return_tuple
    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutput:
        """Compute the logits of every frame, and the loss if labels are given.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T), 1 on valid mel frames.
            labels: (B, U) token ids; -100 and `pad_token_id` are padding.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `logits` (B, N, V) and, with labels, `loss`, reduced by `config.ctc_loss_reduction`.
        """
        features = self._augment(input_features, attention_mask)
        encoded = self.encoder(input_features=features, attention_mask=attention_mask, **kwargs)
        logits = self.ctc_logits(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = ctc_loss(
                logits,
                labels,
                get_frame_lengths(encoded),
                blank_token_id=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


@dataclass
class ParakeetRNNTOutput(BaseModelOutputWithPooling):
    """Output of a transducer model.

    Args:
        loss: reduced by `config.loss_reduction`; `None` without labels.
        logits: (B, N, U+1, V) of the joint network, (B, N, U+1, V + D) for TDT; with labels only on `output_logits`.
        last_hidden_state: (B, N, H) encoder states.
        pooler_output: (B, N, J) encoder states projected for the joint network.
        hidden_states: those of the encoder, with `output_hidden_states`.
        attentions: those of the encoder, with `output_attentions`.
        attention_mask: (B, N) int mask of the valid frames; `None` if the input had no mask.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attention_mask: Tensor | None = None


class ParakeetForRNNT(ParakeetPreTrainedModel, ParakeetTransducerGenerationMixin):
    """FastConformer encoder with an RNN-T head (arXiv 1211.3711); with `config.ctc_head`, a hybrid model.

    Args:
        config: configuration of the model.
    """

    config: ParakeetRNNTConfig

    def __init__(self, config: ParakeetRNNTConfig) -> None:
        super().__init__(config)
        width = config.encoder_config.hidden_size
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.encoder_projector = nn.Linear(width, config.joint_hidden_size or config.decoder_hidden_size)
        self.decoder = ParakeetRNNTDecoder(config)
        self.joint = ParakeetRNNTJointNetwork(config, self._num_outputs)
        if config.ctc_head:
            self.ctc_head = nn.Conv1d(width, config.vocab_size, kernel_size=1)
        self.post_init()

    @property
    def _num_outputs(self) -> int:
        """Number of outputs of the joint network: V tokens."""
        return self.config.vocab_size

    def ctc_logits(self, hidden: Tensor) -> Tensor:
        """Return the (B, N, V) logits of the CTC head of a hybrid model for (B, N, H) encoder states."""
        return pointwise(self.ctc_head, hidden)

    @can_return_tuple
    def get_audio_features(
        self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> ParakeetEncoderModelOutput:
        """Return the encoder's output with encoder states projected for the joint network, `pooler_output` (B, N, J).

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T), 1 on valid mel frames; `None` if all frames are valid.
            **kwargs: further arguments of the encoder.
        """
        encoded = self.encoder(input_features=input_features, attention_mask=attention_mask, **kwargs)
        encoded.pooler_output = self.encoder_projector(encoded.last_hidden_state)
        return encoded

    @can_return_tuple
    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: ParakeetEncoderModelOutput | None = None,
        labels: Tensor | None = None,
        output_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ParakeetRNNTOutput:
        """Compute the loss of the labels, or without labels the logits of every frame and prefix.

        The loss never builds the B * N * (U+1) * (V + D) logits, so that with labels they are returned on request only.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T), 1 on valid mel frames; `None` if all frames are valid.
            decoder_input_ids: (B, U+1) the blank, then the labels; `None` to build them from `labels`, or without
                labels to use the blank alone.
            encoder_outputs: result of `get_audio_features`; replaces `input_features`.
            labels: (B, U) token ids; -100 and `pad_token_id` are padding.
            output_logits: also return the logits if labels are given.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            With labels `loss`, else `logits` (B, N, U+1, V [+ D]); (B, N, V [+ D]) if the prefix is the blank alone.
        """
        encoded = encoder_outputs
        if encoded is None:
            features = self._augment(input_features, attention_mask)
            encoded = self.get_audio_features(features, attention_mask=attention_mask, **kwargs)
        encoder_states, blank_id = encoded.pooler_output, self.config.blank_token_id
        targets = None if labels is None else self._remove_padding(labels.to(encoder_states.device))
        if targets is not None:
            decoder_input_ids = F.pad(targets[0], (1, 0), value=blank_id)
        elif decoder_input_ids is None:
            decoder_input_ids = torch.full((len(encoder_states), 1), blank_id, device=encoder_states.device)
        predictor_states = self.decoder(decoder_input_ids)
        logits = None
        if targets is None or output_logits:
            logits = self.joint(predictor_states[:, None], encoder_states[:, :, None]).squeeze(2)
        return ParakeetRNNTOutput(
            loss=None if targets is None else self._loss(encoded, predictor_states, *targets),
            logits=logits,
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=encoder_states,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            attention_mask=encoded.attention_mask,
        )

    def _remove_padding(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Move the labels of each row of (B, U) token ids to its front and count them.

        -100, the padding token and the blank are not labels.

        Returns:
            (B, U) labels with zeros after the last label of a row, and (B,) numbers of labels.
        """
        is_label = (labels >= 0) & (labels != self.config.pad_token_id) & (labels != self.config.blank_token_id)
        return compact_labels(labels, is_label)

    def _loss(
        self, encoded: ParakeetEncoderModelOutput, predictor_states: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> Tensor:
        """Compute the transducer loss, for a hybrid model (1 - w) * transducer loss + w * CTC loss.

        Args:
            encoded: encoder's output with `pooler_output`.
            predictor_states: (B, U+1, J).
            labels: (B, U) labels without padding inside a row.
            label_lengths: (B,) number of labels.
        """
        config, lengths = self.config, get_frame_lengths(encoded)
        loss = self._transducer_loss(encoded.pooler_output, predictor_states, labels, lengths, label_lengths)
        if not config.ctc_head:
            return loss
        padded = labels.masked_fill(~length_mask(label_lengths, labels.shape[1]), -100)
        ctc = ctc_loss(
            self.ctc_logits(encoded.last_hidden_state),
            padded,
            lengths,
            blank_token_id=config.blank_token_id,
            reduction=config.ctc_loss_reduction,
            zero_infinity=config.ctc_zero_infinity,
        )
        return (1 - config.ctc_loss_weight) * loss + config.ctc_loss_weight * ctc

    def _transducer_loss(
        self, encoder_states: Tensor, predictor_states: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor
    ) -> Tensor:
        """Compute the RNN-T or TDT loss with the settings of the configuration: a scalar, or (B,) without reduction.

        Args:
            encoder_states: (B, N, J) projected encoder states.
            predictor_states: (B, U+1, J).
            labels: (B, U).
            lengths: (B,) number of valid encoder frames.
            label_lengths: (B,) number of labels.
        """
        config = self.config
        weight, bias = self.joint.output_layer(encoder_states)
        options = self._duration_options()
        durations = options.get("durations")
        loss = select_loss(config.kernel, TransducerLoss(), encoder_states, weight, durations, config.hidden_act)
        return loss(
            encoder_states,
            predictor_states,
            weight,
            bias,
            labels,
            lengths,
            label_lengths,
            config.blank_token_id,
            fastemit_lambda=config.fastemit_lambda,
            activation=config.hidden_act,
            reduction=config.loss_reduction,
            dropout=config.joint_dropout if self.training else 0.0,
            **options,
        )

    def _duration_options(self) -> dict[str, Any]:
        """Return the arguments that only the TDT loss has; none for RNN-T."""
        return {}


class ParakeetForTDT(ParakeetForRNNT):
    """FastConformer encoder with a token-and-duration transducer (TDT) head (arXiv 2304.06795).

    Args:
        config: configuration of the model.
    """

    config: ParakeetTDTConfig

    @property
    def _num_outputs(self) -> int:
        """Number of outputs of the joint network: V tokens and D durations."""
        return self.config.vocab_size + len(self.config.durations)

    def _duration_options(self) -> dict[str, Any]:
        """Return the arguments that only the TDT loss has."""
        config = self.config
        return {"durations": config.durations, "sigma": config.loss_sigma, "omega": config.loss_omega}


__all__ = [
    "ParakeetEncoder",
    "ParakeetEncoderModelOutput",
    "ParakeetForCTC",
    "ParakeetForRNNT",
    "ParakeetForTDT",
    "ParakeetPreTrainedModel",
]
