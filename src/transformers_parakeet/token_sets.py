"""Sets of tokens by script, to restrict what a search can emit.

The searches in `decoding/` apply a set.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

# a piece for one byte of a character, such as `<0xE2>`
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
# a special piece such as `<unk>`, `<blank>` and `<|en|>`
MARKUP_PIECE = re.compile("<.+>")
# a byte from 0 to 127 is a character by itself
NUM_ASCII_BYTES = 128


def find_tokens_of_scripts(pieces: Sequence[str], scripts: Sequence[str]) -> Tensor:
    """Find the tokens that can be written in some scripts.

    A token is in the set if each of its letters belongs to one of the scripts. Digits, punctuation, marks, symbols and
    modifier letters belong to no script, so tokens without other letters are in the set. Special tokens such as the
    blank are in the set, too. A byte token for a part of a character is not in the set, because several of them could
    write a letter of any script.

    Args:
        pieces: the V vocabulary entries, in the order of their ids.
        scripts: names of scripts, as at the start of the Unicode names of their letters, such as "Latin", "Cyrillic",
            "Greek", "CJK" or "Hangul". Upper and lower case are not distinguished.

    Returns:
        (V,) bool: whether each token is in the set.

    Raises:
        TypeError: `scripts` is a single text.
        ValueError: there are no scripts, or the vocabulary has no letter of one of them.
    """
    if isinstance(scripts, str):
        raise TypeError(f"the scripts must be a list, got the text {scripts!r}: pass [{scripts!r}]")
    token_scripts = [list_scripts(piece) for piece in pieces]
    vocabulary_scripts = set().union(*token_scripts)
    allowed_scripts = {script.upper() for script in scripts}
    if not allowed_scripts or not allowed_scripts <= vocabulary_scripts:
        names = ", ".join(sorted(script.capitalize() for script in vocabulary_scripts))
        raise ValueError(
            f"the scripts must be one or more of {names} for this vocabulary, got {list(scripts)}: correct the names"
        )
    return torch.tensor(
        [
            letter_scripts <= allowed_scripts and not is_part_of_character(piece)
            for piece, letter_scripts in zip(pieces, token_scripts, strict=True)
        ]
    )


def list_scripts(piece: str) -> set[str]:
    """List the scripts of the letters of a token.

    A letter in a compatibility form counts as the usual letter: the Ohm sign is Greek.

    Args:
        piece: vocabulary entry.

    Returns:
        The names of the scripts in upper case: the first words of the Unicode names of the letters.
    """
    byte = BYTE_PIECE.fullmatch(piece)
    if byte:
        piece = chr(int(byte[1], 16)) if not is_part_of_character(piece) else ""
    elif MARKUP_PIECE.fullmatch(piece):
        return set()
    letters = [char for char in unicodedata.normalize("NFKC", piece) if is_letter_of_script(char)]
    return {unicodedata.name(letter, "UNNAMED").split()[0] for letter in letters}


def is_part_of_character(piece: str) -> bool:
    """Return whether a token is one byte of a character of several bytes.

    Args:
        piece: vocabulary entry.
    """
    byte = BYTE_PIECE.fullmatch(piece)
    return byte is not None and int(byte[1], 16) >= NUM_ASCII_BYTES


def is_letter_of_script(char: str) -> bool:
    """Return whether a character is a letter, except modifier letters, which several scripts share.

    Args:
        char: a character.
    """
    category = unicodedata.category(char)
    return category.startswith("L") and category != "Lm"
