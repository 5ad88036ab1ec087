"""The interface of streams: words, updates, events, pauses, speech detection, bounded state and errors."""

import dataclasses

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from stream_helpers import load_clip, load_demo, load_model, tone

import transformers_parakeet as tp
from transformers_parakeet.long_audio import ParakeetStream, StreamBatch, StreamUpdate, join_stream_words
from transformers_parakeet.processing_parakeet import to_emitted_tokens

# a short context, so that the words of a clip of 3 s come in several updates
OPTIONS = {"chunk_s": 0.4, "left_s": 4.0, "right_s": 0.4}


def collect(stream, samples, block_size):
    """Feed samples in blocks, finish the stream, and return all updates."""
    blocks = [samples[start : start + block_size] for start in range(0, len(samples), block_size)]
    return list(stream.updates(blocks))


def load_digits(name="one_two_three"):
    """Return the samples of a clip of the demo."""
    return soundfile.read(tp.demo_model_path() / "clips" / f"{name}.flac", dtype="float32")[0]


def committed_words(updates):
    """Return all committed words of a list of updates."""
    return [word for update in updates for word in update.committed]


@pytest.mark.parametrize("decoder", ["transducer", "ctc"])
def test_the_words_of_a_stream_equal_those_of_generate(decoder):
    model, processor = load_demo()
    samples = load_digits()
    # one chunk holds the whole clip, so the encoder reads the same samples
    updates = collect(ParakeetStream(model, processor, chunk_s=4, right_s=1, decoder=decoder), samples, 1600)
    output = model.generate(
        **processor(samples, sampling_rate=16000),
        decoder=decoder,
        return_dict_in_generate=True,
        output_confidence="max_prob",
    )
    emitted = to_emitted_tokens(output.hypotheses)
    expected = processor.chunks(emitted, "word", "ctc" if decoder == "ctc" else "tdt")
    words = committed_words(updates)
    assert join_stream_words(words) == processor.to_text(emitted) == "one two three"
    assert [(word.text, (word.start, word.end)) for word in words] == [
        (chunk["text"], chunk["timestamp"]) for chunk in expected
    ]
    # measured: 0
    assert [word.confidence for word in words] == pytest.approx([chunk["confidence"] for chunk in expected], abs=1e-6)


@pytest.mark.parametrize("decoder", ["transducer", "ctc"])
def test_committed_words_never_change_and_do_not_depend_on_the_feed_size(decoder):
    model, processor = load_demo()
    pause = np.zeros(16000, np.float32)
    samples = np.concatenate([load_digits(), pause, load_digits("fsdd_dev_0_yweweler"), pause])
    results = []
    for block_size in (320, 1600, 80000):
        stream = ParakeetStream(model, processor, decoder=decoder, **OPTIONS)
        updates = collect(stream, samples, block_size)
        final = committed_words(updates)
        results.append(final)
        num_committed = 0
        for update in updates:
            num_committed += len(update.committed)
            assert update.committed == final[num_committed - len(update.committed) : num_committed]
            # a tentative word is after the committed ones and grows to the next committed word
            for word in update.tentative[:1]:
                assert final[num_committed].text.startswith(word.text)
                assert final[num_committed].start == word.start
        assert not updates[-1].tentative
    assert results[0] == results[1] == results[2]
    assert join_stream_words(results[0]) == "one two three five two three zero"
    starts = [word.start for word in results[0]]
    assert starts == sorted(starts)


def test_a_word_is_committed_after_a_pause():
    model, processor = load_demo()
    samples = np.concatenate([load_digits(), np.zeros(16000 * 3, np.float32)])
    stream = ParakeetStream(model, processor, **OPTIONS)
    time_committed = {}
    for index in range(0, len(samples), 320):
        for word in stream.feed(samples[index : index + 320]).committed:
            time_committed[word.text] = (index + 320) / 16000 - word.end
    assert list(time_committed) == ["one", "two", "three"]
    # pause 0.8 s, at most one chunk until the step, the right context, and one block
    assert time_committed["three"] <= 0.8 + 0.4 + 0.4 + 0.02


@pytest.mark.parametrize("name", ["one_two_three", "fsdd_dev_0_yweweler", "fsdd_dev_1_nicolas", "fsdd_dev_2_george"])
def test_the_first_word_appears_soon_after_its_end(name):
    model, processor = load_demo()
    samples = load_digits(name)
    stream = ParakeetStream(model, processor, **OPTIONS)
    first_text, time_shown = "", None
    for index in range(0, len(samples), 320):
        update = stream.feed(samples[index : index + 320])
        words = [*update.committed, *update.tentative]
        if words and time_shown is None:
            first_text, time_shown = words[0].text, (index + 320) / 16000
        for word in update.committed:
            if word.text == first_text:
                # chunk and right context, and 0.2 s for the rest
                assert time_shown <= word.end + OPTIONS["chunk_s"] + OPTIONS["right_s"] + 0.2
                return
    raise AssertionError("no word was committed")


def assert_words_equal(words, expected):
    """Check that words are equal, and their confidence up to rounding."""
    assert [dataclasses.replace(word, confidence=None) for word in words] == [
        dataclasses.replace(word, confidence=None) for word in expected
    ]
    # the same scores, computed in batches of different sizes; measured: 3e-7
    assert [word.confidence for word in words] == pytest.approx([word.confidence for word in expected], abs=1e-5)


def test_a_batch_equals_single_streams_and_streams_can_be_replaced():
    model, processor = load_demo()
    first, second = load_digits(), load_digits("fsdd_dev_1_nicolas")
    expected = [committed_words(collect(ParakeetStream(model, processor, **OPTIONS), c, 3000)) for c in (first, second)]
    batch = StreamBatch(model, processor, num_streams=2, **OPTIONS)
    words = [[], []]
    for start in range(0, max(len(first), len(second)) + 3000, 3000):
        for row, update in enumerate(batch.feed([first[start : start + 3000], second[start : start + 3000]])):
            words[row] += update.committed
    words[1] += batch.finish([1])[0].committed
    assert_words_equal(words[1], expected[1])
    # a new speaker takes the place of the second stream
    batch.restart(1)
    [update, _] = batch.feed([None, second])
    assert update.committed == []
    for row, update in enumerate(batch.finish()):
        words[row] += update.committed
    assert_words_equal(words[0], expected[0])
    assert batch.finish() == [StreamUpdate(), StreamUpdate()]


def test_end_of_utterance_tokens_are_events():
    model, processor = load_model("eou")
    event_id = processor.tokenizer.convert_tokens_to_ids("<EOU>")
    with torch.no_grad():
        # the random model then emits the token on many frames
        model.joint.head.bias[event_id] += 8.0
    output = model.generate(**processor(load_clip("long"), sampling_rate=16000), return_dict_in_generate=True)
    expected = output.hypotheses.to_lists(0)
    updates = collect(ParakeetStream(model, processor), load_clip("long"), 4000)
    events = [event for update in updates for event in update.events]
    frames = [f for t, f in zip(expected["tokens"], expected["frames"], strict=True) if t == event_id]
    assert len(events) > 3
    assert [event.time for event in events] == [pytest.approx(0.08 * frame) for frame in frames]
    assert {event.name for event in events} == {"<EOU>"}
    assert "<EOU>" not in join_stream_words(committed_words(updates))


class FakeDetector:
    """Finds speech where the samples are not zero, and counts its calls."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, samples):
        self.num_calls += 1
        positions = samples.nonzero()[:, 0].tolist()
        return [(positions[0], positions[-1] + 1)] if positions else []


@pytest.mark.parametrize("decoder", ["transducer", "ctc"])
def test_chunks_without_speech_are_not_decoded(decoder):
    model, processor = load_demo()
    samples = np.concatenate([load_digits(), np.zeros(48000, np.float32), load_digits("fsdd_dev_0_yweweler")])
    detector = FakeDetector()
    stream = ParakeetStream(model, processor, decoder=decoder, speech_detector=detector, **OPTIONS)
    encoder, num_encoded = stream._batch._engine.encoder, 0
    encode = encoder.encode

    def count(inputs):
        nonlocal num_encoded
        num_encoded += len(inputs)
        return encode(inputs)

    encoder.encode = count
    words = committed_words(collect(stream, samples, 1600))
    assert join_stream_words(words) == "one two three five two three zero"
    # the times count the frames without speech; a CTC word starts at the token before it
    assert words[3].end >= len(load_digits()) / 16000 + 3.0
    # at least 6 of the 7.5 chunks of the pause contain no speech
    assert detector.num_calls - num_encoded >= 6
    silence = ParakeetStream(model, processor, decoder=decoder, speech_detector=detector, **OPTIONS)
    assert committed_words(collect(silence, np.zeros(50000, np.float32), 1600)) == []
    assert silence._batch._streams[0].decoder_state.num_frames == (39,)


def test_cache_aware_chunks_without_speech_are_encoded_but_give_no_text():
    model, processor = load_model("nemotron")
    model.set_attention_context(70, 1)
    silent = np.concatenate([load_clip("long"), np.zeros(16000, np.float32)])
    gated = ParakeetStream(model, processor, speech_detector=lambda samples: [])
    assert committed_words(collect(gated, silent, 1600)) == []
    stream = gated._batch._streams[0]
    assert stream.cache.num_cached.tolist() == [70]
    assert stream.decoder_state.num_frames == (-(-(len(silent) // 160 - 1) // 8) + 1,)
    # the detector of a chunk gets up to 3 s before it
    lengths = []
    all_speech = ParakeetStream(
        model, processor, speech_detector=lambda samples: [(0, lengths.append(len(samples)) or len(samples))]
    )
    plain = ParakeetStream(model, processor)
    assert committed_words(collect(all_speech, silent, 1600)) == committed_words(collect(plain, silent, 1600))
    assert 48000 < max(lengths) < 48000 + 2 * 2560 + 1000


SIGNALS = {
    "silence": lambda seconds: np.zeros(int(16000 * seconds), np.float32),
    "white noise": noise,
    "tone": tone,
}


def measure_state(stream):
    """Return the number of values that a stream holds, apart from the samples that wait for the next step."""
    state = stream._batch._streams[0]
    tensors = (
        [] if state.cache is None else [state.cache.attention_inputs, state.cache.conv_inputs, state.cache.history]
    )
    return {
        "samples": sum(block.untyped_storage().nbytes() // 4 for block in state.samples.blocks),
        "tokens": len(state.words.word_tokens),
        "cache": sum(tensor.untyped_storage().nbytes() // 4 for tensor in tensors),
        "lstm": sum(t.untyped_storage().nbytes() // 4 for t in getattr(state.decoder_state, "lstm_state", ())),
    }


def check_state_size(sizes, limits):
    """Check the sizes of the state of a stream after each block of samples."""
    for quantity, limit in limits.items():
        assert max(size[quantity] for size in sizes) <= limit, quantity


@pytest.mark.parametrize("name", ["tdt_v3", "ctc", "nemotron"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_sound_without_speech_does_not_make_the_state_grow(name, signal):
    """The random models emit many labels in such sound."""
    model, processor = load_model(name)
    options = {} if name == "nemotron" else {"chunk_s": 2.0, "left_s": 2.0, "right_s": 1.0}
    stream = ParakeetStream(model, processor, confidence=None, **options)
    block, sizes = SIGNALS[signal](2.0), []
    for _ in range(16):
        stream.feed(block)
        sizes.append(measure_state(stream))
    # left context, chunk, right context and one block of samples; one word; the cache of 70 frames, 8 frames and 9
    # feature frames in 2 layers of width 32
    check_state_size(
        sizes, {"samples": 16000 * 7, "tokens": 64, "cache": 2 * (70 + 8) * 32 + 9 * 128, "lstm": 2 * 2 * 640}
    )


@pytest.mark.slow
@pytest.mark.parametrize("signal", SIGNALS)
def test_ten_minutes_without_speech_give_few_words_and_do_not_make_the_state_grow(signal):
    model, processor = load_demo()
    stream, block, sizes, words = ParakeetStream(model, processor), SIGNALS[signal](5.0), [], []
    for _ in range(120):
        words += stream.feed(block).committed
        sizes.append(measure_state(stream))
    words += stream.finish().committed
    assert words == []
    check_state_size(sizes, {"samples": 16000 * 19, "tokens": 64, "cache": 0, "lstm": 2 * 2 * 640})


def test_a_model_whose_context_changes_during_a_stream_is_refused():
    model, processor = load_model("nemotron")
    stream = ParakeetStream(model, processor)
    stream.feed(load_clip("long")[:30000])
    model.set_attention_context(70, 1)
    with pytest.raises(
        RuntimeError, match=r"must not change while a stream runs, it was \[70, 13\] and now is \[70, 1\]"
    ):
        stream.feed(load_clip("long")[30000:])
    model.set_attention_context(70, 13)
    # the refused samples were not added
    words = stream.feed(load_clip("long")[30000:]).committed + stream.finish().committed
    expected = committed_words(collect(ParakeetStream(model, processor), load_clip("long"), 30000))
    assert len(expected) > 5
    assert_words_equal(words, expected[-len(words) :])
    assert stream._batch._streams[0].samples.stop == len(load_clip("long"))


def test_wrong_arguments_have_errors_that_say_what_to_do():
    model, processor = load_model("tdt_v3")
    with pytest.raises(ValueError, match=r"`chunk_s` must be at least 0.08 s, got 0.05: pass a larger value"):
        ParakeetStream(model, processor, chunk_s=0.05)
    with pytest.raises(ValueError, match=r"`left_s` must be at least 0 s, got -1"):
        ParakeetStream(model, processor, left_s=-1)
    with pytest.raises(ValueError, match=r"`chunk_s` must be finite, got inf: pass a number of seconds"):
        ParakeetStream(model, processor, chunk_s=float("inf"))
    with pytest.raises(ValueError, match=r"`decoder` must be a head of the model, transducer, got 'ctc'"):
        ParakeetStream(model, processor, decoder="ctc")
    with pytest.raises(ValueError, match="the confidence method must be one of"):
        ParakeetStream(model, processor, confidence="other")
    with pytest.raises(ValueError, match="`num_streams` must be at least 1"):
        StreamBatch(model, processor, num_streams=0)
    with pytest.raises(ValueError, match=r"must be in evaluation mode.*call `.eval\(\)`"):
        ParakeetStream(model.train(), processor)
    cached, cached_processor = load_model("nemotron")
    with pytest.raises(ValueError, match=r"must come from its attention context, got chunk_s=1.*chunks of 1.12 s"):
        ParakeetStream(cached, cached_processor, chunk_s=1)


@pytest.mark.parametrize("indices", [[0, 0], [2], [-1]])
def test_indices_of_streams_are_checked(indices):
    """A stream that ends twice in one call would give its words twice."""
    batch = StreamBatch(*load_demo(), num_streams=2, **OPTIONS)
    batch.feed([load_digits(), None])
    message = rf"must be different numbers from 0 to 1, got \[{indices[0]}.*: pass each stream once"
    with pytest.raises(ValueError, match=message):
        batch.finish(indices)
    if len(indices) == 1:
        with pytest.raises(ValueError, match=message):
            batch.restart(indices[0])
    assert join_stream_words(batch.finish([0])[0].committed) == "two three"


def test_wrong_samples_have_errors_that_say_what_to_do():
    model, processor = load_model("tdt_v3")
    stream = ParakeetStream(model, processor)
    with pytest.raises(ValueError, match=r"one dimension, got the shape \(2, 100\): mix the channels"):
        stream.feed(np.zeros((2, 100), np.float32))
    with pytest.raises(ValueError, match=r"got torch.int16: divide 16-bit samples by 32768"):
        stream.feed(np.zeros(100, np.int16))
    with pytest.raises(ValueError, match="samples must be finite"):
        stream.feed(np.array([0.0, np.nan], np.float32))
    with pytest.raises(ValueError, match="got 1 entries for 2 streams"):
        StreamBatch(model, processor, num_streams=2).feed([np.zeros(10)])
    stream.finish()
    with pytest.raises(ValueError, match=r"stream 0 has ended: call `restart\(0\)`"):
        stream.feed(np.zeros(10))


def test_the_caller_can_reuse_its_buffer_of_samples():
    model, processor = load_model("tdt_v3")
    samples = load_clip("long")
    options = {"chunk_s": 0.8, "left_s": 2.0, "right_s": 0.4}
    expected = committed_words(collect(ParakeetStream(model, processor, **options), samples, 1000))
    stream, buffer, words = ParakeetStream(model, processor, **options), np.zeros(1000, np.float32), []
    for start in range(0, len(samples), 1000):
        block = samples[start : start + 1000]
        buffer[: len(block)] = block
        words += stream.feed(buffer[: len(block)]).committed
        buffer[:] = np.nan
    assert words + stream.finish().committed == expected
