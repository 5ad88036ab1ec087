"""`pipeline("automatic-speech-recognition")` for Parakeet: text, times, confidence, batches and long audio.

Models of other families get the pipeline of transformers.
"""

from collections.abc import Iterator
from typing import Any

import torch.utils.data
from transformers import AutomaticSpeechRecognitionPipeline
from transformers.utils import logging

from .audio import load_audio
from .configuration_parakeet import get_head_type
from .long_audio import Window, cut_windows, merge_windows
from .processing_parakeet import DECODER_TYPES, LEVELS, ParakeetProcessor, to_emissions
from .timestamps import DEFAULT_AGGREGATION

logger = logging.get_logger(__name__)

# module of transformers' own Parakeet classes; a program that imports them before this package uses them
STOCK_MODULE = "transformers.models.parakeet.modeling_parakeet"

# keys of an input dict that describe the audio; all others are returned with the result
AUDIO_KEYS = {"array", "raw", "sampling_rate", "path", "bytes"}

# keys of a processed window that are not returned with the result
WINDOW_KEYS = {"hypotheses", "window", "is_last"}

# a chunk overlaps its neighbours on each side by this fraction of its length, as in the stock pipeline
DEFAULT_STRIDE = 1 / 6


class ParakeetASRPipeline(AutomaticSpeechRecognitionPipeline):
    """Speech recognition with any Parakeet head; created by `pipeline("automatic-speech-recognition", model=...)`.

    Call it with a file name, URL, bytes, array, tensor or `{"array", "sampling_rate"}`, or with an iterable of these.
    If the model is not of this package, creating this class gives a pipeline of transformers.

    Args:
        model: a model of this package.
        *args: further arguments of the stock pipeline: `feature_extractor`, `tokenizer`, ...
        processor: the processor to use; `None` builds one from `feature_extractor` and `tokenizer`.
        **kwargs: arguments of the stock pipeline, and those below, which a call accepts as well.
        return_timestamps: `"char"` (one entry per token), `"word"` or `"segment"` (also `True`).
        return_confidence: add a `confidence` to every chunk, or to the result if there are no timestamps; `True` means
            the method `"max_prob"`.
        confidence_aggregation: how words and segments get their confidence from tokens: `"min"` (default), `"mean"` or
            `"prod"`.
        chunk_length_s: cut longer audio into overlapping chunks of this many seconds.
        stride_length_s: seconds of overlap on each side, one number or a pair; default a sixth of the chunk.
        generate_kwargs: arguments of `generate`, such as `{"decoder": "ctc"}` for a hybrid.
    """

    processor: Any

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Create this pipeline, or the one of transformers if the model is not of this package.

        Args:
            model: the model; `None` while a pickled pipeline is loaded.
            *args: arguments of the stock pipeline.
            **kwargs: the same.
        """
        if model is None or is_our_model(model):
            return super().__new__(cls)
        return AutomaticSpeechRecognitionPipeline(model, *args, **kwargs)

    def __init__(self, model: Any, *args: Any, processor: Any = None, **kwargs: Any) -> None:
        # with a processor alone, the base class takes tokenizer and feature extractor from it
        super().__init__(model, *args, processor=processor, **kwargs)
        if self.processor is None:
            kind = get_head_type(model.config)
            self.processor = ParakeetProcessor(self.feature_extractor, self.tokenizer, decoder_type=kind)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Sort the arguments of a call into those of `preprocess`, `_forward` and `postprocess`.

        Args:
            **kwargs: arguments of a call; those that the pipeline does not know are arguments of `generate`.
        """
        kwargs.pop("ignore_warning", None)
        preprocess = pop_arguments(kwargs, "chunk_length_s", "stride_length_s")
        postprocess = pop_arguments(kwargs, "return_timestamps", "confidence_aggregation")
        if "return_timestamps" in postprocess:
            postprocess["return_timestamps"] = check_level(postprocess["return_timestamps"])
        generate = {**kwargs.pop("generate_kwargs", {})}
        if "return_confidence" in kwargs:
            generate["output_confidence"] = kwargs.pop("return_confidence")
        generate.update(kwargs)
        if "decoder" in generate:
            postprocess["kind"] = "ctc" if generate["decoder"] == "ctc" else get_head_type(self.model.config)
        return preprocess, generate, postprocess

    def preprocess(
        self, inputs: Any, chunk_length_s: float | None = None, stride_length_s: Any = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """Load one input and compute the features of its windows.

        Args:
            inputs: an audio source; of a dict, the keys that do not describe the audio are returned with the result.
            chunk_length_s: seconds of a window; `None` or 0 for one window.
            stride_length_s: seconds of context on each side, one number or a pair; `None` for the default.
            **kwargs: not used.

        Yields:
            The features of one window, with `window`, `is_last` and the additional keys of the input.
        """
        metadata = {k: v for k, v in inputs.items() if k not in AUDIO_KEYS} if isinstance(inputs, dict) else {}
        if "stride" in metadata:
            raise ValueError(
                "an input must have no `stride`: pass the whole audio with `chunk_length_s` and `stride_length_s`"
            )
        extractor = self.processor.feature_extractor
        samples = load_audio(inputs, target_rate=extractor.sampling_rate)
        # a forked worker process cannot use the GPU of its parent
        device = self.device if torch.utils.data.get_worker_info() is None else torch.device("cpu")
        for window in cut_windows(len(samples), *self._window_samples(chunk_length_s, stride_length_s)):
            features = extractor(
                samples[window.start : window.stop],
                sampling_rate=extractor.sampling_rate,
                return_tensors="pt",
                device=device,
            )
            yield {"is_last": window.keep_to is None, "window": window, **features, **metadata}

    def _window_samples(self, chunk_length_s: float | None, stride_length_s: Any) -> tuple[int, int, int]:
        """Convert the lengths of windows and of their left and right context to samples.

        Args:
            chunk_length_s: seconds of a window; `None` or 0 for one window over the whole clip.
            stride_length_s: seconds of context on each side, one number or a pair; `None` for the default.

        Returns:
            Window, left and right context in samples, each rounded to whole encoder frames; zeros for one window.
        """
        if not chunk_length_s:
            return 0, 0, 0
        stride = chunk_length_s * DEFAULT_STRIDE if stride_length_s is None else stride_length_s
        left_s, right_s = stride if isinstance(stride, (list, tuple)) else (stride, stride)
        samples_per_frame = self.model.config.inputs_to_logits_ratio
        frames_per_second = self.processor.feature_extractor.sampling_rate / samples_per_frame
        length, left, right = (
            round(seconds * frames_per_second) * samples_per_frame for seconds in (chunk_length_s, left_s, right_s)
        )
        return length, left, right

    def _forward(self, model_inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Decode one batch of windows.

        Args:
            model_inputs: what `preprocess` yields, collated by transformers.
            **kwargs: arguments of `generate`.

        Returns:
            The inputs without features, and the decoded tokens as `hypotheses`.
        """
        features, mask = model_inputs.pop("input_features"), model_inputs.pop("attention_mask")
        output = self.model.generate(
            input_features=features, attention_mask=mask, return_dict_in_generate=True, **kwargs
        )
        return {**model_inputs, "hypotheses": output.hypotheses.cpu()}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        return_timestamps: str | None = None,
        confidence_aggregation: str = DEFAULT_AGGREGATION,
        kind: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Merge the windows of one input and compute text, chunks and confidence.

        Args:
            model_outputs: what `_forward` returns, one dict per window with one row of `hypotheses` each.
            return_timestamps: `"char"`, `"word"` or `"segment"`; `None` for no chunks.
            confidence_aggregation: `"min"`, `"mean"` or `"prod"`.
            kind: `"ctc"`, `"rnnt"` or `"tdt"`, the head that decoded; `None` for that of the model.
            **kwargs: not used.

        Returns:
            `text`, and if requested `chunks` or `confidence`; the additional keys of the input as lists, one entry per
            window.
        """
        config = self.model.config
        windows: list[Window] = [output["window"] for output in model_outputs]
        hypotheses = [output["hypotheses"] for output in model_outputs]
        emissions = to_emissions(merge_windows(hypotheses, windows, config.inputs_to_logits_ratio))
        result: dict[str, Any] = {"text": self.processor.to_text(emissions)}
        if return_timestamps:
            result["chunks"] = self.processor.chunks(
                emissions,
                return_timestamps,
                kind or get_head_type(config),
                config.inputs_to_logits_ratio / self.processor.feature_extractor.sampling_rate,
                config.segment_separators,
                config.segment_gap_threshold,
                confidence_aggregation,
            )
        elif emissions.confidence is not None:
            result["confidence"] = self.processor.overall_confidence(emissions, confidence_aggregation)
        for key in model_outputs[0].keys() - WINDOW_KEYS:
            result[key] = [output[key] for output in model_outputs]
        return result


def is_our_model(model: Any) -> bool:
    """Tell whether a model is a Parakeet model of this package, and warn about a Parakeet model of transformers.

    An adapter or compiler may be wrapped around the model.

    Args:
        model: a model with a configuration.
    """
    if get_head_type(model.config) not in DECODER_TYPES:
        return False
    is_stock = any(type(module).__module__ == STOCK_MODULE for module in model.modules())
    if is_stock:
        logger.warning(
            f"{type(model).__name__} is transformers' own class, imported before transformers_parakeet: it runs in "
            "transformers' own pipeline. Import transformers_parakeet first for times and chunks on every head."
        )
    return not is_stock


def pop_arguments(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove arguments from `kwargs` and return those that were present.

    Args:
        kwargs: arguments, which are changed in place.
        *names: names of the arguments to remove.
    """
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def check_level(return_timestamps: Any) -> str | None:
    """Return the level of timestamps that an argument asks for.

    Args:
        return_timestamps: `"char"`, `"word"`, `"segment"`, `True` for segments, or `False` or `None`.

    Returns:
        The level; `None` for no timestamps.

    Raises:
        ValueError: there is no such level.
    """
    level = "segment" if return_timestamps is True else return_timestamps or None
    if level is not None and level not in LEVELS:
        raise ValueError(f"`return_timestamps` must be one of {', '.join(LEVELS)} or True, got {return_timestamps!r}")
    return level
