"""Trains the demo model: a small hybrid TDT-CTC Parakeet for spoken English digit strings, on a CPU within an hour.

The audio comes from `digit_strings.py`; model, processor and tokenizer from `transformers_parakeet`.
"""

import argparse
import platform
import time
from collections.abc import Sequence
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
    DigitString,
    Span,
    TrainingExamples,
    digit_lines,
    evaluation_strings,
    fsdd_clips,
    other_lines,
    training_voices,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, pipeline, set_seed

from transformers_parakeet import (
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForTDT,
    ParakeetProcessor,
    ParakeetTDTConfig,
    ParakeetTokenizer,
)

EVALUATION_SEED = 2026
EVALUATION_STRINGS = 400
SPACE = "\u2581"
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
# a digit is one token, and up to 0.64 s long
DURATIONS = tuple(range(9))
FRAME_S = 0.08
ALIGNMENT_WEIGHT = 0.3
# how far a word's start and end may lie from the truth
TIME_TOLERANCE_S = 0.15
# widths and counts of the bands that are blanked in training: mel frames of 10 ms, mel bins
TIME_MASKS, TIME_WIDTH = 2, 20
BIN_MASKS, BIN_WIDTH = 2, 14
CARD = """\
---
license: cc-by-sa-4.0
language: en
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [parakeet, tdt, ctc, digits, demo]
---

# digits-tdt-ctc: a demonstration model

A hybrid TDT-CTC Parakeet with {parameters:,} parameters that recognises strings of the English digits zero to nine,
16 kHz mono. It exists to show and to test `transformers_parakeet` on real speech without a download. Intended use:
demonstration only; it knows ten words and answers other speech, noise and silence with empty text most of the time,
not always.

## Scores

| held-out audio | lines | words | TDT word error rate | CTC word error rate | TDT words timed right |
| --- | --- | --- | --- | --- | --- |
{rows}

Greedy decoding, `jiwer.wer`, all lines of a row pooled. The fsdd strings are {number} draws per split with seed {seed}:
one speaker, three to seven of the split's recordings joined with pauses of 0 to 0.5 s, no augmentation. "Timed right"
is the share of correct words whose start and end both lie within {tolerance} s of where the word's recording was joined
in. The digit lines of speechocean762 are unmodified, and all are by children of six to nine with errors of
pronunciation; there are few, and a digit string of a child is often taken for other speech and left out. Of the {other}
lines of its dev split without any digit word, {silent} give empty text. To repeat:

    python examples/train_demo.py --evaluate FOLDER

## Training

`{command}`: {steps:,} updates of {batch_size} strings from random weights with `transformers.Trainer`, seed {run_seed},
the learning rate on a cosine; on one core of a shared CPU in {minutes:.0f} minutes; {date}, Python {python}, torch
{torch}, transformers {transformers}. The last weights are kept. The loss is the model's own, 0.7 of TDT and 0.3 of
CTC, and {weight} of an alignment loss: since the joined recordings' places are known, the TDT head also learns to emit
every digit where it starts, with the duration that it lasts. Data: the train splits only, augmented (speed, rooms,
colouring, telephone band, noise, babble, masking); a tenth of the examples are other speech or noise with empty text.

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

The clips are held out from training. A seed chose each of them (`examples/digit_strings.py --clips FOLDER`); how many
of each kind there are was settled by hand: of the children's lines, most of which the model misses, one is shown.
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


def build_model(tokenizer: ParakeetTokenizer) -> ParakeetForTDT:
    """Build the untrained model, 1.8 M parameters, frames of 80 ms."""
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
    config = ParakeetTDTConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        blank_token_id=tokenizer.pad_token_id,
        durations=DURATIONS,
        decoder_hidden_size=64,
        num_decoder_layers=1,
        joint_hidden_size=128,
        decoder_dropout=0.1,
        joint_dropout=0.1,
        loss_reduction="mean_volume",
        ctc_head=True,
        encoder_config=encoder.to_dict(),
    )
    model = ParakeetForTDT(config)
    # the normal weights of 0.02 that suit 1024 channels leave 3e-7 of the signal after the subsampling of this one
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.LSTM):
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


def aligned_path(spans: Sequence[tuple[float, float]], frames: int) -> list[tuple[int, int, bool, int]] | None:
    """Lay the path through the lattice that emits every word where it starts, for as long as it lasts.

    Args:
        spans: start and end of every word in seconds; a word is one token.
        frames: length of the clip in encoder frames.

    Returns:
        Steps of (frame, words emitted before, whether a word is emitted, duration in frames); `None` if the words do
        not fit into the frames.
    """
    steps, frame = [], 0
    starts = [round(start / FRAME_S) for start, _ in spans] + [frames]
    for index, start in enumerate(starts):
        while frame < start:
            steps.append((frame, index, False, min(start - frame, DURATIONS[-1])))
            frame += steps[-1][-1]
        if index < len(spans):
            if frame >= frames:
                return None
            room = max(1, min(starts[index + 1], frames) - frame)
            steps.append(
                (frame, index, True, min(max(1, round(spans[index][1] / FRAME_S) - frame), room, DURATIONS[-1]))
            )
            frame += steps[-1][-1]
    return steps


class Collator:
    """Turns examples into masked features, attention mask, labels, and the spans of the words."""

    def __init__(self, processor: ParakeetProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_features` (B, T, F), `attention_mask` (B, T), `labels` (B, U) padded with blanks, `spans`."""
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
            "spans": [example["spans"] for example in examples],
        }


def alignment_loss(
    model: ParakeetForTDT, encoded: Any, labels: torch.Tensor, spans: Sequence[list[tuple[float, float]] | None]
) -> torch.Tensor:
    """Compute the mean cross-entropy of token and duration over the steps of the known alignments.

    Args:
        model: its predictor and joint are run along the paths only.
        encoded: output of `get_audio_features`.
        labels: (B, U) one token per word, padded with the blank.
        spans: start and end of every word in seconds, `None` where unknown.

    Returns:
        A scalar; 0 without any known alignment.
    """
    blank, frames = model.config.blank_token_id, encoded.attention_mask.sum(-1).tolist()
    cells = [
        (row, frame, before, int(labels[row, before]) if emits else blank, duration)
        for row, known in enumerate(spans)
        for frame, before, emits, duration in (known is not None and aligned_path(known, frames[row])) or ()
    ]
    if not cells:
        return encoded.pooler_output.sum() * 0
    row, frame, before, token, duration = torch.tensor(cells).unbind(1)
    predicted = model.decoder(F.pad(labels, (1, 0), value=blank))[row, before]
    scores = model.joint(predicted, encoded.pooler_output[row, frame])
    # the durations are 0, 1, 2, ...: value and index agree
    return F.cross_entropy(scores[:, : model.config.vocab_size], token) + F.cross_entropy(
        scores[:, model.config.vocab_size :], duration
    )


class AligningTrainer(Trainer):
    """Adds the alignment loss to the model's own."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return both losses together."""
        encoded = model.get_audio_features(inputs["input_features"], attention_mask=inputs["attention_mask"])
        loss = model(encoder_outputs=encoded, labels=inputs["labels"]).loss
        return loss + ALIGNMENT_WEIGHT * alignment_loss(model, encoded, inputs["labels"], inputs["spans"])


def transcribe(
    model: ParakeetForTDT, processor: ParakeetProcessor, audios: Sequence[Array], decoder: str
) -> list[dict[str, Any]]:
    """Recognise audio greedily with one of the heads.

    Args:
        model: put into evaluation mode.
        processor: of the model.
        audios: (S,) float32 at 16 kHz each.
        decoder: `transducer` or `ctc`.

    Returns:
        One `text` with word `chunks` per audio.
    """
    pipe = pipeline(
        "automatic-speech-recognition",
        model=model.eval(),
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    inputs = [{"raw": audio, "sampling_rate": SAMPLE_RATE} for audio in audios]
    return pipe(inputs, batch_size=16, return_timestamps="word", generate_kwargs={"decoder": decoder})


def timed_words(string: DigitString, result: dict[str, Any]) -> tuple[int, int]:
    """Count the correct words of a string, and those of them whose start and end are within the tolerance."""
    words = [chunk["text"].strip() for chunk in result["chunks"]]
    if not words:
        return 0, 0
    correct = right = 0
    for chunk in jiwer.process_words(string.text, " ".join(words)).alignments[0]:
        if chunk.type != "equal":
            continue
        for offset in range(chunk.ref_end_idx - chunk.ref_start_idx):
            span = string.spans[chunk.ref_start_idx + offset]
            start, end = result["chunks"][chunk.hyp_start_idx + offset]["timestamp"]
            correct += 1
            right += abs(start - span.start_s) <= TIME_TOLERANCE_S and abs(end - span.end_s) <= TIME_TOLERANCE_S
    return correct, right


def evaluation_sets(data: Path, number: int) -> dict[str, list[DigitString]]:
    """Build the held-out audio with its texts, by name; nothing in it is trained on."""
    sets = {}
    for split, name in (("dev", "fsdd dev strings"), ("test", "fsdd test strings (theo, unseen)")):
        sets[name] = evaluation_strings(fsdd_clips(data, split), number, EVALUATION_SEED)
    for split in ("dev", "test"):
        sets[f"speechocean762 {split} digit lines"] = [
            DigitString(clip.audio, (Span(clip.text, 0.0, len(clip.audio) / SAMPLE_RATE),), clip.speaker, (clip.name,))
            for clip in digit_lines(data, split)
        ]
    return sets


@dataclass(frozen=True)
class Score:
    """What both heads make of one set; `timed` is the share of the TDT head's correct words with right times."""

    name: str
    lines: int
    words: int
    tdt_wer: float
    ctc_wer: float
    timed: float | None


@dataclass(frozen=True)
class Scores:
    """What an evaluation found: one row per set, and how many of the lines of other speech gave empty text."""

    rows: tuple[Score, ...]
    other: int
    silent: int


def score(model: ParakeetForTDT, processor: ParakeetProcessor, name: str, strings: Sequence[DigitString]) -> Score:
    """Measure both heads on one set."""
    said = [string.text for string in strings]
    audios = [string.audio for string in strings]
    tdt = transcribe(model, processor, audios, "transducer")
    ctc = transcribe(model, processor, audios, "ctc")
    timed = None
    if all(" " not in span.text for string in strings for span in string.spans):
        correct, right = (sum(counts) for counts in zip(*map(timed_words, strings, tdt), strict=True))
        timed = right / max(correct, 1)
    return Score(
        name,
        len(strings),
        sum(len(text.split()) for text in said),
        jiwer.wer(said, [result["text"] for result in tdt]),
        jiwer.wer(said, [result["text"] for result in ctc]),
        timed,
    )


def evaluate(model: ParakeetForTDT, processor: ParakeetProcessor, data: Path, number: int) -> Scores:
    """Measure and print the scores of every evaluation set, and the share of other speech left empty."""
    rows = []
    for name, strings in evaluation_sets(data, number).items():
        row = score(model, processor, name, strings)
        timed = "" if row.timed is None else f"timed right {row.timed:.1%}"
        print(
            f"{name:36} {row.lines:4} lines {row.words:5} words  TDT {row.tdt_wer:7.2%} CTC {row.ctc_wer:7.2%}  {timed}"
        )
        rows.append(row)
    other = transcribe(model, processor, [clip.audio for clip in other_lines(data, "dev")], "transducer")
    silent = sum(not result["text"] for result in other)
    print(f"{'speechocean762 dev, no digit word':36} {len(other):4} lines  empty text for {silent}", flush=True)
    return Scores(tuple(rows), len(other), silent)


def table_row(row: Score) -> str:
    """Write one line of the card's table."""
    timed = "" if row.timed is None else f"{row.timed:.1%}"
    return f"| {row.name} | {row.lines} | {row.words} | {row.tdt_wer:.2%} | {row.ctc_wer:.2%} | {timed} |"


def write_card(scores: Scores, parameters: int, minutes: float, options: argparse.Namespace) -> None:
    """Write the model card beside the weights."""
    card = CARD.format(
        parameters=parameters,
        rows="\n".join(map(table_row, scores.rows)),
        number=EVALUATION_STRINGS,
        seed=EVALUATION_SEED,
        tolerance=TIME_TOLERANCE_S,
        weight=ALIGNMENT_WEIGHT,
        other=scores.other,
        silent=scores.silent,
        command="python examples/train_demo.py",
        steps=options.steps,
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
    """Prints the scores at every checkpoint; it chooses nothing."""

    def __init__(self, processor: ParakeetProcessor, data: Path) -> None:
        self.processor = processor
        self.data = data

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
        disable_tqdm=True,
        use_cpu=True,
        seed=options.seed,
    )


def train(options: argparse.Namespace) -> tuple[ParakeetForTDT, ParakeetProcessor]:
    """Train from random weights and write the finished folder."""
    set_seed(options.seed)
    tokenizer = build_tokenizer()
    processor = ParakeetProcessor(
        ParakeetFeatureExtractor(), tokenizer, blank_token=tokenizer.pad_token, decoder_type="tdt"
    )
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} pieces", flush=True)
    examples = TrainingExamples(
        training_voices(options.data), options.steps * options.batch_size, options.batch_size, options.seed
    )
    trainer = AligningTrainer(
        model=model,
        args=training_arguments(options),
        train_dataset=examples,
        data_collator=Collator(processor),
        callbacks=[Progress(processor, options.data)],
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
    parser.add_argument("--output", type=Path, default=Path("digits-tdt-ctc"), help="folder to write the model to")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only evaluate this model")
    parser.add_argument("--steps", type=int, default=10_000, help="updates")
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
        model = ParakeetForTDT.from_pretrained(options.evaluate)
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
