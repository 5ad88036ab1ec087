"""NeMo checkpoints: reading, writing and converting `.nemo` files."""

from .archive import NemoError
from .convert import convert_checkpoint
from .hub import demo_model_path
from .pipeline import add_nemo_support
from .reader import load_nemo
from .sentencepiece import build_tokenizer, get_sentencepiece_models, parse_sentencepiece
from .writer import export_nemo

__all__ = [
    "NemoError",
    "add_nemo_support",
    "build_tokenizer",
    "convert_checkpoint",
    "demo_model_path",
    "export_nemo",
    "get_sentencepiece_models",
    "load_nemo",
    "parse_sentencepiece",
]
