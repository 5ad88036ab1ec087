"""Training losses: CTC, RNN-T and TDT."""

from .backend import select_loss
from .transducer import (
    REDUCTIONS,
    TransducerLoss,
    compact_labels,
    ctc_loss,
    reduce_loss,
    rnnt_loss,
    tdt_loss,
    transducer_loss,
)

__all__ = [
    "REDUCTIONS",
    "TransducerLoss",
    "compact_labels",
    "ctc_loss",
    "reduce_loss",
    "rnnt_loss",
    "select_loss",
    "tdt_loss",
    "transducer_loss",
]
