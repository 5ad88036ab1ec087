"""Comparison of one clip with stock transformers, which runs in a separate process."""

import copy
import json

import pytest
from conftest import ctc_model
from verification_helpers import save_transducer

from transformers_parakeet.nemo import convert_checkpoint
from transformers_parakeet.verification import compare_with_stock
from transformers_parakeet.verification.checkpoint import CLIP
from transformers_parakeet.verification.comparison import list_differences
from transformers_parakeet.verification.recognition import list_ctc_tokens, list_transducer_tokens

COMPARISON = "transformers_parakeet.verification.comparison."
BLANK = 9
RESULT = {
    "text": "one two",
    "tokens": [{"id": 4, "start": 0.08, "end": 0.16}, {"id": 5, "start": 0.4, "end": 0.64}],
}


def test_ctc_labels_are_runs_of_equal_ids():
    sequence = [BLANK, 4, 4, 4, BLANK, 4, 5, 5, BLANK, BLANK]
    expected = [(4, 0.5, 2.0), (4, 2.5, 3.0), (5, 3.0, 4.0)]
    tokens = list_ctc_tokens(sequence, BLANK, 0.5)
    assert [(token["id"], token["start"], token["end"]) for token in tokens] == expected
    assert list_ctc_tokens([BLANK] * 3, BLANK, 0.5) == []
    assert list_ctc_tokens([], BLANK, 0.5) == []


def test_transducer_labels_start_at_the_sum_of_the_durations_before():
    # the start token, then labels 4 and 5 in one frame, a blank over 3 frames, label 6, and padding 2
    sequence, durations = [BLANK, 4, 5, BLANK, 6, 2], [0, 0, 1, 3, 2, 0]
    tokens = list_transducer_tokens(sequence, durations, {BLANK, 2}, 0.5)
    expected = [(4, 0.0, 0.0), (5, 0.0, 0.5), (6, 2.0, 3.0)]
    assert [(token["id"], token["start"], token["end"]) for token in tokens] == expected


def test_differences_name_tokens_times_and_text():
    assert list_differences(RESULT, copy.deepcopy(RESULT)) == ()
    later = copy.deepcopy(RESULT)
    later["tokens"][1]["end"] += 0.16
    assert list_differences(RESULT, later) == ("times: up to 0.16 s",)
    shorter = copy.deepcopy(RESULT)
    shorter["tokens"].pop()
    shorter["text"] = "one"
    assert list_differences(RESULT, shorter) == (
        "tokens: 2 against 1 of stock, equal up to number 1",
        "text: stock has 'one'",
    )
    other = copy.deepcopy(RESULT)
    other["tokens"][0]["id"] = 7
    assert list_differences(RESULT, other) == ("tokens: 2 against 2 of stock, equal up to number 0",)


def test_an_error_of_stock_transformers_is_a_difference(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("raise ValueError('this checkpoint has another shape')")
    monkeypatch.setattr(COMPARISON + "PROGRAM", program)
    monkeypatch.setattr(COMPARISON + "recognize", lambda folder, clip: {**RESULT, "seconds": 1.5})
    comparison = compare_with_stock(tmp_path, CLIP)
    expected = "stock transformers cannot run the checkpoint: ValueError: this checkpoint has another shape"
    assert comparison.differences == (expected,)
    assert (comparison.text, comparison.num_tokens, comparison.seconds) == ("one two", 2, 1.5)
    assert (comparison.stock_text, comparison.stock_seconds) == (None, None)


def test_a_process_that_uses_this_package_is_no_reference(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    result = {**RESULT, "seconds": 1.0, "model_module": "transformers_parakeet.modeling_parakeet"}
    program.write_text(f"print('''result: {json.dumps(result)}''')")
    monkeypatch.setattr(COMPARISON + "PROGRAM", program)
    monkeypatch.setattr(COMPARISON + "recognize", lambda folder, clip: {**RESULT, "seconds": 1.0})
    (difference,) = compare_with_stock(tmp_path, CLIP).differences
    assert "the other process used transformers_parakeet.modeling_parakeet, not stock transformers" in difference


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ctc", "rnnt", "tdt"])
def test_every_head_equals_stock_transformers(kind, tmp_path):
    if kind == "ctc":
        model, processor = ctc_model(seed=1)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    else:
        save_transducer(kind, tmp_path)
    comparison = compare_with_stock(tmp_path, CLIP)
    assert comparison.differences == ()
    assert comparison.num_tokens > 10
    assert comparison.stock_text == comparison.text != ""


@pytest.mark.slow
def test_a_converted_tdt_model_is_decoded_by_stock_transformers(golden, tmp_path):
    folder = convert_checkpoint(golden / "tdt" / "model.nemo", tmp_path / "model")
    fields = json.loads((folder / "generation_config.json").read_text())
    assert fields["decoder_start_token_id"] == 128
    assert fields["suppress_tokens"] == [129, 130, 131, 132, 133]
    # stock transformers has no limit on the labels of a frame, which this random model reaches after 24 labels
    (tokens, text) = compare_with_stock(folder, CLIP).differences
    assert "equal up to number 24" in tokens
    assert text.startswith("text: ")
