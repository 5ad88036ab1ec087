"""Training: datasets, batches, metrics, adapters, vocabulary, `ParakeetTrainer`, and the fine-tuning program."""

from .adapters import add_lora, freeze
from .batching import DurationBatchSampler
from .clips import add_durations, get_durations, read_clip
from .collator import SpeechCollator
from .data import load_speech
from .evaluate import Evaluation, evaluate_pipeline, run_evaluation
from .finetune import FinetuneArguments, finetune_main, run_finetuning
from .manifests import read_manifest
from .metrics import (
    ErrorRates,
    EvaluatedClip,
    compute_rates,
    create_english_normalizer,
    error_rates,
    normalize_text,
    score_clips,
)
from .report import write_report
from .trainer import ParakeetTrainer
from .update_guard import NonFiniteGuard
from .vocabulary import extend_vocabulary, replace_tokenizer

__all__ = [
    "DurationBatchSampler",
    "ErrorRates",
    "EvaluatedClip",
    "Evaluation",
    "FinetuneArguments",
    "NonFiniteGuard",
    "ParakeetTrainer",
    "SpeechCollator",
    "add_durations",
    "add_lora",
    "compute_rates",
    "create_english_normalizer",
    "error_rates",
    "evaluate_pipeline",
    "extend_vocabulary",
    "finetune_main",
    "freeze",
    "get_durations",
    "load_speech",
    "normalize_text",
    "read_clip",
    "read_manifest",
    "replace_tokenizer",
    "run_evaluation",
    "run_finetuning",
    "score_clips",
    "write_report",
]
