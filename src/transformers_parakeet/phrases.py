"""Phrases to boost: reads them from a file, and lists their spellings as tokens.

`decoding/biasing.py` builds the automaton from the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .decoding import BoostedPhrase

# a text, or a text with a score that replaces `context_score` for this phrase
Phrase: TypeAlias = str | tuple[str, float]

COMMENT_MARK = "#"


def read_phrases(path: str | Path) -> list[Phrase]:
    """Read phrases to boost from a UTF-8 file with one phrase per line.

    A tab and a score can follow a phrase. The score replaces `context_score` for this phrase. Empty lines and lines
    that start with `#` are skipped.

    Args:
        path: the file.

    Returns:
        The phrases, in the order of the file: a text, or a tuple of a text and its score.

    Raises:
        ValueError: the file is not UTF-8 or has no phrases, or a line is not a phrase with an optional score.
        OSError: the file cannot be read.
    """
    try:
        # the BOM at the start of some files is not part of the first phrase
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"a file of phrases must be UTF-8, got {str(path)!r}: {error}; convert the file") from error
    phrases = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith(COMMENT_MARK):
            try:
                phrases.append(parse_line(line))
            except ValueError as error:
                raise ValueError(f"line {number} of {str(path)!r}: {error}") from error
    if not phrases:
        raise ValueError(
            f"a file of phrases must have at least one phrase, got none in {str(path)!r}: add one per line"
        )
    return phrases


def parse_line(line: str) -> Phrase:
    """Convert a line of a file to a phrase.

    Args:
        line: a phrase, and optionally a tab and its score.

    Returns:
        The text, or a tuple of the text and its score.

    Raises:
        ValueError: the line is not a phrase with an optional score.
    """
    text, *scores = line.split("\t")
    if not scores:
        return check_phrase(text)
    try:
        (score,) = map(float, scores)
    except ValueError:
        raise ValueError(
            f"a line must be a phrase, or a phrase, a tab and a number, got {line.strip()!r}: correct the line"
        ) from None
    return check_phrase((text, score))


def check_phrase(phrase: Any) -> Phrase:
    """Check a phrase, and remove superfluous spaces from its text.

    Args:
        phrase: a text, or a pair of a text and a score.

    Returns:
        The phrase.

    Raises:
        TypeError: the phrase is neither a text nor a pair of a text and a number.
        ValueError: the text is empty, or the score is not a finite number above 0.
    """
    is_pair = isinstance(phrase, (tuple, list)) and len(phrase) == 2
    text, score = phrase if is_pair else (phrase, None)
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if not isinstance(text, str) or (is_pair and not is_number):
        raise TypeError(
            f"a phrase must be a text or a tuple of a text and a score, got {phrase!r}: pass for example "
            '"Nvidia" or ("Nvidia", 3.0)'
        )
    text = " ".join(text.split())
    if not text:
        raise ValueError(f"a phrase must have at least one character, got {phrase!r}: remove it")
    if score is None:
        return text
    if not (math.isfinite(score) and score > 0):
        raise ValueError(
            f"the score of a phrase must be a finite number above 0, got {score} for {text!r}: use for example 1.0, or "
            "remove the phrase"
        )
    return text, float(score)


def list_spellings(text: str) -> list[str]:
    """List the spellings that a model can write for a phrase.

    Args:
        text: the phrase.

    Returns:
        The phrase as it is, in lower case, with a capital at its start, with a capital at the start of every word, and
        in upper case, without repetitions.
    """
    words = [capitalize(word) for word in text.split(" ")]
    return list(dict.fromkeys([text, text.lower(), capitalize(text), " ".join(words), text.upper()]))


def capitalize(text: str) -> str:
    """Convert the first character to upper case and leave the others as they are.

    Args:
        text: a word or a phrase.
    """
    return text[:1].upper() + text[1:]


def spell_phrases(phrases: Iterable[Phrase], tokenizer: Any, *, alternatives: bool = True) -> list[BoostedPhrase]:
    """Convert phrases to the tokens of their spellings.

    Args:
        phrases: texts, or tuples of a text and a score.
        tokenizer: the tokenizer of the model.
        alternatives: whether to use all spellings of `list_spellings`. Spellings that the tokenizer cannot write are
            left out.

    Returns:
        One phrase per spelling. All spellings of a phrase have its score.

    Raises:
        TypeError: `phrases` is a single text, or a phrase has a wrong type.
        ValueError: there are no phrases, a phrase is empty, its score is not a finite number above 0, or the tokenizer
            can write none of its spellings.
    """
    if isinstance(phrases, str):
        raise TypeError(f"the phrases must be a list, got the text {phrases!r}: pass [{phrases!r}]")
    pairs = [phrase if isinstance(phrase, tuple) else (phrase, None) for phrase in map(check_phrase, phrases)]
    if not pairs:
        raise ValueError("there must be at least one phrase to boost, got none: pass phrases, or no boosting")
    spellings = [list_spellings(text) if alternatives else [text] for text, _ in pairs]
    token_lists = iter(_tokenize([text for texts in spellings for text in texts], tokenizer))
    boosted_phrases = []
    for (text, score), texts in zip(pairs, spellings, strict=True):
        writable = [tokens for tokens in (next(token_lists) for _ in texts) if tokens]
        if not writable:
            character = _find_unwritable_character(text, tokenizer, alternatives)
            raise ValueError(
                f"the tokenizer must be able to write every phrase, but cannot write {character!r} in the phrase "
                f"{text!r}: remove the phrase, or replace the character"
            )
        boosted_phrases += [BoostedPhrase(tuple(tokens), score) for tokens in writable]
    return boosted_phrases


def _tokenize(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize texts.

    Args:
        texts: the texts.
        tokenizer: the tokenizer of the model.

    Returns:
        The tokens of each text; an empty list if the tokenizer cannot write the text.
    """
    # a text with unknown characters contains the unknown token; the last token is the blank
    special_ids = {*tokenizer.all_special_ids, len(tokenizer) - 1}
    token_lists = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [[] if special_ids.intersection(tokens) else list(tokens) for tokens in token_lists]


def _find_unwritable_character(text: str, tokenizer: Any, alternatives: bool) -> str:
    """Find the character because of which the tokenizer cannot write a phrase.

    Args:
        text: the phrase.
        tokenizer: the tokenizer of the model.
        alternatives: whether the character may also be written in lower or upper case.

    Returns:
        The first such character; the phrase if the tokenizer can write each character by itself. This is the case if
        the phrase mixes characters that exist only in lower case with characters that exist only in upper case.
    """
    for character in text.replace(" ", ""):
        if not any(_tokenize(list_spellings(character) if alternatives else [character], tokenizer)):
            return character
    return text
