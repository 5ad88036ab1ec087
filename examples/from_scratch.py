"""Trains a small model from random weights, on a CPU in minutes or on a GPU: spoken digits, or sentences.

Sentences need more speech than there is to start from nothing: `--encoder` starts from the encoder of another model.
The packed speech is read by `packed_speech.py`; without it, the digits recipe takes the eight clips of the demo model.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packed_speech import Joined, PackedSpeech
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import TrainingArguments, set_seed

from transformers_parakeet import (
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetProcessor,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
    ParakeetTokenizer,
    demo_model_path,
    load_audio,
    load_nemo,
)
from transformers_parakeet.training import ParakeetTrainer, SpeechCollator

SPACE = "\u2581"


@dataclass(frozen=True)
class Recipe:
    """What is trained on what, how."""

    corpora: tuple[str, ...]
    vocabulary: int
    width: int
    layers: int
    channels: int
    batch_duration_s: float
    learning_rate: float
    steps: int
    threads: int


RECIPES = {
    # about 12 s per batch: with more, a model this small stays on blanks for long
    "digits": Recipe(("fsdd",), 64, 96, 3, 16, 12.0, 2e-3, 1200, 1),
    # what a core can do in an hour with --encoder; a GPU can take more of everything
    "sentences": Recipe(("librispeech20", "speechocean762"), 256, 144, 6, 32, 20.0, 1e-3, 12000, 1),
}  # fmt: skip


def build_tokenizer(texts: Sequence[str], size: int, head: str) -> ParakeetTokenizer:
    """Train a byte-pair vocabulary in the layout of the released checkpoints: the blank is last.

    Args:
        texts: transcripts.
        size: pieces at most, the special ones included.
        head: `ctc`, whose blank also pads, or a transducer, whose pad token is one of its own.
    """
    special, blank = (["<unk>"], "<pad>") if head == "ctc" else (["<unk>", "<pad>"], "<blank>")
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([blank])
    return ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def build_model(tokenizer: ParakeetTokenizer, recipe: Recipe, head: str, start: str | None = None) -> torch.nn.Module:
    """Build a model with random weights, or with the encoder of the model in the folder `start`."""
    trained = load_nemo(start)[0].encoder if start else None
    encoder = (
        trained.config.to_dict()
        if trained
        else {
            "hidden_size": recipe.width,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": 4,
            "intermediate_size": 4 * recipe.width,
            "subsampling_conv_channels": recipe.channels,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
        }
    )
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "encoder_config": encoder,
    }
    if head != "ctc":
        fields |= {
            "blank_token_id": len(tokenizer) - 1,
            "decoder_hidden_size": recipe.width,
            "num_decoder_layers": 1,
            "decoder_dropout": 0.1,
            "joint_dropout": 0.1,
            "loss_reduction": "mean_batch",
            "ctc_loss_reduction": "mean_batch",
            "ctc_head": head == "hybrid",
        }
    if head == "ctc":
        model: torch.nn.Module = ParakeetForCTC(ParakeetCTCConfig(**fields))
    elif head == "rnnt":
        model = ParakeetForRNNT(ParakeetRNNTConfig(**fields))
    else:
        model = ParakeetForTDT(ParakeetTDTConfig(**fields))
    # the normal weights of 0.02 that suit 1024 channels leave next to nothing of the signal in a small model
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
            module.reset_parameters()
    if trained:
        model.encoder.load_state_dict(trained.state_dict())
    return model


class DemoClips:
    """The eight recordings that lie beside the demo model: enough to see a model learn, not to learn to recognise."""

    def __init__(self) -> None:
        folder = demo_model_path() / "clips"
        entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        # decoded once, they are few
        self.rows = [{"audio": load_audio(folder / entry["file"]), "text": entry["text"]} for entry in entries]
        self.durations = [len(row["audio"]) / 16000 for row in self.rows]
        self.texts = [row["text"] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def load(data: Path, recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    """Open the training data, and the held-out parts by name."""
    if not all((data / corpus).exists() for corpus in recipe.corpora):
        if recipe.corpora != ("fsdd",):
            raise SystemExit(f"{data} must hold {', '.join(recipe.corpora)}, and does not: name the folder with --data")
        print(f"{data} has no fsdd: training and scoring on the eight clips of the demo model", flush=True)
        clips = DemoClips()
        return clips, {"clips": clips}
    train = Joined([PackedSpeech(data / corpus, "train") for corpus in recipe.corpora])
    splits = ("dev", "test")
    return train, {f"{c}_{split}": PackedSpeech(data / c, split) for c in recipe.corpora for split in splits}


def training_arguments(options: argparse.Namespace, recipe: Recipe, steps: int) -> TrainingArguments:
    """Set an AdamW on a cosine, and an evaluation after every tenth of the updates."""
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=steps,
        learning_rate=options.learning_rate or recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(500, steps // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=5.0,
        per_device_eval_batch_size=32,
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        save_strategy="steps",
        save_steps=max(1, steps // 10),
        save_total_limit=1,
        logging_steps=max(1, steps // 40),
        dataloader_num_workers=options.workers,
        report_to="none",
        disable_tqdm=True,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--head", choices=("ctc", "rnnt", "tdt", "hybrid"), default="ctc")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the packed speech")
    parser.add_argument("--output", type=Path, default=Path("from-scratch"), help="folder to write the model to")
    parser.add_argument("--steps", type=int, help="updates; default: the recipe's")
    parser.add_argument("--vocabulary", type=int, help="pieces; default: the recipe's")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch-duration", type=float, help="seconds of audio per batch")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode audio")
    parser.add_argument("--encoder", help="folder, Hub id or .nemo file of a model whose encoder to start from")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return parser.parse_args()


def main() -> None:
    """Train, and print the scores of every held-out part."""
    options = parse_options()
    recipe = RECIPES[options.recipe]
    # on a model as small as that of the digits a second thread costs more than it brings
    torch.set_num_threads(recipe.threads)
    set_seed(options.seed)
    train, held_out = load(options.data, recipe)
    tokenizer = build_tokenizer(train.texts, options.vocabulary or recipe.vocabulary, options.head)
    model = build_model(tokenizer, recipe, options.head, options.encoder)
    kind = "tdt" if options.head == "hybrid" else options.head
    processor = ParakeetProcessor(ParakeetFeatureExtractor(), tokenizer, decoder_type=kind)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} pieces", flush=True)
    trainer = ParakeetTrainer(
        model=model,
        args=training_arguments(options, recipe, options.steps or recipe.steps),
        train_dataset=train,
        eval_dataset={name: part for name, part in held_out.items() if not name.endswith("test")},
        processing_class=processor,
        data_collator=SpeechCollator(processor, seed=options.seed, ctc=options.head in ("ctc", "hybrid")),
        batch_duration_s=options.batch_duration or recipe.batch_duration_s,
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model()
    for name, part in held_out.items():
        scores = trainer.evaluate(part)
        print(
            f"{name:24} {len(part):5} clips  WER {scores['eval_wer']:7.2%}  CER {scores['eval_cer']:7.2%}", flush=True
        )


if __name__ == "__main__":
    main()
