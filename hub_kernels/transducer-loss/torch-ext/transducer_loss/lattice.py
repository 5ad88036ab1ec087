"""The lattice of a batch: its nodes, their scores, path sums, posteriors, and the gradient of logits.

This file allocates memory and launches the programs of `lattice_programs.py`, which explains nodes, and of
`gradient_programs.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .gradient_programs import compute_posteriors, differentiate_logits
from .lattice_programs import index_nodes, score_nodes, sum_paths

# columns of logits that a program loads at once
BLOCK_V = 1024
# largest number of label positions that a program of the path sums loads at once
BLOCK_U = 1024
# the same for the other programs over label positions
BLOCK_POSITIONS = 256
# a path sum below this has no path; NO_PATH in lattice_programs.py
NO_PATH = -1e29


@dataclass(frozen=True)
class LatticeSettings:
    """Which arcs leave a node, and how they are weighted.

    Args:
        blank_id: id of the blank.
        durations: frames of each duration output; None for RNN-T, where a label does not advance and a blank advances
            one frame.
        sigma: subtracted from every token log-probability.
        fastemit_lambda: FastEmit weight; token gradients of labels are multiplied by 1 + lambda.
    """

    blank_id: int
    durations: tuple[int, ...] | None
    sigma: float
    fastemit_lambda: float

    @property
    def has_durations(self) -> bool:
        """Whether the joint network has duration outputs."""
        return self.durations is not None

    @property
    def arc_durations(self) -> tuple[int, ...]:
        """Frames that an arc can advance."""
        return (0, 1) if self.durations is None else self.durations

    @property
    def zero_index(self) -> int:
        """Index of duration 0 in `arc_durations`, -1 if there is none."""
        return self.arc_durations.index(0) if 0 in self.arc_durations else -1


@dataclass(frozen=True)
class Nodes:
    """The lattice nodes of a batch, without padding.

    Args:
        frame_lengths: (B,) int32.
        label_lengths: (B,) int32.
        first_node: (B,) int64 number of the first node of each utterance.
        encoder_row: (nodes,) int32 row of each node in the encoder states (B * T, J).
        predictor_row: (nodes,) int32 row of each node in the predictor states (B * (U+1), J).
        next_label: (nodes,) int32 label that the node can emit, -1 after the last label.
        row_node: (B * T * (U+1),) int32 node of each row of padded logits, -1 for padding; empty if there are none.
        num_nodes: number of nodes.
        num_frames: T.
        num_positions: U + 1.
    """

    frame_lengths: Tensor
    label_lengths: Tensor
    first_node: Tensor
    encoder_row: Tensor
    predictor_row: Tensor
    next_label: Tensor
    row_node: Tensor
    num_nodes: int
    num_frames: int
    num_positions: int

    @property
    def batch(self) -> int:
        """Number of utterances."""
        return len(self.first_node)

    @property
    def block(self) -> int:
        """Label positions that a program of the path sums loads at once."""
        return min(BLOCK_U, max(16, triton.next_power_of_2(self.num_positions)))


@dataclass(frozen=True)
class Scores:
    """Log-probabilities at the nodes, float32.

    Args:
        log_normalizer: (nodes,) log-sum-exp of the token logits.
        blank: (nodes,) log-probability of the blank, minus sigma.
        label: (nodes,) log-probability of the next label, minus sigma.
        durations: (D, nodes) log-probabilities; empty for RNN-T.
    """

    log_normalizer: Tensor
    blank: Tensor
    label: Tensor
    durations: Tensor


@dataclass(frozen=True)
class PathSums:
    """Sums over the paths of each utterance.

    Args:
        losses: (B,) float32 negative log-likelihoods, infinite where no path exists.
        log_alpha: (nodes,) float64 sum over the paths from the start to each node; empty if only the loss is needed.
        log_beta: (nodes,) float64 sum over the paths from each node to the end.
        durations: (D,) int32 frames of each duration, on the device.
    """

    losses: Tensor
    log_alpha: Tensor
    log_beta: Tensor
    durations: Tensor


@dataclass(frozen=True)
class Posteriors:
    """Posterior probabilities of arcs, float32, multiplied by the gradient of the loss.

    Args:
        node: (nodes,) sum over all arcs that leave the node.
        blank: (nodes,) sum over the blank arcs.
        label: (nodes,) sum over the label arcs.
        duration_gradient: (D, nodes) gradient of the duration logits; empty for RNN-T.
        is_relevant: (nodes,) int8, 1 where the gradient of the node's logits is not negligible.
    """

    node: Tensor
    blank: Tensor
    label: Tensor
    duration_gradient: Tensor
    is_relevant: Tensor


def use_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which programs are launched on the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def number_nodes(
    labels: Tensor, frame_lengths: Tensor, label_lengths: Tensor, lengths: tuple[list[int], list[int]],
    num_frames: int, has_rows: bool,
) -> Nodes:  # fmt: skip
    """Number the lattice nodes of a batch.

    Args:
        labels: (B, U).
        frame_lengths: (B,).
        label_lengths: (B,).
        lengths: values of `frame_lengths` and `label_lengths`.
        num_frames: T.
        has_rows: whether to fill `Nodes.row_node`.

    Returns:
        The nodes.

    Raises:
        ValueError: the batch has 2**31 nodes or more.
    """
    batch, num_positions = labels.shape[0], labels.shape[1] + 1
    sizes = [frames * (label_count + 1) for frames, label_count in zip(*lengths, strict=True)]
    num_nodes = sum(sizes)
    if max(num_nodes, batch * max(num_frames, num_positions)) >= 2**31:
        raise ValueError(f"a batch must have fewer than 2**31 lattice nodes, got {num_nodes}: use a smaller batch")
    first_node = torch.tensor([sum(sizes[:utterance]) for utterance in range(batch)], dtype=torch.int64)
    options = {"dtype": torch.int32, "device": labels.device}
    nodes = Nodes(
        frame_lengths=frame_lengths.to(torch.int32).contiguous(),
        label_lengths=label_lengths.to(torch.int32).contiguous(),
        first_node=first_node.to(labels.device),
        encoder_row=torch.empty(num_nodes, **options),
        predictor_row=torch.empty(num_nodes, **options),
        next_label=torch.empty(num_nodes, **options),
        row_node=torch.empty(batch * num_frames * num_positions if has_rows else 0, **options),
        num_nodes=num_nodes,
        num_frames=num_frames,
        num_positions=num_positions,
    )
    with use_device(labels):
        index_nodes[(batch * num_frames,)](
            nodes.frame_lengths, nodes.label_lengths, nodes.first_node, labels.to(torch.int32).contiguous(),
            nodes.encoder_row, nodes.predictor_row, nodes.next_label, nodes.row_node, num_frames, num_positions,
            HAS_ROWS=has_rows, BLOCK=min(BLOCK_POSITIONS, nodes.block),
        )  # fmt: skip
    return nodes


def allocate_scores(nodes: Nodes, settings: LatticeSettings) -> Scores:
    """Allocate the scores of all nodes."""
    options = {"dtype": torch.float32, "device": nodes.first_node.device}
    num_durations = len(settings.arc_durations) if settings.has_durations else 0
    return Scores(
        log_normalizer=torch.empty(nodes.num_nodes, **options),
        blank=torch.empty(nodes.num_nodes, **options),
        label=torch.empty(nodes.num_nodes, **options),
        durations=torch.empty((num_durations, nodes.num_nodes), **options),
    )


def write_scores(
    token_logits: Tensor, duration_logits: Tensor, row_node: Tensor, nodes: Nodes, settings: LatticeSettings,
    scores: Scores,
) -> None:  # fmt: skip
    """Write the scores of the nodes to which rows of logits belong.

    Args:
        token_logits: (rows, V), last stride 1.
        duration_logits: (rows, D), last stride 1; not read for RNN-T.
        row_node: (rows,) int32 node of each row, -1 for padding.
        nodes: the nodes of the batch.
        settings: which arcs leave a node.
        scores: is written.
    """
    vocab_size, num_durations = token_logits.shape[1], len(settings.arc_durations)
    with use_device(token_logits):
        score_nodes[(len(row_node),)](
            token_logits, token_logits.stride(0), duration_logits, duration_logits.stride(0), row_node,
            nodes.next_label, scores.log_normalizer, scores.blank, scores.label, scores.durations, nodes.num_nodes,
            settings.blank_id, settings.sigma, VOCAB_SIZE=vocab_size, NUM_DURATIONS=num_durations,
            HAS_DURATIONS=settings.has_durations, BLOCK_V=min(BLOCK_V, triton.next_power_of_2(vocab_size)),
            BLOCK_D=triton.next_power_of_2(num_durations),
        )  # fmt: skip


def run_path_sums(nodes: Nodes, settings: LatticeSettings, scores: Scores, needs_gradient: bool) -> PathSums:
    """Sum over all paths of each utterance.

    Args:
        nodes: the nodes of the batch.
        settings: which arcs leave a node.
        scores: scores of all nodes.
        needs_gradient: whether to compute log_alpha in addition to log_beta.

    Returns:
        Losses and path sums.
    """
    options = {"dtype": torch.float64, "device": nodes.first_node.device}
    log_beta = torch.empty(nodes.num_nodes, **options)
    log_alpha = torch.empty(nodes.num_nodes if needs_gradient else 0, **options)
    durations = torch.tensor(settings.arc_durations, dtype=torch.int32).to(nodes.first_node.device)
    with use_device(log_beta):
        sum_paths[(nodes.batch, 2 if needs_gradient else 1)](
            nodes.frame_lengths, nodes.label_lengths, nodes.first_node, log_alpha, log_beta, scores.blank, scores.label,
            scores.durations, durations, nodes.num_nodes, NUM_DURATIONS=len(settings.arc_durations),
            ZERO_INDEX=settings.zero_index, HAS_DURATIONS=settings.has_durations, BLOCK=nodes.block,
            num_warps=max(1, nodes.block // 128), num_stages=1,
        )  # fmt: skip
    # an utterance without frames has no node; its index is only clamped to be valid
    log_likelihood = log_beta[nodes.first_node.clamp(max=nodes.num_nodes - 1)]
    has_no_path = (log_likelihood < NO_PATH) | (nodes.frame_lengths == 0)
    losses = torch.where(has_no_path, torch.inf, -log_likelihood)
    return PathSums(losses.to(torch.float32), log_alpha, log_beta, durations)


def run_posteriors(
    nodes: Nodes, settings: LatticeSettings, scores: Scores, sums: PathSums, loss_gradient: Tensor, negligible: float
) -> Posteriors:
    """Compute the posterior probabilities of the arcs that leave each node.

    Args:
        nodes: the nodes of the batch.
        settings: which arcs leave a node.
        scores: scores of all nodes.
        sums: path sums with log_alpha.
        loss_gradient: (B,) gradient of the loss of each utterance.
        negligible: sum of the posteriors of an utterance's irrelevant nodes is at most this; negative if all nodes are
            relevant.

    Returns:
        The posteriors.
    """
    options = {"dtype": torch.float32, "device": sums.log_beta.device}
    posteriors = Posteriors(
        node=torch.empty(nodes.num_nodes, **options),
        blank=torch.empty(nodes.num_nodes, **options),
        label=torch.empty(nodes.num_nodes, **options),
        duration_gradient=torch.empty_like(scores.durations),
        is_relevant=torch.empty(nodes.num_nodes, dtype=torch.int8, device=sums.log_beta.device),
    )
    with use_device(sums.log_beta):
        compute_posteriors[(nodes.batch * nodes.num_frames,)](
            nodes.frame_lengths, nodes.label_lengths, nodes.first_node, loss_gradient.contiguous(), sums.log_alpha,
            sums.log_beta, scores.blank, scores.label, scores.durations, sums.durations, posteriors.node,
            posteriors.blank, posteriors.label, posteriors.duration_gradient, posteriors.is_relevant, nodes.num_frames,
            nodes.num_nodes, 1.0 + settings.fastemit_lambda, negligible, NUM_DURATIONS=len(settings.arc_durations),
            HAS_DURATIONS=settings.has_durations, BLOCK=min(BLOCK_POSITIONS, nodes.block),
        )  # fmt: skip
    return posteriors


def write_logit_gradients(
    token_logits: Tensor, token_gradient: Tensor, duration_gradient: Tensor, row_node: Tensor, nodes: Nodes,
    settings: LatticeSettings, scores: Scores, posteriors: Posteriors,
) -> None:  # fmt: skip
    """Write the gradient of rows of logits.

    Args:
        token_logits: (rows, V), last stride 1.
        token_gradient: (rows, V), last stride 1, is written; may be `token_logits`.
        duration_gradient: (rows, D), last stride 1, is written; unused for RNN-T.
        row_node: (rows,) int32 node of each row, -1 for padding, whose gradient is zero.
        nodes: the nodes of the batch.
        settings: which arcs leave a node.
        scores: scores of all nodes.
        posteriors: posteriors of all nodes.
    """
    vocab_size, num_durations = token_logits.shape[1], len(settings.arc_durations)
    with use_device(token_logits):
        differentiate_logits[(len(row_node),)](
            token_logits, token_logits.stride(0), token_gradient, token_gradient.stride(0), duration_gradient,
            duration_gradient.stride(0), row_node, nodes.next_label, scores.log_normalizer, posteriors.node,
            posteriors.blank, posteriors.label, posteriors.duration_gradient, nodes.num_nodes, settings.blank_id,
            VOCAB_SIZE=vocab_size, NUM_DURATIONS=num_durations, HAS_DURATIONS=settings.has_durations,
            BLOCK_V=min(BLOCK_V, triton.next_power_of_2(vocab_size)), BLOCK_D=triton.next_power_of_2(num_durations),
        )  # fmt: skip
