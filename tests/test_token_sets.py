"""Tests of token sets by script: a hand-made vocabulary, the demo model, the vocabulary of parakeet-tdt-0.6b-v3."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

import transformers_parakeet as tp
from transformers_parakeet.nemo.sentencepiece import build_tokenizer
from transformers_parakeet.token_sets import find_tokens_of_scripts

V3_TOKENIZER = Path("/work/shared/data/tokenizers/parakeet-tdt-0.6b-v3.model")

PIECES = {
    "<unk>": "any",
    "<|ru|>": "any",
    "\u2581": "any",
    "\u2581the": "Latin",
    "\u2581ж": "Cyrillic",
    "Ω": "Greek",
    # the Ohm sign and the micro sign are Greek letters, a full-width A and an ordinal sign are Latin letters
    "\u2126": "Greek",
    "\u00b5": "Greek",
    "\uff21": "Latin",
    "\u00aa": "Latin",
    "œ": "Latin",
    "42": "any",
    "\u0663": "any",
    ",": "any",
    "€": "any",
    "\u0301": "any",
    # a modifier letter, as in Ukrainian
    "\u02bc": "any",
    "aж": "mixed",
    "漢": "CJK",
    "<0x41>": "Latin",
    "<0x30>": "any",
    "<0xD0>": "none",
    "<blank>": "any",
}


@pytest.mark.parametrize("scripts", [["Latin"], ["Cyrillic"], ["greek", "LATIN"], ["CJK"], ["Latin", "Cyrillic"]])
def test_every_letter_of_a_token_must_belong_to_the_scripts(scripts):
    allowed = find_tokens_of_scripts(list(PIECES), scripts)
    names = {"any", *(script.upper() for script in scripts)}
    if {"LATIN", "CYRILLIC"} <= names:
        names.add("mixed")
    expected = [script in names or script.upper() in names for script in PIECES.values()]
    assert allowed.tolist() == expected


def test_the_demo_model_has_latin_letters_only():
    processor = AutoProcessor.from_pretrained(tp.demo_model_path())
    allowed = processor.tokens_of_scripts(["Latin"])
    assert allowed.dtype == torch.bool
    assert allowed.shape == (67,)
    assert allowed.all()


@pytest.fixture(scope="module")
def v3_processor():
    """Return a processor with the vocabulary of parakeet-tdt-0.6b-v3: 8192 pieces in 25 European languages."""
    if not V3_TOKENIZER.exists():
        pytest.skip(f"needs the SentencePiece model {V3_TOKENIZER}")
    tokenizer = build_tokenizer([V3_TOKENIZER.read_bytes()], "tdt")
    return tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer, decoder_type="tdt")


def test_every_token_of_the_v3_vocabulary_has_the_letters_of_its_scripts(v3_processor):
    allowed = {script: v3_processor.tokens_of_scripts([script]) for script in ("Latin", "Cyrillic", "Greek")}
    pieces = v3_processor.tokenizer.convert_ids_to_tokens(range(8193))
    for index, piece in enumerate(pieces):
        # the letters of the scripts are between these code points in this vocabulary
        latin = any("a" <= char.lower() <= "z" or ("\u00c0" <= char <= "\u024f" and char.isalpha()) for char in piece)
        greek, cyrillic = (any(low <= char <= high for char in piece) for low, high in ("\u0370\u03ff", "\u0400\u04ff"))
        is_markup = piece.startswith("<")
        assert allowed["Latin"][index] == (is_markup or not (greek or cyrillic))
        assert allowed["Greek"][index] == (is_markup or not (latin or cyrillic))
        assert allowed["Cyrillic"][index] == (is_markup or not (latin or greek))
    assert all(tokens[v3_processor.blank_token_id] for tokens in allowed.values())
    for text, script in (("Guten Morgen, 42 €!", "Latin"), ("Добрый день", "Cyrillic"), ("Καλημέρα", "Greek")):
        tokens = v3_processor.tokenizer(text, add_special_tokens=False).input_ids
        assert [name for name, mask in allowed.items() if mask[tokens].all()] == [script]


def test_several_scripts_allow_the_tokens_of_each(v3_processor):
    latin, cyrillic = (v3_processor.tokens_of_scripts([script]) for script in ("Latin", "Cyrillic"))
    both = v3_processor.tokens_of_scripts(["Latin", "Cyrillic"])
    assert (both | ~(latin | cyrillic)).all()
    # no piece mixes the two scripts, so the union has no other tokens
    assert torch.equal(both, latin | cyrillic)
    assert 0 < (~both).sum() < (~latin).sum()


@pytest.mark.parametrize(
    ("scripts", "error", "message"),
    [
        ([], ValueError, r"one or more of Cjk, Cyrillic, Greek, Latin for this vocabulary, got \[\]"),
        (["Latin", "Klingon"], ValueError, r"got \['Latin', 'Klingon'\]"),
        (["Arabic"], ValueError, "one or more of"),
        ("Latin", TypeError, r"pass \['Latin'\]"),
    ],
)
def test_unknown_scripts_are_refused_with_those_of_the_vocabulary(scripts, error, message):
    with pytest.raises(error, match=message):
        find_tokens_of_scripts(list(PIECES), scripts)
