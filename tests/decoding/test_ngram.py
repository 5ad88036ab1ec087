"""Tests of language models over tokens against NeMo, and over words against plain Python."""

import json
import math
import random
import time
from dataclasses import fields

import pytest
import torch
from ngram_helpers import draw_orders, score_word, write_arpa

import transformers_parakeet as tp
from transformers_parakeet.decoding import ngram, word_scorer
from transformers_parakeet.decoding.automaton import BackoffAutomaton
from transformers_parakeet.decoding.ngram import detect_units, load_language_model
from transformers_parakeet.decoding.word_scorer import WordScorer

LN10 = math.log(10)


def score_tokens(scorer, tokens):
    """Return the scores of a sequence of tokens, and the score of the end."""
    states, scores = scorer.start(1), []
    for token in tokens:
        table = scorer.score(states)
        score, states = scorer.step(states, torch.tensor([token]))
        assert table[0, token] == score
        scores.append(score.item())
    return scores, scorer.score_end(states).item()


def test_scores_equal_nemo(golden):
    expected = json.loads((golden / "search" / "scoring.json").read_text())
    lm = load_language_model(golden / "search" / "lm.arpa", [f"▁{token}" for token in range(expected["vocab_size"])])
    for walk in expected["lm"]:
        states = lm.start(1)
        for token, score, total in zip(walk["tokens"], walk["scores"], walk["sum_over_vocabulary"], strict=True):
            table = lm.score(states)
            step_score, states = lm.step(states, torch.tensor([token]))
            # the largest error is 5e-7; the file has 6 digits
            assert step_score.item() == pytest.approx(score, abs=2e-6)
            assert table[0, token].item() == pytest.approx(score, abs=2e-6)
            # the largest error is 1.2e-4: NeMo adds 96 numbers of about 10 in float32, here the sum is float64
            assert table.double().sum().item() == pytest.approx(total, abs=3e-4)
        assert lm.score_end(states).item() == pytest.approx(walk["end_of_sentence"], abs=2e-6)


@pytest.mark.parametrize(
    ("words", "units"),
    [
        (["d", "e", "\u0085"], "nemo"),
        # the character of token -1, and that of token 100
        (["c", "d"], "words"),
        (["d", "\u00c8"], "words"),
        (["▁the", "s"], "pieces"),
        (["the", "cat"], "words"),
    ],
)
def test_units_are_detected(words, units):
    assert detect_units(words, 100) == units


def test_detected_units_are_logged(tmp_path, monkeypatch):
    path = write_arpa(tmp_path / "lm.arpa", draw_orders(random.Random(0), ["▁a", "b"], 2))
    messages = []
    monkeypatch.setattr(ngram.logger, "debug", lambda message, *values: messages.append(message % values))
    load_language_model(path, ["b", "▁a"])
    assert messages == [f"{path} is a language model over pieces"]


def test_words_that_are_not_tokens_are_refused(tmp_path):
    path = write_arpa(tmp_path / "lm.arpa", draw_orders(random.Random(0), ["▁a", "▁b"], 1))
    with pytest.raises(ValueError, match="1 of 2 are not, such as '▁b'"):
        load_language_model(path, ["▁a"])
    with pytest.raises(ValueError, match="2 of 2 are not, such as '▁a'"):
        load_language_model(path, ["▁a", "▁b"], units="nemo")
    with pytest.raises(ValueError, match="units must be one of nemo, pieces, words or None, got 'bpe'"):
        load_language_model(path, ["▁a", "▁b"], units="bpe")


def test_word_models_require_tokens_that_mark_word_starts(tmp_path):
    path = write_arpa(tmp_path / "lm.arpa", draw_orders(random.Random(0), ["one", "two"], 1))
    with pytest.raises(ValueError, match="got none among 3 tokens"):
        load_language_model(path, ["one", "two", " "])


# every character is a token, so each text has several tokenisations; `▁` alone and inside a token
PIECES = ["▁", *"abct,.'X", "▁a", "▁b", "ab", "▁ca", "at", "t,", "▁cat", "b▁a", "▁b▁c", "<en>", "<0xE2>", "<unk>", "▁'"]
WORDS = ["a", "ab", "cat", "cab", "b", "at'b"]


def score_text(orders, text):
    """Score a text word by word. Words are lower-cased and looked up without punctuation at their start and end."""
    words = [word.strip(",.'") for word in text.lower().split(" ")]
    words = [word if word in WORDS else "<unk>" for word in words if word]
    scores = [score_word(orders, ["<s>", *words[:index]], word) for index, word in enumerate(words)]
    return scores, score_word(orders, ["<s>", *words], "</s>")


@pytest.mark.parametrize("order", [1, 2, 3])
def test_word_models_equal_a_scorer_of_whole_words(tmp_path, order):
    rng = random.Random(order)
    orders = draw_orders(rng, WORDS, order)
    scorer = load_language_model(write_arpa(tmp_path / "lm.arpa", orders), PIECES)
    assert isinstance(scorer, WordScorer)
    texts_with_unknown_words = 0
    for _ in range(60):
        tokens = [rng.randrange(len(PIECES)) for _ in range(rng.randint(0, 14))]
        pieces = [PIECES[token] for token in tokens]
        # a byte or an unknown piece is a character of no word
        text = "".join({"<en>": "", "<0xE2>": "?x", "<unk>": "?x"}.get(piece, piece) for piece in pieces)
        word_scores, end = score_text(orders, text.replace("▁", " "))
        scores, end_score = score_tokens(scorer, tokens)
        # the largest error is 1.5e-6
        assert sum(scores) + end_score == pytest.approx(sum(word_scores) + end, abs=6e-6), pieces
        texts_with_unknown_words += "?" in text
    assert texts_with_unknown_words > 5


@pytest.fixture
def no_estimates(monkeypatch):
    """Treat the vocabulary of a test as a large one, for which incomplete words have no estimate."""
    monkeypatch.setattr(word_scorer, "MAX_ESTIMATED_TOKENS", 0)


@pytest.mark.usefixtures("no_estimates")
def test_a_word_gets_its_score_from_the_token_that_starts_the_next_word(tmp_path):
    orders = draw_orders(random.Random(7), WORDS, 2)
    scorer = load_language_model(write_arpa(tmp_path / "lm.arpa", orders), PIECES)
    cat, ab = score_word(orders, ["<s>"], "cat"), score_word(orders, ["<s>", "cat"], "ab")
    unknown = score_word(orders, ["<s>", "cat", "ab"], "<unk>")
    end = score_word(orders, ["<s>", "cat", "ab", "<unk>"], "</s>")

    def tokenize(*pieces):
        return [PIECES.index(piece) for piece in pieces]

    scores, end_score = score_tokens(scorer, tokenize("▁ca", "t,", "▁a", "b", "▁", "t", "t"))
    assert scores == pytest.approx([0, 0, cat, 0, ab, 0, 0], abs=1e-5)
    assert end_score == pytest.approx(unknown + end, abs=1e-5)
    # one token that completes two words
    scores, _ = score_tokens(scorer, tokenize("▁cat", "▁b▁c"))
    assert scores == pytest.approx([0, cat + score_word(orders, ["<s>", "cat"], "b")], abs=1e-5)


def test_an_incomplete_word_has_the_score_of_its_most_probable_word(tmp_path):
    orders = draw_orders(random.Random(11), WORDS, 2)
    scorer = load_language_model(write_arpa(tmp_path / "lm.arpa", orders), PIECES)
    letters = {piece: token for token, piece in enumerate(PIECES) if piece.isalpha()}
    rng, num_known = random.Random(12), 0
    for _ in range(40):
        parts = [rng.choice([*letters]) for _ in range(rng.randint(1, 3))]
        tokens = [PIECES.index("▁"), *(letters[part] for part in parts)]
        prefix = "".join(parts)
        longer = [word for word in WORDS if word.startswith(prefix)] or ["<unk>"]
        num_known += longer != ["<unk>"]
        scores, end_score = score_tokens(scorer, tokens)
        best = max(orders[0][(word,)][0] * LN10 for word in longer)
        assert sum(scores) == pytest.approx(best, abs=1e-5)
        word = prefix if prefix in WORDS else "<unk>"
        expected = score_word(orders, ["<s>"], word) + score_word(orders, ["<s>", word], "</s>")
        assert sum(scores) + end_score == pytest.approx(expected, abs=1e-5)
    assert num_known > 5


def test_estimates_of_unknown_words_and_after_punctuation(tmp_path):
    words = {("do",): (-1, None), ("dog",): (-0.5, None), ("<s>",): (-9, None), ("</s>",): (-2, None),
             ("<unk>",): (-4, None)}  # fmt: skip
    pieces = ["▁", *"dogx,"]
    scorer = load_language_model(write_arpa(tmp_path / "lm.arpa", [words]), pieces)

    def add_up(text):
        """Return the sums of the scores after each token, in log10."""
        scores, _ = score_tokens(scorer, [pieces.index(character) for character in text])
        return (torch.tensor(scores, dtype=torch.float64).cumsum(0) / LN10).tolist()

    # `do` can become `dog`, but not after a comma
    assert add_up("▁do,▁") == pytest.approx([0, -0.5, -0.5, -1, -1], abs=1e-6)
    assert add_up("▁dx▁") == pytest.approx([0, -0.5, -4, -4], abs=1e-6)
    assert add_up("▁,d") == pytest.approx([0, 0, -0.5], abs=1e-6)


@pytest.mark.parametrize("num_clips", [1, 7])
def test_bounds_of_word_models(tmp_path, num_clips, request):
    rng = random.Random(13)
    for is_large in (False, True):
        if is_large:
            request.getfixturevalue("no_estimates")
        scorer = load_language_model(write_arpa(tmp_path / "lm.arpa", draw_orders(rng, WORDS, 2)), PIECES)
        states = scorer.start(num_clips)
        for _ in range(8):
            states = scorer.step(states, torch.tensor([rng.randrange(len(PIECES)) for _ in range(num_clips)]))[1]
            bounds = scorer.bound_scores(states)
            for token in range(len(PIECES)):
                assert (bounds >= scorer.step(states, torch.full((num_clips,), token))[0]).all()


@pytest.mark.usefixtures("no_estimates")
def test_word_models_with_upper_case_letters_keep_the_case(tmp_path):
    words = {("X",): (-1, None), ("<s>",): (-9, None), ("</s>",): (-2, None), ("<unk>",): (-4, None)}
    scorer = load_language_model(write_arpa(tmp_path / "lm.arpa", [words]), ["▁X", "▁x"])
    assert score_tokens(scorer, [0, 0, 1])[0] == pytest.approx([0, -LN10, -LN10], abs=1e-6)
    assert score_tokens(scorer, [1, 0])[0] == pytest.approx([0, -4 * LN10], abs=1e-6)


def test_a_batch_of_word_states_equals_single_states(tmp_path):
    rng = random.Random(3)
    scorer = load_language_model(write_arpa(tmp_path / "lm.arpa", draw_orders(rng, WORDS, 3)), PIECES)
    states = scorer.start(16)
    for _ in range(6):
        tokens = torch.tensor([rng.randrange(len(PIECES)) for _ in range(16)])
        scores, next_states = scorer.step(states, tokens)
        for clip in range(16):
            single_scores, single_states = scorer.step(states[clip, None], tokens[clip, None])
            assert torch.equal(single_scores[0], scores[clip])
            assert torch.equal(single_states[0], next_states[clip])
        states = next_states
    assert torch.equal(scorer.score(states), torch.cat([scorer.score(state[None]) for state in states]))
    assert [len(tensor) for tensor in scorer.step(states[:0], tokens[:0])] == [0, 0]


def test_a_word_scorer_moves_with_all_its_tensors(tmp_path):
    path = write_arpa(tmp_path / "lm.arpa", draw_orders(random.Random(3), WORDS, 2))
    scorer = load_language_model(path, PIECES).to("meta")
    for part in (scorer, scorer.automaton):
        tensors = [getattr(part, field.name) for field in fields(part)]
        assert {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)} == {"meta"}


def test_words_with_punctuation_in_the_model(tmp_path):
    words = {
        (word,): (-1 - index, None) for index, word in enumerate(["don't", "'tis", "tis", "ok", "<s>", "</s>", "<unk>"])
    }
    scorer = load_language_model(write_arpa(tmp_path / "lm.arpa", [words]), ["▁", *"don'tiskDO.,-\""])

    def score(text):
        tokens = [["▁", *"don'tiskDO.,-\""].index(character) for character in f"▁{text}▁"]
        return sum(score_tokens(scorer, tokens)[0]) / LN10

    looked_up = {
        "don't": -1, "Don't,": -1, "'tis": -2, "tis": -3, "ok.": -4, '"ok,".': -4, "ok-": -4, "ok'": -4, "-": 0, "": 0,
        "ok-ok": -7, "don'": -7, "do-not": -7, "don": -7,
        # a quotation mark that starts a word of the model is not removed
        "'ok": -7,
    }  # fmt: skip
    assert {text: score(text) for text in looked_up} == pytest.approx(looked_up, abs=1e-6)


def test_the_processor_loads_language_models_for_its_vocabulary(golden, tmp_path):
    processor = tp.load_nemo(golden / "real_configs" / "transducer" / "model.nemo")[1]
    lm = processor.load_language_model(golden / "search" / "lm.arpa")
    assert isinstance(lm, BackoffAutomaton)
    assert lm.num_labels == processor.blank_token_id == 96
    pieces = processor.tokenizer.convert_ids_to_tokens([5, 44])
    orders = draw_orders(random.Random(0), pieces, 2)
    lm = processor.load_language_model(write_arpa(tmp_path / "lm.arpa", orders), units="pieces")
    expected = [score_word(orders, ["<s>"], pieces[0]), score_word(orders, ["<s>", pieces[0]], pieces[1])]
    assert score_tokens(lm, [5, 44])[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_speed_of_scoring(tmp_path):
    """Print the time of a score with 8192 tokens and about 200,000 n-grams."""
    rng = random.Random(0)
    pieces = [f"▁{token}" for token in range(8192)]
    bigrams = {(rng.choice(pieces[: rng.randrange(1, 8192)]), rng.choice(pieces)) for _ in range(200_000)}
    unigrams = {(word,): (-3, -0.5) for word in ["<s>", "</s>", "<unk>", *pieces]}
    orders = [unigrams, dict.fromkeys(bigrams, (-1, None))]
    lm = load_language_model(write_arpa(tmp_path / "lm.arpa", orders), pieces)
    for num_states in (16, 64):
        tokens = [rng.randrange(1000) for _ in range(num_states)]
        states = lm.step(lm.start(num_states), torch.tensor(tokens))[1]
        times = []
        for _ in range(50):
            start = time.perf_counter()
            scores = lm.score(states)
            times.append(time.perf_counter() - start)
        print(f"score of {num_states} states: {sorted(times)[5] * 1000:.3f} ms")  # noqa: T201
        # a token without an arc has its 1-gram and the back-off of the state
        expected = [-1 if (pieces[token], "▁5") in bigrams else -3.5 for token in tokens]
        torch.testing.assert_close(scores[:, 5], torch.tensor(expected) * LN10)
