"""Tests of phrases to boost: files, spellings, their tokens, and the trees that the processor builds."""

import math

import pytest
from search_helpers import total_score
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoProcessor

import transformers_parakeet as tp
from transformers_parakeet.decoding import BoostedPhrase
from transformers_parakeet.phrases import list_spellings, read_phrases, spell_phrases


@pytest.fixture(scope="module")
def demo():
    """Return the processor of the demo model, whose vocabulary has the lower-case letters and the ten digits."""
    return AutoProcessor.from_pretrained(tp.demo_model_path())


@pytest.fixture(scope="module")
def upper_and_lower():
    """Return a tokenizer with the letters A, B, a and b."""
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "\u2581", "A", "B", "a", "b", "<pad>"])}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    return tp.ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def tokenize(processor, text):
    """Return the tokens of a text as a tuple."""
    return tuple(processor.tokenizer(text, add_special_tokens=False).input_ids)


def test_spellings_differ_in_capitals():
    assert list_spellings("Nvidia") == ["Nvidia", "nvidia", "NVIDIA"]
    assert list_spellings("FastConformer") == ["FastConformer", "fastconformer", "FASTCONFORMER"]
    assert list_spellings("new york") == ["new york", "New york", "New York", "NEW YORK"]
    assert list_spellings("ünal") == ["ünal", "Ünal", "ÜNAL"]
    assert list_spellings("42") == ["42"]


def test_a_phrase_becomes_the_tokens_of_the_text_with_a_word_start(demo):
    (phrase,) = spell_phrases(["one two"], demo.tokenizer, alternatives=False)
    assert phrase == BoostedPhrase(tokenize(demo, "one two"), None)
    assert demo.tokenizer.convert_ids_to_tokens(phrase.tokens) == ["▁one", "▁two"]
    # several spaces are one
    assert spell_phrases([" one \t two "], demo.tokenizer, alternatives=False) == [phrase]


def test_spellings_that_the_tokenizer_cannot_write_are_left_out(demo):
    tokens = tokenize(demo, "nvidia")
    assert {phrase.tokens for phrase in spell_phrases(["Nvidia"], demo.tokenizer)} == {tokens}
    with pytest.raises(ValueError, match="cannot write 'N' in the phrase 'Nvidia'"):
        spell_phrases(["Nvidia"], demo.tokenizer, alternatives=False)


def test_all_spellings_of_a_phrase_have_its_score(upper_and_lower):
    phrases = spell_phrases([("ab", 3.0), "B"], upper_and_lower)
    texts = [(upper_and_lower.decode(phrase.tokens, group_tokens=False), phrase.score) for phrase in phrases]
    assert texts == [("ab", 3.0), ("Ab", 3.0), ("AB", 3.0), ("B", None), ("b", None)]


@pytest.mark.parametrize(
    ("phrases", "error", "message"),
    [
        ([], ValueError, "at least one phrase"),
        (["one", "  "], ValueError, "at least one character"),
        (["one", 3], TypeError, "must be a text or a tuple of a text and a score, got 3"),
        ([("one", "2")], TypeError, r"got \('one', '2'\)"),
        ([("one", None)], TypeError, r"got \('one', None\)"),
        ([("one", 1.0, 2.0)], TypeError, "a text or a tuple"),
        ([("one", True)], TypeError, "a text or a tuple"),
        ([("one", 0.0)], ValueError, "above 0, got 0.0 for 'one'"),
        ([("one", math.nan)], ValueError, "got nan for 'one'"),
        ([("one", math.inf)], ValueError, "got inf for 'one'"),
        ("one", TypeError, r"pass \['one'\]"),
        (["one", "Tokyo 東京"], ValueError, "cannot write '東' in the phrase 'Tokyo 東京'"),
        (["<pad>"], ValueError, "cannot write '<' in the phrase '<pad>'"),
    ],
)
def test_wrong_phrases_are_refused(demo, phrases, error, message):
    with pytest.raises(error, match=message):
        demo.boosting_tree(phrases)


def test_the_processor_builds_a_tree_of_its_labels(demo):
    tree = demo.boosting_tree(["seven eight", ("Nine", 3.0)], context_score=0.5, depth_scaling=4.0)
    assert tree.num_labels == demo.blank_token_id == 66
    bonus = 0.5 + 0.5 * 4 + math.log(2)
    assert total_score(tree, tokenize(demo, "one seven eight two")) == pytest.approx(bonus, abs=1e-6)
    assert total_score(tree, tokenize(demo, "one seven two")) == pytest.approx(0.0, abs=1e-6)
    assert total_score(tree, tokenize(demo, "nine")) == 3.0


def test_ten_thousand_phrases_become_one_tree(demo):
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c for a in letters for b in letters for c in letters][:10_000]
    tree = demo.boosting_tree(words)
    # each has four tokens: the word start and three letters
    assert len(tree.backoff_states) == 1 + 1 + len({w[0] for w in words}) + len({w[:2] for w in words}) + len(words)


def test_a_file_has_phrases_and_scores(tmp_path):
    path = tmp_path / "phrases.txt"
    path.write_bytes("\ufeff# names\r\nNvidia\r\n\r\n  Xylia \t 3.0\r\nnew york\t1e-1\nC# minor\n".encode())
    assert read_phrases(path) == ["Nvidia", ("Xylia", 3.0), ("new york", 0.1), "C# minor"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\tthree\n", "line 2 of .*a phrase, a tab and a number, got 'two"),
        (b"one\t1\t2\n", "line 1 of .*a phrase, a tab and a number"),
        (b"one\tnan\n", "line 1 of .*got nan for 'one'"),
        (b"\n\none\t-1\n", "line 3 of .*got -1.0 for 'one'"),
        (b"\t2.0\n", "line 1 of .*at least one character"),
        (b"one\t\n", "line 1 of .*a phrase, a tab and a number"),
        (b"# only a comment\n\n", "at least one phrase, got none"),
        (b"", "at least one phrase, got none"),
        (b"caf\xe9\n", "must be UTF-8"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    path = tmp_path / "phrases.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_phrases(path)
