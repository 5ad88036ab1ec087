"""The lattice of a batch: nodes, scores, path sums, posteriors, and the gradients of logits.

The functions allocate memory and launch the Triton programs of `lattice_programs.py` and `gradient_programs.py`. The
docstring of `lattice_programs.py` explains the nodes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .gradient_programs import compute_posteriors, differentiate_logits
from .lattice_programs import index_nodes, score_nodes, sum_paths

# number of columns of logits that a program loads at once
BLOCK_V = 1024
# largest number of label positions that a program of the path sums loads at once
BLOCK_U = 1024
# number of label positions that the other programs load at once
BLOCK_POSITIONS = 256
# a path sum below this value means that no path exists; must equal `NO_PATH` in lattice_programs.py
NO_PATH = -1e29


@dataclass(frozen=True)
class LatticeSettings:
    """Options that decide which arcs leave a node and how the arcs are weighted.

    Args:
        blank_id: id of the blank.
        durations: number of frames of each duration output of TDT; None for RNN-T.
        sigma: logit under-normalisation of TDT, subtracted from every token log-probability.
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
        """Possible durations of an arc, in frames: the durations of TDT, or 0 (label) and 1 (blank) for RNN-T."""
        return (0, 1) if self.durations is None else self.durations

    @property
    def zero_index(self) -> int:
        """Index of duration 0 in `arc_durations`; -1 if there is no duration 0."""
        return self.arc_durations.index(0) if 0 in self.arc_durations else -1


@dataclass(frozen=True)
class Nodes:
    """The lattice nodes of a batch, without padding.

    Args:
        frame_lengths: (B,) int32 number of valid frames.
        label_lengths: (B,) int32 number of valid labels.
        first_node: (B,) int64 number of the first node of each utterance.
        encoder_row: (nodes,) int32 row of each node in the encoder states (B * T, J).
        predictor_row: (nodes,) int32 row of each node in the predictor states (B * (U+1), J).
        next_label: (nodes,) int32 label that the node can emit; -1 after the last label.
        row_node: (B * T * (U+1),) int32 node of each row of padded logits, -1 for padding; empty for the fused loss.
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
        """Number of label positions that a program of the path sums loads at once: a power of 2."""
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
        losses: (B,) float32 negative log-likelihoods, infinite if no path exists.
        log_alpha: (nodes,) float64 log-sum over the paths from the start to each node; empty if no gradient is needed.
        log_beta: (nodes,) float64 log-sum over the paths from each node to the end.
        durations: (D,) int32 number of frames of each duration, on the device.
    """

    losses: Tensor
    log_alpha: Tensor
    log_beta: Tensor
    durations: Tensor


@dataclass(frozen=True)
class Posteriors:
    """float32 posterior probabilities of the arcs, multiplied by the gradient of the utterance's loss.

    Args:
        node: (nodes,) sum over all arcs that leave the node.
        blank: (nodes,) sum over the blank arcs.
        label: (nodes,) sum over the label arcs, multiplied by 1 + FastEmit lambda.
        duration_gradient: (D, nodes) gradient of the duration logits; empty for RNN-T.
        is_relevant: (nodes,) int8, 1 if the gradient of the node's logits is not negligible, otherwise 0.
    """

    node: Tensor
    blank: Tensor
    label: Tensor
    duration_gradient: Tensor
    is_relevant: Tensor


def use_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context manager that launches Triton programs on the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def number_nodes(
    labels: Tensor, frame_lengths: Tensor, label_lengths: Tensor, lengths: tuple[list[int], list[int]],
    num_frames: int, has_rows: bool,
) -> Nodes:  # fmt: skip
    """Number the lattice nodes of a batch, and find the inputs of each node.

    Args:
        labels: (B, U) label ids.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        lengths: `frame_lengths` and `label_lengths` as lists, to avoid another copy from the device.
        num_frames: T.
        has_rows: whether to fill `Nodes.row_node`, which the loss from logits needs.

    Returns:
        The lattice nodes of the batch.

    Raises:
        ValueError: the batch has 2**31 nodes or more.
    """
    batch, num_positions = labels.shape[0], labels.shape[1] + 1
    nodes_per_utterance = [frames * (label_count + 1) for frames, label_count in zip(*lengths, strict=True)]
    num_nodes = sum(nodes_per_utterance)
    if max(num_nodes, batch * max(num_frames, num_positions)) >= 2**31:
        raise ValueError(f"a batch must have fewer than 2**31 lattice nodes, got {num_nodes}: use a smaller batch")
    first_node = torch.tensor([sum(nodes_per_utterance[:utterance]) for utterance in range(batch)], dtype=torch.int64)
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
    """Allocate uninitialised memory for the scores of all nodes."""
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
    """Compute the scores of nodes from their logits.

    Args:
        token_logits: (rows, V) with contiguous rows.
        duration_logits: (rows, D) with contiguous rows; not read for RNN-T.
        row_node: (rows,) int32 node of each row; -1 for padding.
        nodes: the lattice nodes of the batch.
        settings: options of the lattice.
        scores: memory for the scores of all nodes, in which the scores of these nodes are written.
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
    """Compute the loss of each utterance and the sums over its paths.

    Args:
        nodes: the lattice nodes of the batch.
        settings: options of the lattice.
        scores: scores of all nodes.
        needs_gradient: whether to compute log_alpha in addition to log_beta.

    Returns:
        Losses, log_alpha and log_beta.
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
    # an utterance without frames has no node: clamp its index, and set its loss to infinity below
    log_likelihood = log_beta[nodes.first_node.clamp(max=nodes.num_nodes - 1)]
    has_no_path = (log_likelihood < NO_PATH) | (nodes.frame_lengths == 0)
    losses = torch.where(has_no_path, torch.inf, -log_likelihood)
    return PathSums(losses.to(torch.float32), log_alpha, log_beta, durations)


def run_posteriors(
    nodes: Nodes, settings: LatticeSettings, scores: Scores, sums: PathSums, loss_gradient: Tensor, negligible: float
) -> Posteriors:
    """Compute the posterior probabilities of the arcs that leave each node.

    Args:
        nodes: the lattice nodes of the batch.
        settings: options of the lattice.
        scores: scores of all nodes.
        sums: path sums with log_alpha.
        loss_gradient: (B,) gradient of the loss of each utterance.
        negligible: largest allowed sum of the posteriors of the irrelevant nodes of an utterance; negative to make all
            nodes relevant.

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
    """Compute the gradients of logits.

    Args:
        token_logits: (rows, V) with contiguous rows.
        token_gradient: (rows, V) output with contiguous rows; may be `token_logits`.
        duration_gradient: (rows, D) output with contiguous rows; not used for RNN-T.
        row_node: (rows,) int32 node of each row; -1 for padding, which gets the gradient 0.
        nodes: the lattice nodes of the batch.
        settings: options of the lattice.
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
