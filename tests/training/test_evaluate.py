"""Evaluation of the demo model, with error counts that are checked by hand, and intervals that are computed plainly."""

import json
import math
import random

import numpy as np
import pytest

import transformers_parakeet as tp
from transformers_parakeet.training import Evaluation, evaluate_pipeline, run_evaluation
from transformers_parakeet.training.metrics import (
    AlignedWord,
    ErrorCounts,
    EvaluatedClip,
    bootstrap_intervals,
    compute_rates,
    score_clips,
)


def clip(reference, hypothesis, duration=1.0, name="clip.wav"):
    """Return a clip with the arguments in the order of a test."""
    return EvaluatedClip(name, duration, reference, hypothesis)


CLIPS = [
    # "two" is replaced, "four" is inserted
    clip("One two three.", "one too three four", 2.0, "first.wav"),
    # "the" is deleted
    clip("the end", "End", 1.0, "second.wav"),
    clip("all right", "all right!", 3.0, "third.wav"),
    # the reference is empty
    clip("...", "hm", 0.5, "fourth.wav"),
]


def test_errors_of_clips_are_counted():
    scores = score_clips(CLIPS)
    assert [score.words for score in scores] == [
        ErrorCounts(hits=2, substitutions=1, deletions=0, insertions=1),
        ErrorCounts(hits=1, substitutions=0, deletions=1, insertions=0),
        ErrorCounts(hits=2, substitutions=0, deletions=0, insertions=0),
        ErrorCounts(hits=0, substitutions=0, deletions=0, insertions=1),
    ]
    # " four" and "the " have 5 and 4 characters, "two" and "too" differ in one
    assert [score.characters for score in scores] == [
        ErrorCounts(hits=12, substitutions=1, deletions=0, insertions=5),
        ErrorCounts(hits=3, substitutions=0, deletions=4, insertions=0),
        ErrorCounts(hits=9, substitutions=0, deletions=0, insertions=0),
        ErrorCounts(hits=0, substitutions=0, deletions=0, insertions=2),
    ]
    assert scores[0].alignment == (
        AlignedWord("one", "one"),
        AlignedWord("two", "too"),
        AlignedWord("three", "three"),
        AlignedWord(None, "four"),
    )
    assert scores[1].alignment == (AlignedWord("the", None), AlignedWord("end", "end"))
    # the transcripts are not changed
    assert scores[0].clip is CLIPS[0]


def test_rates_are_errors_per_reference_word_over_all_clips():
    rates = compute_rates(score_clips(CLIPS))
    assert {name: rate.value for name, rate in rates.items()} == pytest.approx(
        {"wer": 4 / 7, "cer": 12 / 29, "substitutions": 1 / 7, "deletions": 1 / 7, "insertions": 2 / 7}
    )
    for rate in rates.values():
        assert rate.low <= rate.value <= rate.high
    assert rates["wer"].low < rates["wer"].high


def test_intervals_of_equal_clips_have_no_width_and_are_reproducible():
    rates = compute_rates(score_clips([clip("one two", "one too")] * 5))
    assert (rates["wer"].low, rates["wer"].value, rates["wer"].high) == (0.5, 0.5, 0.5)
    scores = score_clips(CLIPS)
    assert compute_rates(scores) == compute_rates(scores)


def test_intervals_agree_with_the_exact_distribution_and_a_plain_loop():
    # 100 clips of one word, of which 20 are wrong: the errors of a draw follow the binomial distribution (100, 0.2),
    # whose 2.5 and 97.5 percentiles are 12 and 28
    errors = np.array([[1]] * 20 + [[0]] * 80)
    low, high = bootstrap_intervals(errors, np.ones_like(errors))
    # the percentiles of 1000 draws can differ from the exact ones by one word; with this seed they are equal
    assert abs(low[0] - 0.12) <= 0.01
    assert abs(high[0] - 0.28) <= 0.01
    # clips of different lengths, with another generator of random numbers
    generator = random.Random(0)
    lengths = [generator.randint(1, 30) for _ in range(60)]
    errors = [generator.randint(0, length // 3) for length in lengths]
    rates = []
    for _ in range(20000):
        draw = generator.choices(range(60), k=60)
        rates.append(sum(errors[index] for index in draw) / sum(lengths[index] for index in draw))
    expected = np.percentile(rates, (2.5, 97.5))
    interval = bootstrap_intervals(np.array([errors]).T, np.array([lengths]).T)[:, 0]
    # percentiles of 1000 and of 20000 draws: the largest difference is 0.0030, the width of the interval is 0.063
    assert np.abs(interval - expected).max() < 0.004


def test_clips_without_reference_words_are_refused():
    with pytest.raises(ValueError, match="at least one reference must have a word after normalisation, got 1 clips"):
        compute_rates(score_clips([clip("...", "one")]))


def test_the_worst_clips_have_the_most_errors():
    clips = [*CLIPS, clip("a b c d", "a x", name="fifth.wav"), clip("a", "b c d", name="sixth.wav")]
    scores = score_clips(clips)
    evaluation = Evaluation(scores, compute_rates(scores), audio_seconds=10.0, processing_seconds=2.5)
    # three errors in four words and in one word, two errors, one error in no word and in two words
    names = ["sixth.wav", "fifth.wav", "first.wav", "fourth.wav", "second.wav"]
    assert [score.clip.name for score in evaluation.worst_clips(10)] == names
    assert [score.clip.name for score in evaluation.worst_clips(2)] == names[:2]
    assert evaluation.real_time_factor == 0.25
    assert math.isnan(Evaluation((), {}, 0.0, 1.0).real_time_factor)


def test_the_demo_model_is_evaluated():
    model, processor = tp.load_nemo(tp.demo_model_path())
    pipeline = tp.ParakeetASRPipeline(model, processor=processor)
    manifest = tp.demo_model_path() / "clips" / "manifest.json"
    rows = load_demo_rows(manifest)
    evaluation = run_evaluation(pipeline, rows, batch_size=4)
    texts = [output["text"] for output in pipeline([row["audio"] for row in rows])]
    assert [score.clip.hypothesis for score in evaluation.scores] == texts
    assert [score.clip.reference for score in evaluation.scores] == [row["text"] for row in rows]
    durations = [len(tp.load_audio(row["audio"])) / 16000 for row in rows]
    assert [score.clip.duration for score in evaluation.scores] == durations
    assert evaluation.audio_seconds == pytest.approx(sum(durations))
    assert evaluation.processing_seconds > 0
    assert evaluation.scores[0].clip.name == rows[0]["audio"]
    # the rates of `evaluate_pipeline` are those of jiwer
    result = evaluate_pipeline(pipeline, rows, batch_size=4)
    assert result["wer"] == evaluation.rates["wer"].value
    assert [entry["hypothesis"] for entry in result["clips"]] == texts
    # clips without a name are numbered; another normalisation changes the errors
    samples = tp.load_audio(rows[0]["audio"])
    row = {"audio": samples, "sampling_rate": 16000, "text": "nothing"}
    evaluation = run_evaluation(pipeline, [row], normalize=lambda text: "same")
    assert evaluation.scores[0].clip.name == "clip 0 of the dataset"
    assert evaluation.rates["wer"].value == 0


def load_demo_rows(manifest):
    """Return rows with the audio path and the text of the clips of the demo model."""
    return [
        {"audio": str(manifest.parent / entry["file"]), "text": entry["text"]}
        for entry in json.loads(manifest.read_text(encoding="utf-8"))
    ]
