"""Skip optimiser updates with non-finite gradients, and restore the running statistics of the batch-norm layers.

`ParakeetTrainer` in `trainer.py` uses the guard as a callback.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# number of consecutive skipped updates after which training stops
MAX_CONSECUTIVE_SKIPS = 20


def iterate_batch_norm_buffers(model: Any) -> Iterator[Tensor]:
    """Yield the buffers (running statistics) of all batch-norm layers of a model, in a fixed order.

    Args:
        model: a Parakeet model.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            yield from module.buffers(recurse=False)


def all_gradients_finite(model: Any, device: torch.device) -> bool:
    """Return whether all gradients of a model are finite, across all processes of a distributed training.

    Args:
        model: the model after the backward pass; parameters without a gradient are ignored.
        device: device of the tensor with which the processes exchange their results.
    """
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            # each process checks its local shard of a sharded gradient
            is_sharded = hasattr(parameter.grad, "to_local")
            gradients.append(parameter.grad.to_local() if is_sharded else parameter.grad)
    # number of processes with a non-finite gradient
    num_nonfinite_processes = torch.zeros((), device=device)
    if gradients:
        num_nonfinite_processes += ~torch.nn.utils.get_total_norm(gradients).to(device).isfinite()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(num_nonfinite_processes)
    return not num_nonfinite_processes.item()


class NonFiniteGuard(TrainerCallback):
    """Skips an update on all processes if any gradient is NaN or infinite, and logs a warning.

    The forward passes of a skipped update have already changed the running statistics of the batch-norm layers, so the
    guard restores these statistics. The attribute `num_skipped_updates` counts the skipped updates.
    """

    def __init__(self) -> None:
        self.num_skipped_updates = 0
        self.num_consecutive_skips = 0
        self.saved_buffers: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the running statistics of the batch-norm layers, so that a skipped update can restore them.

        Args:
            args: the `TrainingArguments`.
            state: the `TrainerState`.
            control: the `TrainerControl`.
            **kwargs: holds the `model`.
        """
        self.saved_buffers = [buffer.clone() for buffer in iterate_batch_norm_buffers(kwargs["model"])]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients before an update; if any is not finite, discard all gradients, which skips the update.

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
            # in fp16 the `GradScaler` itself skips updates with non-finite gradients, also routinely to calibrate the
            # loss scale; the statistics are restored only if they are non-finite themselves
            if not all(buffer.isfinite().all() for buffer in iterate_batch_norm_buffers(model)):
                self.restore_batch_norm_buffers(model)
            return
        if all_gradients_finite(model, args.device):
            self.num_consecutive_skips = 0
            return
        # optimisers do not change parameters without a gradient
        model.zero_grad(set_to_none=True)
        self.restore_batch_norm_buffers(model)
        self.num_skipped_updates += 1
        self.num_consecutive_skips += 1
        logger.warning(f"Update {state.global_step + 1} is skipped: its gradients are not finite.")
        if self.num_consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            raise FloatingPointError(
                f"gradients were not finite in {self.num_consecutive_skips} consecutive updates: lower the learning "
                "rate, train in float32, or check the data"
            )

    def restore_batch_norm_buffers(self, model: Any) -> None:
        """Reset the running statistics of the batch-norm layers to their values before the current update.

        Args:
            model: the model; its buffers are changed in place.
        """
        with torch.no_grad():
            for buffer, saved_buffer in zip(iterate_batch_norm_buffers(model), self.saved_buffers, strict=True):
                buffer.copy_(saved_buffer)


__all__ = ["NonFiniteGuard"]
