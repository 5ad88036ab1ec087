"""Cues: exact cases, the search compared with all choices of cues, and properties of random word lists."""

import itertools
import math
import random

import pytest

from transformers_parakeet.cues import (
    CLAUSE_COST,
    PAUSE_COST,
    PAUSE_MS,
    PHRASE_COST,
    SHORT_CUE_COST,
    SILENCE_COST_PER_S,
    SINGLE_WORD_COST,
    SubtitleOptions,
    build_cues,
    choose_cues,
    correct_times,
    join_words,
    match_tokens,
    separate_starts,
    split_long_words,
    text_width,
)
from transformers_parakeet.results import TimedText


def evenly_spoken(text, word_s=0.3, start=0.0):
    """Return the words of a text, spoken one after the other with the same duration."""
    return [
        TimedText(word, round(start + index * word_s, 3), round(start + (index + 1) * word_s, 3))
        for index, word in enumerate(text.split())
    ]


def cue_texts(words, duration, **options):
    """Return the lines of each cue as strings."""
    cues = build_cues(words, duration, options=SubtitleOptions(**options))
    return [[join_words(line) for line in cue.lines] for cue in cues]


def test_cues_end_with_sentences():
    words = evenly_spoken("We left the house at noon. The train was late again. Nobody was waiting at the station.")
    # 51 characters fit on two lines, but all three sentences do not
    assert cue_texts(words, 10.0) == [
        ["We left the house at noon.", "The train was late again."],
        ["Nobody was waiting at the station."],
    ]


def test_a_long_sentence_is_broken_at_a_clause():
    words = evenly_spoken(
        "When the meeting was finally over, everybody in the room went straight to the station, tired and hungry."
    )
    assert cue_texts(words, 10.0) == [
        ["When the meeting was finally over,"],
        ["everybody in the room went straight", "to the station, tired and hungry."],
    ]


def test_a_sentence_without_commas_is_broken_at_a_pause():
    text = "the committee has decided that the old bridge by the river will be closed for the rest of the year"
    words = evenly_spoken(text)
    pause = next(index for index, word in enumerate(words) if word.text == "will")
    delayed = [TimedText(word.text, word.start + 0.6, word.end + 0.6) for word in words[pause:]]
    first_cue, second_cue = cue_texts(words[:pause] + delayed, 10.0)
    assert " ".join(first_cue) == "the committee has decided that the old bridge by the river"
    assert " ".join(second_cue) == "will be closed for the rest of the year"


def test_no_single_word_is_left_for_the_last_cue():
    # 91 characters: two lines of 42 leave "afternoon." over
    words = evenly_spoken(
        "the committee has decided that the old bridge by the river must be closed tomorrow afternoon."
    )
    cues = cue_texts(words, 10.0)
    assert len(cues) == 2
    assert min(len(" ".join(cue).split()) for cue in cues) >= 4


def test_titles_do_not_end_a_sentence():
    words = evenly_spoken(
        "Yesterday evening after the concert we had a long and very pleasant talk with Mr. Smith from the bank."
    )
    assert not any(cue[-1].endswith("Mr.") for cue in cue_texts(words, 10.0))


def test_the_two_lines_of_a_cue_have_similar_widths():
    words = evenly_spoken("the quick brown fox jumps over the lazy dog again today")
    assert cue_texts(words, 5.0) == [["the quick brown fox jumps", "over the lazy dog again today"]]


def test_a_cue_lasts_at_most_seven_seconds():
    words = evenly_spoken("one two three four five six seven eight", word_s=1.0)
    cues = build_cues(words, 8.0)
    assert [(cue.start_ms, cue.end_ms) for cue in cues] == [(0, 4000), (4000, 8000)]


def test_a_short_cue_is_lengthened_after_and_before_its_words():
    # the first word has room after it, the last word only before it
    words = [TimedText("Yes.", 1.0, 1.2), TimedText("No.", 9.8, 10.0)]
    cues = build_cues(words, 10.0)
    assert [(cue.start_ms, cue.end_ms) for cue in cues] == [(1000, 2000), (9000, 10000)]


def test_a_gap_is_left_between_cues():
    words = evenly_spoken("one two three four five six seven eight", word_s=1.0)
    cues = build_cues(words, 8.0, options=SubtitleOptions(min_gap=0.08))
    assert [(cue.start_ms, cue.end_ms) for cue in cues] == [(0, 3920), (4000, 8000)]


def test_a_word_longer_than_a_line_is_a_line_of_its_own():
    long_word = "x" * 50
    words = evenly_spoken(f"we say {long_word} now")
    assert cue_texts(words, 2.0) == [["we say"], [long_word, "now"]]


def test_a_long_word_is_broken_between_its_tokens():
    # 36 Japanese characters have the width of 72; there are no spaces, so NeMo's word is the whole text
    text = "\u4eca\u65e5\u306f\u826f\u3044\u5929\u6c17\u3067\u3059\u304c\u3001\u98a8\u304c\u5f37\u3044\u306e\u3067" * 2
    tokens = [TimedText(character, 0.2 * index, 0.2 * (index + 1)) for index, character in enumerate(text)]
    words = [TimedText(text, 0.0, 0.2 * len(text))]
    cues = build_cues(words, 8.0, tokens)
    assert all(text_width(join_words(line)) <= 42 for cue in cues for line in cue.lines)
    assert all(cue.end_ms - cue.start_ms <= 7000 for cue in cues)
    assert "".join(join_words(line) for cue in cues for line in cue.lines) == text
    # no line starts with the comma
    assert not any(join_words(line).startswith("\u3001") for cue in cues for line in cue.lines)
    # without tokens the word cannot be broken
    assert cue_texts(words, 8.0) == [[text]]


def test_punctuation_is_joined_to_the_token_before_it():
    text = "\u4eca" * 21 + "\u3002" + "\u65e5" * 9
    tokens = [TimedText(character, 0.2 * index, 0.2 * (index + 1)) for index, character in enumerate(text)]
    parts = split_long_words([TimedText(text, 0.0, 6.2)], tokens, 42)
    assert [part.text for part in parts] == ["\u4eca"] * 20 + ["\u4eca\u3002"] + ["\u65e5"] * 9
    assert [part.continues_word for part in parts] == [False] + [True] * 29
    # the end of the joined part is that of the punctuation
    assert (parts[20].start_ms, parts[20].end_ms) == (4000, 4400)


def test_a_long_word_in_latin_letters_stays_whole():
    word = "https://example.org/" + "a" * 40
    tokens = [TimedText(word[index : index + 5], index, index + 5) for index in range(0, len(word), 5)]
    assert [part.text for part in split_long_words([TimedText(word, 0, 60)], tokens, 42)] == [word]


def test_tokens_are_assigned_to_words_by_their_text():
    words = [TimedText("hello", 0, 1), TimedText("42 -", 1, 2), TimedText("you", 2, 3)]
    texts = ["he", "llo", " ", "42", " -", " you"]
    tokens = [TimedText(text, index, index + 1) for index, text in enumerate(texts)]
    matched = match_tokens(words, tokens)
    assert [[token.text for token in word_tokens] for word_tokens in matched] == [
        ["he", "llo"],
        [" ", "42", " -"],
        [" you"],
    ]
    assert match_tokens(words, tokens[:-1]) is None
    # tokens that do not match the words are ignored
    text = "\u4eca\u65e5\u306f"
    long_word, other_tokens = TimedText(text, 0, 1), [TimedText("\u4eca", 0, 1)]
    assert [word.text for word in split_long_words([long_word], other_tokens, line_width=4)] == [text]


def test_times_are_limited_to_the_recording_and_ordered():
    words = [TimedText("a", -1.0, 0.5), TimedText("b", 2.0, 1.0), TimedText("c", 1.0, 1.5), TimedText("d", 9.0, 9.5)]
    corrected = correct_times(split_long_words(words, [], 42), 3000)
    assert [(word.start_ms, word.end_ms) for word in corrected] == [(0, 500), (2000, 2000), (2000, 2000), (3000, 3000)]


@pytest.mark.parametrize(
    ("starts_ms", "duration_ms", "separated"),
    [
        ([0, 0, 0], 5000, [0, 1, 2]),
        ([500, 500, 800], 5000, [499, 500, 800]),
        ([900, 1000, 1000], 1000, [900, 998, 999]),
        ([0, 0, 2, 2], 4, [0, 1, 2, 3]),
        # less than 1 ms per cue
        ([0, 0, 0], 1, [0, 1, 1]),
        ([], 1000, []),
    ],
)
def test_cues_start_one_after_the_other(starts_ms, duration_ms, separated):
    assert separate_starts(starts_ms, duration_ms) == separated


@pytest.mark.parametrize(
    "options", [{"line_width": 0}, {"min_duration": 8.0}, {"min_duration": -1.0}, {"min_gap": -0.1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* must be .*, got"):
        SubtitleOptions(**options)


def fits_on_two_lines(words, line_width):
    """Return whether a break exists with which every line is narrow enough or has one word; tries all breaks."""
    return any(
        all(len(line) <= 1 or text_width(join_words(line)) <= line_width for line in (words[:index], words[index:]))
        for index in range(len(words))
    )


def plain_cost(words, ranges, duration_ms, options):
    """Compute the cost of a choice of cues from its definition; infinite if a cue is not allowed."""
    total = 0.0
    for first, stop in ranges:
        cue = words[first:stop]
        seconds = (max(word.end_ms for word in cue) - cue[0].start_ms) / 1000
        if len(cue) > 1 and (seconds > options.max_duration or not fits_on_two_lines(cue, options.line_width)):
            return math.inf
        if stop < len(words):
            pause = words[stop].start_ms - cue[-1].end_ms >= PAUSE_MS
            last_character = cue[-1].text[-1]
            total += (
                0
                if last_character in ".?!"
                else CLAUSE_COST
                if last_character in ",;:"
                else PAUSE_COST
                if pause
                else PHRASE_COST
            )
        starts_sentence = first == 0 or words[first - 1].text[-1] in ".?!"
        ends_sentence = stop == len(words) or cue[-1].text[-1] in ".?!"
        total += SINGLE_WORD_COST * (len(cue) == 1 and not (starts_sentence and ends_sentence))
        next_start = words[stop].start_ms if stop < len(words) else duration_ms
        total += SHORT_CUE_COST * (next_start - cue[0].start_ms < 1000 * options.min_duration)
        silences = [max(0, after.start_ms - before.end_ms) for before, after in itertools.pairwise(cue)]
        total += SILENCE_COST_PER_S * sum(silences) / 1000
        # the space at the line break is not counted
        lines = 2 if text_width(join_words(cue)) > options.line_width else 1
        width = text_width(join_words(cue)) - (lines - 1)
        total += max(0.0, 1 - width / (2 * options.line_width)) ** 2
    return total


def test_the_choice_of_cues_has_the_lowest_cost_of_all_choices():
    generator = random.Random(0)
    for _ in range(60):
        words, time = [], 0.0
        for _ in range(generator.randint(1, 10)):
            text = "x" * generator.randint(1, 12) + generator.choice(["", "", "", ",", "."])
            time += generator.choice([0.0, 0.0, 0.3, 0.9, 2.5])
            words.append(TimedText(text, time, time + generator.uniform(0, 1.5)))
            time = words[-1].end
        options = SubtitleOptions(line_width=14, max_duration=4.0)
        duration_ms = math.ceil(1000 * time)
        cue_words = correct_times(split_long_words(words, [], options.line_width), duration_ms)
        count = len(cue_words)
        all_ranges = [
            list(itertools.pairwise((0, *breaks, count)))
            for size in range(count)
            for breaks in itertools.combinations(range(1, count), size)
        ]
        lowest = min(plain_cost(cue_words, ranges, duration_ms, options) for ranges in all_ranges)
        chosen = plain_cost(cue_words, choose_cues(cue_words, duration_ms, options), duration_ms, options)
        # exact, because both costs are computed by the same function
        assert chosen == lowest
