"""Compute word and character error rates of transcripts.

`ParakeetTrainer` in `trainer.py` generates the token ids, and `evaluate.py` runs a pipeline.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .extras import import_optional

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
    jiwer = import_optional("jiwer", "the word error rate")
    normalized_references = [normalize(reference) for reference in references]
    normalized_hypotheses = [normalize(hypothesis) for hypothesis in hypotheses]
    return {
        "wer": float(jiwer.wer(normalized_references, normalized_hypotheses)),
        "cer": float(jiwer.cer(normalized_references, normalized_hypotheses)),
    }


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
            kept_ids = [token_id for token_id in row if token_id >= 0 and token_id not in ignored_ids]
            # without `group_tokens=False`, a CTC tokenizer would merge equal neighbouring tokens again
            texts.append(str(tokenizer.decode(kept_ids, group_tokens=False)))
        return texts


__all__ = ["ErrorRates", "error_rates", "normalize_text"]
