"""The transducer lattice: sums over all of its paths, and the posterior probability of each arc.

Node (t, u) of a clip means that u labels have been emitted and frame t is read next. Two kinds of arcs leave it:

    blank with duration d > 0:   (t, u) -> (t + d, u),      log-probability blank(t, u, d)
    label with duration d >= 0:  (t, u) -> (t + d, u + 1),  log-probability label(t, u, d)

RNN-T (Graves, arXiv 1211.3711) has blanks of duration 1 and labels of duration 0. TDT (arXiv 2304.06795) also scores
the duration: blank(t, u, d) = log P(blank | t, u) - sigma + log P(d | t, u), and the same for labels. A path starts at
(0, 0) and ends at (T, U); only a blank may enter frame T. log_alpha sums over the paths to a node, log_beta over the
paths from the node to the end:

    log_alpha(t, u) = log sum over d of [ exp(log_alpha(t - d, u)     + blank(t - d, u, d))
                                        + exp(log_alpha(t - d, u - 1) + label(t - d, u - 1, d)) ],  log_alpha(0, 0) = 0

    log_beta(t, u)  = log sum over d of [ exp(blank(t, u, d) + log_beta(t + d, u))
                                        + exp(label(t, u, d) + log_beta(t + d, u + 1)) ],           log_beta(T, U) = 0

    log-likelihood    = log_alpha(T, U) = log_beta(0, 0)
    posterior(an arc) = exp(log_alpha(its source) + its log-probability + log_beta(its target) - log-likelihood)

The posterior is the derivative of the log-likelihood with respect to the log-probability of the arc. log_beta is
computed as the log_alpha of the reversed lattice, in which frames and labels are counted from the end of the clip.

Where the log-probabilities come from is in `transducer.py` (logits) and `fused.py` (joint network). Letters: B clips, T
frames, U labels, V tokens with the blank, D durations, C valid nodes, R lattices in one recursion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# log-probability that replaces minus infinity in running sums: exp(-1e7) is 0, and a float64 sum over thousands of
# labels with this value still holds 6 decimals of the other log-probabilities
LOG_ZERO = -1e7


@dataclass(frozen=True)
class TransducerOptions:
    """Which arcs a lattice has, and how they are weighted.

    Args:
        blank_id: id of the blank.
        durations: number of frames of each duration output of TDT; None for RNN-T.
        sigma: logit under-normalisation of TDT: subtracted from every token log-probability. RNN-T ignores it.
        fastemit_lambda: FastEmit weight (arXiv 2010.11148). The gradients of the token log-probabilities of labels are
            scaled by 1 + lambda, as in NeMo's numba kernels; the loss value stays the negative log-likelihood.
    """

    blank_id: int
    durations: tuple[int, ...] | None
    sigma: float
    fastemit_lambda: float

    @property
    def is_tdt(self) -> bool:
        """Whether durations have scores of their own."""
        return self.durations is not None

    @property
    def arc_durations(self) -> tuple[int, ...]:
        """Number of frames of each kind of arc; RNN-T has labels of 0 frames and blanks of 1 frame."""
        return (0, 1) if self.durations is None else self.durations


@dataclass(frozen=True)
class Lattice:
    """The valid nodes of a batch of lattices.

    Args:
        shape: B, T and U+1 of the padded grid of nodes.
        next_labels: (B, U+1) label that is emitted after u labels; 0 where no label is left.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        nodes: (C,) indices of the valid nodes in the flattened (B, T, U+1) grid, in ascending order.
        options: kinds of arcs and their weights.
    """

    shape: tuple[int, int, int]
    next_labels: Tensor
    frame_lengths: Tensor
    label_lengths: Tensor
    nodes: Tensor
    options: TransducerOptions


@dataclass(frozen=True)
class NodeLogProbs:
    """Log-probabilities of what the C valid nodes can emit.

    Args:
        blank: (C,) of the blank.
        label: (C,) of the next label; any value where no label is left.
        durations: (C, D) of the durations; None for RNN-T.
    """

    blank: Tensor
    label: Tensor
    durations: Tensor | None


@dataclass(frozen=True)
class ArcPosteriors:
    """Posterior probabilities of the arcs that leave the C valid nodes.

    Args:
        blank: (C,) of the blanks, summed over durations.
        label: (C,) of the labels, summed over durations and scaled by FastEmit's 1 + lambda.
        durations: (C, D) of blanks and labels together, without FastEmit.
    """

    blank: Tensor
    label: Tensor
    durations: Tensor

    def to(self, dtype: torch.dtype) -> ArcPosteriors:
        """Convert the posteriors to another type."""
        return ArcPosteriors(self.blank.to(dtype), self.label.to(dtype), self.durations.to(dtype))


@dataclass(frozen=True)
class OutgoingArcs:
    """Log-probabilities of the arcs that leave the C valid nodes; minus infinity where there is no arc.

    Args:
        blank: (C, D) float64.
        label: (C, D) float64.
    """

    blank: Tensor
    label: Tensor


@dataclass(frozen=True)
class ArcTargets:
    """Nodes that are entered by the arcs of the C valid nodes, in the B lattices and then in the B reversed lattices.

    Args:
        rows: (2C, 1) clip b for its lattice, B + b for its reversed lattice.
        frames: (2C, D) frame that an arc of each duration enters.
        columns: (2C, 1) number of labels that have been emitted after the arc.
    """

    rows: Tensor
    frames: Tensor
    columns: Tensor


@dataclass(frozen=True)
class IncomingArcs:
    """Log-probabilities of the arcs that enter each node (t, u) of R lattices; minus infinity where there is no arc.

    Args:
        moving_durations: (P,) the durations above 0.
        moving: (T+1, P, R, 2, U+1) arcs of these durations: labels at index 0, blanks at index 1.
        staying: (T+1, R, U+1) labels of duration 0; None if there is no duration 0.
    """

    moving_durations: Tensor
    moving: Tensor
    staying: Tensor | None


def build_lattice(
    shape: Sequence[int],
    vocab_size: int,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    options: TransducerOptions,
) -> Lattice:
    """Check labels and lengths, and list the valid nodes.

    Args:
        shape: B, T and U+1 of the grid of nodes.
        vocab_size: V, number of tokens with the blank.
        labels: (B, U) token ids; values beyond `label_lengths` are ignored.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        options: kinds of arcs and their weights.

    Returns:
        The lattices of the batch, on the device of the labels.

    Raises:
        ValueError: shapes, lengths or labels do not fit together.
    """
    batch, num_frames, num_columns = shape
    if tuple(labels.shape) != (batch, num_columns - 1):
        raise ValueError(
            f"`labels` must have shape {(batch, num_columns - 1)}, one column fewer than the predictor states, got "
            f"{tuple(labels.shape)}: prepend the blank to the predictor's input, not to the labels"
        )
    frame_lengths = _check_lengths("frame_lengths", frame_lengths, batch, num_frames, labels.device)
    label_lengths = _check_lengths("label_lengths", label_lengths, batch, num_columns - 1, labels.device)
    columns = torch.arange(num_columns, device=labels.device)
    # (B, U+1)
    has_next_label = columns < label_lengths[:, None]
    next_labels = F.pad(labels.long(), (0, 1)).masked_fill(~has_next_label, 0)
    _check_labels(next_labels[has_next_label], vocab_size, options.blank_id)
    # (B, T, 1) and (B, 1, U+1)
    is_frame = torch.arange(num_frames, device=labels.device)[:, None] < frame_lengths[:, None, None]
    is_column = (columns <= label_lengths[:, None])[:, None]
    nodes = (is_frame & is_column).flatten().nonzero()[:, 0]
    return Lattice((batch, num_frames, num_columns), next_labels, frame_lengths, label_lengths, nodes, options)


def _check_lengths(name: str, lengths: Tensor, batch: int, limit: int, device: torch.device) -> Tensor:
    """Return lengths as int64 on a device; raise ValueError unless they are `batch` numbers from 0 to `limit`."""
    lengths = lengths.to(device, torch.long)
    if lengths.shape != (batch,) or bool(((lengths < 0) | (lengths > limit)).any()):
        raise ValueError(f"`{name}` must be {batch} numbers from 0 to {limit}, got {lengths.tolist()}")
    return lengths


def _check_labels(labels: Tensor, vocab_size: int, blank_id: int) -> None:
    """Raise ValueError if one of the valid labels (of any shape) is the blank or is not a token id."""
    is_invalid = (labels < 0) | (labels >= vocab_size) | (labels == blank_id)
    if bool(is_invalid.any()):
        raise ValueError(
            f"labels must be ids from 0 to {vocab_size - 1} other than the blank ({blank_id}), got "
            f"{labels[is_invalid].unique().tolist()}: `label_lengths` must count the labels without padding"
        )


def repeat_per_node(lattice: Lattice, clip_values: Tensor) -> Tensor:
    """Copy one value per clip (B,) to the valid nodes of the clip (C,)."""
    _, num_frames, num_columns = lattice.shape
    return clip_values[lattice.nodes // (num_frames * num_columns)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of log-probabilities and gradient sums: float64 for float64 inputs, otherwise float32."""
    return torch.double if dtype == torch.double else torch.float32


def sum_paths(lattice: Lattice, log_probs: NodeLogProbs) -> tuple[Tensor, ArcPosteriors]:
    """Compute the negative log-likelihood of each clip and the posteriors of its arcs from log_alpha and log_beta.

    The sums are in float64. They have no vocabulary dimension, so they cost little compared with the joint network.

    Args:
        lattice: the lattices of the batch.
        log_probs: log-probabilities at the valid nodes.

    Returns:
        (B,) losses, infinite for a clip without any path, and the posteriors, which are 0 for such a clip.
    """
    arcs = _score_arcs(lattice, log_probs)
    # both (T+1, B, U+1): one loop over the frames computes the lattices and the reversed lattices, which is faster than
    # two loops because the operations of an iteration are small
    batch = lattice.shape[0]
    log_alpha, reversed_log_alpha = compute_log_alpha(_place_arcs(lattice, arcs)).split(batch, dim=1)
    # log_beta(0, 0). log_alpha(T, U) is less exact: no label enters frame T, so running sums there contain LOG_ZERO
    clips = torch.arange(batch, device=lattice.nodes.device)
    log_likelihood = reversed_log_alpha[lattice.frame_lengths, clips, lattice.label_lengths]
    has_no_path = (log_likelihood < LOG_ZERO / 2) | (lattice.frame_lengths == 0)
    losses = (-log_likelihood).masked_fill(has_no_path, math.inf)
    dtype = accumulation_dtype(log_probs.blank.dtype)
    posteriors = _compute_posteriors(lattice, arcs, log_alpha, reversed_log_alpha, losses)
    return losses.to(dtype), posteriors.to(dtype)


def _find_coordinates(lattice: Lattice) -> tuple[Tensor, Tensor, Tensor]:
    """Return clip, frame t and number of emitted labels u of the valid nodes, each (C,)."""
    _, num_frames, num_columns = lattice.shape
    nodes = lattice.nodes
    return nodes // (num_frames * num_columns), nodes // num_columns % num_frames, nodes % num_columns


def _score_arcs(lattice: Lattice, log_probs: NodeLogProbs) -> OutgoingArcs:
    """Add token and duration log-probabilities; an arc that does not exist gets minus infinity."""
    clips, frames, columns = _find_coordinates(lattice)
    durations = torch.tensor(lattice.options.arc_durations, device=lattice.nodes.device)
    # (C, 1) + (D,)
    targets = frames[:, None] + durations
    frame_lengths, label_lengths = lattice.frame_lengths[clips][:, None], lattice.label_lengths[clips][:, None]
    # only a blank may enter frame T
    is_blank_arc = (targets <= frame_lengths) & (durations > 0)
    is_label_arc = (targets < frame_lengths) & (columns[:, None] < label_lengths)
    blank, label = log_probs.blank.double()[:, None], log_probs.label.double()[:, None]
    if log_probs.durations is None:
        is_label_arc &= durations == 0
    else:
        duration_log_probs = log_probs.durations.double() - lattice.options.sigma
        blank, label = blank + duration_log_probs, label + duration_log_probs
    no_arc = blank.new_tensor(-math.inf)
    return OutgoingArcs(torch.where(is_blank_arc, blank, no_arc), torch.where(is_label_arc, label, no_arc))


def _find_targets(lattice: Lattice, num_labels: int) -> ArcTargets:
    """Find the nodes that are entered by the arcs of each duration from the C valid nodes.

    An arc that leaves (t, u) enters (t + d, u + 1) if it emits a label, otherwise (t + d, u). In the reversed lattice
    of clip b, with T_b frames and U_b labels, it enters (T_b - t, U_b - u).

    Args:
        lattice: the lattices of the batch.
        num_labels: 1 for labels, 0 for blanks.

    Returns:
        Targets in the B lattices and in the B reversed lattices.
    """
    # (C, 1)
    clips, frames, columns = (coordinate[:, None] for coordinate in _find_coordinates(lattice))
    durations = torch.tensor(lattice.options.arc_durations, device=clips.device)
    reversed_frames = (lattice.frame_lengths[clips] - frames).expand(-1, len(durations))
    return ArcTargets(
        rows=torch.cat([clips, lattice.shape[0] + clips]),
        frames=torch.cat([frames + durations, reversed_frames]),
        columns=torch.cat([columns + num_labels, lattice.label_lengths[clips] - columns]),
    )


def _place_arcs(lattice: Lattice, arcs: OutgoingArcs) -> IncomingArcs:
    """Store each arc at the node that it enters, in R = 2B lattices: the B lattices, then the B reversed lattices.

    Args:
        lattice: the lattices of the batch.
        arcs: log-probabilities of the arcs, by the node that they leave.

    Returns:
        Log-probabilities of the arcs, by the node that they enter.
    """
    batch, num_frames, num_columns = lattice.shape
    durations = torch.tensor(lattice.options.arc_durations, device=lattice.nodes.device)
    is_moving = durations > 0
    moving_durations = durations[is_moving]
    duration_indices = torch.arange(len(moving_durations), device=durations.device)
    # arcs that do not exist may have targets after frame T or in column U+1: the grid has room for them
    num_times = num_frames + 1 + max(lattice.options.arc_durations)
    moving = arcs.blank.new_full((num_times, len(moving_durations), 2 * batch, 2, num_columns + 1), -math.inf)
    # labels at index 0, blanks at index 1
    for index, num_labels, log_probs in ((0, 1, arcs.label), (1, 0, arcs.blank)):
        targets = _find_targets(lattice, num_labels)
        frames = targets.frames[:, is_moving]
        moving[frames, duration_indices, targets.rows, index, targets.columns] = log_probs[:, is_moving].repeat(2, 1)
    return IncomingArcs(
        moving_durations, moving[: num_frames + 1, ..., :num_columns], _place_staying_arcs(lattice, arcs.label)
    )


def _place_staying_arcs(lattice: Lattice, labels: Tensor) -> Tensor | None:
    """Store the labels of duration 0 at the node that they enter.

    Args:
        lattice: the lattices of the batch.
        labels: (C, D) log-probabilities of the labels that leave the valid nodes.

    Returns:
        (T+1, 2B, U+1) log-probabilities; None if there is no duration 0.
    """
    durations = lattice.options.arc_durations
    if 0 not in durations:
        return None
    batch, num_frames, num_columns = lattice.shape
    targets = _find_targets(lattice, num_labels=1)
    frames = targets.frames[:, durations.index(0)]
    # arcs that do not exist may enter column U+1
    staying = labels.new_full((num_frames + 1, 2 * batch, num_columns + 1), -math.inf)
    is_staying = torch.tensor([duration == 0 for duration in durations], device=labels.device)
    staying[frames, targets.rows[:, 0], targets.columns[:, 0]] = labels[:, is_staying].logsumexp(-1).repeat(2)
    return staying[..., :num_columns]


def compute_log_alpha(arcs: IncomingArcs) -> Tensor:
    """Compute log_alpha of R lattices by the recursion in the docstring of this module, one frame at a time.

    Labels of duration 0 make a recursion within a frame, log_alpha(u) = logaddexp(m(u), log_alpha(u - 1) + s(u)), where
    m sums the arcs from earlier frames and s is the arc that stays. With the running sum S(u) = s(1) + ... + s(u) its
    solution is log_alpha(u) = S(u) + logcumsumexp(m - S)(u).

    Args:
        arcs: the arcs that enter each node.

    Returns:
        (T+1, R, U+1) float64 log-probabilities of all paths from (0, 0) to each node.
    """
    num_times, _, num_rows, _, num_columns = arcs.moving.shape
    # frames and a column before the first ones, which no path enters, so that every arc has a source to read
    longest = max(arcs.moving_durations.tolist(), default=0)
    log_alpha = arcs.moving.new_full((longest + num_times, num_rows, num_columns + 1), -math.inf)
    # (longest + T+1, R, 2, U+1): a view of the sources in columns u - 1 (labels) and u (blanks)
    source_log_alpha = log_alpha.unfold(-1, num_columns, 1)
    running_sums = None
    if arcs.staying is not None:
        running_sums = F.pad(arcs.staying.clamp(min=LOG_ZERO)[..., 1:].cumsum(-1), (1, 0))
    sums = arcs.moving.new_full((num_rows, num_columns), -math.inf)
    sums[:, 0] = 0.0
    for t in range(num_times):
        if t > 0:
            sources = longest + t - arcs.moving_durations
            sums = (source_log_alpha[sources] + arcs.moving[t]).logsumexp((0, 2))
        if running_sums is not None:
            sums = running_sums[t] + (sums - running_sums[t]).logcumsumexp(-1)
        log_alpha[longest + t, :, 1:] = sums
    return log_alpha[longest:, :, 1:]


def _compute_posteriors(
    lattice: Lattice, arcs: OutgoingArcs, log_alpha: Tensor, reversed_log_alpha: Tensor, losses: Tensor
) -> ArcPosteriors:
    """Compute exp(log_alpha(source) + arc + log_beta(target) + loss) for the arcs that leave the valid nodes.

    Args:
        lattice: the lattices of the batch.
        arcs: log-probabilities of the arcs.
        log_alpha: (T+1, B, U+1) of the lattices.
        reversed_log_alpha: (T+1, B, U+1) of the reversed lattices: log_beta(t, u) is its value at (T_b - t, U_b - u).
        losses: (B,) negative log-likelihoods; the posteriors of a clip with an infinite loss are 0.

    Returns:
        float64 posteriors of blanks, labels and durations.
    """
    clips, frames, columns = _find_coordinates(lattice)
    durations = torch.tensor(lattice.options.arc_durations, device=clips.device)
    # (C, 1); without any path, exp(-inf) = 0
    normalisers = losses.masked_fill(losses == math.inf, -math.inf)[clips]
    source_log_probs = (log_alpha[frames, clips, columns] + normalisers)[:, None]
    # (C, D): frames between the target and the end
    frames_left = (lattice.frame_lengths[clips] - frames)[:, None] - durations

    def posteriors(log_probs: Tensor, num_labels: int) -> Tensor:
        """Return (C, D) posteriors of the arcs that emit 0 labels (blanks) or 1 label."""
        labels_left = (lattice.label_lengths[clips] - columns - num_labels)[:, None]
        # arcs to targets outside of the lattice do not exist: the sum is minus infinity for any finite log_beta
        log_beta = reversed_log_alpha[frames_left.clamp(min=0), clips[:, None], labels_left.clamp(min=0)]
        return (source_log_probs + log_probs + log_beta).exp_()

    blank, label = posteriors(arcs.blank, 0), posteriors(arcs.label, 1)
    label_sums = (1 + lattice.options.fastemit_lambda) * label.sum(-1)
    return ArcPosteriors(blank.sum(-1), label_sums, blank + label)


def scale_posteriors(lattice: Lattice, posteriors: ArcPosteriors, loss_gradient: Tensor) -> ArcPosteriors:
    """Multiply the posteriors of each clip by the gradient of the reduced loss with respect to the loss of the clip.

    Args:
        lattice: the lattices of the batch.
        posteriors: of the arcs of the C valid nodes.
        loss_gradient: (B,) gradient of the loss of each clip.

    Returns:
        The scaled posteriors.
    """
    node_gradient = repeat_per_node(lattice, loss_gradient)
    return ArcPosteriors(
        posteriors.blank * node_gradient,
        posteriors.label * node_gradient,
        posteriors.durations * node_gradient[:, None],
    )


def compute_token_gradient_(
    token_probs: Tensor, blank_id: int, next_labels: Tensor, blank_posteriors: Tensor, label_posteriors: Tensor
) -> None:
    """Turn token probabilities into the gradient of the loss with respect to the token logits, in place.

    With w the sum of the posteriors of the arcs that leave a node, the gradient of the logit of token v is
    w * P(v) - (posterior of the arcs that emit v).

    Args:
        token_probs: (C, V) softmax of the token logits, overwritten by the gradient.
        blank_id: id of the blank.
        next_labels: (C,) next label of each node.
        blank_posteriors: (C,) posteriors of the blanks, times the gradient of the clip's loss.
        label_posteriors: (C,) posteriors of the labels, times the gradient of the clip's loss.
    """
    token_probs.mul_((blank_posteriors + label_posteriors)[:, None])
    token_probs[:, blank_id] -= blank_posteriors
    token_probs.scatter_add_(1, next_labels[:, None], -label_posteriors[:, None])


def compute_duration_gradient(duration_logits: Tensor, posteriors: Tensor) -> Tensor:
    """Compute the gradient of the loss with respect to the duration logits, w * P(d) - posterior(d).

    w is the sum of the posteriors over the durations.

    Args:
        duration_logits: (..., D).
        posteriors: (..., D) posteriors of the durations, times the gradient of the clip's loss.

    Returns:
        (..., D) gradient.
    """
    return duration_logits.softmax(-1) * posteriors.sum(-1, keepdim=True) - posteriors


def refuse_second_derivative() -> None:
    """Raise RuntimeError if the gradient itself is to be differentiated: the analytic gradient has no graph."""
    if torch.is_grad_enabled():
        raise RuntimeError("the transducer loss has no second derivative: call backward without `create_graph=True`")
