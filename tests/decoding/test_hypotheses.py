"""Checks hypotheses: collapsing of CTC frames, rows, and forced moves written as blanks."""

import itertools

import pytest
import torch
from torch import Tensor

from transformers_parakeet.decoding import Hypotheses, Steps, collapse_ctc, greedy_decode_ctc, insert_forced_blanks
from transformers_parakeet.decoding.hypotheses import pad_lists, pad_logits

BLANK, PAD = 9, 77


def test_greedy_ctc_takes_the_best_token_and_a_blank_past_the_end():
    best = torch.tensor([[2, 2, 0, 1], [1, 0, 0, 2]])
    logits = torch.nn.functional.one_hot(best, 4).float()
    assert greedy_decode_ctc(logits, None, 3).tolist() == best.tolist()
    assert greedy_decode_ctc(logits, torch.tensor([3, 0]), 3).tolist() == [[2, 2, 0, 3], [3, 3, 3, 3]]


def test_ctc_runs_are_merged_and_keep_their_smallest_confidence():
    tokens = torch.tensor([[BLANK, 4, 4, BLANK, 4, 5, 5, 5, BLANK], [BLANK] * 9, [3] * 9])
    confidence = torch.tensor([[0.0, 0.875, 0.75, 0.125, 0.5, 0.375, 0.25, 0.625, 0.0], [0.5] * 9, [0.5] * 8 + [0.25]])
    hypotheses = collapse_ctc(tokens, BLANK, confidence)
    assert [hypotheses.to_lists(row) for row in range(3)] == [
        {"tokens": [4, 4, 5], "frames": [1, 4, 5], "durations": [2, 1, 3], "confidence": [0.75, 0.5, 0.25]},
        {"tokens": [], "frames": [], "durations": [], "confidence": []},
        {"tokens": [3], "frames": [0], "durations": [9], "confidence": [0.25]},
    ]
    assert collapse_ctc(tokens, BLANK).confidence is None
    assert collapse_ctc(tokens[:, :0], BLANK).lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_frames", [1, 63, 500])
def test_collapsing_equals_a_loop_over_runs(num_frames: int):
    generator = torch.Generator().manual_seed(num_frames)
    # few different tokens, so that there are repeats; token 0 is the blank
    tokens = torch.randint(0, 3, (5, num_frames), generator=generator)
    confidence = torch.rand(5, num_frames, generator=generator)
    hypotheses = collapse_ctc(tokens, 0, confidence)
    for row in range(5):
        expected = [
            (token, run[0], len(run), min(confidence[row, run].tolist()))
            for token, group in itertools.groupby(range(num_frames), key=tokens[row].tolist().__getitem__)
            if token != 0 and (run := list(group))
        ]
        assert list(zip(*hypotheses.to_lists(row).values(), strict=True)) == expected


def test_collapsing_compiles_as_one_graph():
    tokens = torch.tensor([[BLANK, 4, 4, BLANK], [5, BLANK, 5, 5]])
    compiled = torch.compile(collapse_ctc, fullgraph=True, backend="eager")
    assert compiled(tokens, BLANK).to_lists(1) == collapse_ctc(tokens, BLANK).to_lists(1)


def test_a_row_is_a_batch_of_one_without_padding():
    hypotheses = Hypotheses(
        tokens=torch.tensor([[4, 5], [6, PAD], [PAD, PAD]]),
        frames=torch.tensor([[0, 3], [2, 0], [0, 0]]),
        durations=torch.tensor([[1, 0], [4, 0], [0, 0]]),
        lengths=torch.tensor([2, 1, 0]),
    )
    assert len(hypotheses) == 3
    assert (len(hypotheses[1]), hypotheses[1].tokens.tolist(), hypotheses[1].frames.tolist()) == (1, [[6]], [[2]])
    assert hypotheses[1].to_lists() == hypotheses.to_lists(1)
    assert hypotheses.to_lists(1) == {"tokens": [6], "frames": [2], "durations": [4], "confidence": None}
    assert hypotheses.to_lists(2)["tokens"] == []


def three_rows() -> Steps:
    """Return steps of three rows: two forced moves, none, and one after the last step."""
    return Steps(
        tokens=torch.tensor([[1, 2, 3], [1, BLANK, PAD], [BLANK, 4, 5]]),
        durations=torch.tensor([[0, 0, 0], [2, 1, 0], [1, 0, 0]]),
        forced_advances=torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 1]]),
        lengths=torch.tensor([3, 2, 3]),
        confidence=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0], [0.0, 0.5, 0.6]]),
        logits=torch.arange(1.0, 10.0).reshape(3, 3, 1),
    )


def equals(ours: Tensor | None, expected: list) -> bool:
    """Tell whether a tensor has these values."""
    return ours is not None and ours.tolist() == torch.tensor(expected).tolist()


def test_forced_moves_become_blank_steps_of_one_frame():
    steps = insert_forced_blanks(three_rows(), BLANK, PAD, max_steps=None)
    assert equals(steps.tokens, [[1, 2, BLANK, 3, BLANK], [1, BLANK, PAD, PAD, PAD], [BLANK, 4, 5, BLANK, PAD]])
    assert equals(steps.durations, [[0, 0, 1, 0, 1], [2, 1, 0, 0, 0], [1, 0, 0, 1, 0]])
    assert equals(steps.confidence, [[0.1, 0.2, 0, 0.3, 0], [0.4, 0, 0, 0, 0], [0, 0.5, 0.6, 0, 0]])
    assert equals(steps.logits, [[[1], [2], [0], [3], [0]], [[4], [5], [6], [0], [0]], [[7], [8], [9], [0], [0]]])
    assert steps.lengths.tolist() == [5, 2, 4]
    assert not steps.forced_advances.any()


def test_inserted_blanks_count_towards_the_limit_of_steps():
    steps = insert_forced_blanks(three_rows(), BLANK, PAD, max_steps=3)
    assert equals(steps.tokens, [[1, 2, BLANK], [1, BLANK, PAD], [BLANK, 4, 5]])
    assert equals(steps.durations, [[0, 0, 1], [2, 1, 0], [1, 0, 0]])
    assert steps.lengths.tolist() == [3, 2, 3]


def test_padding_of_lists():
    device = torch.device("cpu")
    assert equals(pad_lists([[1, 2], [], [3]], PAD, device), [[1, 2], [PAD, PAD], [3, PAD]])
    assert pad_lists([[1, 2]], PAD, device).dtype == torch.long
    assert pad_lists([[], []], 0.0, device).shape == (2, 0)
    assert pad_lists([[], []], 0.0, device).dtype == torch.float32
    logits = pad_logits([[torch.ones(2), 2 * torch.ones(2)], []], device)
    assert equals(logits, [[[1.0, 1.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert pad_logits([[], []], device).shape == (2, 0, 1)
