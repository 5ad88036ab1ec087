"""Trains the demo model: a small CTC Parakeet that recognises spoken English digit strings, on a CPU in half an hour.

The audio comes from `digit_strings.py`; model, processor and tokenizer from `transformers_parakeet`.
"""

import argparse
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
import transformers
from digit_strings import (
    DIGITS,
    SAMPLE_RATE,
    Array,
    TrainingExamples,
    digit_lines,
    evaluation_strings,
    fsdd_clips,
    other_lines,
    training_voices,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from transformers_parakeet import (
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    ParakeetProcessor,
    ParakeetTokenizer,
)

EVALUATION_SEED = 2026
EVALUATION_STRINGS = 400
SPACE = "\u2581"
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
# widths and counts of the bands that are blanked in training: mel frames of 10 ms, mel bins
TIME_MASKS, TIME_WIDTH = 2, 20
BIN_MASKS, BIN_WIDTH = 2, 14
CARD = """\
---
license: cc-by-sa-4.0
language: en
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [parakeet, ctc, digits, demo]
---

# digits-ctc: a demonstration model

A CTC Parakeet with {parameters:,} parameters that recognises strings of the English digits zero to nine, 16 kHz mono.
It exists to show and to test `transformers_parakeet` on real speech without a download. Intended use: demonstration
only; it knows ten words and answers other speech, noise and silence with empty text most of the time, not always.

## Scores

| held-out audio | lines | words | word error rate |
| --- | --- | --- | --- |
{rows}

Greedy CTC decoding, `jiwer.wer`, all lines of a row pooled. The fsdd strings are {number} draws per split with seed
{seed}: one speaker, three to seven of the split's recordings joined with pauses of 0 to 0.5 s, no augmentation. The
digit lines of speechocean762 are unmodified, and all are by children of six and seven with errors of pronunciation;
there are few, and a digit string of a child is often taken for other speech and left out. Of the {other} lines of
its dev split without any digit word, {silent} give empty text. To repeat:

    python examples/train_demo.py --evaluate FOLDER

## Training

`{command}`: {stop:,} updates of {batch_size} strings from random weights with `transformers.Trainer`, seed {run_seed},
the learning rate on a cosine that would reach zero at {steps:,}; on one core of a shared CPU in {minutes:.0f} minutes;
{date}, Python {python}, torch {torch}, transformers {transformers}. The last weights are kept. Data: the train splits
only, augmented (speed, rooms, colouring, telephone band, noise, babble, masking); a tenth of the examples are other
speech or noise with empty text.

## Data, licences, attribution

- Free Spoken Digit Dataset (`Jakobovski/free-spoken-digit-dataset`, commit 26eb9aa), (c) Zohar Jackson and its
  contributors, CC BY-SA 4.0, <https://creativecommons.org/licenses/by-sa/4.0/>. Four speakers in train and dev; theo is
  test. Changed here: resampled to 16 kHz, joined into strings. The `fsdd_*` clips, being adapted, keep that licence.
- speechocean762 (`jimbozhang/speechocean762`, commit 613968e), J. Zhang et al., "speechocean762: An Open-Source
  Non-native English Speech Corpus For Pronunciation Assessment", Interspeech 2021, arXiv:2104.01378; free for
  commercial and non-commercial use, Apache-2.0 on the authors' card. Split by speaker.
- `clips/one_two_three.flac` is from SpeechRecognition (`Uberi/speech_recognition`), not trained on, (c) 2014- Anthony
  Zhang, BSD-3-Clause: redistribution is permitted with this notice; it is provided by the copyright holders and
  contributors "as is", any express or implied warranties are disclaimed, and they are not liable for any damages
  arising from its use; their names may not be used to endorse products without permission.

The clips are held out from training; a seed chose each of them (`examples/digit_strings.py --clips FOLDER`).
"""


def build_tokenizer() -> ParakeetTokenizer:
    """Build a byte-pair vocabulary in which every digit is one piece and any other lower-case word falls into letters.

    Returns:
        A tokenizer in the layout of the released CTC checkpoints: `<unk>` first, the blank `<pad>` last.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in DIGITS:
        piece = SPACE
        for letter in word:
            merges[(piece, letter)] = None
            piece += letter
    pieces = ["<unk>", SPACE, *LETTERS, *(left + right for left, right in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens(["<unk>", "<pad>"])
    return ParakeetTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def build_model(tokenizer: ParakeetTokenizer) -> ParakeetForCTC:
    """Build the untrained model, 1.7 M parameters, frames of 80 ms."""
    encoder = ParakeetEncoderConfig(
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=384,
        subsampling_conv_channels=32,
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.1,
        layerdrop=0.0,
        max_position_embeddings=5000,
        scale_input=True,
    )
    config = ParakeetCTCConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, encoder_config=encoder.to_dict()
    )
    model = ParakeetForCTC(config)
    # the normal weights of 0.02 that suit 1024 channels leave 3e-7 of the signal after the subsampling of this one
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
            module.reset_parameters()
    return model


def mask_features(features: torch.Tensor, rng: np.random.Generator) -> None:
    """Blank random bands of one example's features (T, F) in place, in time and in frequency."""
    for _ in range(TIME_MASKS):
        start, width = rng.integers(features.shape[0]), rng.integers(TIME_WIDTH + 1)
        features[start : start + width] = 0.0
    for _ in range(BIN_MASKS):
        start, width = rng.integers(features.shape[1]), rng.integers(BIN_WIDTH + 1)
        features[:, start : start + width] = 0.0


class Collator:
    """Turns examples into masked features, attention mask and labels."""

    def __init__(self, processor: ParakeetProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_features` (B, T, F), `attention_mask` (B, T) and `labels` (B, U) padded with the blank."""
        batch = self.processor([example["audio"] for example in examples], sampling_rate=SAMPLE_RATE)
        for features, mask, example in zip(batch["input_features"], batch["attention_mask"], examples, strict=True):
            if example["seed"] is not None:
                mask_features(features[: int(mask.sum())], np.random.default_rng(example["seed"]))
        # a multiple, so that a batch of empty texts still has a column of labels
        labels = self.processor.tokenizer(
            [example["text"] for example in examples], padding=True, pad_to_multiple_of=4, return_tensors="pt"
        )["input_ids"]
        return {
            "input_features": batch["input_features"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }


def batches(audios: Sequence[Array], size: int) -> Iterator[Sequence[Array]]:
    """Cut a list into batches."""
    for start in range(0, len(audios), size):
        yield audios[start : start + size]


def transcribe(model: ParakeetForCTC, processor: ParakeetProcessor, audios: Sequence[Array]) -> list[str]:
    """Recognise audio greedily; `audios` are (S,) float32 at 16 kHz."""
    model.eval()
    texts: list[str] = []
    for batch in batches(audios, 16):
        inputs = processor(list(batch), sampling_rate=SAMPLE_RATE)
        ids = model.generate(input_features=inputs["input_features"], attention_mask=inputs["attention_mask"])
        texts += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    return texts


def evaluation_sets(data: Path, number: int) -> dict[str, list[tuple[Array, str]]]:
    """Build the held-out audio with its texts, by name; nothing in it is trained on."""
    sets = {}
    for split, name in (("dev", "fsdd dev strings"), ("test", "fsdd test strings (theo, unseen)")):
        strings = evaluation_strings(fsdd_clips(data, split), number, EVALUATION_SEED)
        sets[name] = [(string.audio, string.text) for string in strings]
    for split in ("dev", "test"):
        sets[f"speechocean762 {split} digit lines"] = [(clip.audio, clip.text) for clip in digit_lines(data, split)]
    return sets


@dataclass(frozen=True)
class Scores:
    """What an evaluation found: rows of (name, lines, words, word error rate), and lines of other speech."""

    rows: tuple[tuple[str, int, int, float], ...]
    other: int
    silent: int


def evaluate(model: ParakeetForCTC, processor: ParakeetProcessor, data: Path, number: int) -> Scores:
    """Measure and print the word error rate of every evaluation set, and the share of other speech left empty."""
    rows = []
    for name, pairs in evaluation_sets(data, number).items():
        texts = transcribe(model, processor, [audio for audio, _ in pairs])
        words = sum(len(text.split()) for _, text in pairs)
        rows.append((name, len(pairs), words, jiwer.wer([text for _, text in pairs], texts)))
        print("{:36} {:4} lines {:5} words  WER {:7.2%}".format(*rows[-1]), flush=True)
    other = transcribe(model, processor, [clip.audio for clip in other_lines(data, "dev")])
    silent = sum(not text for text in other)
    print(f"{'speechocean762 dev, no digit word':36} {len(other):4} lines  empty text for {silent}", flush=True)
    return Scores(tuple(rows), len(other), silent)


def write_card(scores: Scores, parameters: int, minutes: float, options: argparse.Namespace) -> None:
    """Write the model card beside the weights."""
    card = CARD.format(
        parameters=parameters,
        rows="\n".join("| {} | {} | {} | {:.2%} |".format(*row) for row in scores.rows),
        number=EVALUATION_STRINGS,
        seed=EVALUATION_SEED,
        other=scores.other,
        silent=scores.silent,
        command="python examples/train_demo.py",
        steps=options.steps,
        stop=options.stop,
        batch_size=options.batch_size,
        run_seed=options.seed,
        minutes=minutes,
        date=date.today().isoformat(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    (options.output / "README.md").write_text(card, encoding="utf-8")


class Progress(TrainerCallback):
    """Prints the scores at every checkpoint and ends the training after `stop` updates; it chooses nothing."""

    def __init__(self, processor: ParakeetProcessor, data: Path, stop: int) -> None:
        self.processor = processor
        self.data = data
        self.stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End before the schedule does."""
        control.should_training_stop |= state.global_step >= self.stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate on a quarter of the strings."""
        model = kwargs["model"]
        evaluate(model, self.processor, self.data, number=100)
        model.train()


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Set many small updates: 4 strings, about 13 s of audio, per batch."""
    return TrainingArguments(
        output_dir=f"{options.output}-checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        adam_beta2=0.98,
        max_grad_norm=5.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=options.workers,
        logging_steps=50,
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to="none",
        use_cpu=True,
        seed=options.seed,
    )


def train(options: argparse.Namespace) -> tuple[ParakeetForCTC, ParakeetProcessor]:
    """Train from random weights and write the finished folder."""
    set_seed(options.seed)
    tokenizer = build_tokenizer()
    processor = ParakeetProcessor(ParakeetFeatureExtractor(), tokenizer)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} pieces", flush=True)
    examples = TrainingExamples(
        training_voices(options.data), options.steps * options.batch_size, options.batch_size, options.seed
    )
    trainer = Trainer(
        model=model,
        args=training_arguments(options),
        train_dataset=examples,
        data_collator=Collator(processor),
        callbacks=[Progress(processor, options.data, options.stop)],
    )
    trainer.train()
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    return model, processor


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", help="folder of the speech data")
    parser.add_argument("--output", type=Path, default=Path("digits-ctc"), help="folder to write the model to")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only evaluate this model")
    parser.add_argument("--steps", type=int, default=13_000, help="updates until the learning rate is zero")
    parser.add_argument("--stop", type=int, default=10_000, help="updates after which training ends")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-steps", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=17)
    return parser.parse_args()


def main() -> None:
    """Train or evaluate."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.evaluate:
        model = ParakeetForCTC.from_pretrained(options.evaluate)
        processor = ParakeetProcessor.from_pretrained(options.evaluate)
    else:
        started = time.monotonic()
        model, processor = train(options)
        minutes = (time.monotonic() - started) / 60
    scores = evaluate(model, processor, options.data, EVALUATION_STRINGS)
    if not options.evaluate:
        write_card(scores, model.num_parameters(), minutes, options)


if __name__ == "__main__":
    main()
