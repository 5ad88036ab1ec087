"""Implements `generate()` with the arguments and outputs of Hugging Face transformers.

The search itself is in `decoding/`. The processor computes text and times.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    GenerationMode,
    MaxLengthCriteria,
)
from transformers.utils import ModelOutput

from .decoding import (
    Fusion,
    Hypotheses,
    Joint,
    Shortcuts,
    TransducerOptions,
    beam_decode_ctc,
    beam_decode_transducer,
    build_fusion,
    collapse_ctc,
    compute_token_confidence,
    greedy_decode_ctc,
    greedy_decode_transducer,
    mask_joint,
    mask_logits,
)
from .generation_arguments import (
    CTCArguments,
    SearchOptions,
    check_beam_search,
    check_label_bonus,
    check_logits_processors,
    compute_sequence_scores,
    drop_training_inputs,
    get_confidence_method,
    parse_ctc_arguments,
    set_stock_fields,
    take_search_options,
)
from .generation_streaming import StepObserver, stream_frames
from .outputs_parakeet import CTCTokens, ParakeetCTCGenerateOutput, ParakeetRNNTGenerateOutput, build_transducer_output

# value of `max_length` that means no limit; no audio has this number of steps
UNLIMITED_LENGTH = 2**31


class ParakeetCTCGenerationMixin(GenerationMixin):
    """Adds `generate` to a CTC model. It stores no state on the model, so several threads can call it."""

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
        """Decode a batch: select the best token of every frame, or run a beam search.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T), 1 for valid feature frames; `None` if there is no padding.
            return_dict_in_generate: whether to return a `ParakeetCTCGenerateOutput` instead of a tensor.
            compile_config: settings with which to compile the forward pass; `None` to run it uncompiled.
            output_confidence: confidence method of `decoding.compute_token_confidence`, `True` for `"max_prob"`, or
                `False` for no confidence.
            generation_config: settings that are treated as arguments; arguments of the call override them.
            **kwargs: the fields of `SearchOptions`, such as `num_beams` and `boosting`; `streamer`, `output_scores` and
                arguments of `forward`. Other arguments of transformers' `generate` are accepted if they change nothing,
                and ignored with a warning if they have no effect on a CTC head.

        Returns:
            (R, N) token ids, blanks and repeats included, where R is the number of clips times `num_return_sequences`.
            `processor.batch_decode` merges repeats and removes blanks.

        Raises:
            ValueError: an argument is unknown, out of range, or requires sampling.
        """
        if return_dict_in_generate:
            kwargs["return_dict_in_generate"] = True
        arguments = parse_ctc_arguments(kwargs, generation_config, self.generation_config)
        forward = self.__call__ if compile_config is None else self.get_compiled_call(compile_config)
        outputs = forward(input_features=input_features, attention_mask=attention_mask, **arguments.forward_kwargs)
        frame_lengths = None
        if attention_mask is not None:
            frame_lengths = self._get_subsampling_output_length(attention_mask.sum(-1))
        return decode_ctc(
            outputs, outputs.logits, frame_lengths, self.config.pad_token_id, arguments, output_confidence
        )


def build_search_fusion(
    search: SearchOptions, blank_id: int, vocab_size: int, num_clips: int, device: torch.device
) -> Fusion | None:
    """Build the scorers that a search adds to the scores of the model.

    Args:
        search: the arguments of `generate`.
        blank_id: id of the blank.
        vocab_size: number of tokens V with the blank.
        num_clips: number of clips in the batch.
        device: device of the model.

    Returns:
        The scorers with their weights; `None` if there are none.

    Raises:
        ValueError: a scorer belongs to another vocabulary, or `boosting` has another number of trees than clips.
    """
    if isinstance(search.boosting, (list, tuple)) and len(search.boosting) != num_clips:
        raise ValueError(
            f"a list of boosting trees must have one tree or `None` per clip, got {len(search.boosting)} entries for "
            f"{num_clips} clips: pass one entry per clip, or one tree instead of a list"
        )
    weighted = (search.language_model, search.lm_weight, search.boosting, search.boosting_weight)
    fusion = build_fusion(*weighted, blank_id, vocab_size)
    return None if fusion is None else fusion.to(device)


def decode_ctc(
    encoder_outputs: ModelOutput,
    logits: Tensor,
    frame_lengths: Tensor | None,
    blank_id: int,
    arguments: CTCArguments,
    output_confidence: bool | str,
    sequence_type: type[Tensor] = Tensor,
) -> ParakeetCTCGenerateOutput | Tensor:
    """Decode the scores of a CTC head, and build the output of `generate`.

    Args:
        encoder_outputs: output with the attentions and hidden states of the encoder.
        logits: (B, N, V) scores.
        frame_lengths: (B,) number of valid frames; `None` if all frames are valid.
        blank_id: id of the blank.
        arguments: the arguments of `generate`.
        output_confidence: confidence method, `True` for `"max_prob"`, or `False` for no confidence.
        sequence_type: type of the returned token ids: `Tensor`, or `CTCTokens` for a hybrid.

    Returns:
        (R, N) token ids, or a `ParakeetCTCGenerateOutput`.
    """
    if arguments.search.allowed_tokens is not None:
        logits = mask_logits(logits, arguments.search.allowed_tokens, blank_id)
    method = get_confidence_method(output_confidence)
    sequences, hypotheses, frame_confidence = search_ctc(logits, frame_lengths, blank_id, arguments, method)
    if sequence_type is not Tensor:
        # `torch.compile` cannot trace this, so a CTC model must not reach it
        sequences = sequences.as_subclass(sequence_type)
    if not arguments.return_dict:
        return sequences
    return ParakeetCTCGenerateOutput(
        sequences=sequences,
        logits=logits,
        attentions=encoder_outputs.attentions,
        hidden_states=encoder_outputs.hidden_states,
        token_confidence=frame_confidence,
        scores=logits if arguments.output_scores else None,
        hypotheses=hypotheses,
        sequences_scores=hypotheses.scores,
    )


def search_ctc(
    logits: Tensor, frame_lengths: Tensor | None, blank_id: int, arguments: CTCArguments, confidence: str | None
) -> tuple[Tensor, Hypotheses, Tensor | None]:
    """Decode the scores of a CTC head greedily or by beam search.

    Args:
        logits: (B, N, V) scores.
        frame_lengths: (B,) number of valid frames; `None` if all frames are valid.
        blank_id: id of the blank.
        arguments: the arguments of `generate`.
        confidence: confidence method; `None` for no confidence.

    Returns:
        (R, N) token of every frame, the hypotheses, and the (B, N) confidence of every frame, which is `None` for a
        beam search and without confidence.
    """
    search = arguments.search
    fusion = build_search_fusion(search, blank_id, logits.shape[-1], len(logits), logits.device)
    if search.num_beams > 1:
        check_beam_search(arguments.streamer)
        # a label sequence can be in the beam twice: ending with a label, and ending with a blank
        beam = replace(search.build_beam_options(), num_beams=2 * search.num_beams)
        hypotheses, sequences = beam_decode_ctc(
            logits, frame_lengths, blank_id, beam, fusion=fusion, confidence=confidence
        )
        return sequences, hypotheses, None
    sequences = greedy_decode_ctc(logits, frame_lengths, blank_id, fusion)
    stream_frames(sequences, blank_id, arguments.streamer)
    frame_confidence = None
    if confidence is not None:
        # without fusion, the token of a frame is the one with the highest score
        frame_confidence = compute_token_confidence(logits, confidence, None if fusion is None else sequences)
    return sequences, collapse_ctc(sequences, blank_id, frame_confidence), frame_confidence


class ParakeetTransducerGenerationMixin(GenerationMixin):
    """Replaces the search in transformers' `generate` by a transducer search.

    It stores no state on the model, so several threads can call `generate`.
    """

    # transformers calls `_sample`, which also runs the beam search of transducers
    _supported_generation_modes: ClassVar[list[GenerationMode]] = [GenerationMode.GREEDY_SEARCH]
    # arguments of `generate` that only this package has
    _additional_arguments = ("output_confidence", "search_options")

    def _set_stock_fields(self) -> None:
        """Set the fields of the generation config without which stock transformers cannot decode the saved model."""
        set_stock_fields(self.generation_config, self.config)

    def generate(self, inputs: Tensor | None = None, *args: Any, decoder: str = "transducer", **kwargs: Any) -> Any:
        """Decode a batch greedily, or by beam search if `num_beams` is larger than 1.

        Args:
            inputs: (B, T, F) log-mel features; `input_features` is another name of this argument.
            *args: further arguments of transformers' `generate`.
            decoder: `"transducer"`, or `"ctc"` for the CTC head of a hybrid.
            **kwargs: `attention_mask` (B, T), 1 for valid feature frames; `output_confidence`, `True` for `"max_prob"`
                or a method of `decoding.compute_token_confidence`; the fields of `SearchOptions`, such as `num_beams`,
                `language_model` and `boosting`; and the arguments of transformers' `generate` that do not sample or
                change scores: `max_new_tokens` (steps, blanks included), `streamer`, `stopping_criteria`,
                `output_logits`, `output_scores`, ...

        Returns:
            `ParakeetRNNTGenerateOutput`. With `decoder="ctc"`, the result of `ParakeetForCTC.generate`.

        Raises:
            ValueError: an argument requires sampling or is out of range, or `decoder="ctc"` without a CTC head.
        """
        kwargs = drop_training_inputs(kwargs)
        if decoder == "ctc":
            input_features = kwargs.pop("input_features", inputs)
            return self._generate_ctc(input_features, **kwargs)
        if decoder != "transducer":
            raise ValueError(f"`decoder` must be 'transducer' or 'ctc', got {decoder!r}")
        configs = (kwargs.get("generation_config") or (args[0] if args else None), self.generation_config)
        search_options, kwargs = take_search_options(kwargs, *configs)
        check_label_bonus(search_options.label_bonus)
        if search_options.num_beams > 1:
            check_beam_search(kwargs.get("streamer"), kwargs.get("stopping_criteria") or ())
        if take_search_options({}, *configs)[0].num_beams > 1:
            # transformers would repeat the clips for its own beam search
            kwargs.update(num_beams=1, num_return_sequences=1)
        return super().generate(inputs, *args, search_options=search_options, **kwargs)

    @torch.no_grad()
    def _generate_ctc(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        output_confidence: bool | str = False,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> ParakeetCTCGenerateOutput | Tensor:
        """Decode a batch with the CTC head of a hybrid.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T), 1 for valid feature frames; `None` if there is no padding.
            output_confidence: confidence method, `True` for `"max_prob"`, or `False` for no confidence.
            generation_config: settings that are treated as arguments; arguments of the call override them.
            **kwargs: further arguments of `ParakeetForCTC.generate`.

        Returns:
            (R, N) token ids of type `CTCTokens`, or a `ParakeetCTCGenerateOutput` with `return_dict_in_generate=True`.
        """
        if not self.config.ctc_head:
            raise ValueError(
                "`decoder='ctc'` requires a hybrid checkpoint, but this checkpoint has no CTC head: leave out `decoder`"
            )
        arguments = parse_ctc_arguments(kwargs, generation_config, self.generation_config)
        encoder_outputs = self.encoder(
            input_features=input_features, attention_mask=attention_mask, **arguments.forward_kwargs
        )
        logits = self.ctc_logits(encoder_outputs.last_hidden_state)
        frame_lengths = None if attention_mask is None else encoder_outputs.attention_mask.sum(-1)
        # by the type `CTCTokens`, the processor recognises the output of the CTC head
        return decode_ctc(
            encoder_outputs, logits, frame_lengths, self.config.blank_token_id, arguments, output_confidence, CTCTokens
        )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Validate the arguments of `generate` with transformers' check, except those that only this package has."""
        stock_kwargs = {name: value for name, value in model_kwargs.items() if name not in self._additional_arguments}
        super()._validate_model_kwargs(stock_kwargs)

    def _prepare_special_tokens(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """Set the start token to the blank.

        Args:
            generation_config: the copy of the generation config for this call, changed in place.
            *args: further arguments of the method of transformers.
            **kwargs: further arguments of the method of transformers.
        """
        generation_config.decoder_start_token_id = self.config.blank_token_id
        super()._prepare_special_tokens(generation_config, *args, **kwargs)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str, dict[str, Any]]:
        """Run the encoder, unless `generate` was called with `encoder_outputs`.

        Args:
            *args: arguments of the method of transformers.
            **kwargs: arguments of the method of transformers.

        Returns:
            The features, the name of the argument with the features, and the remaining arguments of `generate` with
            `encoder_outputs`.
        """
        input_features, input_name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if model_kwargs.get("encoder_outputs") is None:
            output_names = ("output_attentions", "output_hidden_states")
            output_kwargs = {name: value for name, value in model_kwargs.items() if name in output_names}
            model_kwargs["encoder_outputs"] = self.get_audio_features(
                input_features, attention_mask=model_kwargs.get("attention_mask"), **output_kwargs
            )
        return input_features, input_name, model_kwargs

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_kwargs: dict[str, Any], device: Any = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the (B, 1) start tokens, which are blanks, and the unchanged `model_kwargs`."""
        return torch.full((batch_size, 1), self.config.blank_token_id, device=device), model_kwargs

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Create no key-value cache, because the search keeps the LSTM state in local variables."""

    def _prepare_generated_length(
        self, generation_config: Any, has_default_max_length: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Set `max_length` of the sequence, which is unlimited by default.

        The search ends without a limit as well, because the number of frames bounds the number of steps.

        Args:
            generation_config: the copy of the generation config for this call, changed in place.
            has_default_max_length: whether the caller has not set `max_length`.
            *args: further arguments of the method of transformers.
            **kwargs: further arguments of the method of transformers.

        Returns:
            `generation_config`.
        """
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = UNLIMITED_LENGTH
        elif generation_config.max_new_tokens is not None:
            # the sequence starts with a blank, which is not a new token
            generation_config.max_length = generation_config.max_new_tokens + 1
        return generation_config

    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError if `max_length` does not allow a step after the start token."""
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
        """Run a transducer search; transformers' `generate` calls this method for greedy search.

        Args:
            input_ids: (B, 1) start tokens, which are blanks.
            logits_processor: logits processors; only the suppression of duration outputs is accepted.
            stopping_criteria: the stopping criteria of the caller, and the criterion for `max_length`, which is
                ignored, because the search limits the number of steps itself.
            generation_config: the generation config of this call.
            synced_gpus: unused, because the search does not wait for other processes.
            streamer: receives the token of every step; `None` for no streamer.
            **model_kwargs: `encoder_outputs`, `output_confidence` and `search_options`.

        Returns:
            The output of `generate`.
        """
        check_logits_processors(logits_processor, self.config.vocab_size)
        search: SearchOptions = model_kwargs["search_options"]
        encoder_outputs = model_kwargs["encoder_outputs"]
        criteria = [criterion for criterion in stopping_criteria if not isinstance(criterion, MaxLengthCriteria)]
        observer = None
        if criteria or streamer is not None:
            observer = StepObserver(input_ids, self.config.pad_token_id, criteria, streamer)
        options = self._build_decoding_options(
            generation_config, model_kwargs.get("output_confidence"), needs_every_step=observer is not None
        )
        if search.num_beams > 1:
            check_beam_search(streamer, criteria, options.keep_logits)
        hypotheses = self._search(encoder_outputs, options, search, observer)
        if streamer is not None:
            streamer.end()
        output = build_transducer_output(
            hypotheses,
            input_ids.repeat_interleave(search.num_return_sequences, 0),
            encoder_outputs,
            self.config,
            options.max_steps,
            generation_config,
        )
        output.sequences_scores = compute_sequence_scores(hypotheses, search.length_penalty)
        return output

    def _search(
        self, encoder_outputs: Any, options: TransducerOptions, search: SearchOptions, observer: StepObserver | None
    ) -> Hypotheses:
        """Decode the encoder frames greedily or by beam search.

        Args:
            encoder_outputs: output of the encoder; `pooler_output` contains the encoder states after the projection to
                the width of the joint network.
            options: settings of the search.
            search: number of hypotheses, language model, boosting, allowed tokens.
            observer: receives every step of greedy decoding; `None` for no observer.
        """
        encoder_states, frame_lengths = encoder_outputs.pooler_output, get_frame_lengths(encoder_outputs)
        vocabulary = options.blank_id, options.vocab_size
        fusion = build_search_fusion(search, *vocabulary, len(encoder_states), encoder_states.device)
        shortcuts = Shortcuts(*self.joint.build_argmax_functions(options.vocab_size))
        joint: Joint = self.joint.score
        if search.allowed_tokens is not None:
            joint = mask_joint(joint, search.allowed_tokens, options.blank_id, options.vocab_size)
            # the shortcut for tokens does not know the mask
            shortcuts = replace(shortcuts, find_best_tokens=None)
        networks, pad_id = (self.decoder.step, joint), self.config.pad_token_id
        if search.num_beams > 1:
            return beam_decode_transducer(
                encoder_states, frame_lengths, *networks, options, search.build_beam_options(), pad_id, fusion
            )
        return greedy_decode_transducer(
            encoder_states, frame_lengths, *networks, options, pad_id, shortcuts, observer, fusion
        )

    def _build_decoding_options(
        self, generation_config: Any, output_confidence: bool | str | None, needs_every_step: bool
    ) -> TransducerOptions:
        """Build the settings of the search from the model config and the arguments of `generate`.

        Args:
            generation_config: the generation config of this call.
            output_confidence: `True` for `"max_prob"`, the name of a method, or `False` or `None` for no confidence.
            needs_every_step: whether a streamer or stopping criterion must receive every step before the next step.
        """
        config = self.config
        return TransducerOptions(
            blank_id=config.blank_token_id,
            vocab_size=config.vocab_size,
            durations=tuple(config.durations) if hasattr(config, "durations") else None,
            max_symbols=config.max_symbols_per_step,
            # `max_length` includes the start token
            max_steps=None if generation_config.max_length >= UNLIMITED_LENGTH else generation_config.max_length - 1,
            # 1: the search takes one step at a time; 0: it chooses how many frames one call scores
            lookahead=1 if needs_every_step else 0,
            confidence=get_confidence_method(output_confidence),
            keep_logits=bool(generation_config.output_logits or generation_config.output_scores),
        )


def get_frame_lengths(encoder_outputs: Any) -> Tensor:
    """Return the number of valid encoder frames of each clip.

    Args:
        encoder_outputs: output of the encoder with `last_hidden_state` (B, N, H) and `attention_mask` (B, N), which is
            `None` if all frames are valid.

    Returns:
        (B,) number of valid frames.
    """
    batch, num_frames = encoder_outputs.last_hidden_state.shape[:2]
    if encoder_outputs.attention_mask is None:
        return torch.full((batch,), num_frames, device=encoder_outputs.last_hidden_state.device)
    return encoder_outputs.attention_mask.sum(-1)
