"""Checks CTC beam search against greedy decoding, and against the enumeration of all alignments in float64."""

import math
from collections import defaultdict
from itertools import groupby, product

import pytest
import torch
from search_helpers import NO_FUSION, PlainFusion, draw_boosting_fusion, draw_ngram_fusion, draw_table_fusion
from torch import Tensor

from transformers_parakeet.decoding import (
    BeamOptions,
    beam_decode_ctc,
    collapse_ctc,
    compute_token_confidence,
    ctc_prefixes,
    greedy_decode_ctc,
)


def make_table(seed: int, num_clips: int = 10, max_frames: int = 30) -> tuple[Tensor, Tensor]:
    """Return (B, N, V) random scores and (B,) lengths; some tables have equal scores, and some are bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    num_frames = int(torch.randint(0, max_frames, (), generator=generator))
    vocab_size = int(torch.randint(2, 9, (), generator=generator))
    logits = 3 * torch.randn(num_clips, num_frames, vocab_size, generator=generator)
    if seed % 5 == 0:
        logits = logits.round()
    if seed % 3 == 0:
        logits = logits.bfloat16()
    return logits, torch.randint(0, num_frames + 1, (num_clips,), generator=generator)


def enumerate_alignments(
    logits: Tensor, fusion: PlainFusion = NO_FUSION, label_bonus: float = 0.0
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Score every label sequence of a clip by enumeration of all alignments in float64. The blank is the last token.

    Args:
        logits: (T, V) scores.
        fusion: language models and phrase boosting.
        label_bonus: score that is added for each label.

    Returns:
        For each label sequence, the score of the sum of its alignments, and the score of its best alignment.
    """
    log_probabilities = logits.double().log_softmax(-1).tolist()
    num_frames, vocab_size = logits.shape
    alignments = defaultdict(list)
    for tokens in product(range(vocab_size), repeat=num_frames):
        labels = tuple(token for token, _ in groupby(tokens) if token != vocab_size - 1)
        alignments[labels].append(math.fsum(log_probabilities[frame][token] for frame, token in enumerate(tokens)))
    results = {}
    for labels, scores in alignments.items():
        extra = fusion.score_all(labels) + fusion.score_end(labels) + label_bonus * len(labels)
        best = max(scores)
        results[labels] = (best + math.log(math.fsum(math.exp(score - best) for score in scores)) + extra, best + extra)
    return results


@pytest.mark.parametrize("sum_alignments", [True, False], ids=["sum", "max"])
def test_one_beam_equals_greedy_decoding_on_500_tables(sum_alignments: bool):
    # 50 batches of 10 tables
    for seed in range(50):
        logits, frame_lengths = make_table(seed)
        blank_id = logits.shape[-1] - 1 if seed % 2 else 0
        beam = BeamOptions(num_beams=1, sum_alignments=sum_alignments)
        hypotheses, alignments = beam_decode_ctc(logits, frame_lengths, blank_id, beam, confidence="max_prob")
        best_tokens = greedy_decode_ctc(logits, frame_lengths, blank_id)
        assert torch.equal(alignments, best_tokens)
        expected = collapse_ctc(best_tokens, blank_id, compute_token_confidence(logits))
        num_tokens = hypotheses.tokens.shape[1]
        is_valid = torch.arange(num_tokens) < expected.lengths[:, None]
        assert torch.equal(hypotheses.lengths, expected.lengths)
        for field in ("tokens", "frames", "durations", "confidence"):
            # the padding of the result is 0
            padded = torch.where(is_valid, getattr(expected, field)[:, :num_tokens], 0)
            assert torch.equal(getattr(hypotheses, field), padded), (seed, field)


def check_large_beam(logits, beam, fusions, num_best=1):
    """Check the best hypotheses of a beam that prunes nothing, and return the largest error of their scores."""
    fusion, plain_fusion = fusions
    hypotheses, _ = beam_decode_ctc(logits, None, logits.shape[-1] - 1, beam, fusion=fusion)
    column, errors = 0 if beam.sum_alignments else 1, []
    for index, clip in enumerate(logits):
        results = enumerate_alignments(clip, plain_fusion, beam.label_bonus)
        expected = sorted(results.items(), key=lambda item: -item[1][column])
        for rank in range(min(len(expected), num_best)):
            row = hypotheses[index * beam.num_return_sequences + rank]
            labels, scores = expected[rank]
            assert tuple(row.tokens[0].tolist()) == labels
            errors.append(abs(float(row.scores) - scores[column]))
    return max(errors)


# T, V, number of tables, and number of pairs of labels and ending that alignments of T frames can have; 310 tables
SHAPES = [(1, 2, 40, 2), (2, 3, 60, 9), (3, 4, 70, 34), (4, 4, 25, 85), (5, 2, 40, 6), (5, 3, 70, 39), (5, 4, 5, 208)]


@pytest.mark.parametrize("has_fusion", [False, True], ids=["plain", "fusion"])
@pytest.mark.parametrize(("num_frames", "vocab_size", "num_tables", "num_pairs"), SHAPES)
@pytest.mark.parametrize("sum_alignments", [True, False], ids=["sum", "max"])
def test_a_large_beam_finds_the_best_labels_of_all_alignments(
    sum_alignments: bool, num_frames: int, vocab_size: int, num_tables: int, num_pairs: int, has_fusion: bool
):
    generator = torch.Generator().manual_seed(100 * num_frames + vocab_size)
    logits = 2 * torch.randn(num_tables, num_frames, vocab_size, generator=generator)
    fusions = draw_table_fusion(vocab_size - 1, generator) if has_fusion else (None, NO_FUSION)
    # without sums, up to 3 equal hypotheses are merged after the beam is pruned
    num_beams = num_pairs if sum_alignments else 3 * num_pairs
    beam = BeamOptions(
        num_beams, min(num_beams, 3), label_bonus=0.7 if has_fusion else 0.0, sum_alignments=sum_alignments
    )
    # without sums, the second hypothesis can have the labels of the first
    num_best = beam.num_return_sequences if sum_alignments else 1
    # measured: 7.6e-7
    assert check_large_beam(logits, beam, fusions, num_best) < 5e-6


@pytest.mark.parametrize("kind", ["n-gram", "boosting"])
@pytest.mark.parametrize(("num_frames", "vocab_size", "num_pairs"), [(3, 4, 34), (4, 3, 23), (5, 2, 6), (5, 3, 39)])
@pytest.mark.parametrize("sum_alignments", [True, False], ids=["sum", "max"])
def test_a_large_beam_finds_the_best_labels_with_models_of_the_package(
    sum_alignments: bool, num_frames: int, vocab_size: int, num_pairs: int, kind: str, tmp_path
):
    # 100 tables of each kind for each of "sum" and "max"
    num_beams = num_pairs if sum_alignments else 3 * num_pairs
    beam = BeamOptions(num_beams, label_bonus=0.3, sum_alignments=sum_alignments)
    for seed in range(5):
        logits = 2 * torch.randn(5, num_frames, vocab_size, generator=torch.Generator().manual_seed(seed))
        if kind == "n-gram":
            fusions = draw_ngram_fusion(tmp_path, seed, vocab_size - 1)
        else:
            fusions = draw_boosting_fusion(seed, vocab_size - 1)
        # the scores of the models are float32; measured: 2.1e-6 for n-grams, 4.5e-6 for boosting
        assert check_large_beam(logits, beam, fusions) < 1e-5


def test_no_beam_scores_better_than_the_exact_search():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20, 5, 4, generator=generator)
    fusion, plain_fusion = draw_table_fusion(3, generator)
    results = [enumerate_alignments(clip, plain_fusion).values() for clip in logits]
    exact = torch.tensor([max(scores[0] for scores in clip_results) for clip_results in results])
    means = []
    for num_beams in (1, 2, 4, 8, 16, 208):
        hypotheses, _ = beam_decode_ctc(logits, None, 3, BeamOptions(num_beams), fusion=fusion)
        assert (hypotheses.scores <= exact + 1e-5).all(), num_beams
        means.append(float(hypotheses.scores.mean()))
    # a wider beam may score worse on one clip; these beams do not on average
    assert means == sorted(means)
    torch.testing.assert_close(hypotheses.scores, exact.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sum_alignments", [True, False], ids=["sum", "max"])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_the_beam_is_that_of_a_plain_search(num_beams: int, sum_alignments: bool):
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(1, 12, 5, generator=generator)
        fusion, plain_fusion = draw_table_fusion(4, generator) if seed % 2 else (None, NO_FUSION)
        beam = BeamOptions(num_beams, num_beams, label_bonus=0.3, score_threshold=6.0, sum_alignments=sum_alignments)
        hypotheses, _ = beam_decode_ctc(logits, None, 4, beam, fusion=fusion)
        expected = search_plainly(logits[0].double(), beam, plain_fusion)
        for rank in range(num_beams):
            row = hypotheses[rank]
            if rank < len(expected):
                labels, score = expected[rank]
                assert tuple(row.tokens[0].tolist()) == labels
                # measured: 1.9e-6
                assert float(row.scores) == pytest.approx(score, abs=1e-5)
            else:
                assert float(row.scores) == -math.inf
                assert int(row.lengths) == 0


def search_plainly(logits: Tensor, beam: BeamOptions, fusion: PlainFusion) -> list[tuple[tuple[int, ...], float]]:
    """Search one clip with dictionaries instead of tensors. The blank is the last token.

    Args:
        logits: (T, V) float64 scores.
        beam: settings of the search.
        fusion: language models and phrase boosting.

    Returns:
        The labels and the score of each hypothesis, best first.
    """
    blank_id = logits.shape[1] - 1
    hypotheses = {((), blank_id): 0.0}
    for frame_scores in logits.log_softmax(-1).tolist():
        candidates = []
        for (labels, last_token), score in hypotheses.items():
            for token, token_score in enumerate(frame_scores):
                if token in (blank_id, last_token):
                    candidates.append(((labels, token), score + token_score))
                else:
                    extra = beam.label_bonus + fusion.score(labels, token)
                    candidates.append((((*labels, token), token), score + token_score + extra))
        if beam.sum_alignments:
            candidates = merge_equal(candidates)
        best = sorted(candidates, key=lambda candidate: -candidate[1])[: beam.num_beams]
        best = [candidate for candidate in best if candidate[1] > best[0][1] - beam.score_threshold]
        hypotheses = {}
        for key, score in best:
            hypotheses.setdefault(key, score)
    ends = [(labels, score + fusion.score_end(labels)) for (labels, _), score in hypotheses.items()]
    return sorted(merge_equal(ends) if beam.sum_alignments else ends, key=lambda end: -end[1])


def merge_equal(candidates: list) -> list:
    """Sum the probabilities of candidates with the same key."""
    scores = {}
    for key, score in candidates:
        scores.setdefault(key, []).append(score)
    return [(key, float(torch.tensor(values, dtype=torch.float64).logsumexp(0))) for key, values in scores.items()]


@pytest.mark.parametrize("sum_alignments", [True, False], ids=["sum", "max"])
def test_a_clip_does_not_depend_on_padding_and_on_other_clips(sum_alignments: bool):
    generator = torch.Generator().manual_seed(5)
    frame_lengths = torch.tensor([30, 7, 0, 19])
    logits = 2 * torch.randn(4, 30, 40, generator=generator)
    fusion, _ = draw_table_fusion(39, generator)
    beam = BeamOptions(6, 4, label_bonus=0.5, sum_alignments=sum_alignments)
    padded = torch.cat([logits, torch.full((4, 5, 40), 9.0)], dim=1)
    padded[torch.arange(35) >= frame_lengths[:, None]] = 7 * torch.randn(40, generator=generator)
    together, alignments = beam_decode_ctc(padded, frame_lengths, 39, beam, fusion=fusion, confidence="entropy")
    for clip_index, length in enumerate(frame_lengths.tolist()):
        clip = logits[clip_index : clip_index + 1, :length]
        alone, clip_alignments = beam_decode_ctc(clip, None, 39, beam, fusion=fusion, confidence="entropy")
        for rank in range(4):
            row = together[4 * clip_index + rank]
            row_alone = alone[rank]
            for field in ("tokens", "frames", "durations", "scores"):
                assert torch.equal(getattr(row, field), getattr(row_alone, field)), field
            # measured: 2e-7 relative, because torch computes powers of the last elements of a tensor in another way
            torch.testing.assert_close(row.confidence, row_alone.confidence, atol=1e-6, rtol=1e-5)
            assert torch.equal(alignments[4 * clip_index + rank, :length], clip_alignments[rank])
            assert (alignments[4 * clip_index + rank, length:] == 39).all()


def test_a_clip_without_frames_gets_an_empty_row_with_score_0():
    generator = torch.Generator().manual_seed(0)
    fusion, _ = draw_table_fusion(4, generator)
    for logits in (torch.randn(2, 0, 5), torch.randn(2, 3, 5)):
        hypotheses, alignments = beam_decode_ctc(
            logits, torch.zeros(2, dtype=torch.int64), 4, BeamOptions(3, 2), fusion=fusion, confidence="max_prob"
        )
        assert hypotheses.scores.tolist() == [0.0, -math.inf, 0.0, -math.inf]
        assert hypotheses.lengths.tolist() == [0, 0, 0, 0]
        assert hypotheses.tokens.shape == hypotheses.confidence.shape == (4, 0)
        assert alignments.tolist() == [[4] * logits.shape[1]] * 4


def test_alignments_give_frames_durations_and_confidence():
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(3, 14, 6, generator=generator)
    probabilities = logits.double().softmax(-1)
    hypotheses, alignments = beam_decode_ctc(logits, None, 5, BeamOptions(4, 2), pad_id=9, confidence="max_prob")
    for index, alignment in enumerate(alignments.tolist()):
        row = hypotheses[index]
        runs = [
            (token, [frame for frame, _ in run]) for token, run in groupby(enumerate(alignment), lambda pair: pair[1])
        ]
        runs = [(token, frames) for token, frames in runs if token != 5]
        assert row.tokens[0].tolist() == [token for token, _ in runs]
        assert row.frames[0].tolist() == [frames[0] for _, frames in runs]
        assert row.durations[0].tolist() == [len(frames) for _, frames in runs]
        lowest = [min(float(probabilities[index // 2, frame, token]) for frame in frames) for token, frames in runs]
        expected = [max(0.0, (probability * 6 - 1) / 5) for probability in lowest]
        # measured: 1.6e-7, the error of torch's float32 softmax
        assert row.confidence[0].tolist() == pytest.approx(expected, abs=1e-6)
        assert (hypotheses.tokens[index, int(row.lengths) :] == 9).all()


def test_the_alignment_is_the_best_one_of_its_labels():
    generator = torch.Generator().manual_seed(8)
    logits = 2 * torch.randn(30, 5, 3, generator=generator)
    log_probabilities = logits.log_softmax(-1)
    hypotheses, alignments = beam_decode_ctc(logits, None, 2, BeamOptions(39))
    for index, clip in enumerate(logits):
        score = float(log_probabilities[index].gather(1, alignments[index, :, None]).sum())
        best = enumerate_alignments(clip)[tuple(hypotheses[index].tokens[0].tolist())][1]
        assert score == pytest.approx(best, abs=1e-5)


def test_summing_alignments_finds_labels_whose_best_alignment_is_not_best():
    # blank 0.6 and label 0.4 on two frames: no label has 0.36 in one alignment; the label has 0.64 in three
    logits = torch.tensor([[[0.4, 0.6], [0.4, 0.6]]]).log()
    summed, _ = beam_decode_ctc(logits, None, 1, BeamOptions(4, 2))
    assert summed[0].tokens.tolist() == [[0]]
    assert summed.scores.exp().tolist() == pytest.approx([0.64, 0.36])
    best, _ = beam_decode_ctc(logits, None, 1, BeamOptions(4, 1, sum_alignments=False))
    assert best[0].tokens.tolist() == [[]]
    assert float(best.scores.exp()) == pytest.approx(0.36)


def test_hashes_of_all_short_sequences_differ():
    hashes = torch.zeros(1, dtype=torch.int64)
    all_hashes = [hashes]
    for _ in range(4):
        hashes = ctc_prefixes.hash_next_label(hashes[:, None], torch.arange(24)).flatten()
        all_hashes.append(hashes)
    combined = torch.cat(all_hashes)
    assert len(combined.unique()) == len(combined) == sum(24**length for length in range(5))


def test_fusion_must_fit_the_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match="the blank 0 and 5 tokens"):
        beam_decode_ctc(logits, None, 0, BeamOptions(), fusion=draw_table_fusion(4, generator)[0])
    with pytest.raises(ValueError, match="got 7 labels for a model with 4"):
        beam_decode_ctc(logits, None, 4, BeamOptions(), fusion=draw_table_fusion(7, generator)[0])
    with pytest.raises(ValueError, match="must be one of max_prob, entropy, got 'margin'"):
        beam_decode_ctc(logits, None, 4, BeamOptions(), confidence="margin")
    with pytest.raises(ValueError, match="`score_threshold` must be greater than 0, got 0"):
        BeamOptions(score_threshold=0.0)
