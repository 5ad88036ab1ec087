"""Implements `pipeline("automatic-speech-recognition")` for Parakeet: text, times, confidence, batches and long audio.

Models of other families use the pipeline of transformers.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch.utils.data
from transformers import AutomaticSpeechRecognitionPipeline, GenerationConfig
from transformers.utils import logging

from .audio import AudioSource
from .configuration_parakeet import get_head_type
from .long_audio import InputOptions, iterate_model_inputs, merge_recording
from .processing_parakeet import HEAD_TYPES, TIMESTAMP_LEVELS, ParakeetProcessor, to_emitted_tokens
from .timestamps import DEFAULT_AGGREGATION, EmittedTokens

logger = logging.get_logger(__name__)

# module of the stock Parakeet classes; a program gets them if it imports them before this package
STOCK_MODULE_NAME = "transformers.models.parakeet.modeling_parakeet"

# keys of an input dict that describe the audio; the values of all other keys are returned with the result
AUDIO_KEYS = {"array", "raw", "sampling_rate", "path", "bytes"}

# arguments of `preprocess`, and the fields of `InputOptions` that they set
INPUT_ARGUMENTS = {
    "chunk_length_s": "window_s",
    "stride_length_s": "context_s",
    "normalize_over": "normalize_over",
    "memory_budget": "memory_budget",
    "speech_detector": "speech_detector",
    "batch_size": "batch_size",
}

# keys of a decoded window that are not returned with the result
WINDOW_KEYS = {"hypotheses", "window", "speech", "is_last"}


class ParakeetASRPipeline(AutomaticSpeechRecognitionPipeline):
    """Speech recognition with any Parakeet head; created by `pipeline("automatic-speech-recognition", model=...)`.

    The input of a call is a file name, URL, bytes, array, tensor, `{"array", "sampling_rate"}`, or an iterable of
    these. If the model is not a model of this package, the constructor returns a pipeline of transformers.

    Args:
        model: a model of this package.
        *args: further arguments of the stock pipeline: `feature_extractor`, `tokenizer`, ...
        processor: the processor; `None` to build it from `feature_extractor` and `tokenizer`.
        **kwargs: further arguments of the stock pipeline, and the arguments below. A call also accepts the arguments
            below.
        return_timestamps: `"char"` (one entry per token), `"word"`, `"segment"`, or `True` for `"segment"`.
        return_confidence: a confidence method, or `True` for `"max_prob"`: add `confidence` to every chunk, or to the
            result if there are no timestamps.
        confidence_aggregation: how to compute the confidence of words and segments from the confidences of tokens:
            `"min"` (default), `"mean"` or `"prod"`.
        chunk_length_s: maximum length in seconds of the overlapping chunks into which longer audio is cut. `None`
            (default): audio is recognised as a whole if it fits `memory_budget`, otherwise in chunks of 60 s. 0: audio
            is always recognised as a whole.
        stride_length_s: seconds of context on each side of a chunk, one number or a pair (left, right); default: one
            sixth of `chunk_length_s`.
        normalize_over: `"recording"` (default) to normalise the features of a chunk with the statistics of the whole
            recording, or `"chunk"` for those of the chunk.
        memory_budget: number of bytes that recognition may use in addition to the model, if `chunk_length_s` is `None`;
            default: a quarter of the free memory, at least 1 GB.
        speech_detector: callable that takes (S,) samples and returns the ranges of samples with speech, for example
            `EnergySpeechDetector()`. Audio without speech gives no text. Default: no detection.
        boost: phrases to recognise more often: a list of phrases and of pairs (phrase, score); see
            `ParakeetProcessor.boosting_tree`.
        language_model: n-gram model: the path of an ARPA file, or the result of
            `ParakeetProcessor.load_language_model`.
        scripts: names of writing systems, such as `["Latin"]`: labels with letters of other scripts are never emitted;
            see `ParakeetProcessor.tokens_of_scripts`.
        generate_kwargs: arguments of `generate`, such as `{"num_beams": 4}`, `{"lm_weight": 0.5}`, or
            `{"decoder": "ctc"}` for a hybrid.
    """

    processor: Any

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Create a Parakeet pipeline, or a pipeline of transformers if the model is not a model of this package.

        Args:
            model: the model; `None` while a pickled pipeline is loaded.
            *args: positional arguments of the stock pipeline.
            **kwargs: keyword arguments of the stock pipeline.
        """
        if model is None or check_package_model(model):
            return super().__new__(cls)
        return AutomaticSpeechRecognitionPipeline(model, *args, **kwargs)

    def __init__(self, model: Any, *args: Any, processor: Any = None, **kwargs: Any) -> None:
        # From 5.23 on, the base class removes arguments of `generate` from `kwargs` and expects `_forward` to add them.
        # Inside `generate_kwargs` they are treated as in older releases.
        names = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
        search = pop_arguments(kwargs, "generation_config", *names)
        if search:
            kwargs["generate_kwargs"] = {**kwargs.get("generate_kwargs", {}), **search}
        # without `tokenizer` and `feature_extractor`, the base class takes both from the processor
        super().__init__(model, *args, processor=processor, **kwargs)
        self._set_processor()

    def _set_processor(self) -> None:
        """Build the processor from `feature_extractor` and `tokenizer` if the pipeline was created without one."""
        if self.processor is None:
            config = self.model.config
            self.processor = ParakeetProcessor(
                self.feature_extractor,
                self.tokenizer,
                decoder_type=get_head_type(config),
                subsampling_factor=config.encoder_config.subsampling_factor,
            )

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Split the arguments of a call between `preprocess`, `_forward` and `postprocess`.

        Args:
            **kwargs: arguments of a call; unknown arguments are passed to `generate`.

        Returns:
            Arguments of `preprocess`, `_forward` (which passes its arguments to `generate`) and `postprocess`.
        """
        # `ignore_warning` silences a warning of the stock pipeline, which this pipeline never logs
        kwargs.pop("ignore_warning", None)
        preprocess_kwargs = pop_arguments(kwargs, *INPUT_ARGUMENTS)
        postprocess_kwargs = pop_arguments(kwargs, "return_timestamps", "confidence_aggregation")
        if "return_timestamps" in postprocess_kwargs:
            postprocess_kwargs["return_timestamps"] = get_timestamp_level(postprocess_kwargs["return_timestamps"])
        generate_kwargs = {**kwargs.pop("generate_kwargs", {})}
        if "return_confidence" in kwargs:
            generate_kwargs["output_confidence"] = kwargs.pop("return_confidence")
        generate_kwargs.update(kwargs)
        generate_kwargs = self._prepare_search(generate_kwargs)
        # a hybrid can decode with its CTC head, which changes how times are computed
        if "decoder" in generate_kwargs:
            is_ctc = generate_kwargs["decoder"] == "ctc"
            postprocess_kwargs["head_type"] = "ctc" if is_ctc else get_head_type(self.model.config)
        return preprocess_kwargs, generate_kwargs, postprocess_kwargs

    def _prepare_search(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Build the phrase boosting and the allowed tokens of a call, and load its language model.

        Args:
            generate_kwargs: arguments of `generate`, `boost` and `scripts`.

        Returns:
            The arguments of `generate`. Empty `boost` and `scripts` give `None`, which overrides the constructor.

        Raises:
            ValueError: `num_return_sequences` is larger than 1, because windows are merged to one text; or `boost` and
                `boosting`, or `scripts` and `allowed_tokens`, are both set.
            TypeError: `boosting` is a list, because a batch can contain several windows of a clip.
        """
        # the base class calls this method before its constructor has returned
        self._set_processor()
        generate_kwargs = dict(generate_kwargs)
        for name, value in pop_arguments(generate_kwargs, "boost", "scripts").items():
            is_boost = name == "boost"
            result_name = "boosting" if is_boost else "allowed_tokens"
            build = self.processor.boosting_tree if is_boost else self.processor.tokens_of_scripts
            if value and generate_kwargs.get(result_name) is not None:
                raise ValueError(f"one of `{name}` and `{result_name}` must be None, got both: leave out one of them")
            generate_kwargs[result_name] = build(value) if value else generate_kwargs.get(result_name)
        language_model = generate_kwargs.get("language_model")
        if isinstance(language_model, (str, os.PathLike)):
            generate_kwargs["language_model"] = self.processor.load_language_model(language_model)
        if isinstance(generate_kwargs.get("boosting"), (list, tuple)):
            raise TypeError(
                "the pipeline decodes windows of several clips as a batch, so `boosting` must be one tree, got a list: "
                "call `model.generate` for one tree per clip"
            )
        if (generate_kwargs.get("num_return_sequences") or 1) > 1:
            raise ValueError(
                "the pipeline returns one text, so `num_return_sequences` must be 1, got "
                f"{generate_kwargs['num_return_sequences']}: call `model.generate` for several hypotheses"
            )
        return generate_kwargs

    def get_iterator(
        self, inputs: Any, num_workers: int, batch_size: int, preprocess_params: dict[str, Any], *args: Any
    ) -> Any:
        """Create the iterator over the results of several inputs, and tell `preprocess` the batch size.

        transformers calls this method if the input of a call is a list, a dataset or a generator.

        Args:
            inputs: the inputs of the call.
            num_workers: number of worker processes.
            batch_size: number of windows that the model processes together.
            preprocess_params: arguments of `preprocess`.
            *args: arguments of `_forward` and `postprocess`.
        """
        preprocess_params = {**preprocess_params, "batch_size": batch_size}
        return super().get_iterator(inputs, num_workers, batch_size, preprocess_params, *args)

    def preprocess(self, inputs: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Read one input, divide it into windows if necessary, and compute the features of each window.

        Args:
            inputs: the audio. If it is a dict, the values of the keys that do not describe the audio are returned with
                the result.
            **kwargs: `INPUT_ARGUMENTS`, described in the class, and `batch_size`, the number of windows that the model
                processes together.

        Yields:
            For each window, the features and their mask, the keys `window`, `speech` and `is_last`, and the additional
            keys of the input.
        """
        metadata = {}
        if isinstance(inputs, dict):
            metadata = {key: value for key, value in inputs.items() if key not in AUDIO_KEYS}
        if "stride" in metadata:
            raise ValueError(
                "an input must not have the key `stride`: pass the whole audio and set `chunk_length_s` and "
                "`stride_length_s`"
            )
        options = InputOptions(**{name: kwargs[key] for key, name in INPUT_ARGUMENTS.items() if key in kwargs})
        extractor = self.processor.feature_extractor
        source = AudioSource(inputs, target_rate=extractor.sampling_rate)
        # a forked worker of a data loader cannot use the GPU of its parent process
        is_worker = torch.utils.data.get_worker_info() is not None
        device = torch.device("cpu") if is_worker else self.device
        model_inputs = iterate_model_inputs(source, options, extractor, self.model.config, self.model.dtype, device)
        for model_input in model_inputs:
            yield {
                "is_last": model_input.is_last,
                "window": model_input.window,
                "speech": model_input.speech,
                "input_features": model_input.features,
                "attention_mask": model_input.mask,
                **metadata,
            }

    def _forward(self, model_inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Decode one batch of windows.

        Args:
            model_inputs: results of `preprocess`, collated to a batch by transformers.
            **kwargs: arguments of `generate`.

        Returns:
            The remaining inputs (without features and mask) plus the decoded tokens as `hypotheses`.
        """
        input_features, attention_mask = model_inputs.pop("input_features"), model_inputs.pop("attention_mask")
        # overrides the generation config of the model: one hypothesis per window
        kwargs["num_return_sequences"] = 1
        output = self.model.generate(
            input_features=input_features, attention_mask=attention_mask, return_dict_in_generate=True, **kwargs
        )
        return {**model_inputs, "hypotheses": output.hypotheses.cpu()}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        return_timestamps: str | None = None,
        confidence_aggregation: str = DEFAULT_AGGREGATION,
        head_type: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Merge the windows of one input and compute text, chunks and confidence.

        Args:
            model_outputs: results of `_forward`, one dict per window with the hypothesis of the window.
            return_timestamps: `"char"`, `"word"` or `"segment"`; `None` for no chunks.
            confidence_aggregation: how to combine the confidences of tokens: `"min"`, `"mean"` or `"prod"`.
            head_type: type of the head that decoded: `"ctc"`, `"rnnt"` or `"tdt"`; `None` for the head type of the
                model.
            **kwargs: unused.

        Returns:
            `text`; `chunks` if `return_timestamps` is set; otherwise `confidence`, if the hypotheses have it; the
            additional keys of the input, each with a list of one value per window.
        """
        emitted_tokens = self.merge_outputs(model_outputs)
        result: dict[str, Any] = {"text": self.processor.to_text(emitted_tokens)}
        if return_timestamps:
            result["chunks"] = self.build_chunks(emitted_tokens, return_timestamps, confidence_aggregation, head_type)
        elif emitted_tokens.confidence is not None:
            result["confidence"] = self.processor.overall_confidence(emitted_tokens, confidence_aggregation)
        metadata_keys = model_outputs[0].keys() - WINDOW_KEYS
        for key in metadata_keys:
            result[key] = [output[key] for output in model_outputs]
        return result

    def merge_outputs(self, model_outputs: list[dict[str, Any]]) -> EmittedTokens:
        """Merge the hypotheses of the windows of one input.

        Args:
            model_outputs: results of `_forward`, one dict per window.

        Returns:
            The tokens of the input.
        """
        hypothesis = merge_recording(
            [output["hypotheses"] for output in model_outputs],
            [output["window"] for output in model_outputs],
            model_outputs[0]["speech"],
            self.processor.feature_extractor.sampling_rate,
            self.model.config.inputs_to_logits_ratio,
        )
        return to_emitted_tokens(hypothesis)

    def build_chunks(
        self,
        emitted_tokens: EmittedTokens,
        level: str,
        confidence_aggregation: str = DEFAULT_AGGREGATION,
        head_type: str | None = None,
    ) -> list[dict[str, Any]]:
        """Compute text, times and confidence of tokens, words or segments; see `ParakeetProcessor.chunks`.

        Args:
            emitted_tokens: the tokens of one input.
            level: `"char"`, `"word"` or `"segment"`.
            confidence_aggregation: see `postprocess`.
            head_type: see `postprocess`.
        """
        config = self.model.config
        chunks: list[dict[str, Any]] = self.processor.chunks(
            emitted_tokens,
            level,
            head_type or get_head_type(config),
            config.inputs_to_logits_ratio / self.processor.feature_extractor.sampling_rate,
            config.segment_separators,
            config.segment_gap_threshold,
            confidence_aggregation,
        )
        return chunks


def check_package_model(model: Any) -> bool:
    """Return whether a model is a Parakeet model of this package; log a warning if it is a stock Parakeet model.

    The model may be wrapped, for example by PEFT or `torch.compile`.

    Args:
        model: a model with a `config` attribute.
    """
    if get_head_type(model.config) not in HEAD_TYPES:
        return False
    # check all submodules, because the outer module may be a wrapper
    has_stock_modules = any(type(module).__module__ == STOCK_MODULE_NAME for module in model.modules())
    if has_stock_modules:
        logger.warning(
            f"{type(model).__name__} is the stock class of transformers, because it was imported before "
            "transformers_parakeet, and is used with the stock pipeline. Import transformers_parakeet first to get "
            "timestamps and chunked inference with every head."
        )
    return not has_stock_modules


def pop_arguments(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove arguments from `kwargs` and return the removed arguments.

    Args:
        kwargs: arguments, changed in place.
        *names: names of the arguments to remove; names that `kwargs` does not contain are ignored.
    """
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def get_timestamp_level(return_timestamps: Any) -> str | None:
    """Get the level of timestamps from the argument `return_timestamps`.

    Args:
        return_timestamps: `"char"`, `"word"`, `"segment"`, `True` for `"segment"`, or `False` or `None` for no
            timestamps.

    Returns:
        The level; `None` for no timestamps.

    Raises:
        ValueError: `return_timestamps` is not one of these.
    """
    level = "segment" if return_timestamps is True else return_timestamps or None
    if level is not None and level not in TIMESTAMP_LEVELS:
        raise ValueError(
            f"`return_timestamps` must be one of {', '.join(TIMESTAMP_LEVELS)} or True, got {return_timestamps!r}"
        )
    return level
