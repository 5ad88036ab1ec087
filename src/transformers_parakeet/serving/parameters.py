"""Reads and checks the parameters of a transcription request."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import ApiError
from .formats import GRANULARITIES, MEDIA_TYPES

# parameters of OpenAI's API that have no meaning for these models; they are accepted and ignored
IGNORED = ("temperature", "chunking_strategy")
KNOWN = ("file", "model", "language", "prompt", "response_format", "stream", "timestamp_granularities[]", *IGNORED)
# formats that a stream of events can have; verbose JSON, whose events have words, is an addition to OpenAI's API
STREAMED_FORMATS = ("json", "text", "verbose_json")
# maximum number of phrases in a prompt
MAX_PHRASES = 1000


@dataclass(frozen=True)
class TranscriptionRequest:
    """The parameters of a transcription request.

    Args:
        file: the audio file, an object with an asynchronous method `read`; it must be read while the form is open.
        file_name: name of the file.
        response_format: one of `MEDIA_TYPES`.
        granularities: what verbose JSON contains: `"segment"`, `"word"`.
        language: language that the client states; `None` for none.
        phrases: phrases to recognise more often.
        is_streamed: whether the response is a stream of events.
    """

    file: Any
    file_name: str
    response_format: str = "json"
    granularities: tuple[str, ...] = ()
    language: str | None = None
    phrases: tuple[str, ...] = ()
    is_streamed: bool = False


def read_parameters(form: Any, model_name: str, file_class: type) -> TranscriptionRequest:
    """Read the parameters from a form and check them.

    Args:
        form: the form of the request.
        model_name: name of the model that the server has.
        file_class: class of an uploaded file in the form.

    Raises:
        ApiError: a parameter is missing or wrong.
    """
    for name in form:
        if name not in KNOWN:
            message = f"a parameter must be one of {', '.join(KNOWN)}, got {name!r}: leave it out"
            raise ApiError(400, message, "unknown_parameter", name)
    file = form.get("file")
    if not isinstance(file, file_class):
        message = "the request must have an audio file in the parameter `file` of a multipart form: add it"
        raise ApiError(400, message, "missing_file", "file")
    model = form.get("model")
    if model != model_name:
        message = f"`model` must be {model_name!r}, the model of this server, got {model!r}: correct it"
        raise ApiError(404, message, "model_not_found", "model")
    response_format = _get_choice(form, "response_format", tuple(MEDIA_TYPES), "json")
    granularities = tuple(form.getlist("timestamp_granularities[]"))
    for granularity in granularities:
        if granularity not in GRANULARITIES or response_format != "verbose_json":
            message = (
                f"`timestamp_granularities[]` must be one of {', '.join(GRANULARITIES)}, with `response_format` "
                f"verbose_json, got {granularity!r} with {response_format!r}: correct it"
            )
            raise ApiError(400, message, "invalid_value", "timestamp_granularities[]")
    is_streamed = _get_choice(form, "stream", ("true", "false"), "false") == "true"
    if is_streamed and response_format not in STREAMED_FORMATS:
        message = (
            f"`response_format` must be one of {', '.join(STREAMED_FORMATS)} with `stream`, got {response_format!r}: "
            "correct it"
        )
        raise ApiError(400, message, "invalid_value", "response_format")
    return TranscriptionRequest(
        file=file,
        file_name=clean_file_name(file.filename),  # type: ignore[attr-defined]
        response_format=response_format,
        granularities=granularities,
        language=form.get("language") or None,
        phrases=split_prompt(form.get("prompt") or ""),
        is_streamed=is_streamed,
    )


def _get_choice(form: Any, name: str, choices: tuple[str, ...], default: str) -> str:
    """Return a parameter that has a few possible values.

    Args:
        form: the form of the request.
        name: name of the parameter.
        choices: the possible values.
        default: the value if the parameter is missing.

    Raises:
        ApiError: the parameter has another value.
    """
    value = str(form.get(name) or default).lower()
    if value not in choices:
        message = f"`{name}` must be one of {', '.join(choices)}, got {value!r}: correct it"
        raise ApiError(400, message, "invalid_value", name)
    return value


def clean_file_name(name: Any) -> str:
    """Return the last part of a file name without control characters; it is used only in messages.

    Args:
        name: file name that the client sent; it can have folders.
    """
    last_part = re.split(r"[\\/]", str(name or ""))[-1]
    return "".join(character for character in last_part if character.isprintable())[:100] or "the file"


def split_prompt(prompt: str) -> tuple[str, ...]:
    """Split a prompt into phrases to recognise more often.

    A prompt with commas, semicolons or line breaks is a list of phrases. Another prompt is a list of words.

    Args:
        prompt: the prompt.

    Raises:
        ApiError: the prompt has more than `MAX_PHRASES` phrases.
    """
    parts = re.split(r"[,;\n]" if re.search(r"[,;\n]", prompt) else r"\s", prompt)
    phrases = tuple(dict.fromkeys(phrase for part in parts if (phrase := part.strip(' \t\r.:!?"()'))))
    if len(phrases) > MAX_PHRASES:
        message = f"`prompt` must have at most {MAX_PHRASES} phrases, got {len(phrases)}: shorten it"
        raise ApiError(400, message, "prompt_too_long", "prompt")
    return phrases


__all__ = ["TranscriptionRequest", "clean_file_name", "read_parameters", "split_prompt"]
