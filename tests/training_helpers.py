"""Small models with every kind of head, and twenty spoken sentences, for the tests of training."""

import json
import logging
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
# head -> classes of the configuration and of the model
CLASSES = {
    "ctc": (tp.ParakeetCTCConfig, tp.ParakeetForCTC),
    "rnnt": (tp.ParakeetRNNTConfig, tp.ParakeetForRNNT),
    "tdt": (tp.ParakeetTDTConfig, tp.ParakeetForTDT),
    "hybrid": (tp.ParakeetTDTConfig, tp.ParakeetForTDT),
}


def sentence_rows():
    """Return rows with the audio path, the text and the duration of each sentence."""
    entries = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    return [{**entry, "audio": str(SENTENCES.parent / entry["audio_filepath"])} for entry in entries]


def train_tokenizer(head, vocab_size=96):
    """Train a BPE tokenizer on the sentences, for a model with the given head."""
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    special_tokens = ["<unk>"] if head == "ctc" else ["<unk>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator([row["text"] for row in sentence_rows()], trainer)
    # the blank is the last token; that of CTC also pads
    backend.add_special_tokens(["<pad>" if head == "ctc" else "<blank>"])
    return tp.ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def create_model(head, width=32, seed=0, encoder=None, **config_fields):
    """Create a small model without dropout that can learn, and its processor.

    Args:
        head: one of `HEADS`.
        width: hidden size of encoder, prediction network and joint network.
        seed: seed of the weights.
        encoder: fields of the encoder configuration that differ.
        **config_fields: fields of the model configuration that differ.
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(head)
    no_dropout = {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}
    encoder_config = encoder_fields(hidden_size=width, intermediate_size=2 * width, **{**no_dropout, **(encoder or {})})
    head_fields = {}
    if head != "ctc":
        head_fields = {"blank_token_id": len(tokenizer) - 1, "decoder_hidden_size": width, "num_decoder_layers": 1}
    if head == "hybrid":
        head_fields["ctc_head"] = True
    config_class, model_class = CLASSES[head]
    config = config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        encoder_config=encoder_config,
        **head_fields,
        **config_fields,
    )
    model = model_class(config)
    # the initialisation of transformers is too small for a narrow model to learn
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
            module.reset_parameters()
    decoder_type = "tdt" if head == "hybrid" else head
    return model, tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer, decoder_type=decoder_type)


def compute_features(rows, processor):
    """Return rows with precomputed `input_features` in place of audio."""
    collator = SpeechCollator(processor, dither=0.0)
    return [{"input_features": collator([row])["input_features"][0], "text": row["text"]} for row in rows]


def training_arguments(folder, steps, **changes):
    """Return the `TrainingArguments` of a short run on the CPU."""
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


def record_warnings(monkeypatch, *modules):
    """Return a list to which the warnings of modules of the training package are appended as texts."""
    texts = []
    for module in modules:
        logger = logging.getLogger(f"transformers_parakeet.training.{module}")
        monkeypatch.setattr(logger, "warning", lambda text, *args, **kwargs: texts.append(text))
    return texts


def logged_losses(trainer):
    """Return the training losses that a trainer logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
