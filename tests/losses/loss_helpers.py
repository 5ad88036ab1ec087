"""Random batches and plain references for the tests of the transducer losses."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_parakeet.losses import rnnt_loss, tdt_loss, transducer_loss
from transformers_parakeet.losses.reference import transducer_loss_reference

VOCAB_SIZE, BLANK_ID, JOINT_WIDTH = 7, 5, 12


class RandomBatch:
    """Random inputs of the joint network, labels and lengths; the values are float64 numbers that float32 can hold.

    Args:
        seed: of the random numbers.
        durations: of TDT; None for RNN-T.
        shape: clips, frames and labels of the padded batch; None draws a small one.
    """

    def __init__(self, seed, durations=None, shape=None):
        generator = torch.Generator().manual_seed(seed)

        def number_below(limit):
            return int(torch.randint(limit, (), generator=generator))

        batch, num_frames, num_labels = shape or (1 + number_below(3), 1 + number_below(7), number_below(6))
        self.durations = durations
        self.frame_lengths = [num_frames] + [1 + number_below(num_frames) for _ in range(batch - 1)]
        self.label_lengths = [number_below(num_labels + 1) for _ in range(batch - 1)] + [num_labels]
        self.labels = torch.randint(BLANK_ID, (batch, num_labels), generator=generator)
        num_outputs = VOCAB_SIZE + len(durations or ())
        scale = 0.3 + 2 * float(torch.rand((), generator=generator))
        shapes = (
            (batch, num_frames, JOINT_WIDTH),
            (batch, num_labels + 1, JOINT_WIDTH),
            (num_outputs, JOINT_WIDTH),
            (num_outputs,),
        )
        self.values = [scale * torch.randn(shape, generator=generator, dtype=torch.double) for shape in shapes]

    def joint_inputs(self, dtype=torch.double):
        """Return encoder states, predictor states, weight and bias as leaves of autograd."""
        # rounded to float32 first, so that float32 and float64 hold the same numbers
        return [tensor.float().to(dtype).requires_grad_() for tensor in self.values]

    @property
    def lengths(self):
        """Frame lengths and label lengths as tensors, each (B,)."""
        return torch.tensor(self.frame_lengths), torch.tensor(self.label_lengths)

    def reference_losses(self, joint_inputs, fastemit_lambda=0.0, sigma=0.0):
        """Return (B,) losses by the plain reference."""
        logits = joint_logits(*joint_inputs)
        losses = []
        for clip, (num_frames, num_labels) in enumerate(zip(self.frame_lengths, self.label_lengths, strict=True)):
            labels = self.labels[clip, :num_labels].tolist()
            clip_logits = logits[clip, :num_frames, : num_labels + 1]
            losses.append(
                transducer_loss_reference(clip_logits, labels, BLANK_ID, self.durations, sigma, fastemit_lambda)
            )
        return torch.stack(losses)

    def fused_losses(self, joint_inputs, **options):
        """Return (B,) losses, or the reduced loss, by `transducer_loss`."""
        options = {"reduction": "none", "durations": self.durations, **options}
        return transducer_loss(*joint_inputs, self.labels, *self.lengths, BLANK_ID, **options)

    def logits_losses(self, joint_inputs, sigma=0.0, fastemit_lambda=0.0):
        """Return (B,) losses by `rnnt_loss` or `tdt_loss`."""
        logits = joint_logits(*joint_inputs)
        options = {"reduction": "none", "fastemit_lambda": fastemit_lambda}
        if self.durations is None:
            return rnnt_loss(logits, self.labels, *self.lengths, BLANK_ID, **options)
        token_logits, duration_logits = logits[..., :VOCAB_SIZE], logits[..., VOCAB_SIZE:]
        return tdt_loss(
            token_logits, duration_logits, self.labels, *self.lengths, BLANK_ID, self.durations, sigma, **options
        )


def joint_logits(encoder_states, predictor_states, weight, bias):
    """Return the logits of a joint network with ReLU for all nodes: (B, T, U+1, V + D)."""
    return F.linear(torch.relu(encoder_states[:, :, None] + predictor_states[:, None]), weight, bias)


def gradients(losses, leaves):
    """Return the gradients of the sum of the finite losses."""
    is_finite = losses.isfinite()
    if not is_finite.any():
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(losses[is_finite].sum(), leaves))


def relative_error(tensors, references):
    """Return the largest difference, relative to the largest entry of each reference."""
    return max(
        float((a.detach().double() - b.detach().double()).abs().max() / b.detach().abs().max().clamp(min=1e-3))
        for a, b in zip(tensors, references, strict=True)
    )


def enumerate_paths(
    logits: Tensor,
    labels: list[int],
    blank_id: int,
    durations: tuple[int, ...] | None,
    sigma: float,
) -> tuple[float, int]:
    """Walk every path of one clip, independently of any recursion.

    Args:
        logits: (T, U+1, V [+ D]) float64.
        labels: the U token ids.
        blank_id: id of the blank.
        durations: of TDT; None for RNN-T, where a label has duration 0 and a blank has duration 1.
        sigma: subtracted from every token log-probability.

    Returns:
        Negative logarithm of the sum of the path probabilities, and the number of paths.
    """
    vocab_size = logits.shape[-1] - len(durations or ())
    token_log_probs = logits[..., :vocab_size].log_softmax(-1) - sigma
    duration_log_probs = logits[..., vocab_size:].log_softmax(-1)
    # (whether the token is the blank, duration, index of the duration output)
    if durations is None:
        arcs = [(True, 1, None), (False, 0, None)]
    else:
        arcs = [(is_blank, d, i) for i, d in enumerate(durations) for is_blank in (True, False) if d or not is_blank]
    path_probs = []

    def walk(t, u, log_prob):
        """Follow all arcs that leave node (t, u)."""
        for is_blank, duration, index in arcs:
            if not is_blank and u == len(labels):
                continue
            arc = float(token_log_probs[t, u, blank_id if is_blank else labels[u]])
            arc += 0.0 if index is None else float(duration_log_probs[t, u, index])
            if t + duration < len(logits):
                walk(t + duration, u + (not is_blank), log_prob + arc)
            elif t + duration == len(logits) and is_blank and u == len(labels):
                path_probs.append(math.exp(log_prob + arc))

    if len(logits) > 0:
        walk(0, 0, 0.0)
    return (-math.log(sum(path_probs)) if path_probs else math.inf), len(path_probs)
