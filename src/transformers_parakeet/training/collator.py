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
from ..processing_parakeet import SUBSAMPLING_FACTOR
from .clips import get_clip_name, read_clip

logger = logging.get_logger(__name__)

# standard deviation of the noise that NeMo adds to samples in training: parts/preprocessing/features.py
DITHER = 1e-5
# value of padded labels, which losses and metrics ignore
IGNORED_LABEL = -100
# seconds of silence that replace a clip that cannot be read
SILENCE_S = 1


@dataclass(frozen=True)
class Example:
    """One row, ready to be padded to a batch.

    Args:
        features: (T, F) float32 features.
        labels: (U,) token ids; None if the row has no transcript.
    """

    features: Tensor
    labels: Tensor | None


def create_counter() -> Any:
    """Return a 64-bit counter that starts at 0 and is shared with the worker processes of a data loader."""
    return multiprocessing.Value("q", 0)


def increment(counter: Any) -> int:
    """Add 1 to a shared counter and return the new value."""
    with counter.get_lock():
        counter.value += 1
        return int(counter.value)


@dataclass(frozen=True)
class CollatorCounts:
    """Problems that a collator met in the data, summed over all worker processes.

    Args:
        broken_clips: counter of clips that could not be read.
        transcripts_too_long: counter of transcripts with more tokens than CTC can align to the frames of the clip.
        transcripts_with_unknown_characters: counter of transcripts with characters that the vocabulary lacks.
    """

    broken_clips: Any = field(default_factory=create_counter)
    transcripts_too_long: Any = field(default_factory=create_counter)
    transcripts_with_unknown_characters: Any = field(default_factory=create_counter)

    def as_dict(self) -> dict[str, int]:
        """Return the counts that are not 0, by name."""
        return {name: counter.value for name, counter in vars(self).items() if counter.value}


@dataclass(frozen=True)
class SpeechCollator:
    """Turns rows into a padded batch of features and labels.

    A row has `audio`, anything that `load_audio` takes, optionally with `offset` and `duration` in seconds to select an
    excerpt; or precomputed `input_features` (T, F). It has a transcript as `text`, or precomputed `labels`, or neither.

    Args:
        processor: a `ParakeetProcessor`.
        dither: standard deviation of the noise added to the samples; use 0 for evaluation.
        seed: seed of that noise.
        skip_broken: whether to skip a clip that cannot be read, with a warning. If False, it raises an error.
        keep_size: whether to replace a skipped clip by a second of silence with an empty transcript, so that the batch
            keeps its size. Processes that gather the results of an evaluation need batches of the same size.
        ctc: whether the model has a CTC loss. If so, transcripts that are too long for it are counted, because it
            counts them as zero. None means that the processor decides.
        counts: counters of the problems met.
    """

    processor: Any
    dither: float = DITHER
    seed: int = 0
    skip_broken: bool = False
    keep_size: bool = False
    ctc: bool | None = None
    counts: CollatorCounts = field(default_factory=CollatorCounts)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Build a batch.

        Args:
            rows: rows with `audio` or `input_features`, and `text`, `labels` or neither, see the class.

        Returns:
            `input_features` (B, T, F), `attention_mask` (B, T), and `labels` (B, U) padded with -100 if every row has
            a transcript. A batch without a readable clip consists of one second of silence.

        Raises:
            AudioError: a clip cannot be read, is shorter than one frame, or has samples that are not finite. The
                message names the clip.
        """
        examples: list[Example] = []
        for position, row in enumerate(rows):
            example = self._encode_row(row, position)
            if example is not None:
                examples.append(example)
            elif self.keep_size:
                examples.append(self._encode_silence())
        if not examples:
            logger.warning("No clip of a batch could be read: a second of silence replaces the batch.")
            examples.append(self._encode_silence())
        return pad_examples(examples)

    def _encode_row(self, row: Mapping[str, Any], position: int) -> Example | None:
        """Convert a row to features and labels.

        Args:
            row: has `audio` or precomputed `input_features` (T, F), and `text`, precomputed `labels`, or neither.
            position: position of the row in the batch, for messages.

        Returns:
            The example; None for a clip that cannot be read and is skipped.

        Raises:
            AudioError: the clip cannot be read and must not be skipped.
        """
        # precomputed labels replace the transcript
        texts = [row["text"]] if "text" in row and "labels" not in row else None
        if "input_features" in row:
            features = torch.as_tensor(np.asarray(row["input_features"]), dtype=torch.float32)
            labels = self._tokenize(texts)
        else:
            samples = self._read_samples(row, position)
            if samples is None:
                return None
            features, labels = self._process(dither(samples, self.dither, self.seed), texts)
        if texts is not None and labels is not None:
            self._warn_about_unknown_characters(labels, texts[0])
        if "labels" in row:
            labels = torch.tensor([label for label in row["labels"] if label >= 0], dtype=torch.long)
        example = Example(features, labels)
        self._warn_about_ctc_length(example, row, position)
        return example

    def _tokenize(self, texts: list[str] | None) -> Tensor | None:
        """Return the (U,) token ids of the transcript of a row with precomputed features.

        Args:
            texts: the transcript in a list of length 1; None without a transcript, which gives None.
        """
        if texts is None:
            return None
        token_ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return torch.tensor(token_ids[0], dtype=torch.long)

    def _process(self, samples: npt.NDArray[np.float32], texts: list[str] | None) -> tuple[Tensor, Tensor | None]:
        """Run the processor on one clip and its transcript.

        The clip is processed alone, so that its features do not depend on the other clips of the batch: in a padded
        batch, sums over frames are rounded differently.

        Args:
            samples: (S,) float32 samples at the sampling rate of the model.
            texts: the transcript in a list of length 1; None without a transcript.

        Returns:
            (T, F) features, and (U,) token ids or None.
        """
        sampling_rate = self.processor.feature_extractor.sampling_rate
        inputs = self.processor([samples], text=texts, sampling_rate=sampling_rate)
        # `decoder_input_ids` serve programs written for stock transformers: our models derive them from the labels
        features = inputs["input_features"][0][inputs["attention_mask"][0].bool()]
        return features, None if texts is None else inputs["labels"][0]

    def _encode_silence(self) -> Example:
        """Return a second of silence with an empty transcript."""
        samples = np.zeros(SILENCE_S * self.processor.feature_extractor.sampling_rate, np.float32)
        features, labels = self._process(samples, [""])
        return Example(features, labels)

    def _read_samples(self, row: Mapping[str, Any], position: int) -> npt.NDArray[np.float32] | None:
        """Read the samples of a clip; return None, with a warning, if it is broken and may be skipped.

        Args:
            row: has `audio`, and optionally `offset` and `duration`.
            position: position of the row in the batch, for messages.

        Returns:
            (S,) float32 samples at the sampling rate of the model.

        Raises:
            AudioError: the clip is broken and must not be skipped.
        """
        extractor = self.processor.feature_extractor
        try:
            samples = read_clip(row, extractor.sampling_rate)
            if len(samples) < extractor.hop_length:
                raise AudioError(
                    f"a training clip must have at least {extractor.hop_length} samples, one frame, got {len(samples)}"
                )
        except (OSError, ValueError) as error:
            name = get_clip_name(row, position)
            # most messages already name the file
            message = str(error) if name in str(error) else f"{name}: {error}"
            if not self.skip_broken:
                raise AudioError(f"{message}; correct or remove the clip, or set `skip_broken`") from error
            action = "replaced by a second of silence" if self.keep_size else "skipped"
            logger.warning(f"{message}: {action} ({increment(self.counts.broken_clips)} so far)")
            return None
        return samples

    def _warn_about_unknown_characters(self, labels: Tensor, text: str) -> None:
        """Count a transcript with characters that the vocabulary lacks, and warn about the first such transcript.

        Args:
            labels: (U,) token ids of the transcript; they contain the unknown token if a character is missing.
            text: the transcript.
        """
        tokenizer = self.processor.tokenizer
        if tokenizer.unk_token_id not in labels.tolist():
            return
        if increment(self.counts.transcripts_with_unknown_characters) == 1:
            logger.warning(
                f"A transcript has characters that the vocabulary lacks, which become {tokenizer.unk_token}: {text!r}. "
                "Change the transcripts (lower case? digits?) or extend the vocabulary. Further transcripts are only "
                "counted, in the log as `transcripts_with_unknown_characters`."
            )

    def _warn_about_ctc_length(self, example: Example, row: Mapping[str, Any], position: int) -> None:
        """Count and name a transcript that is too long for a CTC loss.

        Args:
            example: features and labels of the row.
            row: the row, for the name of the clip.
            position: position of the row in the batch.
        """
        has_ctc_loss = self.ctc
        if has_ctc_loss is None:
            has_ctc_loss = self.processor._decoder_type == "ctc"
        if not has_ctc_loss or example.labels is None:
            return
        required_frames = count_ctc_frames(example.labels)
        encoder_frames = -(-len(example.features) // SUBSAMPLING_FACTOR)
        if required_frames > encoder_frames:
            num_warnings = increment(self.counts.transcripts_too_long)
            logger.warning(
                f"{get_clip_name(row, position)}: the transcript needs {required_frames} frames and the clip has "
                f"{encoder_frames}: a CTC loss counts it as zero ({num_warnings} so far). With a larger vocabulary "
                "transcripts have fewer tokens."
            )


def count_ctc_frames(labels: Tensor) -> int:
    """Return the smallest number of frames to which CTC can align labels.

    CTC needs one frame per label, and one for the blank between two equal labels.

    Args:
        labels: (U,) token ids.
    """
    repetitions = int((labels[1:] == labels[:-1]).sum())
    return len(labels) + repetitions


def pad_examples(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pad examples to a batch.

    Args:
        examples: at least one example.

    Returns:
        `input_features` (B, T, F) padded with 0, `attention_mask` (B, T), and `labels` (B, U) padded with -100 if all
        examples have labels. U is at least 1, also if all transcripts are empty.
    """
    frame_lengths = torch.tensor([len(example.features) for example in examples])
    features = torch.nn.utils.rnn.pad_sequence([example.features for example in examples], batch_first=True)
    batch = {"input_features": features, "attention_mask": torch.arange(features.shape[1]) < frame_lengths[:, None]}
    labels = [example.labels for example in examples if example.labels is not None]
    if len(labels) == len(examples):
        batch["labels"] = torch.full((len(labels), max(1, *map(len, labels))), IGNORED_LABEL)
        for target, ids in zip(batch["labels"], labels, strict=True):
            target[: len(ids)] = ids
    return batch


__all__ = ["SpeechCollator"]
