"""Tests of examples/train_ngram.py against counts by hand, and of the sums of its probabilities."""

import gzip
import importlib.util
import math
import random
import sys
from collections import Counter

import pytest
import torch
from conftest import TESTS
from ngram_helpers import score_word

import transformers_parakeet as tp
from transformers_parakeet.decoding import load_language_model

ROOT = TESTS.parent
spec = importlib.util.spec_from_file_location("train_ngram", ROOT / "examples" / "train_ngram.py")
train_ngram = importlib.util.module_from_spec(spec)
# a dataclass looks up its module
sys.modules["train_ngram"] = train_ngram
spec.loader.exec_module(train_ngram)


def read_orders(path):
    """Read an ARPA file line by line into one dict {words: (log10 probability, log10 back-off or None)} per order."""
    orders = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.endswith("-grams:"):
            orders.append({})
        elif "\t" in line:
            log_prob, words, *backoff = line.split("\t")
            orders[-1][tuple(words.split(" "))] = (float(log_prob), float(backoff[0]) if backoff else None)
    return orders


def draw_sentences(seed, num_sentences):
    """Draw sentences in which some words are frequent and others are rare."""
    rng = random.Random(seed)
    return [[f"w{int(12 * rng.random() ** 3)}" for _ in range(rng.randint(1, 8))] for _ in range(num_sentences)]


def test_lower_orders_count_the_words_before_an_n_gram():
    counts = train_ngram.count_ngrams([["a", "b"], ["a", "b"], ["c", "b"]], 3)
    assert counts[2] == {
        ("<s>", "a", "b"): 2, ("a", "b", "</s>"): 2, ("<s>", "c", "b"): 1, ("c", "b", "</s>"): 1
    }  # fmt: skip
    # no word is before <s>: occurrences
    assert counts[1] == {("<s>", "a"): 2, ("<s>", "c"): 1, ("a", "b"): 1, ("c", "b"): 1, ("b", "</s>"): 2}
    assert counts[0] == {("a",): 1, ("c",): 1, ("b",): 2, ("</s>",): 1}


def test_discounts_are_those_of_chen_and_goodman():
    def make_counts(*numbers):
        return Counter({(count, i): count for count, number in enumerate(numbers, start=1) for i in range(number)})

    # Y = 8 / (8 + 2 * 4) = 0.5
    assert train_ngram.estimate_discounts(make_counts(8, 4, 2, 1)) == (0.5, 1.25, 2.0)
    assert train_ngram.estimate_discounts(make_counts(8, 4, 2, 0)) == (0.5, 1.0, 1.5)
    # D2 = 2 - 3 * 0.5 * 8 / 4 is negative
    assert train_ngram.estimate_discounts(make_counts(8, 4, 8, 1)) == (0.5, 1.0, 1.5)


def test_a_tiny_model_equals_the_computation_by_hand(tmp_path):
    # bigrams: <s> a 2, a b 2, b a 1, b </s> 1, a c 1, c </s> 1; no count is 3, so the discounts are 0.5, 1 and 1.5
    train_ngram.write_arpa(train_ngram.train([list("abab"), list("ac")], 2), tmp_path / "lm.arpa")
    unigrams, bigrams = read_orders(tmp_path / "lm.arpa")
    # words before: a 2, b 1, c 1, </s> 2; the discounts leave 3 / 6 for the uniform distribution over 5 words
    expected_unigrams = {"a": 1 / 6 + 0.1, "b": 0.5 / 6 + 0.1, "c": 0.5 / 6 + 0.1, "</s>": 1 / 6 + 0.1, "<unk>": 0.1}
    assert {word: 10**log_prob for (word,), (log_prob, _) in unigrams.items() if word != "<s>"} == pytest.approx(
        expected_unigrams, rel=2e-7
    )
    assert unigrams[("<s>",)] == (-99, pytest.approx(math.log10(0.5), abs=1e-7))
    # every history leaves 0.5
    expected_bigrams = {
        ("<s>", "a"): 1 / 2 + 0.5 * expected_unigrams["a"],
        ("a", "b"): 1 / 3 + 0.5 * expected_unigrams["b"],
        ("a", "c"): 0.5 / 3 + 0.5 * expected_unigrams["c"],
        ("b", "a"): 0.5 / 2 + 0.5 * expected_unigrams["a"],
        ("b", "</s>"): 0.5 / 2 + 0.5 * expected_unigrams["</s>"],
        ("c", "</s>"): 0.5 / 1 + 0.5 * expected_unigrams["</s>"],
    }
    assert {words: 10**log_prob for words, (log_prob, _) in bigrams.items()} == pytest.approx(
        expected_bigrams, rel=2e-7
    )
    backoffs = {word: backoff for (word,), (_, backoff) in unigrams.items()}
    assert backoffs == {
        "<s>": pytest.approx(-0.30103, abs=1e-6), "a": pytest.approx(-0.30103, abs=1e-6),
        "b": pytest.approx(-0.30103, abs=1e-6), "c": pytest.approx(-0.30103, abs=1e-6), "</s>": None, "<unk>": None,
    }  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("num_sentences", [3, 200])
def test_the_probabilities_after_every_history_sum_to_one(tmp_path, order, num_sentences):
    sentences = draw_sentences(order, num_sentences)
    model = train_ngram.train(sentences, order)
    if num_sentences == 200 and order > 1:
        assert train_ngram.estimate_discounts(train_ngram.count_ngrams(sentences, order)[-1]) != (0.5, 1.0, 1.5)
    train_ngram.write_arpa(model, tmp_path / "lm.arpa")
    orders = read_orders(tmp_path / "lm.arpa")
    words = [word for (word,) in orders[0] if word != "<s>"]
    histories = [(), *(ngram for lower in orders[:-1] for ngram in lower if ngram[-1] != "</s>")]
    for history in histories:
        # the largest error is 1.3e-7: the file has 7 decimals
        assert sum(math.exp(score_word(orders, history, word)) for word in words) == pytest.approx(1, abs=1e-6)


def test_word_models_are_written_and_loaded(tmp_path, monkeypatch, capsys):
    sentences = draw_sentences(0, 100)
    text, path = tmp_path / "text.txt", tmp_path / "lm.arpa.gz"
    # special words and empty lines are ignored
    text.write_text("\n\n<s> " + " </s>\n".join(map(" ".join, sentences)) + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train_ngram.py", str(text), str(path), "--order", "3"])
    train_ngram.main()
    model = train_ngram.train(sentences, 3)
    assert (
        capsys.readouterr().out
        == f"{path}: "
        + ", ".join(f"{len(order)} {n}-grams" for n, order in enumerate(model.probabilities, start=1))
        + "\n"
    )
    pieces = [f"▁w{i}" for i in range(12)]
    scorer = load_language_model(path, pieces, units="words")
    first_score, states = scorer.step(scorer.start(1), torch.tensor([0]))
    second_score, _ = scorer.step(states, torch.tensor([1]))
    # the score of the first word, and the estimate for the second one
    expected = model.probabilities[1][("<s>", "w0")] * model.probabilities[0][("w1",)]
    assert (first_score + second_score).item() == pytest.approx(math.log(expected), abs=1e-6)
    # the log probability of unknown words can be set
    monkeypatch.setattr(sys, "argv", ["train_ngram.py", str(text), str(path), "--unknown", "-12"])
    train_ngram.main()
    assert "-12.0000000\t<unk>" in gzip.decompress(path.read_bytes()).decode().splitlines()


def test_piece_models_use_the_tokens_of_a_model(tmp_path, monkeypatch):
    demo_model = ROOT / "src" / "transformers_parakeet" / "demo_model"
    processor = tp.ParakeetProcessor.from_pretrained(demo_model)
    text, path = tmp_path / "text.txt", tmp_path / "lm.arpa"
    text.write_text("one two three\ntwo two one\n", encoding="utf-8")
    options = ["--order", "2", "--units", "pieces", "--model", str(demo_model)]
    monkeypatch.setattr(sys, "argv", ["train_ngram.py", str(text), str(path), *options])
    train_ngram.main()
    lm = processor.load_language_model(path)
    tokens = processor.tokenizer("two one", add_special_tokens=False)["input_ids"]
    orders, history, states = read_orders(path), ["<s>"], lm.start(1)
    for token in tokens:
        piece = processor.tokenizer.convert_ids_to_tokens(token)
        score, states = lm.step(states, torch.tensor([token]))
        assert score.item() == pytest.approx(score_word(orders, history, piece), abs=1e-5)
        history.append(piece)


def test_wrong_options_are_refused(tmp_path, monkeypatch, capsys):
    for options, message in ((["--units", "pieces"], "add --model FOLDER"), (["--order", "0"], "at least 1, got 0")):
        monkeypatch.setattr(sys, "argv", ["train_ngram.py", "text.txt", "lm.arpa", *options])
        with pytest.raises(SystemExit):
            train_ngram.main()
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one word"):
        train_ngram.train([[], []], 2)
