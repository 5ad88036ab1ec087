"""The result of a stream: words that do not change any more, words that can still change, and events.

`timestamps.py` groups tokens into words; this module decides when a word is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..timestamps import EmittedTokens, compute_token_spans, group_into_words

# pieces of the vocabulary that mark the end of an utterance and the end of a backchannel ("uh-huh")
EVENT_PIECES = ("<EOU>", "<EOB>")

# number of tokens after which a word is split, because languages without spaces between words never start a new word
MAX_WORD_TOKENS = 64


@dataclass(frozen=True)
class StreamWord:
    """A word of a stream.

    Args:
        text: text of the word.
        start: start in seconds from the start of the stream.
        end: end in seconds from the start of the stream.
        confidence: confidence from 0 to 1; `None` if it was not requested.
        is_continuation: whether no space separates the word from the word before it. This is so only for a word of more
            than `MAX_WORD_TOKENS` tokens, which is split, for example in languages without spaces.
    """

    text: str
    start: float
    end: float
    confidence: float | None = None
    is_continuation: bool = False


@dataclass(frozen=True)
class StreamEvent:
    """An event of a stream, which some models emit as a token.

    Args:
        name: `"<EOU>"` for the end of an utterance, `"<EOB>"` for the end of a backchannel.
        time: time in seconds from the start of the stream.
    """

    name: str
    time: float


@dataclass(frozen=True)
class StreamUpdate:
    """What a call of `feed` or `finish` adds to the result of a stream.

    Args:
        committed: new words that do not change any more, in the order of their times. The words of all updates are the
            transcript of the stream.
        tentative: words after the committed ones that can still change. They replace those of the update before.
        events: new events.
    """

    committed: list[StreamWord] = field(default_factory=list)
    tentative: list[StreamWord] = field(default_factory=list)
    events: list[StreamEvent] = field(default_factory=list)


def join_stream_words(words: Sequence[StreamWord]) -> str:
    """Join words to text, with a space before each word that is not a continuation.

    Args:
        words: committed or tentative words.
    """
    return "".join(word.text if word.is_continuation else f" {word.text}" for word in words).strip()


@dataclass(frozen=True)
class Token:
    """A token of a stream.

    Args:
        token_id: id of the token.
        frame: encoder frame at which the token was emitted, counted from the start of the stream.
        duration: number of frames: predicted by TDT, of the run for CTC, 0 for RNN-T.
        confidence: confidence from 0 to 1; `None` if it was not requested.
    """

    token_id: int
    frame: int
    duration: int
    confidence: float | None


class WordCollector:
    """Collects the tokens of a stream to words. A word is complete when the next word starts, or at an event.

    It keeps only the tokens of the incomplete word and the token before them.

    Args:
        processor: processor of the model.
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`.
        frame_s: seconds per encoder frame.
    """

    def __init__(self, processor: Any, head_type: str, frame_s: float) -> None:
        self.tokenizer, self.punctuation = processor.tokenizer, processor.punctuation
        self.head_type, self.frame_s = head_type, frame_s
        vocabulary = self.tokenizer.get_vocab()
        self.event_names = {vocabulary[piece]: piece for piece in EVENT_PIECES if piece in vocabulary}
        self.word_tokens: list[Token] = []
        self.token_before: Token | None = None
        self.is_continuation = False

    def add(self, tokens: Sequence[Token]) -> tuple[list[StreamWord], list[StreamEvent]]:
        """Add new tokens.

        Args:
            tokens: the tokens, in the order of their frames.

        Returns:
            The words that are now complete, and the events.
        """
        words: list[StreamWord] = []
        events: list[StreamEvent] = []
        for token in tokens:
            is_event = token.token_id in self.event_names
            if is_event or self._starts_word(token.token_id):
                words += self.complete_word()
            elif len(self.word_tokens) >= MAX_WORD_TOKENS:
                words += self.complete_word()
                self.is_continuation = True
            if is_event:
                events.append(StreamEvent(self.event_names[token.token_id], token.frame * self.frame_s))
                self.token_before = token
            else:
                self.word_tokens.append(token)
        return words, events

    def complete_word(self) -> list[StreamWord]:
        """Return the incomplete word, if it has text, and start a new word."""
        words = self.build_words()
        if self.word_tokens:
            self.token_before = self.word_tokens[-1]
            self.word_tokens, self.is_continuation = [], False
        return words

    def build_words(self, next_tokens: Sequence[Token] = ()) -> list[StreamWord]:
        """Build the words of the tokens that are not in a complete word.

        Args:
            next_tokens: tokens to append for this call only.

        Returns:
            The words that have text.
        """
        tokens = [*self.word_tokens, *(token for token in next_tokens if token.token_id not in self.event_names)]
        if not tokens:
            return []
        # the start of a CTC token is the frame of the token before
        num_before = int(self.token_before is not None)
        all_tokens = [self.token_before, *tokens] if self.token_before is not None else tokens
        confidences = [token.confidence for token in all_tokens if token.confidence is not None]
        emitted = EmittedTokens(
            [token.token_id for token in all_tokens],
            [token.frame for token in all_tokens],
            [token.duration for token in all_tokens],
            confidences if len(confidences) == len(all_tokens) else None,
        )
        token_ids = emitted.tokens[num_before:]
        texts = [self._decode_token(token) for token in emitted.tokens]
        spans = compute_token_spans(self.head_type, emitted, texts, self.punctuation)[num_before:]
        pieces = self.tokenizer.convert_ids_to_tokens(token_ids)
        words = group_into_words(spans, token_ids, pieces, self._decode, self.punctuation)
        return [
            StreamWord(
                word.text,
                round(word.start * self.frame_s, 3),
                round(word.end * self.frame_s, 3),
                word.confidence,
                is_continuation=self.is_continuation and index == 0,
            )
            for index, word in enumerate(words)
            if word.text
        ]

    def _starts_word(self, token_id: int) -> bool:
        """Return whether a token starts a word, by the rule of `group_into_words`."""
        text = self._decode_token(token_id)
        return self.tokenizer.convert_ids_to_tokens(token_id) != text and text not in self.punctuation

    def _decode(self, token_ids: list[int]) -> str:
        """Convert token ids to text without merging repeats."""
        return str(self.tokenizer.decode(token_ids, group_tokens=False))

    def _decode_token(self, token_id: int) -> str:
        """Convert one token id to text."""
        return self._decode([token_id])
