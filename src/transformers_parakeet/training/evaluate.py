"""Evaluate a speech recognition pipeline on a dataset, for `parakeet evaluate`.

Error rates are computed in `metrics.py`, and `report.py` writes them to a page; evaluation during training is in
`trainer.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..generation_arguments import check_decoder
from .clips import get_clip_name, read_clip
from .metrics import ClipScore, EvaluatedClip, Rate, compute_rates, normalize_text, score_clips


@dataclass(frozen=True)
class Evaluation:
    """The errors and the speed of a model on a dataset.

    Args:
        scores: the errors of each clip, in the order of the dataset.
        rates: error rates with 95 % intervals by name, see `compute_rates`.
        audio_seconds: length of all clips together in seconds.
        processing_seconds: time from reading the first clip to the last hypothesis, in seconds.
    """

    scores: tuple[ClipScore, ...]
    rates: Mapping[str, Rate]
    audio_seconds: float
    processing_seconds: float

    @property
    def real_time_factor(self) -> float:
        """Seconds of processing per second of audio: reading, features, recognition. Below 1 is faster than speech."""
        return self.processing_seconds / self.audio_seconds if self.audio_seconds else math.nan

    def worst_clips(self, count: int) -> list[ClipScore]:
        """Return the clips with the most word errors. Of clips with equally many, shorter references come first.

        Args:
            count: maximum number of clips. Clips without errors are left out.

        Returns:
            The scores of the clips.
        """
        wrong = [score for score in self.scores if score.words.errors]
        return sorted(wrong, key=lambda score: (-score.words.errors, score.words.reference_length))[:count]


def run_evaluation(
    pipe: Any,
    dataset: Any,
    batch_size: int = 8,
    decoder: str | None = None,
    normalize: Callable[[str], str] = normalize_text,
    search: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Transcribe every clip of a dataset, count the errors and measure the time.

    Args:
        pipe: a speech recognition pipeline with a Parakeet model.
        dataset: dataset with the columns `audio` and `text`, as returned by `load_speech`.
        batch_size: number of clips per batch.
        decoder: `"ctc"` for the CTC head of a hybrid model; None for the default decoder of the model.
        normalize: text normalisation that is applied to references and hypotheses before scoring; for the Open ASR
            leaderboard, see `create_english_normalizer`.
        search: arguments of the pipeline for the search, such as `num_beams` and `boost`; None for its defaults.

    Returns:
        The errors and the speed.

    Raises:
        ValueError: the model does not have this decoder, or no reference has a word.
        AudioError: a clip cannot be read.
    """
    check_decoder(pipe.model.config, decoder)
    sampling_rate = pipe.feature_extractor.sampling_rate
    read_rows: list[tuple[str, float, str]] = []

    def read_clips() -> Iterator[dict[str, Any]]:
        """Yield the pipeline input of each clip; append name, duration in seconds and reference to `read_rows`."""
        for position, row in enumerate(dataset):
            samples = read_clip(row, sampling_rate)
            name = get_clip_name(row, position, "dataset")
            read_rows.append((name, len(samples) / sampling_rate, row["text"]))
            yield {"raw": samples, "sampling_rate": sampling_rate}

    arguments = {**(search or {}), **({"decoder": decoder} if decoder else {})}
    start = time.perf_counter()
    # without worker processes, because `read_clips` appends to a list of this process
    outputs = pipe(read_clips(), batch_size=batch_size, num_workers=0, **arguments)
    hypotheses = [output["text"] for output in outputs]
    processing_seconds = time.perf_counter() - start
    clips = [
        EvaluatedClip(name, duration, reference, hypothesis)
        for (name, duration, reference), hypothesis in zip(read_rows, hypotheses, strict=True)
    ]
    scores = score_clips(clips, normalize)
    return Evaluation(scores, compute_rates(scores), sum(clip.duration for clip in clips), processing_seconds)


def evaluate_pipeline(pipe: Any, dataset: Any, batch_size: int = 8, decoder: str | None = None) -> dict[str, Any]:
    """Transcribe every clip of a dataset and compute the error rates; `run_evaluation` also returns intervals.

    Args:
        pipe: a speech recognition pipeline with a Parakeet model.
        dataset: dataset with the columns `audio` and `text`, as returned by `load_speech`.
        batch_size: number of clips per batch.
        decoder: `"ctc"` for the CTC head of a hybrid model; None for the default decoder of the model.

    Returns:
        `wer` (word error rate), `cer` (character error rate), and `clips`, a list with a dict of `reference` and
        `hypothesis` for each clip.

    Raises:
        ValueError: the model does not have this decoder, or no reference has a word.
        AudioError: a clip cannot be read.
    """
    evaluation = run_evaluation(pipe, dataset, batch_size, decoder)
    clips = [{"reference": score.clip.reference, "hypothesis": score.clip.hypothesis} for score in evaluation.scores]
    return {"wer": evaluation.rates["wer"].value, "cer": evaluation.rates["cer"].value, "clips": clips}


__all__ = ["Evaluation", "evaluate_pipeline", "run_evaluation"]
