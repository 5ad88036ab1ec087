"""Checks greedy decoding with scripted joints whose answer is known, and against a frame-by-frame loop."""

import json
import math
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TESTS
from safetensors.torch import load_file
from torch import Tensor

from transformers_parakeet.decoding.greedy import (
    Hypotheses,
    Shortcuts,
    TransducerOptions,
    confidence,
    greedy_ctc,
    greedy_transducer,
)

GOLDEN = TESTS / "golden"

# a script says what is best at (frame, labels emitted before): token and duration; elsewhere a blank moves one frame
Script = dict[tuple[int, int], tuple[int, int]]
LETTERS, BLANK = 3, 3
SCRIPT_DURATIONS = (0, 1, 2, 4)


def play(script: Script, frames: int, options: TransducerOptions, **kwargs) -> list[tuple[int, int, int]]:
    """Decode one row with a joint that follows the script; return (token, frame, duration) of every step."""

    def predict(tokens: Tensor, state: tuple[Tensor] | None) -> tuple[Tensor, tuple[Tensor]]:
        # (layers 1, R, P 1): labels emitted so far
        count = torch.zeros(1, len(tokens), 1) if state is None else state[0] + 1
        return count[0], (count,)

    def joint(encoded: Tensor, predicted: Tensor) -> Tensor:
        durations = options.durations or ()
        logits = torch.zeros(*encoded.shape[:2], options.vocab_size + len(durations))
        for row, place in np.ndindex(*encoded.shape[:2]):
            at = int(encoded[row, place, 0]), int(predicted[row, 0, 0])
            token, duration = script.get(at, (BLANK, 1))
            logits[row, place, token] = 1.0
            if durations:
                logits[row, place, options.vocab_size + durations.index(duration)] = 1.0
        return logits

    encoded = torch.arange(frames, dtype=torch.float32).reshape(1, frames, 1)
    return steps(greedy_transducer(encoded, torch.tensor([frames]), predict, joint, options, **kwargs), 0)


def steps(hypotheses: Hypotheses, row: int) -> list[tuple[int, int, int]]:
    length = int(hypotheses.lengths[row])
    columns = (hypotheses.tokens[row], hypotheses.frames[row], hypotheses.durations[row])
    return list(zip(*(column[:length].tolist() for column in columns), strict=True))


def scripted_options(durations: tuple[int, ...] | None, **kwargs) -> TransducerOptions:
    return TransducerOptions(blank_id=BLANK, vocab_size=LETTERS + 1, durations=durations, **kwargs)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 20])
def test_tdt_script(lookahead: int):
    script: Script = {
        # a blank of duration 0 still moves one frame
        (0, 0): (BLANK, 0),
        (1, 0): (2, 0),
        (1, 1): (0, 2),
        # what the joint says on frames that are jumped over must not matter
        (2, 2): (1, 1),
        (3, 2): (BLANK, 2),
        (4, 2): (1, 1),
        # a label jumps past the end
        (5, 2): (1, 4),
    }
    assert play(script, 6, scripted_options(SCRIPT_DURATIONS, lookahead=lookahead)) == [
        (BLANK, 0, 1),
        (2, 1, 0),
        (0, 1, 2),
        (BLANK, 3, 2),
        (1, 5, 4),
    ]


@pytest.mark.parametrize("lookahead", [0, 1, 2, 20])
def test_rnnt_script(lookahead: int):
    script: Script = {(0, 0): (1, 0), (0, 1): (1, 0), (2, 2): (0, 0), (3, 3): (2, 0)}
    assert play(script, 4, scripted_options(None, lookahead=lookahead)) == [
        (1, 0, 0),
        (1, 0, 0),
        (BLANK, 0, 1),
        (BLANK, 1, 1),
        (0, 2, 0),
        (BLANK, 2, 1),
        (2, 3, 0),
        (BLANK, 3, 1),
    ]


def test_forced_move_is_a_blank_step_or_part_of_the_label():
    # labels for ever on the first frame; the script would go on with label 2
    script: Script = {(0, 0): (0, 0), (0, 1): (1, 0), (0, 2): (2, 0), (1, 2): (2, 0)}
    for durations in (None, SCRIPT_DURATIONS):
        as_step = play(script, 2, scripted_options(durations, max_symbols=2, forced_blanks=True))
        assert as_step == [(0, 0, 0), (1, 0, 0), (BLANK, 0, 1), (2, 1, 0), (BLANK, 1, 1)]
        in_label = play(script, 2, scripted_options(durations, max_symbols=2, forced_blanks=False))
        assert in_label == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (BLANK, 1, 1)]


def test_only_labels_without_a_move_count_towards_the_limit():
    # the limit of two is reached on frame 2 alone: the label on frame 0 that moves starts the count anew
    script: Script = {(0, 0): (0, 0), (0, 1): (1, 2), (2, 2): (0, 0), (2, 3): (0, 0), (2, 4): (1, 0)}
    assert play(script, 3, scripted_options(SCRIPT_DURATIONS, max_symbols=2)) == [
        (0, 0, 0),
        (1, 0, 2),
        (0, 2, 0),
        (0, 2, 0),
        (BLANK, 2, 1),
    ]


def test_max_steps_counts_blanks_and_cuts_the_forced_move():
    script: Script = {(1, 0): (0, 0), (1, 1): (1, 0)}
    options = {"max_symbols": 2, "forced_blanks": True}
    assert play(script, 4, scripted_options(None, max_steps=3, **options)) == [(BLANK, 0, 1), (0, 1, 0), (1, 1, 0)]
    assert play(script, 4, scripted_options(None, max_steps=4, **options))[-1] == (BLANK, 1, 1)
    assert play(script, 4, scripted_options(None, max_steps=1, **options)) == [(BLANK, 0, 1)]


def test_on_step_sees_every_label_and_stops_a_row():
    seen: list[list[int]] = []

    def watch(rows: list[list[int]]) -> list[bool]:
        seen.append(list(rows[0]))
        return [rows[0].count(1) == 2]

    script: Script = {(1, 0): (1, 0), (2, 1): (1, 0), (3, 2): (0, 0)}
    found = play(script, 5, scripted_options(None, lookahead=1), on_step=watch)
    assert [token for token, _, _ in found] == [BLANK, 1, BLANK, 1]
    assert seen == [[BLANK], [BLANK, 1], [BLANK, 1, BLANK], [BLANK, 1, BLANK, 1]]


class Joints(NamedTuple):
    """A random recurrent network and joint per row; float64, so that batching cannot move an argmax."""

    embed: np.ndarray
    recur: np.ndarray
    out: np.ndarray
    bias: np.ndarray
    encoded: np.ndarray

    def advance(self, row: int, state: np.ndarray, token: int) -> np.ndarray:
        return np.tanh(self.recur[row] @ state + self.embed[row, token])

    def score(self, row: int, frame: int, state: np.ndarray) -> np.ndarray:
        return self.out[row] @ np.tanh(self.encoded[row, frame] + state) + self.bias[row]


def random_joints(seed: int, rows: int, frames: int, options: TransducerOptions, blank_bias: float) -> Joints:
    rng, width = np.random.default_rng(seed), 6
    outputs = options.vocab_size + len(options.durations or ())
    bias = rng.normal(size=(rows, outputs))
    bias[:, options.blank_id] += blank_bias
    return Joints(
        embed=rng.normal(size=(rows, options.vocab_size, width)),
        recur=rng.normal(size=(rows, width, width)),
        out=1.5 * rng.normal(size=(rows, outputs, width)),
        bias=bias,
        encoded=rng.normal(size=(rows, frames, width)),
    )


def run_batch(joints: Joints, lengths: list[int], options: TransducerOptions, known: str = "") -> Hypotheses:
    """Decode all rows at once; the state carries the row's number, so that a mixed-up row shows.

    `known` names what the joint tells by shortcuts.
    """
    embed, recur, out, bias, encoded = (torch.from_numpy(part) for part in joints)
    # a frame past the end must never be believed
    beyond = torch.arange(encoded.shape[1]) >= torch.tensor(lengths)[:, None]
    encoded = encoded.masked_fill(beyond[..., None], math.nan)

    def predict(tokens: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is None:
            state = torch.zeros(1, len(tokens), recur.shape[-1]).double(), torch.arange(len(tokens))[None, :, None]
        ids = state[1][0, :, 0]
        hidden = torch.tanh((recur[ids] @ state[0][0, :, :, None])[..., 0] + embed[ids, tokens])
        return torch.cat([hidden, ids[:, None].double()], dim=1), (hidden[None], state[1])

    def joint(frames: Tensor, predicted: Tensor) -> Tensor:
        ids = predicted[:, 0, -1].long()
        hidden = torch.tanh(frames + predicted[..., :-1])
        return hidden @ out[ids].transpose(1, 2) + bias[ids, None]

    def durations(frames: Tensor, predicted: Tensor) -> Tensor:
        return joint(frames, predicted)[..., options.vocab_size :].argmax(-1)

    def tokens(frames: Tensor, predicted: Tensor) -> Tensor:
        return joint(frames, predicted)[..., : options.vocab_size].argmax(-1)

    shortcuts = Shortcuts(
        durations if "durations" in known and options.durations else None, tokens if "tokens" in known else None
    )
    return greedy_transducer(encoded, torch.tensor(lengths), predict, joint, options, pad_id=77, shortcuts=shortcuts)


def walk_frame_by_frame(
    joints: Joints, row: int, length: int, options: TransducerOptions
) -> list[tuple[int, int, int, np.ndarray | None]]:
    """The reference: one row, one step at a time; returns token, frame, duration and scores of every step."""
    blank, taken = options.blank_id, []
    frame = symbols = 0
    state = joints.advance(row, np.zeros(joints.recur.shape[-1]), blank)
    while frame < length and (options.max_steps is None or len(taken) < options.max_steps):
        scores = joints.score(row, frame, state)
        token = int(scores[: options.vocab_size].argmax())
        if options.durations is not None:
            duration = options.durations[int(scores[options.vocab_size :].argmax())]
        else:
            duration = 1 if token == blank else 0
        if token == blank:
            duration = max(duration, 1)
        else:
            state = joints.advance(row, state, token)
            symbols += 1
        stuck = duration == 0 and symbols == options.max_symbols
        if stuck and not options.forced_blanks:
            duration = 1
        taken.append((token, frame, duration, scores))
        frame += duration
        if stuck and options.forced_blanks and (options.max_steps is None or len(taken) < options.max_steps):
            taken.append((blank, frame, 1, None))
            frame += 1
        if stuck or duration > 0:
            symbols = 0
    return taken


# vocabulary of the random joints; the blank is not the last id, unlike in every checkpoint
RANDOM_VOCAB, RANDOM_BLANK = 7, 4
DURATION_SETS = [None, (0, 1, 2, 3, 4), (0, 1, 2, 4, 8), (1, 2, 3), (3, 0, 1), (0, 5), (1,)]
# (max_symbols, forced_blanks, lookahead, max_steps)
LIMITS = [
    (10, True, 0, None),
    (10, False, 1, None),
    (3, True, 3, None),
    (2, False, 7, None),
    (1, True, 7, None),
    (1, False, 3, 6),
    (2, True, 1, 5),
    (3, True, 0, 1),
]
ROWS, FRAMES = 28, 15
LENGTHS = [0, 1, 15, 1, 0, 2, 3] + [3 + (5 * row) % 13 for row in range(ROWS - 7)]


@pytest.mark.parametrize("known", ["", "durations", "durations and tokens"])
@pytest.mark.parametrize("blank_bias", [4.8, 100.0, -100.0], ids=["plausible", "all-blank", "never-blank"])
@pytest.mark.parametrize("durations", DURATION_SETS, ids=str)
def test_batched_label_looping_equals_the_frame_loop(durations: tuple[int, ...] | None, blank_bias: float, known: str):
    labels = total = 0
    for case, (max_symbols, forced_blanks, lookahead, max_steps) in enumerate(LIMITS):
        options = TransducerOptions(
            blank_id=RANDOM_BLANK,
            vocab_size=RANDOM_VOCAB,
            durations=durations,
            max_symbols=max_symbols,
            max_steps=max_steps,
            forced_blanks=forced_blanks,
            lookahead=lookahead,
        )
        joints = random_joints(case, ROWS, FRAMES, options, blank_bias)
        ours = run_batch(joints, LENGTHS, options, known)
        for row, length in enumerate(LENGTHS):
            truth = [step[:3] for step in walk_frame_by_frame(joints, row, length, options)]
            assert steps(ours, row) == truth, (row, options)
            assert set(ours.tokens[row, len(truth) :].tolist()) <= {77}
            labels += sum(token != RANDOM_BLANK for token, _, _ in truth)
            total += len(truth)
    share = labels / total
    if blank_bias == 100.0:
        assert share == 0
    elif blank_bias == -100.0:
        # the blanks that are left are forced moves
        assert share > 0.7
    else:
        assert 0.2 < share < 0.5


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 4, 8)], ids=str)
def test_lookahead_changes_nothing(durations: tuple[int, ...] | None):
    options = TransducerOptions(blank_id=RANDOM_BLANK, vocab_size=RANDOM_VOCAB, durations=durations, max_symbols=3)
    joints = random_joints(99, ROWS, FRAMES, options, 4.8)
    truth = [[step[:3] for step in walk_frame_by_frame(joints, row, LENGTHS[row], options)] for row in range(ROWS)]
    for lookahead in (0, 1, 2, 3, 7, 40):
        for known in ("", "durations", "tokens and durations"):
            ours = run_batch(joints, LENGTHS, TransducerOptions(**{**vars(options), "lookahead": lookahead}), known)
            assert [steps(ours, row) for row in range(ROWS)] == truth


def test_only_frames_on_the_way_are_scored():
    # blanks of duration 4: of 100 frames every fourth is scored, and none past the end
    options = TransducerOptions(blank_id=0, vocab_size=3, durations=(0, 4), max_symbols=3)
    scored: list[int] = []

    def joint(frames: Tensor, predicted: Tensor) -> Tensor:
        scored.extend(frames.flatten().long().tolist())
        return torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]).expand(*frames.shape[:2], 5)

    hypotheses = greedy_transducer(
        torch.arange(100.0).reshape(1, 100, 1),
        torch.tensor([100]),
        predict=lambda tokens, state: (torch.zeros(len(tokens), 1), ()),
        joint=joint,
        options=options,
        shortcuts=Shortcuts(durations=lambda frames, predicted: torch.ones(frames.shape[:2], dtype=torch.long)),
    )
    assert hypotheses.frames[0].tolist() == list(range(0, 100, 4))
    assert set(scored) - {99} == set(range(0, 100, 4))


@pytest.mark.parametrize("known", ["", "durations and tokens"])
@pytest.mark.parametrize("method", ["max_prob", "entropy"])
def test_confidence_and_scores_belong_to_their_steps(method: str, known: str):
    options = TransducerOptions(
        blank_id=RANDOM_BLANK,
        vocab_size=RANDOM_VOCAB,
        durations=(0, 1, 2),
        max_symbols=2,
        confidence=method,
        keep_scores=True,
        lookahead=3,
    )
    joints = random_joints(5, ROWS, FRAMES, options, 3.0)
    ours = run_batch(joints, LENGTHS, options, known)
    forced = 0
    for row, length in enumerate(LENGTHS):
        truth = walk_frame_by_frame(joints, row, length, options)
        for index, (token, _, _, scores) in enumerate(truth):
            # what the model did not score is 0
            want = np.zeros(RANDOM_VOCAB + 3) if scores is None else scores
            # `logits` is float32
            np.testing.assert_allclose(ours.logits[row, index].numpy(), want, atol=2e-6)
            forced += scores is None
            sure = 0.0 if token == RANDOM_BLANK else confidence64(scores[:RANDOM_VOCAB], method)
            # measured: 2.1e-7
            assert float(ours.scores[row, index]) == pytest.approx(sure, abs=1e-6)
        assert not ours.scores[row, len(truth) :].any()
    assert forced > 5


def test_an_empty_batch_of_frames():
    options = TransducerOptions(blank_id=RANDOM_BLANK, vocab_size=RANDOM_VOCAB, keep_scores=True, confidence="max_prob")
    ours = run_batch(random_joints(0, 2, 3, options, 0.0), [0, 0], options)
    assert ours.tokens.shape == ours.frames.shape == ours.durations.shape == ours.scores.shape == (2, 0)
    assert ours.lengths.tolist() == [0, 0]
    assert ours.tokens.dtype == torch.long


def confidence64(logits: np.ndarray, method: str) -> float:
    """NeMo's formulas, from NOTES.md section 8 of the golden files, in float64."""
    exponents = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    p = exponents / exponents.sum()
    n = len(p)
    if method == "max_prob":
        return float((p.max() * n - 1) / (n - 1))
    alpha = 0.33
    power_sum = float(np.sum(p**alpha))
    limit = math.exp((1 - n ** (1 - alpha)) / (1 - alpha))
    return (math.exp((1 - power_sum) / (1 - alpha)) - limit) / (1 - limit)


@pytest.mark.parametrize("method", ["max_prob", "entropy"])
@pytest.mark.parametrize("classes", [2, 29, 1025, 8193])
def test_confidence_formula(classes: int, method: str):
    logits = 4 * torch.randn(5, 3, classes, generator=torch.Generator().manual_seed(classes))
    logits[0, 0] = 0.0
    logits[0, 1, 1] = 200.0
    ours = confidence(logits, method)
    truth = np.apply_along_axis(confidence64, -1, logits.numpy(), method)
    # measured: 1.6e-6 at 8193 classes, the error of torch's float32 softmax
    np.testing.assert_allclose(ours.numpy(), truth, atol=5e-6, rtol=0.0)
    assert float(ours[0, 0]) == pytest.approx(0.0, abs=1e-6)
    assert float(ours[0, 1]) == pytest.approx(1.0, abs=1e-6)


def test_confidence_ignores_a_shift_and_takes_log_probabilities():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    for method in ("max_prob", "entropy"):
        torch.testing.assert_close(confidence(logits.log_softmax(-1), method), confidence(logits + 50, method))


def test_confidence_refuses_unknown_methods():
    with pytest.raises(ValueError, match="must be one of max_prob, entropy, got 'margin'"):
        confidence(torch.zeros(2, 3), "margin")


def test_greedy_ctc_takes_the_best_and_blanks_what_is_past_the_end():
    best = torch.tensor([[2, 2, 0, 1], [1, 0, 0, 2]])
    logits = torch.nn.functional.one_hot(best, 4).float()
    assert greedy_ctc(logits, None, 3).tolist() == best.tolist()
    assert greedy_ctc(logits, torch.tensor([3, 0]), 3).tolist() == [[2, 2, 0, 3], [3, 3, 3, 3]]


def by_token(ids: list[int], values: list[float], blank: int, pick: Callable) -> list[float]:
    """Aggregate values over the runs of equal ids that are not blank."""
    runs = groupby(zip(ids, values, strict=True), key=lambda pair: pair[0])
    return [pick(value for _, value in run) for token, run in runs if token != blank]


@pytest.mark.parametrize("clip", ["speech0", "speech1", "speech2", "synthetic", "short"])
@pytest.mark.parametrize(("method", "name"), [("max_prob", "max_prob"), ("entropy", "entropy_default")])
def test_ctc_confidence_equals_nemo(clip: str, method: str, name: str):
    expected = json.loads((GOLDEN / "ctc" / "expected.json").read_text())
    arrays = load_file(GOLDEN / "ctc" / "arrays.safetensors")
    row = expected["clips"].index(clip)
    length = int(arrays["encoder_lengths"][row])
    scores = arrays["ctc_log_probs"][row : row + 1]
    ids = greedy_ctc(scores, torch.tensor([length]), expected["blank_id"])[0, :length].tolist()
    truth = expected["ctc"]["single"][clip]
    assert ids == truth["raw_argmax"]
    ours = by_token(ids, confidence(scores[0, :length], method).tolist(), expected["blank_id"], min)
    # measured: 2.3e-6; the golden numbers are rounded to seven digits
    assert ours == pytest.approx(truth[f"token_confidence.{name}"], abs=1e-5)
