"""Layers that `kernels` can put in the place of a model's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .loss import WORKSPACE_BYTES, transducer_loss


class TransducerLoss(nn.Module):
    """Stateless layer around `transducer_loss`."""

    has_backward = True
    # lengths are read on the host to leave padding out
    can_torch_compile = False

    def forward(
        self,
        encoder_states: Tensor,
        predictor_states: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        labels: Tensor,
        frame_lengths: Tensor,
        label_lengths: Tensor,
        blank_id: int,
        durations: Sequence[int] | None = None,
        sigma: float = 0.0,
        omega: float = 0.0,
        fastemit_lambda: float = 0.0,
        activation: str = "relu",
        reduction: str = "mean_volume",
        zero_infinity: bool = False,
        workspace_bytes: int = WORKSPACE_BYTES,
        dropout: float = 0.0,
    ) -> Tensor:
        """Compute the loss; arguments and result are those of `transducer_loss`."""
        return transducer_loss(
            encoder_states, predictor_states, head_weight, head_bias, labels, frame_lengths, label_lengths, blank_id,
            durations, sigma, omega, fastemit_lambda, activation, reduction, zero_infinity, workspace_bytes, dropout,
        )  # fmt: skip
