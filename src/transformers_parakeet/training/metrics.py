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

    Args:
        text: the transcript.

    Returns:
        The text in Unicode form NFKC and lower case, with single spaces and without punctuation. Apostrophes inside
        words are kept.
    """
    # first, because NFKC turns the acute accent into a space and a combining accent
    with_apostrophes = text.translate(APOSTROPHES)
    folded = unicodedata.normalize("NFKC", with_apostrophes).lower()
    characters = [" " if unicodedata.category(c).startswith("P") and c != "'" else c for c in folded]
    words = [word.strip("'") for word in "".join(characters).split()]
    return " ".join(word for word in words if word)


def error_rates(
    references: Sequence[str], hypotheses: Sequence[str], normalize: Callable[[str], str] = normalize_text
) -> dict[str, float]:
    """Compute the error rates over all clips together.

    Args:
        references: correct transcript of each clip.
        hypotheses: recognised transcript of each clip.
        normalize: function applied to references and hypotheses before they are compared.

    Returns:
        `wer` and `cer`: word errors per reference word, and character errors per reference character.

    Raises:
        ImportError: the package `jiwer` is not installed.
    """
    jiwer = import_optional("jiwer", "the word error rate")
    normalized_references = [normalize(text) for text in references]
    normalized_hypotheses = [normalize(text) for text in hypotheses]
    return {
        "wer": float(jiwer.wer(normalized_references, normalized_hypotheses)),
        "cer": float(jiwer.cer(normalized_references, normalized_hypotheses)),
    }


@dataclass(frozen=True)
class ErrorRates:
    """The `compute_metrics` function of `ParakeetTrainer`: word and character error rate.

    Args:
        processor: the `ParakeetProcessor` that decodes token ids to text.
        normalize: function applied to references and hypotheses before they are compared.
    """

    processor: Any
    normalize: Callable[[str], str] = normalize_text

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Compute the error rates of an evaluation.

        Args:
            prediction: an `EvalPrediction` with `label_ids` (B, U) and `predictions` (B, L), token ids padded with
                -100.

        Returns:
            `wer` and `cer`, see `error_rates`.
        """
        references, hypotheses = self.decode(prediction.label_ids), self.decode(prediction.predictions)
        return error_rates(references, hypotheses, self.normalize)

    def decode(self, token_ids: Any) -> list[str]:
        """Decode token ids to texts.

        Args:
            token_ids: (B, U) ids padded with -100. Every id is one token: CTC repeats are already merged. Blanks and
                pad tokens are dropped.

        Returns:
            B texts.
        """
        tokenizer = self.processor.tokenizer
        ignored_ids = {tokenizer.pad_token_id, self.processor.blank_token_id}
        texts = []
        for row in np.asarray(token_ids).tolist():
            tokens = [token for token in row if token >= 0 and token not in ignored_ids]
            texts.append(str(tokenizer.decode(tokens, group_tokens=False)))
        return texts


__all__ = ["ErrorRates", "error_rates", "normalize_text"]
