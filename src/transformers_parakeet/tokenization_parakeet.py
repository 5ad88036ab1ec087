"""Token ids to text: merging of CTC repeats, blanks, and character offsets for tools that time CTC output.

Which kind of model the ids come from is for the caller to say; NeMo's times are in `timestamps.py`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from transformers import TokenizersBackend

from .timestamps import ctc_runs

# what SentencePiece writes for a space
WORD_START = "\u2581"
# the blank in the vocabulary of transducers
BLANK = "<blank>"


class ParakeetTokenizer(TokenizersBackend):
    """Tokenizer of the released checkpoints; decoding drops pad tokens and, for CTC, merges repeats.

    The blank of a CTC vocabulary is the pad token. The vocabulary of a transducer, or of a hybrid, has a token
    `BLANK` as well: every other token is emitted on purpose, and repeats are merged only with `group_tokens=True`.
    """

    # the delimiter that stock tools pass to `_get_word_offsets`
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
        """Decode one sequence.

        Args:
            token_ids: ids, one per frame for CTC.
            skip_special_tokens: leave special tokens out of the text.
            clean_up_tokenization_spaces: see the base class.
            group_tokens: merge consecutive repeats; default: where the vocabulary is one of CTC alone.
            output_char_offsets: return a dict of `text` and `char_offsets`, per token `{"char", "start_offset",
                "end_offset"}` in frames, as CTC tokenizers of transformers do.

        Returns:
            The text, or the dict.
        """
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if group_tokens is None:
            group_tokens = self.backend_tokenizer.token_to_id(BLANK) is None
        runs = ctc_runs(ids) if group_tokens else [(token, frame, frame + 1) for frame, token in enumerate(ids)]
        runs = [run for run in runs if run[0] != self.pad_token_id]

        def decode(tokens: list[int]) -> str:
            return super(ParakeetTokenizer, self)._decode(
                tokens,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                **kwargs,
            )

        text = decode([token for token, _, _ in runs])
        if not output_char_offsets:
            return text
        return {"text": text, "char_offsets": self._char_offsets(runs, decode)}

    def _char_offsets(self, runs: list[tuple[int, int, int]], decode: Any) -> list[dict[str, Any]]:
        """One entry per token; a delimiter entry stands between words."""
        offsets: list[dict[str, Any]] = []
        for token, start, end in runs:
            chars = decode([token])
            if not chars:
                continue
            if offsets and self.convert_ids_to_tokens(token).startswith(WORD_START):
                offsets.append({"char": self.replace_word_delimiter_char, "start_offset": start, "end_offset": start})
            offsets.append({"char": chars.strip(), "start_offset": start, "end_offset": end})
        return offsets

    @staticmethod
    def _get_word_offsets(offsets: list[dict[str, Any]], word_delimiter_char: str = " ") -> list[dict[str, Any]]:
        """Join character offsets to `{"word", "start_offset", "end_offset"}`, as stock tools call it."""
        words: list[dict[str, Any]] = []
        for is_gap, group in groupby(offsets, key=lambda offset: offset["char"] == word_delimiter_char):
            entries = list(group)
            if not is_gap:
                word = "".join(entry["char"] for entry in entries)
                words.append(
                    {"word": word, "start_offset": entries[0]["start_offset"], "end_offset": entries[-1]["end_offset"]}
                )
        return words


__all__ = ["ParakeetTokenizer"]
