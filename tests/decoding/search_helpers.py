"""Language models and phrase boosting as dense tables, for tests of the searches; independent of the package's own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# code point of token 0 in an ARPA file of NeMo
TOKEN_OFFSET = 100


@dataclass(frozen=True)
class TableScorer:
    """A token scorer with one row of scores and of next states per state; state 0 is the first."""

    scores: Tensor
    targets: Tensor

    @property
    def num_labels(self) -> int:
        return self.scores.shape[1]

    def to(self, device) -> "TableScorer":
        return TableScorer(self.scores.to(device), self.targets.to(device))

    def start(self, num_clips: int) -> Tensor:
        return torch.zeros(num_clips, dtype=torch.long)

    def score(self, states: Tensor) -> Tensor:
        return self.scores[states]

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores[states, tokens], self.targets[states, tokens]

    def score_end(self, states: Tensor) -> Tensor:
        return torch.zeros(len(states))


def build_table(start, num_labels, step) -> TableScorer:
    """Follow `step(state, token) -> (score, next state)` from the start over all states and tokens."""
    states, score_rows, target_rows = [start], [], []
    for state in states:
        row = [step(state, token) for token in range(num_labels)]
        states += [target for target in dict.fromkeys(target for _, target in row) if target not in states]
        score_rows.append([score for score, _ in row])
        target_rows.append([states.index(target) for _, target in row])
    return TableScorer(torch.tensor(score_rows), torch.tensor(target_rows))


def read_arpa(path, num_labels: int) -> TableScorer:
    """Read a token-level ARPA file as NeMo does (NOTES.md, D.1 to D.3)."""
    scores, backoffs = {}, {}
    for line in path.read_text("utf-8").split("\n"):
        fields = line.split("\t")
        if len(fields) >= 2:
            ngram = tuple(word if len(word) > 1 else ord(word) - TOKEN_OFFSET for word in fields[1].split(" "))
            scores[ngram] = float(fields[0]) * math.log(10)
            backoffs[ngram] = float(fields[2]) * math.log(10) if len(fields) > 2 else 0.0
    order = max(map(len, scores))
    num_absent = sum((token,) not in scores for token in range(num_labels))

    def step(history, token):
        ngram = (*history, token)
        if ngram in scores:
            while len(ngram) == order or ngram not in scores:
                ngram = ngram[1:]
            return scores[(*history, token)], ngram
        if not history:
            return scores[("<unk>",)] - math.log(max(1, num_absent)), ()
        score, target = step(history[1:], token)
        return score + backoffs.get(history, 0.0), target

    return build_table(("<s>",), num_labels, step)


def build_boosting(phrases, num_labels: int, context_score=1.0, depth_scaling=2.0) -> TableScorer:
    """Build the boosting tree of phrases, which are lists of tokens (NOTES.md, D.5 and D.6)."""
    prefixes = {tuple(phrase[:length]) for phrase in phrases for length in range(len(phrase) + 1)}
    ends = {tuple(phrase) for phrase in phrases}

    def arc_score(depth):
        return context_score if depth == 1 else context_score * depth_scaling + math.log(depth)

    def total(prefix):
        return sum(arc_score(depth) for depth in range(1, len(prefix) + 1))

    def step(state, token):
        if (*state, token) in prefixes:
            return arc_score(len(state) + 1), (*state, token)
        if not state:
            return 0.0, ()
        fail = next(state[begin:] for begin in range(1, len(state) + 1) if state[begin:] in prefixes)
        score, target = step(fail, token)
        return score + (0.0 if state in ends else total(fail) - total(state)), target

    return build_table((), num_labels, step)
