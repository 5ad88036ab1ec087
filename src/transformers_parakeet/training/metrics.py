"""Word and character error rates of transcripts.

Decoding in evaluation is in `training.py`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np

# signs that are written for an apostrophe: acute and grave accent, quotation marks, modifier letter
APOSTROPHES = str.maketrans(dict.fromkeys("\u00b4`\u2018\u2019\u02bc", "'"))


def normalize_text(text: str) -> str:
    """Prepare a transcript for scoring: NFKC, lower case, no punctuation but apostrophes in words, single spaces."""
    # before NFKC, which makes a space and a combining accent of the acute accent
    text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).lower()
    spaced = "".join(" " if unicodedata.category(char).startswith("P") and char != "'" else char for char in text)
    return " ".join(word for word in (word.strip("'") for word in spaced.split()) if word)


def error_rates(
    references: Sequence[str], hypotheses: Sequence[str], normalize: Callable[[str], str] = normalize_text
) -> dict[str, float]:
    """Score transcripts, all clips pooled.

    Args:
        references: what was said.
        hypotheses: what was recognised.
        normalize: applied to both.

    Returns:
        `wer` and `cer`, errors per word and per character of the references.
    """
    said, heard = [normalize(text) for text in references], [normalize(text) for text in hypotheses]
    return {"wer": float(jiwer.wer(said, heard)), "cer": float(jiwer.cer(said, heard))}


@dataclass(frozen=True)
class ErrorRates:
    """`compute_metrics` for `ParakeetTrainer`: word and character error rate.

    Args:
        processor: turns token ids into text.
        normalize: applied to references and hypotheses.
    """

    processor: Any
    normalize: Callable[[str], str] = normalize_text

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Score `predictions` and `label_ids`, both (clips, tokens), filled up with -100."""
        return error_rates(self.texts(prediction.label_ids), self.texts(prediction.predictions), self.normalize)

    def texts(self, ids: Any) -> list[str]:
        """Decode token ids, one per token: no blanks, no repeats to merge."""
        tokenizer = self.processor.tokenizer
        unwanted = {tokenizer.pad_token_id, self.processor.blank_token_id}
        rows = [[int(i) for i in row if i >= 0 and i not in unwanted] for row in np.asarray(ids)]
        return [str(tokenizer.decode(row, group_tokens=False)) for row in rows]


__all__ = ["ErrorRates", "error_rates", "normalize_text"]
