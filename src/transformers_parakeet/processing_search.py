"""Builds the arguments of `generate` that change the search, with the tokenizer of a processor.

`ParakeetProcessor` has the methods of this file. Spellings are in `phrases.py`, scripts in `token_sets.py`, and the
scores in `decoding/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .decoding import BackoffAutomaton, TokenScorer, build_boosting_tree, load_language_model
from .phrases import Phrase, spell_phrases
from .token_sets import find_tokens_of_scripts


class SearchInputsMixin:
    """Adds phrase boosting, language models and sets of allowed tokens to a processor with a tokenizer and a blank."""

    tokenizer: Any
    blank_token_id: int

    def boosting_tree(
        self,
        phrases: Iterable[Phrase],
        context_score: float = 1.0,
        depth_scaling: float = 2.0,
        alternatives: bool = True,
    ) -> BackoffAutomaton:
        """Build a tree of phrases that `generate(boosting=tree)` prefers. See `build_boosting_tree` for the scores.

        Args:
            phrases: texts, or tuples `(text, score)`, whose score replaces `context_score` for this phrase. NeMo's
                `score_per_phrase` is the score `round(score_per_phrase / len(text), 2)`.
            context_score: score in nats of the first token of a phrase, above 0. Scores from 1 to 2 are usual. With
                scores above 4 the model writes phrases that were not said.
            depth_scaling: factor of the score for the further tokens of a phrase.
            alternatives: whether to boost a phrase also in lower case, with capitals at the start of the phrase or of
                every word, and in upper case. Use `False` if only one spelling is correct.

        Returns:
            The tree. Build it once and use it for any number of clips, also in several threads.

        Raises:
            TypeError: a phrase is not a text or `(text, score)`.
            ValueError: there are no phrases, a phrase is empty, the tokenizer cannot write a phrase, or a score is out
                of range.
        """
        boosted_phrases = spell_phrases(phrases, self.tokenizer, alternatives=alternatives)
        return build_boosting_tree(boosted_phrases, self.blank_token_id, context_score, depth_scaling)

    def tokens_of_scripts(self, scripts: Sequence[str]) -> Tensor:
        """Find the tokens of some scripts, for `generate(allowed_tokens=...)`. See `find_tokens_of_scripts`.

        Args:
            scripts: names of scripts, such as `["Latin", "Cyrillic"]`.

        Returns:
            (V,) bool: true for tokens whose letters all belong to these scripts, for tokens without letters such as
            digits and punctuation, and for special tokens such as the blank.

        Raises:
            TypeError: `scripts` is a single text.
            ValueError: there are no scripts, or the vocabulary has no letter of one of them.
        """
        return find_tokens_of_scripts(self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer))), scripts)

    def load_language_model(self, path: str | Path, units: str | None = None) -> TokenScorer:
        """Load an n-gram language model for decoding with this processor's model.

        Args:
            path: ARPA file, plain or compressed with gzip.
            units: what the words of the file stand for: `"nemo"` (token i is the character i + 100), `"pieces"` (tokens
                as in the vocabulary, such as `▁the`) or `"words"`. `None` to detect it.

        Returns:
            The language model. It scores the tokens below the blank.

        Raises:
            ValueError: `units` is unknown, the file is damaged, or its words are not tokens of this vocabulary.
        """
        pieces = self.tokenizer.convert_ids_to_tokens(range(self.blank_token_id))
        return load_language_model(path, pieces, units)
