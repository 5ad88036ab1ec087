"""Token scorers for the tests of all searches, each with a plain function that scores labels from all labels before."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from ngram_helpers import draw_orders, score_word, write_arpa
from torch import Tensor

from transformers_parakeet.decoding import BoostedPhrase, Fusion, build_boosting_tree, load_language_model

Labels = tuple[int, ...]


@dataclass(frozen=True)
class TableScorer:
    """A token scorer that consists of tables.

    Args:
        scores: (S, V) score of each token in each state; the first state is 0.
        targets: (S, V) next state.
        end_scores: (S,) score of the end of the clip.
    """

    scores: Tensor
    targets: Tensor
    end_scores: Tensor

    @property
    def num_labels(self) -> int:
        """Number of labels V."""
        return self.scores.shape[1]

    def to(self, device) -> "TableScorer":
        """Return the scorer with its tensors on a device."""
        return TableScorer(self.scores.to(device), self.targets.to(device), self.end_scores.to(device))

    def start(self, num_clips: int) -> Tensor:
        """Return the (B,) states before the first token."""
        return torch.zeros(num_clips, dtype=torch.long, device=self.scores.device)

    def score(self, states: Tensor) -> Tensor:
        """Return the (N, V) scores of all tokens."""
        return self.scores[states]

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (N,) scores of tokens and the next states."""
        return self.scores[states, tokens], self.targets[states, tokens]

    def bound_scores(self, states: Tensor) -> Tensor:
        """Return the (N,) largest scores."""
        return self.scores[states].amax(1)

    def score_end(self, states: Tensor) -> Tensor:
        """Return the (N,) scores of the end of the clip."""
        return self.end_scores[states]


@dataclass(frozen=True)
class PlainScorer:
    """Scores labels from all labels before them, without states.

    Args:
        score: (labels so far, next label) -> score.
        score_end: labels of a clip -> score of the end of the clip.
    """

    score: Callable[[Labels, int], float]
    score_end: Callable[[Labels], float]


@dataclass(frozen=True)
class PlainFusion:
    """The same as a `Fusion`, one label at a time.

    Args:
        scorers: the plain scorers.
        weights: weight of each scorer.
    """

    scorers: tuple[PlainScorer, ...]
    weights: tuple[float, ...]

    def score(self, labels: Labels, label: int) -> float:
        """Return the weighted score of one more label."""
        pairs = zip(self.scorers, self.weights, strict=True)
        return sum(weight * scorer.score(labels, label) for scorer, weight in pairs)

    def score_end(self, labels: Labels) -> float:
        """Return the weighted score of the end of the clip after labels."""
        pairs = zip(self.scorers, self.weights, strict=True)
        return sum(weight * scorer.score_end(labels) for scorer, weight in pairs)

    def score_all(self, labels: Labels) -> float:
        """Return the weighted score of a sequence of labels, without the score of the end."""
        return sum(self.score(labels[:index], label) for index, label in enumerate(labels))


NO_FUSION = PlainFusion((), ())


def draw_table_scorer(
    num_labels: int, num_states: int, generator: torch.Generator, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> TableScorer:
    """Draw a scorer with random scores and next states."""
    return TableScorer(
        scores=scale * torch.randn(num_states, num_labels, generator=generator, dtype=dtype),
        targets=torch.randint(0, num_states, (num_states, num_labels), generator=generator),
        end_scores=scale * torch.randn(num_states, generator=generator, dtype=dtype),
    )


def score_table_plainly(scorer: TableScorer) -> PlainScorer:
    """Return the plain scorer of a table."""
    scores, targets, end_scores = scorer.scores.tolist(), scorer.targets.tolist(), scorer.end_scores.tolist()

    @cache
    def follow(labels: Labels) -> int:
        """Return the state after labels."""
        return targets[follow(labels[:-1])][labels[-1]] if labels else 0

    return PlainScorer(
        score=lambda labels, label: scores[follow(labels)][label],
        score_end=lambda labels: end_scores[follow(labels)],
    )


def draw_table_fusion(
    num_labels: int, generator: torch.Generator, weights: tuple[float, ...] = (0.8, -0.5), **kwargs
) -> tuple[Fusion, PlainFusion]:
    """Draw one table per weight, with 4 states, 3 states and so on; `kwargs` are those of `draw_table_scorer`."""
    scorers = tuple(draw_table_scorer(num_labels, 4 - index, generator, **kwargs) for index, _ in enumerate(weights))
    return Fusion(scorers, weights), PlainFusion(tuple(map(score_table_plainly, scorers)), weights)


def draw_phrases(rng: random.Random, num_labels: int) -> dict[Labels, float]:
    """Draw phrases with scores, of which some are prefixes, suffixes or parts of others."""
    phrases = {}
    for _ in range(rng.randint(1, 8)):
        tokens = tuple(rng.randrange(num_labels) for _ in range(rng.randint(1, 6)))
        start, end = sorted(rng.sample(range(len(tokens) + 1), 2))
        for part in (tokens, tokens[:end], tokens[start:], tokens[start:end]):
            if part and rng.random() < 0.5:
                phrases[part] = rng.choice([0.5, 1.0, 3.0])
    return phrases or {(0,): 1.0}


def score_phrases_plainly(
    phrases: dict[Labels, float], depth_scaling: float = 2.0, unk_score: float = 0.0
) -> PlainScorer:
    """Return the scorer of phrases by NeMo's rules, without an automaton.

    Args:
        phrases: tokens of each phrase -> score of its first token.
        depth_scaling: factor of the score for all further tokens of a phrase.
        unk_score: score of a token that neither begins nor continues a phrase.
    """

    @cache
    def arc_score(prefix: Labels) -> float | None:
        """Score the last token of a prefix of a phrase; `None` if it is not one."""
        scores = [score for phrase, score in phrases.items() if phrase[: len(prefix)] == prefix]
        depth = len(prefix)
        return max((score if depth == 1 else score * depth_scaling + math.log(depth) for score in scores), default=None)

    def gain(prefix: Labels) -> float:
        """Sum the scores of the tokens of a prefix."""
        return sum(arc_score(prefix[:depth]) for depth in range(1, len(prefix) + 1))

    def match_suffix(tokens: Labels) -> Labels:
        """Return the longest suffix of the tokens that is a prefix of a phrase."""
        suffixes = [tokens[start:] for start in range(len(tokens))]
        return next((suffix for suffix in suffixes if arc_score(suffix) is not None), ())

    def score(labels: Labels, label: int) -> float:
        """Score the next label."""
        match, total = match_suffix(labels), 0.0
        while arc_score((*match, label)) is None:
            if not match:
                return total + unk_score
            shorter_match = match_suffix(match[1:])
            total += 0.0 if match in phrases else gain(shorter_match) - gain(match)
            match = shorter_match
        return total + arc_score((*match, label))

    return PlainScorer(score, lambda _labels: 0.0)


def score_ngrams_plainly(orders: list[dict], pieces: list[str]) -> PlainScorer:
    """Return the scorer of an n-gram model over tokens by the definition of back-off.

    Args:
        orders: the n-grams of each order, as in `draw_orders`.
        pieces: the words of the labels. Those without a 1-gram share the probability of `<unk>`.
    """
    num_absent = sum((piece,) not in orders[0] for piece in pieces)

    def list_words(labels: Labels) -> list[str]:
        """Return the words that are the context of the next label. An absent label has the empty context."""
        words = ["<s>"]
        for label in labels:
            words = [*words, pieces[label]] if (pieces[label],) in orders[0] else []
        return words

    def score(labels: Labels, label: int) -> float:
        """Score the next label."""
        if (pieces[label],) in orders[0]:
            return score_word(orders, list_words(labels), pieces[label])
        return score_word(orders, list_words(labels), "<unk>") - math.log(num_absent)

    return PlainScorer(score, lambda labels: score_word(orders, list_words(labels), "</s>"))


def draw_ngram_fusion(folder: Path, seed: int, num_labels: int, weight: float = 0.7) -> tuple[Fusion, PlainFusion]:
    """Draw an n-gram model, and load it from its ARPA file. In every third model the last label has no 1-gram."""
    rng = random.Random(seed)
    pieces = [f"▁{label}" for label in range(num_labels)]
    num_absent = int(num_labels > 1 and seed % 3 == 0)
    orders = draw_orders(rng, pieces[: num_labels - num_absent], rng.randint(2, 3), unknown_in_ngrams=False)
    scorer = load_language_model(write_arpa(folder / f"{seed}.arpa", orders), pieces)
    return Fusion((scorer,), (weight,)), PlainFusion((score_ngrams_plainly(orders, pieces),), (weight,))


def draw_boosting_fusion(seed: int, num_labels: int, weight: float = 1.2) -> tuple[Fusion, PlainFusion]:
    """Draw phrases, and build their boosting tree."""
    phrases = draw_phrases(random.Random(seed), num_labels)
    scorer = build_boosting_tree([BoostedPhrase(*phrase) for phrase in phrases.items()], num_labels)
    return Fusion((scorer,), (weight,)), PlainFusion((score_phrases_plainly(phrases),), (weight,))


def total_score(tree, tokens):
    """Sum the scores of tokens from the start."""
    state, total = tree.start(1), 0.0
    for token in tokens:
        score, state = tree.step(state, torch.tensor([token]))
        total += score.item()
    return total
