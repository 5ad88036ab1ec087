"""The processor: turns audio and text into a batch, and decoded tokens into text, times and confidence.

Features are computed in `feature_extraction_parakeet.py`, and times in `timestamps.py`.
"""

import re
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from .configuration_parakeet import get_head_type
from .decoding import Hypotheses
from .timestamps import (
    DEFAULT_AGGREGATION,
    Emissions,
    Span,
    aggregate_confidence,
    char_spans,
    segment_spans,
    supported_punctuation,
    transducer_emissions,
    word_spans,
)
from .tokenization_parakeet import BLANK, WORD_START

# kinds of heads
DECODER_TYPES = ("ctc", "rnnt", "tdt")

# levels of timestamps
LEVELS = ("char", "word", "segment")

# arguments of `from_pretrained` that say where files are
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

# mel frames per encoder frame in every released checkpoint
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


# mypy does not analyse transformers and does not know that the base class is a typed dict
class ParakeetProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Default arguments of the feature extractor and the tokenizer."""

    _defaults = DEFAULTS


class ParakeetProcessor(ProcessorMixin):
    """A feature extractor and a tokenizer, and the conversions between them and a model.

    Args:
        feature_extractor: a `ParakeetFeatureExtractor`.
        tokenizer: a `ParakeetTokenizer`.
        blank_token: the blank in the vocabulary of a transducer. The blank of a CTC tokenizer is its pad token.
        decoder_type: `"ctc"`, `"rnnt"` or `"tdt"`. With `None`, `from_pretrained` reads it from the configuration of
            the model in the same folder. If there is none, a vocabulary with the blank belongs to TDT, and one without
            the blank to CTC.
    """

    valid_processor_kwargs = ParakeetProcessorKwargs

    def __init__(
        self, feature_extractor: Any, tokenizer: Any, blank_token: str = BLANK, decoder_type: str | None = None
    ) -> None:
        self.blank_token = blank_token
        self.blank_token_id = find_blank_id(tokenizer, blank_token)
        self.decoder_type = decoder_type
        super().__init__(feature_extractor, tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a processor. If its file has no `decoder_type`, the type is that of the model in the same folder.

        Args:
            pretrained_model_name_or_path: a folder or Hub id.
            *args: further arguments of transformers' `from_pretrained`.
            **kwargs: the same.

        Returns:
            The processor; with `return_unused_kwargs=True` a tuple of it and the unused arguments.
        """
        # the base class removes arguments from its own copy of `kwargs`
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        if processor.decoder_type is None:
            processor.decoder_type = read_decoder_type(pretrained_model_name_or_path, kwargs)
        return loaded

    @property
    def _decoder_type(self) -> str:
        """The type of the model's head; if it is not set, the vocabulary decides: TDT with the blank, else CTC."""
        if self.decoder_type is not None:
            return self.decoder_type
        return "tdt" if self.blank_token in self.tokenizer.get_vocab() else "ctc"

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything that calling the processor may return."""
        decoder_names = [] if self._decoder_type == "ctc" else ["decoder_input_ids"]
        return [*self.feature_extractor.model_input_names, "labels", *decoder_names]

    def __call__(self, audio: Any, text: Any = None, sampling_rate: int | None = None, **kwargs: Any) -> BatchFeature:
        """Prepare audio for a model, together with its transcripts for training.

        Args:
            audio: one clip or a list of clips, see `ParakeetFeatureExtractor`; a 2-D array is one clip with channels.
            text: the transcript of the clip, or one transcript per clip; `None` without training.
            sampling_rate: sampling rate of the audio in Hz.
            **kwargs: arguments of the feature extractor and the tokenizer.

        Returns:
            `input_features` (B, T, F) and `attention_mask` (B, T). With text also `labels` (B, U), padded with the pad
            token, and for transducers `decoder_input_ids` (B, U + 1), the blank before the labels. Programs written for
            stock transformers expect `decoder_input_ids`; our models derive them from the labels.

        Raises:
            ValueError: the sampling rate is not that of the model, or the numbers of clips and transcripts differ.
        """
        merged = self._merge_kwargs(ParakeetProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if isinstance(audio, (np.ndarray, Tensor)):
            audio = [audio] if audio.ndim <= 2 else list(audio)
        batch = self.feature_extractor(audio, **{**merged["audio_kwargs"], "sampling_rate": sampling_rate})
        if text is not None:
            transcripts = [text] if isinstance(text, str) else list(text)
            batch.update(self._encode_labels(transcripts, len(batch["input_features"]), merged["text_kwargs"]))
        return batch

    def _encode_labels(self, transcripts: list[str], num_clips: int, text_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the `labels` of transcripts, and for a transducer `decoder_input_ids`.

        Args:
            transcripts: one text per clip.
            num_clips: number of clips in the batch.
            text_kwargs: arguments of the tokenizer.
        """
        if len(transcripts) != num_clips:
            raise ValueError(f"every clip needs a transcript, got {num_clips} clips and {len(transcripts)} transcripts")
        labels = self.tokenizer(transcripts, **text_kwargs)["input_ids"]
        if not isinstance(labels, Tensor):
            return {"labels": labels}
        # the tokenizer returns floats if all transcripts are empty
        labels = labels.long()
        if self._decoder_type == "ctc":
            return {"labels": labels}
        blanks = torch.full((len(labels), 1), self.blank_token_id)
        return {"labels": labels, "decoder_input_ids": torch.cat([blanks, labels], dim=1)}

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Decode generated sequences to texts.

        Repeats are merged for CTC and kept for transducers. A tensor that the CTC head of a hybrid generated is
        recognised as such; pass `group_tokens=True` after converting it to a list.

        Args:
            sequences: (B, L) token ids, as `generate` returns them.
            **kwargs: arguments of the tokenizer.

        Returns:
            B texts.
        """
        sequences, kwargs = self._prepare_decoding(sequences, kwargs)
        return [self._join_punctuation(text) for text in self.tokenizer.batch_decode(sequences, **kwargs)]

    def decode(self, token_ids: Any, *, durations: Tensor | None = None, **kwargs: Any) -> Any:
        """Decode generated sequences, and compute the times of their tokens if durations are given.

        Args:
            token_ids: (L,) or (B, L), as `generate` returns them.
            durations: frames that each step of a transducer advances, same shape; `None` for no times.
            **kwargs: arguments of the tokenizer.

        Returns:
            The text or texts. With durations, a tuple of them and, per sequence, a list of `{"token", "start", "end"}`
            in seconds.
        """
        if durations is not None:
            kwargs.setdefault("group_tokens", False)
        sequences, kwargs = self._prepare_decoding(token_ids, kwargs)
        decoded = self.tokenizer.decode(sequences, **kwargs)
        if isinstance(decoded, str):
            text: Any = self._join_punctuation(decoded)
        else:
            text = [self._join_punctuation(row) for row in decoded]
        if durations is None:
            return text
        token_rows, duration_rows = torch.as_tensor(sequences), torch.as_tensor(durations)
        if token_rows.ndim == 1:
            return text, self._token_times(token_rows.tolist(), duration_rows.tolist())
        rows = zip(token_rows.tolist(), duration_rows.tolist(), strict=True)
        return text, [self._token_times(*row) for row in rows]

    def _prepare_decoding(self, sequences: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return sequences and tokenizer arguments such that the tokenizer merges repeats of CTC only.

        Args:
            sequences: token ids; those from the CTC head of a hybrid have the type `CTCTokens`.
            kwargs: arguments of the tokenizer, which have priority.
        """
        first = sequences[0] if isinstance(sequences, (list, tuple)) and len(sequences) else sequences
        kind = getattr(first, "decoder_type", None)
        kwargs = {"group_tokens": (kind or self._decoder_type) == "ctc", **kwargs}
        if kind == "ctc" and isinstance(sequences, Tensor):
            # the tokenizer removes the pad token between repeats, which is the blank of a CTC model
            sequences = sequences.masked_fill(sequences == self.blank_token_id, self.tokenizer.pad_token_id)
        return sequences, kwargs

    def _token_times(self, ids: list[int], durations: list[int]) -> list[dict[str, Any]]:
        """Return `{"token", "start", "end"}` in seconds for every token of a row, as stock transformers does.

        Args:
            ids: label or blank of every step, then padding.
            durations: frames that every step advances.
        """
        emissions = transducer_emissions(ids, durations, {self.tokenizer.pad_token_id, self.blank_token_id})
        # only a transducer has durations
        kind = "tdt" if self._decoder_type == "ctc" else self._decoder_type
        times = []
        for chunk in self.chunks(emissions, "char", kind):
            if chunk["text"]:
                start, end = chunk["timestamp"]
                times.append({"token": chunk["text"], "start": start, "end": end})
        return times

    def to_text(self, emissions: Emissions) -> str:
        """Return the text of tokens as NeMo writes it, without a space before punctuation.

        Args:
            emissions: the tokens of one clip.

        Returns:
            The text.
        """
        return self._join_punctuation(self._detokenize(emissions.tokens))

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
        """Compute the times of the tokens, words or segments of a clip as NeMo does.

        Args:
            emissions: the tokens of the clip.
            level: `"char"` (one entry per token), `"word"` or `"segment"`.
            kind: `"ctc"`, `"rnnt"` or `"tdt"`; `None` for the processor's `decoder_type`.
            frame_s: seconds per encoder frame; `None` for the property `frame_s`.
            separators: characters that end a segment.
            gap_threshold: frames between two words that end a segment; `None` for no such rule.
            aggregation: how words and segments get their confidence: `"mean"`, `"min"` or `"prod"` of the tokens.

        Returns:
            A list of `{"text", "timestamp": (start, end)}` in seconds, with `"confidence"` if the tokens have one.

        Raises:
            ValueError: the level or the aggregation is unknown.
        """
        if level not in LEVELS:
            raise ValueError(f"the level of timestamps must be one of {', '.join(LEVELS)}, got {level!r}")
        tokens = emissions.tokens
        pieces = self.tokenizer.convert_ids_to_tokens(tokens)
        texts = [self._detokenize([token]) for token in tokens]
        spans = char_spans(kind or self._decoder_type, emissions, texts, self.punctuation)
        if level == "char":
            spans = restore_spaces(spans, pieces)
        else:
            spans = word_spans(spans, tokens, pieces, self._detokenize, self.punctuation, aggregation)
        if level == "segment":
            spans = segment_spans(spans, separators, gap_threshold, aggregation)
        return [to_chunk(span, frame_s or self.frame_s) for span in spans]

    def overall_confidence(self, emissions: Emissions, aggregation: str = DEFAULT_AGGREGATION) -> float | None:
        """Aggregate the confidences of all tokens of a clip.

        Args:
            emissions: the tokens of the clip.
            aggregation: `"mean"`, `"min"` or `"prod"`.

        Returns:
            The confidence; `None` if the tokens have none or there are no tokens.

        Raises:
            ValueError: the aggregation is unknown.
        """
        return aggregate_confidence([Span("", 0, 0, value) for value in emissions.confidence or []], aggregation)

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
        """Pattern of one space and the punctuation after it; it matches nothing if there is no punctuation."""
        if not self.punctuation:
            return re.compile(r"(?!)")
        return re.compile(r"\s([" + "".join(map(re.escape, sorted(self.punctuation))) + "])")

    def _join_punctuation(self, text: str) -> str:
        """Remove the space before punctuation that the vocabulary can attach to a word."""
        return self._space_before_punctuation.sub(r"\1", text)

    def _detokenize(self, ids: list[int]) -> str:
        """Return the text of token ids; repeats are kept."""
        return str(self.tokenizer.decode(ids, group_tokens=False))


def to_emissions(hypotheses: Hypotheses, row: int = 0) -> Emissions:
    """Convert one row of decoded tokens to Python lists.

    Args:
        hypotheses: the decoded tokens of a batch.
        row: index of the row.

    Returns:
        The tokens of the row.
    """
    return Emissions(**hypotheses.to_lists(row))


def find_blank_id(tokenizer: Any, blank_token: str) -> int:
    """Return the id of the blank: that of `blank_token`, or of the pad token if the vocabulary has no such entry.

    `convert_tokens_to_ids` cannot be used, because it returns the id of the unknown token for a missing entry.

    Args:
        tokenizer: a `ParakeetTokenizer`.
        blank_token: the blank in the vocabulary of a transducer.

    Returns:
        The id.
    """
    return int(tokenizer.get_vocab().get(blank_token, tokenizer.pad_token_id))


def read_decoder_type(source: Any, options: dict[str, Any]) -> str | None:
    """Read the type of a model's head from the configuration in a folder or Hub repository.

    Args:
        source: the folder or Hub id.
        options: arguments of `from_pretrained`; those that say where files are are used.

    Returns:
        `"ctc"`, `"rnnt"` or `"tdt"`; `None` if there is no configuration of such a model.
    """
    hub_options = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, **hub_options)
    except OSError:
        return None
    kind = get_head_type(SimpleNamespace(model_type=fields.get("model_type")))
    return kind if kind in DECODER_TYPES else None


def restore_spaces(spans: list[Span], pieces: list[str]) -> list[Span]:
    """Put a space before the text of every token that starts a word, except the first token.

    Args:
        spans: one span per token, whose text has lost its space because it was decoded alone.
        pieces: vocabulary entries of the tokens.

    Returns:
        Spans whose joined texts are the text of the clip.
    """
    spaced = spans[:1]
    for span, piece in zip(spans[1:], pieces[1:], strict=True):
        text = f" {span.text}" if piece.startswith(WORD_START) else span.text
        spaced.append(Span(text, span.start, span.end, span.confidence))
    return spaced


def to_chunk(span: Span, frame_s: float) -> dict[str, Any]:
    """Convert a span to an entry of the pipeline's `chunks`.

    Args:
        span: text with its time in frames.
        frame_s: seconds per frame.

    Returns:
        `{"text", "timestamp"}` with times in seconds, rounded to milliseconds, and `"confidence"` if the span has one.
    """
    chunk: dict[str, Any] = {
        "text": span.text,
        "timestamp": (round(span.start * frame_s, 3), round(span.end * frame_s, 3)),
    }
    if span.confidence is not None:
        chunk["confidence"] = span.confidence
    return chunk


__all__ = ["ParakeetProcessor"]
