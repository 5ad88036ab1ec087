"""Greedy decoding of CTC and transducer scores, and how sure a model is of each token.

Works on tensors and callables only; models, tokenizers and text are for the callers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CONFIDENCE_METHODS = ("max_prob", "entropy")

# order of the Tsallis entropy in NeMo's default confidence (golden numbers: alpha 0.33, exponential normalisation)
TSALLIS_ALPHA = 0.33


def confidence(logits: Tensor, method: str = "max_prob") -> Tensor:
    """Say how sure the scores are of their best token, from 0 (uniform) to 1 (certain).

    Args:
        logits: (..., V) raw scores or log-probabilities of the tokens, the blank included, durations not.
        method: `max_prob`, (p V - 1) / (V - 1) of the best probability p; `entropy`, NeMo's default: Tsallis entropy of
            order 0.33 with exponential normalisation (arXiv 2212.08703).

    Returns:
        (...) float32.

    Raises:
        ValueError: unknown method.
    """
    check_confidence_method(method)
    probabilities = logits.float().softmax(-1)
    classes = probabilities.shape[-1]
    if method == "max_prob":
        return (probabilities.amax(-1) * classes - 1) / (classes - 1)
    entropy = (1 - (probabilities**TSALLIS_ALPHA).sum(-1)) / (1 - TSALLIS_ALPHA)
    uniform = torch.tensor((1 - classes ** (1 - TSALLIS_ALPHA)) / (1 - TSALLIS_ALPHA)).exp()
    return (entropy.exp() - uniform) / (1 - uniform)


def check_confidence_method(method: str) -> None:
    """Raise ValueError for an unknown method."""
    if method not in CONFIDENCE_METHODS:
        raise ValueError(f"the confidence method must be one of {', '.join(CONFIDENCE_METHODS)}, got {method!r}")


def greedy_ctc(logits: Tensor, lengths: Tensor | None, blank_id: int) -> Tensor:
    """Take the best token of every frame; repeats and blanks are still in.

    Args:
        logits: (B, N, V) scores.
        lengths: (B,) valid frames; `None` when all are.
        blank_id: token of the frames past a clip's end.

    Returns:
        (B, N) token ids.
    """
    best = logits.argmax(-1)
    if lengths is None:
        return best
    inside = torch.arange(best.shape[1], device=best.device) < lengths[:, None]
    return torch.where(inside, best, blank_id)


# frames that one call of the joint scores: so many cost little more than one, as the call is bound by reading the
# weights, and those of one row beyond which the next label almost always lies
FRAMES_PER_CALL = 32
FRAMES_PER_ROW = 4

# share of the rows that the prediction network waits for: it is as dear as the joint, and as cheap for many as for one
WAIT_FOR = 0.6

# (rows' last tokens (R,), rows' state) -> predictor states (R, J), new state; the state is a tuple of (layers, R, P)
Predict = Callable[[Tensor, Any], tuple[Tensor, Any]]
# (frames (R, K, J), predictor states (R, 1, J)) -> scores (R, K, V + D)
Joint = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shortcuts:
    """What a joint network can tell faster than by all its scores, from the arguments of `Joint`.

    Args:
        durations: the best duration outputs (R, K). They say where a row goes while it is blank, so that only frames on
            its way are scored.
        tokens: the best tokens (R, K), where no scores are wanted and no durations, or these known.
    """

    durations: Callable[[Tensor, Tensor], Tensor] | None = None
    tokens: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class TransducerOptions:
    """What greedy transducer decoding needs to know.

    Args:
        blank_id: the blank.
        vocab_size: tokens V, the blank included; scores behind them are durations.
        durations: frames of each duration output; `None` for RNN-T, where a label stays and a blank moves one frame.
        max_symbols: labels on one frame after which one frame is moved.
        max_steps: steps, blanks included, after which a row stops.
        forced_blanks: write a forced move as a blank step of its own and keep the predicted duration of the label, as
            NeMo does; else the label's duration becomes 1, as in stock transformers' RNN-T.
        lookahead: frames scored ahead per row; 0 chooses by the batch.
        confidence: method of `confidence`, or nothing.
        keep_scores: keep the scores of every step.
    """

    blank_id: int
    vocab_size: int
    durations: tuple[int, ...] | None = None
    max_symbols: int = 10
    max_steps: int | None = None
    forced_blanks: bool = True
    lookahead: int = 0
    confidence: str | None = None
    keep_scores: bool = False

    def __post_init__(self) -> None:
        if self.confidence is not None:
            check_confidence_method(self.confidence)


@dataclass(frozen=True)
class Hypotheses:
    """The steps of greedy transducer decoding, blanks included; what lies past a row's length is 0 or `pad`.

    Args:
        tokens: (B, S) token or blank of every step.
        frames: (B, S) frame at which the step was taken.
        durations: (B, S) frames it advanced.
        scores: (B, S) confidence of the labels, 0 on blanks; `None` unless asked for.
        lengths: (B,) steps of each row.
        logits: (B, S, V + D) scores of every step; `None` unless asked for.
    """

    tokens: Tensor
    frames: Tensor
    durations: Tensor
    scores: Tensor | None
    lengths: Tensor
    logits: Tensor | None = None


@dataclass
class _Row:
    """One row in decoding: where it is, its last label, and what it has done."""

    length: int
    options: TransducerOptions
    frame: int = 0
    symbols: int = 0
    stopped: bool = False
    label: int = 0
    label_step: int = 0
    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def done(self) -> bool:
        limit = self.options.max_steps
        return self.stopped or self.frame >= self.length or (limit is not None and len(self.tokens) >= limit)

    def walk(self, frames: list[int], tokens: list[int], durations: list[int], logits: Tensor | None) -> int | None:
        """Take steps as scored on some frames ahead, up to the first label; return its place among them."""
        for place, frame in enumerate(frames):
            if frame != self.frame or self.done:
                # jumped over, or behind the end
                continue
            if logits is not None:
                self.logits.append(logits[place])
            if tokens[place] != self.options.blank_id:
                self._label(tokens[place], durations[place])
                return place
            self._step(self.options.blank_id, max(durations[place], 1))
        return None

    def _label(self, token: int, duration: int) -> None:
        self.label, self.label_step = token, len(self.tokens)
        forced = duration == 0 and self.symbols + 1 == self.options.max_symbols
        self._step(token, 1 if forced and not self.options.forced_blanks else duration)
        if forced and self.options.forced_blanks and not self.done:
            if self.logits:
                # nothing was scored for this step
                self.logits.append(torch.zeros_like(self.logits[-1]))
            self._step(self.options.blank_id, 1)

    def _step(self, token: int, duration: int) -> None:
        self.symbols = 0 if duration else self.symbols + 1
        self.tokens.append(token)
        self.frames.append(self.frame)
        self.durations.append(duration)
        self.scores.append(0.0)
        self.frame += duration


def greedy_transducer(
    encoded: Tensor,
    lengths: Tensor,
    predict: Predict,
    joint: Joint,
    options: TransducerOptions,
    pad_id: int = 0,
    shortcuts: Shortcuts = Shortcuts(),
    on_step: Callable[[list[list[int]]], Sequence[bool]] | None = None,
) -> Hypotheses:
    """Decode RNN-T or TDT scores greedily, all rows together (label looping, arXiv 2406.06220).

    The joint scores the frames ahead of each row; the prediction network runs only for rows that emitted a label.

    Args:
        encoded: (B, N, J) frames, projected to the joint's width.
        lengths: (B,) valid frames.
        predict: the prediction network.
        joint: the joint network.
        options: see `TransducerOptions`.
        pad_id: token past a row's end in the result.
        shortcuts: of the joint network.
        on_step: called after every step with the tokens of all rows; returns which rows are to stop.

    Returns:
        `Hypotheses`.
    """
    batch, frames = encoded.shape[:2]
    rows = [_Row(min(length, frames), options) for length in lengths.tolist()]
    start = torch.full((batch,), options.blank_id, device=encoded.device)
    predicted, state = predict(start, None)
    search = _Search(encoded, rows, joint, shortcuts, options)
    active = [index for index, row in enumerate(rows) if not row.done]
    while active:
        searching = active
        while len(searching) > (1 - WAIT_FOR) * len(active):
            searching = search(predicted, searching)
            if on_step is not None:
                for row, stop in zip(rows, on_step([row.tokens for row in rows]), strict=True):
                    row.stopped = row.stopped or bool(stop)
                searching = [index for index in searching if not rows[index].done]
        labelled = [index for index in active if index not in searching and not rows[index].done]
        if labelled:
            predicted, state = _predict_rows(predict, predicted, state, rows, labelled)
        active = [index for index in active if not rows[index].done]
    return _collect(rows, pad_id, encoded.device)


class _Search:
    """Scores frames ahead of rows and walks each row up to its next label."""

    def __init__(
        self, encoded: Tensor, rows: list[_Row], joint: Joint, shortcuts: Shortcuts, options: TransducerOptions
    ) -> None:
        self.encoded, self.rows, self.joint, self.options = encoded, rows, joint, options
        self.durations = shortcuts.durations
        moves_known = options.durations is None or self.durations is not None
        wants_scores = options.confidence or options.keep_scores
        self.tokens = shortcuts.tokens if moves_known and not wants_scores else None
        self.values = options.durations or ()
        self.last = encoded.shape[1] - 1

    def __call__(self, predicted: Tensor, searching: list[int]) -> list[int]:
        """Search once; return the rows that found no label.

        Args:
            predicted: (B, J) predictor states.
            searching: the rows to search for.
        """
        options = self.options
        ahead = options.lookahead or min(FRAMES_PER_ROW, max(1, FRAMES_PER_CALL // len(searching)))
        states = predicted.index_select(0, torch.tensor(searching, device=predicted.device))[:, None]
        moves = None
        if self.durations is None:
            frames = self._onwards(searching, ahead)
        else:
            frames, moves = self._way(self.durations, searching, states, ahead)
        scored = self._encoded(searching, frames)
        logits = None
        if self.tokens is not None:
            best = self.tokens(scored, states).tolist()
        else:
            logits = self.joint(scored, states)
            # `max` is faster than `argmax` where the scores of one frame are not neighbours in memory
            best = logits[..., : options.vocab_size].max(-1).indices.tolist()
        if logits is not None and moves is None and options.durations is not None:
            moves = self._values(logits[..., options.vocab_size :].argmax(-1))
        if moves is None:
            # a label of RNN-T stays, a blank moves one frame
            moves = [[int(token == options.blank_id) for token in tokens] for tokens in best]
        found, remaining = [], []
        steps = zip(searching, frames, best, moves, strict=True)
        for place, (index, at, tokens, durations) in enumerate(steps):
            kept = logits[place] if logits is not None and options.keep_scores else None
            label = self.rows[index].walk(at, tokens, durations, kept)
            if label is not None:
                found.append((place, label))
            elif not self.rows[index].done:
                remaining.append(index)
        if found and logits is not None and options.confidence:
            places, labels = (list(part) for part in zip(*found, strict=True))
            scores = confidence(logits[places, labels, : options.vocab_size], options.confidence)
            for place, value in zip(places, scores.tolist(), strict=True):
                row = self.rows[searching[place]]
                row.scores[row.label_step] = value
        return remaining

    def _onwards(self, searching: list[int], count: int) -> list[list[int]]:
        """Return so many frames from where each row is; the last one again behind the end."""
        starts = [self.rows[index].frame for index in searching]
        return [[min(start + ahead, self.last) for ahead in range(count)] for start in starts]

    def _encoded(self, searching: list[int], frames: list[list[int]]) -> Tensor:
        """Return frames of some rows (R, K, J)."""
        count = self.last + 1
        places = [index * count + frame for index, row in zip(searching, frames, strict=True) for frame in row]
        picked = self.encoded.flatten(0, 1).index_select(0, torch.tensor(places, device=self.encoded.device))
        return picked.unflatten(0, (len(searching), -1))

    def _values(self, best: Tensor) -> list[list[int]]:
        """Return the durations of duration outputs (R, K)."""
        return [[self.values[output] for output in row] for row in best.tolist()]

    def _way(
        self, durations: Callable[[Tensor, Tensor], Tensor], searching: list[int], states: Tensor, ahead: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return the frames that rows come by as long as they are blank, and how far each takes them."""
        window = self._onwards(searching, 1 + (ahead - 1) * max(1, *self.values))
        frames, moves = [], []
        values = self._values(durations(self._encoded(searching, window), states))
        for row, jumps in zip(window, values, strict=True):
            places = [0]
            for _ in range(ahead - 1):
                places.append(places[-1] + max(1, jumps[places[-1]]))
            frames.append([row[place] for place in places])
            moves.append([jumps[place] for place in places])
        return frames, moves


def _predict_rows(
    predict: Predict, predicted: Tensor, state: Any, rows: list[_Row], labelled: list[int]
) -> tuple[Tensor, Any]:
    """Run the prediction network for the rows that emitted a label; the others keep output and state."""
    tokens = torch.tensor([rows[index].label for index in labelled], device=predicted.device)
    if len(labelled) == len(predicted):
        return predict(tokens, state)
    index = torch.tensor(labelled, device=predicted.device)
    output, after = predict(tokens, tuple(part[:, index] for part in state))
    state = tuple(part.index_copy(1, index, new) for part, new in zip(state, after, strict=True))
    return predicted.index_copy(0, index, output), state


def _collect(rows: list[_Row], pad_id: int, device: torch.device) -> Hypotheses:
    """Pad the rows to one batch."""
    lengths = [len(row.tokens) for row in rows]
    width = max(lengths, default=0)

    def padded(values: list[list[Any]], fill: float) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values], device=device).reshape(
            len(rows), width
        )

    options = rows[0].options
    logits = None
    if options.keep_scores:
        kept = [torch.stack(row.logits) if row.logits else torch.zeros(0, 1) for row in rows]
        wide = max(part.shape[1] for part in kept)
        logits = torch.zeros(len(rows), width, wide, device=device)
        for index, part in enumerate(kept):
            logits[index, : len(part), : part.shape[1]] = part
    return Hypotheses(
        tokens=padded([row.tokens for row in rows], pad_id).long(),
        frames=padded([row.frames for row in rows], 0).long(),
        durations=padded([row.durations for row in rows], 0).long(),
        scores=padded([row.scores for row in rows], 0.0).float() if options.confidence else None,
        lengths=torch.tensor(lengths, device=device),
        logits=logits,
    )
