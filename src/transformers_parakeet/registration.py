"""Registers the classes of this package with transformers: Auto classes, class names, int8, and `pipeline`.

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
from .nemo import add_nemo_support, load_nemo
from .pipeline_parakeet import ParakeetASRPipeline
from .processing_parakeet import ParakeetProcessor
from .quantization_parakeet import register_int8
from .tokenization_parakeet import ParakeetTokenizer

# configuration class, model class, and the Auto class of transformers for this type of model
MODEL_CLASSES: tuple[tuple[Any, Any, Any], ...] = (
    (ParakeetEncoderConfig, ParakeetEncoder, AutoModel),
    (ParakeetCTCConfig, ParakeetForCTC, AutoModelForCTC),
    (ParakeetRNNTConfig, ParakeetForRNNT, AutoModelForRNNT),
    (ParakeetTDTConfig, ParakeetForTDT, AutoModelForTDT),
)


def register() -> None:
    """Make transformers use the classes of this package for Parakeet models; a repeated call has no effect."""
    _register_auto_classes()
    register_int8()
    _override_transformers_classes()
    _replace_pipeline()


def _register_auto_classes() -> None:
    """Register the configurations, models, feature extractor, processor and tokenizer with the Auto classes."""
    for config_class, model_class, auto_model_class in MODEL_CLASSES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        auto_model_class.register(config_class, model_class, exist_ok=True)
        AutoFeatureExtractor.register(config_class, ParakeetFeatureExtractor, exist_ok=True)
        AutoProcessor.register(config_class, ParakeetProcessor, exist_ok=True)
        AutoTokenizer.register(config_class, fast_tokenizer_class=ParakeetTokenizer, exist_ok=True)


def _override_transformers_classes() -> None:
    """Replace the Parakeet classes in the modules `transformers` and `transformers.models.parakeet`.

    Registration alone is not enough: `AutoProcessor` and `AutoFeatureExtractor` look up the class name stored in a
    checkpoint in `transformers.models.parakeet` before they look at the registered classes.
    """
    classes = [ParakeetFeatureExtractor, ParakeetPreTrainedModel, ParakeetProcessor, ParakeetTokenizer]
    for config_class, model_class, _ in MODEL_CLASSES:
        classes += [config_class, model_class]
    # transformers replaces the top-level module in `sys.modules` while its submodules are imported, so a reference from
    # `import transformers` can be stale; submodules such as `transformers.models.parakeet` are not replaced
    for module in (sys.modules["transformers"], transformers.models.parakeet):
        for cls in classes:
            setattr(module, cls.__name__, cls)


def _replace_pipeline() -> None:
    """Replace `transformers.pipeline` with a function that also loads `.nemo` files.

    The task `automatic-speech-recognition` gets the class `ParakeetASRPipeline`.
    """
    current_pipeline = vars(transformers.pipelines)["pipeline"]
    # if `register` was called before, `current_pipeline` is our wrapper, and `__wrapped__` is the original function
    pipeline = add_nemo_support(getattr(current_pipeline, "__wrapped__", current_pipeline), load_nemo)
    for module in (sys.modules["transformers"], transformers.pipelines):
        vars(module)["pipeline"] = pipeline
    task_settings = PIPELINE_REGISTRY.supported_tasks["automatic-speech-recognition"]
    task_settings["impl"] = ParakeetASRPipeline
    # "pt" lists the Auto classes with which the task can load a model
    if AutoModelForRNNT not in task_settings["pt"]:
        task_settings["pt"] = (*task_settings["pt"], AutoModelForRNNT)
