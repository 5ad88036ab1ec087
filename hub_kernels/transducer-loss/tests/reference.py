"""The loss as slow and plain as it can be: float64, one cell after the other, gradients by autograd."""

import torch

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def joint_logits(encoder_states, predictor_states, weight, bias, activation="relu"):
    """Scores (B, T, U+1, outputs) of every pair of frame and predictor state."""
    hidden = ACTIVATIONS[activation](encoder_states[:, :, None] + predictor_states[:, None])
    logits = hidden @ weight.t()
    return logits if bias is None else logits + bias


class Emphasis(torch.autograd.Function):
    """The identity, whose gradient is multiplied: FastEmit on the tokens of labels."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def reference_loss(logits, labels, frames, count, blank_id, durations=None, sigma=0.0, fastemit_lambda=0.0):
    """Loss of one utterance.

    Args:
        logits: (T, U+1, V + D).
        labels: list of labels.
        frames: valid frames.
        count: valid labels.
        blank_id: id of the blank.
        durations: frames of each duration output; None for RNN-T.
        sigma: subtracted from every token log-probability.
        fastemit_lambda: token gradients of labels are scaled by 1 + lambda.
    """
    split = logits.shape[-1] - (0 if durations is None else len(durations))
    tokens = logits[..., :split].log_softmax(-1)
    if durations is None:
        blanks, speech = {1: None}, {0: None}
    else:
        tokens = tokens - sigma
        timing = logits[..., split:].log_softmax(-1)
        blanks = {span: index for index, span in enumerate(durations) if span > 0}
        speech = {span: index for index, span in enumerate(durations)}
    paths = {(0, 0): logits.new_zeros(())}
    ends = []
    for frame in range(frames):
        for column in range(count + 1):
            if (frame, column) not in paths:
                continue
            here = paths[frame, column]
            here = torch.logsumexp(torch.stack(here), 0) if isinstance(here, list) else here
            arcs = [(span, 0, blank_id, index) for span, index in blanks.items()]
            if column < count:
                arcs += [(span, 1, labels[column], index) for span, index in speech.items()]
            for span, step, token, index in arcs:
                score = tokens[frame, column, token]
                if step:
                    score = Emphasis.apply(score, 1.0 + fastemit_lambda)
                if index is not None:
                    score = score + timing[frame, column, index]
                if frame + span < frames:
                    paths.setdefault((frame + span, column + step), []).append(here + score)
                elif frame + span == frames and step == 0 and column == count:
                    ends.append(here + score)
    return -torch.logsumexp(torch.stack(ends), 0) if ends else logits.new_full((), torch.inf)
