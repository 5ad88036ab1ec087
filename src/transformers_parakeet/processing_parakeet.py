"""The processor: audio and text to a batch, ids and frames back to text, times and confidence.

Features are computed in `feature_extraction_parakeet.py`, times in `timestamps.py`.
"""

import re
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from .timestamps import (
    DEFAULT_AGGREGATION,
    Emissions,
    Span,
    aggregate,
    char_spans,
    segment_spans,
    supported_punctuation,
    transducer_emissions,
    word_spans,
)
from .tokenization_parakeet import BLANK, WORD_START

LEVELS = ("char", "word", "segment")

# arguments of `from_pretrained` that say where files are
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

# encoder frames are so many mel frames in every released checkpoint
SUBSAMPLING_FACTOR = 8

DEFAULTS: dict[str, dict[str, Any]] = {
    "audio_kwargs": {
        "sampling_rate": 16000,
        "padding": "longest",
        "return_attention_mask": True,
        "subsampling_factor": SUBSAMPLING_FACTOR,
    },
    "text_kwargs": {"padding": True, "padding_side": "right", "add_special_tokens": False},
    "common_kwargs": {"return_tensors": "pt"},
}


class ParakeetProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # a typed dict upstream
    """Defaults of the processor's arguments."""

    _defaults = DEFAULTS


class ParakeetProcessor(ProcessorMixin):
    """A feature extractor and a tokenizer, and what lies between them and a model.

    Args:
        feature_extractor: a `ParakeetFeatureExtractor`.
        tokenizer: a `ParakeetTokenizer`.
        blank_token: the blank of a transducer's tokenizer. The blank of a CTC tokenizer is its pad token.
        decoder_type: `"ctc"`, `"rnnt"` or `"tdt"`. With `None`, `from_pretrained` takes it from the model's
            configuration beside the processor; without one, a vocabulary with the blank counts as that of TDT.
    """

    valid_processor_kwargs = ParakeetProcessorKwargs

    def __init__(
        self, feature_extractor: Any, tokenizer: Any, blank_token: str = BLANK, decoder_type: str | None = None
    ) -> None:
        self.blank_token = blank_token
        self.blank_token_id = blank_id(tokenizer, blank_token)
        self.decoder_type = decoder_type
        super().__init__(feature_extractor, tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a processor; where its file names no type, the type is that of the model beside it."""
        # the base class takes arguments out of its copy of `kwargs`
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        if processor.decoder_type is None:
            processor.decoder_type = model_kind(pretrained_model_name_or_path, kwargs)
        return loaded

    @property
    def _decoder_type(self) -> str:
        if self.decoder_type is not None:
            return self.decoder_type
        return "tdt" if self.blank_token in self.tokenizer.get_vocab() else "ctc"

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` may return."""
        decoder = [] if self._decoder_type == "ctc" else ["decoder_input_ids"]
        return [*self.feature_extractor.model_input_names, "labels", *decoder]

    def __call__(self, audio: Any, text: Any = None, sampling_rate: int | None = None, **kwargs: Any) -> BatchFeature:
        """Prepare audio, and its transcripts for training.

        Args:
            audio: one clip or a list of clips, see `ParakeetFeatureExtractor`; a 2-D array is one clip with channels.
            text: the transcript of each clip.
            sampling_rate: rate of the audio in Hz.
            **kwargs: arguments of the feature extractor and the tokenizer.

        Returns:
            `input_features` (B, T, F), `attention_mask` (B, T); with text `labels` (B, U), padded with the pad token,
            and for transducers `decoder_input_ids` (B, U+1), the blank before the labels.

        Raises:
            ValueError: another sampling rate than the model's, or as many clips as transcripts do not come.
        """
        merged = self._merge_kwargs(ParakeetProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if isinstance(audio, (np.ndarray, Tensor)):
            audio = [audio] if audio.ndim <= 2 else list(audio)
        inputs = self.feature_extractor(audio, **{**merged["audio_kwargs"], "sampling_rate": sampling_rate})
        if text is None:
            return inputs
        text = [text] if isinstance(text, str) else list(text)
        if len(text) != len(inputs["input_features"]):
            raise ValueError(
                f"every clip needs a transcript: {len(inputs['input_features'])} clips came with {len(text)}"
            )
        labels = self.tokenizer(text, **merged["text_kwargs"])["input_ids"]
        inputs["labels"] = labels.long() if isinstance(labels, Tensor) else labels
        if self._decoder_type != "ctc" and isinstance(labels, Tensor):
            blank = torch.full((len(labels), 1), self.blank_token_id)
            inputs["decoder_input_ids"] = torch.cat([blank, inputs["labels"]], dim=1)
        return inputs

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Decode generated sequences to texts.

        CTC repeats are merged, transducer repeats kept. What the CTC head of a hybrid generated is known as such; after
        it has become a list, pass `group_tokens=True`.

        Args:
            sequences: (B, L), as `generate` returns them.
            **kwargs: arguments of the tokenizer.
        """
        sequences, kwargs = self._prepared(sequences, kwargs)
        return [self._tidy(text) for text in self.tokenizer.batch_decode(sequences, **kwargs)]

    def decode(self, token_ids: Any, *, durations: Tensor | None = None, **kwargs: Any) -> Any:
        """Decode generated sequences, and time their tokens when durations are given.

        Args:
            token_ids: (L,) or (B, L), as `generate` returns them.
            durations: frames that each step of a transducer advances, same shape.
            **kwargs: arguments of the tokenizer.

        Returns:
            The text or texts; with durations also, per sequence, a list of `{"token", "start", "end"}` in seconds.
        """
        if durations is not None:
            kwargs.setdefault("group_tokens", False)
        sequences, kwargs = self._prepared(token_ids, kwargs)
        decoded = self.tokenizer.decode(sequences, **kwargs)
        decoded = self._tidy(decoded) if isinstance(decoded, str) else [self._tidy(text) for text in decoded]
        if durations is None:
            return decoded
        rows, spans = torch.as_tensor(sequences), torch.as_tensor(durations)
        if rows.ndim == 1:
            return decoded, self._token_times(rows.tolist(), spans.tolist())
        return decoded, [self._token_times(row.tolist(), span.tolist()) for row, span in zip(rows, spans, strict=True)]

    def _prepared(self, sequences: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return sequences and tokenizer arguments as the kind of the sequences asks for."""
        first = sequences[0] if isinstance(sequences, (list, tuple)) and len(sequences) else sequences
        kind = getattr(first, "decoder_type", None)
        kwargs = {"group_tokens": (kind or self._decoder_type) == "ctc", **kwargs}
        if kind == "ctc" and isinstance(sequences, Tensor):
            # the tokenizer leaves out the pad token between repeats, which is the blank of a CTC model
            sequences = sequences.masked_fill(sequences == self.blank_token_id, self.tokenizer.pad_token_id)
        return sequences, kwargs

    def _token_times(self, ids: list[int], durations: list[int]) -> list[dict[str, Any]]:
        """Time the tokens of one generated row as stock transformers returns them."""
        emissions = transducer_emissions(ids, durations, {self.tokenizer.pad_token_id, self.blank_token_id})
        # only a transducer has durations
        kind = "tdt" if self._decoder_type == "ctc" else self._decoder_type
        chunks = self.chunks(emissions, "char", kind)
        return [{"token": c["text"], "start": c["timestamp"][0], "end": c["timestamp"][1]} for c in chunks if c["text"]]

    def to_text(self, emissions: Emissions) -> str:
        """Return the text of some tokens as NeMo writes it: no space before punctuation."""
        return self._tidy(self._detokenize(emissions.tokens))

    def chunks(
        self,
        emissions: Emissions,
        level: str,
        kind: str | None = None,
        frame_s: float | None = None,
        separators: Any = (".", "?", "!"),
        gap_threshold: int | None = None,
        aggregation: str = DEFAULT_AGGREGATION,
    ) -> list[dict[str, Any]]:
        """Time the characters, words or segments of a clip as NeMo does.

        Args:
            emissions: its tokens.
            level: `char` (one entry per token), `word` or `segment`.
            kind: `ctc`, `rnnt` or `tdt`; default the processor's.
            frame_s: seconds per encoder frame.
            separators: characters that end a segment.
            gap_threshold: frames between words that end a segment.
            aggregation: from token to word and segment confidence: `mean`, `min` or `prod`.

        Returns:
            `{"text", "timestamp": (start, end)}` in seconds, with `"confidence"` where the tokens have one.
        """
        if level not in LEVELS:
            raise ValueError(f"the level of timestamps must be one of {', '.join(LEVELS)}, got {level!r}")
        tokens = emissions.tokens
        pieces = self.tokenizer.convert_ids_to_tokens(tokens)
        spans = char_spans(
            kind or self._decoder_type, emissions, [self._detokenize([t]) for t in tokens], self.punctuation
        )
        if level == "char":
            spans = [
                Span(f" {s.text}" if i and p.startswith(WORD_START) else s.text, s.start, s.end, s.confidence)
                for i, (s, p) in enumerate(zip(spans, pieces, strict=True))
            ]
        else:
            spans = word_spans(spans, tokens, pieces, self._detokenize, self.punctuation, aggregation)
        if level == "segment":
            spans = segment_spans(spans, separators, gap_threshold, aggregation)
        return [as_chunk(span, frame_s or self.frame_s) for span in spans]

    def overall_confidence(self, emissions: Emissions, aggregation: str = DEFAULT_AGGREGATION) -> float | None:
        """Aggregate the confidences of all tokens of a clip; `None` when there are none."""
        return aggregate([Span("", 0, 0, value) for value in emissions.confidence or []], aggregation)

    @property
    def frame_s(self) -> float:
        """Seconds per encoder frame."""
        return float(self.feature_extractor.hop_length * SUBSAMPLING_FACTOR / self.feature_extractor.sampling_rate)

    @cached_property
    def punctuation(self) -> frozenset[str]:
        """Punctuation that the vocabulary can attach to a word."""
        return supported_punctuation(self.tokenizer.get_vocab(), self.blank_token)

    @cached_property
    def _space_before_punctuation(self) -> re.Pattern[str]:
        """A space and the punctuation after it; matches nothing for a vocabulary without punctuation."""
        return re.compile(
            r"\s([" + "".join(map(re.escape, sorted(self.punctuation))) + "])" if self.punctuation else r"(?!)"
        )

    def _tidy(self, text: str) -> str:
        return self._space_before_punctuation.sub(r"\1", text)

    def _detokenize(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, group_tokens=False))


def blank_id(tokenizer: Any, blank_token: str) -> int:
    """Return the id of the blank, which is the pad token where the vocabulary lacks `blank_token`.

    `convert_tokens_to_ids` would return the id of the unknown token for it.
    """
    return int(tokenizer.get_vocab().get(blank_token, tokenizer.pad_token_id))


def model_kind(source: Any, options: dict[str, Any]) -> str | None:
    """Return the kind of head of the model in a folder or Hub repository, None where there is no such configuration.

    Args:
        source: the folder or Hub id.
        options: of `from_pretrained`; those that say where files are count.
    """
    place = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, **place)
    except OSError:
        return None
    kind = str(fields.get("model_type")).removeprefix("parakeet_")
    return kind if kind in ("ctc", "rnnt", "tdt") else None


def as_chunk(span: Span, frame_s: float) -> dict[str, Any]:
    """Turn a span in frames into what the pipeline returns; times are rounded to milliseconds."""
    chunk: dict[str, Any] = {
        "text": span.text,
        "timestamp": (round(span.start * frame_s, 3), round(span.end * frame_s, 3)),
    }
    if span.confidence is not None:
        chunk["confidence"] = span.confidence
    return chunk


__all__ = ["ParakeetProcessor"]
