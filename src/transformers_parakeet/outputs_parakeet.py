"""Output classes of the encoder, of the transducer models, and of `generate`.

The models that return them are in `modeling_parakeet.py`, and `generate` in `generation_parakeet.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .decoding import Hypotheses, insert_forced_blanks


@dataclass
class ParakeetEncoderModelOutput(BaseModelOutputWithPooling):
    """Output of the encoder.

    Args:
        last_hidden_state: (B, N, H) encoder frames.
        pooler_output: (B, N, J) encoder states, projected to the width of the joint network; `None` except for
            transducers.
        hidden_states: input of the first block and output of each block, each (B, N, H); `None` unless
            `output_hidden_states` is set.
        attentions: attention weights of each block, each (B, heads, N, N); `None` unless `output_attentions` is set.
        attention_mask: (B, N) integer mask, 1 on non-padding frames; `None` if the input had no mask.
    """

    attention_mask: Tensor | None = None


@dataclass
class ParakeetRNNTOutput(BaseModelOutputWithPooling):
    """Output of a transducer model.

    Args:
        loss: transducer loss (hybrid loss if the model has a CTC head); `None` without labels.
        logits: (B, N, U+1, V) logits of the joint network, (B, N, U+1, V + D) for TDT; `None` if labels are given and
            `output_logits` is not set.
        last_hidden_state: (B, N, H) encoder frames.
        pooler_output: (B, N, J) encoder states, projected to the width of the joint network.
        hidden_states: input of the first encoder block and output of each block, each (B, N, H); `None` unless
            `output_hidden_states` is set.
        attentions: attention weights of each encoder block, each (B, heads, N, N); `None` unless `output_attentions`
            is set.
        attention_mask: (B, N) integer mask, 1 on non-padding frames; `None` if the input had no mask.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attention_mask: Tensor | None = None


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


@dataclass
class ParakeetRNNTGenerateOutput(ModelOutput):
    """Output of `generate` of a transducer; `num_steps` is the largest number of steps of a hypothesis.

    R is the number of clips B times `num_return_sequences`. The hypotheses of a clip are consecutive, best first.

    Args:
        sequences: (R, 1 + num_steps) the blank, then the label or blank of every step, then `pad_token_id` as
            padding.
        durations: (R, 1 + num_steps) 0, then the number of frames that each step advances. The frame of a step is
            the sum of all earlier durations.
        attentions: attentions of the encoder, if requested.
        hidden_states: hidden states of the encoder, if requested.
        token_confidence: (R, 1 + num_steps) confidence of each label, 0 for blanks; set if requested with
            `output_confidence`.
        logits: one tensor per step, (B, V + D) scores, 0 for padding; set if requested with `output_logits`.
        scores: equal to `logits`, because greedy decoding does not change scores; set if requested with
            `output_scores`.
        hypotheses: the labels with their frames and predicted durations, without blanks.
        sequences_scores: (R,) score / (number of labels + 1)^length_penalty of a beam search; `None` for greedy
            decoding. It is -inf for an empty row, if a clip has fewer hypotheses than `num_return_sequences`.
    """

    sequences: Tensor | None = None
    durations: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_confidence: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    scores: tuple[Tensor, ...] | None = None
    hypotheses: Hypotheses | None = None
    sequences_scores: Tensor | None = None


def build_transducer_output(
    hypotheses: Hypotheses,
    start_tokens: Tensor,
    encoder_outputs: Any,
    config: Any,
    max_steps: int | None,
    generation_config: GenerationConfig,
) -> ParakeetRNNTGenerateOutput:
    """Convert the result of a transducer search to the output of transformers' `generate`.

    A forced advance is an advance by one frame after the maximum number of labels on a frame. With
    `config.forced_blanks`, it becomes a blank step, otherwise it is added to the duration of the last label.

    Args:
        hypotheses: the result of the search; `steps` must be set.
        start_tokens: (B, 1) start tokens, which are blanks.
        encoder_outputs: the output of the encoder.
        config: the model config.
        max_steps: maximum number of steps in the output; `None` for no limit.
        generation_config: the generation config, which says whether to return `logits` and `scores`.

    Returns:
        All steps in the layout of transformers, and the hypotheses.
    """
    steps = hypotheses.steps
    assert steps is not None
    if config.forced_blanks:
        # as in NeMo, the label keeps its predicted duration
        steps = insert_forced_blanks(steps, config.blank_token_id, config.pad_token_id, max_steps)
    else:
        # as in stock transformers
        steps = replace(steps, durations=steps.durations + steps.forced_advances)
    logits = None if steps.logits is None else tuple(steps.logits.unbind(1))
    # durations and confidence of the start token are 0
    return ParakeetRNNTGenerateOutput(
        sequences=torch.cat([start_tokens, steps.tokens], dim=1),
        durations=F.pad(steps.durations, (1, 0)),
        attentions=encoder_outputs.attentions,
        hidden_states=encoder_outputs.hidden_states,
        token_confidence=None if steps.confidence is None else F.pad(steps.confidence, (1, 0)),
        logits=logits if generation_config.output_logits else None,
        scores=logits if generation_config.output_scores else None,
        hypotheses=replace(hypotheses, steps=None),
    )


__all__ = [
    "CTCTokens",
    "ParakeetCTCGenerateOutput",
    "ParakeetEncoderModelOutput",
    "ParakeetRNNTGenerateOutput",
    "ParakeetRNNTOutput",
    "build_transducer_output",
]
