"""The choice of labels among few candidates, compared with the choice among all labels."""

import pytest
import torch
from search_helpers import draw_boosting_fusion, draw_table_fusion

from transformers_parakeet.decoding import Fusion
from transformers_parakeet.decoding.label_choice import LabelChooser, choose_few
from transformers_parakeet.decoding.label_scores import KnownLogits
from transformers_parakeet.networks.int8_search import Int8Search

NUM_LABELS = 63


def draw_fusion(seed, num_labels, weights):
    """Draw a table of scores and phrases to boost."""
    table = draw_table_fusion(num_labels, torch.Generator().manual_seed(seed), (1.0,), scale=2.0)[0]
    boosting = draw_boosting_fusion(seed, num_labels)[0]
    return Fusion(table.scorers + boosting.scorers, weights)


def draw_states(fusion, num_clips, seed):
    """Draw fusion states after three random labels."""
    states, generator = fusion.start(num_clips), torch.Generator().manual_seed(seed)
    for _ in range(3):
        labels = torch.randint(0, fusion.scorers[0].num_labels, (num_clips,), generator=generator)
        states = fusion.advance(states, labels)
    return states


def check_choice(fusion, states, logits, scores):
    """Check that all ways to choose give the same labels and states; return whether few labels were scored."""
    expected_labels, expected_states = fusion.choose_labels(states, logits)
    chooser = LabelChooser(fusion, states)
    labels = chooser.choose_from(range(len(states)), scores)
    assert labels.tolist() == expected_labels.tolist()
    assert torch.equal(chooser.states, expected_states)
    return choose_few(fusion, states.numpy(), scores) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [(0.3, 1.0), (0.0, 0.5), (50.0, 20.0), (-0.5, 1.0)], ids=str)
def test_few_labels_give_the_choice_among_all(dtype, weights):
    num_few = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        fusion = draw_fusion(seed, NUM_LABELS, weights)
        logits = 4 * torch.randn(5, NUM_LABELS, generator=generator)
        # flat logits, equal logits, labels that are not allowed, all labels not allowed
        logits[1] *= 0.01
        logits[2] = logits[2].round()
        logits[3, ::2] = -torch.inf
        logits = logits.to(dtype)
        if seed % 4 == 3:
            logits[4, seed] = (torch.nan, torch.inf, -torch.inf)[seed % 3]
        scores = KnownLogits(logits, logits.max(-1).indices.tolist())
        num_few += check_choice(fusion, draw_states(fusion, 5, seed), logits, scores)
    assert num_few == 0 if weights[0] < 0 else num_few >= 30


@pytest.mark.parametrize("num_labels", [63, 64, 65, 200, 500])
def test_rough_scores_give_the_choice_among_all(num_labels):
    num_few = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        fusion = draw_fusion(seed, num_labels, (0.5, 1.0))
        weight = torch.randn(num_labels + 1, 32, generator=generator)
        bias = 0.3 * torch.randn(num_labels + 1, generator=generator)
        # equal rows, and a blank with small scores
        weight[7], bias[7] = weight[3], bias[3]
        bias[num_labels] -= 40.0
        hidden = torch.randn(9, 32, generator=generator)
        outputs = Int8Search(weight, bias).search(hidden, weight, bias)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        assert outputs is not None
        assert (outputs.tokens != num_labels).all()
        scores = outputs.select([0, 3]).join([outputs.select([1, 8]), outputs.select([5])])
        rows = torch.tensor([0, 3, 1, 8, 5])
        num_few += check_choice(fusion, draw_states(fusion, 5, seed), logits[rows, :-1], scores)
    assert num_few >= 20


def test_bounds_and_steps_on_the_cpu():
    for seed in range(60):
        automaton = draw_boosting_fusion(seed, 7)[0].scorers[0]
        states = torch.arange(len(automaton.backoff_states))
        scores = automaton.score(states)
        assert (automaton.bound_scores(states) >= scores.amax(1)).all()
        repeated, tokens = states.repeat_interleave(7), torch.arange(7).repeat(len(states))
        step, plain = automaton.step(repeated, tokens), automaton._step_plainly(repeated, tokens)
        assert torch.equal(step[0], plain[0])
        assert torch.equal(step[1], plain[1])
        assert torch.equal(step[0], scores.flatten())
