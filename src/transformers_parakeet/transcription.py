"""Transcribes many files with one model, and returns one result per file in the order of the files.

If a file fails, the other files are still transcribed. `window_batches.py` decodes the windows of several files in
batches, and `subtitles.py` writes the results.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .configuration_parakeet import get_head_type
from .decoding import DEFAULT_LM_WEIGHT, TokenScorer
from .generation_arguments import check_decoder, take_search_options
from .long_audio import InputOptions
from .nemo import DEMO_MODEL, load_nemo, resolve_model_name
from .pipeline_parakeet import ParakeetASRPipeline
from .quantization_parakeet import check_int8_device
from .results import TimedText, TranscriptionResult, get_version, to_timed_texts
from .timestamps import DEFAULT_AGGREGATION, EmittedTokens
from .window_batches import (
    RecordingState,
    batch_windows,
    count_new_samples,
    create_batch_check,
    decode_batch,
    read_windows,
)

DEFAULT_MODEL = "nvidia/parakeet-tdt-0.6b-v3"
# encoder frames before and after a frame in local attention; NVIDIA recommends this context for long recordings
LOCAL_CONTEXT_SIZE = 128
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TranscriptionOptions:
    """How files are transcribed.

    Args:
        decoder: `"ctc"` for the CTC head of a hybrid, `"transducer"` for its transducer; `None` for the default decoder
            of the model.
        chunk_length_s: length in seconds of the windows of a longer recording; 0 for the whole recording at once;
            `None` for the default of the pipeline: windows only if the whole recording does not fit the memory budget.
        batch_size: number of windows that the model processes together; `None` for as many as fit the memory budget,
            at most 16 windows and 240 s of audio with padding.
        memory_budget: number of bytes that may be used in addition to the model; `None` for a quarter of the free
            memory, at least 1 GB.
        confidence: whether to compute the confidence of tokens, words, segments and texts.
        num_beams: number of hypotheses of a beam search; 1 for greedy decoding; `None` for the default of the pipeline
            and of the model's generation config, which is greedy decoding unless they set another number.
        boost: phrases to recognise more often, and pairs (phrase, score); see `ParakeetProcessor.boosting_tree`.
        language_model: path of an n-gram model in ARPA format, or the result of
            `ParakeetProcessor.load_language_model`; `None` for no language model.
        lm_weight: weight of the language model.
        scripts: names of the scripts of labels that may be emitted; empty for all. See
            `ParakeetProcessor.tokens_of_scripts`.

    Raises:
        ValueError: an option is out of range.
    """

    decoder: str | None = None
    chunk_length_s: float | None = None
    batch_size: int | None = None
    memory_budget: int | None = None
    confidence: bool = True
    num_beams: int | None = None
    boost: Sequence[str | tuple[str, float]] = ()
    language_model: str | Path | TokenScorer | None = None
    lm_weight: float = DEFAULT_LM_WEIGHT
    scripts: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the options that do not depend on the model."""
        if self.decoder not in (None, "ctc", "transducer"):
            raise ValueError(f"`decoder` must be 'transducer' or 'ctc', got {self.decoder!r}: correct it")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}: raise it")
        if self.num_beams is not None and self.num_beams < 1:
            raise ValueError(f"`num_beams` must be at least 1, got {self.num_beams}: raise it")
        # the options of the pipeline check themselves
        InputOptions(self.chunk_length_s, memory_budget=self.memory_budget)


@dataclass(frozen=True)
class FailedFile:
    """A file that could not be transcribed.

    Args:
        file: path or URL of the file; `None` for samples or bytes in memory.
        error: the exception.
    """

    file: str | None
    error: Exception


def transcribe(
    files: Any,
    model: str | Path | ParakeetASRPipeline = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    quantize: str | None = None,
    **options: Any,
) -> Iterator[TranscriptionResult]:
    """Transcribe files with text, words, segments and tokens with times.

    The files are read while the results are requested.

    Args:
        files: paths, URLs, bytes, binary file objects or arrays of samples; see `load_audio`. A single path or URL is
            one file.
        model: Hub id, folder, `.nemo` file, `"demo"` for the bundled model of spoken digits, or a loaded pipeline.
        device, dtype, attention, quantize: see `load_pipeline`; `None` for a loaded pipeline.
        **options: fields of `TranscriptionOptions`, such as `batch_size`, `num_beams` and `boost`.

    Returns:
        A generator of one result per file, in the order of the files. If a file fails, it raises the error of the file;
        `transcribe_files` continues with the next file instead.

    Raises:
        ValueError: an option is invalid, or the model does not have the decoder.
        OSError: the model cannot be loaded.
    """
    transcription_options = TranscriptionOptions(**options)
    loading_options: dict[str, Any] = {"device": device, "dtype": dtype, "attention": attention, "quantize": quantize}
    if not isinstance(model, ParakeetASRPipeline):
        model = load_pipeline(model, **loading_options)
    elif set(loading_options.values()) != {None}:
        raise ValueError(
            "`device`, `dtype`, `attention` and `quantize` must be None for a loaded pipeline, got "
            f"{loading_options}: pass them to `load_pipeline`"
        )
    check_decoder(model.model.config, transcription_options.decoder)
    sources = [files] if isinstance(files, (str, os.PathLike)) else files
    return _raise_errors(transcribe_files(model, sources, transcription_options))


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
    quantize: str | None = None,
) -> ParakeetASRPipeline:
    """Load a model and create a speech recognition pipeline.

    Args:
        model: Hub id, folder or `.nemo` file; `"demo"` for the bundled model of spoken digits.
        device: device of the model, such as `"cpu"` or `"cuda:1"`; `None` for a CUDA GPU if there is one, else the CPU;
            with `quantize`, `None` for the CPU.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; `None` for bfloat16 if the device computes it natively, else
            float32.
        attention: `"full"` for attention without a limit, `"local"` for attention to 128 encoder frames on each side
            unless the model has a limited context already; `None` for the context of the model.
        quantize: `"int8"` for int8 weights and activations in the encoder blocks and in the LSTM, on a CPU; see
            `load_nemo`.

    Returns:
        The pipeline.

    Raises:
        ValueError: `dtype`, `attention` or `quantize` is unknown, the device is not available, the model does not
            support the context, or `quantize` is used with a GPU.
        OSError: the model cannot be found or downloaded.
    """
    if quantize is not None:
        device = device or "cpu"
        check_int8_device(device)
    device = choose_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}: correct it")
    dtype = dtype or ("bfloat16" if has_native_bfloat16(device) else "float32")
    loaded_model, processor = load_nemo(resolve_model_name(model), dtype=getattr(torch, dtype), quantize=quantize)
    if attention is not None:
        set_attention(loaded_model, attention)
    pipeline = ParakeetASRPipeline(
        loaded_model, processor=processor, task="automatic-speech-recognition", device=device
    )
    # a `.nemo` file does not set the name; the results contain it
    pipeline.model.name_or_path = str(model)
    return pipeline


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device for a model, and check that it is available.

    Args:
        device: the device; `None` for a CUDA GPU if there is one, else the CPU.

    Raises:
        ValueError: the text does not name a device, or this machine or this build of torch does not have the device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # torch checks a device only when it is used
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        names = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`device` must be available, got {str(device)!r} ({reason}): use one of {names}, or install a build of "
            "torch for the device"
        ) from error


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
    run = prepare_run(pipeline, options or TranscriptionOptions())
    recordings: deque[RecordingState] = deque()
    windows = read_windows(pipeline, files, recordings, run.preprocess_arguments)
    sampling_rate = pipeline.processor.feature_extractor.sampling_rate
    fits = create_batch_check(pipeline, run.options.memory_budget)
    for batch in batch_windows(windows, run.options.batch_size, fits):
        decode_batch(pipeline, batch, run.generate_arguments)
        if on_progress is not None:
            on_progress(sum(count_new_samples(window_input["window"]) for _, window_input in batch) / sampling_rate)
        while recordings and (recordings[0].is_decoded or recordings[0].error is not None):
            yield build_entry(pipeline, recordings.popleft(), run)
    # files at the end that could not be read
    for recording in recordings:
        yield build_entry(pipeline, recording, run)


@dataclass(frozen=True)
class PreparedRun:
    """The arguments of the steps of a pipeline for one set of options.

    Args:
        options: the options.
        preprocess_arguments: arguments of the pipeline's `preprocess`.
        generate_arguments: arguments of the pipeline's `_forward`.
        postprocess_arguments: arguments of the pipeline's `postprocess`.
        settings: the settings in the results.
    """

    options: TranscriptionOptions
    preprocess_arguments: dict[str, Any]
    generate_arguments: dict[str, Any]
    postprocess_arguments: dict[str, Any]
    settings: dict[str, Any]


def prepare_run(pipeline: ParakeetASRPipeline, options: TranscriptionOptions) -> PreparedRun:
    """Convert options to the arguments of the steps of a pipeline; this also loads the language model.

    Args:
        pipeline: pipeline with a model of this package.
        options: decoder, windows, confidence and search.

    Raises:
        ValueError: the model does not have the decoder of the options.
    """
    config = pipeline.model.config
    check_decoder(config, options.decoder)
    arguments = pipeline._sanitize_parameters(**_get_pipeline_options(options, config))
    # as in a call of the pipeline, the arguments of its constructor are defaults
    preprocess_arguments = {**pipeline._preprocess_params, **arguments[0]}
    generate_arguments = {**pipeline._forward_params, **arguments[1]}
    postprocess_arguments = {**pipeline._postprocess_params, **arguments[2]}
    # the pipeline plans recordings of which this number fit the memory budget together
    preprocess_arguments["batch_size"] = options.batch_size or 1
    settings = _describe_settings(pipeline, preprocess_arguments, generate_arguments)
    return PreparedRun(options, preprocess_arguments, generate_arguments, postprocess_arguments, settings)


def get_search_arguments(options: TranscriptionOptions) -> dict[str, Any]:
    """Convert the search of the options to arguments of a call of the pipeline.

    Args:
        options: number of beams, phrases, scripts and language model.

    Returns:
        The arguments. An option that is not set has no argument, so the default of the pipeline holds.
    """
    arguments: dict[str, Any] = {}
    if options.num_beams is not None:
        arguments["num_beams"] = options.num_beams
    if options.boost:
        arguments["boost"] = options.boost
    if options.scripts:
        arguments["scripts"] = options.scripts
    if options.language_model is not None:
        arguments.update(language_model=options.language_model, lm_weight=options.lm_weight)
    return arguments


def _get_pipeline_options(options: TranscriptionOptions, config: Any) -> dict[str, Any]:
    """Convert the options to arguments of a call of the pipeline.

    Args:
        options: decoder, windows, confidence and search.
        config: configuration of the model.
    """
    arguments = {"return_confidence": options.confidence, **get_search_arguments(options)}
    if options.chunk_length_s is not None:
        arguments["chunk_length_s"] = options.chunk_length_s
    if options.memory_budget is not None:
        arguments["memory_budget"] = options.memory_budget
    # a CTC model has one decoder, and its `generate` has no argument for it
    if options.decoder is not None and get_head_type(config) != "ctc":
        arguments["generate_kwargs"] = {"decoder": options.decoder}
    return arguments


def build_entry(
    pipeline: ParakeetASRPipeline, recording: RecordingState, run: PreparedRun
) -> TranscriptionResult | FailedFile:
    """Build the result of a decoded recording, or the entry of a recording that failed.

    Args:
        pipeline: the pipeline.
        recording: the recording.
        run: the arguments with which the recording was decoded.
    """
    if recording.error is not None:
        return FailedFile(recording.file, recording.error)

    aggregation = run.postprocess_arguments.get("confidence_aggregation", DEFAULT_AGGREGATION)
    emitted_tokens = pipeline.merge_outputs(recording.outputs)
    words, segments, tokens = (
        build_timed_texts(pipeline, emitted_tokens, level, run) for level in ("word", "segment", "char")
    )
    return TranscriptionResult(
        text=pipeline.processor.to_text(emitted_tokens),
        duration=recording.outputs[-1]["window"].stop / pipeline.processor.feature_extractor.sampling_rate,
        words=words,
        segments=segments,
        tokens=tokens,
        confidence=pipeline.processor.overall_confidence(emitted_tokens, aggregation),
        file=recording.file,
        model=pipeline.model.name_or_path or None,
        settings=run.settings,
        version=get_version(),
    )


def build_timed_texts(
    pipeline: ParakeetASRPipeline, emitted_tokens: EmittedTokens, level: str, run: PreparedRun
) -> tuple[TimedText, ...]:
    """Build the timed tokens, words or segments of a recording.

    Args:
        pipeline: the pipeline.
        emitted_tokens: the tokens of the recording, or of a part of it.
        level: `"char"`, `"word"` or `"segment"`.
        run: the arguments with which the recording was decoded.
    """
    aggregation = run.postprocess_arguments.get("confidence_aggregation", DEFAULT_AGGREGATION)
    head_type = run.postprocess_arguments.get("head_type")
    return to_timed_texts(pipeline.build_chunks(emitted_tokens, level, aggregation, head_type))


def _describe_settings(
    pipeline: ParakeetASRPipeline, preprocess_arguments: dict[str, Any], generate_arguments: dict[str, Any]
) -> dict[str, Any]:
    """Build the settings that a result contains: decoder, search, windows, attention context, device and dtype.

    Args:
        pipeline: the pipeline.
        preprocess_arguments: arguments of the pipeline's `preprocess`.
        generate_arguments: arguments of the pipeline's `_forward`.
    """
    model = pipeline.model
    is_ctc = generate_arguments.get("decoder") == "ctc"
    # the pipeline requests one hypothesis per window
    search, _ = take_search_options(
        {**generate_arguments, "num_return_sequences": 1},
        generate_arguments.get("generation_config"),
        model.generation_config,
    )
    return {
        "decoder": "ctc" if is_ctc else get_head_type(model.config),
        "num_beams": search.num_beams,
        "lm_weight": None if search.language_model is None else search.lm_weight,
        "boosting_weight": None if search.boosting is None else search.boosting_weight,
        "chunk_length_s": preprocess_arguments.get("chunk_length_s"),
        "attention_context_size": list(model.config.encoder_config.attention_context_size),
        "device": str(pipeline.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


__all__ = [
    "DEFAULT_MODEL",
    "DEMO_MODEL",
    "FailedFile",
    "PreparedRun",
    "TranscriptionOptions",
    "build_entry",
    "build_timed_texts",
    "get_search_arguments",
    "load_pipeline",
    "prepare_run",
    "set_attention",
    "transcribe",
    "transcribe_files",
]
