"""A slow reference of the transducer loss for tests, differentiated by autograd.

The losses for training are in `transducer.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def transducer_loss_reference(
    logits: Tensor,
    labels: Sequence[int],
    blank_id: int,
    durations: Sequence[int] | None = None,
    sigma: float = 0.0,
    fastemit_lambda: float = 0.0,
) -> Tensor:
    """Compute the RNN-T or TDT loss of one clip node by node, as a slow reference for tests.

    log_alpha(t, u) sums the probabilities of all paths from (0, 0) to the node (t, u), which means that u labels have
    been emitted and frame t is read next. The docstring of `path_sums.py` contains its recursion.

    Args:
        logits: (T, U+1, V), or (T, U+1, V + D) with durations: unnormalised scores of a clip with T > 0 frames.
        labels: the U token ids.
        blank_id, durations, sigma, fastemit_lambda: see `TransducerOptions` in `lattice.py`.

    Returns:
        Differentiable scalar, infinite if there is no path.
    """
    num_frames, num_labels = len(logits), len(labels)
    vocab_size = logits.shape[-1] - len(durations or ())
    token_log_probs = logits[..., :vocab_size].log_softmax(-1)
    duration_log_probs = logits[..., vocab_size:].log_softmax(-1) - sigma
    if durations is None:
        duration_log_probs = logits.new_zeros(num_frames, num_labels + 1, 2)
    # log_alpha by node (t, u); a node that no path reaches has no entry
    log_alpha = {(0, 0): logits.new_zeros(())}
    for t, u in itertools.product(range(num_frames + 1), range(num_labels + 1)):
        path_log_probs = []
        for duration_index, duration in enumerate((0, 1) if durations is None else durations):
            source = t - duration, u
            if duration > 0 and source in log_alpha:
                token_log_prob = token_log_probs[source][blank_id]
                path_log_probs.append(log_alpha[source] + token_log_prob + duration_log_probs[source][duration_index])
            source = t - duration, u - 1
            if t < num_frames and (durations is not None or duration == 0) and source in log_alpha:
                token_log_prob = token_log_probs[source][labels[u - 1]]
                # FastEmit scales the gradient and leaves the value unchanged
                token_log_prob = token_log_prob + fastemit_lambda * (token_log_prob - token_log_prob.detach())
                path_log_probs.append(log_alpha[source] + token_log_prob + duration_log_probs[source][duration_index])
        if path_log_probs:
            log_alpha[t, u] = torch.stack(path_log_probs).logsumexp(0)
    return -log_alpha.get((num_frames, num_labels), logits.new_tensor(-math.inf))
