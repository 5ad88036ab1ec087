"""The best output of a large linear layer: looked for in bfloat16, decided in float32.

A product of few rows with a large weight is bound by reading the weight. In bfloat16 that is half the bytes, and such
CPUs have instructions for it; what rounding can have changed is computed again in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# relative error of rounding to bfloat16, which has 8 significant bits
ROUNDING = 2.0**-8

# the share of the bound that is left to the float32 sums themselves
SLACK = 1.05

# outputs per row that may be computed again; where there are more, all are
CANDIDATES = 16

# numbers of a weight from which on the search pays
WORTHWHILE = 2**20


class ScreenedLinear:
    """The index of the largest output of `hidden @ weight.T + bias`, as float32 has it.

    Args:
        weight: (V, J) float32.
        bias: (V,) float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.rounded = weight.bfloat16(), bias.bfloat16()
        self.norm = torch.linalg.vector_norm(weight, dim=1).amax()
        self.constant = ROUNDING * bias.abs().amax()

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Tell whether the search is faster than the product itself: a large weight, a CPU with bfloat16 products."""
        # older releases of torch do not tell
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and weight.numel() >= WORTHWHILE
            and bool(capabilities.get("avx512_bf16"))
        )

    def argmax(self, hidden: Tensor) -> Tensor:
        """Return the index of each row's largest output, the lowest of equal ones.

        Args:
            hidden: (R, J) float32.

        Returns:
            (R,) indices.
        """
        rounded = hidden.bfloat16()
        scores = F.linear(rounded, *self.rounded)
        top, places = scores.topk(min(CANDIDATES + 1, scores.shape[1]))
        best = top[:, 0].float()
        # by Cauchy and Schwarz: what rounding the weight, the rows, the bias and the outputs may have changed
        norms = torch.linalg.vector_norm(torch.stack([hidden, hidden - rounded]), dim=2)
        error = self.norm * (ROUNDING * norms[0] + (1 + ROUNDING) * norms[1]) + self.constant + ROUNDING * best.abs()
        # both the best and another output may be off
        floor = best - 2 * SLACK * error
        rows, ranks = (top >= floor[:, None]).nonzero(as_tuple=True)
        columns = places[rows, ranks]
        if not bool(floor.isfinite().all()) or bool((ranks == CANDIDATES).any()):
            return F.linear(hidden, self.weight, self.bias).max(-1).indices
        if len(rows) == len(hidden):
            return columns
        products = torch.bmm(self.weight.index_select(0, columns)[:, None], hidden.index_select(0, rows)[:, :, None])
        exact = products.flatten() + self.bias[columns]
        best = torch.full_like(best, -torch.inf).scatter_reduce_(0, rows, exact, "amax")
        columns = torch.where(exact == best[rows], columns, len(self.weight))
        return torch.full_like(best, len(self.weight), dtype=torch.long).scatter_reduce_(0, rows, columns, "amin")
