"""Converts token ids to text: merges CTC repeats, removes blanks, computes offsets in frames.

`timestamps.py` computes times as NeMo does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from transformers import TokenizersBackend

from .timestamps import merge_repeats

# SentencePiece's marker of a word start, in place of the space before the word
WORD_START = "\u2581"
# the blank in the vocabulary of a transducer
BLANK = "<blank>"


class ParakeetTokenizer(TokenizersBackend):
    """Tokenizer of the released checkpoints.

    In a CTC vocabulary the pad token is the blank. The vocabulary of a transducer or a hybrid additionally contains the
    token `BLANK`. Decoding removes pad tokens. By default it merges repeated tokens only for a CTC vocabulary, because
    a repeated token of a transducer was emitted twice.
    """

    # transformers' CTC pipeline passes this word delimiter to `_get_word_offsets`
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
        """Decode one sequence of token ids to text.

        Args:
            token_ids: token ids; for CTC one per frame.
            skip_special_tokens: whether to omit special tokens from the text.
            clean_up_tokenization_spaces: whether to remove spaces before punctuation; `None` for the setting of the
                tokenizer.
            group_tokens: whether to merge consecutive repeats; `None` to merge them only for a CTC vocabulary.
            output_char_offsets: whether to also return the frames of each token.
            **kwargs: further arguments of the base class.

        Returns:
            The text. With `output_char_offsets`, a dict with the keys `text` and `char_offsets`, in the format of
            transformers' CTC tokenizers: one `{"char", "start_offset", "end_offset"}` per token, offsets in frames.
        """
        frame_tokens = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if group_tokens is None:
            group_tokens = self.backend_tokenizer.token_to_id(BLANK) is None
        # (token id, first frame, end frame exclusive) of each token
        if group_tokens:
            runs = merge_repeats(frame_tokens)
        else:
            runs = [(token, frame, frame + 1) for frame, token in enumerate(frame_tokens)]
        runs = [run for run in runs if run[0] != self.pad_token_id]

        def ids_to_text(token_ids: list[int]) -> str:
            """Convert token ids to text; repeats and pad tokens must already be removed."""
            return super(ParakeetTokenizer, self)._decode(
                token_ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                **kwargs,
            )

        text = ids_to_text([token for token, _, _ in runs])
        if not output_char_offsets:
            return text
        return {"text": text, "char_offsets": self._compute_char_offsets(runs, ids_to_text)}

    def _compute_char_offsets(
        self, runs: list[tuple[int, int, int]], ids_to_text: Callable[[list[int]], str]
    ) -> list[dict[str, Any]]:
        """Compute the text and the frames of each token, with a delimiter entry between words.

        Args:
            runs: `(token id, first frame, end frame exclusive)` of each token.
            ids_to_text: function that converts a list of token ids to text.

        Returns:
            `{"char", "start_offset", "end_offset"}` for each delimiter and each token with text, offsets in frames.
        """
        offsets: list[dict[str, Any]] = []
        for token, start, end in runs:
            token_text = ids_to_text([token])
            if not token_text:
                continue
            starts_word = self.convert_ids_to_tokens(token).startswith(WORD_START)
            if offsets and starts_word:
                offsets.append({"char": self.replace_word_delimiter_char, "start_offset": start, "end_offset": start})
            offsets.append({"char": token_text.strip(), "start_offset": start, "end_offset": end})
        return offsets

    @staticmethod
    def _get_word_offsets(offsets: list[dict[str, Any]], word_delimiter_char: str = " ") -> list[dict[str, Any]]:
        """Group character offsets into word offsets; transformers' CTC pipeline calls this method.

        Args:
            offsets: `{"char", "start_offset", "end_offset"}` of each token and delimiter, offsets in frames.
            word_delimiter_char: value of `char` that separates two words.

        Returns:
            `{"word", "start_offset", "end_offset"}` of each word, offsets in frames.
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
