"""Checks times against those of NVIDIA NeMo on 48 cases, and each function by hand."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_parakeet import ParakeetFeatureExtractor, ParakeetProcessor, load_nemo
from transformers_parakeet.decoding import collapse_ctc
from transformers_parakeet.nemo.sentencepiece import build_tokenizer
from transformers_parakeet.processing_parakeet import to_emitted_tokens
from transformers_parakeet.timestamps import (
    AGGREGATIONS,
    EmittedTokens,
    Span,
    aggregate_confidence,
    collect_emitted_tokens,
    compute_token_spans,
    find_supported_punctuation,
    group_into_segments,
    group_into_words,
    is_special_token,
    merge_repeats,
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
    """Return the tokenizer of the golden CTC model, or that of a released checkpoint."""
    if name == "trained":
        return load_nemo(HERE / "golden" / "ctc" / "model.nemo")[1].tokenizer
    return build_tokenizer([REAL.read_bytes()], kind)


@cache
def processor(name: str, kind: str) -> ParakeetProcessor:
    """Return a processor with one of these tokenizers."""
    return ParakeetProcessor(ParakeetFeatureExtractor(), tokenizer(name, kind), decoder_type=kind)


def emissions_of(case: dict[str, Any]) -> EmittedTokens:
    """Return the tokens of a golden case."""
    if case["kind"] == "ctc":
        # the blank is the last token of the vocabulary
        blank_id = 128 if case["tokenizer"] == "trained" else 8192
        return to_emitted_tokens(collapse_ctc(torch.tensor([case["raw_argmax"]]), blank_id))
    return EmittedTokens(case["ids"], case["frames"], case.get("durations") or [0] * len(case["ids"]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", ["char", "word", "segment"])
def test_times_equal_nemo(level: str, case: dict[str, Any]):
    reader = processor(case["tokenizer"], case["kind"])
    emissions = emissions_of(case)
    assert emissions.tokens == case["ids"]
    assert reader.to_text(emissions) == case["text"]
    options = {"head_type": case["kind"], "gap_threshold": case["segment_gap_threshold"]}
    seconds = reader.chunks(emissions, level, frame_duration_s=FRAME_S, **options)
    frames = reader.chunks(emissions, level, frame_duration_s=1.0, **options)
    # NeMo gives a character of a transducer as a list of one text
    assert [chunk["text"].strip() for chunk in frames] == ["".join(truth[level]).strip() for truth in case[level]]
    offsets = [(truth["start_offset"], truth["end_offset"]) for truth in case[level]]
    assert [chunk["timestamp"] for chunk in frames] == offsets
    # milliseconds
    times = [(round(truth["start"], 3), round(truth["end"], 3)) for truth in case[level]]
    assert [chunk["timestamp"] for chunk in seconds] == times


def test_the_real_vocabulary_has_the_punctuation_of_nemo():
    assert sorted(processor("real", "tdt").punctuation) == GOLDEN["real_punctuation"]
    # the CTC tokenizer has the same pieces and a different blank
    assert processor("real", "ctc").punctuation == processor("real", "tdt").punctuation


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match="must be one of char, word, segment, got 'sentence'"):
        processor("trained", "ctc").chunks(EmittedTokens([1], [0], [1]), "sentence")


def test_ctc_emissions_are_runs_of_tokens_with_their_smallest_confidence():
    ids = [9, 4, 4, 9, 4, 5, 5, 5, 9]
    confidence = [0.0, 0.875, 0.75, 0.125, 0.5, 0.375, 0.25, 0.625, 0.0]

    def emissions(ids: list[int], confidence: list[float] | None = None) -> EmittedTokens:
        frame_confidence = None if confidence is None else torch.tensor([confidence])
        return to_emitted_tokens(collapse_ctc(torch.tensor([ids], dtype=torch.long), 9, frame_confidence))

    assert emissions(ids, confidence) == EmittedTokens([4, 4, 5], [1, 4, 5], [2, 1, 3], [0.75, 0.5, 0.25])
    assert emissions(ids).confidence is None
    assert emissions([9, 9], [0.5, 0.5]) == EmittedTokens([], [], [], [])
    assert emissions([]) == EmittedTokens([], [], [])
    # one token on all frames
    assert emissions([3, 3]) == EmittedTokens([3], [0], [2])


def test_ctc_runs_keep_blanks():
    assert merge_repeats([9, 4, 4, 9]) == [(9, 0, 1), (4, 1, 3), (9, 3, 4)]
    assert merge_repeats([]) == []


def test_the_frame_of_a_transducer_step_is_the_sum_of_earlier_durations():
    # start, label that stays, label that advances, blank, label, then padding
    ids, durations = [9, 4, 5, 9, 4, 2, 2], [0, 0, 3, 1, 2, 0, 0]
    assert collect_emitted_tokens(ids, durations, {9, 2}) == EmittedTokens([4, 5, 4], [0, 0, 4], [0, 3, 2])
    assert collect_emitted_tokens(ids, durations, {9, 2}).confidence is None
    assert collect_emitted_tokens([], [], {9}) == EmittedTokens([], [], [])


def test_every_transducer_step_needs_a_duration():
    with pytest.raises(ValueError, match="zip"):
        collect_emitted_tokens([1, 2], [1], {9})


def test_word_starts_and_special_tokens_have_no_supported_punctuation():
    pieces = ["\u2581-", "-", "a.b", "<;>", "[:]", "##!", "?", "\u00bf", "$", "+", "x", "<", "&"]
    # the dollar, plus and angle signs are symbols and not punctuation
    assert find_supported_punctuation(pieces) == {"-", ".", "?", "\u00bf", "&"}
    assert find_supported_punctuation([*pieces, "!blank!"], blank_token="!blank!") == {"-", ".", "?", "\u00bf", "&"}
    assert find_supported_punctuation([]) == frozenset()


@pytest.mark.parametrize(
    ("piece", "special"), [("<unk>", True), ("[CLS]", True), ("<", False), ("", False), ("<a]", False), ("a>", False)]
)
def test_is_special(piece: str, special: bool):
    assert is_special_token(piece) is special


LETTERS = EmittedTokens([7, 8, 9], [2, 5, 6], [1, 0, 4], [0.5, 0.25, 0.75])


def test_times_of_tokens_by_hand():
    def spans(kind: str) -> list[tuple[int, int]]:
        return [(span.start, span.end) for span in compute_token_spans(kind, LETTERS, ["a", "?", "b"], {"?"})]

    # punctuation has no length, except in RNN-T
    assert spans("tdt") == [(2, 3), (3, 3), (6, 10)]
    assert spans("rnnt") == [(2, 3), (5, 6), (6, 7)]
    # a CTC token starts at the token before it, the first one frame before itself
    assert spans("ctc") == [(1, 2), (2, 2), (5, 6)]


def test_punctuation_at_the_start_of_a_clip_keeps_its_time():
    first = EmittedTokens([8], [3], [2])
    assert compute_token_spans("tdt", first, ["?"], {"?"}) == [Span("?", 3, 5)]
    assert compute_token_spans("ctc", EmittedTokens([8], [0], [2]), ["?"], {"?"}) == [Span("?", 0, 0)]


def test_words_start_with_pieces_that_differ_from_their_text():
    pieces = ["\u2581so", "on", ".", "\u2581", "?", "\u2581no"]
    texts = ["so", "on", ".", "", "?", "no"]
    chars = [Span(text, 2 * i, 2 * i + 1, 0.9 - 0.1 * i) for i, text in enumerate(texts)]

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids).replace("\u2581", " ").strip()

    words = group_into_words(chars, list(range(6)), pieces, decode, {".", "?"})
    # a piece that is only a word start begins a word, which the punctuation joins
    assert [(word.text, word.start, word.end) for word in words] == [("soon.", 0, 5), ("?", 6, 9), ("no", 10, 11)]
    assert [word.confidence for word in words] == pytest.approx([0.7, 0.5, 0.4])
    means = group_into_words(chars, list(range(6)), pieces, decode, {".", "?"}, "mean")
    assert [word.confidence for word in means] == pytest.approx([0.8, 0.55, 0.4])
    assert group_into_words([], [], [], decode, {"."}) == []


WORDS = [Span("Well.", 0, 4, 0.5), Span("so", 5, 9, 0.5), Span("it", 30, 31, 0.25), Span("is?", 33, 40, 0.5)]


def test_segments_end_after_punctuation():
    assert group_into_segments(WORDS, ".?!") == [Span("Well.", 0, 4, 0.5), Span("so it is?", 5, 40, 0.25)]
    assert group_into_segments(WORDS[:3], ".?!")[-1] == Span("so it", 5, 31, 0.25)
    assert group_into_segments(WORDS, "") == [Span("Well. so it is?", 0, 40, 0.25)]
    assert group_into_segments([], ".") == []


def test_segments_end_at_gaps():
    # with a gap threshold, punctuation ends a segment only after the first word of the segment
    assert [s.text for s in group_into_segments(WORDS, ".?!", gap_threshold=21)] == ["Well.", "so", "it is?"]
    assert [s.text for s in group_into_segments(WORDS, ".?!", gap_threshold=22)] == ["Well.", "so it is?"]
    assert [s.text for s in group_into_segments(WORDS, "", gap_threshold=2)] == ["Well. so", "it", "is?"]


def test_aggregation_of_confidences_by_hand():
    spans = [Span("a", 0, 1, 0.5), Span("b", 1, 2, 0.25), Span("c", 2, 3)]
    assert {how: aggregate_confidence(spans, how) for how in AGGREGATIONS} == {
        "mean": 0.375,
        "min": 0.25,
        "prod": 0.125,
    }
    assert aggregate_confidence([Span("c", 2, 3)], "min") is None


@pytest.mark.parametrize("call", [aggregate_confidence, lambda s, how: group_into_segments(s, ".", aggregation=how)])
def test_unknown_aggregations_are_refused(call: Any):
    with pytest.raises(ValueError, match="must be one of mean, min, prod, got 'max'"):
        call([Span("a", 0, 1, 0.5)], "max")
