"""n-gram language models as token scorers: over the tokens of a model, or over words.

`arpa.py` reads the files, `automaton.py` computes the scores of tokens, `word_scorer.py` the scores of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from .arpa import ArpaModel, Array, read_arpa, read_arpa_words
from .automaton import BackoffAutomaton, compute_score_bounds
from .fusion import TokenScorer
from .word_scorer import WORD_START, WordScorer, build_word_scorer

logger = logging.get_logger(__name__)

# what the words of an ARPA file stand for
UNITS = ("nemo", "pieces", "words")
# NeMo writes token i as the character i + 100
NEMO_OFFSET = 100
# words of an ARPA file that are not in the text; their labels follow those of the text in this order
SPECIAL_WORDS = ("</s>", "<s>", "<unk>")
# number of n-grams that are converted to arcs at once, which limits the memory
NGRAMS_PER_BLOCK = 1 << 18


def load_language_model(path: str | Path, pieces: Sequence[str], units: str | None = None) -> TokenScorer:
    """Load an n-gram language model from an ARPA file.

    Args:
        path: ARPA file, plain or compressed with gzip.
        pieces: the tokens 0 to V - 1 of the speech model as text, without the blank.
        units: what the words of the file stand for: `"nemo"` (token i is the character i + 100), `"pieces"` (tokens as
            in the vocabulary, such as `▁the`) or `"words"`. `None` to detect it: NeMo's characters if all words are
            characters of tokens, pieces if a word contains `▁`, and words otherwise.

    Returns:
        A `BackoffAutomaton` for tokens, or a `WordScorer` for words. Scores are natural logarithms.

    Raises:
        ValueError: `units` is unknown, the file is damaged, its words are not tokens of `pieces`, or it is over words
            and no token starts with `▁`.
    """
    if units is not None and units not in UNITS:
        raise ValueError(f"units must be one of {', '.join(UNITS)} or None, got {units!r}")
    words = read_arpa_words(path)
    text_words = [word for word in words if word not in SPECIAL_WORDS]
    units = units or detect_units(text_words, len(pieces))
    logger.debug("%s is a language model over %s", path, units)
    if units == "words":
        return load_word_scorer(path, words, pieces)
    token_of_word = index_tokens(text_words, pieces, units)
    word_labels = label_words(words, token_of_word, len(pieces))
    return build_automaton(read_arpa(path, word_labels), len(pieces))


def detect_units(text_words: Sequence[str], num_labels: int) -> str:
    """Detect what the words of an ARPA file stand for.

    Args:
        text_words: the words of the file without `<s>`, `</s>` and `<unk>`.
        num_labels: number of labels V, without the blank.

    Returns:
        `"nemo"` if every word is a character of NeMo's encoding, `"pieces"` if a word contains `▁`, else `"words"`.
    """
    if all(len(word) == 1 and 0 <= ord(word) - NEMO_OFFSET < num_labels for word in text_words):
        return "nemo"
    return "pieces" if any(WORD_START in word for word in text_words) else "words"


def index_tokens(text_words: Sequence[str], pieces: Sequence[str], units: str) -> dict[str, int]:
    """Find the token of each word of an ARPA file.

    Args:
        text_words: the words of the file without `<s>`, `</s>` and `<unk>`.
        pieces: the tokens 0 to V - 1 as text.
        units: `"nemo"` or `"pieces"`.

    Returns:
        The token of each word.

    Raises:
        ValueError: a word is not a token.
    """
    if units == "nemo":
        tokens = {chr(token + NEMO_OFFSET): token for token in range(len(pieces))}
    else:
        tokens = {piece: token for token, piece in enumerate(pieces)}
    unknown_words = [word for word in text_words if word not in tokens]
    if unknown_words:
        raise ValueError(
            f"every word of a language model with units={units!r} must be a token of the speech model, but "
            f"{len(unknown_words)} of {len(text_words)} are not, such as {unknown_words[0]!r}: train the language "
            "model with the tokenizer of the speech model, or pass other units"
        )
    return {word: tokens[word] for word in text_words}


def load_word_scorer(path: str | Path, words: Sequence[str], pieces: Sequence[str]) -> WordScorer:
    """Load a language model over words.

    The automaton has a label for each word, and the last label is `<unk>`.

    Args:
        path: ARPA file.
        words: the words of the file.
        pieces: the tokens 0 to V - 1 of the speech model as text.

    Raises:
        ValueError: the file is damaged, or no token marks the start of a word.
    """
    if not any(WORD_START in piece for piece in pieces):
        raise ValueError(
            f"a language model over words requires tokens that mark the start of a word with {WORD_START!r}, got none "
            f"among {len(pieces)} tokens: train a language model over the tokens of the speech model"
        )
    text_words = [word for word in words if word not in SPECIAL_WORDS]
    labels = {word: label for label, word in enumerate([*text_words, "<unk>"])}
    word_labels = label_words(words, labels, len(labels))
    automaton = build_automaton(read_arpa(path, word_labels), len(labels))
    return build_word_scorer(automaton, text_words, pieces)


def label_words(words: Sequence[str], labels: dict[str, int], num_labels: int) -> Array:
    """Choose a label for each word of an ARPA file.

    Args:
        words: the words of the file.
        labels: label of each word that the automaton scores.
        num_labels: number of labels V of the automaton. The remaining special words get labels from V on.

    Returns:
        (W,) int64 labels.
    """
    special_labels = {word: num_labels + index for index, word in enumerate(SPECIAL_WORDS)}
    all_labels = {**special_labels, **labels}
    return np.fromiter(map(all_labels.__getitem__, words), np.int64, len(words))


def build_automaton(model: ArpaModel, num_labels: int) -> BackoffAutomaton:
    """Build an automaton from the n-grams of an ARPA file.

    A state is an n-gram below the highest order: the last words that the model distinguishes. State 0 is the root, the
    empty n-gram. The 1-grams follow, then the 2-grams, and so on. If an n-gram has no arc for a word, its state backs
    off to the state of its suffix (NeMo, `NGramGPULanguageModel`). n-grams with a word that is not a label are not
    used.

    Args:
        model: the n-grams. A word with a label below V is a token; the labels V to V + 2 are `</s>`, `<s>`, `<unk>`.
        num_labels: number of labels V.

    Returns:
        The automaton. It starts in the state of `<s>`.
    """
    lower_orders = model.orders[:-1]
    # first_states[n] is the first state with n words
    first_states = np.cumsum([0, 1, *(len(order.keys) for order in lower_orders)])
    num_states = int(first_states[-1])
    backoff_states = np.zeros(num_states, np.int32)
    backoff_scores = np.zeros(num_states, np.float32)
    for num_words, order in enumerate(lower_orders, start=1):
        states = slice(first_states[num_words], first_states[num_words + 1])
        backoff_states[states] = first_states[num_words - 1] + order.suffixes
        backoff_scores[states] = order.backoffs
    arc_keys, arc_scores, arc_targets, end_scores = build_arcs(model, num_labels, first_states)
    back_off_end_scores(end_scores, backoff_states, backoff_scores, first_states)
    root_scores, root_targets = build_root(model, num_labels)
    start_word = int(np.searchsorted(model.labels, num_labels + SPECIAL_WORDS.index("<s>")))
    start_state = 1 + start_word if lower_orders else 0
    arc_offsets = np.searchsorted(arc_keys, np.arange(num_states + 1) * num_labels)
    roots, root_table = torch.zeros(1, dtype=torch.long), torch.from_numpy(root_scores)[None]
    backoffs = torch.from_numpy(backoff_states), torch.from_numpy(backoff_scores)
    arcs = torch.from_numpy(arc_offsets.astype(np.int32)), torch.from_numpy(arc_scores)
    return BackoffAutomaton(
        start_states=torch.tensor([start_state]),
        roots=roots,
        root_scores=root_table,
        root_targets=torch.from_numpy(root_targets)[None],
        backoff_states=backoffs[0],
        backoff_scores=backoffs[1],
        end_scores=torch.from_numpy(end_scores),
        score_bounds=compute_score_bounds(roots, root_table, *backoffs, *arcs, len(lower_orders)),
        arc_offsets=arcs[0],
        arc_keys=torch.from_numpy(arc_keys),
        arc_scores=arcs[1],
        arc_targets=torch.from_numpy(arc_targets),
        max_backoffs=len(lower_orders),
    )


def build_root(model: ArpaModel, num_labels: int) -> tuple[Array, Array]:
    """Build the scores and the next states of the root from the 1-grams.

    The tokens without a 1-gram share the probability of `<unk>` equally, and their next state is the root.

    Args:
        model: the n-grams.
        num_labels: number of labels V.

    Returns:
        (V,) float32 scores and (V,) int32 next states.
    """
    log_probs = model.orders[0].log_probs
    is_label = model.labels < num_labels
    unigram_labels = model.labels[is_label]
    unknown_word = np.searchsorted(model.labels, num_labels + SPECIAL_WORDS.index("<unk>"))
    num_absent = num_labels - len(unigram_labels)
    root_scores = np.zeros(num_labels, np.float32)
    if num_absent:
        root_scores += log_probs[unknown_word] - np.log(num_absent)
    root_scores[unigram_labels] = log_probs[is_label]
    root_targets = np.zeros(num_labels, np.int32)
    if len(model.orders) > 1:
        root_targets[unigram_labels] = 1 + np.flatnonzero(is_label)
    return root_scores, root_targets


def build_arcs(model: ArpaModel, num_labels: int, first_states: Array) -> tuple[Array, Array, Array, Array]:
    """Build the arcs of all states except the root from the n-grams with at least two words.

    The arcs are in the order of their keys, because n-grams, states and labels are in the same order.

    Args:
        model: the n-grams.
        num_labels: number of labels V.
        first_states: (number of orders + 1,) the first state with n words, and the number of states.

    Returns:
        (A,) int64 arc keys, (A,) float32 scores, (A,) int32 next states, and (S,) float32 scores of `</s>`, which are
        NaN for states without an arc for it.
    """
    num_words, highest_order = len(model.labels), len(model.orders)
    max_arcs = sum(len(order.keys) for order in model.orders[1:])
    arc_keys, arc_scores = np.empty(max_arcs, np.int64), np.empty(max_arcs, np.float32)
    arc_targets = np.empty(max_arcs, np.int32)
    end_scores = np.full(first_states[-1], np.nan, np.float32)
    end_word = np.searchsorted(model.labels, num_labels + SPECIAL_WORDS.index("</s>"))
    end_scores[0] = model.orders[0].log_probs[end_word]
    num_arcs = 0
    for order_number, order in enumerate(model.orders[1:], start=2):
        for first in range(0, len(order.keys), NGRAMS_PER_BLOCK):
            block = slice(first, first + NGRAMS_PER_BLOCK)
            prefixes, words = np.divmod(order.keys[block], num_words)
            states, labels = first_states[order_number - 1] + prefixes, model.labels[words]
            if order_number < highest_order:
                targets = first_states[order_number] + first + np.arange(len(states))
            else:
                # the state of the whole n-gram does not exist, so the next state is that of its suffix
                targets = first_states[order_number - 1] + order.suffixes[block]
            is_arc, is_end = labels < num_labels, words == end_word
            end_scores[states[is_end]] = order.log_probs[block][is_end]
            arcs = slice(num_arcs, num_arcs + int(is_arc.sum()))
            arc_keys[arcs] = (states * num_labels + labels)[is_arc]
            arc_scores[arcs] = order.log_probs[block][is_arc]
            arc_targets[arcs] = targets[is_arc]
            num_arcs = arcs.stop
    return arc_keys[:num_arcs], arc_scores[:num_arcs], arc_targets[:num_arcs], end_scores


def back_off_end_scores(end_scores: Array, backoff_states: Array, backoff_scores: Array, first_states: Array) -> None:
    """Compute the scores of `</s>` in the states without an arc for it.

    Args:
        end_scores: (S,) scores of `</s>`, NaN where they are missing; changed in place.
        backoff_states: (S,) the next shorter state.
        backoff_scores: (S,) score that is added when a state backs off.
        first_states: (number of orders + 1,) the first state with n words, and the number of states.
    """
    for first, stop in pairwise(first_states[1:]):
        missing = first + np.flatnonzero(np.isnan(end_scores[first:stop]))
        # states with fewer words are complete
        end_scores[missing] = backoff_scores[missing] + end_scores[backoff_states[missing]]
