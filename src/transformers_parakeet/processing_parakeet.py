"""The processor: converts audio and transcripts to a batch, and decoded tokens to text, times and confidence.

`feature_extraction_parakeet.py` computes the features, `timestamps.py` the start and end frames.
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

from .configuration_parakeet import SUBSAMPLING_FACTOR, get_head_type
from .decoding import Hypotheses
from .processing_search import SearchInputsMixin
from .timestamps import (
    DEFAULT_AGGREGATION,
    EmittedTokens,
    Span,
    aggregate_confidence,
    collect_emitted_tokens,
    compute_token_spans,
    find_supported_punctuation,
    group_into_segments,
    group_into_words,
)
from .tokenization_parakeet import BLANK, WORD_START

HEAD_TYPES = ("ctc", "rnnt", "tdt")

TIMESTAMP_LEVELS = ("char", "word", "segment")

# arguments of `from_pretrained` that control how files are located and downloaded
HUB_OPTION_NAMES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

DEFAULT_KWARGS: dict[str, dict[str, Any]] = {
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

    _defaults = DEFAULT_KWARGS


# `ProcessorMixin` must be the first base class, because tests of transformers compare a processor with it
class ParakeetProcessor(ProcessorMixin, SearchInputsMixin):
    """Prepares audio and transcripts for a model, and converts decoded tokens to text, times and confidence.

    Args:
        feature_extractor: a `ParakeetFeatureExtractor`.
        tokenizer: a `ParakeetTokenizer`.
        blank_token: the blank in the vocabulary of a transducer. In a CTC vocabulary the pad token is the blank.
        decoder_type: type of the model's head: `"ctc"`, `"rnnt"` or `"tdt"`. If it is `None`, `from_pretrained` reads
            it from the model config in the same folder. Without a model config, a vocabulary with `blank_token` means
            TDT and a vocabulary without it means CTC.
        subsampling_factor: number of mel frames per encoder frame. If it is `None`, `from_pretrained` reads it from the
            model config in the same folder. Without a model config, it is 8, as in all released checkpoints.
    """

    valid_processor_kwargs = ParakeetProcessorKwargs

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        blank_token: str = BLANK,
        decoder_type: str | None = None,
        subsampling_factor: int | None = None,
    ) -> None:
        self.blank_token = blank_token
        self.blank_token_id = find_blank_id(tokenizer, blank_token)
        self.decoder_type = decoder_type
        self.subsampling_factor = subsampling_factor or SUBSAMPLING_FACTOR
        super().__init__(feature_extractor, tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a processor from a folder or the Hub.

        If the processor config has no `decoder_type`, or no `subsampling_factor` other than 8, take it from the model
        config in the same folder.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository on the Hub.
            *args: further positional arguments of transformers' `from_pretrained`.
            **kwargs: further keyword arguments of transformers' `from_pretrained`.

        Returns:
            The processor. With `return_unused_kwargs=True`, a tuple `(processor, unused_kwargs)`.
        """
        # the base class pops arguments from its own copy, so `kwargs` is still complete below
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # with `return_unused_kwargs=True`, `loaded` is a tuple
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        if processor.decoder_type is None or processor.subsampling_factor == SUBSAMPLING_FACTOR:
            decoder_type, factor = read_model_config(pretrained_model_name_or_path, kwargs)
            processor.decoder_type = processor.decoder_type or decoder_type
            processor.subsampling_factor = factor or processor.subsampling_factor
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the processor config; a usual subsampling factor is none, as in stock transformers."""
        fields = super().to_dict()
        if fields.get("subsampling_factor") == SUBSAMPLING_FACTOR:
            del fields["subsampling_factor"]
        return fields

    @property
    def _decoder_type(self) -> str:
        """Type of the model's head: `decoder_type` if it is set, else TDT for a vocabulary with the blank, else CTC."""
        if self.decoder_type is not None:
            return self.decoder_type
        return "tdt" if self.blank_token in self.tokenizer.get_vocab() else "ctc"

    @property
    def model_input_names(self) -> list[str]:
        """Names of all model inputs that a call of the processor can return."""
        decoder_names = [] if self._decoder_type == "ctc" else ["decoder_input_ids"]
        return [*self.feature_extractor.model_input_names, "labels", *decoder_names]

    def __call__(self, audio: Any, text: Any = None, sampling_rate: int | None = None, **kwargs: Any) -> BatchFeature:
        """Prepare audio for a model, together with its transcripts for training.

        Args:
            audio: one clip or a list of clips, see `ParakeetFeatureExtractor`. A 2-D array is one clip with channels.
            text: the transcript of the clip, or a list of one transcript per clip; `None` for inference.
            sampling_rate: sampling rate of the audio in Hz; `None` for the sampling rate of the model.
            **kwargs: arguments of the feature extractor and the tokenizer.

        Returns:
            `input_features` (B, T, F) and `attention_mask` (B, T). With `text`, also `labels` (B, U), padded with the
            pad token. For transducers, also `decoder_input_ids` (B, U + 1): the blank, then the labels. Programs for
            stock transformers use `decoder_input_ids`; the models of this package derive them from the labels.

        Raises:
            ValueError: `sampling_rate` differs from the sampling rate of the model, or the numbers of clips and
                transcripts differ.
        """
        merged_kwargs = self._merge_kwargs(
            ParakeetProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        if isinstance(audio, (np.ndarray, Tensor)):
            audio = [audio] if audio.ndim <= 2 else list(audio)
        batch = self.feature_extractor(audio, **{**merged_kwargs["audio_kwargs"], "sampling_rate": sampling_rate})
        if text is not None:
            transcripts = [text] if isinstance(text, str) else list(text)
            num_clips = len(batch["input_features"])
            batch.update(self._tokenize_transcripts(transcripts, num_clips, merged_kwargs["text_kwargs"]))
        return batch

    def _tokenize_transcripts(
        self, transcripts: list[str], num_clips: int, text_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Tokenize the transcripts of a batch.

        Args:
            transcripts: the transcript of each clip.
            num_clips: number of clips in the batch.
            text_kwargs: arguments of the tokenizer.

        Returns:
            `labels` (B, U), and for a transducer also `decoder_input_ids` (B, U + 1): the blank, then the labels.

        Raises:
            ValueError: the numbers of clips and transcripts differ.
        """
        if len(transcripts) != num_clips:
            raise ValueError(f"every clip needs a transcript, got {num_clips} clips and {len(transcripts)} transcripts")
        labels = self.tokenizer(transcripts, **text_kwargs)["input_ids"]
        if not isinstance(labels, Tensor):
            # with `return_tensors=None` the labels are lists, and `decoder_input_ids` are not built
            return {"labels": labels}
        # the tokenizer returns floats if all transcripts are empty
        labels = labels.long()
        if self._decoder_type == "ctc":
            return {"labels": labels}
        blanks = torch.full((len(labels), 1), self.blank_token_id)
        return {"labels": labels, "decoder_input_ids": torch.cat([blanks, labels], dim=1)}

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Decode a batch of generated sequences to text.

        Repeats are merged for CTC and kept for transducers. In a hybrid model, CTC output is recognised by
        its tensor type `CTCTokens`. A list loses this type, so pass `group_tokens=True` with a list to merge repeats.

        Args:
            sequences: (B, sequence length) token ids from `generate`.
            **kwargs: arguments of the tokenizer.

        Returns:
            The text of each sequence.
        """
        sequences, kwargs = self._prepare_decoding(sequences, kwargs)
        return [self._join_punctuation(text) for text in self.tokenizer.batch_decode(sequences, **kwargs)]

    def decode(self, token_ids: Any, *, durations: Tensor | None = None, **kwargs: Any) -> Any:
        """Decode one or several generated sequences to text, and optionally compute the times of the tokens.

        Args:
            token_ids: (sequence length,) or (B, sequence length) token ids from `generate`.
            durations: number of frames that each step of a transducer advances, same shape as `token_ids`; `None` to
                return only the text.
            **kwargs: arguments of the tokenizer, and `subsampling_factor`, which replaces that of the processor.

        Returns:
            The text, or a list of texts for a batch. With `durations`, a tuple `(text, times)`: the times of a sequence
            are a list of `{"token", "start", "end"}` in seconds, and a list of such lists for a batch.
        """
        if durations is not None:
            # only transducers have durations, and a repeated token of a transducer was emitted twice
            kwargs.setdefault("group_tokens", False)
        factor = kwargs.pop("subsampling_factor", self.subsampling_factor)
        sequences, kwargs = self._prepare_decoding(token_ids, kwargs)
        decoded = self.tokenizer.decode(sequences, **kwargs)
        if isinstance(decoded, str):
            text: Any = self._join_punctuation(decoded)
        else:
            text = [self._join_punctuation(sequence_text) for sequence_text in decoded]
        if durations is None:
            return text
        step_tokens, step_durations = torch.as_tensor(sequences), torch.as_tensor(durations)
        if step_tokens.ndim == 1:
            return text, self._compute_token_times(step_tokens.tolist(), step_durations.tolist(), factor)
        times = [
            self._compute_token_times(sequence_tokens, sequence_durations, factor)
            for sequence_tokens, sequence_durations in zip(step_tokens.tolist(), step_durations.tolist(), strict=True)
        ]
        return text, times

    def _prepare_decoding(self, sequences: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Set the tokenizer argument `group_tokens`, so repeats are merged for CTC and kept for transducers.

        Args:
            sequences: generated token ids; a tensor from the CTC head of a hybrid has the type `CTCTokens`, which has
                the attribute `decoder_type`.
            kwargs: arguments of the tokenizer; `group_tokens` in `kwargs` has priority.

        Returns:
            The sequences, in which the blank of a hybrid's CTC head is replaced by the pad token, and the arguments.
        """
        first_sequence = sequences[0] if isinstance(sequences, (list, tuple)) and len(sequences) else sequences
        sequence_head_type = getattr(first_sequence, "decoder_type", None)
        head_type = sequence_head_type or self._decoder_type
        kwargs = {"group_tokens": head_type == "ctc", **kwargs}
        if sequence_head_type == "ctc" and isinstance(sequences, Tensor):
            # after merging repeats, the tokenizer removes pad tokens, but not the blank of a hybrid
            sequences = sequences.masked_fill(sequences == self.blank_token_id, self.tokenizer.pad_token_id)
        return sequences, kwargs

    def _compute_token_times(
        self, step_tokens: list[int], durations: list[int], subsampling_factor: int
    ) -> list[dict[str, Any]]:
        """Compute the times of the tokens of one generated sequence, in the format of stock transformers.

        Args:
            step_tokens: label or blank of every step, then padding.
            durations: number of frames that every step advances.
            subsampling_factor: number of mel frames per encoder frame.

        Returns:
            `{"token", "start", "end"}` in seconds for every token with text.
        """
        ignored_ids = {self.tokenizer.pad_token_id, self.blank_token_id}
        emitted_tokens = collect_emitted_tokens(step_tokens, durations, ignored_ids)
        # only transducers have durations: treat the steps as TDT if the processor belongs to a CTC model
        head_type = "tdt" if self._decoder_type == "ctc" else self._decoder_type
        frame_duration_s = self._get_frame_duration_s(subsampling_factor)
        times = []
        for chunk in self.chunks(emitted_tokens, "char", head_type, frame_duration_s):
            if chunk["text"]:
                start, end = chunk["timestamp"]
                times.append({"token": chunk["text"], "start": start, "end": end})
        return times

    def to_text(self, emitted_tokens: EmittedTokens) -> str:
        """Convert the tokens of a clip to text as NeMo does, without a space before punctuation.

        Args:
            emitted_tokens: the tokens of the clip.

        Returns:
            The text of the clip.
        """
        return self._join_punctuation(self._ids_to_text(emitted_tokens.tokens))

    def chunks(
        self,
        emitted_tokens: EmittedTokens,
        level: str,
        head_type: str | None = None,
        frame_duration_s: float | None = None,
        separators: Any = (".", "?", "!"),
        gap_threshold: int | None = None,
        aggregation: str = DEFAULT_AGGREGATION,
    ) -> list[dict[str, Any]]:
        """Compute text, times and confidence of the tokens, words or segments of a clip as NeMo does.

        Args:
            emitted_tokens: the tokens of the clip.
            level: `"char"` (one entry per token), `"word"` or `"segment"`.
            head_type: `"ctc"`, `"rnnt"` or `"tdt"`; `None` for the `decoder_type` of the processor.
            frame_duration_s: seconds per encoder frame; `None` for `self.frame_duration_s`.
            separators: characters that end a segment.
            gap_threshold: minimum number of frames between two words that ends a segment; `None` for no threshold.
            aggregation: how to combine the confidences of the tokens: `"mean"`, `"min"` or `"prod"`.

        Returns:
            A list of `{"text", "timestamp": (start, end)}` in seconds, with `"confidence"` if it was requested.

        Raises:
            ValueError: the level or the aggregation is unknown.
        """
        if level not in TIMESTAMP_LEVELS:
            raise ValueError(f"the level of timestamps must be one of {', '.join(TIMESTAMP_LEVELS)}, got {level!r}")
        tokens = emitted_tokens.tokens
        pieces = self.tokenizer.convert_ids_to_tokens(tokens)
        texts = [self._ids_to_text([token]) for token in tokens]
        spans = compute_token_spans(head_type or self._decoder_type, emitted_tokens, texts, self.punctuation)
        if level == "char":
            spans = restore_spaces(spans, pieces)
        else:
            spans = group_into_words(spans, tokens, pieces, self._ids_to_text, self.punctuation, aggregation)
        if level == "segment":
            spans = group_into_segments(spans, separators, gap_threshold, aggregation)
        return [to_chunk(span, frame_duration_s or self.frame_duration_s) for span in spans]

    def overall_confidence(self, emitted_tokens: EmittedTokens, aggregation: str = DEFAULT_AGGREGATION) -> float | None:
        """Combine the confidences of all tokens of a clip to one number.

        Args:
            emitted_tokens: the tokens of the clip.
            aggregation: `"mean"`, `"min"` or `"prod"`.

        Returns:
            The confidence of the clip; `None` if confidence was not requested or the clip has no tokens.

        Raises:
            ValueError: `aggregation` is not one of these.
        """
        # `aggregate_confidence` uses only the confidence of a span
        spans = [Span("", 0, 0, confidence) for confidence in emitted_tokens.confidence or []]
        return aggregate_confidence(spans, aggregation)

    @property
    def frame_duration_s(self) -> float:
        """Seconds per encoder frame."""
        return self._get_frame_duration_s(self.subsampling_factor)

    def _get_frame_duration_s(self, subsampling_factor: int) -> float:
        """Return the seconds per encoder frame.

        Args:
            subsampling_factor: number of mel frames per encoder frame.
        """
        return float(self.feature_extractor.hop_length * subsampling_factor / self.feature_extractor.sampling_rate)

    @cached_property
    def punctuation(self) -> frozenset[str]:
        """Punctuation that the vocabulary can attach to a word."""
        return find_supported_punctuation(self.tokenizer.get_vocab(), self.blank_token)

    @cached_property
    def _space_before_punctuation(self) -> re.Pattern[str]:
        """Pattern of one whitespace character before punctuation, with the punctuation as its first group."""
        if not self.punctuation:
            # never matches; the empty group is the one that the replacement names
            return re.compile(r"(?!)()")
        return re.compile(r"\s([" + "".join(map(re.escape, sorted(self.punctuation))) + "])")

    def _join_punctuation(self, text: str) -> str:
        """Remove the space before punctuation that the vocabulary can attach to a word."""
        return self._space_before_punctuation.sub(r"\1", text)

    def _ids_to_text(self, token_ids: list[int]) -> str:
        """Convert token ids to text without merging repeats."""
        return str(self.tokenizer.decode(token_ids, group_tokens=False))


def to_emitted_tokens(hypotheses: Hypotheses, clip_index: int = 0) -> EmittedTokens:
    """Convert the hypothesis of one clip to Python lists.

    Args:
        hypotheses: the decoded tokens of a batch.
        clip_index: index of the clip in the batch.

    Returns:
        The tokens of the clip with their frames, durations and confidence.
    """
    return EmittedTokens(**hypotheses.to_lists(clip_index))


def find_blank_id(tokenizer: Any, blank_token: str) -> int:
    """Find the id of the blank: the id of `blank_token`, or of the pad token if the vocabulary lacks `blank_token`.

    `convert_tokens_to_ids` is not used, because it returns the id of the unknown token for a missing entry.

    Args:
        tokenizer: a `ParakeetTokenizer`.
        blank_token: the blank in the vocabulary of a transducer.

    Returns:
        The id of the blank.
    """
    return int(tokenizer.get_vocab().get(blank_token, tokenizer.pad_token_id))


def read_model_config(source: Any, pretrained_kwargs: dict[str, Any]) -> tuple[str | None, int | None]:
    """Read the type of the model's head and the subsampling factor from the model config in a folder or Hub repository.

    Args:
        source: the folder, or the id of a repository on the Hub.
        pretrained_kwargs: arguments of `from_pretrained`; only the arguments that control how files are located and
            downloaded are used.

    Returns:
        `"ctc"`, `"rnnt"` or `"tdt"`, and the subsampling factor; both `None` if there is no model config or it is not
        the config of a Parakeet model.
    """
    hub_options = {name: value for name, value in pretrained_kwargs.items() if name in HUB_OPTION_NAMES}
    try:
        config_fields, _ = PreTrainedConfig.get_config_dict(source, **hub_options)
    except OSError:
        return None, None
    # `get_head_type` reads only `model_type`
    head_type = get_head_type(SimpleNamespace(model_type=config_fields.get("model_type")))
    if head_type not in HEAD_TYPES:
        return None, None
    return head_type, (config_fields.get("encoder_config") or {}).get("subsampling_factor")


def restore_spaces(token_spans: list[Span], pieces: list[str]) -> list[Span]:
    """Add a space before the text of every token that starts a word, except before the first token.

    Decoding a single token removes the space at its start.

    Args:
        token_spans: text and frames of each token.
        pieces: vocabulary entry of each token.

    Returns:
        The spans with the new texts, which can be concatenated to the text of the clip.
    """
    spaced_spans = token_spans[:1]
    for span, piece in zip(token_spans[1:], pieces[1:], strict=True):
        text = f" {span.text}" if piece.startswith(WORD_START) else span.text
        spaced_spans.append(Span(text, span.start, span.end, span.confidence))
    return spaced_spans


def to_chunk(span: Span, frame_duration_s: float) -> dict[str, Any]:
    """Convert a span to an entry of the pipeline's `chunks`.

    Args:
        span: text with its start and end frame.
        frame_duration_s: seconds per frame.

    Returns:
        `{"text", "timestamp"}` with times in seconds, rounded to milliseconds, and `"confidence"` if the span has one.
    """
    chunk: dict[str, Any] = {
        "text": span.text,
        "timestamp": (round(span.start * frame_duration_s, 3), round(span.end * frame_duration_s, 3)),
    }
    if span.confidence is not None:
        chunk["confidence"] = span.confidence
    return chunk


__all__ = ["ParakeetProcessor"]
