"""Tests of `transformers_parakeet.bulk.Transcriber`: batches as dicts, in `datasets` and pandas; pickling; errors."""

import pickle

import datasets
import fsspec
import numpy as np
import pandas as pd
import pytest
import soundfile
from bulk_helpers import CLIPS, DIGITS

import transformers_parakeet as tp
from transformers_parakeet.bulk import Transcriber
from transformers_parakeet.transcription import transcribe

CLIP = CLIPS / "one_two_three.flac"


@pytest.fixture(scope="module")
def transcriber():
    """A transcriber with a loaded model."""
    transcriber = Transcriber("demo")
    transcriber.load()
    return transcriber


def test_rows_of_every_kind_of_audio(transcriber):
    samples, rate = soundfile.read(CLIP, dtype="float32")
    fsspec.filesystem("memory").pipe_file("/clips/one_two_three.flac", CLIP.read_bytes())
    sources = [
        str(CLIP),
        CLIP.read_bytes(),
        {"array": samples, "sampling_rate": rate},
        {"bytes": CLIP.read_bytes(), "path": None},
        {"bytes": None, "path": "memory://clips/one_two_three.flac"},
        "memory://clips/one_two_three.flac",
        tp.load_audio(CLIP),
    ]
    result = transcriber({"audio": sources, "number": np.arange(7)})
    (direct,) = transcribe([CLIP], model="demo")
    assert result["text"] == ["one two three"] * 7
    assert result["error"] == [None] * 7
    assert result["number"] == list(range(7))
    assert result["model"] == ["demo"] * 7
    assert "audio" not in result
    assert result["duration"][0] == direct.duration
    assert result["confidence"][0] == pytest.approx(direct.confidence, abs=1e-3)
    word = result["words"][0][1]
    assert (word["text"], word["start"], word["end"]) == ("two", 1.04, 1.52)
    assert 0 < word["confidence"] <= 1


def test_the_order_of_the_rows_is_kept(transcriber):
    paths = [*DIGITS, CLIP, *reversed(DIGITS)]
    expected = [result.text for result in transcribe(paths, model="demo")]
    assert len(set(expected)) > 2
    assert transcriber({"path": [str(path) for path in paths]})["text"] == expected


def test_a_recording_that_cannot_be_read_is_a_row_with_its_error(transcriber, tmp_path):
    damaged = tmp_path / "damaged.flac"
    content = CLIP.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    rows = ["missing.flac", str(CLIP), str(damaged), "memory://missing/a.flac", None, ""]
    result = transcriber({"path": rows, "bytes": [None] * 5 + [b"junk"]})
    assert [text is None for text in result["text"]] == [True, False, False, True, True, True]
    assert "missing.flac" in result["error"][0]
    assert result["error"][1] is None
    assert "damaged.flac is damaged: only" in result["error"][2]
    assert result["text"][2].startswith("one")
    assert 0 < result["duration"][2] < result["duration"][1]
    assert all(result["error"][3:])
    assert result["words"][0] == []
    assert result["duration"][0] is None
    # a second call warns again
    assert "damaged" in transcriber({"path": [str(damaged)]})["error"][0]


def test_a_copy_loads_its_own_model(transcriber):
    copy = pickle.loads(pickle.dumps(transcriber))
    assert len(pickle.dumps(transcriber)) < 2000
    assert copy._pipeline is None
    assert transcriber._pipeline is not None
    assert copy({"path": [str(CLIP)]}) == transcriber({"path": [str(CLIP)]})


def test_datasets_map(transcriber):
    dataset = datasets.Dataset.from_dict({"path": [str(CLIP), "missing.wav"], "text": ["1 2 3", "4"]})
    with pytest.raises(ValueError, match="must not have the columns of the result, but it has text"):
        dataset.map(transcriber, batched=True)
    prefixed = Transcriber("demo", prefix="asr_")
    result = dataset.map(prefixed, batched=True, batch_size=2)
    assert result["text"] == ["1 2 3", "4"]
    assert result["asr_text"] == ["one two three", None]
    assert result["asr_words"][0][0]["start"] == 0.08


def test_an_iterator_of_pandas_frames_as_spark_passes_it(transcriber):
    def transcribe_frames(frames):
        for frame in frames:
            yield pd.DataFrame(transcriber(frame.to_dict("list")))

    frames = [pd.DataFrame({"path": [str(CLIP), None]}), pd.DataFrame({"path": ["missing.wav"]})]
    results = list(transcribe_frames(iter(frames)))
    assert [list(result["error"].isna()) for result in results] == [[True, False], [False]]
    assert results[0]["text"][0] == "one two three"


def test_options_reach_the_model():
    options = {"decoder": "ctc", "confidence": False, "batch_size": 1, "num_threads": 1}
    result = Transcriber("demo", **options)({"path": [str(path) for path in DIGITS]})
    expected = list(transcribe(DIGITS, model="demo", decoder="ctc", confidence=False))
    assert result["text"] == [entry.text for entry in expected]
    assert result["confidence"] == [None] * len(DIGITS)


def test_wrong_options_and_batches_are_refused(transcriber, golden):
    with pytest.raises(ValueError, match="`decoder` must be 'transducer' or 'ctc', got 'x'"):
        Transcriber("demo", decoder="x")
    with pytest.raises(ValueError, match="must have one of the columns audio, bytes, path, got wav"):
        transcriber({"wav": ["a"]})
    # the model has no transducer: an error of the call, not of every row
    with pytest.raises(ValueError, match="decoder"):
        Transcriber(golden / "real_configs" / "ctc" / "model.nemo", decoder="transducer")({"path": [str(CLIP)]})
