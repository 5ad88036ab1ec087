"""Scores tokens with a language model over words.

A word gets its score when the next word starts. For small vocabularies, such as characters, an incomplete word has an
estimate of this score, so a search does not prefer texts without word ends.

`ngram.py` loads the language model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .automaton import BackoffAutomaton

Array = NDArray[Any]

# SentencePiece's marker of a word start
WORD_START = "\u2581"
# pieces such as <en>, which add nothing to a word; byte pieces such as <0xE2> and <unk> are part of a word
MARKUP_PATTERN = re.compile(r"<(?!0x[0-9A-F]{2}>|unk>).+>")
BYTE_OR_UNKNOWN_PATTERN = re.compile(r"<(0x[0-9A-F]{2}|unk)>")
# symbols besides the characters of the trie: another letter, another punctuation mark, word boundary, padding
NUM_OTHER_SYMBOLS = 4
# label of a word state without a word
NO_WORD = -1
# Largest vocabulary for which the scores of incomplete words are estimated. Scoring all tokens of a larger vocabulary
# would take too long, and its words have few tokens.
MAX_ESTIMATED_TOKENS = 256


@dataclass(frozen=True)
class WordScorer:
    """Scores tokens with a language model over words. It has no state of its own, so threads share it.

    A token with `▁` completes the word before it and adds the score of that word. The last word is added at the end of
    the clip. Every token also adds the change of the estimate for the incomplete word. A complete word has no estimate,
    so the sum over all tokens is that of the scores of the words. It does not depend on how a word is divided into
    tokens.

    A state is `state of the language model * number of word states + word state`. The word state is the word so far: 0
    for no character; 1 to K - 2 for the characters of a node in the trie of all words of the model; K - 1 for
    characters that start no word of the model; K to 2K - 1 for these followed by punctuation.

    A word is looked up without the punctuation at its start and its end. If the model has no upper-case letters, it is
    looked up in lower case. A punctuation mark that continues a word of the model (`don't`) is not removed. Therefore
    `'ok` is an unknown word if the model contains `'tis`.

    V is the number of tokens, L the largest number of symbols of a token. A symbol is the index of a character.

    Args:
        automaton: the language model over words. Its last label is the unknown word.
        edge_keys: (E,) word state * number of symbols + symbol for each character that continues a word, ascending. The
            last key is larger than every key that occurs, so a search has a result.
        edge_targets: (E,) next word state of each edge.
        word_labels: (2K,) label of the word that ends in a word state; -1 for no word.
        word_estimates: (2K,) estimated score of the word of a word state, without the words before it: that of the most
            probable word that starts with its characters, or of the unknown word if there is none. After punctuation
            it is that of the word itself. `None` for no estimates.
        symbols: (V, L) symbols of each token; the last two symbols are a word boundary and padding.
        symbol_counts: (V,) number of symbols of each token.
        is_punctuation: (number of symbols,) whether a symbol is punctuation.
        starts_word: (V,) float32 1 for tokens whose first symbol is a word boundary, else 0.
        inner_boundary_tokens: tokens with a word boundary after the first symbol.
        boundary_positions: positions in `symbols` of at least one word boundary.
    """

    automaton: BackoffAutomaton
    edge_keys: Tensor
    edge_targets: Tensor
    word_labels: Tensor
    word_estimates: Tensor | None
    symbols: Tensor
    symbol_counts: Tensor
    is_punctuation: Tensor
    starts_word: Tensor
    inner_boundary_tokens: Tensor
    boundary_positions: tuple[int, ...]

    @property
    def num_labels(self) -> int:
        """Number of labels V, without the blank."""
        return len(self.symbols)

    @property
    def num_word_states(self) -> int:
        """Number of word states."""
        return len(self.word_labels)

    def to(self, device: torch.device | str) -> WordScorer:
        """Return the scorer with all tensors on a device.

        Args:
            device: the device.
        """
        moved: dict[str, Any] = {
            field.name: getattr(self, field.name).to(device)
            for field in fields(self)
            if field.name != "boundary_positions" and getattr(self, field.name) is not None
        }
        return replace(self, **moved)

    def start(self, num_clips: int) -> Tensor:
        """Return the states before the first token.

        Args:
            num_clips: number of clips B.

        Returns:
            (B,) int64 states.
        """
        return self.automaton.start(num_clips) * self.num_word_states

    def score(self, states: Tensor) -> Tensor:
        """Score every token in every state.

        Args:
            states: (N,) states.

        Returns:
            (N, V) float32 scores.
        """
        if self.word_estimates is not None:
            return self._score_tokens(states, torch.arange(self.num_labels, device=states.device))
        word_scores, _ = self._complete_words(*self._split_states(states))
        scores = word_scores[:, None] * self.starts_word
        if len(self.inner_boundary_tokens):
            scores[:, self.inner_boundary_tokens] = self._score_tokens(states, self.inner_boundary_tokens)
        return scores

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Score one token in every state, and return the next states.

        Args:
            states: (N,) states.
            tokens: (N,) one token per state, from 0 to V - 1.

        Returns:
            (N,) float32 scores and (N,) int64 next states.
        """
        model_states, word_states = self._split_states(states)
        scores = -self._estimate(word_states)
        num_positions = int(self.symbol_counts[tokens].max()) if len(tokens) else 0
        symbols = self.symbols[tokens, :num_positions]
        is_boundary, is_padding = symbols == self._boundary_symbol, symbols == self._boundary_symbol + 1
        is_punctuation = self.is_punctuation[symbols]
        for position in range(num_positions):
            next_word_states = self._append_symbols(word_states, symbols[:, position], is_punctuation[:, position])
            if position in self.boundary_positions:
                ends_word = is_boundary[:, position]
                word_scores, next_model_states = self._complete_words(model_states, word_states)
                scores = torch.where(ends_word, scores + word_scores, scores)
                model_states = torch.where(ends_word, next_model_states, model_states)
                next_word_states = next_word_states.masked_fill(ends_word, 0)
            word_states = torch.where(is_padding[:, position], word_states, next_word_states)
        return scores + self._estimate(word_states), model_states * self.num_word_states + word_states

    def bound_scores(self, states: Tensor) -> Tensor:
        """Return an upper bound of the scores of all tokens in every state.

        Args:
            states: (N,) states.

        Returns:
            (N,) float32 bounds.
        """
        if self.word_estimates is not None:
            return self.score(states).amax(1)
        word_scores, _ = self._complete_words(*self._split_states(states))
        bounds = word_scores.clamp(min=0)
        if not len(self.inner_boundary_tokens):
            return bounds
        return bounds.maximum(self._score_tokens(states, self.inner_boundary_tokens).amax(1))

    def score_end(self, states: Tensor) -> Tensor:
        """Score the last word and the end of the clip.

        Args:
            states: (N,) states.

        Returns:
            (N,) float32 scores.
        """
        model_states, word_states = self._split_states(states)
        word_scores, model_states = self._complete_words(model_states, word_states)
        return word_scores + self.automaton.score_end(model_states) - self._estimate(word_states)

    @property
    def _boundary_symbol(self) -> int:
        """The symbol of a word boundary; the symbol after it is padding."""
        return len(self.is_punctuation) - 2

    def _split_states(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (N,) states of the language model and the (N,) word states of (N,) states."""
        model_states = states.div(self.num_word_states, rounding_mode="floor")
        return model_states, states - model_states * self.num_word_states

    def _score_tokens(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the (N, T) float32 scores of T tokens in each of (N,) states."""
        scores, _ = self.step(states.repeat_interleave(len(tokens)), tokens.repeat(len(states)))
        return scores.view(len(states), -1)

    def _estimate(self, word_states: Tensor) -> Tensor:
        """Return the (N,) float32 estimates for the incomplete words of (N,) word states."""
        if self.word_estimates is None:
            return torch.zeros_like(word_states, dtype=torch.float32)
        return self.word_estimates[word_states]

    def _complete_words(self, model_states: Tensor, word_states: Tensor) -> tuple[Tensor, Tensor]:
        """Score the words that end in word states.

        Args:
            model_states: (N,) states of the language model.
            word_states: (N,) word states.

        Returns:
            (N,) float32 scores, 0 without a word, and the (N,) next states of the language model.
        """
        labels = self.word_labels[word_states].long()
        is_word = labels != NO_WORD
        scores, next_states = self.automaton.step(model_states, labels.clamp(min=0))
        return scores * is_word, torch.where(is_word, next_states, model_states)

    def _append_symbols(self, word_states: Tensor, symbols: Tensor, is_punctuation: Tensor) -> Tensor:
        """Append one character to every word.

        Args:
            word_states: (N,) word states.
            symbols: (N,) characters.
            is_punctuation: (N,) whether the characters are punctuation.

        Returns:
            (N,) int64 next word states.
        """
        num_nodes = self.num_word_states // 2
        keys = word_states * len(self.is_punctuation) + symbols
        edges = torch.searchsorted(self.edge_keys, keys)
        after_punctuation = word_states % num_nodes + num_nodes
        next_states = torch.where(is_punctuation, after_punctuation, num_nodes - 1)
        return torch.where(self.edge_keys[edges] == keys, self.edge_targets[edges], next_states)


@dataclass(frozen=True)
class WordTrie:
    """The trie of the words of a language model. Node 0 is the empty text.

    Args:
        characters: the characters of all words, ascending.
        edge_keys: (K - 1,) int64 node * number of symbols + symbol, ascending; the edge with index i leads to node
            i + 1.
        labels: (K,) label of the word that ends in a node; -1 for no word.
    """

    characters: str
    edge_keys: Array
    labels: Array


def build_word_scorer(automaton: BackoffAutomaton, words: Sequence[str], pieces: Sequence[str]) -> WordScorer:
    """Build a scorer of tokens from a language model over words.

    Args:
        automaton: the language model. Label i is `words[i]`, and the last label is the unknown word.
        words: the words of the model, at least one.
        pieces: the tokens 0 to V - 1 of the speech model as text.

    Returns:
        The scorer.

    Raises:
        ValueError: the language model has no words.
    """
    if not words:
        raise ValueError(
            "a language model over words must have at least one word besides <s>, </s> and <unk>, got none"
        )
    trie = build_trie(words)
    is_lower_case = all(word == word.lower() for word in words)
    texts = [clean_piece(piece, is_lower_case) for piece in pieces]
    symbol_of_character = {character: symbol for symbol, character in enumerate(trie.characters)}
    num_characters = len(trie.characters)
    symbol_of_character[WORD_START] = num_characters + 2
    symbols = np.full((len(pieces), max(1, *map(len, texts))), num_characters + 3)
    for token, text in enumerate(texts):
        for position, character in enumerate(text):
            other_symbol = num_characters + is_punctuation_mark(character)
            symbols[token, position] = symbol_of_character.get(character, other_symbol)
    is_boundary = symbols == num_characters + 2
    is_punctuation = [*map(is_punctuation_mark, trie.characters), False, True, False, False]
    # characters outside the trie have the label of the unknown word
    node_labels = np.append(trie.labels, automaton.num_labels - 1)
    edge_keys, edge_targets = build_edges(trie)
    estimates = None
    if len(pieces) <= MAX_ESTIMATED_TOKENS:
        estimates = torch.from_numpy(estimate_scores(trie, automaton.root_scores[0].numpy()))
    return WordScorer(
        automaton=automaton,
        edge_keys=torch.from_numpy(edge_keys),
        edge_targets=torch.from_numpy(edge_targets),
        word_labels=torch.from_numpy(np.tile(node_labels, 2).astype(np.int32)),
        word_estimates=estimates,
        symbols=torch.from_numpy(symbols),
        symbol_counts=torch.tensor([len(text) for text in texts]),
        is_punctuation=torch.tensor(is_punctuation),
        starts_word=torch.from_numpy(is_boundary[:, 0].astype(np.float32)),
        inner_boundary_tokens=torch.from_numpy(np.flatnonzero(is_boundary[:, 1:].any(1))),
        boundary_positions=tuple(np.flatnonzero(is_boundary.any(0)).tolist()),
    )


def build_edges(trie: WordTrie) -> tuple[Array, Array]:
    """Build the edges between word states from a trie.

    Punctuation before the first letter of a word is ignored, so the state after it has the edges of the empty word.

    Args:
        trie: the trie.

    Returns:
        (E,) int64 keys and (E,) int64 next word states, with a last key that is larger than every key that occurs.
    """
    num_symbols = len(trie.characters) + NUM_OTHER_SYMBOLS
    # the nodes of the trie and the node of characters outside the trie
    num_nodes = len(trie.labels) + 1
    num_root_edges = int(np.searchsorted(trie.edge_keys, num_symbols))
    keys_after_punctuation = trie.edge_keys[:num_root_edges] + num_nodes * num_symbols
    targets = np.arange(1, len(trie.labels))
    return (
        np.concatenate([trie.edge_keys, keys_after_punctuation, [np.iinfo(np.int64).max]]),
        np.concatenate([targets, targets[:num_root_edges], [0]]),
    )


def estimate_scores(trie: WordTrie, unigram_scores: Array) -> Array:
    """Estimate the score of the incomplete word of every word state.

    Args:
        trie: the trie.
        unigram_scores: (W + 1,) score of each word without the words before it; the last one is that of unknown words.

    Returns:
        (2K,) float32 estimates, see `WordScorer`; 0 without a word.
    """
    num_symbols = len(trie.characters) + NUM_OTHER_SYMBOLS
    unknown_score = unigram_scores[-1]
    # no letter continues a word after punctuation, so the estimate is the score of the word itself
    complete = np.append(np.where(trie.labels == NO_WORD, 0.0, unigram_scores[trie.labels]), unknown_score)
    is_word = (trie.labels != NO_WORD) & (trie.labels != len(unigram_scores) - 1)
    best = np.where(is_word, complete[:-1], -np.inf).tolist()
    # the number of a node is larger than that of its parent
    for node, key in zip(range(len(best) - 1, 0, -1), trie.edge_keys[::-1].tolist(), strict=True):
        parent = key // num_symbols
        best[parent] = max(best[parent], best[node])
    best[0] = 0.0
    return np.concatenate([best, [unknown_score], complete]).astype(np.float32)


def build_trie(words: Sequence[str]) -> WordTrie:
    """Build the trie of words level by level.

    A node that is not a word has the label of the unknown word, `len(words)`. If its last character is punctuation, it
    has the label of its parent instead, because a word is looked up without the punctuation at its end.

    Args:
        words: different words; the label of a word is its index.

    Returns:
        The trie. Its keys leave room for `NUM_OTHER_SYMBOLS` symbols after the characters.
    """
    lengths = np.array([len(word) for word in words])
    first_characters = np.cumsum(lengths) - lengths
    code_points = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32)
    characters, symbols = np.unique(code_points, return_inverse=True)
    is_punctuation = np.array([is_punctuation_mark(chr(character)) for character in characters])
    num_symbols = len(characters) + NUM_OTHER_SYMBOLS
    # node of the first characters of each word
    nodes = np.zeros(len(words), np.int64)
    edge_keys, labels, num_nodes = [], [np.array([NO_WORD])], 1
    for depth in range(lengths.max()):
        longer = np.flatnonzero(lengths > depth)
        keys, edges = np.unique(
            nodes[longer] * num_symbols + symbols[first_characters[longer] + depth], return_inverse=True
        )
        parents, last_symbols = np.divmod(keys, num_symbols)
        parent_labels = labels[-1][parents - (num_nodes - len(labels[-1]))]
        level_labels = np.where(is_punctuation[last_symbols], parent_labels, len(words))
        nodes[longer] = num_nodes + edges
        complete = longer[lengths[longer] == depth + 1]
        level_labels[nodes[complete] - num_nodes] = complete
        edge_keys.append(keys)
        labels.append(level_labels)
        num_nodes += len(keys)
    return WordTrie("".join(map(chr, characters)), np.concatenate(edge_keys), np.concatenate(labels))


def clean_piece(piece: str, is_lower_case: bool) -> str:
    """Return the characters that a token appends to the text, with `▁` at the start of a word.

    Args:
        piece: the token as text.
        is_lower_case: whether the language model has no upper-case letters.

    Returns:
        The characters. They are empty for markup such as `<en>`, and the replacement character for `<unk>` and for the
        bytes of characters outside the vocabulary. Characters for private use, which make the tokens of several
        languages distinct, are removed.
    """
    if MARKUP_PATTERN.fullmatch(piece):
        return ""
    if BYTE_OR_UNKNOWN_PATTERN.fullmatch(piece):
        return "\ufffd"
    text = "".join(character for character in piece if unicodedata.category(character) != "Co")
    return text.lower() if is_lower_case else text


def is_punctuation_mark(character: str) -> bool:
    """Return whether a character is punctuation in Unicode, such as a comma, a hyphen or an apostrophe.

    Args:
        character: one character.
    """
    return unicodedata.category(character).startswith("P")
