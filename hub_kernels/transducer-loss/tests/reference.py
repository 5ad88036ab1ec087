"""The transducer loss as plainly as possible: float64, one lattice node after the other, gradients by autograd."""

import torch

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def joint_logits(encoder_states, predictor_states, weight, bias, activation="relu"):
    """Compute the (B, T, U+1, outputs) logits of every pair of an encoder state and a predictor state."""
    hidden = ACTIVATIONS[activation](encoder_states[:, :, None] + predictor_states[:, None])
    logits = hidden @ weight.t()
    return logits if bias is None else logits + bias


class ScaledGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied by a factor, as FastEmit does for the tokens of labels."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def reference_loss(
    logits, labels, num_frames, num_labels, blank_id, durations=None, sigma=0.0, fastemit_lambda=0.0
):  # fmt: skip
    """Compute the loss of one utterance from the path sums of all nodes (t, u).

    Args:
        logits: (T, U+1, V + D).
        labels: list of labels.
        num_frames: number of valid frames.
        num_labels: number of valid labels.
        blank_id: id of the blank.
        durations: frames of each duration output; None for RNN-T.
        sigma: subtracted from every token log-probability, with durations.
        fastemit_lambda: token gradients of labels are multiplied by 1 + lambda.

    Returns:
        Scalar negative log-likelihood, infinite if no path exists.
    """
    vocab_size = logits.shape[-1] - (0 if durations is None else len(durations))
    token_log_probs = logits[..., :vocab_size].log_softmax(-1)
    # frames that an arc advances, and the index of its duration output
    if durations is None:
        blank_durations, label_durations = {1: None}, {0: None}
    else:
        token_log_probs = token_log_probs - sigma
        duration_log_probs = logits[..., vocab_size:].log_softmax(-1)
        blank_durations = {duration: index for index, duration in enumerate(durations) if duration > 0}
        label_durations = {duration: index for index, duration in enumerate(durations)}
    # log-weights of the paths that enter each node
    entering = {(0, 0): [logits.new_zeros(())]}
    complete_paths = []
    for t in range(num_frames):
        for u in range(num_labels + 1):
            if (t, u) not in entering:
                continue
            log_alpha = torch.logsumexp(torch.stack(entering[t, u]), 0)
            arcs = [(duration, 0, blank_id, index) for duration, index in blank_durations.items()]
            if u < num_labels:
                arcs += [(duration, 1, labels[u], index) for duration, index in label_durations.items()]
            for duration, emitted_labels, token, index in arcs:
                weight = token_log_probs[t, u, token]
                if emitted_labels:
                    weight = ScaledGradient.apply(weight, 1.0 + fastemit_lambda)
                if index is not None:
                    weight = weight + duration_log_probs[t, u, index]
                target = (t + duration, u + emitted_labels)
                if target[0] < num_frames:
                    entering.setdefault(target, []).append(log_alpha + weight)
                elif target == (num_frames, num_labels) and emitted_labels == 0:
                    complete_paths.append(log_alpha + weight)
    if not complete_paths:
        return logits.new_full((), torch.inf)
    return -torch.logsumexp(torch.stack(complete_paths), 0)
