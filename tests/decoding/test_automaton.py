"""Tests of the automaton against back-off by definition, and of several automata in one."""

import random

import pytest
import torch
from ngram_helpers import draw_orders, write_arpa
from search_helpers import score_ngrams_plainly

from transformers_parakeet.decoding.automaton import stack_automata
from transformers_parakeet.decoding.ngram import load_language_model


def draw_automaton(tmp_path, seed, order, num_labels, num_absent=1):
    """Return random n-grams over pieces, the pieces, and the automaton of the n-grams."""
    rng = random.Random(seed)
    pieces = [f"▁{label}" for label in range(num_labels)]
    words = rng.sample(pieces, num_labels - num_absent)
    orders = draw_orders(rng, words, order, unknown_in_ngrams=False)
    return orders, pieces, load_language_model(write_arpa(tmp_path / f"{seed}.arpa", orders), pieces)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("num_labels", [3, 4, 6])
def test_scores_equal_back_off_by_definition(tmp_path, order, num_labels):
    for seed in range(4):
        num_absent = seed % 3
        orders, pieces, automaton = draw_automaton(tmp_path, seed, order, num_labels, num_absent)
        rng, plain_scorer = random.Random(seed), score_ngrams_plainly(orders, pieces)
        states, history = automaton.start(1), ()
        for _ in range(12):
            expected = [plain_scorer.score(history, token) for token in range(num_labels)]
            # the largest error is 1e-6: float32 sums of up to 4 numbers of up to 8
            torch.testing.assert_close(
                automaton.score(states)[0].double(), torch.tensor(expected).double(), atol=4e-6, rtol=0
            )
            end = plain_scorer.score_end(history)
            torch.testing.assert_close(automaton.score_end(states).item(), end, atol=4e-6, rtol=0)
            token = rng.randrange(num_labels)
            scores, states = automaton.step(states, torch.tensor([token]))
            assert scores.item() == pytest.approx(expected[token], abs=4e-6)
            history = (*history, token)


def test_a_batch_of_states_equals_single_states(tmp_path):
    _, _, automaton = draw_automaton(tmp_path, 5, 3, 6)
    states = torch.arange(len(automaton.backoff_states)).repeat(2)
    singles = torch.cat([automaton.score(state[None]) for state in states])
    assert torch.equal(automaton.score(states), singles)
    tokens = torch.arange(len(states)) % 6
    scores, targets = automaton.step(states, tokens)
    assert torch.equal(scores, singles.gather(1, tokens[:, None])[:, 0])
    assert all(targets[i] == automaton.step(states[i, None], tokens[i, None])[1] for i in range(len(states)))


def test_stacked_automata_equal_the_single_automata(tmp_path):
    # different orders: the automata back off 0, 2 and 3 times
    automata = [draw_automaton(tmp_path, seed, order, 5)[2] for seed, order in enumerate([3, 1, 4])]
    clips = [automata[0], automata[1], automata[0], automata[2]]
    stacked = stack_automata(clips)
    states, single_states = stacked.start(4), [automaton.start(1) for automaton in clips]
    rng = random.Random(0)
    for _ in range(20):
        scores, ends = stacked.score(states), stacked.score_end(states)
        tokens = [rng.randrange(5) for _ in clips]
        step_scores, states = stacked.step(states, torch.tensor(tokens))
        for clip, automaton in enumerate(clips):
            assert torch.equal(scores[clip], automaton.score(single_states[clip])[0])
            assert torch.equal(ends[clip], automaton.score_end(single_states[clip])[0])
            score, single_states[clip] = automaton.step(single_states[clip], torch.tensor(tokens[clip : clip + 1]))
            assert torch.equal(step_scores[clip], score[0])


def test_stacked_automata_must_fit_the_vocabulary_and_the_batch(tmp_path):
    small, large = draw_automaton(tmp_path, 0, 2, 3)[2], draw_automaton(tmp_path, 1, 2, 4)[2]
    with pytest.raises(ValueError, match=r"same number of labels, got \[3, 4\]"):
        stack_automata([small, large])
    with pytest.raises(ValueError, match="got 2 automata for 3 clips"):
        stack_automata([small, small]).start(3)


def test_an_automaton_without_arcs_scores_like_its_root(tmp_path):
    unigrams = {("<s>",): (-99, -0.5), ("</s>",): (-1, None), ("<unk>",): (-2, None), ("▁a",): (-0.3, -0.7)}
    automaton = load_language_model(write_arpa(tmp_path / "lm.arpa", [unigrams, {}]), ["▁a", "b", "c"])
    # the start state backs off; b and c share the probability of <unk>
    log10 = torch.tensor([[-0.3, -2.0, -2.0]]) + torch.tensor([0, -2, -2]).sign() * torch.tensor(2.0).log10() - 0.5
    torch.testing.assert_close(automaton.score(automaton.start(1)), log10 * torch.tensor(10.0).log(), atol=1e-6, rtol=0)
    scores, states = automaton.step(automaton.start(1), torch.tensor([0]))
    torch.testing.assert_close(scores, torch.tensor([-0.8]) * torch.tensor(10.0).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(automaton.score_end(states), torch.tensor([-1.7]) * torch.tensor(10.0).log())
