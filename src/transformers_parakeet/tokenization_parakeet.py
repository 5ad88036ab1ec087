"""Converts token ids to text: merges CTC repeats, removes blanks, computes offsets in frames.

Times as NeMo computes them are in `timestamps.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from transformers import TokenizersBackend

from .timestamps import ctc_runs

# SentencePiece's mark of a space, at the start of a word
WORD_START = "\u2581"
# the blank in the vocabulary of a transducer
BLANK = "<blank>"


class ParakeetTokenizer(TokenizersBackend):
    """Tokenizer of the released checkpoints.

    The blank of a CTC vocabulary is the pad token. The vocabulary of a transducer, or of a hybrid, contains the token
    `BLANK` in addition. Decoding removes pad tokens. It merges repeated tokens by default only for a CTC vocabulary,
    because a transducer emits every token separately.
    """

    # the word delimiter that tools of transformers pass to `_get_word_offsets`
    replace_word_delimiter_char = " "

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        group_tokens: bool | None = None,
        output_char_offsets: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Decode one sequence of token ids.

        Args:
            token_ids: token ids; for CTC one per frame.
            skip_special_tokens: leave special tokens out of the text.
            clean_up_tokenization_spaces: remove spaces before punctuation; None means the setting of the tokenizer.
            group_tokens: merge consecutive repeats; None merges them only for a CTC vocabulary.
            output_char_offsets: return offsets in addition to the text.
            **kwargs: further arguments of the base class.

        Returns:
            The text; with `output_char_offsets` a dict of `text` and `char_offsets`, which has one
            `{"char", "start_offset", "end_offset"}` in frames per token, as CTC tokenizers of transformers return it.
        """
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if group_tokens is None:
            group_tokens = self.backend_tokenizer.token_to_id(BLANK) is None
        # (token, first frame, frame after the last) of each token
        runs = ctc_runs(ids) if group_tokens else [(token, frame, frame + 1) for frame, token in enumerate(ids)]
        runs = [run for run in runs if run[0] != self.pad_token_id]

        def decode_tokens(tokens: list[int]) -> str:
            """Convert token ids without repeats and pad tokens to text."""
            return super(ParakeetTokenizer, self)._decode(
                tokens,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                **kwargs,
            )

        text = decode_tokens([token for token, _, _ in runs])
        if not output_char_offsets:
            return text
        return {"text": text, "char_offsets": self._char_offsets(runs, decode_tokens)}

    def _char_offsets(
        self, runs: list[tuple[int, int, int]], decode_tokens: Callable[[list[int]], str]
    ) -> list[dict[str, Any]]:
        """Compute the offsets of the text of each token, with a delimiter entry between words.

        Args:
            runs: token id, first frame and frame after the last, for each token.
            decode_tokens: converts token ids to text.

        Returns:
            `{"char", "start_offset", "end_offset"}` in frames for each token with text and for each delimiter.
        """
        offsets: list[dict[str, Any]] = []
        for token, start, end in runs:
            chars = decode_tokens([token])
            if not chars:
                continue
            if offsets and self.convert_ids_to_tokens(token).startswith(WORD_START):
                offsets.append({"char": self.replace_word_delimiter_char, "start_offset": start, "end_offset": start})
            offsets.append({"char": chars.strip(), "start_offset": start, "end_offset": end})
        return offsets

    @staticmethod
    def _get_word_offsets(offsets: list[dict[str, Any]], word_delimiter_char: str = " ") -> list[dict[str, Any]]:
        """Join character offsets to word offsets; CTC tools of transformers call this method.

        Args:
            offsets: `{"char", "start_offset", "end_offset"}` in frames.
            word_delimiter_char: the `char` that separates words.

        Returns:
            `{"word", "start_offset", "end_offset"}` in frames for each word.
        """
        words: list[dict[str, Any]] = []
        for is_delimiter, group in groupby(offsets, key=lambda offset: offset["char"] == word_delimiter_char):
            if is_delimiter:
                continue
            entries = list(group)
            word = "".join(entry["char"] for entry in entries)
            start, end = entries[0]["start_offset"], entries[-1]["end_offset"]
            words.append({"word": word, "start_offset": start, "end_offset": end})
        return words


__all__ = ["ParakeetTokenizer"]
