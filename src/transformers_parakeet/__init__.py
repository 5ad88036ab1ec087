"""Parakeet speech recognition for Hugging Face Transformers; importing it makes transformers use these classes.

The public names are below; every algorithm is in the module named after it.
"""

import sys
from pathlib import Path
from typing import Any

import transformers.models.parakeet
import transformers.pipelines
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    AutoModelForRNNT,
    AutoModelForTDT,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .audio import AudioError, load_audio
from .configuration_parakeet import (
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
)
from .feature_extraction_parakeet import ParakeetFeatureExtractor
from .modeling_parakeet import (
    ParakeetEncoder,
    ParakeetForCTC,
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetPreTrainedModel,
)
from .nemo import NemoError, load_nemo
from .nemo_export import export_nemo
from .nemo_pipeline import with_nemo_files
from .pipeline_parakeet import ParakeetASRPipeline
from .processing_parakeet import ParakeetProcessor
from .tokenization_parakeet import ParakeetTokenizer
from .vocabulary import extend_vocabulary, replace_tokenizer

__version__ = "0.1.0"


def demo_model_path() -> Path:
    """Return the folder of the bundled demo model, which recognises spoken English digits."""
    return Path(__file__).parent / "demo_model"


def _register() -> None:
    """Give transformers our classes for the Parakeet model types; doing it twice changes nothing."""
    heads: list[tuple[Any, Any, Any]] = [
        (ParakeetCTCConfig, ParakeetForCTC, AutoModelForCTC),
        (ParakeetRNNTConfig, ParakeetForRNNT, AutoModelForRNNT),
        (ParakeetTDTConfig, ParakeetForTDT, AutoModelForTDT),
    ]
    for config, model, auto in [(ParakeetEncoderConfig, ParakeetEncoder, AutoModel), *heads]:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        auto.register(config, model, exist_ok=True)
        AutoFeatureExtractor.register(config, ParakeetFeatureExtractor, exist_ok=True)
        AutoProcessor.register(config, ParakeetProcessor, exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=ParakeetTokenizer, exist_ok=True)
    # AutoProcessor and AutoFeatureExtractor look saved class names up in this package before what is registered
    names: dict[str, Any] = {
        obj.__name__: obj
        for obj in (ParakeetEncoderConfig, ParakeetEncoder, ParakeetFeatureExtractor, ParakeetPreTrainedModel,
                    ParakeetProcessor, ParakeetTokenizer, *(obj for head in heads for obj in head[:2]))
    }  # fmt: skip
    # not `import transformers` above: that module is replaced while its parts are imported
    top = sys.modules["transformers"]
    for name, obj in names.items():
        setattr(transformers.models.parakeet, name, obj)
        setattr(top, name, obj)
    # `wraps` leaves the stock function in this attribute
    stock = vars(transformers.pipelines)["pipeline"]
    pipeline = with_nemo_files(getattr(stock, "__wrapped__", stock))
    for module in (top, transformers.pipelines):
        vars(module)["pipeline"] = pipeline
    task = PIPELINE_REGISTRY.supported_tasks["automatic-speech-recognition"]
    task["impl"] = ParakeetASRPipeline
    if AutoModelForRNNT not in task["pt"]:
        task["pt"] = (*task["pt"], AutoModelForRNNT)


_register()

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
    "ParakeetPreTrainedModel",
    "ParakeetProcessor",
    "ParakeetRNNTConfig",
    "ParakeetTDTConfig",
    "ParakeetTokenizer",
    "demo_model_path",
    "export_nemo",
    "extend_vocabulary",
    "load_audio",
    "load_nemo",
    "replace_tokenizer",
]
