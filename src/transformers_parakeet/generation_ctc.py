"""Implements `generate()` of CTC heads with the arguments and outputs of Hugging Face transformers.

The search itself is in `decoding/`. The processor computes text and times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import CompileConfig, GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .decoding import (
    Hypotheses,
    beam_decode_ctc,
    collapse_ctc,
    compute_token_confidence,
    greedy_decode_ctc,
    mask_logits,
)
from .generation_arguments import (
    CTCArguments,
    check_beam_search,
    get_confidence_method,
    parse_ctc_arguments,
)
from .generation_streaming import stream_frames


class CTCTokens(Tensor):
    """The best token of every frame (B, N) from the CTC head of a hybrid; slices and copies also have this type.

    The processor of a hybrid decodes the output of the transducer by default, and recognises the output of the CTC head
    by this type.
    """

    decoder_type = "ctc"

    def __deepcopy__(self, memo: dict[int, Any]) -> CTCTokens:
        """Copy the tokens; the copy has the type `CTCTokens`."""
        # mypy does not know that `clone` returns the type of `self`
        return self.clone()  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor, so `torch.load` can read it without this package."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


@dataclass
class ParakeetCTCGenerateOutput(ModelOutput):
    """Output of `ParakeetForCTC.generate` with `return_dict_in_generate=True`.

    Args:
        sequences: (R, N) token of every frame, blanks and repeats included; the blank at padding frames. R is the
            number of clips B times `num_return_sequences`.
        logits: (B, N, V) scores.
        attentions: attentions of the encoder, if requested.
        hidden_states: hidden states of the encoder, if requested.
        token_confidence: (B, N) confidence of the best token of each frame, if requested with `output_confidence`;
            `None` for a beam search, whose confidence is in `hypotheses`.
        scores: equal to `logits`, because decoding does not change scores; set if requested with `output_scores`.
        hypotheses: the tokens without blanks and repeats, with their frames.
        sequences_scores: (R,) scores of a beam search, best first for each clip; `None` for greedy decoding. It is -inf
            for an empty row, if a clip has fewer hypotheses than `num_return_sequences`.
    """

    sequences: Tensor | None = None
    logits: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_confidence: Tensor | None = None
    scores: Tensor | None = None
    hypotheses: Hypotheses | None = None
    sequences_scores: Tensor | None = None


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
        arguments = parse_ctc_arguments(kwargs, generation_config)
        forward = self.__call__ if compile_config is None else self.get_compiled_call(compile_config)
        outputs = forward(input_features=input_features, attention_mask=attention_mask, **arguments.forward_kwargs)
        frame_lengths = None
        if attention_mask is not None:
            frame_lengths = self._get_subsampling_output_length(attention_mask.sum(-1))
        return decode_ctc(
            outputs, outputs.logits, frame_lengths, self.config.pad_token_id, arguments, output_confidence
        )


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
    search, method = arguments.search, get_confidence_method(output_confidence)
    fusion = search.build_fusion(blank_id, logits.shape[-1], logits.device)
    if search.allowed_tokens is not None:
        logits = mask_logits(logits, search.allowed_tokens, blank_id)
    frame_confidence = beam_hypotheses = None
    if search.num_beams == 1:
        sequences = greedy_decode_ctc(logits, frame_lengths, blank_id, fusion)
        stream_frames(sequences, blank_id, arguments.streamer)
    else:
        check_beam_search(arguments.streamer)
        # a label sequence can be in the beam twice: ending with a label, and ending with a blank
        beam = replace(search.build_beam_options(), num_beams=2 * search.num_beams)
        beam_hypotheses, sequences = beam_decode_ctc(
            logits, frame_lengths, blank_id, beam, fusion=fusion, confidence=method
        )
    if not arguments.return_dict:
        return sequences.as_subclass(sequence_type)
    if beam_hypotheses is None and method is not None:
        # without fusion, the token of a frame is the one with the highest score
        frame_confidence = compute_token_confidence(logits, method, None if fusion is None else sequences)
    return ParakeetCTCGenerateOutput(
        sequences=sequences.as_subclass(sequence_type),
        logits=logits,
        attentions=encoder_outputs.attentions,
        hidden_states=encoder_outputs.hidden_states,
        token_confidence=frame_confidence,
        scores=logits if arguments.output_scores else None,
        hypotheses=beam_hypotheses or collapse_ctc(sequences, blank_id, frame_confidence),
        sequences_scores=None if beam_hypotheses is None else beam_hypotheses.scores,
    )
