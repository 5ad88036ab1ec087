"""Training losses: CTC, RNN-T and TDT."""

from .backend import select_loss
from .ctc import ctc_loss
from .reduction import REDUCTIONS, compact_labels, reduce_loss
from .transducer import TransducerLoss, rnnt_loss, tdt_loss, transducer_loss

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
