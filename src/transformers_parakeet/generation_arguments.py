"""Arguments of `generate`: which of them greedy decoding supports, ignores or refuses.

Decoding with the arguments is in `generation_parakeet.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.generation import GenerationConfig, SuppressTokensLogitsProcessor
from transformers.utils import logging

from .decoding import check_confidence_method

logger = logging.get_logger(__name__)

# arguments that `generate` of a CTC head passes to the encoder
FORWARD_ARGUMENTS = {"output_attentions", "output_hidden_states", "output_attention_mask", "return_dict"}

# arguments of transformers' `generate` that do not change the result of a CTC head
NEUTRAL_ARGUMENTS = {
    "synced_gpus", "use_cache", "cache_implementation", "cache_config", "transformers_version", "_from_model_config",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "output_logits", "tokenizer",
}  # fmt: skip
# values with which an argument asks for greedy decoding
GREEDY_VALUES = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "decoder": "ctc",
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
# arguments of sampling and beam search, and limits: a CTC head returns one token per frame in a single step
ARGUMENTS_WITHOUT_EFFECT = {
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings", "stopping_criteria",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty",
    "early_stopping",
}  # fmt: skip


@dataclass(frozen=True)
class CTCRequest:
    """The arguments of one call of `generate` with a CTC head.

    Args:
        forward: arguments for the encoder.
        streamer: receives the tokens of all frames; `None` for no streamer.
        return_dict: return a `ParakeetCTCGenerateOutput`.
        scores: fill its field `scores`.
    """

    forward: dict[str, Any]
    streamer: Any = None
    return_dict: bool = False
    scores: bool = False


def without_targets(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the training targets that a processor returns: decoding uses the audio alone.

    Args:
        kwargs: arguments of `generate`.

    Returns:
        The other arguments.
    """
    return {name: value for name, value in kwargs.items() if name not in ("labels", "decoder_input_ids")}


def ctc_request(kwargs: dict[str, Any], generation_config: GenerationConfig | None) -> CTCRequest:
    """Read the arguments of `generate` for a CTC head.

    Args:
        kwargs: the arguments of the call.
        generation_config: its settings that differ from transformers' defaults count like arguments; `None` for none.

    Returns:
        The arguments that have an effect.

    Raises:
        ValueError: an argument asks for anything but the best token of every frame, or is unknown.
    """
    settings = {} if generation_config is None else generation_config.to_diff_dict()
    arguments = {**settings, **without_targets(kwargs)}
    forward = {name: arguments[name] for name in FORWARD_ARGUMENTS if arguments.get(name) is not None}
    handled = {*FORWARD_ARGUMENTS, *NEUTRAL_ARGUMENTS, "streamer", "output_scores", "return_dict_in_generate"}
    remaining = {n for n, value in arguments.items() if n not in handled and not asks_for_greedy(n, value)}
    ignored = sorted(remaining & ARGUMENTS_WITHOUT_EFFECT)
    if ignored:
        logger.warning_once(
            f"{', '.join(ignored)}: no effect on a CTC model, which returns one token per frame in a single step."
        )
    refused = sorted(remaining - ARGUMENTS_WITHOUT_EFFECT)
    if refused:
        raise ValueError(
            f"CTC decoding takes the best token of every frame and does not support {', '.join(refused)}: leave it out"
        )
    return CTCRequest(
        forward={**forward, "return_dict": True},
        streamer=arguments.get("streamer"),
        return_dict=bool(arguments.get("return_dict_in_generate")),
        scores=bool(arguments.get("output_scores")),
    )


def asks_for_greedy(name: str, value: Any) -> bool:
    """Tell whether an argument of `generate` is unset or has a value that asks for greedy decoding.

    Args:
        name: name of the argument.
        value: its value.
    """
    is_unset = value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value)
    return is_unset or (name in GREEDY_VALUES and GREEDY_VALUES[name] == value)


def confidence_method(output_confidence: bool | str | None) -> str | None:
    """Return the confidence method that the argument `output_confidence` of `generate` asks for.

    Args:
        output_confidence: `True` for the default method `"max_prob"`, the name of a method, or `False` or `None`.

    Returns:
        The name of the method; `None` for no confidence.

    Raises:
        ValueError: no method has this name.
    """
    if not output_confidence:
        return None
    method = "max_prob" if output_confidence is True else output_confidence
    check_confidence_method(method)
    return method


def refuse_processors(processors: Any, vocab_size: int) -> None:
    """Raise ValueError if there are processors that would change the scores of tokens.

    Stock checkpoints carry a processor that suppresses the duration outputs. It changes no token and is accepted.

    Args:
        processors: logits processors of transformers.
        vocab_size: number of tokens; the outputs after them are durations.

    Raises:
        ValueError: any other processor.
    """
    for processor in processors:
        if isinstance(processor, SuppressTokensLogitsProcessor) and min(processor.suppress_tokens) >= vocab_size:
            continue
        raise ValueError(
            f"greedy transducer decoding does not change scores and cannot apply {type(processor).__name__}: "
            "leave out the `generate` argument or generation config entry that asks for it"
        )
