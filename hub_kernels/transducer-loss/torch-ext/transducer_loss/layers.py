"""Layers with which the library `kernels` can replace the layers of a model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .loss import transducer_loss


class TransducerLoss(nn.Module):
    """Layer without parameters that calls `transducer_loss`."""

    has_backward = True
    # torch.compile cannot trace the copy of the lengths to the host
    can_torch_compile = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss; arguments and result are those of `transducer_loss`."""
        return transducer_loss(*args, **kwargs)

    # `kernels` compares the signature of `forward` with that of the layer that it replaces
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *inspect.signature(transducer_loss).parameters.values(),
        ]
    )
