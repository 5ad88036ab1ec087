"""`parakeet info`: what a checkpoint contains, needs and can do; `transformers_parakeet.model_info` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .messages import print_error_and_exit, print_next_command, print_rows, print_text


def info(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .nemo file; demo: the bundled digits.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
) -> None:
    """Describe a model: head, sizes, vocabulary, attention, memory, and what works with it.

    The configuration is read without the weights.
    """
    with print_error_and_exit():
        from transformers_parakeet.model_info import read_model_info
        from transformers_parakeet.nemo import resolve_model_name

        model_info = read_model_info(resolve_model_name(model), revision=revision)
    if as_json:
        print_text(json.dumps(asdict(model_info), ensure_ascii=False, indent=2))
        return
    print_rows([*list_sizes(model_info), *list_memory(model_info), *list_abilities(model_info)])
    print_next_command("parakeet", "transcribe", "--model", model, "FILE")


def list_sizes(model_info: Any) -> list[tuple[str, str]]:
    """List the names and values of the head, the sizes and the attention of a model.

    Args:
        model_info: a `ModelInfo`.
    """
    rows = [
        ("model", model_info.source),
        ("head", f"{model_info.head}; --decoder {' or '.join(model_info.decoders)}"),
        ("parameters", f"{model_info.num_parameters / 1e6:.1f} million, {model_info.dtype}"),
        (
            "encoder",
            f"FastConformer, {format_count(model_info.num_layers, 'layer')} of width {model_info.hidden_size}, "
            f"{model_info.num_heads} attention heads, {model_info.num_mel_bins} mel bins, "
            f"frames of {model_info.frame_duration_s * 1000:g} ms",
        ),
    ]
    if model_info.prediction_hidden_size is not None:
        layers = format_count(model_info.num_prediction_layers, "LSTM layer")
        size = f"{layers} of width {model_info.prediction_hidden_size}"
        rows.append(("prediction network", size))
    rows.append(("vocabulary", f"{model_info.vocab_size} tokens with the blank"))
    if model_info.durations is not None:
        rows.append(("durations", f"{', '.join(map(str, model_info.durations))} frames"))
    rows.append(("attention", describe_context(model_info, model_info.attention_context)))
    other_contexts = [context for context in model_info.trained_contexts if context != model_info.attention_context]
    rows += [("", f"also trained: {describe_context(model_info, context)}") for context in other_contexts]
    return rows


def describe_context(model_info: Any, context: tuple[int, ...]) -> str:
    """Describe which frames a frame attends to.

    Args:
        model_info: a `ModelInfo`.
        context: attention context in frames, in the form of `attention_context_size`.
    """
    if max(context) < 0:
        return "full: each frame attends to the whole clip"
    left, right = context[0], context[-1]
    before, after = (format_count(count, "frame") if count >= 0 else "all frames" for count in (left, right))
    if model_info.attention_style == "regular":
        name = "local" if model_info.is_local_attention else "limited"
        return f"{name}: each frame attends to {before} before and {after} after it"
    if model_info.attention_style == "chunked_limited":
        if right < 0:
            return f"limited: each frame attends to {before} before and all frames after it"
        seconds = (right + 1) * model_info.frame_duration_s
        chunk = f"{format_count(right + 1, 'frame')} ({seconds:.2f} s)"
        return f"chunks of {chunk}: each frame attends to its chunk and {before} before it"
    chunk = f"{format_count(context[1], 'frame')} ({context[1] * model_info.frame_duration_s:.2f} s)"
    return f"chunks of {chunk}: each frame attends to its chunk, {before} before and {after} after it"


def format_count(number: int, noun: str) -> str:
    """Format a number with a noun in the singular or plural.

    Args:
        number: the number.
        noun: the noun in the singular.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_memory(model_info: Any) -> list[tuple[str, str]]:
    """List the memory that a model needs.

    Args:
        model_info: a `ModelInfo`.
    """
    weights = ", ".join(f"{format_bytes(size)} in {dtype}" for dtype, size in model_info.weight_bytes.items())
    minute, hour = model_info.peak_bytes.values()
    return [
        ("memory", f"weights: {weights}"),
        ("", f"recognition of 1 minute: about {format_bytes(minute)} more"),
        (
            "",
            f"recognition of 1 hour: about {format_bytes(hour)} more as a whole, "
            f"{format_bytes(model_info.window_peak_bytes)} in windows",
        ),
    ]


def format_bytes(size: int) -> str:
    """Format a number of bytes in MB or GB, which are powers of 1000.

    Args:
        size: number of bytes.
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def list_abilities(model_info: Any) -> list[tuple[str, str]]:
    """List what works with a model.

    Args:
        model_info: a `ModelInfo`.
    """
    export_error = model_info.nemo_export_error
    # the tokenizer is not read here
    export = f"no: {export_error}" if export_error else "yes, if SentencePiece can express the tokenizer"
    return [
        ("times", f"yes: of characters, words and segments, resolution {model_info.frame_duration_s * 1000:g} ms"),
        ("confidence", "yes: of characters, words and segments"),
        ("streaming", describe_streaming(model_info)),
        ("CTC head", "yes" if "ctc" in model_info.decoders else "no"),
        ("NeMo export", export),
    ]


def describe_streaming(model_info: Any) -> str:
    """Describe how `ParakeetStream` streams a model.

    Args:
        model_info: a `ModelInfo`.
    """
    if model_info.is_cache_aware:
        return "yes, cache-aware: each frame is encoded once, if the features are not normalised"
    buffered = "yes, with left and right context around each chunk"
    # style of models that are trained for whole clips and for chunks with right context
    if model_info.attention_style == "chunked_limited_with_rc":
        return f"{buffered}, for which the model was trained"
    return f"{buffered}, for which the model was not trained"


__all__ = ["info"]
