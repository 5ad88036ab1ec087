"""`generate()`: Hugging Face arguments in, greedy decoding, Hugging Face outputs out.

The decoding itself is in `decoding.py`; text and times are made by the processor.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    SuppressTokensLogitsProcessor,
)
from transformers.utils import ModelOutput, logging

from .decoding import Shortcuts, TransducerOptions, confidence, greedy_ctc, greedy_transducer

logger = logging.get_logger(__name__)

# arguments of the encoder that `generate` of a CTC head passes on
FORWARD_ARGUMENTS = {"output_attentions", "output_hidden_states", "output_attention_mask", "return_dict"}

# arguments of transformers' `generate` that say nothing about the result of a CTC head
NEUTRAL_ARGUMENTS = {
    "synced_gpus", "use_cache", "cache_implementation", "cache_config", "transformers_version", "_from_model_config",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "output_logits", "tokenizer",
}  # fmt: skip
# and those that ask for what greedy decoding does anyway
NEUTRAL_VALUES = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "decoder": "ctc",
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
# arguments of sampling, of beams, and limits: a CTC head gives one token per frame in a single step
ARGUMENTS_WITHOUT_EFFECT = {
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings", "stopping_criteria",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty",
    "early_stopping",
}  # fmt: skip

# a limit on steps that no audio reaches
UNLIMITED = 2**31


class CTCTokens(Tensor):
    """Frame-wise tokens (B, N) from the CTC head of a hybrid; slices and copies have this type as well.

    A hybrid's processor has the type of the transducer, and reads here that these tokens are of the other kind.
    """

    decoder_type = "ctc"

    def __deepcopy__(self, memo: dict[int, Any]) -> CTCTokens:
        return self.clone()  # type: ignore[return-value]  # operations keep the type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save a plain tensor, which `torch.load` reads without this package."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


@dataclass
class ParakeetCTCGenerateOutput(ModelOutput):
    """What `ParakeetForCTC.generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences: (B, N) best token of every frame, blanks and repeats included; blank past a clip's end.
        logits: (B, N, V) scores.
        attentions: the encoder's, when asked for.
        hidden_states: the encoder's, when asked for.
        token_confidence: (B, N) confidence of each frame's token, with `output_confidence`.
        scores: the logits again, with `output_scores`: greedy decoding does not change them.
    """

    sequences: Tensor | None = None
    logits: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_confidence: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class CTCRequest:
    """What a caller of `generate` asks of a CTC head.

    Args:
        forward: arguments of the encoder.
        streamer: shown the tokens of all frames, or nothing.
        return_dict: return a `ParakeetCTCGenerateOutput`.
        scores: fill its `scores`.
    """

    forward: dict[str, Any]
    streamer: Any = None
    return_dict: bool = False
    scores: bool = False


class ParakeetCTCGenerationMixin(GenerationMixin):
    """Greedy CTC `generate`; keeps nothing on the model."""

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
        """Take the best token of every frame.

        Args:
            input_features: (B, T, F) log-mel features.
            attention_mask: (B, T), 1 on valid mel frames.
            return_dict_in_generate: return a `ParakeetCTCGenerateOutput` instead of a tensor.
            compile_config: compile the forward pass with these settings.
            output_confidence: also give confidences; `True` means `"max_prob"`, see `decoding.confidence`.
            generation_config: its settings count like arguments; arguments come first.
            **kwargs: `streamer`, `output_scores`, arguments of `forward`; other arguments of transformers' `generate`
                are accepted when they ask for greedy decoding, and ignored with a warning when they have no effect.

        Returns:
            (B, N) token ids, blanks and repeats included: `processor.batch_decode` merges them.

        Raises:
            ValueError: an argument that asks for another result, such as one of beam search or sampling.
        """
        if return_dict_in_generate:
            kwargs["return_dict_in_generate"] = True
        request = ctc_request(kwargs, generation_config)
        forward = self.__call__ if compile_config is None else self.get_compiled_call(compile_config)
        outputs = forward(input_features=input_features, attention_mask=attention_mask, **request.forward)
        lengths = None if attention_mask is None else self._get_subsampling_output_length(attention_mask.sum(-1))
        sequences = greedy_ctc(outputs.logits, lengths, self.config.pad_token_id)
        stream(sequences, self.config.pad_token_id, request.streamer)
        if not request.return_dict:
            return sequences
        return ctc_output(outputs, outputs.logits, sequences, output_confidence, request.scores)


@dataclass
class ParakeetRNNTGenerateOutput(ModelOutput):
    """What `generate` of a transducer returns.

    Args:
        sequences: (B, 1 + S) the blank, then the token or blank of every step; `pad_token_id` past a row's end.
        durations: (B, 1 + S) 0, then the frames that each step advanced: the frame of a step is their sum before it.
        attentions: the encoder's, when asked for.
        hidden_states: the encoder's, when asked for.
        token_confidence: (B, 1 + S) confidence of each label, 0 on blanks, with `output_confidence`.
        logits: S scores (B, V + D), one per step, with `output_logits`; 0 past a row's end.
        scores: the same, with `output_scores`: greedy decoding does not change them.
    """

    sequences: Tensor | None = None
    durations: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_confidence: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    scores: tuple[Tensor, ...] | None = None


class ParakeetTransducerGenerationMixin(GenerationMixin):
    """Greedy transducer `generate`, by transformers' own route up to the loop; keeps nothing on the model."""

    _supported_generation_modes: ClassVar[list[GenerationMode]] = [GenerationMode.GREEDY_SEARCH]
    # arguments of ours that travel from `generate` to the loop
    _own_arguments = ("output_confidence", "forced_blanks")

    def generate(self, inputs: Tensor | None = None, *args: Any, decoder: str = "transducer", **kwargs: Any) -> Any:
        """Decode a batch greedily.

        Args:
            inputs: (B, T, F) log-mel features; or as `input_features`.
            *args: further arguments of transformers' `generate`.
            decoder: `"transducer"`, or `"ctc"` for the second head of a hybrid.
            **kwargs: `attention_mask` (B, T) and the arguments of transformers' `generate` that greedy decoding can
                honour: `max_new_tokens` (steps, blanks included), `streamer`, `stopping_criteria`, `output_logits`,
                `output_scores`, …; `output_confidence` (`True` for `"max_prob"`, or a method of `decoding.confidence`);
                `forced_blanks` (default `config.forced_blanks`).

        Returns:
            `ParakeetRNNTGenerateOutput`; with `decoder="ctc"`, what `ParakeetForCTC.generate` returns.

        Raises:
            ValueError: an argument of beam search or sampling, or `decoder="ctc"` without a CTC head.
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
        """Decode with the CTC head of a hybrid."""
        if not self.config.ctc_head:
            raise ValueError("`decoder='ctc'` needs a hybrid checkpoint, this one has no CTC head: leave `decoder` out")
        kwargs.pop("forced_blanks", None)
        request = ctc_request(kwargs, generation_config)
        encoded = self.encoder(input_features=input_features, attention_mask=attention_mask, **request.forward)
        logits = self.ctc_logits(encoded.last_hidden_state)
        lengths = None if attention_mask is None else encoded.attention_mask.sum(-1)
        sequences = greedy_ctc(logits, lengths, self.config.blank_token_id).as_subclass(CTCTokens)
        stream(sequences, self.config.blank_token_id, request.streamer)
        if not request.return_dict:
            return sequences
        return ctc_output(encoded, logits, sequences, output_confidence, request.scores)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in self._own_arguments})

    def _prepare_special_tokens(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """The start is known from the model's configuration; `generation_config` is a copy of this call."""
        generation_config.decoder_start_token_id = self.config.blank_token_id
        super()._prepare_special_tokens(generation_config, *args, **kwargs)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str, dict[str, Any]]:
        """Run the encoder."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if model_kwargs.get("encoder_outputs") is None:
            wanted = {k: v for k, v in model_kwargs.items() if k in ("output_attentions", "output_hidden_states")}
            model_kwargs["encoder_outputs"] = self.get_audio_features(
                inputs, attention_mask=model_kwargs.get("attention_mask"), **wanted
            )
        return inputs, name, model_kwargs

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_kwargs: dict[str, Any], device: Any = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Every row starts from the blank."""
        return torch.full((batch_size, 1), self.config.blank_token_id, device=device), model_kwargs

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The LSTM state lives in the decoding loop."""

    def _prepare_generated_length(
        self, generation_config: Any, has_default_max_length: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Without a limit of the caller, steps are bounded by the frames alone."""
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = UNLIMITED
        elif generation_config.max_new_tokens is not None:
            generation_config.max_length = generation_config.max_new_tokens + 1
        return generation_config

    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        if generation_config.max_length < 2:
            raise ValueError(
                "a transducer's sequence starts with a blank: `max_length` must be at least 2, "
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
        """The decoding loop, called by transformers' `generate`."""
        refuse_processors(logits_processor, self.config.vocab_size)
        encoded = model_kwargs["encoder_outputs"]
        criteria = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria)]
        watched = bool(criteria) or streamer is not None
        options = self._decoding_options(generation_config, model_kwargs, watched)
        hypotheses = greedy_transducer(
            encoded.pooler_output,
            frame_lengths(encoded),
            predict=self.decoder.step,
            joint=self.joint.score,
            options=options,
            pad_id=self.config.pad_token_id,
            shortcuts=Shortcuts(*self.joint.fast_argmax(options.vocab_size)),
            on_step=Watcher(input_ids, self.config.pad_token_id, criteria, streamer) if watched else None,
        )
        if streamer is not None:
            streamer.end()
        logits = None if hypotheses.logits is None else tuple(hypotheses.logits.unbind(1))
        return ParakeetRNNTGenerateOutput(
            sequences=torch.cat([input_ids, hypotheses.tokens], dim=1),
            durations=F.pad(hypotheses.durations, (1, 0)),
            attentions=encoded.attentions,
            hidden_states=encoded.hidden_states,
            token_confidence=None if hypotheses.scores is None else F.pad(hypotheses.scores, (1, 0)),
            logits=logits if generation_config.output_logits else None,
            scores=logits if generation_config.output_scores else None,
        )

    def _decoding_options(
        self, generation_config: Any, model_kwargs: dict[str, Any], watched: bool
    ) -> TransducerOptions:
        config, wanted = self.config, model_kwargs.get("output_confidence")
        forced_blanks = model_kwargs.get("forced_blanks")
        return TransducerOptions(
            blank_id=config.blank_token_id,
            vocab_size=config.vocab_size,
            durations=tuple(config.durations) if hasattr(config, "durations") else None,
            max_symbols=config.max_symbols_per_step,
            max_steps=None if generation_config.max_length >= UNLIMITED else generation_config.max_length - 1,
            forced_blanks=config.forced_blanks if forced_blanks is None else forced_blanks,
            # whoever watches sees every step on its own
            lookahead=1 if watched else 0,
            confidence="max_prob" if wanted is True else wanted or None,
            keep_scores=bool(generation_config.output_logits or generation_config.output_scores),
        )


class Watcher:
    """Shows the steps of a decoding loop to a streamer and to stopping criteria."""

    def __init__(self, start: Tensor, pad_id: int, criteria: list[Any], streamer: Any) -> None:
        self.start, self.pad_id, self.criteria, self.streamer = start, pad_id, criteria, streamer
        self.shown = 0

    def __call__(self, rows: list[list[int]]) -> list[bool]:
        """Pass new steps on; return which rows are to stop."""
        if self.streamer is not None:
            for token in rows[0][self.shown :]:
                self.streamer.put(torch.tensor([token]))
            self.shown = len(rows[0])
        if not self.criteria:
            return [False] * len(rows)
        width = max(map(len, rows))
        padded = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows], device=self.start.device)
        sequences = torch.cat([self.start, padded.long()], dim=1)
        # scores of single steps are not kept
        stops = [criterion(sequences, None) for criterion in self.criteria]
        return torch.stack([torch.as_tensor(stop).expand(len(rows)) for stop in stops]).any(0).tolist()


def frame_lengths(encoded: Any) -> Tensor:
    """(B,) valid frames of an encoder's output; all of them when the input had no mask."""
    batch, frames = encoded.last_hidden_state.shape[:2]
    if encoded.attention_mask is None:
        return torch.full((batch,), frames, device=encoded.last_hidden_state.device)
    return encoded.attention_mask.sum(-1)


def ctc_output(
    encoded: ModelOutput, logits: Tensor, sequences: Tensor, output_confidence: bool | str, output_scores: bool
) -> ParakeetCTCGenerateOutput:
    """Collect what a CTC head gave."""
    method = "max_prob" if output_confidence is True else output_confidence
    return ParakeetCTCGenerateOutput(
        sequences=sequences,
        logits=logits,
        attentions=encoded.attentions,
        hidden_states=encoded.hidden_states,
        token_confidence=confidence(logits, method) if method else None,
        scores=logits if output_scores else None,
    )


def without_targets(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop what a processor adds for training: decoding looks at the audio alone."""
    return {name: value for name, value in kwargs.items() if name not in ("labels", "decoder_input_ids")}


def ctc_request(kwargs: dict[str, Any], generation_config: GenerationConfig | None) -> CTCRequest:
    """Sort the arguments of `generate` for a CTC head.

    Args:
        kwargs: arguments of the caller.
        generation_config: its settings that differ from transformers' defaults count as well.

    Raises:
        ValueError: an argument that asks for another result than the best token of every frame, or is not known.
    """
    settings = {} if generation_config is None else generation_config.to_diff_dict()
    asked = {**settings, **without_targets(kwargs)}
    forward = {name: asked[name] for name in FORWARD_ARGUMENTS if asked.get(name) is not None}
    streamer, scores, as_dict = (asked.get(n) for n in ("streamer", "output_scores", "return_dict_in_generate"))
    done = {*FORWARD_ARGUMENTS, *NEUTRAL_ARGUMENTS, "streamer", "output_scores", "return_dict_in_generate"}
    rest = {name for name, value in asked.items() if name not in done and not is_neutral(name, value)}
    unused = sorted(rest & ARGUMENTS_WITHOUT_EFFECT)
    if unused:
        logger.warning_once(
            f"{', '.join(unused)}: no effect on a CTC model, which gives one token per frame in a single step."
        )
    refused = sorted(rest - ARGUMENTS_WITHOUT_EFFECT)
    if refused:
        raise ValueError(
            f"CTC decoding takes the best token of every frame and cannot honour {', '.join(refused)}: leave it out"
        )
    return CTCRequest({**forward, "return_dict": True}, streamer, bool(as_dict), bool(scores))


def is_neutral(name: str, value: Any) -> bool:
    """Tell whether an argument asks for nothing, or for what greedy decoding does."""
    nothing = value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value)
    return nothing or (name in NEUTRAL_VALUES and NEUTRAL_VALUES[name] == value)


def stream(sequences: Tensor, blank_id: int, streamer: Any) -> None:
    """Show (B, N) frame-wise tokens to a streamer, the blank in place of a prompt first, as transformers does."""
    if streamer is None:
        return
    streamer.put(torch.full((len(sequences), 1), blank_id))
    for tokens in sequences.as_subclass(Tensor).cpu().unbind(1):
        streamer.put(tokens)
    streamer.end()


def refuse_processors(processors: Any, vocab_size: int) -> None:
    """Raise on processors of the scores, but for the one that stock checkpoints carry to suppress duration outputs."""
    for processor in processors:
        if isinstance(processor, SuppressTokensLogitsProcessor) and min(processor.suppress_tokens) >= vocab_size:
            continue
        raise ValueError(
            f"greedy transducer decoding takes scores as they are: {type(processor).__name__} cannot be honoured; "
            "leave out the `generate` argument or generation config entry that asks for it"
        )
