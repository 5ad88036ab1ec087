"""Normalise transcripts for scoring, count their errors, and compute error rates with confidence intervals.

`ParakeetTrainer` in `trainer.py` generates the token ids, and `evaluate.py` runs a pipeline.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.utils import logging

from ..optional_packages import import_optional

logger = logging.get_logger(__name__)

# number of resampled datasets of a bootstrap interval
BOOTSTRAP_DRAWS = 1000
# percentiles of a 95 % interval
INTERVAL_PERCENTILES = (2.5, 97.5)

# characters that are written in place of an apostrophe: acute and grave accent, quotation marks, modifier letter
APOSTROPHES = str.maketrans(dict.fromkeys("\u00b4`\u2018\u2019\u02bc", "'"))


def normalize_text(text: str) -> str:
    """Normalise a transcript for scoring.

    The text is NFKC-normalised and lower-cased, and punctuation is replaced with spaces. Apostrophes inside words are
    kept.

    Args:
        text: the transcript.

    Returns:
        The normalised words, separated by single spaces.
    """
    # replace apostrophe look-alikes before NFKC, which would split an acute accent into a space and a combining accent
    with_plain_apostrophes = text.translate(APOSTROPHES)
    normalized_text = unicodedata.normalize("NFKC", with_plain_apostrophes).lower()
    characters = [
        # the Unicode categories of punctuation start with P
        " " if unicodedata.category(character).startswith("P") and character != "'" else character
        for character in normalized_text
    ]
    words = [word.strip("'") for word in "".join(characters).split()]
    return " ".join(word for word in words if word)


def create_english_normalizer(spelling_file: str | Path | None = None) -> Callable[[str], str]:
    """Create the English text normalisation of the Open ASR leaderboard, which is that of Whisper.

    It is `EnglishTextNormalizer` of transformers: lower case, no punctuation and diacritics, no filler words ("uh"),
    full forms of contractions, digits for numbers. The leaderboard also maps British to American spellings. The list of
    spellings is not part of transformers: every Whisper checkpoint contains it as `normalizer.json`.

    Args:
        spelling_file: JSON file with an object from British to American spellings; `None` to keep spellings, with a
            warning.

    Returns:
        A function from a transcript to its normalised words, separated by single spaces.

    Raises:
        ValueError: the file is not a JSON object of strings.
    """
    # imported here because only this normalisation needs it
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spellings: Any = {}
    if spelling_file is None:
        logger.warning(
            "British and American spellings count as different words, because no list of spellings was given: for the "
            "rates of the Open ASR leaderboard, pass the file normalizer.json of a Whisper checkpoint."
        )
    else:
        spellings = json.loads(Path(spelling_file).read_text(encoding="utf-8"))
        if not isinstance(spellings, dict) or not all(isinstance(value, str) for value in spellings.values()):
            raise ValueError(
                f"the list of spellings must be a JSON object of strings, got another value in {spelling_file}: pass "
                "the file normalizer.json of a Whisper checkpoint"
            )
    normalizer = EnglishTextNormalizer(spellings)
    return lambda text: str(normalizer(text)).strip()


def error_rates(
    references: Sequence[str], hypotheses: Sequence[str], normalize: Callable[[str], str] = normalize_text
) -> dict[str, float]:
    """Compute the word and character error rates of a set of clips.

    Args:
        references: reference transcript of each clip.
        hypotheses: recognised transcript of each clip.
        normalize: text normalisation that is applied to references and hypotheses before scoring.

    Returns:
        `wer` (word errors per reference word) and `cer` (character errors per reference character), each over all
        clips together.

    Raises:
        ImportError: the package `jiwer` is not installed.
    """
    jiwer = import_optional("jiwer", "the word error rate", "train")
    normalized_references = [normalize(reference) for reference in references]
    normalized_hypotheses = [normalize(hypothesis) for hypothesis in hypotheses]
    return {
        "wer": float(jiwer.wer(normalized_references, normalized_hypotheses)),
        "cer": float(jiwer.cer(normalized_references, normalized_hypotheses)),
    }


@dataclass(frozen=True)
class ErrorCounts:
    """Numbers of equal and wrong words, or characters, in the alignment of a hypothesis with its reference.

    Args:
        hits: number of equal words.
        substitutions: number of reference words for which the hypothesis has another word.
        deletions: number of reference words that the hypothesis lacks.
        insertions: number of hypothesis words that the reference lacks.
    """

    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        """Number of errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_length(self) -> int:
        """Number of words in the reference."""
        return self.hits + self.substitutions + self.deletions


@dataclass(frozen=True)
class AlignedWord:
    """A word of the reference and the word of the hypothesis that is aligned with it.

    Args:
        reference: the word of the reference; `None` for an insertion.
        hypothesis: the word of the hypothesis; `None` for a deletion.
    """

    reference: str | None
    hypothesis: str | None


@dataclass(frozen=True)
class EvaluatedClip:
    """A clip with its reference and hypothesis.

    Args:
        name: name of the clip, such as its path.
        duration: length of the clip in seconds.
        reference: the correct transcript.
        hypothesis: the recognised transcript.
    """

    name: str
    duration: float
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class ClipScore:
    """The errors of one clip.

    Args:
        clip: the clip with its transcripts as they are, not normalised.
        words: word errors after normalisation.
        characters: character errors after normalisation; spaces count.
        alignment: the aligned normalised words.
    """

    clip: EvaluatedClip
    words: ErrorCounts
    characters: ErrorCounts
    alignment: tuple[AlignedWord, ...]


@dataclass(frozen=True)
class Rate:
    """An error rate with its 95 % confidence interval.

    Args:
        value: errors per reference word or character, over all clips together.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


def score_clips(
    clips: Sequence[EvaluatedClip], normalize: Callable[[str], str] = normalize_text
) -> tuple[ClipScore, ...]:
    """Align the hypothesis of each clip with its reference and count the errors.

    Args:
        clips: the clips.
        normalize: text normalisation that is applied to references and hypotheses before scoring.

    Returns:
        One score per clip.

    Raises:
        ImportError: the package `jiwer` is not installed.
    """
    jiwer = import_optional("jiwer", "the word error rate", "train")
    references = [normalize(clip.reference) for clip in clips]
    hypotheses = [normalize(clip.hypothesis) for clip in clips]
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(references, hypotheses)
    return tuple(
        ClipScore(
            clip,
            count_errors(words.alignments[index]),
            count_errors(characters.alignments[index]),
            align_words(words.alignments[index], words.references[index], words.hypotheses[index]),
        )
        for index, clip in enumerate(clips)
    )


def count_errors(alignment: Sequence[Any]) -> ErrorCounts:
    """Count the errors of an alignment.

    Args:
        alignment: the chunks of jiwer. All words of a chunk have the same type.

    Returns:
        The number of hits, substitutions, deletions and insertions.
    """
    counts = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
    for chunk in alignment:
        reference_length = chunk.ref_end_idx - chunk.ref_start_idx
        counts[chunk.type] += reference_length or chunk.hyp_end_idx - chunk.hyp_start_idx
    return ErrorCounts(counts["equal"], counts["substitute"], counts["delete"], counts["insert"])


def align_words(
    alignment: Sequence[Any], reference: Sequence[str], hypothesis: Sequence[str]
) -> tuple[AlignedWord, ...]:
    """Convert an alignment to pairs of words.

    Args:
        alignment: the chunks of jiwer.
        reference: the words of the reference.
        hypothesis: the words of the hypothesis.

    Returns:
        One pair per hit and error, in order.
    """
    pairs: list[AlignedWord] = []
    for chunk in alignment:
        reference_words = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        hypothesis_words = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        # one of the two is empty for insertions and deletions; otherwise they are equally long
        pairs += itertools.starmap(AlignedWord, itertools.zip_longest(reference_words, hypothesis_words))
    return tuple(pairs)


def compute_rates(scores: Sequence[ClipScore], seed: int = 0) -> dict[str, Rate]:
    """Compute error rates over all clips together, with 95 % intervals.

    Args:
        scores: the errors of each clip.
        seed: seed of the bootstrap intervals.

    Returns:
        `wer` and `cer` (word and character errors per reference word or character), and `substitutions`, `deletions`
        and `insertions` (per reference word). `wer` is the sum of the last three.

    Raises:
        ValueError: no reference has a word.
    """
    words, characters = [score.words for score in scores], [score.characters for score in scores]
    word_lengths = [counts.reference_length for counts in words]
    if not sum(word_lengths):
        raise ValueError(
            f"at least one reference must have a word after normalisation, got {len(scores)} clips without words: "
            "check the column with the transcripts"
        )
    character_lengths = [counts.reference_length for counts in characters]
    errors_and_lengths = {
        "wer": ([counts.errors for counts in words], word_lengths),
        "cer": ([counts.errors for counts in characters], character_lengths),
        "substitutions": ([counts.substitutions for counts in words], word_lengths),
        "deletions": ([counts.deletions for counts in words], word_lengths),
        "insertions": ([counts.insertions for counts in words], word_lengths),
    }
    errors = np.array([errors for errors, _ in errors_and_lengths.values()]).T
    lengths = np.array([lengths for _, lengths in errors_and_lengths.values()]).T
    values = errors.sum(axis=0) / lengths.sum(axis=0)
    low, high = bootstrap_intervals(errors, lengths, seed)
    return {
        name: Rate(float(values[column]), float(low[column]), float(high[column]))
        for column, name in enumerate(errors_and_lengths)
    }


def bootstrap_intervals(
    errors: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], seed: int = 0
) -> npt.NDArray[np.float64]:
    """Compute 95 % intervals of error rates by the percentile bootstrap over clips.

    A draw consists of as many clips as there are, chosen with replacement. The interval is from the 2.5 to the 97.5
    percentile of the rates of all draws. Draws without reference words are left out. Method: Bisani and Ney, Bootstrap
    estimates for confidence intervals in ASR performance evaluation, ICASSP 2004.

    Args:
        errors: (C, K) errors of C clips for K kinds of errors.
        lengths: (C, K) reference lengths.
        seed: seed of the draws. All kinds of errors use the same draws.

    Returns:
        (2, K) lower and upper ends.
    """
    generator = np.random.default_rng(seed)
    num_clips = len(errors)
    rates = []
    for _ in range(BOOTSTRAP_DRAWS):
        # how often each clip is in the draw
        repeats = np.bincount(generator.integers(num_clips, size=num_clips), minlength=num_clips)
        total_lengths = repeats @ lengths
        if total_lengths.all():
            rates.append((repeats @ errors) / total_lengths)
    return np.percentile(rates, INTERVAL_PERCENTILES, axis=0)


@dataclass(frozen=True)
class ErrorRates:
    """Computes word and character error rates during training; the default `compute_metrics` of `ParakeetTrainer`.

    Args:
        processor: the `ParakeetProcessor` that converts token ids to text.
        normalize: text normalisation that is applied to references and hypotheses before scoring.
    """

    processor: Any
    normalize: Callable[[str], str] = normalize_text

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Compute the error rates of an evaluation.

        Args:
            prediction: an `EvalPrediction` with the token ids of the references, `label_ids` (B, U), and of the
                hypotheses, `predictions` (B, L). Both are padded with -100.

        Returns:
            `wer` (word error rate) and `cer` (character error rate).
        """
        references, hypotheses = self.decode(prediction.label_ids), self.decode(prediction.predictions)
        return error_rates(references, hypotheses, self.normalize)

    def decode(self, token_ids: Any) -> list[str]:
        """Convert token ids to text, ignoring padding, blanks and pad tokens.

        Args:
            token_ids: (B, U) token ids padded with -100. CTC repetitions must already be merged.

        Returns:
            The text of each row.
        """
        tokenizer = self.processor.tokenizer
        ignored_ids = {tokenizer.pad_token_id, self.processor.blank_token_id}
        texts = []
        for row in np.asarray(token_ids).tolist():
            label_ids = [token_id for token_id in row if token_id >= 0 and token_id not in ignored_ids]
            # without `group_tokens=False`, a CTC tokenizer would merge equal neighbouring tokens again
            texts.append(str(tokenizer.decode(label_ids, group_tokens=False)))
        return texts


__all__ = [
    "AlignedWord",
    "ClipScore",
    "ErrorCounts",
    "ErrorRates",
    "EvaluatedClip",
    "Rate",
    "bootstrap_intervals",
    "compute_rates",
    "create_english_normalizer",
    "error_rates",
    "normalize_text",
    "score_clips",
]
