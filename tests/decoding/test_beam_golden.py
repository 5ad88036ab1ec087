"""Compares the transducer beam search with the n-best lists of NeMo (`malsd_batch`)."""

import json
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import soundfile
import torch
from conftest import TESTS
from search_helpers import build_boosting, read_arpa

import transformers_parakeet as tp
from transformers_parakeet.decoding import BeamOptions, Hypotheses, TransducerOptions, beam_decode_transducer
from transformers_parakeet.decoding.fusion import Fusion

CONFIGS, SEARCH = TESTS / "golden" / "real_configs", TESTS / "golden" / "search"
MODELS = ("transducer", "tdt_v3")
CASES = {
    (name, case): settings
    for name in MODELS
    for case, settings in json.loads((SEARCH / f"{name}.json").read_text())["cases"].items()
    if case.startswith("malsd")
}
# Measured: 4.0e-5. The error of NeMo's float32 scores is up to 4e-5, because the logarithm of the probability of "no
# blank" amplifies rounding; they are rounded to 5 digits.
TOLERANCE = 4.5e-5


@cache
def load(name: str) -> SimpleNamespace:
    """Return the networks of a model, the projected encoder states of all clips, and the phrases as tokens."""
    golden = json.loads((SEARCH / f"{name}.json").read_text())
    model, processor = tp.load_nemo(CONFIGS / name / "model.nemo")
    folders = {clip: "streaming" if clip == "second" else "real_configs" for clip in golden["clips"]}
    paths = [TESTS / "golden" / folder / "clips" / f"{clip}.wav" for clip, folder in folders.items()]
    audio = [soundfile.read(path, dtype="float32")[0] for path in paths]
    with torch.no_grad():
        inputs = processor(audio, sampling_rate=16000, return_tensors="pt")
        # in float64, because two candidates of one case differ by less than the error of float32
        inputs["input_features"] = inputs["input_features"].double()
        outputs = model.double().eval().get_audio_features(**inputs)
    config = model.config
    return SimpleNamespace(
        clips=golden["clips"],
        states=outputs.pooler_output,
        lengths=outputs.attention_mask.sum(-1),
        networks=(model.decoder.step, model.joint.score),
        options=TransducerOptions(
            config.blank_token_id,
            config.vocab_size,
            tuple(config.durations) if golden["head"] == "tdt" else None,
        ),
        phrases=[processor.tokenizer(phrase, add_special_tokens=False).input_ids for phrase in golden["phrases"]],
    )


def read_settings(settings: dict, model: SimpleNamespace) -> tuple[TransducerOptions, BeamOptions, Fusion | None]:
    """Convert the settings of a case in NeMo's names to ours."""
    settings = settings["beam"]
    beam = BeamOptions(
        num_beams=settings["beam_size"],
        num_return_sequences=settings["beam_size"],
        length_penalty=float(settings["score_norm"]),
        pruning_mode=settings.get("pruning_mode", "late"),
        blank_score_mode=settings.get("blank_lm_score_mode", "lm_weighted_full"),
        merge_finished=False,
    )
    scorers, weights = [], []
    if "ngram_lm_model" in settings:
        scorers.append(read_arpa(SEARCH / "lm.arpa", model.options.blank_id))
        weights.append(settings["ngram_lm_alpha"])
    if "boosting_tree" in settings:
        tree = {key: value for key, value in settings["boosting_tree"].items() if key != "unk_score"}
        scorers.append(build_boosting(model.phrases, model.options.blank_id, **tree))
        weights.append(settings["boosting_tree_alpha"])
    options = replace(model.options, max_symbols=settings.get("max_symbols", 10))
    return options, beam, Fusion(tuple(scorers), tuple(weights)) if scorers else None


def list_best(hypotheses: Hypotheses, num_beams: int) -> list[list[dict]]:
    """Return the hypotheses of every clip without unused rows, as dictionaries like those of the golden files."""
    rows = [{**hypotheses.to_lists(row), "score": float(hypotheses.scores[row])} for row in range(len(hypotheses))]
    clips = [rows[first : first + num_beams] for first in range(0, len(rows), num_beams)]
    return [[row for row in clip if row["score"] > -math.inf] for clip in clips]


def decode(name: str, case: str, clips=slice(None), **kwargs) -> list[list[dict]]:
    """Decode some clips with the settings of a case."""
    model = load(name)
    options, beam, fusion = read_settings(CASES[name, case]["settings"], model)
    hypotheses = beam_decode_transducer(
        model.states[clips], model.lengths[clips], *model.networks, options, replace(beam, **kwargs), fusion=fusion
    )
    return list_best(hypotheses, beam.num_beams)


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), CASES)
def test_n_best_lists_equal_those_of_nemo(name: str, case: str):
    for clip, ours in zip(load(name).clips, decode(name, case), strict=True):
        expected = CASES[name, case]["nbest"][clip]
        assert [row["tokens"] for row in ours] == [row["tokens"] for row in expected], clip
        assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in expected], abs=TOLERANCE)
        # NeMo's frames and durations are recorded for the best hypothesis
        for field in ("frames", "durations"):
            if field in expected[0]:
                assert ours[0][field] == expected[0][field], (clip, field)


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_clip_alone_has_the_same_n_best_list_as_in_a_batch(name: str, case: str):
    batched = decode(name, case)
    for index, expected in enumerate(batched):
        (ours,) = decode(name, case, slice(index, index + 1))
        assert [row["tokens"] for row in ours] == [row["tokens"] for row in expected]
        assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in expected], abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), CASES)
def test_merging_finished_hypotheses_adds_the_probabilities_of_equal_labels(name: str, case: str):
    for nemo, ours in zip(decode(name, case), decode(name, case, merge_finished=True), strict=True):
        scores: dict[tuple, list[float]] = {}
        for row in nemo:
            scores.setdefault(tuple(row["tokens"]), []).append(row["score"])
        expected = {labels: math.log(sum(map(math.exp, values))) for labels, values in scores.items()}
        assert {tuple(row["tokens"]): row["score"] for row in ours} == pytest.approx(expected, abs=1e-9)
