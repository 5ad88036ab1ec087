"""Checks the transducer beam search: all alignments of small lattices, greedy decoding, and the reference search."""

import math
from collections import defaultdict
from dataclasses import replace
from functools import cache

import pytest
import torch
from search_helpers import NO_FUSION, PlainFusion, draw_boosting_fusion, draw_ngram_fusion, draw_table_fusion
from torch import Tensor

from transformers_parakeet.decoding import (
    BeamOptions,
    Hypotheses,
    TransducerOptions,
    beam_decode_clip_reference,
    beam_decode_transducer,
    compute_token_confidence,
    greedy_decode_transducer_reference,
)
from transformers_parakeet.decoding.beam_candidates import GROUP_SIZE, select_best_tokens
from transformers_parakeet.decoding.fusion import Fusion

PAD, WIDTH = 77, 6


class Networks:
    """A random prediction network and joint network in float64; the blank is the last token."""

    def __init__(self, seed: int, options: TransducerOptions, blank_bias: float = 0.0):
        generator = torch.Generator().manual_seed(seed)
        outputs = options.vocab_size + len(options.durations or ())

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.embedding, self.recurrent, self.output = (
            draw(options.vocab_size, WIDTH),
            draw(WIDTH, WIDTH),
            draw(outputs, WIDTH),
        )
        self.bias, self.generator = draw(outputs), generator
        self.bias[options.blank_id] += blank_bias
        self.num_predicted = 0

    def draw_encoder_states(self, batch: int, num_frames: int) -> Tensor:
        return torch.randn(batch, num_frames, WIDTH, generator=self.generator, dtype=torch.float64)

    def predict(self, labels: Tensor, state: tuple[Tensor] | None) -> tuple[Tensor, tuple[Tensor]]:
        self.num_predicted += len(labels)
        hidden = torch.zeros(len(labels), WIDTH, dtype=torch.float64) if state is None else state[0][0]
        hidden = torch.tanh(hidden @ self.recurrent.t() + self.embedding[labels])
        return hidden, (hidden[None],)

    def joint(self, encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
        return torch.tanh(encoder_states + predictor_states) @ self.output.t() + self.bias


def make_options(vocab_size: int, durations: tuple[int, ...] | None, **kwargs) -> TransducerOptions:
    """Return settings in which the blank is the last token."""
    return TransducerOptions(blank_id=vocab_size - 1, vocab_size=vocab_size, durations=durations, **kwargs)


def draw_fusion(seed: int, num_labels: int) -> tuple[Fusion, PlainFusion]:
    """Draw two scorers."""
    generator = torch.Generator().manual_seed(seed)
    return draw_table_fusion(num_labels, generator, (0.4, 0.3), dtype=torch.float64)


def list_clips(hypotheses: Hypotheses, num_rows: int) -> list[list[tuple[tuple[int, ...], float]]]:
    """Return (labels, score) of all rows of every clip that contain a hypothesis."""
    rows = [
        (tuple(hypotheses.to_lists(row)["tokens"]), float(hypotheses.scores[row])) for row in range(len(hypotheses))
    ]
    clips = [rows[first : first + num_rows] for first in range(0, len(rows), num_rows)]
    return [[row for row in clip if row[1] > -math.inf] for clip in clips]


def enumerate_alignments(
    networks: Networks,
    encoder_states: Tensor,
    options: TransducerOptions,
    fusion: PlainFusion,
    full: bool,
    max_labels: int,
) -> dict[tuple[int, ...], float]:
    """Sum the probabilities of all alignments of every label sequence, by recursion over the steps of one clip.

    Args:
        networks: the networks.
        encoder_states: (N, width) frames of the clip.
        options: the settings of the transducer.
        fusion: the scorers with weights.
        full: whether the log-probabilities of blank and labels are scaled (golden/real_configs/NOTES.md, D.16).
        max_labels: longer label sequences are left out.
    """
    totals: dict[tuple[int, ...], list[float]] = defaultdict(list)
    blank_id = options.blank_id
    scale = sum(fusion.weights) if full else 0.0

    @cache
    def predict(labels):
        """Return the output and the state of the prediction network after labels."""
        if not labels:
            return networks.predict(torch.tensor([blank_id]), None)
        return networks.predict(torch.tensor(labels[-1:]), predict(labels[:-1])[1])

    @cache
    def score_steps(frame, labels):
        """Return the scores of all tokens, with fusion, and those of all durations on a frame after labels."""
        logits = networks.joint(encoder_states[None, frame, None], predict(labels)[0][:, None])[0, 0]
        tokens = logits[: blank_id + 1].log_softmax(0).tolist()
        no_blank = math.log(1 - min(math.exp(tokens[blank_id]), 0.99))
        scores = [tokens[label] + scale * no_blank + fusion.score(labels, label) for label in range(blank_id)]
        durations = [(None, 0.0)]
        if options.durations is not None:
            durations = list(zip(options.durations, logits[blank_id + 1 :].log_softmax(0).tolist(), strict=True))
        return [*scores, tokens[blank_id] * (1 + scale)], durations

    def visit(frame, labels, labels_on_frame, score):
        """Continue an alignment in all ways."""
        if frame >= len(encoder_states):
            totals[labels].append(score)
            return
        tokens, durations = score_steps(frame, labels)
        is_forced = labels_on_frame >= options.max_symbols
        if is_forced:
            durations = [max(durations, key=lambda pair: pair[1])]
        for token in [blank_id] if is_forced else range(blank_id + 1):
            for duration, duration_score in durations:
                total = score + tokens[token] + duration_score
                if token == blank_id:
                    visit(frame + (1 if duration is None else max(1, duration)), labels, 0, total)
                elif len(labels) < max_labels:
                    advance = duration or 0
                    visit(frame + advance, (*labels, token), 0 if advance else labels_on_frame + 1, total)

    visit(0, (), 0, 0.0)
    return {labels: float(torch.tensor(scores, dtype=torch.float64).logsumexp(0)) for labels, scores in totals.items()}


# (vocabulary size with blank, durations, maximum number of labels on a frame, frames, beams that hold all hypotheses)
LATTICES = [
    (2, None, 5, 3, 24),
    (3, None, 3, 2, 140),
    (4, None, 2, 2, 140),
    (4, None, 3, 1, 50),
    (2, None, 4, 5, 30),
    (2, (0, 1, 2), 4, 3, 60),
    (3, (0, 1), 3, 2, 400),
    (3, (1, 2), 1, 4, 140),
    (4, (1, 2, 4), 1, 3, 220),
    (2, (4, 1, 2), 1, 5, 80),
]


def draw_lattices(seed, num_clips, vocab_size, durations, max_symbols, num_frames, fusion=NO_FUSION, full=False):
    """Draw networks and clips; return the arguments of the search, and the summed score of each label sequence.

    The search merges hypotheses with different numbers of labels on the frame, as NeMo does, so it is exact only for
    sequences that are shorter than the maximum number of labels on a frame. Without duration 0 there is no such limit.
    """
    options = make_options(vocab_size, durations, max_symbols=max_symbols)
    networks = Networks(seed, options, blank_bias=1.0)
    encoder_states = networks.draw_encoder_states(num_clips, num_frames)
    max_labels = max_symbols - 1 if 0 in (durations or (0,)) else num_frames
    expected = [enumerate_alignments(networks, clip, options, fusion, full, max_labels) for clip in encoder_states]
    lengths = torch.full((num_clips,), num_frames)
    return (encoder_states, lengths, networks.predict, networks.joint, options), expected, max_labels


def check_large_beam(seed, num_clips, lattice, blank_score_mode, fusion, plain_fusion, tolerance):
    """Check that a beam that prunes nothing adds all alignments of random lattices."""
    *shape, num_beams = lattice
    beam = BeamOptions(num_beams, num_beams, length_penalty=0.0, blank_score_mode=blank_score_mode)
    full = blank_score_mode == "lm_weighted_full"
    arguments, all_expected, max_labels = draw_lattices(seed, num_clips, *shape, plain_fusion, full)
    clips = list_clips(beam_decode_transducer(*arguments, beam, PAD, fusion), num_beams)
    for ours, expected in zip(clips, all_expected, strict=True):
        assert len(ours) < num_beams
        short = [(labels, score) for labels, score in ours if len(labels) <= max_labels]
        assert dict(short) == pytest.approx(expected, abs=tolerance)
        best_labels, best_score = max(expected.items(), key=lambda item: item[1])
        assert short[0][0] == best_labels
        if best_score > math.log(0.5) and fusion is None:
            # no other sequence has a larger probability
            assert ours[0][0] == best_labels


@torch.no_grad()
@pytest.mark.parametrize("fusion_mode", ["none", "lm_weighted_full", "no_score"])
@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_a_large_beam_adds_all_alignments(lattice, fusion_mode):
    # 300 lattices in total
    for seed in range(2):
        fusion, plain_fusion = (None, NO_FUSION) if fusion_mode == "none" else draw_fusion(seed, lattice[0] - 1)
        blank_score_mode = "lm_weighted_full" if fusion_mode == "none" else fusion_mode
        # measured: 1.4e-14
        check_large_beam(seed, 5, lattice, blank_score_mode, fusion, plain_fusion, tolerance=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["n-gram", "boosting"])
@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_a_large_beam_adds_all_alignments_with_models_of_the_package(lattice, kind, tmp_path):
    # 120 lattices of each kind
    for seed in range(4):
        num_labels = lattice[0] - 1
        is_ngram = kind == "n-gram"
        fusions = draw_ngram_fusion(tmp_path, seed, num_labels) if is_ngram else draw_boosting_fusion(seed, num_labels)
        blank_score_mode = ("lm_weighted_full", "no_score")[seed % 2]
        # the scores of the models are float32; measured: 2.8e-6
        check_large_beam(seed, 3, lattice, blank_score_mode, *fusions, tolerance=8e-6)


@torch.no_grad()
@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_the_score_of_a_beam_without_pruning_is_the_highest(lattice):
    # The best score is not monotone in the number of beams, because each step prunes by the score of a part of the
    # alignments. True are: no score is higher than the sum over all alignments, and a beam that prunes nothing has it.
    *shape, num_beams = lattice
    arguments, expected, max_labels = draw_lattices(0, 5, *shape)
    best_scores = []
    for size in (2, 3, 5, 8, num_beams):
        clips = list_clips(beam_decode_transducer(*arguments, BeamOptions(size, size, 0.0)), size)
        for ours, sums in zip(clips, expected, strict=True):
            assert all(score <= sums[labels] + 1e-12 for labels, score in ours if len(labels) <= max_labels)
        best_scores.append([ours[0][1] for ours in clips])
    for scores in zip(*best_scores, strict=True):
        assert max(scores) <= scores[-1] + 1e-12


# durations and maximum numbers of labels on a frame
GREEDY_CASES = [(None, 10), (None, 1), (None, 2), (None, 3), ((0, 1, 2, 4), 10), ((0, 1, 2, 4), 1), ((0, 1, 2, 4), 2)]
GREEDY_CASES += [((1, 2, 3), 10), ((3, 0, 1), 3), ((0, 5), 1)]


@torch.no_grad()
@pytest.mark.parametrize("max_steps", [None, 5])
@pytest.mark.parametrize(("durations", "max_symbols"), GREEDY_CASES, ids=str)
def test_one_beam_equals_greedy_decoding(durations, max_symbols, max_steps):
    # 500 random networks in total
    first_seed = 50 * GREEDY_CASES.index((durations, max_symbols)) + 25 * (max_steps is None)
    for seed in range(first_seed, first_seed + 25):
        options = make_options(7, durations, max_symbols=max_symbols, max_steps=max_steps, confidence="max_prob")
        networks = Networks(seed, options, blank_bias=seed % 25 / 8)
        arguments = networks.draw_encoder_states(3, 7), torch.tensor([7, 3, 0]), networks.predict, networks.joint
        expected = greedy_decode_transducer_reference(*arguments, options, PAD)
        ours = beam_decode_transducer(*arguments, options, BeamOptions(num_beams=1), PAD)
        for part, expected_part in ((ours, expected), (ours.steps, expected.steps)):
            for name, values in vars(expected_part).items():
                if name == "confidence":
                    # measured: 0
                    torch.testing.assert_close(getattr(part, name), values, rtol=0, atol=1e-7)
                elif isinstance(values, Tensor):
                    assert torch.equal(getattr(part, name), values), (name, seed)
        assert float(ours.scores[2]) == 0.0


BEAM_CASES = [
    (None, 10, None, BeamOptions(4, 4)),
    (None, 2, None, BeamOptions(3, 2, length_penalty=0.0)),
    ((0, 1, 2), 10, 7, BeamOptions(8, 8)),
    ((0, 1, 2), 1, None, BeamOptions(4, 4, merge_finished=False)),
    ((2, 1), 3, None, BeamOptions(2, 1, pruning_mode="early")),
    ((0, 3), 2, None, BeamOptions(5, 3, pruning_mode="early", blank_score_mode="no_score")),
    ((0, 1, 4), 2, None, BeamOptions(1)),
]


@torch.no_grad()
@pytest.mark.parametrize("has_fusion", [False, True])
@pytest.mark.parametrize(("durations", "max_symbols", "max_steps", "beam"), BEAM_CASES, ids=str)
def test_the_batched_search_equals_the_reference_search(durations, max_symbols, max_steps, beam, has_fusion):
    options = make_options(5, durations, max_symbols=max_symbols, max_steps=max_steps)
    for seed in range(4):
        networks = Networks(seed, options, blank_bias=1.0)
        fusion = draw_fusion(seed, 4)[0] if has_fusion else None
        lengths = torch.tensor([8, 0, 3, 1])
        encoder_states = networks.draw_encoder_states(4, 8)
        # frames after the end of a clip must not have an effect
        encoder_states[torch.arange(8) >= lengths[:, None]] = torch.nan
        networks_of_clip = networks.predict, networks.joint, options, beam
        hypotheses = beam_decode_transducer(encoder_states, lengths, *networks_of_clip, PAD, fusion)
        for clip, length in enumerate(lengths.tolist()):
            expected = beam_decode_clip_reference(encoder_states[clip, :length], *networks_of_clip, fusion)
            for index in range(beam.num_return_sequences):
                row = clip * beam.num_return_sequences + index
                ours = hypotheses.to_lists(row)
                if index >= len(expected):
                    assert (ours["tokens"], float(hypotheses.scores[row])) == ([], -math.inf)
                    continue
                assert tuple(ours["tokens"]) == expected[index].labels
                assert tuple(ours["frames"]) == expected[index].label_frames
                # measured: 1.4e-14
                assert float(hypotheses.scores[row]) == pytest.approx(expected[index].score, abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("durations", [None, (0, 1, 2), (2, 1)], ids=str)
def test_the_steps_of_a_hypothesis_lead_to_its_labels_and_frames(durations):
    options = make_options(6, durations, max_symbols=2, confidence="max_prob")
    networks = Networks(3, options, blank_bias=1.0)
    encoder_states, lengths = networks.draw_encoder_states(5, 12), torch.tensor([12, 3, 7, 0, 1])
    hypotheses = beam_decode_transducer(
        encoder_states, lengths, networks.predict, networks.joint, options, BeamOptions(4, 4), PAD
    )
    steps, num_labels = hypotheses.steps, 0
    for row, length in enumerate(steps.lengths.tolist()):
        frame, labels, state = 0, [], networks.predict(torch.tensor([5]), None)
        for index in range(length):
            token, duration = int(steps.tokens[row, index]), int(steps.durations[row, index])
            logits = networks.joint(encoder_states[row // 4, frame][None, None], state[0][:, None])[0, 0]
            probability = float(logits[:6].softmax(0)[token])
            if token == options.blank_id:
                assert duration >= 1
                assert steps.confidence[row, index] == 0
            else:
                labels.append((token, frame, duration))
                state = networks.predict(torch.tensor([token]), state[1])
                confidence = max(0.0, (6 * probability - 1) / 5)
                # measured: 6e-8, the rounding to float32
                assert float(steps.confidence[row, index]) == pytest.approx(confidence, abs=1e-6)
            frame += duration
        lists = hypotheses.to_lists(row)
        assert list(zip(lists["tokens"], lists["frames"], lists["durations"], strict=True)) == labels
        assert frame >= lengths[row // 4] or hypotheses.scores[row] == -math.inf
        num_labels += len(labels)
    assert num_labels > 20


@torch.no_grad()
def test_entropy_confidence_is_that_of_the_scores_of_the_step():
    options = make_options(6, None, confidence="entropy", max_symbols=2)
    networks = Networks(5, options, blank_bias=1.0)
    arguments = networks.draw_encoder_states(1, 6), torch.tensor([6]), networks.predict, networks.joint
    hypothesis = beam_decode_transducer(*arguments, options, BeamOptions(3), PAD).to_lists()
    state = networks.predict(torch.tensor([5]), None)
    assert hypothesis["tokens"]
    for token, frame, confidence in zip(*(hypothesis[key] for key in ("tokens", "frames", "confidence")), strict=True):
        logits = networks.joint(arguments[0][:, frame, None], state[0][:, None])[0, 0]
        assert confidence == pytest.approx(float(compute_token_confidence(logits, "entropy")), abs=1e-6)
        state = networks.predict(torch.tensor([token]), state[1])


@torch.no_grad()
def test_each_new_label_sequence_is_predicted_once():
    # no hypothesis is pruned, so there is one call of the prediction network for each prefix of a label sequence
    options = make_options(3, (1, 2), max_symbols=1)
    networks = Networks(0, options)
    encoder_states = networks.draw_encoder_states(1, 4)
    beam = BeamOptions(600, 600)
    hypotheses = beam_decode_transducer(
        encoder_states, torch.tensor([4]), networks.predict, networks.joint, options, beam
    )
    num_predicted = networks.num_predicted
    sequences = {labels for labels, _ in list_clips(hypotheses, 600)[0]}
    prefixes = {labels[:length] for labels in sequences for length in range(len(labels) + 1)}
    # a sequence whose older hypotheses are all longer by now is predicted again
    assert len(prefixes) <= num_predicted < 1.5 * len(prefixes)


@torch.no_grad()
def test_the_best_tokens_are_found_in_groups():
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (GROUP_SIZE - 1, 10 * GROUP_SIZE, 10 * GROUP_SIZE + 1, 8193):
        scores = torch.randn(5, vocab_size, generator=generator)
        # the best token is one of the last, which fill no group
        scores[0, -1] = 9.0
        for layout in (scores, scores.t().contiguous().t()):
            for num_tokens in (1, 4, 12, vocab_size):
                values, tokens = select_best_tokens(layout, num_tokens)
                expected = layout.topk(num_tokens)
                assert torch.equal(values, expected.values)
                assert torch.equal(tokens, expected.indices)


def test_settings_that_the_search_does_not_support_are_refused():
    options = TransducerOptions(blank_id=0, vocab_size=3)
    networks = Networks(0, options)
    arguments = networks.draw_encoder_states(1, 2), torch.tensor([2]), networks.predict, networks.joint
    beam = BeamOptions(2)
    with pytest.raises(ValueError, match="the blank 0 and 3 tokens"):
        beam_decode_transducer(*arguments, options, beam, fusion=draw_fusion(0, 2)[0])
    with pytest.raises(ValueError, match="got 3 labels for a model with 2"):
        beam_decode_transducer(*arguments, replace(options, blank_id=2), beam, fusion=draw_fusion(0, 3)[0])
    with pytest.raises(ValueError, match="keep_logits"):
        beam_decode_transducer(*arguments, replace(options, keep_logits=True), beam)
    with pytest.raises(ValueError, match="confidence method"):
        beam_decode_transducer(*arguments, replace(options, confidence="none"), beam)
    for setting in ({"pruning_mode": "x"}, {"blank_score_mode": "x"}, {"num_beams": 2, "num_return_sequences": 3}):
        with pytest.raises(ValueError, match=next(reversed(setting))):
            BeamOptions(**setting)
