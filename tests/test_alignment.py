"""Forced alignment of a text with a recording, with the demo model."""

import json

import numpy as np
import pytest

from transformers_parakeet import demo_model_path, load_audio
from transformers_parakeet.alignment import align
from transformers_parakeet.transcription import load_pipeline

SAMPLING_RATE = 16000


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("demo", dtype="float32")


@pytest.fixture(scope="module")
def clips():
    folder = demo_model_path() / "clips"
    entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return [(folder / entry["file"], entry["text"]) for entry in entries]


@pytest.mark.parametrize("decoder", [None, "ctc"])
def test_alignment_of_the_recognised_text(pipeline, clips, decoder):
    for path, _ in clips:
        generate_kwargs = {} if decoder is None else {"decoder": decoder}
        recognised = pipeline(str(path), return_timestamps="char", generate_kwargs=generate_kwargs)
        result = align(str(path), recognised["text"], pipeline, decoder=decoder)
        assert result.text == recognised["text"]
        assert [word.text for word in result.words] == recognised["text"].split()
        assert [token.text for token in result.tokens] == [chunk["text"] for chunk in recognised["chunks"]]
        assert 0 < result.confidence <= 1
        starts = [word.start for word in result.words]
        assert starts == sorted(starts)
        assert result.words[-1].end <= result.duration + 0.08
        if decoder is None:
            # greedy decoding finds a path through the lattice; the best path is close to it
            differences = [
                abs(token.start - chunk["timestamp"][0])
                for token, chunk in zip(result.tokens, recognised["chunks"], strict=True)
            ]
            assert np.mean(differences) <= 0.08


def test_wrong_text_has_low_confidence(pipeline, clips):
    path, text = clips[0]
    wrong = " ".join(reversed(text.split()))
    assert wrong != text
    assert align(path, text, pipeline).confidence > 10 * align(path, wrong, pipeline).confidence


def test_joined_recordings(pipeline, clips):
    """The words of a clip that follows a pause start after the pause."""
    pieces, starts, position = [], [], 0
    for path, _ in clips[:4]:
        samples = load_audio(path)
        starts.append(position / SAMPLING_RATE)
        pieces += [samples, np.zeros(SAMPLING_RATE // 2, np.float32)]
        position += len(samples) + SAMPLING_RATE // 2
    text = " ".join(text for _, text in clips[:4])
    result = align(np.concatenate(pieces), text, pipeline)
    first_words = np.cumsum([0, *(len(text.split()) for _, text in clips[:3])])
    for start, index in zip(starts, first_words, strict=True):
        assert start - 0.08 <= result.words[index].start <= start + 0.5


def test_errors(pipeline, clips):
    path, _ = clips[0]
    with pytest.raises(ValueError, match="at least one word"):
        align(path, "  ", pipeline)
    with pytest.raises(ValueError, match="only characters that the model knows, got 'É'"):
        align(path, "five É", pipeline)
    with pytest.raises(ValueError, match="needs at least"):
        align(np.zeros(1600, np.float32), "five two three zero five two three zero", pipeline, decoder="ctc")
    with pytest.raises(ValueError, match="must be"):
        align(path, "five", pipeline, decoder="rnnt")
