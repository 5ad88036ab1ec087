"""Search for the largest output of a large linear layer, with int8 scores of all outputs and exact scores of the best.

The int8 product is that of `int8_linear.py`. The joint network in `transducer.py` calls the search.

Milliseconds of the median of many calls for 8198 outputs (8256 in bfloat16) and 640 inputs, with one thread on an
Intel Xeon with AMX, torch 2.13:

    rows                                                        1       4       16      32
    product in float32, fastest of two                          0.87    1.80    2.59    3.08
    product in bfloat16, fastest of two                         -       0.50    0.53    0.59
    product in int8                                             0.33    0.34    0.37    0.42
"""

from __future__ import annotations

import math
import threading
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from .fast_linear import full_argmax
from .int8_linear import has_int8_products, pack_weight, quantize_rows
from .searched_outputs import RoughScores, SearchedOutputs, find_outputs, score_outputs

# largest number of an unsigned 8-bit activation
MAX_UINT8 = 255

# the error bound is enlarged by 5 % to include the rounding of the float32 sums
ERROR_MARGIN = 1.05

# outputs per group: computing the maximum of each group is faster than `topk` over all outputs
GROUP_SIZE = 64

# maximum number of candidates per row, on average over the rows, that the search scores exactly
MAX_CANDIDATES_PER_ROW = 32

# minimum number of weights for which the search was measured to be faster than the product
MIN_SEARCH_WEIGHTS = 2**20

# number of weights per output that are compared to detect a change; 16 float32 numbers fill one cache line
SAMPLE_WIDTH = 16


class Int8Search:
    """Finds the largest output of a linear layer, with int8 scores of all outputs and exact scores of the candidates.

    The product of a small batch with a large weight is memory-bandwidth-bound. In int8 the weight has a quarter of the
    bytes of float32. A bound of the rounding errors decides which outputs are candidates. The object holds a rounded
    copy of the weight, but no reference to the weight itself, so it does not keep a deleted model in memory.

    Args:
        weight: (V, J) float32 weight of the layer.
        bias: (V,) bias of the layer.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.num_outputs = len(weight)
        # outputs with the score -inf fill the last group; output g * GROUP_SIZE + i is member i of group g
        num_padding = -self.num_outputs % GROUP_SIZE
        values, scales = quantize_rows(weight)
        rounding = (values * scales).sub_(weight)
        self.packed_weight = pack_weight(nn.functional.pad(values, (0, 0, 0, num_padding)))
        self.scales = nn.functional.pad(scales[:, 0], (0, num_padding), value=1.0)
        self.bias = nn.functional.pad(bias.float(), (0, num_padding), value=-torch.inf)
        self.weight_zero_points = torch.zeros(len(self.bias), dtype=torch.int32)
        # largest norm of the rounding error of the weights of an output, and largest norm of the weights of an output
        self.rounding_norm = float(torch.linalg.vector_norm(rounding, dim=1, dtype=torch.float32).amax())
        self.weight_norm = float(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).amax())
        self.weight_version = weight._version
        self.weight_sample, self.bias_copy = weight[:, :SAMPLE_WIDTH].clone(), bias.clone()

    @staticmethod
    def is_faster(weight: Tensor) -> bool:
        """Return whether the search is faster than the product of a small batch with this weight.

        This requires a large float32 weight, on a CPU with int8 instructions (VNNI or AMX). For a bfloat16 weight the
        product itself was faster.

        Args:
            weight: (outputs, inputs) weight of the layer.
        """
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and weight.numel() >= MIN_SEARCH_WEIGHTS
            # an inference tensor has no version counter, so an outdated rounded copy could not be detected
            and not weight.is_inference()
            and has_int8_products()
        )

    def is_up_to_date(self, weight: Tensor, bias: Tensor) -> bool:
        """Return whether the rounded copies still match the weight and bias of the layer.

        Changes through `weight.data` do not increase PyTorch's version counter, so some values of each weight row are
        compared with a stored sample as well.

        Args:
            weight: (V, J) present weight of the layer.
            bias: (V,) present bias of the layer.
        """
        return (
            self.weight_version == weight._version
            and self.weight_sample.dtype == weight.dtype
            and torch.equal(self.bias_copy, bias)
            and torch.equal(self.weight_sample, weight[:, :SAMPLE_WIDTH])
        )

    def argmax(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Find the index of the largest output of the linear layer in each row, as `full_argmax` does.

        Args:
            hidden: (R, J) float32 batch of R rows.
            weight: (V, J) weight of the layer. This object holds only an int8 copy of it.
            bias: (V,) bias of the layer.

        Returns:
            (R,) indices; the first index if several outputs are equal.
        """
        best_outputs = self._select_best(self._score(hidden), hidden, weight, bias)
        return full_argmax(hidden, weight, bias) if best_outputs is None else best_outputs

    def search(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> SearchedOutputs | None:
        """Decide in each row whether the last output, the blank, is the largest, and keep the scores of all outputs.

        Args:
            hidden, weight, bias: see `argmax`, in float32.

        Returns:
            The scores; `None` if a row has infinite or NaN scores, or too many outputs that could be the largest.
        """
        # the same product as in `score_outputs`, so a label equal to the blank has the same score
        blank_scores = torch.linalg.vecdot(weight[-1:].expand_as(hidden), hidden).add_(bias[-1]).numpy()
        rough_scores = self._score(hidden, has_blank=False)
        errors = rough_scores.errors.numpy()
        if not (np.isfinite(blank_scores) & np.isfinite(errors)).all():
            return None
        differences = rough_scores.group_maxima.numpy().max(1) - blank_scores
        is_blank = differences < errors
        open_rows = is_blank & (differences >= -errors)
        if open_rows.any():
            # labels that could have a larger score than the blank
            thresholds = np.where(open_rows, blank_scores - errors, np.nan)
            rows, outputs = find_outputs(rough_scores, torch.from_numpy(thresholds))
            if len(rows) > MAX_CANDIDATES_PER_ROW * len(hidden):
                return None
            scores = score_outputs(hidden, weight, bias, rows, outputs).numpy()
            is_blank[rows.numpy()[scores >= blank_scores[rows.numpy()]]] = False
        return SearchedOutputs((weight, bias), hidden, is_blank, rough_scores)

    def _select_best(self, rough_scores: RoughScores, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
        """Score the outputs that could be the largest of their row exactly, and select the largest.

        Args:
            rough_scores: the int8 scores of R rows.
            hidden, weight, bias: see `argmax`.

        Returns:
            The (R,) largest outputs; `None` if the candidates are too many, or a row has none with a finite score.
        """
        thresholds = rough_scores.group_maxima.amax(1)
        # the best score may be too high and the score of a candidate too low, each by the error bound
        thresholds = torch.sub(thresholds, rough_scores.errors, alpha=2)
        # comparisons with NaN are false
        thresholds.nan_to_num_(torch.nan, torch.nan, torch.nan)
        rows, outputs = find_outputs(rough_scores, thresholds)
        if not len(hidden) <= len(rows) <= MAX_CANDIDATES_PER_ROW * len(hidden):
            return None
        scores = score_outputs(hidden, weight, bias, rows, outputs)
        best = select_best_candidates(rows.tolist(), outputs.tolist(), scores.tolist(), len(hidden))
        return None if best is None else torch.tensor(best)

    def _score(self, hidden: Tensor, has_blank: bool = True) -> RoughScores:
        """Compute int8 scores of all outputs, with bounds of their errors by the Cauchy-Schwarz inequality.

        The bound of a row is not finite if the row is not.

        Args:
            hidden: (R, J) float32 batch of R rows.
            has_blank: whether the last output has a score; otherwise its score is -inf.
        """
        low, high = (float(bound) for bound in hidden.aminmax())
        scale, zero_point = choose_scale(low, high)
        unrounded = hidden.mul(1 / scale)
        if zero_point:
            unrounded += zero_point
        values = unrounded.round().clamp_(0, MAX_UINT8)
        hidden_norms = torch.linalg.vector_norm(hidden, dim=1)
        input_rounding_norms = torch.linalg.vector_norm(unrounded.sub_(values), dim=1)
        # rounding_norm * norm of the rounded row + weight_norm * norm of the rounding errors of the row
        error_bounds = hidden_norms.mul_(ERROR_MARGIN * self.rounding_norm).add_(
            input_rounding_norms, alpha=ERROR_MARGIN * scale * (self.rounding_norm + self.weight_norm)
        )
        scores: Tensor = torch.ops.onednn.qlinear_pointwise(
            values.to(torch.uint8), scale, zero_point, self.packed_weight, self.scales, self.weight_zero_points,
            self.bias, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        if not has_blank:
            scores[:, self.num_outputs - 1] = -torch.inf
        scores = scores.unflatten(1, (-1, GROUP_SIZE))
        return RoughScores(scores, scores.amax(2), error_bounds)


def choose_scale(low: float, high: float) -> tuple[float, int]:
    """Choose the scale and the zero point of 8-bit activations.

    Args:
        low: smallest activation.
        high: largest activation.

    Returns:
        The difference of two consecutive numbers, and the number that represents 0. They have no meaning if `low` or
        `high` is not finite.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / MAX_UINT8
    if not (math.isfinite(scale) and scale > 0):
        return 1.0, 0
    return scale, round(-low / scale)


def select_best_candidates(
    row_indices: list[int], output_indices: list[int], scores: list[float], num_rows: int
) -> list[int] | None:
    """Select the candidate with the best score in each row; of equal candidates the one with the smallest output.

    Args:
        row_indices: the row of each candidate.
        output_indices: the output of each candidate.
        scores: the score of each candidate.
        num_rows: number of rows.

    Returns:
        The output of the best candidate of each row; `None` if a row has no candidate with a finite score.
    """
    best_scores, best_outputs = [-math.inf] * num_rows, [-1] * num_rows
    for row, output, score in zip(row_indices, output_indices, scores, strict=True):
        if score > best_scores[row] or (score == best_scores[row] and output < best_outputs[row]):
            best_scores[row], best_outputs[row] = score, output
    return None if -1 in best_outputs else best_outputs


# cache with one search per layer; an entry disappears when its layer is deleted. The search is not an attribute of the
# layer, because it would then be copied and saved with the model.
_searches: WeakKeyDictionary[nn.Linear, Int8Search] = WeakKeyDictionary()
_searches_lock = threading.Lock()


def prepare_search(layer: nn.Linear, num_outputs: int) -> Int8Search:
    """Get the search over the first outputs of a layer from a cache, or build it if the layer is new or has changed.

    Args:
        layer: output layer of a joint network; `Int8Search.is_faster` must be true for its weight.
        num_outputs: number of outputs to search.

    Returns:
        A search that matches the present weight and bias of the layer.
    """
    weight, bias = layer.weight[:num_outputs].detach(), layer.bias[:num_outputs].detach()
    with _searches_lock:
        search = _searches.get(layer)
        if search is None or not search.is_up_to_date(weight, bias):
            search = _searches[layer] = Int8Search(weight, bias)
    return search
