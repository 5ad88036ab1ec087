"""Streams with token scorers and allowed tokens give what decoding of all their frames at once gives."""

import pytest
import torch
from search_helpers import draw_table_scorer
from stream_helpers import Recorder, load_clip, load_shared_model

import transformers_parakeet as tp
from transformers_parakeet.configuration_parakeet import get_blank_id
from transformers_parakeet.decoding import (
    TransducerOptions,
    build_fusion,
    collapse_ctc,
    compute_token_confidence,
    greedy_decode_ctc,
    greedy_decode_transducer_reference,
    mask_joint,
    mask_logits,
)

# model, decoder
CASES = [("streaming_ctc", None), ("streaming_transducer", None), ("tdt_v3", None), ("streaming_hybrid", "ctc")]
# error of the confidence of the whole clip in float32 against float64; measured: 4.5e-6. The stream computes the same
# scores in products of other sizes; measured: 1.1e-6
CONFIDENCE_TOLERANCE = 5e-6


def draw_scorer(seed, num_labels):
    """Draw a token scorer with 50 states."""
    return draw_table_scorer(num_labels, 50, torch.Generator().manual_seed(seed), scale=2.0)


def build_options(name, model):
    """Return stream options with a language model, boosting and allowed tokens that change the text."""
    vocab_size = model.config.vocab_size
    context = {"chunk_s": 0.8, "left_s": 1.6, "right_s": 0.4} if name == "tdt_v3" else {}
    return {
        **context,
        "language_model": draw_scorer(4, vocab_size - 1),
        "lm_weight": 0.4,
        "boosting": draw_scorer(5, vocab_size - 1),
        "boosting_weight": 0.5,
        # every third token is not allowed
        "allowed_tokens": torch.arange(vocab_size) % 3 != 0,
    }


def decode_whole(model, decoder, hidden, options):
    """Decode (N, H) encoder frames at once with the plain functions, and return the lists of the hypothesis."""
    blank_id, vocab_size = get_blank_id(model.config), model.config.vocab_size
    fusion = build_fusion(
        options["language_model"],
        options["lm_weight"],
        options["boosting"],
        options["boosting_weight"],
        blank_id,
        vocab_size,
    )
    if decoder == "ctc" or isinstance(model, tp.ParakeetForCTC):
        logits = mask_logits(model.ctc_logits(hidden[None]), options["allowed_tokens"], blank_id)
        tokens = greedy_decode_ctc(logits, None, blank_id, fusion)
        return collapse_ctc(tokens, blank_id, compute_token_confidence(logits, "max_prob", tokens)).to_lists(0)
    durations = tuple(model.config.durations) if isinstance(model, tp.ParakeetForTDT) else None
    search = TransducerOptions(
        blank_id, vocab_size, durations, model.config.max_symbols_per_step, confidence="max_prob"
    )
    return greedy_decode_transducer_reference(
        model.encoder_projector(hidden[None]),
        torch.tensor([len(hidden)]),
        model.decoder.step,
        mask_joint(model.joint.score, options["allowed_tokens"], blank_id, model.config.vocab_size),
        search,
        fusion=fusion,
    ).to_lists(0)


@torch.no_grad()
@pytest.mark.parametrize(("name", "decoder"), CASES)
@pytest.mark.parametrize("block_size", [997, 40000])
def test_a_stream_equals_the_whole(name, decoder, block_size):
    model, processor = load_shared_model(name)
    options = build_options(name, model)
    recorder = Recorder(model, processor, decoder=decoder, **options)
    tokens = recorder.run(load_clip("second"), block_size)
    expected = decode_whole(model, decoder, torch.cat(recorder.frames), options)
    assert len(recorder.frames) > 1
    assert [token.token_id for token in tokens] == expected["tokens"]
    assert [token.frame for token in tokens] == expected["frames"]
    assert [token.confidence for token in tokens] == pytest.approx(expected["confidence"], abs=CONFIDENCE_TOLERANCE)
    # each option changes the tokens
    for changes in ({"lm_weight": 0.0}, {"boosting_weight": 0.0}, {"allowed_tokens": None}):
        other = Recorder(model, processor, decoder=decoder, **{**options, **changes}).run(load_clip("second"), 40000)
        assert [token.token_id for token in other] != expected["tokens"]


@pytest.mark.parametrize("name", ["streaming_ctc", "tdt_v3"])
def test_the_streams_of_a_batch_equal_single_streams(name):
    model, processor = load_shared_model(name)
    # confidences differ by rounding in a batch
    options = {**build_options(name, model), "confidence": None}
    clips = [load_clip("second"), load_clip("long")]

    expected = []
    for clip in clips:
        stream = tp.ParakeetStream(model, processor, **options)
        expected.append([stream.feed(clip), stream.finish()])
    batch = tp.StreamBatch(model, processor, 2, **options)
    updates = [batch.feed(clips), batch.finish()]
    for row in range(2):
        assert [update[row] for update in updates] == expected[row]
    assert any(update.committed for update in expected[1])


def test_options_that_do_not_fit_the_model_are_refused():
    model, processor = load_shared_model("streaming_ctc")
    scorer = draw_scorer(0, 5)
    for name in ("language_model", "boosting"):
        with pytest.raises(ValueError, match="got 5 labels for a model with"):
            tp.ParakeetStream(model, processor, **{name: scorer})
    with pytest.raises(ValueError, match="one truth value per token"):
        tp.ParakeetStream(model, processor, allowed_tokens=torch.ones(5, dtype=torch.bool))
