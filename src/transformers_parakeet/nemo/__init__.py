"""NeMo checkpoints: reading, writing and converting `.nemo` files."""

from .archive import NemoError
from .convert import convert_checkpoint
from .hub import (
    DEMO_MODEL,
    HUB_TIMEOUT_S,
    REQUEST_ERRORS,
    demo_model_path,
    download_checkpoint,
    resolve_model_name,
    summarize_error,
)
from .pipeline import add_nemo_support
from .reader import build_empty_model, describe_head, load_config, load_nemo
from .sentencepiece import build_tokenizer, get_sentencepiece_models, parse_sentencepiece
from .writer import check_config, export_nemo

__all__ = [
    "DEMO_MODEL",
    "HUB_TIMEOUT_S",
    "REQUEST_ERRORS",
    "NemoError",
    "add_nemo_support",
    "build_empty_model",
    "build_tokenizer",
    "check_config",
    "convert_checkpoint",
    "demo_model_path",
    "describe_head",
    "download_checkpoint",
    "export_nemo",
    "get_sentencepiece_models",
    "load_config",
    "load_nemo",
    "parse_sentencepiece",
    "resolve_model_name",
    "summarize_error",
]
