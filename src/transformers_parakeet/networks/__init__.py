"""The neural networks of the models: attention, FastConformer blocks, prediction network and joint network."""

from .attention import ParakeetEncoderAttention, ParakeetEncoderRelPositionalEncoding
from .conformer import (
    ParakeetEncoderBlock,
    ParakeetEncoderSubsamplingConv2D,
    compute_drop_probabilities,
    drop_block,
    length_mask,
    subsampled_lengths,
)
from .fast_linear import apply_pointwise_conv
from .transducer import ParakeetRNNTDecoder, ParakeetRNNTJointNetwork

__all__ = [
    "ParakeetEncoderAttention",
    "ParakeetEncoderBlock",
    "ParakeetEncoderRelPositionalEncoding",
    "ParakeetEncoderSubsamplingConv2D",
    "ParakeetRNNTDecoder",
    "ParakeetRNNTJointNetwork",
    "apply_pointwise_conv",
    "compute_drop_probabilities",
    "drop_block",
    "length_mask",
    "subsampled_lengths",
]
