"""Decoding part by part equals decoding at once, for any split of the frames and any mix of streams in a batch."""

import random

import pytest
import torch
from torch import Tensor

from transformers_parakeet.decoding import (
    Hypotheses,
    Shortcuts,
    TransducerOptions,
    collapse_ctc,
    finish_ctc,
    greedy_decode_transducer,
    greedy_decode_transducer_reference,
    resume_ctc,
    resume_transducer,
    stack_ctc_states,
    stack_transducer_states,
    start_ctc_state,
    start_transducer_state,
)

VOCAB, BLANK, WIDTH = 6, 5, 7
CPU = torch.device("cpu")
# confidence of the same scores, computed in batches of different sizes; measured: 1.2e-7
CONFIDENCE_TOLERANCE = 1e-6


class RandomNetworks:
    """Prediction and joint network with random weights in float64, so that no two scores are nearly equal.

    Args:
        seed: seed of the weights.
        num_durations: number of duration outputs.
        blank_bias: added to the score of the blank; about 3 gives a label on every second frame.
    """

    def __init__(self, seed: int, num_durations: int, blank_bias: float) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.embedding, self.recurrent = weights(VOCAB, WIDTH), 0.5 * weights(WIDTH, WIDTH)
        self.output, self.bias = weights(VOCAB + num_durations, WIDTH), weights(VOCAB + num_durations)
        self.bias[BLANK] += blank_bias

    def predict(self, labels: Tensor, state: tuple[Tensor] | None) -> tuple[Tensor, tuple[Tensor]]:
        """Compute the predictor states; the state of the LSTM is one tensor (1, R, WIDTH)."""
        hidden = torch.zeros(1, len(labels), WIDTH, dtype=torch.float64) if state is None else state[0]
        hidden = torch.tanh(hidden @ self.recurrent + self.embedding[labels])
        return hidden[0], (hidden,)

    def joint(self, encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
        """Compute the scores of tokens and durations."""
        return torch.tanh(encoder_states + predictor_states) @ self.output.T + self.bias


def split_lengths(length: int, rng: random.Random, largest: int) -> list[int]:
    """Split a number of frames into random parts; parts without frames occur."""
    parts = []
    while sum(parts) < length:
        parts.append(min(rng.randint(0, largest), length - sum(parts)))
    return parts


def join(parts: list[Hypotheses]) -> dict[str, list]:
    """Join the hypotheses of the parts of one stream to lists."""
    lists = [part.to_lists(0) for part in parts]
    return {name: [value for part in lists for value in part[name] or []] for name in lists[0]}


def assert_lists_equal(joined: dict[str, list], expected: dict[str, list]) -> None:
    """Check that two hypotheses have equal tokens, frames and durations, and the same confidence up to rounding."""
    for name in ("tokens", "frames", "durations"):
        assert joined[name] == expected[name], name
    assert joined["confidence"] == pytest.approx(expected["confidence"] or [], abs=CONFIDENCE_TOLERANCE)


# the last set has durations that jump over several parts
@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4), (0, 2, 9, 17)], ids=str)
@pytest.mark.parametrize("largest_part", [1, 3, 8])
def test_a_transducer_in_parts_equals_the_whole(durations, largest_part):
    num_jumps = num_labels = 0
    for seed in range(12):
        rng = random.Random(f"{seed} {durations} {largest_part}")
        networks = RandomNetworks(seed, len(durations or ()), blank_bias=2.0)
        options = TransducerOptions(BLANK, VOCAB, durations, max_symbols=3, confidence="max_prob")
        frames = torch.randn(1, 40, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = greedy_decode_transducer_reference(
            frames, torch.tensor([40]), networks.predict, networks.joint, options
        )
        state = start_transducer_state(networks.predict, 1, BLANK, CPU)
        parts, position = [], 0
        for length in split_lengths(40, rng, largest_part):
            part = frames[:, position : position + length]
            hypotheses, state = resume_transducer(
                part, torch.tensor([length]), state, networks.predict, networks.joint, options
            )
            position += length
            assert state.num_frames == (position,)
            num_jumps += state.skipped_frames[0] > largest_part
            parts.append(hypotheses)
        assert_lists_equal(join(parts), expected.to_lists(0))
        num_labels += int(expected.lengths)
    assert num_labels > 60
    if durations == (0, 2, 9, 17):
        assert num_jumps > 10


@pytest.mark.parametrize("durations", [None, (0, 1, 4, 11)], ids=str)
@pytest.mark.parametrize("with_shortcuts", [False, True])
def test_streams_of_a_batch_do_not_change_each_other(durations, with_shortcuts):
    networks = RandomNetworks(3, len(durations or ()), blank_bias=2.0)
    options = TransducerOptions(BLANK, VOCAB, durations, max_symbols=3)
    shortcuts = Shortcuts()
    if with_shortcuts:
        shortcuts = Shortcuts(
            None if durations is None else lambda *states: networks.joint(*states)[..., VOCAB:].argmax(-1),
            lambda *states: networks.joint(*states)[..., :VOCAB].argmax(-1),
        )
    rng, num_streams, num_frames = random.Random(0), 5, 30
    frames = torch.randn(
        num_streams, num_frames, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    lengths = torch.full((num_streams,), num_frames)
    expected = greedy_decode_transducer(frames, lengths, networks.predict, networks.joint, options)
    states = [start_transducer_state(networks.predict, 1, BLANK, CPU) for _ in range(num_streams)]
    positions, parts = [0] * num_streams, [[] for _ in range(num_streams)]
    while min(positions) < num_frames:
        # a random subset of the streams has new frames, each another number of them
        rows = [row for row in range(num_streams) if positions[row] < num_frames and rng.random() < 0.7]
        if not rows:
            continue
        new_lengths = [min(rng.randint(0, 6), num_frames - positions[row]) for row in rows]
        # padding must have no effect
        batch = torch.full((len(rows), 6, WIDTH), torch.nan, dtype=torch.float64)
        for index, (row, length) in enumerate(zip(rows, new_lengths, strict=True)):
            batch[index, :length] = frames[row, positions[row] : positions[row] + length]
            positions[row] += length
        state = stack_transducer_states([states[row] for row in rows])
        hypotheses, state = resume_transducer(
            batch, torch.tensor(new_lengths), state, networks.predict, networks.joint, options, 0, shortcuts
        )
        for index, row in enumerate(rows):
            parts[row].append(hypotheses[index])
            states[row] = state.select(index)
    for row in range(num_streams):
        assert_lists_equal(join(parts[row]), expected.to_lists(row))


def test_frames_that_count_as_blanks_only_advance_the_time():
    networks = RandomNetworks(0, 2, blank_bias=0.0)
    state = start_transducer_state(networks.predict, 1, BLANK, CPU)
    state = type(state)(state.predictor_states, state.lstm_state, (10,), (7,))
    after = state.skip_blank_frames(4)
    assert (after.num_frames, after.skipped_frames) == ((14,), (3,))
    assert after.predictor_states is state.predictor_states
    assert after.skip_blank_frames(5).skipped_frames == (0,)


@pytest.mark.parametrize("largest_part", [1, 2, 5])
def test_ctc_in_parts_equals_the_whole(largest_part):
    num_continued = 0
    for seed in range(40):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        # two labels and the blank, so repeats over the end of a part are frequent
        tokens = torch.randint(0, 3, (1, 30), generator=generator)
        confidence = torch.rand(1, 30, generator=generator)
        expected = collapse_ctc(tokens, 2, confidence)
        state, parts, position = start_ctc_state(1, 2), [], 0
        for length in split_lengths(30, rng, largest_part):
            rows = slice(position, position + length)
            hypotheses, state = resume_ctc(tokens[:, rows], torch.tensor([length]), state, 2, confidence[:, rows])
            position += length
            last_run = state.last_runs[0]
            num_continued += last_run.token != 2 and last_run.num_frames > length > 0
            parts.append(hypotheses)
        parts.append(finish_ctc(state, 2, CPU, has_confidence=True))
        assert_lists_equal(join(parts), expected.to_lists(0))
    assert num_continued > 10


def test_lengths_beyond_the_last_frame_count_the_frames():
    state = start_ctc_state(1, 2)
    _, state = resume_ctc(torch.tensor([[0, 2, 1]]), torch.tensor([5]), state, 2)
    assert state.num_frames == (3,)
    assert (state.last_runs[0].token, state.last_runs[0].first_frame) == (1, 2)


def test_ctc_streams_of_a_batch_are_independent():
    tokens = torch.tensor([[0, 0, 2, 1], [1, 2, 2, 9]])
    states = [start_ctc_state(1, 2), start_ctc_state(1, 2)]
    hypotheses, state = resume_ctc(tokens, torch.tensor([4, 3]), stack_ctc_states(states), 2, pad_id=7)
    assert hypotheses.tokens.tolist() == [[0], [1]]
    assert hypotheses.confidence is None
    assert [run.token for run in state.last_runs] == [1, 2]
    assert state.num_frames == (4, 3)
    # the first stream goes on with its open label, the second one with a new label
    hypotheses, state = resume_ctc(
        torch.tensor([[1, 2], [1, 2]]), torch.tensor([2, 2]), stack_ctc_states([state.select(0), state.select(1)]), 2
    )
    assert hypotheses.to_lists(0) == {"tokens": [1], "frames": [3], "durations": [2], "confidence": None}
    assert hypotheses.to_lists(1) == {"tokens": [1], "frames": [3], "durations": [1], "confidence": None}
    assert finish_ctc(state, 2, CPU).lengths.tolist() == [0, 0]
