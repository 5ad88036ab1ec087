"""NeMo's confidence formulas in float64, for the tests of decoding."""

import math

import numpy as np


def confidence64(logits: np.ndarray, method: str) -> float:
    """Compute the confidence of one distribution (V,) by NeMo's formulas, from section 8 of tests/golden/NOTES.md."""
    exponents = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    p = exponents / exponents.sum()
    n = len(p)
    if method == "max_prob":
        return float((p.max() * n - 1) / (n - 1))
    alpha = 0.33
    power_sum = float(np.sum(p**alpha))
    limit = math.exp((1 - n ** (1 - alpha)) / (1 - alpha))
    return (math.exp((1 - power_sum) / (1 - alpha)) - limit) / (1 - limit)
