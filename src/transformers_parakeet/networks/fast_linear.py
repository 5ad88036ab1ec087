"""The best output of a large linear layer: looked for in bfloat16, decided in float32.

A product of few rows with a large weight is bound by reading the weight. In bfloat16 that is half the bytes, and such
CPUs have instructions for it; what rounding can have changed is computed again in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# relative error of rounding to bfloat16, which has 8 significant bits
ROUNDING = 2.0**-8

# the share of the bound that is left to the float32 sums themselves
SLACK = 1.05

# outputs of a group: the best of every group is found faster than the best few of all
GROUP = 64

# outputs per row, on average, that may be computed again; where there are more, all are
CANDIDATES = 16

# numbers of a weight from which on the search pays
WORTHWHILE = 2**20


NOTHING = (-math.inf, 0)


class ScreenedLinear:
    """The index of the largest output of `hidden @ weight.T + bias`, as float32 has it.

    Args:
        weight: (V, J) float32.
        bias: (V,) float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        # full groups: what is added never wins
        width = len(weight) + -len(weight) % GROUP
        rounded = weight.new_zeros(width, weight.shape[1], dtype=torch.bfloat16)
        self.rounded = rounded, bias.new_full((width,), -torch.inf, dtype=torch.bfloat16)
        for whole, part in zip(self.rounded, (weight, bias), strict=True):
            whole[: len(part)] = part
        # by Cauchy and Schwarz, what rounding the weight and the rows may change, per length of a row; by the bias
        self.slope = ROUNDING * (2 + ROUNDING) * torch.linalg.vector_norm(weight, dim=1).amax().item()
        self.constant = ROUNDING * bias.abs().amax().item()

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
        # output i * groups + g is the i-th of group g
        scores = F.linear(hidden.bfloat16(), *self.rounded).unflatten(1, (GROUP, -1))
        heads = scores.amax(1)
        best = heads.amax(1).float()
        # the outputs are rounded, too
        error = self.slope * torch.linalg.vector_norm(hidden, dim=1) + ROUNDING * best.abs() + self.constant
        # both the best and another output may be off
        floor = best - 2 * SLACK * error
        rows, groups = (heads >= floor[:, None]).nonzero(as_tuple=True)
        places, within = (scores[rows, :, groups] >= floor[rows, None]).nonzero(as_tuple=True)
        if len(places) <= CANDIDATES * len(hidden):
            rows, columns = rows[places], within * scores.shape[2] + groups[places]
            exact = torch.linalg.vecdot(self.weight.index_select(0, columns), hidden.index_select(0, rows))
            exact += self.bias[columns]
            winners: list[tuple[float, int]] = [NOTHING] * len(hidden)
            for row, column, score in zip(rows.tolist(), columns.tolist(), exact.tolist(), strict=True):
                winners[row] = max(winners[row], (score, -column))
            if NOTHING not in winners:
                return torch.tensor([-column for _, column in winners])
        # too many are close, or a row is not finite and has no candidates
        return F.linear(hidden, self.weight, self.bias).max(-1).indices
