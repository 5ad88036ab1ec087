"""`pipeline("automatic-speech-recognition")` for Parakeet: text, times, confidence, batches and chunks.

Every other model is passed on to the stock pipeline, untouched.
"""

from collections.abc import Iterator
from typing import Any

import torch.utils.data
from transformers import AutomaticSpeechRecognitionPipeline
from transformers.utils import logging

from .audio import load_audio
from .long_audio import Window, merge, windows
from .processing_parakeet import LEVELS, ParakeetProcessor
from .timestamps import DEFAULT_AGGREGATION, ctc_emissions, transducer_emissions

logger = logging.get_logger(__name__)

# model type -> how its generated steps are read
KINDS = {"parakeet_ctc": "ctc", "parakeet_rnnt": "rnnt", "parakeet_tdt": "tdt"}

# where transformers' own classes are, which a program has in its hands if it imported their names first
STOCK_MODULE = "transformers.models.parakeet.modeling_parakeet"

# keys under which a dict carries audio; all others are handed through to the result
AUDIO_KEYS = {"array", "raw", "sampling_rate", "path", "bytes"}

# part of a chunk that overlaps with its neighbours on each side, as in the stock pipeline
STRIDE_SHARE = 6


class ParakeetASRPipeline(AutomaticSpeechRecognitionPipeline):
    """Speech recognition with any Parakeet head; created by `pipeline("automatic-speech-recognition", model=...)`.

    Call it with a file name, URL, bytes, array, tensor or `{"array", "sampling_rate"}`, or an iterable of these. Beyond
    the arguments of the stock pipeline:

    Args:
        return_timestamps: `"char"` (one entry per token), `"word"` or `"segment"` (also `True`).
        return_confidence: give every chunk, and without timestamps the whole text, a `confidence`; `True` means the
            method `"max_prob"`.
        confidence_aggregation: from token to word and segment confidence: `"min"` (default), `"mean"` or `"prod"`.
        chunk_length_s: cut longer audio into overlapping chunks of so many seconds.
        stride_length_s: seconds of overlap on each side, a number or a pair; default a sixth of the chunk.
        generate_kwargs: arguments of `generate`, such as `{"decoder": "ctc"}` for a hybrid.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._kind = KINDS.get(model.config.model_type)
        if self._kind is not None and is_stock(model):
            self._kind = None
            logger.warning(
                f"{type(model).__name__} is transformers' own class, imported before transformers_parakeet: it runs in "
                "transformers' own pipeline. Import transformers_parakeet first for times and chunks on "
                "every head."
            )
        super().__init__(model, *args, **kwargs)
        if self._kind is not None:
            self._processor = ParakeetProcessor(self.feature_extractor, self.tokenizer, decoder_type=self._kind)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if self._kind is None:
            return super()._sanitize_parameters(**kwargs)
        preprocess: dict[str, Any] = {k: kwargs.pop(k) for k in ("chunk_length_s", "stride_length_s") if k in kwargs}
        kwargs.pop("ignore_warning", None)
        postprocess: dict[str, Any] = {
            k: kwargs.pop(k) for k in ("return_timestamps", "confidence_aggregation") if k in kwargs
        }
        if "return_timestamps" in postprocess:
            postprocess["return_timestamps"] = timestamp_level(postprocess["return_timestamps"])
        forward = {**kwargs.pop("generate_kwargs", {})}
        if "return_confidence" in kwargs:
            forward["output_confidence"] = kwargs.pop("return_confidence")
        forward.update(kwargs)
        return preprocess, forward, postprocess

    def preprocess(
        self, inputs: Any, chunk_length_s: float | None = None, stride_length_s: Any = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """Read one input and yield the features of its windows."""
        if self._kind is None:
            yield from super().preprocess(inputs, chunk_length_s or 0, stride_length_s, **kwargs)
            return
        extra = {k: v for k, v in inputs.items() if k not in AUDIO_KEYS} if isinstance(inputs, dict) else {}
        if "stride" in extra:
            raise ValueError(
                "a clip of its own has no `stride`: pass the whole audio and `chunk_length_s`, `stride_length_s`"
            )
        rate = self.feature_extractor.sampling_rate
        samples = load_audio(inputs, target_rate=rate)
        # a forked worker process cannot use the GPU of its parent
        device = self.device if torch.utils.data.get_worker_info() is None else torch.device("cpu")
        for window in windows(len(samples), *self._window_samples(chunk_length_s, stride_length_s)):
            features = self.feature_extractor(
                samples[window.start : window.stop], sampling_rate=rate, return_tensors="pt", device=device
            )
            yield {"is_last": window.keep_to is None, "window": window, **features, **extra}

    def _window_samples(self, chunk_length_s: float | None, stride_length_s: Any) -> tuple[int, int, int]:
        """Return chunk length and both strides in samples, whole encoder frames each."""
        if not chunk_length_s:
            return 0, 0, 0
        stride = chunk_length_s / STRIDE_SHARE if stride_length_s is None else stride_length_s
        left, right = stride if isinstance(stride, (list, tuple)) else (stride, stride)
        frame, rate = self.model.config.inputs_to_logits_ratio, self.feature_extractor.sampling_rate
        length, left, right = (round(seconds * rate / frame) * frame for seconds in (chunk_length_s, left, right))
        return length, left, right

    def _forward(self, model_inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if self._kind is None:
            return super()._forward(model_inputs, **kwargs)
        features, mask = model_inputs.pop("input_features"), model_inputs.pop("attention_mask")
        if self._kind != "ctc":
            # the times of tokens are those that the model predicted, as in NeMo
            kwargs.setdefault("forced_blanks", True)
        out = self.model.generate(input_features=features, attention_mask=mask, return_dict_in_generate=True, **kwargs)
        steps = {"tokens": out.sequences, "durations": out.get("durations"), "confidence": out.get("token_confidence")}
        return {**model_inputs, **{key: value for key, value in steps.items() if value is not None}}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        return_timestamps: str | None = None,
        confidence_aggregation: str = DEFAULT_AGGREGATION,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Merge the windows of one input and make text, chunks and confidence of them."""
        if self._kind is None:
            return super().postprocess(model_outputs, return_timestamps=return_timestamps, **kwargs)
        config = self.model.config
        spans: list[Window] = [out.pop("window") for out in model_outputs]
        # a hybrid's CTC head gives no durations
        kind = self._kind if "durations" in model_outputs[0] else "ctc"
        emissions = merge([self._emissions(out) for out in model_outputs], spans, config.inputs_to_logits_ratio)
        result: dict[str, Any] = {"text": self._processor.to_text(emissions)}
        if return_timestamps:
            result["chunks"] = self._processor.chunks(
                emissions,
                return_timestamps,
                kind,
                config.inputs_to_logits_ratio / self.feature_extractor.sampling_rate,
                config.segment_separators,
                config.segment_gap_threshold,
                confidence_aggregation,
            )
        elif emissions.confidence is not None:
            result["confidence"] = self._processor.overall_confidence(emissions, confidence_aggregation)
        for key in model_outputs[0].keys() - {"tokens", "durations", "confidence", "is_last"}:
            result[key] = [out[key] for out in model_outputs]
        return result

    def _emissions(self, out: dict[str, Any]) -> Any:
        """Read the generated row of one window."""
        ids = out["tokens"].flatten().tolist()
        sure = out["confidence"].flatten().tolist() if "confidence" in out else None
        blank = getattr(self.model.config, "blank_token_id", self.model.config.pad_token_id)
        if "durations" not in out:
            return ctc_emissions(ids, blank, sure)
        return transducer_emissions(
            ids, out["durations"].flatten().tolist(), {blank, self.model.config.pad_token_id}, sure
        )


def is_stock(model: Any) -> bool:
    """Tell whether a model, or what an adapter or compiler has wrapped around it, is one of transformers' own."""
    return any(type(module).__module__ == STOCK_MODULE for module in model.modules())


def timestamp_level(return_timestamps: Any) -> str | None:
    """Check what was asked for; `True` means segments.

    Raises:
        ValueError: there is no such level.
    """
    level = "segment" if return_timestamps is True else return_timestamps or None
    if level is not None and level not in LEVELS:
        raise ValueError(f"`return_timestamps` must be one of {', '.join(LEVELS)} or True, got {return_timestamps!r}")
    return level
