"""Formats of results: exact files, the JSON schema, and properties of the files of random results."""

import json
import random
import re
import unicodedata
from itertools import pairwise

import pytest
from conftest import TESTS

import transformers_parakeet as tp
from transformers_parakeet.results import TimedText, TranscriptionResult, to_timed_texts
from transformers_parakeet.subtitles import FORMATS, to_json, to_srt, to_tsv, to_txt, to_vtt

SCHEMA = json.loads((TESTS.parent / "docs" / "results.schema.json").read_text(encoding="utf-8"))
JSON_TYPES = {"string": str, "number": (int, float), "null": type(None), "object": dict, "array": list}

WORDS = (
    TimedText("Tom", 0.4, 0.72, 0.9),
    TimedText("&", 0.72, 0.8, 0.5),
    TimedText("Ann", 0.8, 1.2, 0.8),
    TimedText("-->", 1.2, 1.6, 0.7),
    TimedText("<home>.", 1.6, 2.4, 0.9),
    TimedText("Yes!", 3661.0, 3661.5, 1.0),
)
RESULT = TranscriptionResult(
    text="Tom & Ann --> <home>. Yes!",
    duration=3662.0,
    words=WORDS,
    segments=(TimedText("Tom & Ann --> <home>.", 0.4, 2.4, 0.5), TimedText("Yes!", 3661.0, 3661.5, 1.0)),
    tokens=(TimedText("Tom", 0.4, 0.72, 0.9), TimedText(" &", 0.72, 0.8, 0.5)),
    confidence=0.5,
    file="talk.wav",
    model="nvidia/parakeet-tdt-0.6b-v3",
    settings={"decoder": "tdt", "dtype": "float32"},
    version="0.1.0",
)


def check_schema(value, schema, path="result"):
    """Check a value against the keywords of JSON Schema that docs/results.schema.json uses."""
    known = {"type", "properties", "required", "additionalProperties", "items", "minimum", "maximum", "$ref", "$defs"}
    assert schema.keys() - known <= {"$schema", "title", "description"}, path
    if "$ref" in schema:
        return check_schema(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], path)
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    assert any(isinstance(value, JSON_TYPES[name]) and not isinstance(value, bool) for name in names), path
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        assert set(schema.get("required", [])) <= value.keys(), path
        assert schema.get("additionalProperties", True) or value.keys() <= properties.keys(), path
        for key in value.keys() & properties.keys():
            check_schema(value[key], properties[key], f"{path}.{key}")
    for index, item in enumerate(value if isinstance(value, list) else []):
        check_schema(item, schema["items"], f"{path}[{index}]")
    if isinstance(value, (int, float)):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), path
    return None


def read_time(text):
    """Convert `HH:MM:SS,mmm` or `HH:MM:SS.mmm` to milliseconds."""
    hours, minutes, seconds, milliseconds = map(
        int, re.fullmatch(r"(\d{2,}):([0-5]\d):([0-5]\d)[,.](\d{3})", text).groups()
    )
    return ((60 * hours + minutes) * 60 + seconds) * 1000 + milliseconds


def read_srt(text):
    """Read an SRT file; return (start, end, lines) for each cue with times in milliseconds."""
    cues = []
    for number, block in enumerate(text.split("\n\n") if text else [], start=1):
        number_line, time_line, *lines = block.strip("\n").split("\n")
        assert number_line == str(number)
        start, end = re.fullmatch(r"(\S+,\d{3}) --> (\S+,\d{3})", time_line).groups()
        cues.append((read_time(start), read_time(end), lines))
    return cues


def read_vtt(text):
    """Read a WebVTT file; return (start, end, lines) for each cue with times in milliseconds, and the tags of lines."""
    header, *blocks = text.split("\n\n")
    assert header.strip("\n") == "WEBVTT"
    cues, tags = [], []
    for block in blocks:
        assert block.count("-->") == 1
        time_line, *lines = block.strip("\n").split("\n")
        start, end = re.fullmatch(r"(\S+\.\d{3}) --> (\S+\.\d{3})", time_line).groups()
        tags.append([read_time(tag) for line in lines for tag in re.findall(r"<([\d:.]+)>", line)])
        lines = [re.sub(r"<[\d:.]+>", "", line) for line in lines]
        for line in lines:
            assert not re.search(r"[<>]|&(?!amp;|lt;|gt;)", line)
        lines = [line.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for line in lines]
        cues.append((read_time(start), read_time(end), lines))
    return cues, tags


def test_srt_is_written_exactly():
    assert to_srt(RESULT) == (
        "1\n00:00:00,400 --> 00:00:02,400\nTom & Ann --> <home>.\n\n2\n01:01:01,000 --> 01:01:02,000\nYes!\n"
    )


def test_vtt_is_written_exactly():
    assert to_vtt(RESULT) == (
        "WEBVTT\n\n00:00:00.400 --> 00:00:02.400\nTom &amp; Ann --&gt; &lt;home&gt;.\n\n"
        "01:01:01.000 --> 01:01:02.000\nYes!\n"
    )


def test_vtt_with_word_times_is_written_exactly():
    first_cue = to_vtt(RESULT, word_times=True).split("\n\n")[1]
    assert first_cue == (
        "00:00:00.400 --> 00:00:02.400\n"
        "Tom <00:00:00.720>&amp; <00:00:00.800>Ann <00:00:01.200>--&gt; <00:00:01.600>&lt;home&gt;."
    )


def test_tsv_is_written_exactly():
    assert to_tsv(RESULT) == "start\tend\ttext\n400\t2400\tTom & Ann --> <home>.\n3661000\t3661500\tYes!\n"


def test_txt_is_written_exactly():
    assert to_txt(RESULT) == "Tom & Ann --> <home>. Yes!\n"


def test_json_follows_the_schema_and_contains_every_field():
    fields = json.loads(to_json(RESULT))
    check_schema(fields, SCHEMA)
    assert list(fields) == SCHEMA["required"]
    assert fields["words"][3] == {"text": "-->", "start": 1.2, "end": 1.6, "confidence": 0.7}
    assert fields["tokens"][1] == {"text": " &", "start": 0.72, "end": 0.8, "confidence": 0.5}
    assert fields["segments"][1]["text"] == "Yes!"
    names = ("file", "duration", "text", "confidence", "model", "settings", "version")
    assert {name: fields[name] for name in names} == {name: getattr(RESULT, name) for name in names}
    # text is UTF-8, not escaped
    assert "\u4eca\u65e5" in to_json(TranscriptionResult("\u4eca\u65e5", 1.0))


def test_the_schema_refuses_wrong_results():
    fields = json.loads(to_json(RESULT))
    for name, value in (
        ("duration", -1),
        ("confidence", 1.1),
        ("words", [{"text": "a"}]),
        ("text", None),
        ("extra", 1),
    ):
        with pytest.raises(AssertionError):
            check_schema({**fields, name: value}, SCHEMA)
    del fields["settings"]
    with pytest.raises(AssertionError):
        check_schema(fields, SCHEMA)


@pytest.mark.parametrize(
    ("name", "expected"), [("txt", ""), ("srt", ""), ("vtt", "WEBVTT\n"), ("tsv", "start\tend\ttext\n")]
)
def test_a_result_without_text_gives_an_empty_file(name, expected):
    assert FORMATS[name](TranscriptionResult("", 0.0)) == expected


def test_missing_times_and_wrong_durations_are_refused():
    result = TranscriptionResult("one two", 1.0)
    with pytest.raises(ValueError, match="must have `words` to be written as SRT"):
        to_srt(result)
    with pytest.raises(ValueError, match="must have `words` to be written as WebVTT"):
        to_vtt(result)
    with pytest.raises(ValueError, match="must have `segments` to be written as TSV"):
        to_tsv(result)
    for duration in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`duration` must be a number of seconds"):
            TranscriptionResult("one", duration)


def test_a_result_is_made_from_the_output_of_the_pipeline():
    folder = tp.demo_model_path()
    model, processor = tp.load_nemo(folder)
    pipeline = tp.ParakeetASRPipeline(model, processor=processor)
    file = str(folder / "clips" / "one_two_three.flac")
    samples = tp.load_audio(file)
    levels = {
        level: to_timed_texts(pipeline(file, return_timestamps=level, return_confidence=True)["chunks"])
        for level in ("word", "segment", "char")
    }
    result = TranscriptionResult(
        "one two three", len(samples) / 16000, levels["word"], levels["segment"], levels["char"]
    )
    assert [(word.text, word.start, word.end) for word in result.words] == [
        ("one", 0.08, 0.48),
        ("two", 1.04, 1.52),
        ("three", 2.16, 2.56),
    ]
    assert all(0 < word.confidence <= 1 for word in result.words)
    check_schema(json.loads(to_json(result)), SCHEMA)
    assert read_srt(to_srt(result)) == [(80, 2560, ["one two three"])]


def random_text(generator):
    """Return a word: short, long, with punctuation, only punctuation, Chinese, or with characters of WebVTT."""
    letters = "".join(generator.choices("abcdefghij\u00e9", k=generator.randint(1, 9)))
    kind = generator.choice(["plain"] * 8 + ["end", "end", "clause", "punctuation", "long", "wide", "markup"])
    return {
        "plain": letters,
        "end": letters + generator.choice([".", "?", "!", "\u3002", '."']),
        "clause": letters + generator.choice([",", ";", "\u3001"]),
        "punctuation": generator.choice([".", ",", "-", "?", "..."]),
        "long": letters * 9 + "x" * 40,
        "wide": "".join(generator.choices("\u4eca\u65e5\u306f\u826f\u3044", k=generator.randint(1, 40))),
        "markup": generator.choice(["-->", "<b>", "&amp;", "A&B", "1", "<00:00:01.000>"]),
    }[kind]


def random_result(seed):
    """Return a result with random words, whose times can overlap, be out of order or leave the recording."""
    generator = random.Random(seed)
    # in three of four results, the times are in order, as in the output of the pipeline
    is_regular = seed % 4 > 0
    words, time = [], 0.0
    for _ in range(generator.randint(0, 120)):
        start = time + generator.choice([0.0, 0.0, 0.1, 0.3, 1.0, 3.0])
        end = start + generator.choice([0.0, 0.08, 0.3, 0.5, 0.9, 8.0 if generator.random() < 0.05 else 0.4])
        if not is_regular:
            start, end = (value + generator.uniform(-1.0, 1.0) for value in (start, end))
        words.append(TimedText(random_text(generator), round(start, 3), round(end, 3), generator.random()))
        time = max(time, end)
    duration = time * (1.0 if is_regular else generator.choice([0.3, 0.9, 1.1])) + 0.5
    segments, segment = [], []
    for index, word in enumerate(words):
        segment.append(word)
        if generator.random() < 0.2 or index == len(words) - 1:
            text = " ".join(word.text for word in segment)
            segments.append(TimedText(text, segment[0].start, segment[-1].end))
            segment = []
    text = " ".join(word.text for word in words)
    # in one of three results, every character is a token
    tokens = [token for word in words for token in character_tokens(word)] if seed % 3 == 0 else []
    return TranscriptionResult(text, duration, tuple(words), tuple(segments), tuple(tokens))


def character_tokens(word):
    """Return a token for each character of a word, with the time of the word divided evenly."""
    length_s = (word.end - word.start) / len(word.text)
    return [
        TimedText(f" {character}" if not index else character, word.start + index * length_s, word.end)
        for index, character in enumerate(word.text)
    ]


@pytest.mark.parametrize("block", range(4))
def test_files_of_random_results_keep_every_word_and_every_limit(block):
    for seed in range(60 * block, 60 * (block + 1)):
        result = random_result(seed)
        words = [word.text for word in result.words]
        cues = read_srt(to_srt(result))
        # SRT and WebVTT contain the same cues, with or without word times
        assert read_vtt(to_vtt(result))[0] == cues
        vtt_cues, tags = read_vtt(to_vtt(result, word_times=True))
        assert vtt_cues == cues
        for (start, end, _), cue_tags in zip(cues, tags, strict=True):
            times = [start, *cue_tags, end]
            assert all(before < after for before, after in pairwise(times))
        # every word once and in order
        if result.tokens:
            # long Chinese words can be broken
            assert "".join(line for *_, lines in cues for line in lines).replace(" ", "") == "".join(words)
        else:
            assert [word for *_, lines in cues for word in " ".join(lines).split(" ")] == words
        assert to_txt(result).split() == words
        assert " ".join(row.split("\t")[2] for row in to_tsv(result).splitlines()[1:]).split() == words
        fields = json.loads(to_json(result))
        check_schema(fields, SCHEMA)
        assert [word["text"] for word in fields["words"]] == words
        check_limits(result, cues)


def check_limits(result, cues):
    """Check order, overlap, duration and line width of the cues of a result."""
    duration_ms = 1000 * result.duration
    words = {word.text for word in result.words}
    starts = [0, *(end for _, end, _ in cues)]
    next_starts = [*(start for start, *_ in cues[1:]), duration_ms]
    for (start, end, lines), earliest, latest in zip(cues, starts, next_starts, strict=False):
        assert 0 <= earliest <= start < end <= latest <= duration_ms
        assert 1 <= len(lines) <= 2
        widths = [sum(1 + (unicodedata.east_asian_width(character) in "FW") for character in line) for line in lines]
        assert all(width <= 42 or line in words for width, line in zip(widths, lines, strict=True))
        assert end - start <= 7000 or (len(lines) == 1 and lines[0] in words)
        # a cue is shorter than one second only if there is less than 1 ms of room before and after it
        assert end - start >= 1000 or (latest - end < 1 and start == earliest)


def test_a_recording_without_room_for_cues_keeps_every_word():
    words = tuple(TimedText("word" * 12, 0.0, 0.0) for _ in range(5))
    cues = read_srt(to_srt(TranscriptionResult("x", 0.0, words)))
    assert [(start, end) for start, end, _ in cues] == [(0, 0)] * len(cues)
    assert sum(len(lines) for *_, lines in cues) == 5
