"""Compares the transducer beam search with the n-best lists of NeMo (`malsd_batch`)."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from search_golden import BLANK, TRANSDUCERS, build_golden_fusion, encode_clips, list_cases, read_golden

from transformers_parakeet.decoding import BeamOptions, Hypotheses, TransducerOptions, beam_decode_transducer

CASES = list_cases(TRANSDUCERS, "malsd")
# Measured: 4.0e-5. The error of NeMo's float32 scores is up to 4e-5, because the logarithm of the probability of "no
# blank" amplifies rounding; they are rounded to 5 digits.
TOLERANCE = 4.5e-5


def read_settings(name: str, settings: dict) -> tuple[TransducerOptions, BeamOptions]:
    """Convert the settings of a case in NeMo's names to ours."""
    beam = BeamOptions(
        num_beams=settings["beam_size"],
        num_return_sequences=settings["beam_size"],
        length_penalty=float(settings["score_norm"]),
        pruning_mode=settings.get("pruning_mode", "late"),
        blank_score_mode=settings.get("blank_lm_score_mode", "lm_weighted_full"),
        merge_finished=False,
    )
    durations = tuple(encode_clips(name, torch.float64)[0].config.durations) if name == "tdt_v3" else None
    return TransducerOptions(BLANK, BLANK + 1, durations, settings.get("max_symbols", 10)), beam


def list_best(hypotheses: Hypotheses, num_beams: int) -> list[list[dict]]:
    """Return the hypotheses of every clip without unused rows, as dictionaries like those of the golden files."""
    rows = [{**hypotheses.to_lists(row), "score": float(hypotheses.scores[row])} for row in range(len(hypotheses))]
    clips = [rows[first : first + num_beams] for first in range(0, len(rows), num_beams)]
    return [[row for row in clip if row["score"] > -math.inf] for clip in clips]


@cache
def decode(name: str, case: str, clip: int | None = None, merge_finished: bool = False) -> list[list[dict]]:
    """Decode all clips, or one, with the settings of a case.

    The search is in float64, because two candidates of one case differ by less than the error of float32.
    """
    settings = read_golden(name)["cases"][case]["settings"]["beam"]
    options, beam = read_settings(name, settings)
    model, hidden, lengths = encode_clips(name, torch.float64)
    clips = slice(clip, None if clip is None else clip + 1)
    with torch.no_grad():
        hypotheses = beam_decode_transducer(
            model.encoder_projector(hidden[clips]),
            lengths[clips],
            model.decoder.step,
            model.joint.score,
            options,
            replace(beam, merge_finished=merge_finished),
            fusion=build_golden_fusion(name, settings),
        )
    return list_best(hypotheses, beam.num_beams)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_n_best_lists_equal_those_of_nemo(name: str, case: str):
    golden = read_golden(name)
    for clip, ours in zip(golden["clips"], decode(name, case), strict=True):
        expected = golden["cases"][case]["nbest"][clip]
        assert [row["tokens"] for row in ours] == [row["tokens"] for row in expected], clip
        assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in expected], abs=TOLERANCE)
        # NeMo's frames and durations are recorded for the best hypothesis
        for field in ("frames", "durations"):
            if field in expected[0]:
                assert ours[0][field] == expected[0][field], (clip, field)


# one clip of each case, each clip in at least six cases
@pytest.mark.parametrize(("name", "case", "clip"), [(*pair, index % 4) for index, pair in enumerate(CASES)])
def test_a_clip_alone_has_the_same_n_best_list_as_in_a_batch(name: str, case: str, clip: int):
    (ours,), expected = decode(name, case, clip), decode(name, case)[clip]
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in expected]
    assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in expected], abs=1e-9)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_merging_finished_hypotheses_adds_the_probabilities_of_equal_labels(name: str, case: str):
    for nemo, ours in zip(decode(name, case), decode(name, case, merge_finished=True), strict=True):
        scores: dict[tuple, list[float]] = {}
        for row in nemo:
            scores.setdefault(tuple(row["tokens"]), []).append(row["score"])
        expected = {labels: math.log(sum(map(math.exp, values))) for labels, values in scores.items()}
        assert {tuple(row["tokens"]): row["score"] for row in ours} == pytest.approx(expected, abs=1e-9)
