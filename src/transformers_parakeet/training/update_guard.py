"""The guard against updates that are not finite: skips them, and restores the statistics of batch norms.

When it runs is decided by `ParakeetTrainer` in `training.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# an update is skipped when its gradients are not finite; after this many in a row training stops
MOST_SKIPPED_UPDATES = 20


def statistics(model: Any) -> Iterator[Tensor]:
    """Yield the running statistics of all batch norms of a model."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            yield from module.buffers(recurse=False)


class NonFiniteGuard(TrainerCallback):
    """Skips an update when a gradient is NaN or infinite, on all processes together, and warns.

    The forward pass has moved the running statistics of batch norms by then, so a skipped update restores them.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0
        self.before: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the statistics before the first batch of an update."""
        self.before = [value.clone() for value in statistics(kwargs["model"])]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients between backward pass and update.

        Raises:
            FloatingPointError: too many updates in a row were skipped.
        """
        model = kwargs["model"]
        # the gradient scaler of float16 skips updates on its own, some of them by design and with good statistics
        if args.fp16:
            if not all(value.isfinite().all() for value in statistics(model)):
                self.restore_statistics(model)
            return
        grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                 for p in model.parameters() if p.grad is not None]  # fmt: skip
        bad = torch.zeros((), device=args.device)
        if grads:
            bad += ~torch.nn.utils.get_total_norm(grads).to(args.device).isfinite()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad)
        if not bad.item():
            self.in_a_row = 0
            return
        model.zero_grad(set_to_none=True)
        self.restore_statistics(model)
        self.skipped += 1
        self.in_a_row += 1
        logger.warning(f"Update {state.global_step + 1} is skipped: its gradients are not finite.")
        if self.in_a_row >= MOST_SKIPPED_UPDATES:
            raise FloatingPointError(
                f"gradients must be finite, and those of {self.in_a_row} updates in a row were not: lower the learning "
                "rate, train in float32, or look at the data"
            )

    def restore_statistics(self, model: Any) -> None:
        """Give the batch norms the statistics that they had before this update."""
        with torch.no_grad():
            for value, before in zip(statistics(model), self.before, strict=True):
                value.copy_(before)


__all__ = ["NonFiniteGuard"]
