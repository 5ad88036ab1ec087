"""Checks times against NVIDIA NeMo's on 48 cases, and the pieces they are made of by hand."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from transformers_parakeet import ParakeetFeatureExtractor, ParakeetProcessor, load_nemo
from transformers_parakeet.nemo.sentencepiece import build_tokenizer
from transformers_parakeet.timestamps import (
    AGGREGATIONS,
    Emissions,
    Span,
    aggregate,
    char_spans,
    ctc_emissions,
    is_special,
    segment_spans,
    supported_punctuation,
    transducer_emissions,
    word_spans,
)

HERE = Path(__file__).parent
REAL = HERE / "data" / "parakeet-tdt-0.6b-v3.model"
GOLDEN = json.loads((HERE / "golden" / "timestamp_cases.json").read_text())
CASES = [
    pytest.param(case, id=f"{case['tokenizer']}-{case['kind']}-gap{case['segment_gap_threshold']}-{case['source'][:9]}")
    for case in GOLDEN["cases"]
]
# frames of 80 ms
FRAME_S = GOLDEN["frame_seconds"]


@cache
def tokenizer(name: str, kind: str) -> Any:
    if name == "trained":
        return load_nemo(HERE / "golden" / "ctc" / "model.nemo")[1].tokenizer
    return build_tokenizer([REAL.read_bytes()], kind)


@cache
def processor(name: str, kind: str) -> ParakeetProcessor:
    return ParakeetProcessor(ParakeetFeatureExtractor(), tokenizer(name, kind), decoder_type=kind)


def emissions_of(case: dict[str, Any]) -> Emissions:
    if case["kind"] == "ctc":
        # the blank comes last in the vocabulary
        return ctc_emissions(case["raw_argmax"], 128 if case["tokenizer"] == "trained" else 8192)
    return Emissions(case["ids"], case["frames"], case.get("durations") or [0] * len(case["ids"]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", ["char", "word", "segment"])
def test_times_equal_nemo(level: str, case: dict[str, Any]):
    reader = processor(case["tokenizer"], case["kind"])
    emissions = emissions_of(case)
    assert emissions.tokens == case["ids"]
    assert reader.to_text(emissions) == case["text"]
    options = {"kind": case["kind"], "gap_threshold": case["segment_gap_threshold"]}
    seconds = reader.chunks(emissions, level, frame_s=FRAME_S, **options)
    frames = reader.chunks(emissions, level, frame_s=1.0, **options)
    # NeMo gives a character of a transducer as a list of one text
    assert [chunk["text"].strip() for chunk in frames] == ["".join(truth[level]).strip() for truth in case[level]]
    offsets = [(truth["start_offset"], truth["end_offset"]) for truth in case[level]]
    assert [chunk["timestamp"] for chunk in frames] == offsets
    # milliseconds
    times = [(round(truth["start"], 3), round(truth["end"], 3)) for truth in case[level]]
    assert [chunk["timestamp"] for chunk in seconds] == times


def test_real_vocabulary_has_nemos_punctuation():
    assert sorted(processor("real", "tdt").punctuation) == GOLDEN["real_punctuation"]
    # the pieces of the CTC tokenizer are the same: its blank alone differs
    assert processor("real", "ctc").punctuation == processor("real", "tdt").punctuation


def test_level_must_be_known():
    with pytest.raises(ValueError, match="must be one of char, word, segment, got 'sentence'"):
        processor("trained", "ctc").chunks(Emissions([1], [0], [1]), "sentence")


def test_ctc_emissions_merge_runs_and_keep_the_smallest_confidence():
    ids = [9, 4, 4, 9, 4, 5, 5, 5, 9]
    sure = [0.0, 0.9, 0.7, 0.1, 0.8, 0.3, 0.2, 0.6, 0.0]
    assert ctc_emissions(ids, 9, sure) == Emissions([4, 4, 5], [1, 4, 5], [2, 1, 3], [0.7, 0.8, 0.2])
    assert ctc_emissions(ids, 9).confidence is None
    assert ctc_emissions([9, 9], 9, [0.5, 0.5]) == Emissions([], [], [], [])
    assert ctc_emissions([], 9) == Emissions([], [], [])
    # nothing but one token
    assert ctc_emissions([3, 3], 9) == Emissions([3], [0], [2])


def test_transducer_emissions_sum_the_durations():
    # start, label that stays, label that moves, blank, label, then padding
    ids, durations = [9, 4, 5, 9, 4, 2, 2], [0, 0, 3, 1, 2, 0, 0]
    sure = [0.0, 0.4, 0.5, 0.0, 0.6, 0.0, 0.0]
    assert transducer_emissions(ids, durations, {9, 2}, sure) == Emissions(
        [4, 5, 4], [0, 0, 4], [0, 3, 2], [0.4, 0.5, 0.6]
    )
    assert transducer_emissions(ids, durations, {9, 2}).confidence is None
    assert transducer_emissions([], [], {9}) == Emissions([], [], [])


def test_transducer_emissions_need_one_duration_per_step():
    with pytest.raises(ValueError, match="zip"):
        transducer_emissions([1, 2], [1], {9})


def test_supported_punctuation_leaves_out_word_starts_and_special_tokens():
    pieces = ["\u2581-", "-", "a.b", "<;>", "[:]", "##!", "?", "\u00bf", "$", "+", "x", "<", "&"]
    # dollar and plus are symbols, not punctuation; so is a lone angle
    assert supported_punctuation(pieces) == {"-", ".", "?", "\u00bf", "&"}
    assert supported_punctuation([*pieces, "!blank!"], blank="!blank!") == {"-", ".", "?", "\u00bf", "&"}
    assert supported_punctuation([]) == frozenset()


@pytest.mark.parametrize(
    ("piece", "special"), [("<unk>", True), ("[CLS]", True), ("<", False), ("", False), ("<a]", False), ("a>", False)]
)
def test_is_special(piece: str, special: bool):
    assert is_special(piece) is special


LETTERS = Emissions([7, 8, 9], [2, 5, 6], [1, 0, 4], [0.5, 0.25, 0.75])


def test_char_spans_of_each_head():
    def spans(kind: str) -> list[tuple[int, int]]:
        return [(span.start, span.end) for span in char_spans(kind, LETTERS, ["a", "?", "b"], {"?"})]

    # punctuation is a point at the end of what it follows, except in RNN-T
    assert spans("tdt") == [(2, 3), (3, 3), (6, 10)]
    assert spans("rnnt") == [(2, 3), (5, 6), (6, 7)]
    # CTC: a token spans from the token before it to itself, the first from one frame before
    assert spans("ctc") == [(1, 2), (2, 2), (5, 6)]


def test_punctuation_that_comes_first_keeps_its_time():
    first = Emissions([8], [3], [2])
    assert char_spans("tdt", first, ["?"], {"?"}) == [Span("?", 3, 5)]
    assert char_spans("ctc", Emissions([8], [0], [2]), ["?"], {"?"}) == [Span("?", 0, 0)]


def test_words_start_with_pieces_that_differ_from_their_text():
    pieces = ["\u2581so", "on", ".", "\u2581", "?", "\u2581no"]
    texts = ["so", "on", ".", "", "?", "no"]
    chars = [Span(text, 2 * i, 2 * i + 1, 0.9 - 0.1 * i) for i, text in enumerate(texts)]

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids).replace("\u2581", " ").strip()

    words = word_spans(chars, list(range(6)), pieces, decode, {".", "?"})
    # a bare word start opens a word, which the punctuation then joins
    assert [(word.text, word.start, word.end) for word in words] == [("soon.", 0, 5), ("?", 6, 9), ("no", 10, 11)]
    assert [word.confidence for word in words] == pytest.approx([0.7, 0.5, 0.4])
    means = word_spans(chars, list(range(6)), pieces, decode, {".", "?"}, "mean")
    assert [word.confidence for word in means] == pytest.approx([0.8, 0.55, 0.4])
    assert word_spans([], [], [], decode, {"."}) == []


WORDS = [Span("Well.", 0, 4, 0.5), Span("so", 5, 9, 0.5), Span("it", 30, 31, 0.25), Span("is?", 33, 40, 0.5)]


def test_segments_end_with_punctuation():
    assert segment_spans(WORDS, ".?!") == [Span("Well.", 0, 4, 0.5), Span("so it is?", 5, 40, 0.25)]
    assert segment_spans(WORDS[:3], ".?!")[-1] == Span("so it", 5, 31, 0.25)
    assert segment_spans(WORDS, "") == [Span("Well. so it is?", 0, 40, 0.25)]
    assert segment_spans([], ".") == []


def test_segments_end_with_gaps():
    # punctuation counts on the first word of a segment only, and the gap is between the words
    assert [s.text for s in segment_spans(WORDS, ".?!", gap_threshold=21)] == ["Well.", "so", "it is?"]
    assert [s.text for s in segment_spans(WORDS, ".?!", gap_threshold=22)] == ["Well.", "so it is?"]
    assert [s.text for s in segment_spans(WORDS, "", gap_threshold=2)] == ["Well. so", "it", "is?"]


def test_aggregation_by_hand():
    spans = [Span("a", 0, 1, 0.5), Span("b", 1, 2, 0.25), Span("c", 2, 3)]
    assert {how: aggregate(spans, how) for how in AGGREGATIONS} == {"mean": 0.375, "min": 0.25, "prod": 0.125}
    assert aggregate([Span("c", 2, 3)], "min") is None


@pytest.mark.parametrize("call", [aggregate, lambda s, how: segment_spans(s, ".", aggregation=how)])
def test_aggregation_must_be_known(call: Any):
    with pytest.raises(ValueError, match="must be one of mean, min, prod, got 'max'"):
        call([Span("a", 0, 1, 0.5)], "max")
