"""Greedy decoding with a language model and phrase boosting, compared with NeMo."""

import pytest
import torch
from search_golden import (
    BLANK,
    CTC_MODELS,
    TRANSDUCERS,
    build_golden_fusion,
    encode_clips,
    list_cases,
    read_golden,
)

from transformers_parakeet.decoding import (
    Shortcuts,
    TransducerOptions,
    collapse_ctc,
    greedy_decode_ctc,
    greedy_decode_transducer,
    greedy_decode_transducer_reference,
)


def read_case(name, case):
    """Return the fusion of a case, and NeMo's result for each clip."""
    golden = read_golden(name)
    fusion = build_golden_fusion(name, golden["cases"][case]["settings"]["greedy"])
    results = golden["cases"][case]["nbest"]
    return fusion, [results[clip][0] for clip in golden["clips"]]


def decode_transducer(name, decode, fusion, **arguments):
    """Decode the golden clips of a transducer."""
    model, hidden, lengths = encode_clips(name)
    durations = tuple(model.config.durations) if name == "tdt_v3" else None
    options = TransducerOptions(BLANK, BLANK + 1, durations, model.config.max_symbols_per_step)
    frames = model.encoder_projector(hidden)
    return decode(frames, lengths, model.decoder.step, model.joint.score, options, fusion=fusion, **arguments)


def decode_ctc(name, fusion):
    """Return the token of every frame of the golden clips of a CTC head, and the number of frames."""
    model, hidden, lengths = encode_clips(name)
    return greedy_decode_ctc(model.ctc_logits(hidden), lengths, BLANK, fusion), lengths


def check_clips(hypotheses, expected):
    """Check tokens, and frames and durations where NeMo has them: frames of transducers, durations of TDT."""
    for row, clip in enumerate(expected):
        lists = hypotheses.to_lists(row)
        assert clip["tokens"]
        for field in (field for field in ("tokens", "frames", "durations") if clip.get(field)):
            assert lists[field] == clip[field], field


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), list_cases(TRANSDUCERS, "greedy"))
def test_tokens_and_times_of_transducers_equal_nemo(name, case):
    fusion, expected = read_case(name, case)
    shortcuts = Shortcuts(*encode_clips(name)[0].joint.build_argmax_functions(BLANK + 1))
    check_clips(decode_transducer(name, greedy_decode_transducer_reference, fusion), expected)
    check_clips(decode_transducer(name, greedy_decode_transducer, fusion), expected)
    check_clips(decode_transducer(name, greedy_decode_transducer, fusion, shortcuts=shortcuts), expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), list_cases(CTC_MODELS, "greedy"))
def test_tokens_and_frames_of_ctc_equal_nemo(name, case):
    fusion, expected = read_case(name, case)
    tokens, lengths = decode_ctc(name, fusion)
    for row, clip in enumerate(expected):
        # the token of every frame
        assert tokens[row, : lengths[row]].tolist() == clip["raw_argmax"]
    check_clips(collapse_ctc(tokens, BLANK), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", CTC_MODELS + TRANSDUCERS)
def test_the_golden_cases_are_not_those_of_the_model_alone(name):
    if name in CTC_MODELS:
        hypotheses = collapse_ctc(decode_ctc(name, None)[0], BLANK)
    else:
        hypotheses = decode_transducer(name, greedy_decode_transducer, None)
    plain = [hypotheses.to_lists(row)["tokens"] for row in range(len(hypotheses))]
    # only the files of transducers contain the tokens of the model alone
    assert read_golden(name)["greedy_tokens"] == (None if name in CTC_MODELS else plain)
    for _, case in list_cases((name,), "greedy"):
        num_different = sum(
            tokens != clip["tokens"] for tokens, clip in zip(plain, read_case(name, case)[1], strict=True)
        )
        # tdt_v3 with weak boosting is the only case that changes nothing
        assert num_different or (name, case) == ("tdt_v3", "greedy_boost_default")
