"""Confidence of tokens, computed from the scores of all tokens.

Words and segments get theirs in `timestamps.py`.
"""

import torch
from torch import Tensor

CONFIDENCE_METHODS = ("max_prob", "entropy")

# order alpha of the Tsallis entropy, the default of NeMo's `ConfidenceMethodConfig`
TSALLIS_ALPHA = 0.33


def token_confidence(logits: Tensor, method: str = "max_prob") -> Tensor:
    """Compute the confidence of the best token from the scores of all tokens.

    Source: arXiv 2212.08703, and `asr_confidence_utils.py` in NeMo.

    Args:
        logits: (..., V) raw scores or log-probabilities of the tokens, with the blank and without duration outputs.
        method: `"max_prob"`: (p V - 1) / (V - 1), where p is the largest probability. `"entropy"`, NeMo's default:
            Tsallis entropy of order 0.33 with exponential normalisation.

    Returns:
        (...) float32, from 0 for a uniform distribution to 1 for a certain token.

    Raises:
        ValueError: the method is unknown.
    """
    check_confidence_method(method)
    probabilities = logits.float().softmax(-1)
    vocab_size = probabilities.shape[-1]
    if method == "max_prob":
        return (probabilities.amax(-1) * vocab_size - 1) / (vocab_size - 1)
    entropy = (1 - (probabilities**TSALLIS_ALPHA).sum(-1)) / (1 - TSALLIS_ALPHA)
    uniform_entropy = torch.tensor((1 - vocab_size ** (1 - TSALLIS_ALPHA)) / (1 - TSALLIS_ALPHA))
    uniform_score = uniform_entropy.exp()
    return (entropy.exp() - uniform_score) / (1 - uniform_score)


def check_confidence_method(method: str) -> None:
    """Raise ValueError if no confidence method has this name.

    Args:
        method: `"max_prob"` or `"entropy"`.

    Raises:
        ValueError: any other name.
    """
    if method not in CONFIDENCE_METHODS:
        raise ValueError(f"the confidence method must be one of {', '.join(CONFIDENCE_METHODS)}, got {method!r}")
