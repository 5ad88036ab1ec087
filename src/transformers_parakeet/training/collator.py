"""Turn rows of a speech dataset into padded batches for training.

`ParakeetProcessor` converts audio and text to features and token ids; `clips.py` reads the audio of a row.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.utils import logging

from ..audio import AudioError
from ..augmentation import dither
from ..decoding import count_ctc_frames
from .clips import get_clip_name, read_clip

logger = logging.get_logger(__name__)

# standard deviation of the noise that NeMo adds to waveforms in training: parts/preprocessing/features.py
DITHER = 1e-5
# padding value of labels; losses and metrics ignore labels with this value
IGNORED_LABEL = -100
# seconds of silence that replace a clip that cannot be read
SILENCE_S = 1


@dataclass(frozen=True)
class Example:
    """Unpadded features and labels of one dataset row.

    Args:
        features: (T, F) float32 log-mel features.
        labels: (U,) token ids of the transcript; None if the row has no transcript.
    """

    features: Tensor
    labels: Tensor | None


def create_counter() -> Any:
    """Create a 64-bit counter that the worker processes of a data loader share; its initial value is 0."""
    return multiprocessing.Value("q", 0)


def increment(counter: Any) -> int:
    """Add 1 to a shared counter and return the new value.

    Args:
        counter: counter that `create_counter` returned.
    """
    with counter.get_lock():
        counter.value += 1
        return int(counter.value)


@dataclass(frozen=True)
class CollatorCounts:
    """Counters of data problems found by a collator, shared by all worker processes of the data loader.

    Args:
        broken_clips: counter of clips that could not be read.
        transcripts_too_long: counter of transcripts with more tokens than CTC can align to the frames of the clip.
        transcripts_with_unknown_characters: counter of transcripts with characters that are not in the vocabulary.
    """

    broken_clips: Any = field(default_factory=create_counter)
    transcripts_too_long: Any = field(default_factory=create_counter)
    transcripts_with_unknown_characters: Any = field(default_factory=create_counter)

    def as_dict(self) -> dict[str, int]:
        """Return the nonzero counts as a mapping from name to count."""
        return {name: counter.value for name, counter in vars(self).items() if counter.value}


@dataclass(frozen=True)
class SpeechCollator:
    """Collates dataset rows into a padded batch of features and labels.

    A row has either `audio` (any source that `load_audio` accepts) or precomputed `input_features` (T, F). The optional
    fields `offset` and `duration` in seconds select an excerpt of `audio`. The transcript is optional, and is either
    `text` or precomputed `labels`.

    Args:
        processor: a `ParakeetProcessor`.
        dither: standard deviation of the noise added to the waveforms; use 0 for evaluation.
        seed: random seed of the dither.
        skip_broken: whether to skip clips that cannot be read, with a warning. If False, such a clip raises an error.
        keep_size: whether to replace each skipped clip with one second of silence and an empty transcript. This keeps
            the batch size constant, which distributed evaluation needs to gather the results of all processes.
        ctc: whether the model has a CTC loss. If True, transcripts that are too long for CTC are counted, because their
            CTC loss is set to zero. None means True if the decoder type of the processor is CTC.
        counts: counters of data problems.
    """

    processor: Any
    dither: float = DITHER
    seed: int = 0
    skip_broken: bool = False
    keep_size: bool = False
    ctc: bool | None = None
    counts: CollatorCounts = field(default_factory=CollatorCounts)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows into a padded batch.

        Args:
            rows: rows with `audio` or `input_features`, and optionally `text` or `labels`.

        Returns:
            `input_features` (B, T, F), `attention_mask` (B, T), and, if every row has a transcript, `labels` (B, U)
            padded with -100. If all clips were skipped, the batch contains one second of silence.

        Raises:
            AudioError: a clip cannot be read, is shorter than one frame, or has non-finite samples, and `skip_broken`
                is False. The message names the clip.
        """
        examples: list[Example] = []
        for position, row in enumerate(rows):
            example = self._encode_row(row, position)
            if example is not None:
                examples.append(example)
            elif self.keep_size:
                examples.append(self._encode_silence())
        if not examples:
            logger.warning("No clip of a batch could be read: the batch is replaced with one second of silence.")
            examples.append(self._encode_silence())
        return pad_examples(examples)

    def _encode_row(self, row: Mapping[str, Any], position: int) -> Example | None:
        """Compute the features and labels of one dataset row.

        Args:
            row: dataset row with `audio` or precomputed `input_features` (T, F), and optionally `text` or precomputed
                `labels`.
            position: zero-based position of the row in the batch, used in messages.

        Returns:
            The features and labels; None if the clip was skipped because it could not be read.

        Raises:
            AudioError: the clip cannot be read, and `skip_broken` is False.
            ValueError: `text` is not a string.
        """
        transcript = get_transcript(row, position)
        if "input_features" in row:
            features = torch.as_tensor(np.asarray(row["input_features"]), dtype=torch.float32)
            labels = self._tokenize(transcript)
        else:
            samples = self._read_samples(row, position)
            if samples is None:
                return None
            features, labels = self._process_clip(dither(samples, self.dither, self.seed), transcript)
        if transcript is not None and labels is not None:
            self._warn_about_unknown_characters(labels, transcript)
        if "labels" in row:
            # negative values are padding
            labels = torch.tensor([label for label in row["labels"] if label >= 0], dtype=torch.long)
        example = Example(features, labels)
        self._warn_about_ctc_length(example, row, position)
        return example

    def _tokenize(self, transcript: str | None) -> Tensor | None:
        """Convert a transcript to (U,) token ids; return None if the transcript is None."""
        if transcript is None:
            return None
        token_ids = self.processor.tokenizer(transcript, add_special_tokens=False)["input_ids"]
        return torch.tensor(token_ids, dtype=torch.long)

    def _process_clip(self, samples: npt.NDArray[np.float32], transcript: str | None) -> tuple[Tensor, Tensor | None]:
        """Run the processor on one clip and its transcript.

        The clip is processed without padding, because padding changes the floating-point rounding of sums over frames.
        The features therefore do not depend on the other clips in the batch.

        Args:
            samples: (S,) float32 samples at the sampling rate of the model.
            transcript: transcript of the clip; None if it is unknown.

        Returns:
            (T, F) features of the valid frames, and (U,) token ids; None in place of the token ids if `transcript` is
            None.
        """
        sampling_rate = self.processor.feature_extractor.sampling_rate
        transcripts = None if transcript is None else [transcript]
        # the processor also returns `decoder_input_ids` for transducers, which are dropped here, because the models of
        # this package derive them from the labels
        inputs = self.processor([samples], text=transcripts, sampling_rate=sampling_rate)
        features = inputs["input_features"][0][inputs["attention_mask"][0].bool()]
        return features, None if transcript is None else inputs["labels"][0]

    def _encode_silence(self) -> Example:
        """Compute the features of one second of silence, with an empty transcript."""
        samples = np.zeros(SILENCE_S * self.processor.feature_extractor.sampling_rate, np.float32)
        features, labels = self._process_clip(samples, "")
        return Example(features, labels)

    def _read_samples(self, row: Mapping[str, Any], position: int) -> npt.NDArray[np.float32] | None:
        """Read the samples of a clip; warn about a clip that cannot be read, and count it.

        Args:
            row: dataset row with `audio`, and optionally `offset` and `duration` in seconds.
            position: zero-based position of the row in the batch, used in messages.

        Returns:
            (S,) float32 samples at the sampling rate of the model; None if the clip cannot be read and `skip_broken` is
            True.

        Raises:
            AudioError: the clip cannot be read or is shorter than one frame, and `skip_broken` is False.
        """
        extractor = self.processor.feature_extractor
        try:
            samples = read_clip(row, extractor.sampling_rate)
            if len(samples) < extractor.hop_length:
                raise AudioError(
                    f"a training clip must have at least {extractor.hop_length} samples (one frame), got {len(samples)}"
                )
        except (OSError, ValueError) as error:
            name = get_clip_name(row, position)
            # most error messages already contain the name of the file
            message = str(error) if name in str(error) else f"{name}: {error}"
            if not self.skip_broken:
                raise AudioError(f"{message}; correct or remove the clip, or set `skip_broken`") from error
            action = "replaced with one second of silence" if self.keep_size else "skipped"
            logger.warning(f"{message}: {action} ({increment(self.counts.broken_clips)} so far)")
            return None
        return samples

    def _warn_about_unknown_characters(self, labels: Tensor, text: str) -> None:
        """Count a transcript that has characters outside the vocabulary, and warn about the first such transcript.

        Args:
            labels: (U,) token ids of the transcript. The tokenizer replaces characters outside the vocabulary with the
                unknown token.
            text: the transcript.
        """
        tokenizer = self.processor.tokenizer
        if tokenizer.unk_token_id not in labels.tolist():
            return
        if increment(self.counts.transcripts_with_unknown_characters) == 1:
            logger.warning(
                f"A transcript has characters outside the vocabulary, which become {tokenizer.unk_token}: {text!r}. "
                "Change the transcripts (check for upper case and digits) or extend the vocabulary. Further such "
                "transcripts are only counted, as `transcripts_with_unknown_characters` in the training log."
            )

    def _warn_about_ctc_length(self, example: Example, row: Mapping[str, Any], position: int) -> None:
        """Count a transcript that is too long for the CTC loss, and warn about it.

        Args:
            example: features and labels of the row.
            row: dataset row, used for the name of the clip in the warning.
            position: zero-based position of the row in the batch, used in the warning.
        """
        has_ctc_loss = self.ctc
        if has_ctc_loss is None:
            has_ctc_loss = self.processor._decoder_type == "ctc"
        if not has_ctc_loss or example.labels is None:
            return
        required_frames = count_ctc_frames(example.labels.tolist())
        encoder_frames = -(-len(example.features) // self.processor.subsampling_factor)
        if required_frames > encoder_frames:
            num_too_long = increment(self.counts.transcripts_too_long)
            logger.warning(
                f"{get_clip_name(row, position)}: the transcript needs {required_frames} encoder frames, and the clip "
                f"has only {encoder_frames}: its CTC loss is set to zero ({num_too_long} so far). A larger vocabulary "
                "would give fewer tokens per transcript."
            )


def get_transcript(row: Mapping[str, Any], position: int) -> str | None:
    """Return the transcript of a dataset row.

    Args:
        row: dataset row, optionally with `text` or precomputed `labels`.
        position: zero-based position of the row in the batch, used in the error message.

    Returns:
        The value of `text`; None if the row has no `text`, or has `labels`, which take precedence.

    Raises:
        ValueError: `text` is not a string.
    """
    if "text" not in row or "labels" in row:
        return None
    transcript = row["text"]
    if not isinstance(transcript, str):
        name = get_clip_name(row, position)
        # the content of the dataset is invalid, not the type of an argument, so this is not a TypeError
        raise ValueError(  # noqa: TRY004
            f"{name}: `text` must be a string, got {type(transcript).__name__}: correct or remove the row"
        )
    return transcript


def pad_examples(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pad the features and labels of examples, and stack them to a batch.

    Args:
        examples: one or more examples.

    Returns:
        `input_features` (B, T, F) padded with 0; `attention_mask` (B, T), True for valid frames; and, if all examples
        have labels, `labels` (B, U) padded with -100. U is at least 1, even if all transcripts are empty.
    """
    frame_lengths = torch.tensor([len(example.features) for example in examples])
    features = torch.nn.utils.rnn.pad_sequence([example.features for example in examples], batch_first=True)
    batch = {"input_features": features, "attention_mask": torch.arange(features.shape[1]) < frame_lengths[:, None]}
    labels = [example.labels for example in examples if example.labels is not None]
    if len(labels) == len(examples):
        batch["labels"] = torch.full((len(labels), max(1, *map(len, labels))), IGNORED_LABEL)
        for padded_labels, example_labels in zip(batch["labels"], labels, strict=True):
            padded_labels[: len(example_labels)] = example_labels
    return batch


__all__ = ["SpeechCollator"]
