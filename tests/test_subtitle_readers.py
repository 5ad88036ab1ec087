"""SRT, WebVTT and TextGrid files as other libraries read them: `srt`, `webvtt-py` and `praatio`."""

import io

import srt
import webvtt
from praatio import textgrid
from test_subtitles import check_limits, random_result

import transformers_parakeet as tp
from transformers_parakeet.subtitles import to_srt, to_textgrid, to_vtt

NUM_RANDOM_RESULTS = 200


def read_srt(result):
    """Return (start, end, lines) for each cue of the SRT file of a result, with times in milliseconds."""
    cues = srt.parse(to_srt(result))
    times = [(cue.start.total_seconds(), cue.end.total_seconds(), cue.content.split("\n")) for cue in cues]
    return [(round(1000 * start), round(1000 * end), lines) for start, end, lines in times]


def read_vtt(result, word_times):
    """Return (start, end, lines) for each cue of the WebVTT file of a result, with times in milliseconds."""
    cues = webvtt.from_buffer(io.StringIO(to_vtt(result, word_times=word_times)))
    return [
        (cue.start_time.in_milliseconds(), cue.end_time.in_milliseconds(), unescape(cue.text).split("\n"))
        for cue in cues
    ]


def unescape(text):
    """Replace the escapes of WebVTT, which webvtt-py leaves in the text."""
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def check_files(result):
    """Check that both libraries read the same cues, within the limits, with every word once and in order."""
    cues = read_srt(result)
    assert read_vtt(result, word_times=False) == cues
    assert read_vtt(result, word_times=True) == cues
    check_limits(result, cues)
    text = "".join(line for *_, lines in cues for line in lines)
    assert text.replace(" ", "") == "".join(word.text for word in result.words)
    if not result.tokens:
        # without the times of characters, no word is broken between lines
        words = [word for *_, lines in cues for word in " ".join(lines).split(" ")]
        assert words == [word.text for word in result.words]


def test_libraries_read_the_files_of_random_results():
    for seed in range(NUM_RANDOM_RESULTS):
        check_files(random_result(seed))


def test_libraries_read_the_files_of_recordings():
    results = list(tp.transcribe(sorted((tp.demo_model_path() / "clips").glob("*.flac")), model="demo"))
    assert sum(len(result.words) for result in results) > 20
    for result in results:
        check_files(result)


def test_praatio_reads_textgrids(tmp_path):
    for seed in range(NUM_RANDOM_RESULTS):
        result = random_result(seed)
        path = tmp_path / "result.TextGrid"
        path.write_text(to_textgrid(result), encoding="utf-8")
        tiers = textgrid.openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="silence")
        assert tiers.tierNames == ("words", "segments", "tokens")
        for name in tiers.tierNames:
            entries = tiers.getTier(name).entries
            # the intervals cover the recording without gaps or overlaps
            assert [entry.start for entry in entries] == [0.0, *(entry.end for entry in entries[:-1])]
            # every text once and in order; a text without duration shares the interval of its neighbour
            written = " ".join(entry.label for entry in entries if entry.label)
            assert written.split() == " ".join(item.text for item in getattr(result, name)).split()
