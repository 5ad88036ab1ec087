"""The neural networks of the models: attention, FastConformer blocks, prediction network and joint network."""

from .attention import ParakeetEncoderAttention
from .conformer import (
    ParakeetEncoderBlock,
    ParakeetEncoderRelPositionalEncoding,
    compute_drop_probabilities,
    drop_block,
)
from .fast_linear import apply_pointwise_conv
from .subsampling import ParakeetEncoderSubsamplingConv2D, build_length_mask, compute_subsampled_lengths
from .transducer import ParakeetRNNTDecoder, ParakeetRNNTJointNetwork

__all__ = [
    "ParakeetEncoderAttention",
    "ParakeetEncoderBlock",
    "ParakeetEncoderRelPositionalEncoding",
    "ParakeetEncoderSubsamplingConv2D",
    "ParakeetRNNTDecoder",
    "ParakeetRNNTJointNetwork",
    "apply_pointwise_conv",
    "build_length_mask",
    "compute_drop_probabilities",
    "compute_subsampled_lengths",
    "drop_block",
]
