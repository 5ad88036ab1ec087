"""Error rates of texts and of token ids."""

import numpy as np
import pytest
from conftest import ctc_model, run_program
from training_helpers import record_warnings
from transformers import EvalPrediction

from transformers_parakeet.training import ErrorRates, create_english_normalizer, error_rates, normalize_text


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Hello,  World!", "hello world"),
        ("Don\u2019t stop \u2014 'now'", "don't stop now"),
        ("O\u00b4Neil o`neil", "o'neil o'neil"),
        ("O\u02bcNeil \u2018now\u2019", "o'neil now"),
        ("twenty-one", "twenty one"),
        ("\uff21\uff22\uff23 \ufb01ne", "abc fine"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947\u0964", "\u0928\u092e\u0938\u094d\u0924\u0947"),
        ("\u00bfQu\u00e9?", "qu\u00e9"),
        ("...", ""),
    ],
)
def test_text_is_normalised(text, normalized):
    assert normalize_text(text) == normalized


def test_english_text_is_normalised_as_by_whisper(tmp_path):
    spelling_file = tmp_path / "normalizer.json"
    spelling_file.write_text('{"colour": "color"}', encoding="utf-8")
    normalize = create_english_normalizer(spelling_file)
    assert normalize("Uh, I can't see Mr. Smith's COLOUR!") == "i can not see mister smith is color"
    assert normalize("Twenty-one caf\u00e9s [laughter], two thousand and five") == "21 cafes 2005"


def test_english_normalisation_without_spellings_keeps_them_and_warns(monkeypatch):
    warnings = record_warnings(monkeypatch, "metrics")
    assert create_english_normalizer()("The colour, can't") == "the colour can not"
    (warning,) = warnings
    assert "no list of spellings was given" in warning


@pytest.mark.parametrize("text", ["[]", '{"colour": 1}'])
def test_a_wrong_list_of_spellings_is_refused(tmp_path, text):
    spelling_file = tmp_path / "normalizer.json"
    spelling_file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="must be a JSON object of strings"):
        create_english_normalizer(spelling_file)


def test_error_rates_are_computed_over_all_clips_together():
    rates = error_rates(["One two three", "four", ""], ["one too three.", "four five", ""])
    assert rates["wer"] == pytest.approx(2 / 4)
    # "two" has one wrong character, " five" is five insertions; the references have 13 and 4 characters
    assert rates["cer"] == pytest.approx(6 / 17)


def test_the_unknown_token_of_a_ctc_model_counts_as_an_error():
    _, processor = ctc_model()
    tokenizer = processor.tokenizer
    assert processor.blank_token_id == tokenizer.pad_token_id != tokenizer.unk_token_id
    the = tokenizer("the", add_special_tokens=False)["input_ids"]
    labels = np.array([[*the, tokenizer.unk_token_id, -100]])
    predictions = np.array([[*the, -100, -100]])
    rates = ErrorRates(processor, normalize=str)
    assert "<unk>" in rates.decode(labels)[0]
    assert rates(EvalPrediction(predictions=predictions, label_ids=labels))["cer"] > 0


def test_error_rates_ask_for_the_extra_if_jiwer_is_missing():
    program = """
    import sys
    sys.modules["jiwer"] = None
    from transformers_parakeet.training import error_rates
    try:
        error_rates(["one"], ["one"])
    except ImportError as error:
        print(error)
    """
    message = run_program(program).strip()
    assert message == (
        "the word error rate needs the package jiwer, which is not installed: install the extra `train`: "
        "pip install -e '.[train]' in a checkout of transformers-parakeet"
    )
