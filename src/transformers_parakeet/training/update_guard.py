"""Skip optimiser updates whose gradients are not finite, and restore the statistics of batch norms.

`ParakeetTrainer` in `trainer.py` installs the guard as a callback.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# consecutive skipped updates after which training stops
MAX_CONSECUTIVE_SKIPS = 20


def iterate_batch_norm_buffers(model: Any) -> Iterator[Tensor]:
    """Yield the running statistics of all batch norms of a model, in a fixed order."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            yield from module.buffers(recurse=False)


def have_finite_gradients(model: Any, device: torch.device) -> bool:
    """Return whether all gradients of a model are finite, on all processes of a distributed run.

    Args:
        model: the model after its backward pass; parameters without a gradient are ignored.
        device: device on which the processes exchange the result.
    """
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            # a sharded gradient is checked shard by shard, each on its process
            is_sharded = hasattr(parameter.grad, "to_local")
            gradients.append(parameter.grad.to_local() if is_sharded else parameter.grad)
    # number of processes with a gradient that is not finite
    num_failures = torch.zeros((), device=device)
    if gradients:
        num_failures += ~torch.nn.utils.get_total_norm(gradients).to(device).isfinite()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(num_failures)
    return not num_failures.item()


class NonFiniteGuard(TrainerCallback):
    """Skips an update if a gradient is NaN or infinite, on all processes together, and logs a warning.

    The forward passes of a skipped update have already changed the running statistics of the batch norms, so they are
    restored. The attribute `skipped` counts the skipped updates.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.consecutive_skips = 0
        self.saved_buffers: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the statistics of the batch norms before the first batch of an update.

        Args:
            args: the `TrainingArguments`.
            state: the `TrainerState`.
            control: the `TrainerControl`.
            **kwargs: holds the `model`.
        """
        self.saved_buffers = [buffer.clone() for buffer in iterate_batch_norm_buffers(kwargs["model"])]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients before an update, and remove them if they are not finite.

        Args:
            args: the `TrainingArguments`.
            state: the `TrainerState`.
            control: the `TrainerControl`.
            **kwargs: holds the `model`.

        Raises:
            FloatingPointError: `MAX_CONSECUTIVE_SKIPS` consecutive updates were skipped.
        """
        model = kwargs["model"]
        if args.fp16:
            # the gradient scaler skips updates itself, also with valid statistics, to find its scale
            if not all(buffer.isfinite().all() for buffer in iterate_batch_norm_buffers(model)):
                self.restore_buffers(model)
            return
        if have_finite_gradients(model, args.device):
            self.consecutive_skips = 0
            return
        # an optimiser ignores parameters without a gradient
        model.zero_grad(set_to_none=True)
        self.restore_buffers(model)
        self.skipped += 1
        self.consecutive_skips += 1
        logger.warning(f"Update {state.global_step + 1} is skipped: its gradients are not finite.")
        if self.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            raise FloatingPointError(
                f"gradients must be finite, and were not in {self.consecutive_skips} consecutive updates: lower the "
                "learning rate, train in float32, or check the data"
            )

    def restore_buffers(self, model: Any) -> None:
        """Restore the statistics of the batch norms from before the current update."""
        with torch.no_grad():
            for buffer, saved in zip(iterate_batch_norm_buffers(model), self.saved_buffers, strict=True):
                buffer.copy_(saved)


__all__ = ["NonFiniteGuard"]
