"""Registers the classes of this package with transformers: Auto classes, the pipeline task, and class names.

Why each of these is needed is in docs/design.md.
"""

import sys
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

from .configuration_parakeet import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetRNNTConfig, ParakeetTDTConfig
from .feature_extraction_parakeet import ParakeetFeatureExtractor
from .modeling_parakeet import (
    ParakeetEncoder,
    ParakeetForCTC,
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetPreTrainedModel,
)
from .nemo import with_nemo_files
from .pipeline_parakeet import ParakeetASRPipeline
from .processing_parakeet import ParakeetProcessor
from .tokenization_parakeet import ParakeetTokenizer


def register() -> None:
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
