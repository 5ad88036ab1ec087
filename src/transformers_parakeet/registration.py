"""Registers the classes of this package with transformers: Auto classes, class names, and the function `pipeline`.

docs/design.md explains why each step is needed.
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
from .nemo import add_nemo_support
from .pipeline_parakeet import ParakeetASRPipeline
from .processing_parakeet import ParakeetProcessor
from .tokenization_parakeet import ParakeetTokenizer

# configuration, model, and the Auto class for this kind of model
MODELS: tuple[tuple[Any, Any, Any], ...] = (
    (ParakeetEncoderConfig, ParakeetEncoder, AutoModel),
    (ParakeetCTCConfig, ParakeetForCTC, AutoModelForCTC),
    (ParakeetRNNTConfig, ParakeetForRNNT, AutoModelForRNNT),
    (ParakeetTDTConfig, ParakeetForTDT, AutoModelForTDT),
)


def register() -> None:
    """Make transformers use the classes of this package for Parakeet models; a second call changes nothing."""
    _register_auto_classes()
    _replace_class_names()
    _replace_pipeline()


def _register_auto_classes() -> None:
    """Register configurations, models, feature extractor, processor and tokenizer with the Auto classes."""
    for config, model, auto_model in MODELS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        auto_model.register(config, model, exist_ok=True)
        AutoFeatureExtractor.register(config, ParakeetFeatureExtractor, exist_ok=True)
        AutoProcessor.register(config, ParakeetProcessor, exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=ParakeetTokenizer, exist_ok=True)


def _replace_class_names() -> None:
    """Set the classes as attributes of `transformers` and `transformers.models.parakeet`.

    `AutoProcessor` and `AutoFeatureExtractor` look up the class name that a checkpoint contains in
    `transformers.models.parakeet` before they look at the registered classes.
    """
    classes = [ParakeetFeatureExtractor, ParakeetPreTrainedModel, ParakeetProcessor, ParakeetTokenizer]
    for config, model, _ in MODELS:
        classes += [config, model]
    # a module `transformers` that was imported at the top of this file would be the wrong object: transformers replaces
    # its entry in `sys.modules` when some of its submodules are imported
    for module in (sys.modules["transformers"], transformers.models.parakeet):
        for each_class in classes:
            setattr(module, each_class.__name__, each_class)


def _replace_pipeline() -> None:
    """Make `transformers.pipeline` read `.nemo` files, and use `ParakeetASRPipeline` for speech recognition."""
    current = vars(transformers.pipelines)["pipeline"]
    # after a first call of `register`, the function of transformers is the attribute `__wrapped__` of ours
    pipeline = add_nemo_support(getattr(current, "__wrapped__", current))
    for module in (sys.modules["transformers"], transformers.pipelines):
        vars(module)["pipeline"] = pipeline
    task = PIPELINE_REGISTRY.supported_tasks["automatic-speech-recognition"]
    task["impl"] = ParakeetASRPipeline
    if AutoModelForRNNT not in task["pt"]:
        task["pt"] = (*task["pt"], AutoModelForRNNT)
