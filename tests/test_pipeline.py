"""Checks the pipeline: inputs, batches, times, chunks, confidence, unusual audio, and models of other families."""

import pickle

import numpy as np
import pytest
import soundfile
import torch
from conftest import ctc_model, noise
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    pipeline,
)

import transformers_parakeet as tp


@pytest.fixture(scope="module")
def pipe():
    """A pipeline with a tiny random CTC model."""
    model, processor = ctc_model()
    return pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )


def without_speech(kind, seconds):
    """Generate digital silence, white noise or a tone of 440 Hz at 16 kHz, (S,) float32."""
    if kind == "noise":
        return noise(seconds)
    times = np.arange(16000 * seconds) / 16000
    return (0.3 * np.sin(2 * np.pi * 440 * times) if kind == "tone" else 0 * times).astype(np.float32)


def test_every_form_of_input_gives_the_same_text(pipe, tmp_path):
    clip = np.round(noise(2.0) * 32768).astype(np.int16)
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip, 16000)
    samples = clip.astype(np.float32) / 32768
    text = pipe(samples)["text"]
    assert text
    forms = [
        str(path),
        path.read_bytes(),
        clip,
        samples.astype(np.float64),
        torch.from_numpy(samples),
        np.stack([samples, samples]),
        np.stack([samples, samples], axis=1),
        np.stack([samples] * 3, axis=1),
        {"raw": samples, "sampling_rate": 16000},
        {"array": samples, "sampling_rate": 16000, "path": None},
        {"bytes": path.read_bytes(), "path": None},
    ]
    assert [pipe(form)["text"] for form in forms] == [text] * len(forms)


def test_an_input_dict_is_not_changed_and_its_other_keys_are_returned(pipe):
    clip = {"array": noise(1.0), "sampling_rate": 16000, "speaker": "ann"}
    keys = set(clip)
    assert pipe(clip)["speaker"] == ["ann"]
    assert set(clip) == keys


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_the_batch_size_does_not_change_the_result(pipe, batch_size):
    clips = [noise(seconds, seed) for seed, seconds in enumerate((1.0, 3.0, 0.4, 2.2, 0.1))]
    alone = [pipe(clip, return_timestamps="word") for clip in clips]
    assert pipe(list(clips), batch_size=batch_size, return_timestamps="word") == alone
    assert list(pipe((clip for clip in clips), batch_size=batch_size, return_timestamps="word")) == alone


@pytest.mark.parametrize("level", ["char", "word", "segment"])
def test_times_are_ordered_and_the_chunks_contain_the_text(pipe, level):
    out = pipe(noise(3.0), return_timestamps=level)
    spans = [chunk["timestamp"] for chunk in out["chunks"]]
    assert spans == sorted(spans)
    assert all(0 <= start <= end <= 3.0 for start, end in spans)
    spelled = "".join(chunk["text"] for chunk in out["chunks"])
    assert spelled.replace(" ", "") == out["text"].replace(" ", "")


def test_true_means_segments_and_other_levels_are_refused(pipe):
    clip = noise(1.0)
    assert pipe(clip, return_timestamps=True) == pipe(clip, return_timestamps="segment")
    with pytest.raises(ValueError, match="char, word, segment"):
        pipe(clip, return_timestamps="phoneme")


def test_confidence_of_chunks_and_of_the_whole_text(pipe):
    clip = noise(2.0)
    chars = pipe(clip, return_timestamps="char", return_confidence=True)["chunks"]
    assert all(0 <= chunk["confidence"] <= 1 for chunk in chars)
    lowest = min(chunk["confidence"] for chunk in chars)
    assert pipe(clip, return_confidence=True)["confidence"] == pytest.approx(lowest)
    mean = pipe(clip, return_confidence=True, confidence_aggregation="mean")["confidence"]
    assert mean == pytest.approx(np.mean([chunk["confidence"] for chunk in chars]))
    entropy = pipe(clip, return_timestamps="char", return_confidence="entropy")["chunks"]
    assert entropy[0]["confidence"] != chars[0]["confidence"]


def test_chunks_cover_long_audio_once(pipe):
    clip = noise(9.0)
    chunked = pipe(clip, return_timestamps="char", chunk_length_s=4, stride_length_s=1)["chunks"]
    starts = [chunk["timestamp"][0] for chunk in chunked]
    assert starts == sorted(starts)
    assert starts[-1] > 8
    assert pipe(clip, chunk_length_s=4, stride_length_s=1, batch_size=3)["text"] == "".join(c["text"] for c in chunked)


@pytest.fixture(scope="module")
def digit_string():
    """Three clips of known speakers, repeated six times and joined with pauses of 0.2 s: 49 s, (S,) float32."""
    paths = sorted((tp.demo_model_path() / "clips").glob("fsdd_dev*.flac"))
    pause = np.zeros(3200, dtype=np.float32)
    return np.concatenate([part for path in paths * 6 for part in (tp.load_audio(path), pause)])


@pytest.mark.parametrize("decoder", ["ctc", "transducer"])
@pytest.mark.parametrize("chunk_length_s", [6, 8, 15])
def test_windows_give_the_words_and_times_of_the_whole_recording(digit_string, decoder, chunk_length_s):
    demo = pipeline("automatic-speech-recognition", model=str(tp.demo_model_path()))
    options = {"return_timestamps": "word", "return_confidence": True, "generate_kwargs": {"decoder": decoder}}
    whole = demo(digit_string, chunk_length_s=0, **options)["chunks"]
    windows = demo(digit_string, chunk_length_s=chunk_length_s, batch_size=4, **options)["chunks"]
    assert [chunk["text"] for chunk in windows] == [chunk["text"] for chunk in whole]
    assert len(whole) == 60
    for one, other in zip(windows, whole, strict=True):
        # one encoder frame
        assert np.abs(np.subtract(one["timestamp"], other["timestamp"])).max() < 0.081
        assert 0 < one["confidence"] <= 1


def test_half_precision_models_run(pipe):
    model, processor = ctc_model()
    half = pipeline(
        "automatic-speech-recognition",
        model=model.to(torch.bfloat16),
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    out = half(noise(1.0), return_timestamps="char", return_confidence=True)
    assert out["text"]
    assert "".join(chunk["text"] for chunk in out["chunks"]) == out["text"]
    assert all(0 < chunk["confidence"] < 1 for chunk in out["chunks"])


@pytest.mark.parametrize("place", ["constructor", "generate_kwargs", "call"])
def test_the_search_can_be_set_for_all_calls_or_for_one(place, monkeypatch):
    model, processor = ctc_model()
    search = {"num_beams": 3, "label_bonus": 0.5}
    options = {"constructor": search, "generate_kwargs": {"generate_kwargs": search}, "call": {}}[place]
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    beams = pipeline("automatic-speech-recognition", model=model, **parts, **options)
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: (calls.append(kwargs), generate(**kwargs))[1])
    beams(noise(1.0), **(search if place == "call" else {}))
    assert {name: calls[0][name] for name in search} == search
    # an argument of the call overrides that of the constructor
    beams(noise(1.0), num_beams=1)
    assert calls[1]["num_beams"] == 1
    with pytest.raises(ValueError, match="num_return_sequences"):
        pipeline("automatic-speech-recognition", model=model, **parts, num_return_sequences=2)


def test_the_pipeline_uses_the_processor_that_it_is_given():
    model, processor = ctc_model()
    for pipe in (
        tp.ParakeetASRPipeline(model, processor=processor),
        pipeline(
            "automatic-speech-recognition",
            model=model,
            processor=processor,
            tokenizer=processor.tokenizer,
            feature_extractor=processor.feature_extractor,
        ),
    ):
        assert pipe.processor is processor
        assert pipe.tokenizer is processor.tokenizer
        assert pipe.feature_extractor is processor.feature_extractor
        assert pipe(noise(1.0), return_timestamps="char")["chunks"]


def test_without_a_processor_one_is_built_from_its_parts(pipe):
    assert type(pipe.processor) is tp.ParakeetProcessor
    assert pipe.processor.decoder_type == "ctc"
    assert pipe.processor.tokenizer is pipe.tokenizer
    assert pipe.processor.feature_extractor is pipe.feature_extractor


@pytest.mark.parametrize("level", ["char", "word"])
def test_the_head_that_decodes_decides_how_times_are_computed(level):
    demo = pipeline("automatic-speech-recognition", model=str(tp.demo_model_path()))
    clip = str(tp.demo_model_path() / "clips" / "one_two_three.flac")
    ctc = pipeline("automatic-speech-recognition", model=str(tp.demo_model_path()), generate_kwargs={"decoder": "ctc"})
    ctc_chunks = ctc(clip, return_timestamps=level)["chunks"]
    tdt_chunks = demo(clip, return_timestamps=level)["chunks"]
    assert ctc_chunks != tdt_chunks
    assert demo(clip, return_timestamps=level, generate_kwargs={"decoder": "ctc"})["chunks"] == ctc_chunks
    assert ctc(clip, return_timestamps=level, generate_kwargs={"decoder": "transducer"})["chunks"] == tdt_chunks


@pytest.mark.parametrize("chunk_length_s", [None, 0, 4])
def test_a_source_is_opened_once(pipe, monkeypatch, chunk_length_s):
    sources = []

    class CountedSource(tp.audio.AudioSource):
        def __init__(self, source, *args, **kwargs):
            sources.append(source)
            super().__init__(source, *args, **kwargs)

    monkeypatch.setattr("transformers_parakeet.pipeline_parakeet.AudioSource", CountedSource)
    clip = noise(9.0)
    assert pipe(clip, chunk_length_s=chunk_length_s, stride_length_s=1)["text"]
    assert len(sources) == 1


def test_windows_of_two_recordings_are_decoded_together(pipe, monkeypatch):
    generate = pipe.model.generate
    batches = []

    def count_windows(**kwargs):
        batches.append(len(kwargs["input_features"]))
        return generate(**kwargs)

    monkeypatch.setattr(pipe.model, "generate", count_windows)
    clips = [noise(9.0, 1), noise(5.0, 2), noise(2.0, 3)]
    options = {"chunk_length_s": 4, "stride_length_s": 0.5, "return_timestamps": "char"}
    alone = [pipe(clip, **options) for clip in clips]
    # windows keep 3 s: the recordings have 3 or 4, 2 and 1 windows
    num_windows = sum(batches)
    assert batches == [1] * num_windows
    batches.clear()
    assert pipe(clips, batch_size=num_windows, **options) == alone
    assert batches == [num_windows]


@pytest.mark.parametrize("chunk_length_s", [9.5, 30, None])
def test_a_recording_that_is_shorter_than_a_window_is_recognised_as_a_whole(pipe, chunk_length_s):
    clip = noise(9.0)
    whole = pipe(clip, return_timestamps="char", return_confidence=True, chunk_length_s=0)
    budget = None if chunk_length_s else 1
    options = {"chunk_length_s": chunk_length_s, "memory_budget": budget}
    assert pipe(clip, return_timestamps="char", return_confidence=True, **options) == whole


def test_a_recording_that_exceeds_the_budget_is_recognised_in_windows(pipe, caplog):
    clip = noise(70.0)
    windows = pipe(clip, return_timestamps="char", chunk_length_s=60)
    assert windows != pipe(clip, return_timestamps="char", chunk_length_s=0)
    with caplog.at_level("DEBUG", logger="transformers_parakeet.long_audio.inputs"):
        assert pipe(clip, return_timestamps="char", memory_budget=1000) == windows
        assert pipe(clip, return_timestamps="char") == pipe(clip, return_timestamps="char", chunk_length_s=0)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(",")[0] for message in messages] == [
        "the array: windows", "the array: whole", "the array: whole"
    ]  # fmt: skip
    assert "memory budget" in messages[0]


def test_invalid_options_of_windows_are_refused_for_short_audio_too(pipe):
    clip = noise(1.0)
    for options, name in (
        ({"chunk_length_s": 2, "stride_length_s": 1.5}, "stride"),
        ({"chunk_length_s": -1}, "chunk_length_s"),
        ({"normalize_over": "file"}, "normalize_over"),
        ({"memory_budget": "2GB"}, "memory_budget"),
    ):
        with pytest.raises(ValueError, match=name):
            pipe(clip, **options)


def test_features_are_normalised_over_the_recording_or_over_the_chunk(pipe):
    # the second half is 20 dB louder
    clip = np.concatenate([noise(6.0), 10 * noise(6.0, 1)])
    options = {"chunk_length_s": 5, "stride_length_s": 0.5}
    means = {}
    for normalize_over in ("recording", "chunk"):
        windows = list(pipe.preprocess(clip, normalize_over=normalize_over, **options))
        means[normalize_over] = [float(window["input_features"].mean()) for window in windows]
        assert [window["is_last"] for window in windows] == [False] * (len(windows) - 1) + [True]
    # largest mean of a window that is normalised alone: 6e-7
    assert max(map(abs, means["chunk"])) < 1e-5
    assert means["recording"][0] < -0.5
    assert means["recording"][-1] > 0.5


def test_audio_without_speech_gives_no_text(pipe):
    clip = np.concatenate([np.zeros(16000 * 6), noise(1.0), np.zeros(16000 * 6)]).astype(np.float32)
    options = {"speech_detector": tp.long_audio.EnergySpeechDetector(), "return_timestamps": "char"}
    for chunk_length_s in (0, 4):
        # a model with random weights emits tokens for silence
        assert pipe(clip[:80000], chunk_length_s=chunk_length_s)["text"]
        assert pipe(clip[:80000], chunk_length_s=chunk_length_s, **options) == {"text": "", "chunks": []}
        everywhere = pipe(clip, chunk_length_s=chunk_length_s, return_timestamps="char")["chunks"]
        near_speech = pipe(clip, chunk_length_s=chunk_length_s, **options)["chunks"]
        # the detector adds 0.2 s, the gate 0.4 s, and a token of a CTC head begins where the previous one ended
        times = [chunk["timestamp"][1] for chunk in near_speech]
        assert times
        assert all(5.3 <= time <= 7.8 for time in times)
        assert {chunk["timestamp"][1] for chunk in everywhere if 5.6 < chunk["timestamp"][1] < 7.4} <= set(times)


def test_skipped_windows_do_not_change_the_batch(pipe):
    silence = np.zeros(16000 * 9, dtype=np.float32)
    clip = np.concatenate([silence, noise(2.0), silence])
    options = {
        "speech_detector": tp.long_audio.EnergySpeechDetector(),
        "chunk_length_s": 4,
        "return_timestamps": "char",
    }
    windows = list(pipe.preprocess(clip, speech_detector=options["speech_detector"], chunk_length_s=4))
    assert len(windows) < 4
    assert windows[-1]["is_last"]
    alone = [pipe(audio, **options) for audio in (silence, clip, silence[:0])]
    assert pipe([silence, clip, silence[:0]], batch_size=3, **options) == alone
    assert [bool(result["text"]) for result in alone] == [False, True, False]


@pytest.mark.parametrize("decoder", ["ctc", "transducer"])
@pytest.mark.parametrize("kind", ["silence", "noise", "tone"])
def test_two_minutes_without_speech_give_little_text_and_no_loop(kind, decoder):
    """The demo model has learned that noise has no text; a loop would emit a word several times per second."""
    demo = pipeline("automatic-speech-recognition", model=str(tp.demo_model_path()))
    clip = without_speech(kind, 120)
    words = demo(clip, chunk_length_s=30, generate_kwargs={"decoder": decoder})["text"].split()
    assert len(words) <= 6
    gate = tp.long_audio.EnergySpeechDetector()
    assert demo(clip, chunk_length_s=30, speech_detector=gate, generate_kwargs={"decoder": decoder})["text"] == ""


def test_a_pickled_pipeline_gives_the_same_result(pipe):
    copied = pickle.loads(pickle.dumps(pipe))
    assert type(copied) is tp.ParakeetASRPipeline
    clip = noise(1.0)
    assert copied(clip, return_timestamps="word") == pipe(clip, return_timestamps="word")


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_audio_too_short_for_a_frame_has_no_text(pipe, samples):
    assert pipe(noise(1.0)[:samples], return_timestamps="word") == {"text": "", "chunks": []}


def test_short_and_silent_audio_is_decoded(pipe):
    # a model with random weights emits tokens for any audio
    for clip in (noise(1.0)[:399], np.zeros(16000, dtype=np.float32)):
        out = pipe(clip, return_timestamps="char")
        assert "".join(chunk["text"] for chunk in out["chunks"]) == out["text"]
        assert all(0 <= start <= end <= 1 for start, end in (chunk["timestamp"] for chunk in out["chunks"]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(pipe, value):
    clip = noise(0.5)
    clip[7] = value
    with pytest.raises(ValueError, match="finite"):
        pipe(clip)


def test_audio_of_another_sampling_rate_is_resampled(pipe):
    seconds = np.arange(0, 2.0, 1 / 48000)
    chirp = np.sin(2 * np.pi * (200 + 400 * seconds) * seconds).astype(np.float32)
    out = pipe({"array": chirp, "sampling_rate": 48000}, return_timestamps="char")
    assert max(chunk["timestamp"][1] for chunk in out["chunks"]) <= 2.0


def test_errors_name_files_that_are_not_audio(pipe, tmp_path):
    path = tmp_path / "notes.wav"
    path.write_text("not audio\n" * 50)
    with pytest.raises(tp.AudioError, match=r"notes\.wav"):
        pipe(str(path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pipe(str(tmp_path / "nowhere.wav"))


def test_the_stock_pipeline_class_returns_times_of_ctc(pipe):
    stock = AutomaticSpeechRecognitionPipeline(
        model=pipe.model, tokenizer=pipe.tokenizer, feature_extractor=pipe.feature_extractor
    )
    clip = noise(2.0)
    out = stock(clip, return_timestamps="word")
    assert [chunk["text"] for chunk in out["chunks"]] == out["text"].split()
    # the stock class does not use the mask, so that the last frame may be padding
    assert all(0 <= start <= end <= 2.08 for start, end in (chunk["timestamp"] for chunk in out["chunks"]))


def test_other_models_get_the_pipeline_of_transformers(tmp_path):
    import json

    from transformers import Wav2Vec2CTCTokenizer

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    config = Wav2Vec2Config(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2, do_stable_layer_norm=False,
    )  # fmt: skip
    torch.manual_seed(0)
    other = pipeline(
        "automatic-speech-recognition",
        model=Wav2Vec2ForCTC(config).eval(),
        tokenizer=Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")),
        feature_extractor=Wav2Vec2FeatureExtractor(),
    )
    assert type(other) is AutomaticSpeechRecognitionPipeline
    out = other(noise(0.2), return_timestamps="char")
    assert set(out) == {"text", "chunks"}
    with pytest.raises(ValueError, match="CTC can either predict"):
        other(noise(0.2), return_timestamps="segment")


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("clip.wav", 16000, {"subtype": "PCM_24"}),
        ("clip.aiff", 44100, {"subtype": "PCM_16"}),
        ("clip.au", 8000, {"subtype": "ULAW"}),
        ("clip.mp3", 16000, {}),
        ("clip.ogg", 48000, {"subtype": "VORBIS"}),
        ("clip.opus", 48000, {"format": "OGG", "subtype": "OPUS"}),
    ],
)
def test_the_text_does_not_depend_on_the_audio_format(name, rate, options, tmp_path):
    import soxr

    demo = pipeline("automatic-speech-recognition", model=str(tp.demo_model_path()))
    samples = tp.load_audio(tp.demo_model_path() / "clips" / "one_two_three.flac")
    encoded = soxr.resample(samples, 16000, rate)
    soundfile.write(tmp_path / name, np.stack([encoded, encoded], axis=1), rate, **options)
    assert demo(str(tmp_path / name))["text"] == "one two three"


def test_worker_processes_compute_features_on_the_cpu(monkeypatch):
    """A forked process cannot use a GPU. The device "meta" represents a GPU here."""
    model, processor = ctc_model()
    pipe = pipeline("automatic-speech-recognition", model=model, tokenizer=processor.tokenizer,
                    feature_extractor=processor.feature_extractor)  # fmt: skip
    expected = next(pipe.preprocess(noise(1.0)))["input_features"]
    monkeypatch.setattr(pipe, "device", torch.device("meta"))
    assert next(pipe.preprocess(noise(1.0)))["input_features"].device.type == "meta"
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: object())
    (window,) = pipe.preprocess(noise(1.0))
    assert window["input_features"].device.type == "cpu"
    assert torch.equal(window["input_features"], expected)


def test_worker_processes_give_the_same_texts():
    demo = pipeline("automatic-speech-recognition", model=str(tp.demo_model_path()))
    clips = sorted(map(str, (tp.demo_model_path() / "clips").glob("*.flac")))[:3]
    alone = [demo(clip)["text"] for clip in clips]
    assert [out["text"] for out in demo(clips, batch_size=2, num_workers=1)] == alone
    assert len(set(alone)) == 3
