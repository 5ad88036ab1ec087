"""Checks the arguments of `generate`, which greedy decoding supports, ignores or refuses, and sets their defaults.

`generation_parakeet.py` decodes with the checked arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.generation import GenerationConfig, SuppressTokensLogitsProcessor
from transformers.utils import logging

from .configuration_parakeet import get_head_type
from .decoding import check_confidence_method

logger = logging.get_logger(__name__)

# arguments that `generate` of a CTC head passes to `forward`
FORWARD_ARGUMENTS = {"output_attentions", "output_hidden_states", "output_attention_mask", "return_dict"}

# arguments of transformers' `generate` that do not change the result of a CTC head, with any value
SILENTLY_ACCEPTED_ARGUMENTS = {
    "synced_gpus", "use_cache", "cache_implementation", "cache_config", "transformers_version", "_from_model_config",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "output_logits", "tokenizer",
}  # fmt: skip
# argument name to the value that means greedy decoding
GREEDY_VALUES = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "decoder": "ctc",
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
# arguments for sampling, beam search and length limits: a CTC head returns one token per frame in a single step
ARGUMENTS_IGNORED_WITH_WARNING = {
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings", "stopping_criteria",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty",
    "early_stopping",
}  # fmt: skip


@dataclass(frozen=True)
class CTCArguments:
    """The arguments of `generate` that have an effect on a CTC head.

    Args:
        forward_kwargs: arguments of `forward`.
        streamer: receives the tokens of all frames; `None` for no streamer.
        return_dict: whether to return a `ParakeetCTCGenerateOutput` instead of a tensor.
        output_scores: whether to set the field `scores` of the output.
    """

    forward_kwargs: dict[str, Any]
    streamer: Any = None
    return_dict: bool = False
    output_scores: bool = False


def drop_training_inputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove `labels` and `decoder_input_ids`, which the processor returns for training and decoding does not use.

    Args:
        kwargs: arguments of `generate`.

    Returns:
        The remaining arguments.
    """
    return {name: value for name, value in kwargs.items() if name not in ("labels", "decoder_input_ids")}


def parse_ctc_arguments(kwargs: dict[str, Any], generation_config: GenerationConfig | None) -> CTCArguments:
    """Check the arguments of `generate` for a CTC head and select those that have an effect.

    Logs a warning about arguments that are ignored.

    Args:
        kwargs: arguments of the call; they override `generation_config`.
        generation_config: settings that differ from transformers' defaults are treated as arguments; `None` for no
            settings.

    Returns:
        The arguments that have an effect.

    Raises:
        ValueError: an argument is unknown or requires a search other than greedy decoding.
    """
    settings = {} if generation_config is None else generation_config.to_diff_dict()
    arguments = {**settings, **drop_training_inputs(kwargs)}
    forward_kwargs = {name: arguments[name] for name in FORWARD_ARGUMENTS if arguments.get(name) is not None}
    supported = {
        *FORWARD_ARGUMENTS,
        *SILENTLY_ACCEPTED_ARGUMENTS,
        "streamer",
        "output_scores",
        "return_dict_in_generate",
    }
    unsupported = {
        name for name, value in arguments.items() if name not in supported and not allows_greedy_decoding(name, value)
    }
    ignored = sorted(unsupported & ARGUMENTS_IGNORED_WITH_WARNING)
    if ignored:
        logger.warning_once(
            f"{', '.join(ignored)}: no effect on a CTC model, which returns one token per frame in a single step."
        )
    refused = sorted(unsupported - ARGUMENTS_IGNORED_WITH_WARNING)
    if refused:
        raise ValueError(
            f"CTC decoding selects the best token of every frame and does not support {', '.join(refused)}: "
            "leave out these arguments"
        )
    return CTCArguments(
        forward_kwargs={**forward_kwargs, "return_dict": True},
        streamer=arguments.get("streamer"),
        return_dict=bool(arguments.get("return_dict_in_generate")),
        output_scores=bool(arguments.get("output_scores")),
    )


def allows_greedy_decoding(name: str, value: Any) -> bool:
    """Return whether an argument of `generate` is unset or has the value that means greedy decoding.

    Args:
        name: name of the argument.
        value: value of the argument; `None`, `False` and empty containers mean that it is unset.
    """
    is_unset = value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value)
    return is_unset or (name in GREEDY_VALUES and GREEDY_VALUES[name] == value)


def get_confidence_method(output_confidence: bool | str | None) -> str | None:
    """Get the confidence method from the argument `output_confidence` of `generate`.

    Args:
        output_confidence: `True` for the default method `"max_prob"`, the name of a method, or `False` or `None` for no
            confidence.

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


def check_logits_processors(logits_processors: Any, vocab_size: int) -> None:
    """Check that no logits processor would change the scores of tokens, because the search does not apply them.

    The generation config of stock TDT checkpoints contains a processor that suppresses the duration outputs. It changes
    no token score and is accepted.

    Args:
        logits_processors: the logits processors that transformers has created from the arguments of `generate`.
        vocab_size: number of tokens; outputs with an index of at least `vocab_size` are durations.

    Raises:
        ValueError: a processor would change the scores of tokens.
    """
    for processor in logits_processors:
        if isinstance(processor, SuppressTokensLogitsProcessor) and min(processor.suppress_tokens) >= vocab_size:
            continue
        raise ValueError(
            f"greedy transducer decoding cannot apply {type(processor).__name__}, because it does not change scores: "
            "leave out the `generate` argument or generation config entry that adds it"
        )


def set_stock_fields(generation_config: GenerationConfig, config: Any) -> None:
    """Set the fields of a generation config without which stock transformers cannot decode a saved transducer.

    This package does not need them. Stock transformers starts with `decoder_start_token_id`, and chooses a token among
    all outputs of the joint network, so the outputs for durations of a TDT model must be suppressed.

    Args:
        generation_config: generation config of the model; changed in place.
        config: configuration of a transducer.
    """
    generation_config.decoder_start_token_id = config.blank_token_id
    num_durations = len(getattr(config, "durations", ()))
    if num_durations:
        generation_config.suppress_tokens = list(range(config.vocab_size, config.vocab_size + num_durations))


def list_decoders(config: Any) -> list[str]:
    """List the decoders of a model, the default one first: `"transducer"`, `"ctc"`, or both for a hybrid.

    Args:
        config: configuration of a model with a head.
    """
    if get_head_type(config) == "ctc":
        return ["ctc"]
    return ["transducer", "ctc"] if config.ctc_head else ["transducer"]


def check_decoder(config: Any, decoder: str | None) -> None:
    """Check that a model has a decoder.

    Args:
        config: configuration of the model.
        decoder: `"transducer"` or `"ctc"`; `None` for the default decoder, which every model has.

    Raises:
        ValueError: the model does not have this decoder.
    """
    decoders = list_decoders(config)
    if decoder is not None and decoder not in decoders:
        raise ValueError(
            f"`decoder` must be {' or '.join(decoders)} for this model, got {decoder!r}: choose another decoder"
        )
