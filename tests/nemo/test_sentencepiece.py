"""Conversion between tokenizers and SentencePiece models."""

import json

import pytest
from conftest import TESTS
from tokenizers import Tokenizer

import transformers_parakeet as tp
from transformers_parakeet import NemoError, load_nemo
from transformers_parakeet.nemo.sentencepiece import SENTENCEPIECE_MODELS_KEY, build_tokenizer, get_sentencepiece_models

GOLDEN = TESTS / "golden"
KINDS = ["ctc", "rnnt", "tdt", "hybrid_tdt_ctc"]
RELEASED = TESTS / "data" / "parakeet-tdt-0.6b-v3.model"


def tokenizer_of(kind):
    """Return the tokenizer of a golden model."""
    return load_nemo(GOLDEN / kind / "model.nemo")[1].tokenizer


def build_from_json(backend):
    """Return a tokenizer without SentencePiece models from the content of a tokenizer.json."""
    return tp.ParakeetTokenizer(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), unk_token="<unk>")


@pytest.fixture
def backend():
    """Return the content of the tokenizer.json of a golden model."""
    return json.loads(tokenizer_of("tdt").backend_tokenizer.to_str())


def test_merges_that_sentencepiece_does_not_have_are_refused(backend):
    pieces = ["".join(pair) for pair in backend["model"]["merges"]]
    # SentencePiece uses every pair that gives a piece, so it cannot lack one of two
    del backend["model"]["merges"][next(index for index, piece in enumerate(pieces) if pieces.count(piece) > 1)]
    with pytest.raises(
        NemoError, match=r"SentencePiece cannot reproduce the merges of the tokenizer: train a SentencePiece model"
    ):
        get_sentencepiece_models(build_from_json(backend), 128)


def test_a_normalizer_that_sentencepiece_does_not_have_is_refused(backend):
    backend["normalizer"] = {"type": "NFKC"}
    with pytest.raises(NemoError, match=r"no normalizer NFKC: train a SentencePiece model"):
        get_sentencepiece_models(build_from_json(backend), 128)


def test_a_splitter_that_sentencepiece_does_not_have_is_refused(backend):
    backend["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(NemoError, match=r"no pre-tokenizer Whitespace"):
        get_sentencepiece_models(build_from_json(backend), 128)


@pytest.mark.parametrize("source", ["released", *KINDS])
def test_a_rebuilt_sentencepiece_model_splits_like_the_original(source):
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = build_tokenizer([RELEASED.read_bytes()], "tdt") if source == "released" else tokenizer_of(source)
    num_labels = len(tokenizer) - 1
    (original,) = get_sentencepiece_models(tokenizer, num_labels)
    del tokenizer.init_kwargs[SENTENCEPIECE_MODELS_KEY]
    (rebuilt,) = get_sentencepiece_models(tokenizer, num_labels)
    assert rebuilt != original
    actual, expected = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in (rebuilt, original))
    ids = range(len(expected))
    assert [actual.id_to_piece(index) for index in ids] == [expected.id_to_piece(index) for index in ids]
    assert len(actual) == len(expected)
    cases = json.loads((GOLDEN / "timestamp_cases.json").read_text())["real_encode"]
    texts = [case["text"] for case in cases] + ["a  b ", " ﬁne", "Größe", "12:30, o'clock?", "日本"]
    for text in texts:
        assert actual.encode(text) == expected.encode(text), text
        assert actual.decode(actual.encode(text)) == expected.decode(expected.encode(text))
