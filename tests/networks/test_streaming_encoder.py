"""Cache-aware encoding: every step equals NeMo's, and all steps together equal the encoder on the whole clip."""

import json
from functools import cache

import pytest
import torch
from conftest import TESTS, encoder_fields
from safetensors.torch import load_file

import transformers_parakeet as tp
from transformers_parakeet.networks import stack_caches
from transformers_parakeet.networks import streaming_encoder as streaming_encoder_module

GOLDEN = TESTS / "golden" / "streaming"
MODELS = ("eou", "nemotron", "streaming_ctc", "streaming_hybrid", "streaming_transducer")
# measured: 2.2e-6 for encoder frames and 1.7e-6 for caches, against NeMo
TOLERANCE = 1e-5


@cache
def load(name):
    """Return the JSON file and the arrays of a golden file."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def list_runs():
    """Return (model, index of the run) for every golden run."""
    return [(name, index) for name in MODELS for index in range(len(load(name)[0]["runs"]))]


@cache
def load_model(name):
    """Return a golden model; tests set its attention context."""
    return tp.load_nemo(TESTS / "golden" / "real_configs" / name / "model.nemo")[0].eval()


@pytest.mark.parametrize(("name", "index"), list_runs())
def test_every_step_equals_nemo(name, index):
    description, arrays = load(name)
    run = description["runs"][index]
    left, right = run["att_context_size"]
    model = load_model(name)
    model.set_attention_context(left, right)
    features = load_file(GOLDEN / "features.safetensors")[f"features{model.config.encoder_config.num_mel_bins}"][None]
    expected, num_frames, num_checked = arrays[f"{left}_{right}.encoder_out"], 0, 0
    encoder_cache = model.encoder.start_cache(1)
    for step_index, step in enumerate(run["steps"]):
        new_features = features[:, step["features_from"] : step["features_to"]]
        frames, encoder_cache = model.encoder.stream_step(new_features, encoder_cache)
        assert frames.shape[1] == step["output_lengths"][0]
        torch.testing.assert_close(
            frames[0], expected[num_frames : num_frames + frames.shape[1]], rtol=0, atol=TOLERANCE
        )
        num_frames += frames.shape[1]
        assert encoder_cache.num_cached.tolist() == step["cache_last_channel_len"]
        # NeMo's layout of the second cache is (layers, B, H, kernel size - 1)
        for cache_name, values in (
            ("cache_last_channel", encoder_cache.attention_inputs),
            ("cache_last_time", encoder_cache.conv_inputs.transpose(2, 3)),
        ):
            golden = arrays.get(f"{left}_{right}.step{step_index}.{cache_name}")
            if golden is not None:
                torch.testing.assert_close(values, golden, rtol=0, atol=TOLERANCE)
                num_checked += 1
    assert num_frames == len(expected)
    assert num_checked >= 4


def streaming_encoder(**changes):
    """Create a random cache-aware encoder in float64."""
    fields = encoder_fields(
        attention_context_style="chunked_limited",
        causal_downsampling=True,
        conv_context_size=[8, 0],
        conv_norm_type="layer_norm",
        scale_input=False,
        **{"attention_context_size": [8, 3], **changes},
    )
    torch.manual_seed(0)
    return tp.ParakeetEncoder(tp.ParakeetEncoderConfig(**fields)).eval().double()


def encode_in_steps(encoder, features, encoder_cache):
    """Encode (B, T, F) features step by step."""
    chunk, parts, position = 8 * (encoder.config.attention_context_size[1] + 1), [], 0
    while position < features.shape[1]:
        stop = position + chunk - (7 if position == 0 else 0)
        frames, encoder_cache = encoder.stream_step(features[:, position:stop], encoder_cache)
        parts.append(frames)
        position = stop
    return torch.cat(parts, dim=1)


# lengths: part of the first chunk, whole chunks, and every length of the last chunk modulo 8
@pytest.mark.parametrize("num_features", [1, 5, 25, 57, *range(100, 109), 300])
@pytest.mark.parametrize("context", [[8, 3], [-1, 3], [2, 1], [0, 2]], ids=str)
def test_steps_equal_the_whole_clip(context, num_features):
    encoder = streaming_encoder(attention_context_size=context)
    features = torch.randn(1, num_features, 80, dtype=torch.float64)
    whole = encoder(features).last_hidden_state
    steps = encode_in_steps(encoder, features, encoder.start_cache(1))
    # measured: 2.7e-15 in float64
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-12)


def test_streams_at_different_positions_share_a_batch():
    encoder = streaming_encoder()
    features = torch.randn(2, 25 + 3 * 32, 80, dtype=torch.float64)
    expected = [encode_in_steps(encoder, features[row : row + 1], encoder.start_cache(1)) for row in range(2)]
    # the second stream starts two chunks later, so the cache of the first one has more valid frames
    caches = [encoder.start_cache(1), encoder.start_cache(1)]
    starts = [0, 25, 57, 89, 121]
    for chunk in range(2):
        rows = slice(starts[chunk], starts[chunk + 1])
        _, caches[0] = encoder.stream_step(features[:1, rows], caches[0])
    _, caches[1] = encoder.stream_step(features[1:, :25], caches[1])
    assert [int(encoder_cache.num_cached) for encoder_cache in caches] == [8, 4]
    batch = torch.stack([features[0, 57:89], features[1, 25:57]])
    frames, new_cache = encoder.stream_step(batch, stack_caches(caches))
    # measured: 0 in float64
    torch.testing.assert_close(frames[0], expected[0][0, 8:12], rtol=0, atol=1e-12)
    torch.testing.assert_close(frames[1], expected[1][0, 4:8], rtol=0, atol=1e-12)
    assert new_cache.select(1).num_cached.tolist() == [8]


def test_an_unlimited_cache_grows_to_its_limit(monkeypatch):
    monkeypatch.setattr(streaming_encoder_module, "MAX_CACHED_FRAMES", 12)
    encoder = streaming_encoder(attention_context_size=[-1, 3])
    features = torch.randn(2, 25 + 4 * 32, 80, dtype=torch.float64)
    encoder_cache, sizes = encoder.start_cache(1), []
    caches = [encoder_cache]
    for start in (0, 25, 57, 89, 121):
        stop = start + (32 if start else 25)
        _, encoder_cache = encoder.stream_step(features[:1, start:stop], encoder_cache)
        sizes.append(encoder_cache.attention_inputs.shape[2])
        caches.append(encoder_cache)
    assert sizes == [4, 8, 12, 12, 12]
    # caches of different lengths share a batch
    expected, _ = encoder.stream_step(features[1:, :32], caches[1])
    frames, _ = encoder.stream_step(features[[1, 0], :32], stack_caches([caches[1], caches[3]]))
    # measured: 1.3e-15 in float64
    torch.testing.assert_close(frames[:1], expected, rtol=0, atol=1e-12)


def test_the_cache_does_not_grow():
    encoder = streaming_encoder(attention_context_size=[8, 3])
    encoder_cache, sizes = encoder.start_cache(1), set()
    for step in range(20):
        features = torch.randn(1, 32 if step else 25, 80, dtype=torch.float64)
        _, encoder_cache = encoder.stream_step(features, encoder_cache)
        sizes.add(
            (encoder_cache.attention_inputs.numel(), encoder_cache.conv_inputs.numel(), encoder_cache.history.numel())
        )
    assert sizes == {(2 * 8 * 32, 2 * 8 * 32, 9 * 80)}


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_context_style": "regular"},
        {"causal_downsampling": False},
        {"conv_context_size": None},
        {"attention_context_size": [-1, -1]},
    ],
    ids=str,
)
def test_an_encoder_that_reads_the_future_has_no_cache(changes):
    fields = {
        "attention_context_style": "chunked_limited",
        "attention_context_size": [8, 3],
        "causal_downsampling": True,
        "conv_context_size": [8, 0],
    }
    encoder = tp.ParakeetEncoder(tp.ParakeetEncoderConfig(**encoder_fields(**{**fields, **changes})))
    assert not encoder.supports_cache
    with pytest.raises(ValueError, match=r"attention in chunks .* and causal convolutions"):
        encoder.start_cache(1)
