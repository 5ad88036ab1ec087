"""The lattice of the transducer loss: its nodes, their log-probabilities, and the gradients of the logits at a node.

Node (t, u) of a clip means that u labels have been emitted and frame t is read next. Two kinds of arcs leave a node:

    blank with duration d > 0:   (t, u) -> (t + d, u)
    label with duration d >= 0:  (t, u) -> (t + d, u + 1)

RNN-T (Graves, arXiv 1211.3711) has blanks of duration 1 and labels of duration 0. TDT (arXiv 2304.06795) predicts the
duration. A path starts at (0, 0) and ends at (T, U). Only a blank may enter frame T.

The sums over the paths are in `path_sums.py`. The log-probabilities are computed in `transducer.py` (from logits) and
in `chunked_joint.py` (from the inputs of the joint network).

Letters: B clips, T frames, U labels, V tokens with the blank, D durations. `num_nodes` is the number of valid nodes in
the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class TransducerOptions:
    """Options that decide which arcs the lattice has and how the arcs are weighted.

    Args:
        blank_id: id of the blank.
        durations: number of frames of each duration output of TDT; None for RNN-T.
        sigma: logit under-normalisation of TDT, subtracted from every token log-probability. RNN-T ignores it.
        fastemit_lambda: FastEmit weight (arXiv 2010.11148). The gradients of the log-probabilities of labels are scaled
            by 1 + lambda, as in NeMo's numba kernels. The value of the loss does not change.
    """

    blank_id: int
    durations: tuple[int, ...] | None
    sigma: float
    fastemit_lambda: float

    @property
    def is_tdt(self) -> bool:
        """Whether the model predicts durations (TDT); False for RNN-T."""
        return self.durations is not None

    @property
    def arc_durations(self) -> tuple[int, ...]:
        """Possible durations of an arc, in frames: the durations of TDT, or 0 (label) and 1 (blank) for RNN-T."""
        return (0, 1) if self.durations is None else self.durations


@dataclass(frozen=True)
class Lattice:
    """The valid (non-padding) nodes of the lattices of a batch.

    Args:
        grid_shape: B, T and U+1 of the padded grid of nodes.
        next_labels: (B, U+1) label that is emitted after u labels; 0 after the last label.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        nodes: (num_nodes,) indices of the valid nodes in the flattened (B, T, U+1) grid, in ascending order.
        options: options of the loss.
    """

    grid_shape: tuple[int, int, int]
    next_labels: Tensor
    frame_lengths: Tensor
    label_lengths: Tensor
    nodes: Tensor
    options: TransducerOptions


@dataclass(frozen=True)
class NodeLogProbs:
    """Log-probabilities of the outputs of the joint network that the lattice uses, at each valid node.

    Args:
        blank: (num_nodes,) log-probability of the blank.
        label: (num_nodes,) log-probability of the next label; ignored after the last label.
        durations: (num_nodes, D) log-probabilities of the durations; None for RNN-T.
    """

    blank: Tensor
    label: Tensor
    durations: Tensor | None


@dataclass(frozen=True)
class ArcPosteriors:
    """Posterior probabilities of the arcs that leave each valid node.

    Args:
        blank: (num_nodes,) posterior of the blank arcs, summed over durations.
        label: (num_nodes,) posterior of the label arcs, summed over durations and multiplied by 1 + FastEmit lambda.
        durations: (num_nodes, D) posterior of each duration, summed over blank and label arcs, without FastEmit.
    """

    blank: Tensor
    label: Tensor
    durations: Tensor

    def to(self, dtype: torch.dtype) -> ArcPosteriors:
        """Return a copy of the posteriors in another dtype.

        Args:
            dtype: dtype of the copy.
        """
        return ArcPosteriors(self.blank.to(dtype), self.label.to(dtype), self.durations.to(dtype))


@dataclass(frozen=True)
class NodeCoordinates:
    """Coordinates of the valid nodes.

    Args:
        clip_indices: (num_nodes,) index of the clip in the batch.
        frame_indices: (num_nodes,) frame t.
        label_positions: (num_nodes,) number u of labels that have been emitted.
    """

    clip_indices: Tensor
    frame_indices: Tensor
    label_positions: Tensor


def build_lattice(
    grid_shape: Sequence[int],
    vocab_size: int,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    options: TransducerOptions,
) -> Lattice:
    """Check labels and lengths, and list the valid nodes of the lattices of a batch.

    Args:
        grid_shape: B, T and U+1 of the padded grid of nodes.
        vocab_size: V, number of tokens with the blank.
        labels: (B, U) token ids; values beyond `label_lengths` are ignored.
        frame_lengths: (B,) number of valid frames.
        label_lengths: (B,) number of valid labels.
        options: options of the loss.

    Returns:
        The lattices of the batch, on the device of the labels.

    Raises:
        ValueError: the shape of the labels, a length or a label is invalid.
    """
    batch_size, num_frames, num_positions = grid_shape
    if tuple(labels.shape) != (batch_size, num_positions - 1):
        raise ValueError(
            f"`labels` must have shape {(batch_size, num_positions - 1)}, one column fewer than the predictor states, "
            f"got {tuple(labels.shape)}: prepend the blank to the predictor's input, not to the labels"
        )
    frame_lengths = _check_lengths("frame_lengths", frame_lengths, batch_size, num_frames, labels.device)
    label_lengths = _check_lengths("label_lengths", label_lengths, batch_size, num_positions - 1, labels.device)
    label_positions = torch.arange(num_positions, device=labels.device)
    # (B, U+1)
    has_next_label = label_positions < label_lengths[:, None]
    next_labels = F.pad(labels.long(), (0, 1)).masked_fill(~has_next_label, 0)
    _check_labels(next_labels[has_next_label], vocab_size, options.blank_id)
    # (B, T, 1) and (B, 1, U+1): a clip with n labels has n + 1 valid label positions
    is_valid_frame = torch.arange(num_frames, device=labels.device)[:, None] < frame_lengths[:, None, None]
    is_valid_position = (label_positions <= label_lengths[:, None])[:, None]
    nodes = (is_valid_frame & is_valid_position).flatten().nonzero()[:, 0]
    return Lattice((batch_size, num_frames, num_positions), next_labels, frame_lengths, label_lengths, nodes, options)


def _check_lengths(name: str, lengths: Tensor, batch_size: int, max_length: int, device: torch.device) -> Tensor:
    """Check the number and the range of lengths, and move them to a device.

    Args:
        name: name of the argument, for the error.
        lengths: must be (B,) numbers from 0 to `max_length`.
        batch_size: B.
        max_length: padded length of the batch.
        device: device of the result.

    Returns:
        (B,) int64 lengths on `device`.

    Raises:
        ValueError: the shape is not (B,), or a length is out of range.
    """
    lengths = lengths.to(device, torch.long)
    if lengths.shape != (batch_size,) or bool(((lengths < 0) | (lengths > max_length)).any()):
        raise ValueError(f"`{name}` must be {batch_size} numbers from 0 to {max_length}, got {lengths.tolist()}")
    return lengths


def _check_labels(valid_labels: Tensor, vocab_size: int, blank_id: int) -> None:
    """Raise ValueError if a label is the blank or is not a token id.

    Args:
        valid_labels: labels without padding, of any shape.
        vocab_size: V, number of tokens with the blank.
        blank_id: id of the blank.
    """
    is_invalid = (valid_labels < 0) | (valid_labels >= vocab_size) | (valid_labels == blank_id)
    if bool(is_invalid.any()):
        raise ValueError(
            f"labels must be ids from 0 to {vocab_size - 1} other than the blank ({blank_id}), got "
            f"{valid_labels[is_invalid].unique().tolist()}: `label_lengths` must count the labels without padding"
        )


def compute_node_coordinates(lattice: Lattice) -> NodeCoordinates:
    """Compute clip index, frame and label position of each valid node from its index in the (B, T, U+1) grid.

    Args:
        lattice: the lattices of the batch.
    """
    _, num_frames, num_positions = lattice.grid_shape
    nodes = lattice.nodes
    return NodeCoordinates(
        clip_indices=nodes // (num_frames * num_positions),
        frame_indices=nodes // num_positions % num_frames,
        label_positions=nodes % num_positions,
    )


def repeat_per_node(lattice: Lattice, clip_values: Tensor) -> Tensor:
    """Repeat one value per clip, shape (B,), for each valid node of the clip, shape (num_nodes,).

    Args:
        lattice: the lattices of the batch.
        clip_values: (B,) one value per clip.
    """
    _, num_frames, num_positions = lattice.grid_shape
    return clip_values[lattice.nodes // (num_frames * num_positions)]


def get_accumulation_dtype(input_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of log-probabilities and of gradient sums: float64 for float64 inputs, otherwise float32.

    Args:
        input_dtype: dtype of the inputs of the loss.
    """
    return torch.double if input_dtype == torch.double else torch.float32


def scale_posteriors(lattice: Lattice, posteriors: ArcPosteriors, loss_grad: Tensor) -> ArcPosteriors:
    """Multiply the posteriors of each clip by the gradient of the reduced loss with respect to the loss of the clip.

    Args:
        lattice: the lattices of the batch.
        posteriors: posteriors of the arcs that leave each valid node.
        loss_grad: (B,) gradient with respect to the loss of each clip.

    Returns:
        The scaled posteriors.
    """
    node_grad = repeat_per_node(lattice, loss_grad)
    return ArcPosteriors(
        posteriors.blank * node_grad,
        posteriors.label * node_grad,
        posteriors.durations * node_grad[:, None],
    )


def replace_by_token_gradient_(
    token_probs: Tensor, blank_id: int, next_labels: Tensor, blank_posteriors: Tensor, label_posteriors: Tensor
) -> None:
    """Overwrite token probabilities by the gradient of the loss with respect to the token logits.

    The gradient of the logit of token v is w * P(v) - (posterior of the arcs that emit v), where w is the sum of the
    posteriors of the blank arcs and label arcs of the node.

    Args:
        token_probs: (num_nodes, V or more) softmax of the token logits, overwritten by the gradient.
        blank_id: id of the blank.
        next_labels: (num_nodes,) label that each node can emit.
        blank_posteriors: (num_nodes,) posteriors of the blank arcs, times the gradient of the clip's loss.
        label_posteriors: (num_nodes,) posteriors of the label arcs, times the gradient of the clip's loss.
    """
    token_probs.mul_((blank_posteriors + label_posteriors)[:, None])
    token_probs[:, blank_id] -= blank_posteriors
    token_probs.scatter_add_(1, next_labels[:, None], -label_posteriors[:, None])


def compute_duration_gradient(duration_logits: Tensor, duration_posteriors: Tensor) -> Tensor:
    """Compute the gradient of the loss with respect to the duration logits.

    The gradient of the logit of duration d is w * P(d) - posterior(d), where w is the sum of the posteriors of the node
    over all durations.

    Args:
        duration_logits: (..., D) unnormalised duration scores.
        duration_posteriors: (..., D) posteriors of the durations, times the gradient of the clip's loss.

    Returns:
        (..., D) gradient.
    """
    return duration_logits.softmax(-1) * duration_posteriors.sum(-1, keepdim=True) - duration_posteriors


def refuse_second_derivative() -> None:
    """Raise RuntimeError if backward runs with `create_graph=True`: the analytic gradient has no autograd graph."""
    if torch.is_grad_enabled():
        raise RuntimeError("the transducer loss has no second derivative: call backward without `create_graph=True`")
