"""When a word of a stream is complete: at the next word, at an event, after a pause, or after many tokens."""

import pytest
from conftest import TESTS, tiny_tokenizer

import transformers_parakeet as tp
from transformers_parakeet.long_audio import StreamWord, join_stream_words
from transformers_parakeet.long_audio.stream_words import MAX_WORD_TOKENS, Token, WordCollector
from transformers_parakeet.timestamps import EmittedTokens

FRAME_S = 0.08


def collector(head_type="tdt"):
    """Create a collector with the tokenizer of the tests, which has the punctuation `,` and `.`."""
    processor = tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tiny_tokenizer("tdt"), decoder_type="tdt")
    return processor, WordCollector(processor, head_type, FRAME_S)


def tokens_of(processor, text, first_frame=0, distance=2):
    """Return the tokens of a text, one every `distance` frames, each one frame long."""
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [
        Token(token_id, first_frame + distance * index, 1, 0.9 - 0.01 * index) for index, token_id in enumerate(ids)
    ]


@pytest.mark.parametrize("head_type", ["tdt", "rnnt", "ctc"])
@pytest.mark.parametrize("part", [1, 2, 5])
def test_words_in_parts_equal_those_of_the_whole(head_type, part):
    processor, words = collector(head_type)
    tokens = tokens_of(processor, "the quick brown fox, sea shells. again by")
    collected = []
    for start in range(0, len(tokens), part):
        new = tokens[start : start + part]
        collected += words.add(new, new[-1].frame + 1)[0]
        # only the incomplete word is stored
        assert len(words.word_tokens) <= 8
    collected += words.complete_word()
    emitted = EmittedTokens(
        [token.token_id for token in tokens],
        [token.frame for token in tokens],
        [token.duration for token in tokens],
        [token.confidence for token in tokens],
    )
    expected = processor.chunks(emitted, "word", head_type)
    assert [(word.text, (word.start, word.end), word.confidence) for word in collected] == [
        (chunk["text"], chunk["timestamp"], chunk["confidence"]) for chunk in expected
    ]
    assert join_stream_words(collected) == processor.to_text(emitted)
    assert not any(word.is_continuation for word in collected)


def test_tentative_words_are_not_committed():
    processor, words = collector()
    tokens = tokens_of(processor, "the quick")
    committed, _ = words.add(tokens, tokens[-1].frame + 1)
    assert [word.text for word in committed] == ["the"]
    assert [word.text for word in words.build_words()] == ["quick"]
    # a token that follows for this call only starts another word
    [next_token] = tokens_of(processor, "the")[:1]
    assert [word.text for word in words.build_words([next_token])] == ["quick", "the"]
    assert [word.text for word in words.build_words()] == ["quick"]


def test_a_pause_commits_a_word_and_late_punctuation_continues_it():
    processor, words = collector()
    tokens = tokens_of(processor, "fox")
    end = tokens[-1].frame + 1
    assert words.add(tokens, end + 9) == ([], [])
    committed, _ = words.add([], end + 10)
    assert [word.text for word in committed] == ["fox"]
    assert words.add([], end + 100) == ([], [])
    comma = processor.tokenizer.convert_tokens_to_ids(",")
    words.add([Token(comma, end + 120, 1, 0.5)], end + 121)
    [late] = words.complete_word()
    assert (late.text, late.is_continuation) == (",", True)
    # TDT places punctuation at the end of the token before
    assert late.start == late.end == round(end * FRAME_S, 3)
    assert join_stream_words([*committed, late]) == "fox,"
    # the next word is separated by a space
    words.add(tokens_of(processor, "by", end + 130), end + 140)
    assert join_stream_words([*committed, late, *words.complete_word()]) == "fox, by"


def test_events_end_a_word_and_are_not_text():
    processor = tp.load_nemo(TESTS / "golden" / "real_configs" / "eou" / "model.nemo")[1]
    vocabulary = processor.tokenizer.get_vocab()
    words = WordCollector(processor, "rnnt", FRAME_S)
    start = next(piece for piece in vocabulary if piece.startswith("\u2581") and len(piece) > 2)
    ids = [vocabulary[start], vocabulary["<EOU>"], vocabulary["<EOB>"]]
    committed, events = words.add([Token(token_id, 5 * index, 0, None) for index, token_id in enumerate(ids)], 11)
    assert [(word.text, word.confidence) for word in committed] == [(start[1:], None)]
    assert [(event.name, event.time) for event in events] == [("<EOU>", 0.4), ("<EOB>", 0.8)]
    assert words.build_words() == []


def test_a_word_without_end_is_split():
    processor, words = collector()
    [first, *_] = tokens_of(processor, "the")
    letter = processor.tokenizer.convert_tokens_to_ids("s")
    tokens = [first, *(Token(letter, 2 + frame, 1, 0.9) for frame in range(200))]
    committed, _ = words.add(tokens, 203)
    assert [word.is_continuation for word in committed] == [False, True, True]
    assert len(words.word_tokens) <= MAX_WORD_TOKENS
    text = join_stream_words([*committed, *words.complete_word()])
    assert text == processor.tokenizer.decode([token.token_id for token in tokens], group_tokens=False)


def test_join_stream_words():
    words = [StreamWord("a", 0, 1), StreamWord("b", 1, 2, is_continuation=True), StreamWord("c", 2, 3)]
    assert join_stream_words(words) == "ab c"
    assert join_stream_words([]) == ""
