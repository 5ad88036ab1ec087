"""Small models with every head and twenty spoken sentences, for the tests of training."""

import json
from pathlib import Path

import torch
from conftest import encoder_fields
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import TrainingArguments

import transformers_parakeet as tp
from transformers_parakeet.training import SpeechCollator

SENTENCES = Path(__file__).parent / "data" / "sentences" / "manifest.jsonl"
HEADS = ("ctc", "rnnt", "tdt", "hybrid")
CLASSES = {
    "ctc": (tp.ParakeetCTCConfig, tp.ParakeetForCTC),
    "rnnt": (tp.ParakeetRNNTConfig, tp.ParakeetForRNNT),
    "tdt": (tp.ParakeetTDTConfig, tp.ParakeetForTDT),
    "hybrid": (tp.ParakeetTDTConfig, tp.ParakeetForTDT),
}


def sentence_rows():
    """Rows of audio path, text and duration."""
    entries = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    return [{**entry, "audio": str(SENTENCES.parent / entry["audio_filepath"])} for entry in entries]


def sentence_tokenizer(head, size=96):
    """A BPE vocabulary of the sentences."""
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    special = ["<unk>"] if head == "ctc" else ["<unk>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=special, show_progress=False)
    backend.train_from_iterator([row["text"] for row in sentence_rows()], trainer)
    backend.add_special_tokens(["<pad>" if head == "ctc" else "<blank>"])
    return tp.ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def small(head, width=32, seed=0, encoder=None, **changes):
    """A model that learns, with torch's own initialisation, and its processor."""
    torch.manual_seed(seed)
    tokenizer = sentence_tokenizer(head)
    dropout = {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}
    fields = encoder_fields(hidden_size=width, intermediate_size=2 * width, **{**dropout, **(encoder or {})})
    extra = {"blank_token_id": len(tokenizer) - 1, "decoder_hidden_size": width, "num_decoder_layers": 1}
    if head == "hybrid":
        extra["ctc_head"] = True
    config, model = CLASSES[head]
    built = model(
        config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            encoder_config=fields,
            **({} if head == "ctc" else extra),
            **changes,
        )
    )
    for module in built.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
            module.reset_parameters()
    kind = "tdt" if head == "hybrid" else head
    return built, tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer, decoder_type=kind)


def features_of(rows, processor):
    """The rows with features in place of audio, computed once."""
    collator = SpeechCollator(processor, dither=0.0)
    return [{"input_features": collator([row])["input_features"][0], "text": row["text"]} for row in rows]


def arguments(folder, steps, **changes):
    """`TrainingArguments` of a short run on the CPU."""
    settings = {
        "per_device_train_batch_size": 5,
        "per_device_eval_batch_size": 20,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 5.0,
    }
    return TrainingArguments(output_dir=str(folder), max_steps=steps, **{**settings, **changes})
