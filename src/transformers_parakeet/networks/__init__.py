"""The neural networks of the models: attention, FastConformer blocks, prediction network and joint network."""

from .attention import ParakeetEncoderAttention, ParakeetEncoderRelPositionalEncoding
from .conformer import (
    ParakeetEncoderBlock,
    ParakeetEncoderSubsamplingConv2D,
    drop_block,
    drop_probabilities,
    length_mask,
    subsampled_lengths,
)
from .fast_linear import pointwise
from .transducer import ParakeetRNNTDecoder, ParakeetRNNTJointNetwork

__all__ = [
    "ParakeetEncoderAttention",
    "ParakeetEncoderBlock",
    "ParakeetEncoderRelPositionalEncoding",
    "ParakeetEncoderSubsamplingConv2D",
    "ParakeetRNNTDecoder",
    "ParakeetRNNTJointNetwork",
    "drop_block",
    "drop_probabilities",
    "length_mask",
    "pointwise",
    "subsampled_lengths",
]
