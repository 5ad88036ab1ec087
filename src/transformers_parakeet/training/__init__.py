"""Training: data, collator, metrics, adapters, vocabulary, `Trainer`, and the fine-tuning program."""

from .data import load_speech
from .finetune import FinetuneArguments, evaluate, finetune, main
from .metrics import ErrorRates, error_rates, normalize_text
from .trainer import DurationBatchSampler, ParakeetTrainer, SpeechCollator, add_lora, freeze
from .update_guard import NonFiniteGuard
from .vocabulary import extend_vocabulary, replace_tokenizer

__all__ = [
    "DurationBatchSampler",
    "ErrorRates",
    "FinetuneArguments",
    "NonFiniteGuard",
    "ParakeetTrainer",
    "SpeechCollator",
    "add_lora",
    "error_rates",
    "evaluate",
    "extend_vocabulary",
    "finetune",
    "freeze",
    "load_speech",
    "main",
    "normalize_text",
    "replace_tokenizer",
]
