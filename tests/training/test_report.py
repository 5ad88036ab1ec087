"""The HTML report of an evaluation: numbers, groups, confusions, escaping, and no request to the network."""

import re
from html.parser import HTMLParser

import pytest

from transformers_parakeet.training import EvaluatedClip, Evaluation, compute_rates, score_clips, write_report
from transformers_parakeet.training.metrics import AlignedWord
from transformers_parakeet.training.report import count_confusions, format_diagram, format_report, group_by_length

CLIPS = [
    EvaluatedClip('<b>&"bad".wav', 1.0, "the cat sat", "a cat sat down"),
    EvaluatedClip("two.wav", 3.0, "the dog", "a dog"),
    EvaluatedClip("three.wav", 5.0, "the end of it", "the end it"),
    EvaluatedClip("four.wav", 2.0, "good", "good"),
]


@pytest.fixture(scope="module")
def evaluation():
    """Return the evaluation of four clips."""
    # symbols stay, so that escaping is tested
    scores = score_clips(CLIPS, normalize=str)
    return Evaluation(scores, compute_rates(scores), audio_seconds=11.0, processing_seconds=2.2)


class Page(HTMLParser):
    """Collects the tags, attributes, and the cells of tables of a page, and checks that tags are closed."""

    void_tags = frozenset({"meta", "line", "circle"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open_tags, self.rows, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open_tags == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.void_tags:
            self.open_tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in self.void_tags:
            assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open_tags and self.open_tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_contains_the_rates_and_counts(evaluation):
    page = Page(format_report(evaluation, "Digits", {"model": "demo <1>"}))
    # three substitutions or deletions and one insertion in ten words
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["word error rate"][0] == "40.00%"
    assert rows["word error rate"][2] == "4"
    assert [rows[name][::2] for name in ("substituted words", "deleted words", "inserted words")] == [
        ["20.00%", "2"],
        ["10.00%", "1"],
        ["10.00%", "1"],
    ]
    rate = evaluation.rates["wer"]
    assert rows["word error rate"][1] == f"{rate.low:.2%} to {rate.high:.2%}"
    assert rows["model"] == ["demo <1>"]
    assert "4 clips, 10 reference words, 11.0 s of audio, 2.2 s of processing, real-time factor 0.2000" in page.text


def test_the_page_contains_confused_words_and_alignments(evaluation):
    assert count_confusions(evaluation.scores) == {
        AlignedWord("the", "a"): 2,
        AlignedWord(None, "down"): 1,
        AlignedWord("of", None): 1,
    }
    page = Page(format_report(evaluation))
    assert ["the \u2192 a", "2"] in page.rows
    assert ["of", "1"] in page.rows
    assert ["down", "1"] in page.rows
    # the clip with two errors is the first of three; the clip without errors is not listed
    alignments = [row for row in page.rows if row and row[0] in ("reference", "hypothesis")]
    assert alignments[:2] == [
        ["reference", "the", "cat", "sat", "\u2013"],
        ["hypothesis", "a", "cat", "sat", "down"],
    ]
    assert len(alignments) == 6
    assert '<b>&"bad".wav: 2 errors in 3 words (1 substituted, 0 deleted, 1 inserted), 1.0 s' in page.text


def test_the_page_is_escaped_and_makes_no_request(evaluation, tmp_path):
    attack = "<script>alert(1)</script>"
    clips = [EvaluatedClip(attack, 1.0, f"{attack} one", 'one <img src="http://example.org/x">')]
    scores = score_clips(clips, normalize=str)
    path = tmp_path / "report.html"
    write_report(Evaluation(scores, compute_rates(scores), 1.0, 1.0), path, attack, {attack: attack})
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "b"} & set(page.tags)
    assert not {"src", "href", "onclick", "onload"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import", text)
    # title, heading, settings, name of the clip, confusion, alignment
    assert page.text.count(attack) >= 6


def test_clips_are_grouped_by_length():
    # 25 clips: the shortest 12 are right, the others have one wrong word of two
    clips = [EvaluatedClip("", float(index), "one two", "one two" if index < 12 else "one x") for index in range(25)]
    groups = group_by_length(score_clips(clips[::-1]))
    assert [group.num_clips for group in groups] == [2, 3, 2, 3, 2, 3, 2, 3, 2, 3]
    assert [group.rate.value for group in groups] == [0.0] * 4 + [0.0] + [0.5] * 5
    assert groups[1].duration == 3.0
    # a group without reference words is left out
    assert (
        group_by_length(score_clips([EvaluatedClip("", 1.0, "", "a"), EvaluatedClip("", 2.0, "a", "a")]))[0].num_clips
        == 1
    )


def test_the_diagram_places_points_by_length_and_rate():
    clips = [EvaluatedClip("", 1.0, "a b", "a x"), EvaluatedClip("", 2.0, "a b", "x y")]
    svg = format_diagram(group_by_length(score_clips(clips)))
    points = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    # the diagram is from 56 to 624 and from 216 to 16; the longest clip and the highest rate are at its corner
    assert points == [(340.0, 116.0), (624.0, 16.0)]


def test_an_evaluation_without_errors_has_a_page():
    scores = score_clips([EvaluatedClip("a.wav", 0.0, "one", "one")])
    page = Page(format_report(Evaluation(scores, compute_rates(scores), 0.0, 1.0)))
    assert "real-time factor nan" in page.text
