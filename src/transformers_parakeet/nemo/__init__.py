"""NeMo checkpoints: reading, writing and converting `.nemo` files."""

from .archive import NemoError
from .convert import convert_checkpoint
from .pipeline import with_nemo_files
from .reader import load_nemo
from .sentencepiece import build_tokenizer, parse_sentencepiece, sentencepiece_models
from .writer import export_nemo

__all__ = [
    "NemoError",
    "build_tokenizer",
    "convert_checkpoint",
    "export_nemo",
    "load_nemo",
    "parse_sentencepiece",
    "sentencepiece_models",
    "with_nemo_files",
]
