"""Helpers for the tests of CTC beam search: token scorers, a plain search by enumeration, and the golden cases."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import groupby, product

import soundfile
import torch
from conftest import TESTS
from torch import Tensor

import transformers_parakeet as tp
from transformers_parakeet.decoding.fusion import Fusion

GOLDEN = TESTS / "golden"
# token i is the character i + 100 in the golden n-gram model
TOKEN_OFFSET = 100


@dataclass(frozen=True)
class TableScorer:
    """A token scorer held as tables: the score and the next state of each token in each state.

    Args:
        scores: (S, V) score of each token in each state.
        targets: (S, V) next state.
        end_scores: (S,) score of the end of the clip.
        start_state: state before the first token.
    """

    scores: Tensor
    targets: Tensor
    end_scores: Tensor
    start_state: int = 0

    @property
    def num_labels(self) -> int:
        """Number of labels V."""
        return self.scores.shape[1]

    def to(self, device) -> "TableScorer":
        """Return the scorer with its tensors on a device."""
        return TableScorer(
            self.scores.to(device), self.targets.to(device), self.end_scores.to(device), self.start_state
        )

    def start(self, num_clips: int) -> Tensor:
        """Return the (B,) states before the first token."""
        return torch.full((num_clips,), self.start_state, device=self.scores.device)

    def score(self, states: Tensor) -> Tensor:
        """Return the (N, V) scores of all tokens."""
        return self.scores[states].float()

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (N,) scores of tokens and the next states."""
        return self.scores[states, tokens].float(), self.targets[states, tokens]

    def score_end(self, states: Tensor) -> Tensor:
        """Return the (N,) scores of the end of the clip."""
        return self.end_scores[states].float()


def make_random_scorer(num_labels: int, num_states: int, generator: torch.Generator) -> TableScorer:
    """Return a scorer with random scores and transitions."""
    return TableScorer(
        scores=torch.randn(num_states, num_labels, generator=generator),
        targets=torch.randint(0, num_states, (num_states, num_labels), generator=generator),
        end_scores=torch.randn(num_states, generator=generator),
    )


def score_labels(labels: tuple[int, ...], fusion: Fusion | None, label_bonus: float) -> float:
    """Return the scores of fusion and the bonuses of a sequence of labels, one label at a time."""
    total = label_bonus * len(labels)
    if fusion is not None:
        for scorer, weight in zip(fusion.scorers, fusion.weights, strict=True):
            state = scorer.start_state
            for label in labels:
                total += weight * float(scorer.scores[state, label])
                state = int(scorer.targets[state, label])
            total += weight * float(scorer.end_scores[state])
    return total


def enumerate_alignments(
    logits: Tensor, fusion: Fusion | None = None, label_bonus: float = 0.0
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Score every label sequence of a clip by enumeration of all alignments in float64. The blank is the last token.

    Args:
        logits: (T, V) scores.
        fusion: language models and phrase boosting.
        label_bonus: score that is added for each label.

    Returns:
        For each label sequence, the score of the sum of its alignments, and the score of its best alignment.
    """
    log_probabilities = logits.double().log_softmax(-1).tolist()
    num_frames, vocab_size = logits.shape
    alignments = defaultdict(list)
    for tokens in product(range(vocab_size), repeat=num_frames):
        labels = tuple(token for token, _ in groupby(tokens) if token != vocab_size - 1)
        alignments[labels].append(math.fsum(log_probabilities[frame][token] for frame, token in enumerate(tokens)))
    results = {}
    for labels, scores in alignments.items():
        extra = score_labels(labels, fusion, label_bonus)
        best = max(scores)
        results[labels] = (best + math.log(math.fsum(math.exp(score - best) for score in scores)) + extra, best + extra)
    return results


@cache
def read_golden_cases(model_name: str) -> dict:
    """Return the golden beam search cases of a model."""
    return json.loads((GOLDEN / "search" / f"{model_name}.json").read_text())


@cache
def compute_golden_logits(model_name: str) -> tuple[Tensor, Tensor, object]:
    """Compute the CTC scores of the golden clips with a golden model.

    Returns:
        (B, N, V) scores, (B,) number of frames, and the processor.
    """
    model, processor = tp.load_nemo(GOLDEN / "real_configs" / model_name / "model.nemo")
    model.eval()
    logits, lengths = [], []
    for clip in read_golden_cases(model_name)["clips"]:
        folder = "streaming" if clip == "second" else "real_configs"
        samples, rate = soundfile.read(GOLDEN / folder / "clips" / f"{clip}.wav", dtype="float32")
        inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
        with torch.no_grad():
            clip_logits = model.ctc_logits(model.encoder(**inputs).last_hidden_state)
        logits.append(clip_logits[0])
        lengths.append(len(clip_logits[0]))
    return torch.nn.utils.rnn.pad_sequence(logits, batch_first=True), torch.tensor(lengths), processor


@cache
def read_ngram_model(num_labels: int) -> TableScorer:
    """Read the golden n-gram model to tables. A state is a history; the rules are D1 to D4 of golden2/NOTES.md."""
    lines = (GOLDEN / "search" / "lm.arpa").read_text("utf-8").split("\n")
    weights, backoffs = {}, {}
    for line in lines:
        fields = line.split("\t")
        if len(fields) >= 2:
            words = tuple(fields[1].split(" "))
            weights[words] = float(fields[0]) * math.log(10)
            backoffs[words] = float(fields[2]) * math.log(10) if len(fields) > 2 else 0.0
    order = max(map(len, weights))
    words = [chr(label + TOKEN_OFFSET) for label in range(num_labels)]
    num_unknown = sum((word,) not in weights for word in words)
    unknown_score = weights[("<unk>",)] - (math.log(num_unknown) if num_unknown > 1 else 0.0)

    def score(history: tuple, word: str) -> float:
        """Return the log-probability of a word after a history."""
        if (*history, word) in weights:
            return weights[(*history, word)]
        if not history:
            return unknown_score
        return backoffs[history] + score(history[1:], word)

    def follow(history: tuple, word: str) -> tuple:
        """Return the longest known history that ends in a word."""
        next_history = (*history, word)[-(order - 1) :]
        while next_history and next_history not in backoffs:
            next_history = next_history[1:]
        return next_history

    histories = [(), *(words_ for words_ in backoffs if len(words_) < order and "</s>" not in words_)]
    index = {history: state for state, history in enumerate(histories)}
    return TableScorer(
        scores=torch.tensor([[score(history, word) for word in words] for history in histories]),
        targets=torch.tensor([[index[follow(history, word)] for word in words] for history in histories]),
        end_scores=torch.tensor([score(history, "</s>") for history in histories]),
        start_state=index[("<s>",)],
    )


def build_boosting_tree(
    phrases: list[list[int]], num_labels: int, context_score: float, depth_scaling: float, **_settings: float
) -> TableScorer:
    """Build the golden boosting tree as tables. A state is a prefix of a phrase; see golden2/NOTES.md, D5 and D6."""
    arc_scores = {}
    for phrase in phrases:
        for depth in range(1, len(phrase) + 1):
            score = context_score if depth == 1 else context_score * depth_scaling + math.log(depth)
            arc_scores[tuple(phrase[:depth])] = score
    states = [(), *arc_scores]
    index = {state: number for number, state in enumerate(states)}
    ends = {tuple(phrase) for phrase in phrases}
    sums = {state: sum(arc_scores[state[:depth]] for depth in range(1, len(state) + 1)) for state in states}

    def find_suffix(state: tuple) -> tuple:
        """Return the longest proper suffix of a state that is a state."""
        return next(state[start:] for start in range(1, len(state) + 1) if state[start:] in index)

    def step(state: tuple, label: int) -> tuple[float, tuple]:
        """Return the score of a label after a state, and the next state."""
        longer = (*state, label)
        if longer in arc_scores:
            return arc_scores[longer], longer
        if not state:
            return 0.0, ()
        suffix = find_suffix(state)
        returned = 0.0 if state in ends else sums[suffix] - sums[state]
        score, target = step(suffix, label)
        return returned + score, target

    steps = [[step(state, label) for label in range(num_labels)] for state in states]
    return TableScorer(
        scores=torch.tensor([[score for score, _ in row] for row in steps]),
        targets=torch.tensor([[index[target] for _, target in row] for row in steps]),
        end_scores=torch.zeros(len(states)),
    )
