"""Parakeet speech recognition for Hugging Face Transformers.

Importing this package registers its classes with transformers, so that the Auto classes and `pipeline` use them.
"""

from typing import Any

from .audio import AudioError, load_audio
from .configuration_parakeet import (
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
)
from .feature_extraction_parakeet import ParakeetFeatureExtractor
from .long_audio import ParakeetStream, StreamBatch, StreamEvent, StreamUpdate, StreamWord, join_stream_words
from .modeling_parakeet import (
    ParakeetEncoder,
    ParakeetForCTC,
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetPreTrainedModel,
)
from .nemo import NemoError, demo_model_path, export_nemo, load_nemo
from .pipeline_parakeet import ParakeetASRPipeline
from .processing_parakeet import ParakeetProcessor
from .quantization_parakeet import ParakeetInt8Config
from .registration import register
from .tokenization_parakeet import ParakeetTokenizer
from .transcription import transcribe

__version__ = "0.1.0"

register()


def __getattr__(name: str) -> Any:
    """Import `extend_vocabulary` and `replace_tokenizer` on first use.

    They are not imported with the package, because importing `training` is slow: it imports the `Trainer` of
    transformers.

    Args:
        name: name of the requested attribute.

    Returns:
        The requested function.

    Raises:
        AttributeError: The package has no attribute with this name.
    """
    if name in ("extend_vocabulary", "replace_tokenizer"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AudioError",
    "NemoError",
    "ParakeetASRPipeline",
    "ParakeetCTCConfig",
    "ParakeetEncoder",
    "ParakeetEncoderConfig",
    "ParakeetFeatureExtractor",
    "ParakeetForCTC",
    "ParakeetForRNNT",
    "ParakeetForTDT",
    "ParakeetInt8Config",
    "ParakeetPreTrainedModel",
    "ParakeetProcessor",
    "ParakeetRNNTConfig",
    "ParakeetStream",
    "ParakeetTDTConfig",
    "ParakeetTokenizer",
    "StreamBatch",
    "StreamEvent",
    "StreamUpdate",
    "StreamWord",
    "demo_model_path",
    "export_nemo",
    "extend_vocabulary",
    "join_stream_words",
    "load_audio",
    "load_nemo",
    "replace_tokenizer",
    "transcribe",
]
