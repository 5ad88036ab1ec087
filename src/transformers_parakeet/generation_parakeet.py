"""`generate()`: reads the arguments of Hugging Face, runs greedy decoding, and returns the outputs of Hugging Face.

The search itself is in `decoding/`. Text and times are made by the processor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    GenerationMode,
    MaxLengthCriteria,
)
from transformers.utils import ModelOutput

from .decoding import (
    Hypotheses,
    Shortcuts,
    TransducerOptions,
    collapse_ctc,
    greedy_ctc,
    greedy_transducer,
    insert_forced_blanks,
    token_confidence,
)
from .generation_arguments import confidence_method, ctc_request, refuse_processors, without_targets

# a limit of steps that no audio reaches
UNLIMITED = 2**31


class CTCTokens(Tensor):
    """Frame-wise tokens (B, N) from the CTC head of a hybrid. Slices and copies have this type as well.

    The processor of a hybrid decodes transducer output by default. It recognises CTC output by this type.
    """

    decoder_type = "ctc"

    def __deepcopy__(self, memo: dict[int, Any]) -> CTCTokens:
        """Copy the tokens and keep the type."""
        # mypy does not know that operations keep the type
        return self.clone()  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save a plain tensor, which `torch.load` reads without this package."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


@dataclass
class ParakeetCTCGenerateOutput(ModelOutput):
    """Output of `ParakeetForCTC.generate` with `return_dict_in_generate=True`.

    Args:
        sequences: (B, N) best token of every frame, blanks and repeats included; the blank past the end of a clip.
        logits: (B, N, V) scores.
        attentions: attentions of the encoder, if requested.
        hidden_states: hidden states of the encoder, if requested.
        token_confidence: (B, N) confidence of each frame's token, with `output_confidence`.
        scores: the same as `logits`, with `output_scores`; greedy decoding does not change the scores.
        hypotheses: the tokens without blanks and repeats, with their frames.
    """

    sequences: Tensor | None = None
    logits: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_confidence: Tensor | None = None
    scores: Tensor | None = None
    hypotheses: Hypotheses | None = None


class ParakeetCTCGenerationMixin(GenerationMixin):
    """`generate` of a CTC model. It stores nothing on the model."""

    @torch.no_grad()
    def generate(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        return_dict_in_generate: bool = False,
        compile_config: CompileConfig | None = None,
        output_confidence: bool | str = False,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> ParakeetCTCGenerateOutput | Tensor:
        """Return the best token of every frame.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T), 1 on valid mel frames; `None` if all are valid.
            return_dict_in_generate: return a `ParakeetCTCGenerateOutput` instead of a tensor.
            compile_config: compile the forward pass with these settings.
            output_confidence: also return confidences; `True` means `"max_prob"`, see `decoding.token_confidence`.
            generation_config: its settings are used like arguments; arguments have priority.
            **kwargs: `streamer`, `output_scores` and arguments of `forward`. Other arguments of transformers'
                `generate` are accepted if they ask for greedy decoding, and ignored with a warning if they have no
                effect.

        Returns:
            (B, N) token ids, blanks and repeats included; `processor.batch_decode` merges them.

        Raises:
            ValueError: an argument asks for anything but greedy decoding, or is unknown.
        """
        if return_dict_in_generate:
            kwargs["return_dict_in_generate"] = True
        request = ctc_request(kwargs, generation_config)
        forward = self.__call__ if compile_config is None else self.get_compiled_call(compile_config)
        outputs = forward(input_features=input_features, attention_mask=attention_mask, **request.forward)
        lengths = None if attention_mask is None else self._get_subsampling_output_length(attention_mask.sum(-1))
        blank_id = self.config.pad_token_id
        sequences = greedy_ctc(outputs.logits, lengths, blank_id)
        stream_frames(sequences, blank_id, request.streamer)
        if not request.return_dict:
            return sequences
        return ctc_output(outputs, outputs.logits, sequences, blank_id, output_confidence, request.scores)


@dataclass
class ParakeetRNNTGenerateOutput(ModelOutput):
    """Output of `generate` of a transducer.

    Args:
        sequences: (B, 1 + S) the blank, then the label or blank of every step; `pad_token_id` past the end of a row.
        durations: (B, 1 + S) 0, then the frames that each step advances. The frame of a step is the sum of the
            durations before it.
        attentions: attentions of the encoder, if requested.
        hidden_states: hidden states of the encoder, if requested.
        token_confidence: (B, 1 + S) confidence of each label, 0 for blanks, with `output_confidence`.
        logits: S scores (B, V + D), one per step, with `output_logits`; 0 past the end of a row.
        scores: the same as `logits`, with `output_scores`; greedy decoding does not change the scores.
        hypotheses: the labels with their frames and predicted durations, without blanks.
    """

    sequences: Tensor | None = None
    durations: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_confidence: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    scores: tuple[Tensor, ...] | None = None
    hypotheses: Hypotheses | None = None


class ParakeetTransducerGenerationMixin(GenerationMixin):
    """`generate` of a transducer: transformers' `generate` with the search replaced. It stores nothing on the model."""

    _supported_generation_modes: ClassVar[list[GenerationMode]] = [GenerationMode.GREEDY_SEARCH]
    # arguments of `generate` that transformers does not know
    _additional_arguments = ("output_confidence",)

    def generate(self, inputs: Tensor | None = None, *args: Any, decoder: str = "transducer", **kwargs: Any) -> Any:
        """Decode a batch greedily.

        Args:
            inputs: (B, T, F) log-mel features, also accepted as `input_features`.
            *args: further arguments of transformers' `generate`.
            decoder: `"transducer"`, or `"ctc"` for the CTC head of a hybrid.
            **kwargs: `attention_mask` (B, T); `output_confidence`, `True` for `"max_prob"` or a method of
                `decoding.token_confidence`; and those arguments of transformers' `generate` that fit greedy decoding:
                `max_new_tokens` (steps, blanks included), `streamer`, `stopping_criteria`, `output_logits`,
                `output_scores`, ...

        Returns:
            `ParakeetRNNTGenerateOutput`; with `decoder="ctc"` the same as `ParakeetForCTC.generate`.

        Raises:
            ValueError: an argument asks for beam search or sampling, or `decoder="ctc"` without a CTC head.
        """
        kwargs = without_targets(kwargs)
        if decoder == "ctc":
            features = kwargs.pop("input_features", inputs)
            return self._generate_ctc(features, **kwargs)
        if decoder != "transducer":
            raise ValueError(f"`decoder` must be 'transducer' or 'ctc', got {decoder!r}")
        return super().generate(inputs, *args, **kwargs)

    @torch.no_grad()
    def _generate_ctc(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        output_confidence: bool | str = False,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> ParakeetCTCGenerateOutput | Tensor:
        """Decode a batch with the CTC head of a hybrid; arguments and result as in `ParakeetForCTC.generate`."""
        if not self.config.ctc_head:
            raise ValueError(
                "`decoder='ctc'` needs a hybrid checkpoint, but this one has no CTC head: leave out `decoder`"
            )
        request = ctc_request(kwargs, generation_config)
        encoded = self.encoder(input_features=input_features, attention_mask=attention_mask, **request.forward)
        logits = self.ctc_logits(encoded.last_hidden_state)
        lengths = None if attention_mask is None else encoded.attention_mask.sum(-1)
        blank_id = self.config.blank_token_id
        sequences = greedy_ctc(logits, lengths, blank_id).as_subclass(CTCTokens)
        stream_frames(sequences, blank_id, request.streamer)
        if not request.return_dict:
            return sequences
        return ctc_output(encoded, logits, sequences, blank_id, output_confidence, request.scores)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Let transformers check all arguments of `generate` but those that only this package knows."""
        known = {name: value for name, value in model_kwargs.items() if name not in self._additional_arguments}
        super()._validate_model_kwargs(known)

    def _prepare_special_tokens(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """Set the start token to the blank; `generation_config` is a copy that belongs to this call."""
        generation_config.decoder_start_token_id = self.config.blank_token_id
        super()._prepare_special_tokens(generation_config, *args, **kwargs)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str, dict[str, Any]]:
        """Run the encoder, unless its output was passed, and store its output as `encoder_outputs`."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if model_kwargs.get("encoder_outputs") is None:
            requested = {k: v for k, v in model_kwargs.items() if k in ("output_attentions", "output_hidden_states")}
            model_kwargs["encoder_outputs"] = self.get_audio_features(
                inputs, attention_mask=model_kwargs.get("attention_mask"), **requested
            )
        return inputs, name, model_kwargs

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_kwargs: dict[str, Any], device: Any = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start every row from the blank: return (B, 1) blanks and the unchanged `model_kwargs`."""
        return torch.full((batch_size, 1), self.config.blank_token_id, device=device), model_kwargs

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Create no cache: the search keeps the LSTM state in local variables."""

    def _prepare_generated_length(
        self, generation_config: Any, has_default_max_length: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Set `max_length`: unlimited by default, because the number of frames bounds the number of steps."""
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = UNLIMITED
        elif generation_config.max_new_tokens is not None:
            generation_config.max_length = generation_config.max_new_tokens + 1
        return generation_config

    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError if `max_length` leaves no room for a step after the start token."""
        if generation_config.max_length < 2:
            raise ValueError(
                "the sequence of a transducer starts with a blank: `max_length` must be at least 2, "
                f"got {generation_config.max_length}"
            )

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> ParakeetRNNTGenerateOutput:
        """Run the greedy search; transformers' `generate` calls this method in place of its own search.

        Args:
            input_ids: (B, 1) blanks.
            logits_processor: processors that would change the scores; only the stock suppression is accepted.
            stopping_criteria: the caller's criteria, and the limit of steps, which the search checks itself.
            generation_config: the settings of this call.
            synced_gpus: not needed, because a search does not wait for other processes.
            streamer: receives every step; `None` for no streamer.
            **model_kwargs: `encoder_outputs` and `output_confidence`.

        Returns:
            The output of `generate`.
        """
        refuse_processors(logits_processor, self.config.vocab_size)
        encoded = model_kwargs["encoder_outputs"]
        criteria = [criterion for criterion in stopping_criteria if not isinstance(criterion, MaxLengthCriteria)]
        is_observed = bool(criteria) or streamer is not None
        options = self._decoding_options(generation_config, model_kwargs.get("output_confidence"), is_observed)
        hypotheses = greedy_transducer(
            encoded.pooler_output,
            frame_lengths(encoded),
            predict=self.decoder.step,
            joint=self.joint.score,
            options=options,
            pad_id=self.config.pad_token_id,
            shortcuts=Shortcuts(*self.joint.build_argmax_functions(options.vocab_size)),
            on_step=StepObserver(input_ids, self.config.pad_token_id, criteria, streamer) if is_observed else None,
        )
        if streamer is not None:
            streamer.end()
        return transducer_output(hypotheses, input_ids, encoded, self.config, options.max_steps, generation_config)

    def _decoding_options(
        self, generation_config: Any, output_confidence: bool | str | None, is_observed: bool
    ) -> TransducerOptions:
        """Collect the settings of the search.

        Args:
            generation_config: the settings of this call of `generate`.
            output_confidence: `True`, the name of a method, or `False` or `None` for no confidence.
            is_observed: a streamer or stopping criterion must see every step before the next one.
        """
        config = self.config
        return TransducerOptions(
            blank_id=config.blank_token_id,
            vocab_size=config.vocab_size,
            durations=tuple(config.durations) if hasattr(config, "durations") else None,
            max_symbols=config.max_symbols_per_step,
            max_steps=None if generation_config.max_length >= UNLIMITED else generation_config.max_length - 1,
            lookahead=1 if is_observed else 0,
            confidence=confidence_method(output_confidence),
            keep_logits=bool(generation_config.output_logits or generation_config.output_scores),
        )


class StepObserver:
    """Passes the steps of a transducer search to a streamer and to stopping criteria while the search runs.

    Args:
        start_tokens: (B, 1) the blank, which starts every sequence.
        pad_id: token id past the end of a row.
        criteria: stopping criteria of transformers.
        streamer: receives the tokens of the first row; `None` for no streamer.
    """

    def __init__(self, start_tokens: Tensor, pad_id: int, criteria: list[Any], streamer: Any) -> None:
        self.start_tokens, self.pad_id, self.criteria, self.streamer = start_tokens, pad_id, criteria, streamer
        self.num_streamed = 0

    def __call__(self, rows: list[list[int]]) -> list[bool]:
        """Stream the new tokens and ask the criteria.

        Args:
            rows: all tokens of each row so far.

        Returns:
            For each row, whether it must stop.
        """
        if self.streamer is not None:
            for token in rows[0][self.num_streamed :]:
                self.streamer.put(torch.tensor([token]))
            self.num_streamed = len(rows[0])
        if not self.criteria:
            return [False] * len(rows)
        width = max(map(len, rows))
        padded = [row + [self.pad_id] * (width - len(row)) for row in rows]
        tokens = torch.tensor(padded, dtype=torch.long, device=self.start_tokens.device)
        sequences = torch.cat([self.start_tokens, tokens], dim=1)
        # the search does not keep the scores of single steps
        stops = [torch.as_tensor(criterion(sequences, None)).expand(len(rows)) for criterion in self.criteria]
        return torch.stack(stops).any(0).tolist()


def transducer_output(
    hypotheses: Hypotheses,
    start_tokens: Tensor,
    encoded: Any,
    config: Any,
    max_steps: int | None,
    generation_config: GenerationConfig,
) -> ParakeetRNNTGenerateOutput:
    """Convert the result of a search to the output of `generate` in transformers.

    Args:
        hypotheses: the result, with its steps.
        start_tokens: (B, 1) the blank, which starts every sequence.
        encoded: the output of the encoder.
        config: the configuration of the model.
        max_steps: limit of steps in the output; `None` for no limit.
        generation_config: says which scores to return.

    Returns:
        The steps in the layout of transformers, and the hypotheses.
    """
    steps = hypotheses.steps
    # the transducer search always returns its steps
    assert steps is not None
    if config.forced_blanks:
        # as in NeMo, the duration of the label is the predicted one
        steps = insert_forced_blanks(steps, config.blank_token_id, config.pad_token_id, max_steps)
    else:
        # as in stock transformers, the duration of the label includes the forced move
        steps = replace(steps, durations=steps.durations + steps.forced_moves)
    logits = None if steps.logits is None else tuple(steps.logits.unbind(1))
    return ParakeetRNNTGenerateOutput(
        sequences=torch.cat([start_tokens, steps.tokens], dim=1),
        durations=F.pad(steps.durations, (1, 0)),
        attentions=encoded.attentions,
        hidden_states=encoded.hidden_states,
        token_confidence=None if steps.confidence is None else F.pad(steps.confidence, (1, 0)),
        logits=logits if generation_config.output_logits else None,
        scores=logits if generation_config.output_scores else None,
        hypotheses=replace(hypotheses, steps=None),
    )


def frame_lengths(encoded: Any) -> Tensor:
    """Return the number of valid frames (B,) of an encoder output; all frames are valid without an attention mask.

    Args:
        encoded: has `last_hidden_state` (B, N, H) and `attention_mask` (B, N) or `None`.
    """
    batch, num_frames = encoded.last_hidden_state.shape[:2]
    if encoded.attention_mask is None:
        return torch.full((batch,), num_frames, device=encoded.last_hidden_state.device)
    return encoded.attention_mask.sum(-1)


def ctc_output(
    encoded: ModelOutput,
    logits: Tensor,
    sequences: Tensor,
    blank_id: int,
    output_confidence: bool | str,
    output_scores: bool,
) -> ParakeetCTCGenerateOutput:
    """Collect the output of `generate` with a CTC head.

    Args:
        encoded: the output of the encoder, with its attentions and hidden states.
        logits: (B, N, V) scores.
        sequences: (B, N) best token of every frame.
        blank_id: id of the blank.
        output_confidence: the argument of `generate`.
        output_scores: return the scores in the field `scores` as well.

    Returns:
        The best tokens of all frames, and the hypotheses.
    """
    method = confidence_method(output_confidence)
    frame_confidence = None if method is None else token_confidence(logits, method)
    return ParakeetCTCGenerateOutput(
        sequences=sequences,
        logits=logits,
        attentions=encoded.attentions,
        hidden_states=encoded.hidden_states,
        token_confidence=frame_confidence,
        scores=logits if output_scores else None,
        hypotheses=collapse_ctc(sequences.as_subclass(Tensor), blank_id, frame_confidence),
    )


def stream_frames(sequences: Tensor, blank_id: int, streamer: Any) -> None:
    """Pass the tokens of all frames to a streamer, one frame after the other.

    A streamer of transformers expects the prompt first, so the blank is passed before the first frame.

    Args:
        sequences: (B, N) best token of every frame.
        blank_id: id of the blank.
        streamer: a streamer of transformers; `None` to do nothing.
    """
    if streamer is None:
        return
    streamer.put(torch.full((len(sequences), 1), blank_id))
    for tokens in sequences.as_subclass(Tensor).cpu().unbind(1):
        streamer.put(tokens)
    streamer.end()
