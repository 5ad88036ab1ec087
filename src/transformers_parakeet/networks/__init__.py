"""The neural networks of the models: attention, FastConformer blocks, prediction network and joint network."""

from .attention import ParakeetEncoderAttention
from .conformer import (
    ParakeetEncoderBlock,
    ParakeetEncoderRelPositionalEncoding,
    compute_drop_probabilities,
    drop_block,
)
from .fast_linear import apply_pointwise_conv
from .int8_linear import Int8Linear, get_int8_class, has_int8_products
from .streaming_encoder import CacheAwareEncoderMixin, EncoderCache, check_cache_support, stack_caches
from .subsampling import ParakeetEncoderSubsamplingConv2D, build_length_mask, compute_subsampled_lengths
from .transducer import ParakeetRNNTDecoder, ParakeetRNNTJointNetwork

__all__ = [
    "CacheAwareEncoderMixin",
    "EncoderCache",
    "Int8Linear",
    "ParakeetEncoderAttention",
    "ParakeetEncoderBlock",
    "ParakeetEncoderRelPositionalEncoding",
    "ParakeetEncoderSubsamplingConv2D",
    "ParakeetRNNTDecoder",
    "ParakeetRNNTJointNetwork",
    "apply_pointwise_conv",
    "build_length_mask",
    "check_cache_support",
    "compute_drop_probabilities",
    "compute_subsampled_lengths",
    "drop_block",
    "get_int8_class",
    "has_int8_products",
    "stack_caches",
]
