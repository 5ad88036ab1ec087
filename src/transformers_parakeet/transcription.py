"""Transcribes many files with one model, and returns one result per file in the order of the files.

This file batches the windows of several files, and continues with the next file if a file fails. The pipeline computes
the features and decodes, and `subtitles.py` writes the results.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .configuration_parakeet import get_head_type
from .nemo import demo_model_path, load_nemo
from .pipeline_parakeet import ParakeetASRPipeline
from .results import TranscriptionResult, to_timed_texts

logger = logging.get_logger(__name__)

DEFAULT_MODEL = "nvidia/parakeet-tdt-0.6b-v3"
# name of the bundled model of spoken digits
DEMO_MODEL = "demo"
# encoder frames before and after a frame in local attention; NVIDIA recommends this context for long recordings
LOCAL_CONTEXT_SIZE = 128
# largest number of windows in a batch whose size is chosen by memory
MAX_BATCH_SIZE = 16
# largest length in seconds of a batch whose size is chosen by memory: the longest window times the number of windows
MAX_BATCH_S = 240.0
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TranscriptionOptions:
    """How files are transcribed.

    Args:
        decoder: `"ctc"` for the CTC head of a hybrid, `"transducer"` for its transducer; `None` for the default decoder
            of the model.
        chunk_length_s: length in seconds of the windows of a longer recording; 0 for the whole recording at once;
            `None` for the default of the pipeline.
        batch_size: number of windows that the model processes together; `None` for as many as fit `MAX_BATCH_S` seconds
            with padding, at most `MAX_BATCH_SIZE`.
        confidence: whether to compute the confidence of tokens, words, segments and texts.

    Raises:
        ValueError: an option is out of range.
    """

    decoder: str | None = None
    chunk_length_s: float | None = None
    batch_size: int | None = None
    confidence: bool = True

    def __post_init__(self) -> None:
        """Check the options that do not depend on the model."""
        if self.decoder not in (None, "ctc", "transducer"):
            raise ValueError(f"`decoder` must be 'transducer' or 'ctc', got {self.decoder!r}: correct it")
        if self.chunk_length_s is not None and self.chunk_length_s < 0:
            raise ValueError(
                f"`chunk_length_s` must not be negative, got {self.chunk_length_s}: use 0 for whole recordings"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}: raise it")


@dataclass(frozen=True)
class FailedFile:
    """A file that could not be transcribed.

    Args:
        file: path or URL of the file; `None` for samples or bytes in memory.
        error: the exception.
    """

    file: str | None
    error: Exception


@dataclass
class _Recording:
    """A file while its windows are read and decoded.

    Args:
        file: path or URL of the file; `None` for samples or bytes in memory.
        outputs: results of the pipeline's `_forward`, one dict per decoded window.
        is_decoded: whether the last window of the file is decoded.
        error: exception that reading or decoding raised; the other windows of the file are then ignored.
    """

    file: str | None
    outputs: list[dict[str, Any]] = field(default_factory=list)
    is_decoded: bool = False
    error: Exception | None = None


# a recording, and the model input of one of its windows, as the pipeline's `preprocess` returns it
_WindowInput = tuple[_Recording, dict[str, Any]]


def transcribe(
    files: Any,
    model: str | Path | ParakeetASRPipeline = DEFAULT_MODEL,
    *,
    decoder: str | None = None,
    chunk_length_s: float | None = None,
    batch_size: int | None = None,
    confidence: bool = True,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    attention: str | None = None,
) -> Iterator[TranscriptionResult]:
    """Transcribe files with text, words, segments and tokens with times.

    The model is loaded at once. The files are read while the results are requested.

    Args:
        files: paths, URLs, bytes, binary file objects or arrays of samples; see `load_audio`. A single path or URL is
            one file.
        model: Hub id, folder, `.nemo` file, `"demo"` for the bundled model of spoken digits, or a loaded pipeline.
        decoder: see `TranscriptionOptions`, as for the next three arguments.
        chunk_length_s: length of windows in seconds.
        batch_size: number of windows in a batch.
        confidence: whether to compute confidences.
        device: see `load_pipeline`, as for the next two arguments; must be `None` for a loaded pipeline.
        dtype: dtype of the model.
        attention: `"local"` or `"full"`.

    Returns:
        A generator of one result per file, in the order of the files. If a file fails, it raises the error of the file;
        `transcribe_files` continues with the next file instead.

    Raises:
        ValueError: an option is invalid, or the model does not have the decoder.
        OSError: the model cannot be loaded.
    """
    options = TranscriptionOptions(decoder, chunk_length_s, batch_size, confidence)
    if isinstance(model, ParakeetASRPipeline):
        if (device, dtype, attention) != (None, None, None):
            raise ValueError(
                "`device`, `dtype` and `attention` must be None for a loaded pipeline, got "
                f"{device!r}, {dtype!r} and {attention!r}: pass them to `load_pipeline`"
            )
        pipeline = model
    else:
        pipeline = load_pipeline(model, device=device, dtype=dtype, attention=attention)
    check_decoder(pipeline.model.config, decoder)
    sources = [files] if isinstance(files, (str, os.PathLike)) else files
    return _raise_errors(transcribe_files(pipeline, sources, options))


def _raise_errors(entries: Iterable[TranscriptionResult | FailedFile]) -> Iterator[TranscriptionResult]:
    """Yield the results of `transcribe_files`, and raise the error of the first file that failed."""
    for entry in entries:
        if isinstance(entry, FailedFile):
            raise entry.error
        yield entry


def load_pipeline(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    attention: str | None = None,
) -> ParakeetASRPipeline:
    """Load a model and create a speech recognition pipeline.

    Args:
        model: Hub id, folder or `.nemo` file; `"demo"` for the bundled model of spoken digits.
        device: device of the model, such as `"cpu"` or `"cuda:1"`; `None` for a CUDA GPU if there is one, else the CPU.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; `None` for bfloat16 if the device computes it natively, else
            float32.
        attention: `"full"` for attention without a limit, `"local"` for attention to 128 encoder frames on each side
            unless the model has a limited context already; `None` for the context of the model.

    Returns:
        The pipeline.

    Raises:
        ValueError: `dtype` or `attention` is unknown, or the model does not support the context.
        OSError: the model cannot be found or downloaded.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}: correct it")
    dtype = dtype or ("bfloat16" if has_native_bfloat16(device) else "float32")
    source = demo_model_path() if model == DEMO_MODEL else model
    loaded_model, processor = load_nemo(source, dtype=getattr(torch, dtype))
    if attention is not None:
        set_attention(loaded_model, attention)
    pipeline = ParakeetASRPipeline(
        loaded_model, processor=processor, task="automatic-speech-recognition", device=device
    )
    # a `.nemo` file does not set the name; the results contain it
    pipeline.model.name_or_path = str(model)
    return pipeline


def has_native_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes bfloat16 natively: a CUDA GPU, or a CPU with AMX or AVX512-BF16 instructions.

    Args:
        device: the device.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public functions for single instruction sets
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(check is not None and check() for check in checks)


def set_attention(model: Any, attention: str) -> None:
    """Set the attention context of a model to `"full"` or `"local"`.

    Args:
        model: model of this package; changed in place.
        attention: see `load_pipeline`.

    Raises:
        ValueError: `attention` is unknown, or the model does not support the context.
    """
    config = model.config.encoder_config
    if attention not in ("full", "local"):
        raise ValueError(f"`attention` must be 'local' or 'full', got {attention!r}: correct it")
    if attention == "full":
        model.set_attention_context(-1, -1)
    elif config.attention_context_style == "chunked_limited_with_rc":
        raise ValueError(
            "`attention='local'` requires a model without attention in chunks, got a model with "
            f"`attention_context_style` {config.attention_context_style!r}: leave out `attention`"
        )
    elif min(config.attention_context_size) < 0:
        model.set_attention_context(LOCAL_CONTEXT_SIZE, LOCAL_CONTEXT_SIZE)


def check_decoder(config: Any, decoder: str | None) -> None:
    """Check that a model has a decoder.

    Args:
        config: configuration of the model.
        decoder: `"transducer"` or `"ctc"`; `None` for the default decoder, which every model has.

    Raises:
        ValueError: the model does not have this decoder.
    """
    is_ctc_model = get_head_type(config) == "ctc"
    decoders = [] if is_ctc_model else ["transducer"]
    if is_ctc_model or config.ctc_head:
        decoders.append("ctc")
    if decoder is not None and decoder not in decoders:
        raise ValueError(
            f"`decoder` must be {' or '.join(decoders)} for this model, got {decoder!r}: choose another decoder"
        )


def transcribe_files(
    pipeline: ParakeetASRPipeline,
    files: Iterable[Any],
    options: TranscriptionOptions | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Iterator[TranscriptionResult | FailedFile]:
    """Transcribe files, and continue with the next file if a file fails.

    Args:
        pipeline: pipeline with a model of this package.
        files: paths, URLs, bytes, binary file objects or arrays of samples; see `load_audio`. They are read when their
            results are requested, at most one batch of windows ahead.
        options: decoder, windows and batches.
        on_progress: called after each batch with the number of seconds of audio in it, without the contexts of windows.

    Yields:
        One entry per file, in the order of the files: its result, or its error.

    Raises:
        ValueError: the model does not have the decoder of the options.
    """
    options = options or TranscriptionOptions()
    config = pipeline.model.config
    check_decoder(config, options.decoder)
    call_options: dict[str, Any] = {"chunk_length_s": options.chunk_length_s}
    call_options["return_confidence"] = options.confidence
    # a CTC model has one decoder, and its `generate` has no argument for it
    if options.decoder is not None and get_head_type(config) != "ctc":
        call_options["generate_kwargs"] = {"decoder": options.decoder}
    arguments = pipeline._sanitize_parameters(**call_options)
    preprocess_arguments, generate_arguments, postprocess_arguments = arguments
    recordings: deque[_Recording] = deque()
    windows = _read_windows(pipeline, files, recordings, preprocess_arguments)
    sampling_rate = pipeline.processor.feature_extractor.sampling_rate
    for batch in _batch_windows(windows, options.batch_size, sampling_rate):
        _decode_batch(pipeline, batch, generate_arguments)
        if on_progress is not None:
            on_progress(sum(count_new_samples(window_input["window"]) for _, window_input in batch) / sampling_rate)
        while recordings and (recordings[0].is_decoded or recordings[0].error is not None):
            yield _build_entry(pipeline, recordings.popleft(), options, postprocess_arguments)
    # files at the end that could not be read
    for recording in recordings:
        yield _build_entry(pipeline, recording, options, postprocess_arguments)


def _read_windows(
    pipeline: ParakeetASRPipeline,
    files: Iterable[Any],
    recordings: deque[_Recording],
    preprocess_arguments: dict[str, Any],
) -> Iterator[_WindowInput]:
    """Yield the model inputs of all windows of all files, and append every file to `recordings` when its turn comes.

    If a file cannot be read, its `error` is set, and the next file is read.
    """
    for file in files:
        is_named = isinstance(file, (str, os.PathLike))
        recording = _Recording(os.fspath(file) if is_named else None)
        recordings.append(recording)
        try:
            for window_input in pipeline.preprocess(file, **preprocess_arguments):
                yield recording, window_input
        # no error in one file may prevent the transcription of the other files
        except Exception as error:
            logger.debug("%s could not be read", recording.file, exc_info=True)
            recording.error = error


def _batch_windows(
    windows: Iterable[_WindowInput], batch_size: int | None, sampling_rate: int
) -> Iterator[list[_WindowInput]]:
    """Group windows into batches, in their order.

    Args:
        windows: the windows of all files.
        batch_size: number of windows in a batch; `None` for batches of limited length, see `TranscriptionOptions`.
        sampling_rate: samples per second.

    Yields:
        Lists of one or more windows.
    """
    batch: list[_WindowInput] = []
    longest = 0
    for recording, window_input in windows:
        num_samples = window_input["window"].stop - window_input["window"].start
        is_too_long = (len(batch) + 1) * max(longest, num_samples) > MAX_BATCH_S * sampling_rate
        if batch and batch_size is None and is_too_long:
            yield batch
            batch, longest = [], 0
        batch.append((recording, window_input))
        longest = max(longest, num_samples)
        if len(batch) == (batch_size or MAX_BATCH_SIZE):
            yield batch
            batch, longest = [], 0
    if batch:
        yield batch


def count_new_samples(window: Any) -> int:
    """Count the samples of a window that are not context.

    Args:
        window: a `Window`.
    """
    return int((window.stop if window.keep_to is None else window.keep_to) - window.keep_from)


def _decode_batch(pipeline: ParakeetASRPipeline, batch: list[_WindowInput], generate_arguments: dict[str, Any]) -> None:
    """Decode a batch, and append the outputs to the recordings; if it fails, decode its windows one by one.

    A window that also fails alone sets the `error` of its recording.
    """
    batch = [(recording, window_input) for recording, window_input in batch if recording.error is None]
    if not batch:
        return
    features = [window_input["input_features"][0] for _, window_input in batch]
    masks = [window_input["attention_mask"][0] for _, window_input in batch]
    model_inputs = {
        "input_features": pad_sequence(features, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
    }
    try:
        hypotheses = pipeline.forward(model_inputs, **generate_arguments)["hypotheses"]
    except Exception as error:
        logger.debug("a batch of %d windows failed", len(batch), exc_info=True)
        if len(batch) == 1:
            batch[0][0].error = error
            return
        for entry in batch:
            _decode_batch(pipeline, [entry], generate_arguments)
        return
    for row, (recording, window_input) in enumerate(batch):
        output = {name: value for name, value in window_input.items() if name not in model_inputs}
        recording.is_decoded = bool(output.pop("is_last"))
        recording.outputs.append({**output, "hypotheses": hypotheses[row]})


def _build_entry(
    pipeline: ParakeetASRPipeline,
    recording: _Recording,
    options: TranscriptionOptions,
    postprocess_arguments: dict[str, Any],
) -> TranscriptionResult | FailedFile:
    """Build the result of a decoded recording, or the entry of a recording that failed."""
    if recording.error is not None:
        return FailedFile(recording.file, recording.error)

    def get_texts(level: str) -> Any:
        """Return the tokens, words or segments of the recording with their times."""
        arguments = {**postprocess_arguments, "return_timestamps": level}
        return to_timed_texts(pipeline.postprocess(recording.outputs, **arguments)["chunks"])

    whole = pipeline.postprocess(recording.outputs, **postprocess_arguments)
    model = pipeline.model
    return TranscriptionResult(
        text=whole["text"],
        duration=recording.outputs[-1]["window"].stop / pipeline.processor.feature_extractor.sampling_rate,
        words=get_texts("word"),
        segments=get_texts("segment"),
        tokens=get_texts("char"),
        confidence=whole.get("confidence"),
        file=recording.file,
        model=model.name_or_path or None,
        settings={
            "decoder": options.decoder or get_head_type(model.config),
            "chunk_length_s": options.chunk_length_s,
            "attention_context_size": list(model.config.encoder_config.attention_context_size),
            "device": str(pipeline.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        version=get_version(),
    )


@cache
def get_version() -> str | None:
    """Return the version of the installed package; `None` if it is used without an installation."""
    try:
        return metadata.version("transformers-parakeet")
    except metadata.PackageNotFoundError:
        return None


__all__ = [
    "DEFAULT_MODEL",
    "DEMO_MODEL",
    "FailedFile",
    "TranscriptionOptions",
    "check_decoder",
    "load_pipeline",
    "transcribe",
    "transcribe_files",
]
