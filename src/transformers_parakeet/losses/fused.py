"""The transducer loss fused with the joint network: scores of a few cells at a time, forward and backward.

The sum over paths is in `lattice.py`, the loss as users call it in `losses.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .lattice import Flow, Located, Task, accurate, locate, of_cells, refuse_second_derivative, solve, to_gradient


@dataclass(frozen=True)
class Joint:
    """Settings of the joint network.

    Args:
        tokens: V, the first of the outputs; the others are durations.
        activation: name of the activation.
        dropout: probability of zeroing an input of the output layer.
        seed: of the dropout.
        workspace_bytes: memory for scores.
    """

    tokens: int
    activation: str
    dropout: float
    seed: int
    workspace_bytes: int


class _Scorer:
    """The joint network on some cells; scores stand in rows of 16 n columns, which matrix products like."""

    def __init__(
        self, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None, task: Task, joint: Joint,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.task, self.joint, self.dtype = task, joint, dtype
        self.frames, self.prefixes = encoder.flatten(0, 1), predictor.flatten(0, 1)
        self.weight = weight.to(dtype)
        self.bias = self.weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
        self.columns = -(-joint.tokens // 16) * 16
        exact = accurate(dtype)
        self.row_bytes = self.columns * exact.itemsize + (joint.tokens * dtype.itemsize if dtype != exact else 0)
        # hidden values and their gradients: about six rows of J
        cell_bytes = self.row_bytes + 6 * weight.shape[1] * exact.itemsize
        # on a CPU a chunk is best small enough for its caches
        share = 8 if weight.device.type == "cpu" else 2
        self.chunk = min(max(1, joint.workspace_bytes // share // cell_bytes), max(1, len(task.cells)))
        # chunks whose scores backward finds again
        self.kept = (joint.workspace_bytes - self.chunk * cell_bytes) // max(1, self.chunk * self.row_bytes)
        if dtype != exact:
            self.kept = 0

    def buffer(self) -> Tensor:
        """Memory for the scores of one chunk."""
        return self.weight.new_empty(self.chunk, self.columns, dtype=accurate(self.dtype))

    def inputs(self, at: Located) -> Tensor:
        """(C, J) sums of frame and prefix."""
        return self.frames[at.frame] + self.prefixes[at.prefix]

    def hidden(self, inputs: Tensor, cells: Tensor) -> Tensor:
        """(C, J) inputs of the output layer."""
        hidden = ACT2FN[self.joint.activation](inputs)
        if self.joint.dropout > 0:
            keep = _keep(cells, inputs.shape[1], self.joint)
            hidden = hidden * keep.to(hidden.dtype) / (1 - self.joint.dropout)
        return hidden.to(self.dtype)

    def tokens(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """(C, 16 n) raw token scores, in the buffer."""
        rows, count = buffer[: len(hidden)], self.joint.tokens
        weight, bias = self.weight[:count], self.bias[:count]
        if rows.dtype == self.dtype:
            torch.addmm(bias, hidden, weight.t(), out=rows[:, :count])
        else:
            rows[:, :count] = F.linear(hidden, weight, bias)
        # the padding never wins
        rows[:, count:] = -math.inf
        return rows

    def spans(self, hidden: Tensor) -> Tensor:
        """(C, D) raw duration scores."""
        count = self.joint.tokens
        return F.linear(hidden, self.weight[count:], self.bias[count:]).to(accurate(self.dtype))


def _keep(cells: Tensor, width: int, joint: Joint) -> Tensor:
    """(C, J) mask of what dropout keeps: a hash of seed, cell and input, so that backward finds the same one."""
    bits = cells[:, None] * width + torch.arange(width, device=cells.device) + joint.seed
    # the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), in two's complement
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor
    return (bits >> 40 & 0xFFFFFF) >= joint.dropout * 2**24


def fused_losses(
    encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None, task: Task, joint: Joint
) -> Tensor:
    """Compute the losses (B,) from frames (B, T, J), prefixes (B, U+1, J) and the output layer."""
    device = encoder.device.type
    dtype = torch.promote_types(encoder.dtype, weight.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _FusedLoss.apply(encoder, predictor, weight, bias, task, joint, dtype)


class _FusedLoss(torch.autograd.Function):
    """Losses (B,) from the inputs of the joint network."""

    @staticmethod
    def forward(
        ctx: Any, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None, task: Task, joint: Joint,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Score the valid cells chunk by chunk, keep what the lattice needs, and sum the paths."""
        with torch.autocast(weight.device.type, enabled=False):
            scorer = _Scorer(encoder, predictor, weight, bias, task, joint, dtype)
            keep = scorer.kept if any(ctx.needs_input_grad) else 0
            blank, label, spans, ctx.kept = _score(scorer, keep)
            losses, flow = solve(task, blank, label, spans if task.timed else None)
        ctx.task, ctx.joint, ctx.dtype = task, joint, dtype
        ctx.save_for_backward(encoder, predictor, weight, bias, flow.blank, flow.label, flow.spans)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Turn the scores of each chunk into gradients and add them up."""
        refuse_second_derivative()
        encoder, predictor, weight, bias, *flow = ctx.saved_tensors
        # used up: with `retain_graph` the next backward computes them again
        kept, ctx.kept = ctx.kept, []
        with torch.autocast(weight.device.type, enabled=False):
            scorer = _Scorer(encoder, predictor, weight, bias, ctx.task, ctx.joint, ctx.dtype)
            return _Collector(scorer, Flow(*flow), gradient, ctx.needs_input_grad).run(kept)


def _in_place(function: Callable[..., Tensor], scores: Tensor) -> None:
    """Apply `torch.softmax` or `torch.log_softmax` to the last dimension."""
    if scores.device.type == "cpu":
        # torch's CPU kernel reads a row before it writes it
        function(scores, -1, out=scores)
    else:
        scores.copy_(function(scores, -1))


def _score(scorer: _Scorer, keep: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Score every valid cell.

    Returns:
        Log-probabilities (C,) of the blank, (C,) of the next label and (C, D) of the durations, and the first `keep`
        chunks of those of all tokens.
    """
    task = scorer.task
    cells, dtype = task.cells, accurate(scorer.dtype)
    blank, label = (torch.empty(len(cells), dtype=dtype, device=cells.device) for _ in range(2))
    spans = torch.empty(len(cells), len(task.durations), dtype=dtype, device=cells.device)
    kept: list[Tensor] = []
    buffer = None
    for start in range(0, len(cells), scorer.chunk):
        some = slice(start, start + scorer.chunk)
        at = locate(task, cells[some])
        hidden = scorer.hidden(scorer.inputs(at), cells[some])
        if len(kept) < keep:
            kept.append(scorer.buffer())
        elif buffer is None:
            buffer = scorer.buffer()
        scores = scorer.tokens(hidden, kept[-1] if buffer is None else buffer)
        _in_place(torch.log_softmax, scores)
        blank[some] = scores[:, task.blank]
        label[some] = scores.gather(1, at.next_label[:, None])[:, 0]
        if task.timed:
            spans[some] = scorer.spans(hidden).log_softmax(-1)
    return blank, label, spans, kept


class _Collector:
    """Adds up the gradients of the joint network's inputs and parameters in one backward pass."""

    def __init__(self, scorer: _Scorer, flow: Flow, gradient: Tensor, needs: Sequence[bool]) -> None:
        self.scorer, self.task, self.needs = scorer, scorer.task, needs
        task = self.task
        # the arcs of all the cells that are skipped together are fewer than the rounding of one
        limit = torch.finfo(gradient.dtype).eps / 2 / (task.frames * (task.labels + 1)).clamp(min=1).to(gradient.dtype)
        scale = of_cells(task, gradient)
        # what is not a number counts
        counts = ~((flow.blank + flow.label) <= of_cells(task, limit)) & (scale != 0)
        self.active = counts.nonzero()[:, 0]
        self.flow = Flow(flow.blank * scale, flow.label * scale, flow.spans * scale[:, None])
        dtype = accurate(scorer.dtype)
        shapes = scorer.frames, scorer.prefixes, scorer.weight, scorer.bias
        self.sums = [torch.zeros_like(like, dtype=dtype) if need else None
                     for like, need in zip(shapes, needs, strict=False)]  # fmt: skip

    def run(self, kept: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Visit the cells that count; return what `_FusedLoss.backward` does."""
        chunk = self.scorer.chunk
        for index, scores in enumerate(kept):
            start = index * chunk
            which = self.active[(self.active >= start) & (self.active < start + chunk)]
            if len(which):
                rows = scores[: len(which)] if len(which) == min(chunk, len(self.task.cells) - start) else None
                self._add(which, (scores[which - start] if rows is None else rows).exp_())
        left = self.active[self.active >= len(kept) * chunk]
        buffer = self.scorer.buffer() if len(left) else None
        for start in range(0, len(left), chunk):
            self._add(left[start : start + chunk], None, buffer)
        encoder, predictor, weight, bias = self.sums
        batch, frames, width = self.task.shape
        return (
            None if encoder is None else encoder.unflatten(0, (batch, frames)).to(self.scorer.frames.dtype),
            None if predictor is None else predictor.unflatten(0, (batch, width)).to(self.scorer.prefixes.dtype),
            weight, bias, None, None, None,
        )  # fmt: skip

    def _add(self, which: Tensor, tokens: Tensor | None, buffer: Tensor | None = None) -> None:
        """Add the gradients of some cells, given their token probabilities or a buffer to compute them in."""
        task, scorer, flow = self.task, self.scorer, self.flow
        cells = task.cells[which]
        at = locate(task, cells)
        with torch.enable_grad():
            inputs = scorer.inputs(at).detach().requires_grad_()
            hidden = scorer.hidden(inputs, cells)
        values = hidden.detach()
        if tokens is None:
            assert buffer is not None
            tokens = scorer.tokens(values, buffer)
            _in_place(torch.softmax, tokens)
        to_gradient(tokens, task.blank, at.next_label, flow.blank[which], flow.label[which])
        outputs = [(slice(scorer.joint.tokens), tokens[:, : scorer.joint.tokens].to(scorer.dtype))]
        if task.timed:
            spans = flow.spans[which]
            gradient = scorer.spans(values).softmax(-1) * spans.sum(-1, keepdim=True) - spans
            outputs.append((slice(scorer.joint.tokens, None), gradient.to(scorer.dtype)))
        self._add_head(outputs, values)
        if self.needs[0] or self.needs[1]:
            below = torch.zeros_like(values)
            for rows, gradient in outputs:
                below.addmm_(gradient, scorer.weight[rows])
            (below,) = torch.autograd.grad(hidden, inputs, below)
            for total, index in zip(self.sums, (at.frame, at.prefix), strict=False):
                if total is not None:
                    total.index_add_(0, index, below.to(total.dtype))

    def _add_head(self, outputs: list[tuple[slice, Tensor]], hidden: Tensor) -> None:
        """Add the gradients of the output layer, given those of its outputs."""
        weight, bias = self.sums[2:]
        for rows, gradient in outputs:
            if weight is not None and weight.dtype == gradient.dtype:
                weight[rows].addmm_(gradient.t(), hidden)
            elif weight is not None:
                weight[rows] += gradient.t() @ hidden
            if bias is not None:
                bias[rows] += gradient.sum(0, dtype=bias.dtype)
