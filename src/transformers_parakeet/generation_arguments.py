"""Checks the arguments of `generate`: which ones the searches support, ignore or refuse, and their defaults.

`generation_parakeet.py` decodes with the checked arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.generation import GenerationConfig, SuppressTokensLogitsProcessor
from transformers.utils import logging

from .configuration_parakeet import get_head_type
from .decoding import (
    DEFAULT_BOOSTING_WEIGHT,
    DEFAULT_LM_WEIGHT,
    BeamOptions,
    Hypotheses,
    TokenScorer,
    check_confidence_method,
    penalise_length,
)

logger = logging.get_logger(__name__)

# arguments that `generate` of a CTC head passes to `forward`
FORWARD_ARGUMENTS = {"output_attentions", "output_hidden_states", "output_attention_mask", "return_dict"}

# arguments of transformers' `generate` that do not change the result of a CTC head, with any value
SILENTLY_ACCEPTED_ARGUMENTS = {
    "synced_gpus", "use_cache", "cache_implementation", "cache_config", "transformers_version", "_from_model_config",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "output_logits", "tokenizer",
}  # fmt: skip
# argument name to the value that means no sampling and no change of scores
GREEDY_VALUES = {
    "num_beam_groups": 1, "repetition_penalty": 1.0, "decoder": "ctc",
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
# arguments for sampling and length limits: a CTC head returns one token per frame in a single step
ARGUMENTS_IGNORED_WITH_WARNING = {
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings", "stopping_criteria",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "early_stopping",
}  # fmt: skip
# arguments of transformers' `generate` that choose the search
STOCK_SEARCH_ARGUMENTS = ("num_beams", "num_return_sequences", "length_penalty")


@dataclass(frozen=True)
class SearchOptions:
    """The arguments of `generate` that choose and change the search, with the same meaning for every head.

    Args:
        num_beams: number of hypotheses that a beam search keeps; 1 for greedy decoding.
        num_return_sequences: number of hypotheses to return for each clip, best first; at most `num_beams`.
        length_penalty: the beam search of a transducer orders hypotheses by
            score / (number of labels + 1)^length_penalty; that of a CTC head orders them by their scores.
        label_bonus: score that the beam search of a CTC head adds for each label, because a language model favours
            short texts; a transducer does not support it.
        language_model: scorer of the next token, from `ParakeetProcessor.load_language_model`; `None` for no language
            model.
        lm_weight: weight of the scores of the language model.
        boosting: phrases whose tokens get higher scores, from `ParakeetProcessor.boosting_tree`: one tree for all
            clips, or a list with one tree or `None` for each clip; `None` for no boosting.
        boosting_weight: weight of the scores of the phrases.
        allowed_tokens: (V,) bool, False for labels that must not be emitted; `None` to allow all labels. The blank is
            always allowed.

    Raises:
        ValueError: a number is out of range.
    """

    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    label_bonus: float = 0.0
    language_model: TokenScorer | None = None
    lm_weight: float = DEFAULT_LM_WEIGHT
    boosting: TokenScorer | Sequence[TokenScorer | None] | None = None
    boosting_weight: float = DEFAULT_BOOSTING_WEIGHT
    allowed_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the numbers of hypotheses."""
        self.build_beam_options()

    def build_beam_options(self) -> BeamOptions:
        """Build the settings of a beam search."""
        return BeamOptions(self.num_beams, self.num_return_sequences, self.length_penalty, self.label_bonus)


SEARCH_ARGUMENTS = tuple(field.name for field in fields(SearchOptions))


def take_search_options(
    arguments: dict[str, Any], *generation_configs: GenerationConfig | None
) -> tuple[SearchOptions, dict[str, Any]]:
    """Separate the arguments that choose and change the search from the other arguments of `generate`.

    Args:
        arguments: arguments of the call; they override `generation_configs`. `None` means the default.
        *generation_configs: settings for arguments that the call does not have; `None` for no settings. An earlier
            config overrides a later one.

    Returns:
        The options of the search, and the other arguments.

    Raises:
        ValueError: a number is out of range.
    """
    values: dict[str, Any] = {}
    for config in reversed(generation_configs):
        settings = {name: getattr(config, name, None) for name in STOCK_SEARCH_ARGUMENTS}
        values.update((name, value) for name, value in settings.items() if value is not None)
    values.update((name, arguments[name]) for name in SEARCH_ARGUMENTS if name in arguments)
    options = SearchOptions(**{name: value for name, value in values.items() if value is not None})
    return options, {name: value for name, value in arguments.items() if name not in SEARCH_ARGUMENTS}


@dataclass(frozen=True)
class CTCArguments:
    """The arguments of `generate` that have an effect on a CTC head.

    Args:
        forward_kwargs: arguments of `forward`.
        search: options of the search.
        streamer: receives the tokens of all frames; `None` for no streamer.
        return_dict: whether to return a `ParakeetCTCGenerateOutput` instead of a tensor.
        output_scores: whether to set the field `scores` of the output.
    """

    forward_kwargs: dict[str, Any]
    search: SearchOptions = SearchOptions()
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


def parse_ctc_arguments(
    kwargs: dict[str, Any],
    generation_config: GenerationConfig | None,
    model_generation_config: GenerationConfig | None = None,
) -> CTCArguments:
    """Check the arguments of `generate` for a CTC head and select those that have an effect.

    Logs a warning about arguments that are ignored.

    Args:
        kwargs: arguments of the call; they override `generation_config`.
        generation_config: settings that differ from transformers' defaults are treated as arguments; `None` for no
            settings.
        model_generation_config: the generation config of the model. Only its search is used, because the other
            settings of a hybrid are for its transducer.

    Returns:
        The arguments that have an effect.

    Raises:
        ValueError: an argument is unknown, out of range, or requires sampling.
    """
    settings = {} if generation_config is None else generation_config.to_diff_dict()
    search, arguments = take_search_options({**settings, **drop_training_inputs(kwargs)}, model_generation_config)
    forward_kwargs = {name: arguments[name] for name in FORWARD_ARGUMENTS if arguments.get(name) is not None}
    supported = FORWARD_ARGUMENTS | SILENTLY_ACCEPTED_ARGUMENTS
    supported |= {"streamer", "output_scores", "return_dict_in_generate"}
    unsupported = {
        name for name, value in arguments.items() if name not in supported and not has_no_effect(name, value)
    }
    ignored = sorted(unsupported & ARGUMENTS_IGNORED_WITH_WARNING)
    if ignored:
        logger.warning_once(
            f"{', '.join(ignored)}: no effect on a CTC model, which returns one token per frame in a single step."
        )
    refused = sorted(unsupported - ARGUMENTS_IGNORED_WITH_WARNING)
    if refused:
        raise ValueError(
            f"CTC decoding is greedy or a beam search and does not support {', '.join(refused)}: "
            "leave out these arguments"
        )
    return CTCArguments(
        forward_kwargs={**forward_kwargs, "return_dict": True},
        search=search,
        streamer=arguments.get("streamer"),
        return_dict=bool(arguments.get("return_dict_in_generate")),
        output_scores=bool(arguments.get("output_scores")),
    )


def has_no_effect(name: str, value: Any) -> bool:
    """Return whether an argument of `generate` is unset or has the value that changes no score.

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


def check_label_bonus(label_bonus: float) -> None:
    """Check that `label_bonus` is not set for a transducer.

    Args:
        label_bonus: the argument of `generate`.

    Raises:
        ValueError: it is not 0.
    """
    if label_bonus:
        raise ValueError(
            f"`label_bonus` requires a CTC head, got {label_bonus} for a transducer: leave it out, or set "
            "`length_penalty`"
        )


def check_beam_search(streamer: Any, criteria: Sequence[Any] = (), keeps_logits: bool = False) -> None:
    """Check that a beam search has no argument that requires greedy decoding, because its best hypothesis can change.

    Args:
        streamer: the streamer of the call; `None` for no streamer.
        criteria: stopping criteria of the call.
        keeps_logits: whether the scores of every step are requested.

    Raises:
        ValueError: there is such an argument.
    """
    if streamer is not None or criteria or keeps_logits:
        raise ValueError(
            "`streamer`, `stopping_criteria`, `output_logits` and `output_scores` require greedy decoding, got "
            "`num_beams` > 1: set `num_beams=1`, or leave them out"
        )


def compute_sequence_scores(hypotheses: Hypotheses | None, length_penalty: float) -> Tensor | None:
    """Compute the scores by which a beam search orders hypotheses.

    Args:
        hypotheses: R hypotheses with `scores`; `None` for greedy decoding.
        length_penalty: exponent of the number of labels + 1.

    Returns:
        (R,) scores; `None` for greedy decoding.
    """
    if hypotheses is None or hypotheses.scores is None:
        return None
    return penalise_length(hypotheses.scores, hypotheses.lengths, length_penalty)


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
            f"transducer decoding cannot apply {type(processor).__name__}, because it does not change scores: "
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
