"""Every step of a stream equals NeMo's, and the tokens do not depend on how the samples arrive."""

import copy
import random
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from stream_helpers import (
    CACHE_AWARE_MODELS,
    CONTEXT_MODELS,
    GOLDEN,
    Recorder,
    load_clip,
    load_golden,
    load_model,
)

from transformers_parakeet.long_audio.stream_decoder import StreamDecoder
from transformers_parakeet.long_audio.stream_input import convert_samples

# encoder frames against NeMo; measured: 1.9e-6
TOLERANCE = 1e-5


def list_runs(models, prefix=""):
    """Return (model, index of the run) for every golden run."""
    return [(name, index) for name in models for index in range(len(load_golden(prefix + name)[0]["runs"]))]


# runs of the unified model with full attention
UNMASKED_RUNS = [("unified", 1), ("unified", 3), ("unified", 5)]


def start_context_run(name, index, num_streams=1):
    """Return the description of a golden run with left and right context, its name, and a recorder for it."""
    run = load_golden(f"buffered_{name}")[0]["runs"][index]
    model, processor = load_model(name)
    left_s, chunk_s, right_s = run["context_seconds"]
    run_name = f"{left_s:g}_{chunk_s:g}_{right_s:g}"
    if not run["encoder_chunks_as_attention_mask"]:
        # the same weights with full attention
        config = model.config.encoder_config
        config.attention_context_style, config.attention_context_size = "regular", [-1, -1]
        run_name += "_full_attention"
    return run, run_name, Recorder(model, processor, num_streams, chunk_s=chunk_s, left_s=left_s, right_s=right_s)


@cache
def run_single_stream(name, index, clip):
    """Run a golden run with left and right context on one clip, and return its recorder and its tokens."""
    recorder = start_context_run(name, index)[2]
    return recorder, recorder.run(load_clip(clip), block_size=997)


@pytest.mark.parametrize(("name", "index"), list_runs(CONTEXT_MODELS, "buffered_"))
def test_every_step_with_context_equals_nemo(name, index):
    run, run_name, _ = start_context_run(name, index)
    arrays = load_golden(f"buffered_{name}")[1]
    recorder, tokens = run_single_stream(name, index, "long")
    assert len(recorder.frames) == len(recorder.tokens) == len(run["steps"])
    for step_index, (step, frames, step_tokens) in enumerate(
        zip(run["steps"], recorder.frames, recorder.tokens, strict=True)
    ):
        golden = arrays[f"{run_name}.step{step_index}.encoder_out"]
        torch.testing.assert_close(frames, golden, rtol=0, atol=TOLERANCE)
        assert [token.token_id for token in step_tokens] == step["tokens"][0]
    assert [token.token_id for token in tokens] == run["final_tokens"][0]
    assert [token.frame for token in tokens] == run["final_frames"][0]
    if "final_durations" in run:
        assert [token.duration for token in tokens] == run["final_durations"][0]


# without the runs of the unified model with full attention, which take long
@pytest.mark.parametrize(
    ("name", "index"), [run for run in list_runs(CONTEXT_MODELS, "buffered_") if run not in UNMASKED_RUNS]
)
def test_a_batch_of_two_with_context_equals_nemo_and_single_streams(name, index):
    run, _, recorder = start_context_run(name, index, num_streams=2)
    engine, streams, clips = recorder.engine, recorder.streams, [load_clip("long"), load_clip("second")]
    tokens, decode = [[], []], engine.decoder.decode

    def record_by_stream(frames, states):
        rows = [next(row for row in range(2) if streams[row].decoder_state is state) for state in states]
        new_tokens, new_states = decode(frames, states)
        for row, row_tokens in zip(rows, new_tokens, strict=True):
            tokens[row] += row_tokens
        return new_tokens, new_states

    engine.decoder.decode = record_by_stream
    for start in range(0, len(clips[0]), 1600):
        for stream, clip in zip(streams, clips, strict=True):
            stream.samples.append(convert_samples(clip[start : start + 1600]))
        engine.advance(streams)
    engine.advance(streams, is_last=True)
    for row, is_equal in enumerate(run["batch_of_two"]["equal_to_single"]):
        _, single = run_single_stream(name, index, ("long", "second")[row])
        assert [token.token_id for token in tokens[row]] == [token.token_id for token in single]
        # in the other batches NeMo counts zeros after the end of the shorter clip as audio
        if is_equal:
            assert [token.token_id for token in single] == run["batch_of_two"]["final_tokens"][row]


@pytest.mark.parametrize(("name", "index"), list_runs(CACHE_AWARE_MODELS))
def test_every_cache_aware_step_equals_nemo(name, index):
    """The features are NeMo's, because its stream contains the masked frame after the end of the clip."""
    run = load_golden(name)[0]["runs"][index]
    model, _ = load_model(name)
    model.set_attention_context(*run["att_context_size"])
    head_type = "ctc" if run["decoder"] == "ctc" else "rnnt"
    decoder = StreamDecoder(model, head_type, "max_prob")
    features = load_file(GOLDEN / "features.safetensors")[f"features{model.config.encoder_config.num_mel_bins}"][None]
    with torch.no_grad():
        state, encoder_cache, all_tokens = decoder.start(), model.encoder.start_cache(1), []
        for step in run["steps"]:
            chunk = features[:, step["features_from"] : step["features_to"]]
            frames, encoder_cache = model.encoder.stream_step(chunk, encoder_cache)
            [tokens], [state] = decoder.decode([frames[0]], [state])
            all_tokens += tokens
            if head_type == "ctc":
                assert model.ctc_logits(frames).argmax(-1).tolist() == step["new_argmax"]
            else:
                assert [token.token_id for token in tokens] == step["new_tokens"][0]
    all_tokens += decoder.get_last_tokens(state)
    assert [token.token_id for token in all_tokens] == run["final_tokens"][0]
    if "final_frames" in run:
        assert [token.frame for token in all_tokens] == run["final_frames"][0]


@cache
def load_model_with_context(name, context):
    """Return a golden model with an attention context, and its processor; tests must not change it."""
    model, processor = load_model(name)
    model.set_attention_context(*context)
    return model, processor


@pytest.mark.parametrize(
    ("name", "context", "decoder"),
    [
        ("nemotron", (70, 1), None),
        ("eou", (70, 1), None),
        ("streaming_ctc", (70, 13), None),
        ("streaming_hybrid", (8, 3), "ctc"),
        ("streaming_hybrid", (8, 3), None),
        ("streaming_transducer", (28, 6), None),
        ("streaming_transducer", (-1, 6), None),
    ],
)
@pytest.mark.parametrize("num_samples", [83744, 54032, 40960, 40961, 17000, 1000])
def test_cache_aware_streams_equal_generate(name, context, decoder, num_samples):
    """No frame at the end is lost: the number of samples leaves 0 to 7 feature frames after the last whole chunk."""
    model, processor = load_model_with_context(name, context)
    samples = load_clip("long")[:num_samples]
    arguments = {} if decoder is None else {"decoder": decoder}
    output = model.generate(
        **processor(samples, sampling_rate=16000),
        return_dict_in_generate=True,
        output_confidence="max_prob",
        **arguments,
    )
    expected = output.hypotheses.to_lists(0)
    tokens = Recorder(model, processor, **arguments).run(samples, block_size=1111)
    assert [token.token_id for token in tokens] == expected["tokens"]
    assert [token.frame for token in tokens] == expected["frames"]
    assert [token.duration for token in tokens] == expected["durations"]
    # measured: 5.7e-6
    assert [token.confidence for token in tokens] == pytest.approx(expected["confidence"], abs=5e-5)


# 20 ms to 5 s, and sizes that do not divide any chunk
FEED_SIZES = [320, 1280, 4999, 80000]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tdt_v3", {"chunk_s": 0.8, "left_s": 2.0, "right_s": 0.4}),
        ("transducer", {"chunk_s": 0.32, "left_s": 1.6, "right_s": 0.16}),
        ("hybrid_tdt_ctc", {"chunk_s": 0.4, "left_s": 1.6, "right_s": 0.0, "decoder": "ctc"}),
        ("ctc", {"chunk_s": 0.24, "left_s": 0.8, "right_s": 0.16}),
        ("unified", {"chunk_s": 0.8, "left_s": 1.6, "right_s": 0.4}),
        ("nemotron", {}),
        ("streaming_ctc", {}),
    ],
)
def test_the_tokens_do_not_depend_on_the_feed_size(name, options):
    model, processor = load_model(name)
    samples = load_clip("long")
    expected = Recorder(model, processor, **options).run(samples, block_size=FEED_SIZES[0])
    assert len(expected) > 5
    for size in FEED_SIZES[1:]:
        assert Recorder(model, processor, **options).run(samples, block_size=size) == expected
    # blocks of random sizes, also empty ones
    rng, recorder, position = random.Random(0), Recorder(model, processor, **options), 0
    while position < len(samples):
        size = rng.choice([0, 1, rng.randint(0, 40000)])
        recorder.streams[0].samples.append(convert_samples(samples[position : position + size]))
        recorder.engine.advance(recorder.streams)
        position += size
    assert recorder.run(samples[:0], block_size=1) == expected


def test_a_stream_shorter_than_a_chunk_equals_generate():
    model, processor = load_model("tdt_v3")
    for num_samples in (0, 100, 160, 1279, 20000):
        samples = load_clip("long")[:num_samples]
        output = model.generate(**processor(samples, sampling_rate=16000), return_dict_in_generate=True)
        tokens = Recorder(model, processor, chunk_s=2.0, left_s=2.0, right_s=1.0).run(samples, block_size=500)
        assert [token.token_id for token in tokens] == output.hypotheses.to_lists(0)["tokens"]


@pytest.mark.parametrize("name", ["tdt_v3", "ctc", "nemotron"])
def test_thirty_two_streams_in_a_batch_equal_single_streams(name):
    model, processor = load_model(name)
    options = {"chunk_s": 0.4, "left_s": 0.8, "right_s": 0.4}
    if name == "nemotron":
        options = {}
        model.set_attention_context(70, 6)
    rng = random.Random(0)
    long, second = load_clip("long"), load_clip("second")
    clips = [(long if row % 2 else second)[rng.randint(0, 8000) :][: rng.randint(200, 24000)] for row in range(32)]
    recorder = Recorder(model, processor, num_streams=32, **options)
    streams, tokens, decode = recorder.streams, [[] for _ in clips], recorder.engine.decoder.decode
    batch_sizes = []

    def record_by_stream(frames, states):
        rows = [next(row for row in range(32) if streams[row].decoder_state is state) for state in states]
        new_tokens, new_states = decode(frames, states)
        batch_sizes.append(len(rows))
        for row, row_tokens in zip(rows, new_tokens, strict=True):
            tokens[row] += row_tokens
        return new_tokens, new_states

    recorder.engine.decoder.decode = record_by_stream
    # the streams start and end at different times
    positions = [-rng.randint(0, 9000) for _ in clips]
    while any(not stream.is_finished for stream in streams):
        ended = []
        for row, clip in enumerate(clips):
            stop = positions[row] + 6400
            streams[row].samples.append(convert_samples(clip[max(0, positions[row]) : max(0, stop)]))
            positions[row] = stop
            if stop >= len(clip) and not streams[row].is_finished:
                ended.append(row)
        recorder.engine.advance([streams[row] for row in range(32) if row not in ended])
        for row in ended:
            recorder.engine.advance([streams[row]])
            recorder.engine.advance([streams[row]], is_last=True)
            tokens[row] += recorder.engine.decoder.get_last_tokens(streams[row].decoder_state)
    assert max(batch_sizes) > 8
    for clip, stream_tokens in zip(clips, tokens, strict=True):
        expected = Recorder(model, processor, **options).run(clip, block_size=3000)
        assert [(token.token_id, token.frame, token.duration) for token in stream_tokens] == [
            (token.token_id, token.frame, token.duration) for token in expected
        ]
        # the same scores, computed in batches of different sizes; measured: 7.3e-6
        assert [token.confidence for token in stream_tokens] == pytest.approx(
            [token.confidence for token in expected], abs=5e-5
        )


def test_a_unified_stream_does_not_change_the_model():
    model, processor = load_model("unified")
    config_before = copy.deepcopy(model.config.encoder_config.to_dict())
    recorder = Recorder(model, processor, chunk_s=0.8, left_s=1.6, right_s=0.4)
    stream_encoder = recorder.engine.encoder.encoder
    assert stream_encoder.config.attention_context_size == [20, 10, 5]
    assert model.config.encoder_config.to_dict() == config_before
    # the weights are shared, not copied
    addresses = {parameter.data_ptr() for parameter in model.encoder.parameters()}
    assert {parameter.data_ptr() for parameter in stream_encoder.parameters()} == addresses
