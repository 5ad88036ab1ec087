"""The Parakeet models: a base class, the encoder, and the models with CTC, RNN-T and TDT heads.

The sub-packages `networks` and `losses` contain the networks and losses, `generation_parakeet.py` contains `generate`.
"""

import math
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .augmentation import spec_augment
from .configuration_parakeet import (
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
    add_missing_fields,
    change_attention_context,
)
from .generation_parakeet import ParakeetCTCGenerationMixin, ParakeetTransducerGenerationMixin, get_frame_lengths
from .losses import TransducerLoss, compact_labels, ctc_loss, select_loss
from .networks import (
    CacheAwareEncoderMixin,
    ParakeetEncoderAttention,
    ParakeetEncoderBlock,
    ParakeetEncoderRelPositionalEncoding,
    ParakeetEncoderSubsamplingConv2D,
    ParakeetRNNTDecoder,
    ParakeetRNNTJointNetwork,
    apply_pointwise_conv,
    build_length_mask,
    compute_drop_probabilities,
    compute_subsampled_lengths,
    drop_block,
)
from .outputs_parakeet import ParakeetEncoderModelOutput, ParakeetRNNTOutput


class ParakeetPreTrainedModel(PreTrainedModel):
    """Base class of the Parakeet models: weight initialisation, attention context, SpecAugment and frame lengths.

    Args:
        config: configuration of the model.
    """

    config: ParakeetCTCConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = "audio"
    # the loss is already reduced over the batch, so `Trainer` must not divide it by the number of labels
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ParakeetEncoderBlock"]
    _supports_flat_attention_mask = True
    _supports_sdpa = True
    _supports_flex_attn = True
    # flash attention cannot add the position scores to the attention scores
    _supports_flash_attn = False
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": ParakeetEncoderBlock,
        "attentions": ParakeetEncoderAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the parameters and buffers of one module; transformers calls this for all new modules."""
        super()._init_weights(module)
        if isinstance(module, ParakeetEncoderAttention):
            std = self.config.initializer_range
            init.normal_(module.bias_u, mean=0.0, std=std)
            init.normal_(module.bias_v, mean=0.0, std=std)

    @property
    def _encoder_config(self) -> Any:
        """Encoder configuration: `config.encoder_config`, or `config` if this model is the encoder."""
        return getattr(self.config, "encoder_config", self.config)

    def set_attention_context(self, left: int, right: int, chunk: int | None = None) -> None:
        """Set the attention context: how many encoder frames each encoder frame attends to.

        `set_attention_context(-1, -1)` gives full attention. A model that was trained with full attention also accepts
        a limited context. If the context is limited on both sides, time grows linearly with the length of a clip. The
        setting is part of the configuration, so `save_pretrained` saves it.

        Args:
            left: number of frames before a frame (with chunks, before the chunk of the frame); -1 for no limit.
            right: number of frames after a frame; -1 for no limit. With the style `chunked_limited`, chunks have
                `right + 1` frames. With `chunked_limited_with_rc`, `right` counts the frames after the chunk.
            chunk: number of frames in a chunk for the style `chunked_limited_with_rc`, -1 for no limit; `None` for the
                other styles.

        Raises:
            ValueError: the context style of the model does not allow these numbers.
        """
        change_attention_context(self._encoder_config, left, right, chunk)

    def ctc_logits(self, hidden: Tensor) -> Tensor:
        """Compute the (B, N, V) logits of the CTC head, which CTC models and hybrid models have.

        Args:
            hidden: (B, N, H) encoder frames.
        """
        return apply_pointwise_conv(self.ctc_head, hidden)

    def _augment(self, features: Any, attention_mask: Tensor | None) -> Any:
        """Apply SpecAugment in training mode, if `config.spec_augment` is set.

        Args:
            features: (B, T, F) log-mel features.
            attention_mask: (B, T) mask, 1 on non-padding mel frames; `None` if there is no padding.

        Returns:
            (B, T, F) masked features, or `features` itself outside training or without SpecAugment.
        """
        if not (self.training and self.config.spec_augment):
            return features
        if attention_mask is None:
            feature_lengths = features.new_full((len(features),), features.shape[1])
        else:
            feature_lengths = attention_mask.sum(-1)
        return spec_augment(features, feature_lengths, self.config.spec_augment)

    def _get_subsampling_output_length(self, input_lengths: Tensor) -> Tensor:
        """Compute the number of encoder frames from the number of mel frames, for integer tensors of any shape.

        Tools of transformers call this method by its name.
        """
        return compute_subsampled_lengths(input_lengths, self._encoder_config)

    def _get_output_attention_mask(self, attention_mask: Tensor, target_length: int | None = None) -> Tensor:
        """Convert a mask of mel frames to a mask of encoder frames.

        The method has the same name and arguments as in stock transformers.

        Args:
            attention_mask: (B, T) mask, 1 on non-padding mel frames.
            target_length: number of encoder frames N in the result; `None` for the length of the longest clip.

        Returns:
            (B, N) boolean mask, True on non-padding encoder frames.
        """
        encoder_lengths = self._get_subsampling_output_length(attention_mask.sum(-1))
        num_frames = int(encoder_lengths.max()) if target_length is None else target_length
        return build_length_mask(encoder_lengths, num_frames)


class ParakeetEncoder(CacheAwareEncoderMixin, ParakeetPreTrainedModel):
    """FastConformer encoder (arXiv 2305.05084).

    Args:
        config: configuration of the encoder.
    """

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
            input_features: (B, T, F) log-mel features; cast to the dtype of the model.
            attention_mask: (B, T) mask, 1 on non-padding mel frames; `None` if there is no padding.
            output_attention_mask: whether to return the mask of the encoder frames.
            **kwargs: `output_hidden_states`, `output_attentions` (needs eager attention) and `return_dict`.

        Returns:
            Encoder output with `last_hidden_state` (B, N, H) and `attention_mask` (B, N).
        """
        config = self.config
        feature_lengths = None if attention_mask is None else attention_mask.sum(-1)
        hidden = self.subsampling(input_features.to(self.dtype), feature_lengths)
        if config.scale_input:
            hidden = hidden * self.input_scale
        position_embeddings = self.encode_positions(hidden)
        hidden = F.dropout(hidden, config.dropout, self.training)
        position_embeddings = F.dropout(position_embeddings, config.dropout_positions, self.training)
        mask = None if attention_mask is None else self._get_output_attention_mask(attention_mask, hidden.shape[1])
        block_arguments = {"attention_mask": mask, "position_embeddings": position_embeddings, **kwargs}
        for block, drop_probability in zip(self.layers, compute_drop_probabilities(config), strict=True):
            # with gradient checkpointing, a block recognises its recomputation in the backward pass by a counter
            checkpointing = {"forward_counter": count()} if self.training and block.gradient_checkpointing else {}
            output = block(hidden, **block_arguments, **checkpointing)
            if self.training:
                output = drop_block(hidden, output, drop_probability, config.stochastic_depth_mode is not None)
            hidden = output
        return ParakeetEncoderModelOutput(
            last_hidden_state=hidden,
            attention_mask=mask.int() if mask is not None and output_attention_mask else None,
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

    @can_return_tuple
    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutput:
        """Compute the CTC logits of every frame, and the CTC loss if labels are given.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T) mask, 1 on non-padding mel frames; `None` if there is no padding.
            labels: (B, U) token ids of the transcripts, where -100 and `pad_token_id` are padding; `None` to compute
                no loss.
            **kwargs: `output_hidden_states`, `output_attentions` (needs eager attention) and `return_dict`.

        Returns:
            Output with `logits` (B, N, V), with `hidden_states` and `attentions` of the encoder, and with `loss`
            (`None` without labels).
        """
        features = self._augment(input_features, attention_mask)
        encoder_outputs = self.encoder(input_features=features, attention_mask=attention_mask, **kwargs)
        logits = self.ctc_logits(encoder_outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = ctc_loss(
                logits,
                labels,
                get_frame_lengths(encoder_outputs),
                blank_token_id=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=encoder_outputs.hidden_states, attentions=encoder_outputs.attentions
        )


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
        self.joint = ParakeetRNNTJointNetwork(config, self._num_joint_outputs)
        if config.ctc_head:
            self.ctc_head = nn.Conv1d(width, config.vocab_size, kernel_size=1)
        self._set_stock_fields()
        self.post_init()

    @property
    def _num_joint_outputs(self) -> int:
        """Number of outputs of the joint network: one per token."""
        return self.config.vocab_size

    @can_return_tuple
    def get_audio_features(
        self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> ParakeetEncoderModelOutput:
        """Encode log-mel features and project the encoder frames to the width of the joint network.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T) mask, 1 on non-padding mel frames; `None` if there is no padding.
            **kwargs: further arguments of the encoder.

        Returns:
            Encoder output with `last_hidden_state` (B, N, H) and the projected encoder states `pooler_output`
            (B, N, J).
        """
        encoder_outputs = self.encoder(input_features=input_features, attention_mask=attention_mask, **kwargs)
        encoder_outputs.pooler_output = self.encoder_projector(encoder_outputs.last_hidden_state)
        return encoder_outputs

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
        """Compute the transducer loss if labels are given, or else the logits of every frame and label prefix.

        The loss does not compute all logits at once, because they need too much memory.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T) mask, 1 on non-padding mel frames; `None` if there is no padding.
            decoder_input_ids: (B, U+1) blank and labels, unused if `labels` are given; `None` for the blank alone.
            encoder_outputs: result of `get_audio_features`, to be used instead of `input_features`.
            labels: (B, U) token ids of the transcripts, where -100 and `pad_token_id` are padding.
            output_logits: whether to compute the logits even if labels are given.
            **kwargs: `output_hidden_states`, `output_attentions` (needs eager attention) and `return_dict`.

        Returns:
            Output with `loss`, or with `logits` (B, N, U+1, V), for TDT (B, N, U+1, V + D). If the only prefix is the
            blank, the logits have no prefix dimension: (B, N, V) or (B, N, V + D).
        """
        if encoder_outputs is None:
            features = self._augment(input_features, attention_mask)
            encoder_outputs = self.get_audio_features(features, attention_mask=attention_mask, **kwargs)
        encoder_states, blank_id = encoder_outputs.pooler_output, self.config.blank_token_id
        # pair (labels, label_lengths)
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
            loss=None if targets is None else self._compute_loss(encoder_outputs, predictor_states, *targets),
            logits=logits,
            last_hidden_state=encoder_outputs.last_hidden_state,
            pooler_output=encoder_states,
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
            attention_mask=encoder_outputs.attention_mask,
        )

    def _remove_padding(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Move the labels of each transcript to the front and count them.

        Args:
            labels: (B, U) token ids; -100, the padding token and the blank are not labels.

        Returns:
            (B, U) labels with zeros after the last label of each transcript, and (B,) number of labels.
        """
        is_label = (labels >= 0) & (labels != self.config.pad_token_id) & (labels != self.config.blank_token_id)
        return compact_labels(labels, is_label)

    def _compute_loss(
        self, encoder_outputs: Any, predictor_states: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> Tensor:
        """Compute the training loss: the transducer loss, or for a hybrid model its weighted sum with the CTC loss.

        The hybrid loss is (1 - w) * transducer loss + w * CTC loss, where w is `config.ctc_loss_weight`.

        Args:
            encoder_outputs: `ParakeetEncoderModelOutput` with `pooler_output`.
            predictor_states: (B, U+1, J) states of the prediction network.
            labels: (B, U) token ids of the labels; entries after the last label of a transcript are ignored.
            label_lengths: (B,) number of labels.

        Returns:
            Scalar loss, or (B,) losses without reduction.
        """
        config, encoder_lengths = self.config, get_frame_lengths(encoder_outputs)
        transducer_loss = self._compute_transducer_loss(
            encoder_outputs.pooler_output, predictor_states, labels, encoder_lengths, label_lengths
        )
        if not config.ctc_head:
            return transducer_loss
        padded_labels = labels.masked_fill(~build_length_mask(label_lengths, labels.shape[1]), -100)
        ctc_head_loss = ctc_loss(
            self.ctc_logits(encoder_outputs.last_hidden_state),
            padded_labels,
            encoder_lengths,
            blank_token_id=config.blank_token_id,
            reduction=config.ctc_loss_reduction,
            zero_infinity=config.ctc_zero_infinity,
        )
        return (1 - config.ctc_loss_weight) * transducer_loss + config.ctc_loss_weight * ctc_head_loss

    def _compute_transducer_loss(
        self,
        encoder_states: Tensor,
        predictor_states: Tensor,
        labels: Tensor,
        encoder_lengths: Tensor,
        label_lengths: Tensor,
    ) -> Tensor:
        """Compute the RNN-T or TDT loss with the options of `self.config`.

        Args:
            encoder_states: (B, N, J) encoder states, projected to the width of the joint network.
            predictor_states: (B, U+1, J) states of the prediction network.
            labels: (B, U) token ids of the labels.
            encoder_lengths: (B,) number of encoder frames.
            label_lengths: (B,) number of labels.

        Returns:
            Scalar loss, or (B,) losses if `config.loss_reduction` is `"none"`.
        """
        config = self.config
        output_weight, output_bias = self.joint.get_output_weights(encoder_states)
        duration_options = self._get_duration_options()
        # the GPU kernel if it can be used, or else the implementation in PyTorch
        compute_loss = select_loss(
            config.kernel,
            TransducerLoss(),
            encoder_states,
            output_weight,
            duration_options.get("durations"),
            config.hidden_act,
        )
        return compute_loss(
            encoder_states,
            predictor_states,
            output_weight,
            output_bias,
            labels,
            encoder_lengths,
            label_lengths,
            config.blank_token_id,
            fastemit_lambda=config.fastemit_lambda,
            activation=config.hidden_act,
            reduction=config.loss_reduction,
            dropout=config.joint_dropout if self.training else 0.0,
            **duration_options,
        )

    def _get_duration_options(self) -> dict[str, Any]:
        """Return the arguments that the loss has only for TDT; an empty dict for RNN-T."""
        return {}


class ParakeetForTDT(ParakeetForRNNT):
    """FastConformer encoder with a token-and-duration transducer (TDT) head (arXiv 2304.06795).

    Args:
        config: configuration of the model.
    """

    config: ParakeetTDTConfig

    @property
    def _num_joint_outputs(self) -> int:
        """Number of outputs of the joint network: one per token and one per duration."""
        return self.config.vocab_size + len(self.config.durations)

    def _get_duration_options(self) -> dict[str, Any]:
        """Return the arguments that the loss has only for TDT."""
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
