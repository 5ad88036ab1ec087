"""Checks `generate`: batch independence, threads, and which arguments it supports, ignores and refuses."""

import copy
import logging
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generation_helpers import (
    BLANK,
    DURATIONS,
    ENCODER,
    HEADS,
    PAD,
    SECONDS,
    SHARED,
    TRANSDUCERS,
    VOCAB,
    batch_of,
    build,
    clip,
    run,
    tiny,
)
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import MinLengthLogitsProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from transformers_parakeet import (
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
)
from transformers_parakeet.decoding import BoostedPhrase, build_boosting_tree, collapse_ctc, compute_token_confidence
from transformers_parakeet.networks.fast_linear import apply_pointwise_conv
from transformers_parakeet.networks.int8_linear import has_int8_products
from transformers_parakeet.networks.int8_search import Int8Search


def rows_of(out: Any, lengths: list[int] | None = None) -> list[tuple[list[int], list[int], Tensor]]:
    """Return tokens, durations and confidences of every row without padding."""
    rows = []
    for index, ids in enumerate(out.sequences):
        if lengths is not None:
            rows.append((ids[: lengths[index]].tolist(), [], out.token_confidence[index, : lengths[index]]))
            continue
        # the last step of a row emits a label or advances
        alive = (ids != PAD) | (out.durations[index] > 0)
        end = int(alive.nonzero().max()) + 1
        rows.append((ids[:end].tolist(), out.durations[index, :end].tolist(), out.token_confidence[index, :end]))
    return rows


def decode(head: str, indices: list[int], extra: int = 0) -> list[tuple[list[int], list[int], Tensor]]:
    """Decode a batch of clips; return tokens, durations and confidences of every row."""
    model = tiny(head)
    features, mask = batch_of(indices, extra)
    out = run(model, features, mask, output_confidence=True)
    lengths = model._get_subsampling_output_length(mask.sum(-1)).tolist()
    return rows_of(out, lengths if head == "ctc" else None)


def assert_same(rows: list, expected_rows: list) -> None:
    """Check that rows have equal tokens and durations, and equal confidences up to rounding."""
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row[:2] == expected[:2]
        # measured: 1.4e-6, float32 rounding of the encoder in batches of different widths
        torch.testing.assert_close(row[2], expected[2], rtol=0, atol=2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_clip_decodes_the_same_alone_and_in_any_batch(head: str):
    all_clips = list(range(len(SECONDS)))
    # the best two scores differ by at least 1e-3 everywhere, so that rounding cannot change the best token
    alone = [decode(head, [index])[0] for index in all_clips]
    # the models emit different labels on many of the steps
    steps = [token for ids, _, _ in alone for token in ids]
    labels = [token for token in steps if token != BLANK]
    assert len(set(labels)) > 10
    assert 0.2 < len(labels) / len(steps) < 0.6
    assert_same(decode(head, all_clips), alone)
    shuffled = [5, 1, 7, 0, 3, 6, 2, 4]
    assert_same(decode(head, shuffled), [alone[index] for index in shuffled])
    for extra in (1, 7, 8, 333, 1000):
        assert_same(decode(head, [0, 4, 6], extra), [alone[0], alone[4], alone[6]])


@pytest.mark.parametrize("head", TRANSDUCERS)
def test_durations_lead_to_the_last_frame(head: str):
    features, mask = batch_of([2, 4, 0])
    out = run(tiny(head), features, mask)
    frames = tiny(head)._get_subsampling_output_length(mask.sum(-1))
    assert out.sequences[:, 0].tolist() == [BLANK] * 3
    assert not out.durations[:, 0].any()
    # a row ends at its last frame or, by the duration of a label, after it
    assert (out.durations.sum(-1) >= frames).all()
    assert (out.durations.sum(-1) <= frames + max(DURATIONS)).all()
    moves = set(out.durations.unique().tolist())
    assert moves <= ({0, 1} if head.endswith("rnnt") else set(DURATIONS))


@pytest.mark.parametrize("head", ["ctc", "rnnt", "tdt"])
def test_threads_share_a_model(head: str):
    model = tiny(head)
    inputs = [batch_of([index], extra) for index in (0, 2, 6) for extra in (0, 5)]
    alone = [run(model, *pair).sequences for pair in inputs]

    def work(thread: int) -> list[bool]:
        order = [(thread + call) % len(inputs) for call in range(20)]
        return [torch.equal(run(model, *inputs[place]).sequences, alone[place]) for place in order]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert [all(result) for result in results] == [True] * 8
    assert len(results[0]) == 20


def everything(model: Any) -> dict[str, Any]:
    """Return the identities of all attributes, and the versions of tensors, which count changes in place."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = {key: id(value) for key, value in vars(module).items()}
        for kind in ("_parameters", "_buffers", "_modules"):
            state[f"{name}.{kind}"] = {key: id(value) for key, value in vars(module)[kind].items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name}._version"] = tensor._version
    return state


@pytest.mark.parametrize("head", HEADS)
def test_generate_does_not_change_the_model(head: str):
    model = tiny(head)
    before, settings, defaults = everything(model), model.config.to_dict(), model.generation_config.to_dict()
    run(model, *batch_of([0, 2]), output_confidence=True)
    if head != "ctc":
        run(model, *batch_of([0]), max_new_tokens=3, output_logits=True)
    if head.startswith("hybrid"):
        run(model, *batch_of([0]), decoder="ctc")
    assert everything(model) == before
    assert model.config.to_dict() == settings
    assert model.generation_config.to_dict() == defaults


@pytest.mark.parametrize("limit", [1, 5, 16])
@pytest.mark.parametrize("head", TRANSDUCERS)
def test_max_new_tokens_counts_steps(head: str, limit: int):
    features, mask = batch_of([4, 0])
    unlimited = run(tiny(head), features, mask)
    limited = run(tiny(head), features, mask, max_new_tokens=limit)
    assert limited.sequences.tolist() == unlimited.sequences[:, : limit + 1].tolist()
    assert limited.durations.tolist() == unlimited.durations[:, : limit + 1].tolist()
    # `max_length` counts the start token
    assert run(tiny(head), features, mask, max_length=limit + 1).sequences.tolist() == limited.sequences.tolist()


def test_max_length_must_be_at_least_two():
    with pytest.raises(ValueError, match="`max_length` must be at least 2, got 1"):
        run(tiny("tdt"), *batch_of([0]), max_length=1)


class Listener(BaseStreamer):
    """Records what it receives."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.received.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("head", TRANSDUCERS)
def test_a_streamer_receives_every_step_once(head: str):
    listener = Listener()
    out = run(tiny(head), *batch_of([4]), streamer=listener)
    assert listener.received == out.sequences[0].tolist()
    assert listener.ended == 1
    assert out.sequences.tolist() == run(tiny(head), *batch_of([4])).sequences.tolist()


class ThirdLabel(StoppingCriteria):
    """Stops a row at its third label."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ((input_ids != BLANK) & (input_ids != PAD)).sum(-1) >= 3


@pytest.mark.parametrize("head", TRANSDUCERS)
def test_stopping_criteria_stop_single_rows(head: str):
    unstopped = rows_of(run(tiny(head), *batch_of([4, 0, 5]), output_confidence=True))
    stopped = rows_of(run(tiny(head), *batch_of([4, 0, 5]), output_confidence=True, stopping_criteria=[ThirdLabel()]))
    for (ids, _, _), (all_ids, _, _) in zip(stopped, unstopped, strict=True):
        labels = [step for step, token in enumerate(all_ids) if token not in (BLANK, PAD)]
        end = labels[2] + 1 if len(labels) > 2 else len(all_ids)
        assert ids[:end] == all_ids[:end]
        # only a forced move may follow the third label
        assert set(ids[end:]) <= {BLANK}
        assert len(ids) <= end + 1


@pytest.mark.parametrize(
    "how", [{"max_time": 1e-9}, {"stopping_criteria": [MaxTimeCriteria(1e-9)]}], ids=["argument", "criterion"]
)
def test_max_time_stops_after_the_first_step(how: dict[str, Any]):
    unlimited = run(tiny("tdt"), *batch_of([1]))
    out = run(tiny("tdt"), *batch_of([1]), **how)
    steps = out.sequences.shape[1]
    assert 2 <= steps <= 3
    assert out.sequences[0].tolist() == unlimited.sequences[0, :steps].tolist()
    with_time = run(tiny("tdt"), *batch_of([1]), stopping_criteria=[MaxTimeCriteria(600.0)])
    assert with_time.sequences.tolist() == unlimited.sequences.tolist()


def with_forced_blanks(head: str, forced_blanks: bool) -> Any:
    """Return a copy of a tiny model that returns forced moves as blanks, or as parts of durations."""
    model = copy.deepcopy(tiny(head))
    model.config.forced_blanks = forced_blanks
    return model


@pytest.mark.parametrize("forced_blanks", [False, True])
@pytest.mark.parametrize("head", TRANSDUCERS)
def test_logits_belong_to_their_steps(head: str, forced_blanks: bool):
    model = with_forced_blanks(head, forced_blanks)
    out = run(model, *batch_of([4, 0]), output_logits=True, output_scores=True, output_confidence="entropy")
    assert len(out.logits) == len(out.scores) == out.sequences.shape[1] - 1
    labels = 0
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True), start=1):
        assert torch.equal(logits, scores)
        for row, token in enumerate(out.sequences[:, step].tolist()):
            if not logits[row].any():
                # padding, or a forced move, which has no scores
                assert token in (PAD, BLANK)
                continue
            assert int(logits[row, :VOCAB].argmax()) == token
            if token != BLANK:
                labels += 1
                confidence = compute_token_confidence(logits[row, :VOCAB], "entropy")
                # measured: 0
                torch.testing.assert_close(out.token_confidence[row, step], confidence, rtol=0, atol=1e-6)
            else:
                assert out.token_confidence[row, step] == 0
    assert labels > 10
    only = run(tiny(head), *batch_of([0]), output_logits=True)
    assert only.scores is None
    assert only.token_confidence is None
    assert run(tiny(head), *batch_of([0])).logits is None


@pytest.mark.parametrize("head", ["rnnt", "tdt"])
def test_forced_blanks_change_sequences_and_durations_but_not_hypotheses(head: str):
    results = {}
    for forced_blanks in (True, False):
        model = with_forced_blanks(head, forced_blanks)
        with torch.no_grad():
            # the model never leaves a frame by itself
            model.joint.head.bias[BLANK] -= 100.0
            model.joint.head.bias[VOCAB : VOCAB + 1] += 100.0
        results[forced_blanks] = run(model, *batch_of([2]))
    nemo, stock = results[True], results[False]
    frames = int(model._get_subsampling_output_length(torch.tensor(len(clip(2)))))
    labels = [ids[ids != BLANK].tolist() for ids in (nemo.sequences[0], stock.sequences[0])]
    assert labels[0] == labels[1]
    assert len(labels[0]) == 4 * frames
    assert nemo.durations[0].tolist() == [0] + [0, 0, 0, 0, 1] * frames
    assert stock.durations[0].tolist() == [0] + [0, 0, 0, 1] * frames
    expected = {"tokens": labels[0], "frames": [frame for frame in range(frames) for _ in range(4)]}
    for out in (nemo, stock):
        assert out.hypotheses.to_lists() == {**expected, "durations": [0] * 4 * frames, "confidence": None}


@pytest.mark.parametrize("head", TRANSDUCERS)
def test_hypotheses_hold_the_labels_of_the_sequences(head: str):
    out = run(tiny(head), *batch_of([4, 0, 2]), output_confidence=True)
    frames = out.durations.cumsum(1) - out.durations
    assert len(out.hypotheses) == 3
    for row in range(3):
        is_label = (out.sequences[row] != BLANK) & (out.sequences[row] != PAD)
        lists = out.hypotheses.to_lists(row)
        assert lists["tokens"] == out.sequences[row][is_label].tolist()
        assert lists["frames"] == frames[row][is_label].tolist()
        assert lists["confidence"] == out.token_confidence[row][is_label].tolist()


@pytest.mark.parametrize("head", ["ctc", "hybrid_tdt"])
def test_hypotheses_of_ctc_are_the_collapsed_sequences(head: str):
    ctc_head = {} if head == "ctc" else {"decoder": "ctc"}
    out = run(tiny(head), *batch_of([4, 0]), output_confidence=True, **ctc_head)
    expected = collapse_ctc(torch.as_tensor(out.sequences), BLANK, out.token_confidence)
    assert [out.hypotheses.to_lists(row) for row in (0, 1)] == [expected.to_lists(row) for row in (0, 1)]
    assert len(out.hypotheses.to_lists(0)["tokens"]) > 10


@pytest.mark.parametrize("method", [True, "max_prob", "entropy"])
def test_ctc_confidence(method: Any):
    model = tiny("ctc")
    features, mask = batch_of([0, 2])
    out = run(model, features, mask, output_confidence=method)
    expected = compute_token_confidence(out.logits, "max_prob" if method is True else method)
    assert torch.equal(out.token_confidence, expected)
    assert run(model, features, mask).token_confidence is None
    with pytest.raises(ValueError, match="got 'margin'"):
        run(model, features, mask, output_confidence="margin")


@torch.no_grad()
def test_ctc_takes_the_best_token_of_every_frame():
    model = tiny("ctc")
    features, mask = batch_of([4, 0])
    logits = model(input_features=features, attention_mask=mask).logits
    short = int(model._get_subsampling_output_length(mask[1].sum()))
    expected = logits.argmax(-1)
    expected[1, short:] = BLANK
    assert torch.equal(model.generate(features, attention_mask=mask), expected)
    assert torch.equal(run(model, features, mask).logits, logits)
    # without a mask every frame counts
    assert torch.equal(model.generate(features[:1]), model.generate(features[:1], attention_mask=mask[:1]))


@pytest.mark.parametrize("head", ["hybrid_rnnt", "hybrid_tdt"])
@torch.no_grad()
def test_the_ctc_head_of_a_hybrid_returns_the_best_tokens(head: str):
    model = tiny(head)
    features, mask = batch_of([4, 0])
    encoded = model.encoder(input_features=features, attention_mask=mask)
    logits = apply_pointwise_conv(model.ctc_head, encoded.last_hidden_state)
    expected = torch.where(encoded.attention_mask.bool(), logits.argmax(-1), BLANK)
    assert torch.equal(model.generate(features, attention_mask=mask, decoder="ctc"), expected)
    out = run(model, features, mask, decoder="ctc", output_confidence=True)
    assert torch.equal(out.sequences, expected)
    assert torch.equal(out.token_confidence, compute_token_confidence(logits))
    assert out.get("durations") is None


REFUSALS = [
    ("tdt", {"do_sample": True}, "sampl|greedy|generation mode"),
    ("tdt", {"num_return_sequences": 2}, "num_return_sequences"),
    ("tdt", {"no_such_argument": 1}, "no_such_argument"),
    ("tdt", {"decoder": "ctc"}, "hybrid"),
    ("rnnt", {"decoder": "attention"}, "'transducer' or 'ctc', got 'attention'"),
    ("rnnt", {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, 1, "cpu")])}, "MinLength"),
    ("rnnt", {"suppress_tokens": [3]}, "SuppressTokens"),
    ("rnnt", {"repetition_penalty": 1.3}, "RepetitionPenalty"),
    ("rnnt", {"output_confidence": "margin"}, "got 'margin'"),
    ("ctc", {"num_return_sequences": 2}, "num_return_sequences"),
    ("ctc", {"num_beams": 0}, "num_beams"),
    ("ctc", {"do_sample": True}, "do_sample"),
    ("ctc", {"suppress_tokens": [3]}, "suppress_tokens"),
    ("ctc", {"repetition_penalty": 1.3}, "repetition_penalty"),
    ("ctc", {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, 1, "cpu")])}, "logits_processor"),
    ("ctc", {"no_such_argument": 1}, "no_such_argument"),
    ("ctc", {"decoder": "transducer"}, "decoder"),
    ("hybrid_tdt", {"decoder": "ctc", "num_return_sequences": 4}, "num_return_sequences"),
]


@pytest.mark.parametrize(
    ("head", "kwargs", "words"), REFUSALS, ids=[f"{head}-{'-'.join(kwargs)}" for head, kwargs, _ in REFUSALS]
)
def test_arguments_that_do_not_fit_greedy_decoding_are_refused(head: str, kwargs: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        run(tiny(head), *batch_of([4]), **kwargs)


@pytest.mark.parametrize("head", HEADS)
def test_arguments_that_ask_for_greedy_decoding_are_accepted(head: str):
    plain = run(tiny(head), *batch_of([0])).sequences
    assert torch.equal(run(tiny(head), *batch_of([0]), num_beams=1, do_sample=False).sequences, plain)


NEUTRAL = [
    {"synced_gpus": False},
    {"use_cache": True},
    {"generation_config": GenerationConfig()},
    {"generation_config": None},
    {"logits_processor": LogitsProcessorList()},
    {"stopping_criteria": StoppingCriteriaList()},
    {"num_beams": 1, "do_sample": False, "num_return_sequences": 1, "repetition_penalty": 1.0},
    {"pad_token_id": 0, "eos_token_id": 3, "output_logits": True},
]
WITHOUT_EFFECT = [
    {"max_new_tokens": 3},
    {"max_length": 4},
    {"max_time": 0.001},
    {"temperature": 0.5, "top_k": 2},
    {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(0.001)])},
    {"generation_config": GenerationConfig(max_new_tokens=3)},
]


def ctc_tokens(head: str, **kwargs: Any) -> Tensor:
    """Frame-wise tokens of a CTC model or of the second head of a hybrid."""
    features, mask = batch_of([0, 2])
    ctc_head = {} if head == "ctc" else {"decoder": "ctc"}
    return tiny(head).generate(features, attention_mask=mask, **ctc_head, **kwargs)


@pytest.mark.parametrize("kwargs", NEUTRAL, ids=lambda kwargs: "-".join(kwargs))
@pytest.mark.parametrize("head", ["ctc", "hybrid_tdt"])
def test_neutral_arguments_of_ctc_are_accepted_without_a_warning(head: str, kwargs: dict[str, Any]):
    with log_records() as records:
        assert torch.equal(ctc_tokens(head, **kwargs), ctc_tokens(head))
    assert records == []


@pytest.mark.parametrize("kwargs", WITHOUT_EFFECT, ids=lambda kwargs: "-".join(kwargs))
@pytest.mark.parametrize("head", ["ctc", "hybrid_tdt"])
def test_arguments_without_effect_on_ctc_are_warned_about_once(head: str, kwargs: dict[str, Any]):
    with log_records() as records:
        for _ in range(2):
            assert torch.equal(ctc_tokens(head, **kwargs), ctc_tokens(head))
    (message,) = [record.getMessage() for record in records]
    assert "no effect" in message
    assert all(name in message for name in kwargs if name != "generation_config")


def test_a_generation_configuration_selects_the_outputs_of_ctc():
    settings = GenerationConfig(return_dict_in_generate=True, output_scores=True, output_hidden_states=True)
    out = ctc_tokens("ctc", generation_config=settings)
    assert torch.equal(out.sequences, ctc_tokens("ctc"))
    assert torch.equal(out.scores, out.logits)
    assert len(out.hidden_states) == ENCODER["num_hidden_layers"] + 1
    assert ctc_tokens("ctc", return_dict_in_generate=True).scores is None


@pytest.mark.parametrize("head", ["ctc", "hybrid_tdt"])
def test_a_streamer_receives_the_frames_of_ctc(head: str):
    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.shown: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.shown.append(value.flatten().tolist())

        def end(self) -> None:
            self.shown.append([])

    recorder = Recorder()
    features, mask = batch_of([4])
    ctc_head = {} if head == "ctc" else {"decoder": "ctc"}
    tokens = tiny(head).generate(features, attention_mask=mask, streamer=recorder, **ctc_head)
    assert recorder.shown == [[BLANK], *([token] for token in tokens[0].tolist()), []]


@pytest.mark.parametrize("head", HEADS)
def test_labels_from_a_processor_are_ignored(head: str):
    features, mask = batch_of([0, 2])
    targets = {"labels": torch.tensor([[5, 6], [7, PAD]]), "decoder_input_ids": torch.tensor([[BLANK, 5, 6]] * 2)}
    assert torch.equal(run(tiny(head), features, mask, **targets).sequences, run(tiny(head), features, mask).sequences)


@pytest.mark.parametrize("head", HEADS)
def test_a_model_from_a_configuration_alone_generates(head: str):
    torch.manual_seed(1)
    model = build(head)
    out = model.generate(*batch_of([0])[:1])
    sequences = out if isinstance(out, Tensor) else out.sequences
    frames = int(model._get_subsampling_output_length(torch.tensor(len(clip(0)))))
    if head == "ctc":
        assert sequences.shape == (1, frames)
    else:
        assert int(out.durations.sum()) >= frames
    assert int(sequences.max()) < VOCAB


def test_a_stock_generation_configuration_works():
    # stock transformers suppresses the duration outputs, which come after the tokens
    stock = GenerationConfig(
        bos_token_id=None,
        decoder_start_token_id=BLANK,
        pad_token_id=PAD,
        suppress_tokens=list(range(VOCAB, VOCAB + len(DURATIONS))),
    )
    plain = run(tiny("tdt"), *batch_of([2])).sequences
    assert torch.equal(run(tiny("tdt"), *batch_of([2]), generation_config=stock).sequences, plain)
    model = copy.deepcopy(tiny("tdt"))
    model.generation_config = stock
    assert torch.equal(run(model, *batch_of([2])).sequences, plain)


def test_a_new_transducer_is_saved_with_the_fields_that_stock_transformers_needs(tmp_path):
    for head, suppressed in (("rnnt", None), ("tdt", list(range(VOCAB, VOCAB + len(DURATIONS))))):
        # tests/verification decodes such a folder with stock transformers
        tiny(head).save_pretrained(tmp_path / head)
        saved = GenerationConfig.from_pretrained(tmp_path / head)
        assert saved.decoder_start_token_id == BLANK
        assert saved.suppress_tokens == suppressed


@pytest.mark.parametrize("head", HEADS)
def test_a_row_without_frames_has_no_tokens(head: str):
    features, mask = batch_of([0, 2, 4])
    mask[1] = 0
    out = run(tiny(head), features, mask, output_confidence=True)
    if head == "ctc":
        assert set(out.sequences[1].tolist()) == {BLANK}
    else:
        assert out.sequences[1].tolist() == [BLANK] + [PAD] * (out.sequences.shape[1] - 1)
        assert not out.durations[1].any()
        assert not out.token_confidence[1].any()
        assert_same([rows_of(out)[0], rows_of(out)[2]], [decode(head, [0])[0], decode(head, [4])[0]])
    assert not out.token_confidence.isnan().any()
    empty = run(tiny(head), features[:1], torch.zeros_like(mask[:1]))
    assert set(empty.sequences.flatten().tolist()) == {BLANK}


@contextmanager
def log_records() -> Iterator[list[logging.LogRecord]]:
    """Collect what transformers and this package log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [transformers_logging.get_logger("transformers"), logging.getLogger("transformers_parakeet")]
    # a warning that was logged once in this process would not be logged again
    transformers_logging.warning_once.cache_clear()
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield records
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@pytest.mark.parametrize("head", HEADS)
def test_normal_use_gives_no_warning(head: str):
    with warnings.catch_warnings(), log_records() as records:
        warnings.simplefilter("error")
        model = build(head)
        features, mask = batch_of([0, 2])
        model.generate(features, attention_mask=mask)
        run(model, features, mask, output_confidence=True)
        if head != "ctc":
            model.generate(input_features=features, attention_mask=mask, max_new_tokens=5)
        if head.startswith("hybrid"):
            model.generate(input_features=features, attention_mask=mask, decoder="ctc")
    assert [record.getMessage() for record in records] == []


def build_large_vocabulary(kind: str) -> Any:
    """Build a transducer with 8193 tokens that is large enough for `Int8Search.is_faster`."""
    vocab = 8193
    fields = {**SHARED, "vocab_size": vocab, "blank_token_id": vocab - 1, "joint_hidden_size": 128}
    torch.manual_seed(0)
    model = (
        ParakeetForRNNT(ParakeetRNNTConfig(**fields))
        if kind == "rnnt"
        else ParakeetForTDT(ParakeetTDTConfig(**fields, durations=DURATIONS))
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("decoder.", "joint.", "encoder_projector.")):
                weight.normal_(0.0, 0.2)
        model.joint.head.bias[vocab - 1] += 2.5
    return model


@pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with exact int8 products")
@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_the_int8_search_for_labels_of_a_fusion_does_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch):
    model, calls = build_large_vocabulary(kind), []
    features, mask = batch_of([0, 1, 2, 3])
    plain = Int8Search.search
    monkeypatch.setattr(Int8Search, "search", lambda *arguments: (calls.append(1), plain(*arguments))[1])
    unboosted = model.generate(input_features=features, attention_mask=mask).sequences
    labels = unboosted[(unboosted < 8192) & (unboosted != model.config.pad_token_id)].unique().tolist()
    phrases = [BoostedPhrase((label, other)) for label in labels for other in range(0, 8192, 512)]
    tree = build_boosting_tree([*phrases, *(BoostedPhrase((label,)) for label in range(5, 8192, 97))], 8192)
    sequences = []
    for suits in (True, False):
        monkeypatch.setattr(Int8Search, "is_faster", staticmethod(lambda weight, suits=suits: suits))
        calls.clear()
        output = model.generate(input_features=features, attention_mask=mask, boosting=tree, boosting_weight=3.0)
        sequences.append(output.sequences)
        assert bool(calls) == suits
    assert torch.equal(sequences[0], sequences[1])
    assert not torch.equal(sequences[0], unboosted)


@pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with exact int8 products")
@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_the_int8_search_for_the_best_token_does_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch):
    model, vocab, calls = build_large_vocabulary(kind), 8193, []
    features, mask = batch_of([0, 1, 2, 3])
    plain = Int8Search.argmax

    def counted(self: Int8Search, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        calls.append(len(hidden))
        return plain(self, hidden, weight, bias)

    monkeypatch.setattr(Int8Search, "argmax", counted)
    outputs = []
    for suits in (True, False):
        monkeypatch.setattr(Int8Search, "is_faster", staticmethod(lambda weight, suits=suits: suits))
        outputs.append(model.generate(input_features=features, attention_mask=mask))
        assert bool(calls) == suits
        calls.clear()
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].durations, outputs[1].durations)
    labels = (outputs[0].sequences < vocab - 1) & (outputs[0].sequences != model.config.pad_token_id)
    assert 10 < labels.sum() < 0.9 * labels.numel()
    # confidence needs all scores
    model.generate(input_features=features, attention_mask=mask, output_confidence=True)
    assert not calls
