"""Greedy decoding with a language model and phrase boosting, compared with NeMo."""

import json
from functools import cache

import pytest
import soundfile
import torch
from conftest import TESTS
from fusion_helpers import build_ngram_model, build_tree

import transformers_parakeet as tp
from transformers_parakeet.decoding import (
    Shortcuts,
    TransducerOptions,
    build_fusion,
    collapse_ctc,
    greedy_decode_ctc,
    greedy_decode_transducer,
    greedy_decode_transducer_reference,
)

GOLDEN = TESTS / "golden"
DATA = json.loads((GOLDEN / "search" / "greedy.json").read_text())
CASES = [(name, case) for name, model in DATA["models"].items() for case in model["cases"]]
NUM_LABELS = 96


@cache
def load_encoded(name):
    """Return a golden model, its frames for the golden clips, and the numbers of frames. The result is shared."""
    model, processor = tp.load_nemo(GOLDEN / "real_configs" / name / "model.nemo")
    paths = [
        GOLDEN / ("streaming" if clip == "second" else "real_configs") / "clips" / f"{clip}.wav"
        for clip in DATA["models"][name]["clips"]
    ]
    inputs = processor([soundfile.read(path, dtype="float32")[0] for path in paths], sampling_rate=16000)
    with torch.no_grad():
        out = model.eval().encoder(inputs.input_features, attention_mask=inputs.attention_mask)
    return model, out.last_hidden_state, out.attention_mask.sum(-1)


def build_golden_fusion(settings):
    """Build the fusion of the settings of NeMo."""
    language_model = boosting = None
    if "ngram_lm_model" in settings:
        language_model = build_ngram_model(GOLDEN / "search" / settings["ngram_lm_model"], NUM_LABELS)
    if "boosting_tree" in settings:
        boosting = build_tree(DATA["phrases"], NUM_LABELS, **settings["boosting_tree"])
    weights = settings.get("ngram_lm_alpha", 0.0), settings.get("boosting_tree_alpha", 0.0)
    return build_fusion(language_model, weights[0], boosting, weights[1], NUM_LABELS, NUM_LABELS + 1)


def decode_transducer(name, decode, fusion, **arguments):
    """Decode the golden clips of a transducer."""
    model, hidden, lengths = load_encoded(name)
    durations = tuple(model.config.durations) if DATA["models"][name]["head"] == "tdt" else None
    options = TransducerOptions(NUM_LABELS, NUM_LABELS + 1, durations, model.config.max_symbols_per_step)
    frames = model.encoder_projector(hidden)
    return decode(frames, lengths, model.decoder.step, model.joint.score, options, fusion=fusion, **arguments)


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), CASES)
def test_tokens_and_times_equal_nemo(name, case):
    golden = DATA["models"][name]
    fusion = build_golden_fusion(golden["cases"][case]["settings"])
    expected = list(golden["cases"][case]["clips"].values())
    if golden["head"] == "ctc":
        model, hidden, lengths = load_encoded(name)
        tokens = greedy_decode_ctc(model.ctc_logits(hidden), lengths, NUM_LABELS, fusion)
        for row, clip in enumerate(expected):
            # the token of every frame
            assert tokens[row, : lengths[row]].tolist() == clip["raw_argmax"]
        results = [collapse_ctc(tokens, NUM_LABELS)]
    else:
        model = load_encoded(name)[0]
        shortcuts = Shortcuts(*model.joint.build_argmax_functions(NUM_LABELS + 1))
        results = [
            decode_transducer(name, greedy_decode_transducer_reference, fusion),
            decode_transducer(name, greedy_decode_transducer, fusion),
            decode_transducer(name, greedy_decode_transducer, fusion, shortcuts=shortcuts),
        ]
    for hypotheses in results:
        for row, clip in enumerate(expected):
            lists = hypotheses.to_lists(row)
            assert lists["tokens"] == clip["tokens"]
            for field in {"frames", "durations"} & clip.keys():
                assert lists[field] == clip[field]


@torch.no_grad()
@pytest.mark.parametrize("name", list(DATA["models"]))
def test_the_golden_cases_are_not_those_of_the_model_alone(name):
    golden = DATA["models"][name]
    if golden["head"] == "ctc":
        model, hidden, lengths = load_encoded(name)
        hypotheses = collapse_ctc(greedy_decode_ctc(model.ctc_logits(hidden), lengths, NUM_LABELS), NUM_LABELS)
    else:
        hypotheses = decode_transducer(name, greedy_decode_transducer, None)
    plain = [hypotheses.to_lists(row)["tokens"] for row in range(len(hypotheses))]
    # only the files of transducers contain the tokens of the model alone
    assert golden["greedy_tokens"] in (plain, None)
    for case in golden["cases"].values():
        num_different = sum(
            tokens != clip["tokens"] for tokens, clip in zip(plain, case["clips"].values(), strict=True)
        )
        # tdt_v3 with weak boosting is the only case that changes nothing
        assert num_different or (name == "tdt_v3" and case["settings"].get("boosting_tree_alpha") == 1.0)
