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

# duration in seconds without a token after which a word is committed; a pause inside a word is shorter
COMMIT_PAUSE_S = 0.8

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
        is_continuation: whether no space separates the word from the word before it. This is so for punctuation or a
            part of a word that follows a pause of `COMMIT_PAUSE_S`, and for a word of more than `MAX_WORD_TOKENS`
            tokens, which is split, for example in languages without spaces.
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
    """Collects the tokens of a stream to words.

    A word is complete when the next word starts, at an event, or after a pause. The collector stores only the tokens of
    the incomplete word and the token before them.

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

    def add(self, tokens: Sequence[Token], num_frames: int) -> tuple[list[StreamWord], list[StreamEvent]]:
        """Add new tokens.

        Args:
            tokens: the tokens, in the order of their frames.
            num_frames: number of encoder frames that were decoded so far.

        Returns:
            The words that are now complete, and the events.
        """
        words: list[StreamWord] = []
        events: list[StreamEvent] = []
        for token in tokens:
            is_event = token.token_id in self.event_names
            if is_event or self._starts_word(token) or len(self.word_tokens) >= MAX_WORD_TOKENS:
                words += self.complete_word()
            if is_event:
                events.append(StreamEvent(self.event_names[token.token_id], round(token.frame * self.frame_s, 3)))
                self.token_before = token
            else:
                self.word_tokens.append(token)
        if self.word_tokens:
            last = self.word_tokens[-1]
            if (num_frames - last.frame - last.duration) * self.frame_s >= COMMIT_PAUSE_S:
                words += self.complete_word()
        return words, events

    def complete_word(self) -> list[StreamWord]:
        """Return the incomplete word, if it has text, and start a new word."""
        words = self.build_words()
        if self.word_tokens:
            self.token_before, self.word_tokens = self.word_tokens[-1], []
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
        before = [] if self.token_before is None else [self.token_before]
        emitted = convert_tokens([*before, *tokens])
        texts = [self._decode([token]) for token in emitted.tokens]
        spans = compute_token_spans(self.head_type, emitted, texts, self.punctuation)[len(before) :]
        token_ids = emitted.tokens[len(before) :]
        pieces = self.tokenizer.convert_ids_to_tokens(token_ids)
        words = group_into_words(spans, token_ids, pieces, self._decode, self.punctuation)
        follows_word = bool(before) and before[0].token_id not in self.event_names
        is_continuation = follows_word and not self._starts_word(tokens[0])
        return [
            StreamWord(
                word.text,
                round(word.start * self.frame_s, 3),
                round(word.end * self.frame_s, 3),
                word.confidence,
                is_continuation=is_continuation and index == 0,
            )
            for index, word in enumerate(words)
            if word.text
        ]

    def _starts_word(self, token: Token) -> bool:
        """Return whether a token starts a word, by the rule of `group_into_words`."""
        text = self._decode([token.token_id])
        return self.tokenizer.convert_ids_to_tokens(token.token_id) != text and text not in self.punctuation

    def _decode(self, token_ids: list[int]) -> str:
        """Convert token ids to text without merging repeats."""
        return str(self.tokenizer.decode(token_ids, group_tokens=False))


def convert_tokens(tokens: Sequence[Token]) -> EmittedTokens:
    """Convert tokens to the lists that `timestamps.py` reads.

    Args:
        tokens: the tokens; all of them have a confidence, or none.
    """
    confidences = [token.confidence for token in tokens if token.confidence is not None]
    return EmittedTokens(
        [token.token_id for token in tokens],
        [token.frame for token in tokens],
        [token.duration for token in tokens],
        confidences or None,
    )
