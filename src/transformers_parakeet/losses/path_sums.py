"""Sums over all paths of the transducer lattice: the loss of each clip, and the posterior probability of each arc.

`lattice.py` explains nodes and arcs. The log-probabilities of the arcs that leave node (t, u) are

    blank(t, u, d) = log P(blank | t, u)      - sigma + log P(d | t, u)
    label(t, u, d) = log P(next label | t, u) - sigma + log P(d | t, u)

for TDT. For RNN-T they are log P(blank | t, u) with d = 1, and log P(next label | t, u) with d = 0. log_alpha sums over
the paths from the start to a node, log_beta sums over the paths from a node to the end:

    log_alpha(t, u) = log sum over d of [ exp(log_alpha(t - d, u)     + blank(t - d, u, d))
                                        + exp(log_alpha(t - d, u - 1) + label(t - d, u - 1, d)) ],  log_alpha(0, 0) = 0

    log_beta(t, u)  = log sum over d of [ exp(blank(t, u, d) + log_beta(t + d, u))
                                        + exp(label(t, u, d) + log_beta(t + d, u + 1)) ],           log_beta(T, U) = 0

    log-likelihood   = log_alpha(T, U) = log_beta(0, 0)
    posterior of arc = exp(log_alpha(source node) + log-probability of arc + log_beta(target node) - log-likelihood)

The posterior of an arc is the derivative of the log-likelihood with respect to the log-probability of the arc.

log_beta is the log_alpha of the time-reversed lattice, in which frames and labels are counted from the end of the clip.
One recursion therefore computes 2 * B lattices: the B lattices of the batch, then their B time-reversed copies.

Letters: B clips, T frames, U labels, D durations. `num_nodes` is the number of valid nodes in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .lattice import ArcPosteriors, Lattice, NodeLogProbs, compute_node_coordinates, get_accumulation_dtype

# log-probability that replaces minus infinity in cumulative sums: exp(-1e7) is 0, and a float64 sum over thousands of
# labels that contains this value still has 6 exact decimals
LOG_ZERO = -1e7


@dataclass(frozen=True)
class OutgoingArcs:
    """Log-probabilities of the arcs that leave each valid node; minus infinity for an arc that does not exist.

    Args:
        blank: (num_nodes, D) float64 log-probability of the blank arc of each duration.
        label: (num_nodes, D) float64 log-probability of the label arc of each duration.
    """

    blank: Tensor
    label: Tensor


@dataclass(frozen=True)
class ArcTargets:
    """Nodes that the arcs enter, first in the B lattices and then in the B time-reversed lattices.

    Args:
        lattice_indices: (2 * num_nodes, 1) b for the lattice of clip b, B + b for its time-reversed lattice.
        frame_indices: (2 * num_nodes, D) frame that the arc of each duration enters.
        label_positions: (2 * num_nodes, 1) number of labels that have been emitted after the arc.
    """

    lattice_indices: Tensor
    frame_indices: Tensor
    label_positions: Tensor


@dataclass(frozen=True)
class IncomingArcs:
    """Log-probabilities of the arcs that enter each node (t, u); minus infinity for an arc that does not exist.

    Args:
        cross_frame_durations: (num_cross_frame,) the durations above 0.
        cross_frame: (T+1, num_cross_frame, num_lattices, 2, U+1) arcs of these durations. Dimension 3 is the kind of
            the arc: 0 for labels, 1 for blanks.
        same_frame: (T+1, num_lattices, U+1) labels of duration 0; None if there is no duration 0.
    """

    cross_frame_durations: Tensor
    cross_frame: Tensor
    same_frame: Tensor | None


def compute_losses_and_posteriors(lattice: Lattice, log_probs: NodeLogProbs) -> tuple[Tensor, ArcPosteriors]:
    """Compute the negative log-likelihood of each clip and the posteriors of its arcs from log_alpha and log_beta.

    The sums are in float64. They have no vocabulary dimension, so they cost little compared with the joint network.

    Args:
        lattice: the lattices of the batch.
        log_probs: log-probabilities at the valid nodes.

    Returns:
        (B,) losses and the posteriors. A clip without any path has an infinite loss and posteriors of 0.
    """
    outgoing_arcs = _score_arcs(lattice, log_probs)
    # Each is (T+1, B, U+1). One loop over the frames computes the lattices and the time-reversed lattices. Two loops
    # would be slower because the operations of an iteration are small.
    batch_size = lattice.grid_shape[0]
    incoming_arcs = _index_arcs_by_target(lattice, outgoing_arcs)
    log_alpha, reversed_log_alpha = compute_log_alpha(incoming_arcs).split(batch_size, dim=1)
    # Read the log-likelihood from log_beta(0, 0). log_alpha(T, U) is less exact: no label enters frame T, so the
    # cumulative sums of that frame contain LOG_ZERO.
    clip_indices = torch.arange(batch_size, device=lattice.nodes.device)
    log_likelihood = reversed_log_alpha[lattice.frame_lengths, clip_indices, lattice.label_lengths]
    has_no_path = (log_likelihood < LOG_ZERO / 2) | (lattice.frame_lengths == 0)
    losses = (-log_likelihood).masked_fill(has_no_path, math.inf)
    posteriors = _compute_posteriors(lattice, outgoing_arcs, log_alpha, reversed_log_alpha, losses)
    dtype = get_accumulation_dtype(log_probs.blank.dtype)
    return losses.to(dtype), posteriors.to(dtype)


def _score_arcs(lattice: Lattice, log_probs: NodeLogProbs) -> OutgoingArcs:
    """Score each arc that leaves a valid node: token log-probability plus duration log-probability.

    Args:
        lattice: the lattices of the batch.
        log_probs: log-probabilities at the valid nodes.

    Returns:
        (num_nodes, D) scores of blanks and labels; minus infinity for an arc that does not exist.
    """
    nodes = compute_node_coordinates(lattice)
    durations = torch.tensor(lattice.options.arc_durations, device=lattice.nodes.device)
    # (num_nodes, 1) + (D,) -> (num_nodes, D)
    target_frames = nodes.frame_indices[:, None] + durations
    # (num_nodes, 1)
    frame_lengths = lattice.frame_lengths[nodes.clip_indices][:, None]
    label_lengths = lattice.label_lengths[nodes.clip_indices][:, None]
    # frame T is the end of the clip: a blank may enter it, a label may not
    is_blank_arc = (target_frames <= frame_lengths) & (durations > 0)
    is_label_arc = (target_frames < frame_lengths) & (nodes.label_positions[:, None] < label_lengths)
    blank, label = log_probs.blank.double()[:, None], log_probs.label.double()[:, None]
    if log_probs.durations is None:
        # RNN-T: a label stays on its frame
        is_label_arc &= durations == 0
    else:
        # sigma is the logit under-normalisation of TDT
        duration_log_probs = log_probs.durations.double() - lattice.options.sigma
        blank, label = blank + duration_log_probs, label + duration_log_probs
    log_zero = blank.new_tensor(-math.inf)
    return OutgoingArcs(torch.where(is_blank_arc, blank, log_zero), torch.where(is_label_arc, label, log_zero))


def _find_targets(lattice: Lattice, num_labels: int) -> ArcTargets:
    """Find the node that each arc enters, in the lattices and in the time-reversed lattices.

    The arc of duration d that leaves (t, u) enters (t + d, u) if it is a blank and (t + d, u + 1) if it is a label. The
    time-reversed lattice of a clip with T frames and U labels contains the same arc from the end to the start: it
    enters (T - t, U - u). For example, with T = 5 and U = 2, a blank (1, 0) -> (3, 0) becomes (2, 2) -> (4, 2).

    Args:
        lattice: the lattices of the batch.
        num_labels: number of labels that the arcs emit: 1 for label arcs, 0 for blank arcs.

    Returns:
        Targets of the arcs of each duration.
    """
    nodes = compute_node_coordinates(lattice)
    # (num_nodes, 1)
    clips, frames, positions = nodes.clip_indices[:, None], nodes.frame_indices[:, None], nodes.label_positions[:, None]
    durations = torch.tensor(lattice.options.arc_durations, device=clips.device)
    # the target in the time-reversed lattice does not depend on the duration
    reversed_frames = (lattice.frame_lengths[clips] - frames).expand(-1, len(durations))
    batch_size = lattice.grid_shape[0]
    return ArcTargets(
        lattice_indices=torch.cat([clips, batch_size + clips]),
        frame_indices=torch.cat([frames + durations, reversed_frames]),
        label_positions=torch.cat([positions + num_labels, lattice.label_lengths[clips] - positions]),
    )


def _index_arcs_by_target(lattice: Lattice, arcs: OutgoingArcs) -> IncomingArcs:
    """Re-index the arcs by the node that they enter.

    The result contains 2 * B lattices: the B lattices for log_alpha, then their B time-reversed copies for log_beta.

    Args:
        lattice: the lattices of the batch.
        arcs: log-probabilities of the arcs, indexed by the node that they leave.

    Returns:
        Log-probabilities of the arcs, indexed by the node that they enter.
    """
    durations = torch.tensor(lattice.options.arc_durations, device=lattice.nodes.device)
    crosses_frames = durations > 0
    cross_frame_durations = durations[crosses_frames]
    num_durations = len(cross_frame_durations)
    duration_indices = torch.arange(num_durations, device=durations.device)
    batch_size, num_frames, num_positions = lattice.grid_shape
    # an arc that does not exist may have its target after frame T or at label position U+1: add space for it
    num_padded_frames = num_frames + 1 + max(lattice.options.arc_durations)
    padded_shape = (num_padded_frames, num_durations, 2 * batch_size, 2, num_positions + 1)
    cross_frame = arcs.blank.new_full(padded_shape, -math.inf)
    # kind of the arc: 0 for labels, 1 for blanks
    for arc_kind, num_labels, log_probs in ((0, 1, arcs.label), (1, 0, arcs.blank)):
        targets = _find_targets(lattice, num_labels)
        # the five indices are broadcast to (2 * num_nodes, num_durations): one element per arc
        indices = (
            targets.frame_indices[:, crosses_frames],
            duration_indices,
            targets.lattice_indices,
            arc_kind,
            targets.label_positions,
        )
        # an arc has the same log-probability in the lattice and in the time-reversed lattice
        cross_frame[indices] = log_probs[:, crosses_frames].repeat(2, 1)
    same_frame = _index_zero_duration_arcs_by_target(lattice, arcs.label)
    return IncomingArcs(cross_frame_durations, cross_frame[: num_frames + 1, ..., :num_positions], same_frame)


def _index_zero_duration_arcs_by_target(lattice: Lattice, label_arcs: Tensor) -> Tensor | None:
    """Re-index the label arcs of duration 0 by the node that they enter.

    Args:
        lattice: the lattices of the batch.
        label_arcs: (num_nodes, D) log-probabilities of the label arcs, indexed by the node that they leave.

    Returns:
        (T+1, 2 * B, U+1) log-probabilities in the lattices and in the time-reversed lattices; None if there is no
        duration 0.
    """
    durations = lattice.options.arc_durations
    if 0 not in durations:
        return None
    batch_size, num_frames, num_positions = lattice.grid_shape
    targets = _find_targets(lattice, num_labels=1)
    target_frames = targets.frame_indices[:, durations.index(0)]
    # an arc that does not exist may have its target at label position U+1: add space for it
    incoming = label_arcs.new_full((num_frames + 1, 2 * batch_size, num_positions + 1), -math.inf)
    # a model may have several outputs for duration 0: sum their probabilities
    is_zero = torch.tensor([duration == 0 for duration in durations], device=label_arcs.device)
    log_probs = label_arcs[:, is_zero].logsumexp(-1)
    incoming[target_frames, targets.lattice_indices[:, 0], targets.label_positions[:, 0]] = log_probs.repeat(2)
    return incoming[..., :num_positions]


def compute_log_alpha(arcs: IncomingArcs) -> Tensor:
    """Compute log_alpha, the log-probability of all paths from (0, 0) to each node, one frame at a time.

    Labels of duration 0 add a recurrence along the label position u within a frame,

        log_alpha(u) = logaddexp(m(u), log_alpha(u - 1) + s(u)),

    where m(u) sums the arcs from earlier frames and s(u) is the score of the label arc of duration 0 that enters u.
    With the cumulative sum S(u) = s(1) + ... + s(u), the solution is log_alpha(u) = S(u) + logcumsumexp(m - S)(u).

    Args:
        arcs: log-probabilities of the arcs that enter each node.

    Returns:
        (T+1, num_lattices, U+1) float64 log_alpha.
    """
    num_time_nodes, _, num_lattices, _, num_positions = arcs.cross_frame.shape
    # Prepend `max_duration` frames and one label position, all minus infinity, so every arc has a source to read.
    max_duration = max(arcs.cross_frame_durations.tolist(), default=0)
    padded_shape = (max_duration + num_time_nodes, num_lattices, num_positions + 1)
    padded_log_alpha = arcs.cross_frame.new_full(padded_shape, -math.inf)
    # A view (padded frames, num_lattices, 2, U+1) of the sources: position u - 1 for labels, position u for blanks. For
    # U = 1, a padded row [-inf, a0, a1] is viewed as [-inf, a0] for labels and [a0, a1] for blanks.
    source_log_alpha = padded_log_alpha.unfold(-1, num_positions, 1)
    label_sums = None
    if arcs.same_frame is not None:
        # S(u) for every frame
        label_sums = F.pad(arcs.same_frame.clamp(min=LOG_ZERO)[..., 1:].cumsum(-1), (1, 0))
    # every path starts at (0, 0)
    frame_log_alpha = arcs.cross_frame.new_full((num_lattices, num_positions), -math.inf)
    frame_log_alpha[:, 0] = 0.0
    for t in range(num_time_nodes):
        if t > 0:
            # m(u): sum over the durations and over the two kinds of arcs
            source_frames = max_duration + t - arcs.cross_frame_durations
            frame_log_alpha = (source_log_alpha[source_frames] + arcs.cross_frame[t]).logsumexp((0, 2))
        if label_sums is not None:
            frame_log_alpha = label_sums[t] + (frame_log_alpha - label_sums[t]).logcumsumexp(-1)
        padded_log_alpha[max_duration + t, :, 1:] = frame_log_alpha
    return padded_log_alpha[max_duration:, :, 1:]


def _compute_posteriors(
    lattice: Lattice, arcs: OutgoingArcs, log_alpha: Tensor, reversed_log_alpha: Tensor, losses: Tensor
) -> ArcPosteriors:
    """Compute the posterior of each arc that leaves a valid node.

    The posterior is exp(log_alpha(source node) + log-probability of the arc + log_beta(target node) + loss).

    Args:
        lattice: the lattices of the batch.
        arcs: log-probabilities of the arcs.
        log_alpha: (T+1, B, U+1) log_alpha of the lattices.
        reversed_log_alpha: (T+1, B, U+1) log_alpha of the time-reversed lattices. log_beta(t, u) of a clip with n
            frames and m labels is its element (n - t, m - u).
        losses: (B,) negative log-likelihoods. The posteriors of a clip with an infinite loss are 0.

    Returns:
        float64 posteriors of blanks, labels and durations.
    """
    nodes = compute_node_coordinates(lattice)
    clips = nodes.clip_indices
    durations = torch.tensor(lattice.options.arc_durations, device=clips.device)
    # a clip without any path gets -inf, so its posteriors are exp(-inf) = 0
    log_normalizers = losses.masked_fill(losses == math.inf, -math.inf)[clips]
    # (num_nodes, 1)
    source_log_probs = (log_alpha[nodes.frame_indices, clips, nodes.label_positions] + log_normalizers)[:, None]
    # (num_nodes, D): frames from the target of the arc to the end of the clip
    frames_left = (lattice.frame_lengths[clips] - nodes.frame_indices)[:, None] - durations

    def compute_arc_posteriors(arc_log_probs: Tensor, num_labels: int) -> Tensor:
        """Compute (num_nodes, D) posteriors of arcs that emit 0 labels (blanks) or 1 label."""
        labels_left = (lattice.label_lengths[clips] - nodes.label_positions - num_labels)[:, None]
        # An arc with a target outside of the lattice has log-probability -inf, so clamping its target to any node of
        # the lattice gives the posterior 0.
        log_beta = reversed_log_alpha[frames_left.clamp(min=0), clips[:, None], labels_left.clamp(min=0)]
        return (source_log_probs + arc_log_probs + log_beta).exp_()

    blank, label = compute_arc_posteriors(arcs.blank, 0), compute_arc_posteriors(arcs.label, 1)
    scaled_label = (1 + lattice.options.fastemit_lambda) * label.sum(-1)
    return ArcPosteriors(blank.sum(-1), scaled_label, blank + label)
