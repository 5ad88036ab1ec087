"""Confidence of tokens, computed from the scores of all tokens.

The confidence of words and segments is computed in `timestamps.py`.
"""

import torch
from torch import Tensor

CONFIDENCE_METHODS = ("max_prob", "entropy")

# order alpha of the Tsallis entropy, the default of NeMo's `ConfidenceMethodConfig`
TSALLIS_ALPHA = 0.33


def compute_token_confidence(logits: Tensor, method: str = "max_prob", tokens: Tensor | None = None) -> Tensor:
    """Compute the confidence of the emitted token from the scores of all tokens.

    Source: arXiv 2212.08703, and `asr_confidence_utils.py` in NeMo.

    Args:
        logits: (..., V) raw scores or log-probabilities of the V tokens, with the blank and without duration outputs.
        method: `"max_prob"`: (p V - 1) / (V - 1), where p is the probability of the emitted token. `"entropy"`, NeMo's
            default: Tsallis entropy of order 0.33 with exponential normalisation, which does not depend on the token.
        tokens: (...) emitted tokens, if a language model or phrase boosting chose them; `None` for the tokens with the
            largest probability.

    Returns:
        (...) float32, from 0 for a uniform distribution to 1 for a distribution with all probability on one token. An
        emitted token with p < 1 / V has the confidence 0.

    Raises:
        ValueError: `method` is not a confidence method.
    """
    check_confidence_method(method)
    probabilities = logits.float().softmax(-1)
    vocab_size = probabilities.shape[-1]
    if method == "max_prob":
        if tokens is None:
            return scale_probabilities(probabilities.amax(-1), vocab_size)
        return scale_probabilities(probabilities.gather(-1, tokens[..., None])[..., 0], vocab_size)
    # Tsallis entropy: (1 - sum of p^alpha) / (1 - alpha); its maximum is the entropy of the uniform distribution
    entropy = (1 - (probabilities**TSALLIS_ALPHA).sum(-1)) / (1 - TSALLIS_ALPHA)
    max_entropy = torch.tensor((1 - vocab_size ** (1 - TSALLIS_ALPHA)) / (1 - TSALLIS_ALPHA))
    # exponential normalisation: map exp(entropy) linearly, exp(max_entropy) to 0 and exp(0) to 1
    exp_max_entropy = max_entropy.exp()
    return (entropy.exp() - exp_max_entropy) / (1 - exp_max_entropy)


def scale_probabilities(probabilities: Tensor, vocab_size: int) -> Tensor:
    """Scale probabilities of tokens to confidences of the method `"max_prob"`.

    Args:
        probabilities: (...) probabilities.
        vocab_size: number of tokens V.

    Returns:
        (...) 0 for probabilities up to 1 / V, 1 for the probability 1.
    """
    return ((probabilities * vocab_size - 1) / (vocab_size - 1)).clamp(min=0)


def check_confidence_method(method: str) -> None:
    """Check that a confidence method exists.

    Args:
        method: `"max_prob"` or `"entropy"`.

    Raises:
        ValueError: `method` is not one of these.
    """
    if method not in CONFIDENCE_METHODS:
        raise ValueError(f"the confidence method must be one of {', '.join(CONFIDENCE_METHODS)}, got {method!r}")
