"""Tests of phrase boosting: NeMo's scores of token walks, a plain reference on random phrases, sizes and messages."""

import json
import math
import random
import time

import pytest
import torch
from conftest import TESTS
from search_helpers import draw_phrases, score_phrases_plainly, total_score

from transformers_parakeet.decoding.automaton import BackoffAutomaton, stack_automata
from transformers_parakeet.decoding.biasing import BoostedPhrase, build_boosting_tree

SCORING = json.loads((TESTS / "golden" / "search" / "scoring.json").read_text(encoding="utf-8"))


def golden_tree(case):
    """Build the boosting tree of a case of scoring.json, with NeMo's rule for `score_per_phrase`."""
    settings = dict(case["settings"])
    score_per_phrase = settings.pop("score_per_phrase", 0.0)
    phrases = [
        BoostedPhrase(tuple(tokens), round(score_per_phrase / len(text), 2) or None)
        for text, tokens in case["phrases"].items()
    ]
    return build_boosting_tree(phrases, SCORING["vocab_size"], **settings)


@pytest.mark.parametrize("case", SCORING["boost"], ids=lambda case: case["name"])
def test_scores_of_walks_equal_those_of_nemo(case):
    tree = golden_tree(case)
    num_steps = 0
    for walk in case["walks"]:
        state = tree.start(1)
        for token, score, vocabulary_sum in zip(
            walk["tokens"], walk["scores"], walk["sum_over_vocabulary"], strict=True
        ):
            vocabulary_scores = tree.score(state)[0]
            token_score, state = tree.step(state, torch.tensor([token]))
            assert token_score.item() == vocabulary_scores[token].item()
            # the file has 6 and 4 decimals, and NeMo sums in float32: measured 4.9e-7, and relative 7.4e-7
            assert token_score.item() == pytest.approx(score, abs=1e-6)
            assert vocabulary_scores.double().sum().item() == pytest.approx(vocabulary_sum, rel=1e-6)
            num_steps += 1
    assert num_steps == 66


@pytest.mark.parametrize("seed", range(200))
def test_scores_equal_a_plain_reference(seed):
    rng = random.Random(seed)
    num_labels = rng.randint(2, 5)
    phrases = draw_phrases(rng, num_labels)
    depth_scaling, unk_score = rng.choice([0.0, 1.0, 2.0]), rng.choice([0.0, -0.25])
    tree = build_boosting_tree(
        [BoostedPhrase(tokens, score) for tokens, score in phrases.items()],
        num_labels,
        depth_scaling=depth_scaling,
        unk_score=unk_score,
    )
    plain_scorer = score_phrases_plainly(phrases, depth_scaling, unk_score)
    history, state = (), tree.start(1)
    for _ in range(12):
        expected = [plain_scorer.score(history, token) for token in range(num_labels)]
        # float32 sums: measured 1.9e-6
        torch.testing.assert_close(tree.score(state)[0].double(), torch.tensor(expected).double(), atol=4e-6, rtol=0)
        # prefer tokens with a bonus, so that long phrases are matched
        token = max(range(num_labels), key=expected.__getitem__) if rng.random() < 0.6 else rng.randrange(num_labels)
        score, state = tree.step(state, torch.tensor([token]))
        assert score.item() == pytest.approx(expected[token], abs=4e-6)
        history = (*history, token)


def test_a_complete_phrase_keeps_its_bonus_and_a_failed_one_gives_it_back():
    tree = build_boosting_tree([BoostedPhrase((1, 2, 3))], 8)
    complete = 1 + (2 + math.log(2)) + (2 + math.log(3))
    assert total_score(tree, [5, 1, 2, 3, 6, 6]) == pytest.approx(complete, abs=1e-6)
    assert total_score(tree, [5, 1, 2, 4]) == pytest.approx(0.0, abs=1e-6)
    # the second 1 begins the phrase again
    assert total_score(tree, [1, 1, 2, 3, 0]) == pytest.approx(complete, abs=1e-6)
    assert total_score(tree, [1, 2, 1, 2, 3]) == pytest.approx(complete, abs=1e-6)


def test_phrases_that_share_tokens_get_the_largest_score_in_any_order():
    phrases = [BoostedPhrase((1, 2, 3), 1.0), BoostedPhrase((1, 2, 4), 3.0), BoostedPhrase((1, 2, 3), 2.0)]
    for order in (phrases, phrases[::-1]):
        tree = build_boosting_tree(order, 8)
        assert total_score(tree, [1, 2]) == pytest.approx(3 + 6 + math.log(2), abs=1e-6)
        assert total_score(tree, [1, 2, 3]) == pytest.approx(3 + 6 + math.log(2) + 4 + math.log(3), abs=1e-6)


def test_a_phrase_without_a_score_gets_the_context_score():
    tree = build_boosting_tree([BoostedPhrase((1,)), BoostedPhrase((2,), 0.5)], 4, context_score=2.5, unk_score=-1.0)
    assert tree.score(tree.start(1))[0].tolist() == [-1.0, 2.5, 0.5, -1.0]
    assert tree.score_end(torch.tensor([0, 1])).tolist() == [0.0, 0.0]


def test_clips_can_have_different_trees():
    first = build_boosting_tree([BoostedPhrase((1, 2))], 4)
    second = build_boosting_tree([BoostedPhrase((2, 1)), BoostedPhrase((1, 1))], 4)
    both = stack_automata([second, first])
    scores, states = both.step(both.start(2), torch.tensor([1, 1]))
    assert scores.tolist() == [1.0, 1.0]
    table = both.score(states)
    for row, tree in enumerate((second, first)):
        alone = tree.score(tree.step(tree.start(1), torch.tensor([1]))[1])
        assert torch.equal(table[row], alone[0])


def test_ten_thousand_phrases_are_built_in_seconds():
    rng = random.Random(0)
    phrases = [BoostedPhrase(tuple(rng.randrange(8192) for _ in range(rng.randint(1, 12)))) for _ in range(10_000)]
    start = time.perf_counter()
    tree = build_boosting_tree(phrases, 8192)
    # measured 0.18 s
    assert time.perf_counter() - start < 5
    # an array of at most 64 bits per state or arc
    arrays = [value for value in vars(tree).values() if isinstance(value, torch.Tensor)]
    assert sum(array.numel() for array in arrays) < 10 * len(tree.backoff_states) + 2 * 8192 + 10
    phrase = phrases[1].tokens
    state = tree.start(1)
    for depth, token in enumerate(phrase, 1):
        score, state = tree.step(state, torch.tensor([token]))
        assert score.item() == pytest.approx(1.0 if depth == 1 else 2 + math.log(depth), abs=1e-6)


@pytest.mark.parametrize(
    ("phrases", "settings", "message"),
    [
        ([], {}, "at least one phrase"),
        ([BoostedPhrase(())], {}, "at least one token, got none in phrase 0"),
        ([BoostedPhrase((1, 4))], {}, "labels from 0 to 3, got \\(1, 4\\)"),
        ([BoostedPhrase((-1, 2))], {}, "labels from 0 to 3, got \\(-1, 2\\)"),
        ([BoostedPhrase((1,), 0.0)], {}, "above 0, got 0.0"),
        ([BoostedPhrase((1,), math.nan)], {}, "above 0, got nan"),
        ([BoostedPhrase((1,))], {"context_score": 0.0}, "`context_score` must be a finite number above 0, got 0.0"),
        ([BoostedPhrase((1,))], {"context_score": math.inf}, "`context_score` .* got inf"),
        ([BoostedPhrase((1,))], {"depth_scaling": -1.0}, "`depth_scaling` .* got -1.0"),
        ([BoostedPhrase((1,))], {"unk_score": math.nan}, "`unk_score` .* got nan"),
    ],
)
def test_wrong_phrases_and_settings_are_refused(phrases, settings, message):
    with pytest.raises(ValueError, match=message):
        build_boosting_tree(phrases, 4, **settings)


def test_the_tree_is_an_automaton_with_consistent_arrays():
    tree = build_boosting_tree([BoostedPhrase((3, 1, 3, 2)), BoostedPhrase((1, 3)), BoostedPhrase((2,))], 4)
    assert isinstance(tree, BackoffAutomaton)
    assert tree.num_labels == 4
    # states: root | 1 2 3 | 13 31 | 313 | 3132; their fail states: 13 -> 3, 31 -> 1, 313 -> 13, 3132 -> 2
    assert tree.backoff_states.tolist() == [0, 0, 0, 0, 3, 1, 4, 2]
    assert tree.arc_keys.tolist() == [1 * 4 + 3, 3 * 4 + 1, 5 * 4 + 3, 6 * 4 + 2]
    assert tree.arc_targets.tolist() == [4, 5, 6, 7]
    assert tree.arc_offsets.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4]
    # 313 backs off to 13, then to 3, then to the root
    assert tree.max_backoffs == 3
