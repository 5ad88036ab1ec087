"""Checks the fast transducer search: scripted joints whose answer is known, a loop in NumPy, and the plain search."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from confidence64 import confidence64
from torch import Tensor

from transformers_parakeet.decoding import (
    Hypotheses,
    Shortcuts,
    TransducerOptions,
    greedy_decode_transducer,
    greedy_decode_transducer_reference,
    insert_forced_blanks,
)

# A script gives the best token and duration at (frame, number of labels emitted before). Everywhere else a blank
# advances one frame.
Script = dict[tuple[int, int], tuple[int, int]]
LETTERS, BLANK, PAD = 3, 3, 77
SCRIPT_DURATIONS = (0, 1, 2, 4)


def play(
    script: Script, num_frames: int, options: TransducerOptions, forced_blanks: bool = True, **kwargs
) -> list[tuple[int, int, int]]:
    """Decode one row with a joint network that follows the script; return (token, frame, duration) of every step."""

    def predict(tokens: Tensor, state: tuple[Tensor] | None) -> tuple[Tensor, tuple[Tensor]]:
        # (layers 1, R, P 1): number of labels emitted so far
        count = torch.zeros(1, len(tokens), 1) if state is None else state[0] + 1
        return count[0], (count,)

    def joint(encoded: Tensor, predictor_states: Tensor) -> Tensor:
        durations = options.durations or ()
        logits = torch.zeros(*encoded.shape[:2], options.vocab_size + len(durations))
        for row, column in np.ndindex(*encoded.shape[:2]):
            position = int(encoded[row, column, 0]), int(predictor_states[row, 0, 0])
            token, duration = script.get(position, (BLANK, 1))
            logits[row, column, token] = 1.0
            if durations:
                logits[row, column, options.vocab_size + durations.index(duration)] = 1.0
        return logits

    encoded, lengths = (
        torch.arange(num_frames, dtype=torch.float32).reshape(1, num_frames, 1),
        torch.tensor([num_frames]),
    )
    hypotheses = greedy_decode_transducer(encoded, lengths, predict, joint, options, **kwargs)
    if "on_step" not in kwargs:
        assert_same(hypotheses, greedy_decode_transducer_reference(encoded, lengths, predict, joint, options))
    return steps_of(hypotheses, options, forced_blanks)[0]


def steps_of(
    hypotheses: Hypotheses, options: TransducerOptions, forced_blanks: bool = True
) -> list[list[tuple[int, int, int]]]:
    """List (token, frame, duration) of the steps of every row.

    A forced move is a blank step with `forced_blanks`, otherwise a part of the label's duration.
    """
    check_labels(hypotheses, options)
    steps = hypotheses.steps
    if forced_blanks:
        steps = insert_forced_blanks(steps, options.blank_id, PAD, options.max_steps)
    durations = steps.durations + steps.forced_advances
    frames = durations.cumsum(1) - durations
    rows = []
    for row, length in enumerate(steps.lengths.tolist()):
        columns = (steps.tokens[row], frames[row], durations[row])
        rows.append(list(zip(*(column[:length].tolist() for column in columns), strict=True)))
    return rows


def check_labels(hypotheses: Hypotheses, options: TransducerOptions) -> None:
    """Check that the hypotheses hold the labels of the steps, with their frames and predicted durations."""
    steps = hypotheses.steps
    moves = steps.durations + steps.forced_advances
    frames = moves.cumsum(1) - moves
    for row, length in enumerate(steps.lengths.tolist()):
        is_label = steps.tokens[row, :length] != options.blank_id
        lists = hypotheses.to_lists(row)
        assert lists["tokens"] == steps.tokens[row, :length][is_label].tolist()
        assert lists["frames"] == frames[row, :length][is_label].tolist()
        assert lists["durations"] == steps.durations[row, :length][is_label].tolist()
        if options.confidence:
            assert lists["confidence"] == steps.confidence[row, :length][is_label].tolist()


def assert_same(ours: Hypotheses, expected: Hypotheses) -> None:
    """Check that two results of a search are equal in every field, and confidence up to rounding."""
    for part, expected_part in ((ours, expected), (ours.steps, expected.steps)):
        for name, values in vars(expected_part).items():
            if name in ("confidence", "logits") and values is not None:
                # measured: 1.2e-7, the same scores computed in batches of different sizes
                torch.testing.assert_close(getattr(part, name), values, rtol=0, atol=1e-6)
            elif isinstance(values, Tensor):
                assert torch.equal(getattr(part, name), values), name


def scripted_options(durations: tuple[int, ...] | None, **kwargs) -> TransducerOptions:
    """Return the settings for a vocabulary of three letters and the blank."""
    return TransducerOptions(blank_id=BLANK, vocab_size=LETTERS + 1, durations=durations, **kwargs)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 20])
def test_tdt_follows_the_script(lookahead: int):
    script: Script = {
        # a blank of duration 0 still moves one frame
        (0, 0): (BLANK, 0),
        (1, 0): (2, 0),
        (1, 1): (0, 2),
        # frames that are jumped over have no effect
        (2, 2): (1, 1),
        (3, 2): (BLANK, 2),
        (4, 2): (1, 1),
        # a label advances past the end
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
def test_rnnt_follows_the_script(lookahead: int):
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


def test_a_forced_move_is_a_blank_step_or_part_of_the_label():
    # without a limit there would be labels on the first frame for ever
    script: Script = {(0, 0): (0, 0), (0, 1): (1, 0), (0, 2): (2, 0), (1, 2): (2, 0)}
    for durations in (None, SCRIPT_DURATIONS):
        options = scripted_options(durations, max_symbols=2)
        blank_step = play(script, 2, options, forced_blanks=True)
        assert blank_step == [(0, 0, 0), (1, 0, 0), (BLANK, 0, 1), (2, 1, 0), (BLANK, 1, 1)]
        part_of_label = play(script, 2, options, forced_blanks=False)
        assert part_of_label == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (BLANK, 1, 1)]


def test_a_label_that_advances_resets_the_count_of_labels_on_a_frame():
    # the limit of two is reached on frame 2 only: the second label on frame 0 advances
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

    def play_limited(max_steps: int) -> list[tuple[int, int, int]]:
        return play(script, 4, scripted_options(None, max_steps=max_steps, max_symbols=2))

    assert play_limited(3) == [(BLANK, 0, 1), (0, 1, 0), (1, 1, 0)]
    assert play_limited(4)[-1] == (BLANK, 1, 1)
    assert play_limited(1) == [(BLANK, 0, 1)]


def test_on_step_receives_every_step_and_stops_a_row():
    calls: list[list[int]] = []

    def stop_at_second_label(rows: list[list[int]]) -> list[bool]:
        calls.append(list(rows[0]))
        return [rows[0].count(1) == 2]

    script: Script = {(1, 0): (1, 0), (2, 1): (1, 0), (3, 2): (0, 0)}
    steps = play(script, 5, scripted_options(None, lookahead=1), on_step=stop_at_second_label)
    assert [token for token, _, _ in steps] == [BLANK, 1, BLANK, 1]
    assert calls == [[BLANK], [BLANK, 1], [BLANK, 1, BLANK], [BLANK, 1, BLANK, 1]]


class Joints(NamedTuple):
    """A random recurrent network and joint per row; float64, so that the batch size cannot change the best output."""

    embed: np.ndarray
    recur: np.ndarray
    out: np.ndarray
    bias: np.ndarray
    encoded: np.ndarray

    def predict(self, row: int, state: np.ndarray, token: int) -> np.ndarray:
        """Return the state of the prediction network of a row after a token."""
        return np.tanh(self.recur[row] @ state + self.embed[row, token])

    def score(self, row: int, frame: int, state: np.ndarray) -> np.ndarray:
        """Return the scores (V + D,) of a row on a frame."""
        return self.out[row] @ np.tanh(self.encoded[row, frame] + state) + self.bias[row]


def random_joints(seed: int, rows: int, num_frames: int, options: TransducerOptions, blank_bias: float) -> Joints:
    """Draw networks for all rows; `blank_bias` is added to the score of the blank."""
    rng, width = np.random.default_rng(seed), 6
    outputs = options.vocab_size + len(options.durations or ())
    bias = rng.normal(size=(rows, outputs))
    bias[:, options.blank_id] += blank_bias
    return Joints(
        embed=rng.normal(size=(rows, options.vocab_size, width)),
        recur=rng.normal(size=(rows, width, width)),
        out=1.5 * rng.normal(size=(rows, outputs, width)),
        bias=bias,
        encoded=rng.normal(size=(rows, num_frames, width)),
    )


def decode(joints: Joints, lengths: list[int], options: TransducerOptions, shortcut_names: str = "") -> Hypotheses:
    """Decode all rows with the fast search, and check that the plain search gives the same.

    The state carries the number of its row, so that states of different rows cannot be exchanged unnoticed.

    Args:
        joints: the networks of all rows.
        lengths: valid frames of each row.
        options: the settings of the search.
        shortcut_names: the shortcuts to pass to the fast search: "durations", "tokens", both or none.
    """
    embed, recur, out, bias, encoded = (torch.from_numpy(part) for part in joints)
    # frames past the end of a row must not have an effect
    is_padding = torch.arange(encoded.shape[1]) >= torch.tensor(lengths)[:, None]
    encoded = encoded.masked_fill(is_padding[..., None], math.nan)

    def predict(tokens: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is None:
            state = torch.zeros(1, len(tokens), recur.shape[-1]).double(), torch.arange(len(tokens))[None, :, None]
        rows = state[1][0, :, 0]
        hidden = torch.tanh((recur[rows] @ state[0][0, :, :, None])[..., 0] + embed[rows, tokens])
        return torch.cat([hidden, rows[:, None].double()], dim=1), (hidden[None], state[1])

    def joint(frames: Tensor, predictor_states: Tensor) -> Tensor:
        rows = predictor_states[:, 0, -1].long()
        hidden = torch.tanh(frames + predictor_states[..., :-1])
        return hidden @ out[rows].transpose(1, 2) + bias[rows, None]

    def best_durations(frames: Tensor, predictor_states: Tensor) -> Tensor:
        return joint(frames, predictor_states)[..., options.vocab_size :].argmax(-1)

    def best_tokens(frames: Tensor, predictor_states: Tensor) -> Tensor:
        return joint(frames, predictor_states)[..., : options.vocab_size].argmax(-1)

    shortcuts = Shortcuts(
        find_best_durations=best_durations if "durations" in shortcut_names and options.durations else None,
        find_best_tokens=best_tokens if "tokens" in shortcut_names else None,
    )
    arguments = encoded, torch.tensor(lengths), predict, joint, options, PAD
    hypotheses = greedy_decode_transducer(*arguments, shortcuts=shortcuts)
    assert_same(hypotheses, greedy_decode_transducer_reference(*arguments))
    return hypotheses


def decode_in_numpy(
    joints: Joints, row: int, length: int, options: TransducerOptions, forced_blanks: bool = True
) -> list[tuple[int, int, int, np.ndarray | None]]:
    """Decode one row without torch; return token, frame, duration and scores of every step."""
    blank_id, steps = options.blank_id, []
    frame = labels_on_frame = 0

    def is_full() -> bool:
        return options.max_steps is not None and len(steps) >= options.max_steps

    state = joints.predict(row, np.zeros(joints.recur.shape[-1]), blank_id)
    while frame < length and not is_full():
        scores = joints.score(row, frame, state)
        token = int(scores[: options.vocab_size].argmax())
        if options.durations is not None:
            duration = options.durations[int(scores[options.vocab_size :].argmax())]
        else:
            duration = 1 if token == blank_id else 0
        if token == blank_id:
            duration = max(duration, 1)
        else:
            state = joints.predict(row, state, token)
            labels_on_frame += 1
        is_forced = duration == 0 and labels_on_frame == options.max_symbols
        if is_forced and not forced_blanks:
            duration = 1
        steps.append((token, frame, duration, scores))
        frame += duration
        if is_forced and forced_blanks and not is_full():
            steps.append((blank_id, frame, 1, None))
            frame += 1
        if is_forced or duration > 0:
            labels_on_frame = 0
    return steps


# vocabulary of the random joints; unlike in every checkpoint, the blank is not the last id
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


def random_options(durations: tuple[int, ...] | None, **kwargs) -> TransducerOptions:
    """Return the settings for the vocabulary of the random joints."""
    return TransducerOptions(blank_id=RANDOM_BLANK, vocab_size=RANDOM_VOCAB, durations=durations, **kwargs)


@pytest.mark.parametrize("shortcut_names", ["", "durations", "durations and tokens"])
@pytest.mark.parametrize("blank_bias", [4.8, 100.0, -100.0], ids=["plausible", "all-blank", "never-blank"])
@pytest.mark.parametrize("durations", DURATION_SETS, ids=str)
def test_both_searches_equal_a_loop_over_frames(
    durations: tuple[int, ...] | None, blank_bias: float, shortcut_names: str
):
    num_labels = num_steps = 0
    for seed, (max_symbols, forced_blanks, lookahead, max_steps) in enumerate(LIMITS):
        options = random_options(durations, max_symbols=max_symbols, max_steps=max_steps, lookahead=lookahead)
        joints = random_joints(seed, ROWS, FRAMES, options, blank_bias)
        hypotheses = decode(joints, LENGTHS, options, shortcut_names)
        for row, steps in enumerate(steps_of(hypotheses, options, forced_blanks)):
            numpy_steps = decode_in_numpy(joints, row, LENGTHS[row], options, forced_blanks)
            assert steps == [step[:3] for step in numpy_steps], (row, options)
            num_labels += sum(token != RANDOM_BLANK for token, _, _ in steps)
            num_steps += len(steps)
        for row, length in enumerate(hypotheses.steps.lengths.tolist()):
            assert set(hypotheses.steps.tokens[row, length:].tolist()) <= {PAD}
            assert set(hypotheses.tokens[row, int(hypotheses.lengths[row]) :].tolist()) <= {PAD}
    label_share = num_labels / num_steps
    if blank_bias == 100.0:
        assert label_share == 0
    elif blank_bias == -100.0:
        # the remaining blanks are forced moves
        assert label_share > 0.7
    else:
        assert 0.2 < label_share < 0.5


@pytest.mark.parametrize("num_frames", [1, 63, 500])
@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4)], ids=str)
def test_both_searches_are_equal_at_odd_numbers_of_frames(durations: tuple[int, ...] | None, num_frames: int):
    options = random_options(durations, max_symbols=2, confidence="max_prob", keep_logits=True)
    joints = random_joints(num_frames, 5, num_frames, options, 3.0)
    hypotheses = decode(joints, [num_frames, num_frames, 1, num_frames // 2, 0], options, "durations")
    assert (hypotheses.lengths > 0).any()
    assert hypotheses.lengths[-1] == 0


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 4, 8)], ids=str)
def test_the_lookahead_does_not_change_the_result(durations: tuple[int, ...] | None):
    options = random_options(durations, max_symbols=3)
    joints = random_joints(99, ROWS, FRAMES, options, 4.8)
    expected = [[step[:3] for step in decode_in_numpy(joints, row, LENGTHS[row], options)] for row in range(ROWS)]
    for lookahead in (0, 1, 2, 3, 7, 40):
        for shortcut_names in ("", "durations", "tokens and durations"):
            hypotheses = decode(joints, LENGTHS, replace(options, lookahead=lookahead), shortcut_names)
            assert steps_of(hypotheses, options) == expected


def test_only_frames_that_blanks_lead_to_are_scored():
    # with blanks of duration 4, every fourth of 100 frames is scored, and none past the end
    options = TransducerOptions(blank_id=0, vocab_size=3, durations=(0, 4), max_symbols=3)
    scored: list[int] = []

    def joint(frames: Tensor, predictor_states: Tensor) -> Tensor:
        scored.extend(frames.flatten().long().tolist())
        return torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]).expand(*frames.shape[:2], 5)

    hypotheses = greedy_decode_transducer(
        torch.arange(100.0).reshape(1, 100, 1),
        torch.tensor([100]),
        predict=lambda tokens, state: (torch.zeros(len(tokens), 1), ()),
        joint=joint,
        options=options,
        shortcuts=Shortcuts(find_best_durations=lambda frames, states: torch.ones(frames.shape[:2], dtype=torch.long)),
    )
    assert [frame for _, frame, _ in steps_of(hypotheses, options)[0]] == list(range(0, 100, 4))
    assert set(scored) - {99} == set(range(0, 100, 4))


@pytest.mark.parametrize("shortcut_names", ["", "durations and tokens"])
@pytest.mark.parametrize("method", ["max_prob", "entropy"])
def test_confidence_and_scores_belong_to_their_steps(method: str, shortcut_names: str):
    options = random_options((0, 1, 2), max_symbols=2, confidence=method, keep_logits=True, lookahead=3)
    joints = random_joints(5, ROWS, FRAMES, options, 3.0)
    steps = decode(joints, LENGTHS, options, shortcut_names).steps
    steps = insert_forced_blanks(steps, options.blank_id, PAD, None)
    num_forced = 0
    for row, length in enumerate(LENGTHS):
        numpy_steps = decode_in_numpy(joints, row, length, options)
        for step, (token, _, _, scores) in enumerate(numpy_steps):
            # a forced move has no scores
            expected_scores = np.zeros(RANDOM_VOCAB + 3) if scores is None else scores
            # `logits` is float32
            np.testing.assert_allclose(steps.logits[row, step].numpy(), expected_scores, atol=2e-6)
            num_forced += scores is None
            expected = 0.0 if token == RANDOM_BLANK else confidence64(scores[:RANDOM_VOCAB], method)
            # measured: 2.1e-7
            assert float(steps.confidence[row, step]) == pytest.approx(expected, abs=1e-6)
        assert not steps.confidence[row, len(numpy_steps) :].any()
    assert num_forced > 5


def test_rows_without_frames_give_empty_hypotheses():
    options = random_options(None, keep_logits=True, confidence="max_prob")
    hypotheses = decode(random_joints(0, 2, 3, options, 0.0), [0, 0], options)
    for part in (hypotheses, hypotheses.steps):
        assert part.tokens.shape == part.durations.shape == part.confidence.shape == (2, 0)
        assert part.lengths.tolist() == [0, 0]
        assert part.tokens.dtype == torch.long
    assert hypotheses.frames.shape == (2, 0)
