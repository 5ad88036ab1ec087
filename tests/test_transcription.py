"""Tests of `transcribe`: results equal to those of the pipeline, batches over files, and errors in single files."""

import itertools
import weakref

import numpy as np
import pytest
import soundfile
import torch
from conftest import ctc_model, noise

import transformers_parakeet as tp
from transformers_parakeet import transcription, window_batches
from transformers_parakeet.long_audio import estimate_peak_memory
from transformers_parakeet.transcription import FailedFile, TranscriptionOptions, load_pipeline, transcribe_files

CLIPS = sorted((tp.demo_model_path() / "clips").glob("*.flac"))


@pytest.fixture(scope="module")
def demo():
    """A pipeline with the demo model."""
    return load_pipeline("demo", dtype="float32")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Four recordings of digits of 0, 3, 21 and 8 seconds."""
    folder = tmp_path_factory.mktemp("recordings")
    clips = [tp.load_audio(clip) for clip in CLIPS]
    samples = [np.zeros(0, np.float32), clips[0], np.concatenate(clips), np.concatenate(clips[2:5])]
    paths = [folder / f"{index}.wav" for index in range(4)]
    for path, recording in zip(paths, samples, strict=True):
        soundfile.write(path, recording, 16000)
    return paths


def to_tuples(timed_texts):
    """Return (text, start, end) of timed texts."""
    return [(timed_text.text, timed_text.start, timed_text.end) for timed_text in timed_texts]


@pytest.mark.parametrize("decoder", [None, "transducer", "ctc"])
@pytest.mark.parametrize("chunk_length_s", [None, 5.0])
def test_results_equal_those_of_the_pipeline(decoder, chunk_length_s, demo, recordings):
    options = {"chunk_length_s": chunk_length_s, "decoder": decoder, "batch_size": 3}
    results = list(tp.transcribe(recordings, demo, **options))
    arguments = {"chunk_length_s": chunk_length_s, "return_confidence": True}
    if decoder is not None:
        arguments["generate_kwargs"] = {"decoder": decoder}
    for path, result in zip(recordings, results, strict=True):
        # one file at a time, without batches
        assert result.file == str(path)
        assert result.duration == soundfile.info(path).duration
        for level, timed_texts in (("word", result.words), ("segment", result.segments), ("char", result.tokens)):
            expected = demo(str(path), return_timestamps=level, **arguments)
            assert result.text == expected["text"]
            assert to_tuples(timed_texts) == [(chunk["text"], *chunk["timestamp"]) for chunk in expected["chunks"]]
            confidences = [timed_text.confidence for timed_text in timed_texts]
            # measured: the confidence in a padded batch differs by up to 6e-7
            assert confidences == pytest.approx([chunk["confidence"] for chunk in expected["chunks"]], abs=1e-5)
        assert result.confidence == pytest.approx(demo(str(path), **arguments)["confidence"], abs=1e-5)
    assert len(results[2].words) > 20


def test_the_arguments_of_a_loaded_pipeline_are_defaults(demo, recordings):
    pipeline = tp.ParakeetASRPipeline(
        demo.model,
        processor=demo.processor,
        task="automatic-speech-recognition",
        chunk_length_s=5.0,
        return_timestamps="word",
        generate_kwargs={"decoder": "ctc"},
    )
    (result,) = tp.transcribe(recordings[2], pipeline)
    (expected,) = tp.transcribe(recordings[2], demo, chunk_length_s=5.0, decoder="ctc")
    assert result == expected
    assert result.settings["decoder"] == "ctc"
    assert result.confidence is not None
    assert result.text == pipeline(str(recordings[2]))["text"]


def test_one_file_is_accepted_without_a_list(demo, recordings):
    for file in (recordings[1], str(recordings[1])):
        (result,) = tp.transcribe(file, demo)
        assert result.text == "five two three zero"
    (result,) = tp.transcribe([recordings[1].read_bytes()], demo)
    assert (result.file, result.text) == (None, "five two three zero")


def test_results_describe_the_model_and_the_options(demo):
    (result,) = tp.transcribe(CLIPS[0], "demo", dtype="float32", confidence=False, device="cpu", attention="local")
    assert result.words[0].confidence is None
    assert result.confidence is None
    assert (result.model, result.version) == ("demo", tp.__version__)
    assert result.settings == {
        "decoder": "tdt",
        "num_beams": 1,
        "lm_weight": None,
        "boosting_weight": None,
        "chunk_length_s": None,
        "attention_context_size": [128, 128],
        "device": "cpu",
        "dtype": "float32",
    }


def record_batches(pipeline, monkeypatch):
    """Return a list to which the shape (B, T) of every batch of features is appended."""
    shapes = []
    generate = pipeline.model.generate

    def record(input_features, **kwargs):
        shapes.append(tuple(input_features.shape[:2]))
        return generate(input_features=input_features, **kwargs)

    monkeypatch.setattr(pipeline.model, "generate", record)
    return shapes


def test_a_batch_contains_the_windows_of_several_files(demo, recordings, monkeypatch):
    shapes = record_batches(demo, monkeypatch)
    list(tp.transcribe(recordings[1:], demo, chunk_length_s=10.0, batch_size=8))
    # one window of each file of 3 s and 8 s, and at least three windows of the file of 21 s
    (batch,) = [batch for batch, _ in shapes]
    assert batch >= 5


def test_batches_are_limited_by_number_and_length(demo, recordings, monkeypatch):
    shapes = record_batches(demo, monkeypatch)
    list(tp.transcribe([recordings[1]] * 5, demo, batch_size=2))
    assert [batch for batch, _ in shapes] == [2, 2, 1]
    shapes.clear()
    # three clips of 2.7 s fit 8.1 s; with a longer one, its length counts for every row
    monkeypatch.setattr(window_batches, "MAX_BATCH_S", 3 * soundfile.info(recordings[1]).duration)
    list(tp.transcribe([*[recordings[1]] * 4, recordings[3], recordings[1]], demo))
    assert [batch for batch, _ in shapes] == [3, 1, 1, 1]
    shapes.clear()
    monkeypatch.setattr(window_batches, "MAX_BATCH_S", 1e6)
    list(tp.transcribe([recordings[1]] * 20, demo))
    assert [batch for batch, _ in shapes] == [16, 4]
    shapes.clear()
    num_samples = soundfile.info(recordings[1]).frames
    budget = estimate_peak_memory(demo.model.config, num_samples, batch_size=2)
    list(tp.transcribe([recordings[1]] * 5, demo, memory_budget=budget))
    assert [batch for batch, _ in shapes] == [2, 2, 1]
    shapes.clear()
    list(tp.transcribe([recordings[1]] * 5, demo, memory_budget=budget - 1))
    assert [batch for batch, _ in shapes] == [1] * 5


def test_files_are_read_at_most_one_batch_ahead(demo, recordings):
    sources = itertools.repeat(recordings[1])
    read = []

    def iterate_sources():
        for source in sources:
            read.append(source)
            yield source

    results = tp.transcribe(iterate_sources(), demo, batch_size=3)
    assert len([next(results) for _ in range(4)]) == 4
    assert len(read) == 6


def test_a_file_that_fails_is_an_entry_in_its_place(demo, recordings, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio" * 50)
    files = [tmp_path / "missing.wav", recordings[1], broken, recordings[3], 17]
    entries = list(transcribe_files(demo, files, TranscriptionOptions(batch_size=2)))
    failures = {0: FileNotFoundError, 2: tp.AudioError, 4: TypeError}
    for index, entry in enumerate(entries):
        if index in failures:
            assert isinstance(entry, FailedFile)
            assert type(entry.error) is failures[index]
        else:
            assert entry.file == str(files[index])
            assert entry.text == demo(str(files[index]))["text"]
    assert entries[4].file is None
    with pytest.raises(FileNotFoundError):
        list(tp.transcribe(files, demo))
    results = tp.transcribe(files[1:], demo, batch_size=1)
    assert next(results).text == "five two three zero"
    with pytest.raises(tp.AudioError, match=r"broken\.wav"):
        next(results)


def test_a_batch_that_fails_is_decoded_window_by_window(demo, recordings, monkeypatch):
    expected = demo(str(recordings[1]))["text"]
    generate = demo.model.generate

    def fail(input_features, **kwargs):
        """Fail for batches, and for recordings of more than 10 s."""
        if len(input_features) > 1 or input_features.shape[1] > 1000:
            raise RuntimeError("out of memory")
        return generate(input_features=input_features, **kwargs)

    monkeypatch.setattr(demo.model, "generate", fail)
    entries = list(transcribe_files(demo, [recordings[1], recordings[2], recordings[1]]))
    assert [getattr(entry, "text", None) for entry in entries] == [expected, None, expected]
    assert str(entries[1].error) == "out of memory"


def test_a_failed_batch_holds_no_memory(demo, recordings, monkeypatch):
    references = []

    def fail(input_features, **kwargs):
        """Fail with a large tensor in memory; before that, count the tensors of earlier calls that still exist."""
        num_alive.append(sum(reference() is not None for reference in references))
        activations = torch.zeros(1000)
        references.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    num_alive = []
    monkeypatch.setattr(demo.model, "generate", fail)
    entries = list(transcribe_files(demo, [recordings[1], recordings[1]]))
    # the batch, and each of its two windows
    assert num_alive == [0, 0, 0]
    assert [str(entry.error) for entry in entries] == ["out of memory"] * 2
    assert [reference() for reference in references] == [None] * 3


def test_progress_adds_up_to_the_length_of_the_audio(demo, recordings, tmp_path):
    seconds = []
    files = [*recordings, tmp_path / "missing.wav"]
    options = TranscriptionOptions(chunk_length_s=6.0, batch_size=2)
    list(transcribe_files(demo, files, options, on_progress=seconds.append))
    assert len(seconds) >= 4
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(sum(soundfile.info(path).duration for path in recordings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "beam"}, "`decoder` must be 'transducer' or 'ctc', got 'beam'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"chunk_length_s": float("nan")}, "`chunk_length_s` must not be negative, got nan"),
        ({"memory_budget": 0}, "`memory_budget` must be a positive number of bytes, got 0"),
        ({"chunk_length_s": -1.0}, "`chunk_length_s` must not be negative, got -1.0"),
        ({"dtype": "int8"}, "`dtype` must be one of float32, float16, bfloat16, got 'int8'"),
        ({"attention": "global"}, "`attention` must be 'local' or 'full', got 'global'"),
    ],
)
def test_an_invalid_option_is_refused_before_the_first_result(options, message):
    with pytest.raises(ValueError, match=message):
        tp.transcribe([], "demo", **options)


def test_a_decoder_that_the_model_lacks_is_refused():
    model, processor = ctc_model()
    pipeline = tp.ParakeetASRPipeline(model, processor=processor, task="automatic-speech-recognition")
    with pytest.raises(ValueError, match="`decoder` must be ctc for this model, got 'transducer'"):
        tp.transcribe([], pipeline, decoder="transducer")
    samples = noise(1.0)
    (result,) = tp.transcribe([samples], pipeline, decoder="ctc")
    assert result.text == pipeline(samples)["text"]
    with pytest.raises(ValueError, match=r"must be None for a loaded pipeline, got .'device': 'cpu'"):
        tp.transcribe([], pipeline, device="cpu")


def test_attention_is_local_or_full(golden):
    folders = [path for path in (golden / "real_configs").iterdir() if (path / "model.nemo").exists()]
    assert folders
    for folder in folders:
        model, _ = tp.load_nemo(folder / "model.nemo")
        config = model.config.encoder_config
        trained_size = list(config.attention_context_size)
        if config.attention_context_style == "chunked_limited_with_rc":
            with pytest.raises(ValueError, match="requires a model without attention in chunks"):
                transcription.set_attention(model, "local")
        else:
            transcription.set_attention(model, "local")
            # a limited context is not changed
            assert config.attention_context_size == ([128, 128] if min(trained_size) < 0 else trained_size)
        transcription.set_attention(model, "full")
        assert max(config.attention_context_size) == -1


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_dtype_is_bfloat16_if_the_processor_computes_it(has_bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16, raising=False)
    pipeline = load_pipeline("demo", device="cpu")
    assert pipeline.model.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    (result,) = tp.transcribe(tp.demo_model_path() / "clips" / "one_two_three.flac", pipeline)
    assert result.text == "one two three"
