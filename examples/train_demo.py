"""Train the demo model, a small hybrid TDT-CTC Parakeet for strings of spoken English digits, on a CPU within an hour.

    python examples/train_demo.py --data FOLDER                                    # train, evaluate, write the card
    python examples/train_demo.py --data FOLDER --evaluate src/transformers_parakeet/demo_model

FOLDER contains the packed speech `fsdd` and `speechocean762` (see `packed_speech.py`). `digit_strings.py` creates the
training examples, and `evaluate_demo.py` evaluates the model.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digit_strings import DIGITS, SAMPLE_RATE, TrainingExamples, load_training_voices
from evaluate_demo import NUM_EVALUATION_STRINGS, evaluate, write_card
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from transformers_parakeet import (
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForTDT,
    ParakeetProcessor,
    ParakeetTDTConfig,
    ParakeetTokenizer,
)

SPACE = "\u2581"
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
# durations in encoder frames; a digit is one token of up to 0.64 s
DURATIONS = tuple(range(9))
# seconds per encoder frame
FRAME_S = 0.08
# weight of the alignment loss
ALIGNMENT_WEIGHT = 0.3
# number and maximum width of the masks in training, in mel frames of 10 ms and in mel bins
TIME_MASKS, TIME_WIDTH = 2, 20
BIN_MASKS, BIN_WIDTH = 2, 14


def build_tokenizer() -> ParakeetTokenizer:
    """Build a byte-pair tokenizer with one piece per digit; other lower-case words are split into letters.

    Returns:
        A tokenizer with the vocabulary layout of the released CTC checkpoints: `<unk>` is the first token, and the
        blank `<pad>` is the last token.
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
    """Build the untrained model, with 1.8 million parameters and encoder frames of 80 ms."""
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
    # transformers initialises weights with standard deviation 0.02, which suits 1024 channels; here the subsampling
    # would attenuate the signal to 3e-7, so layers are initialised with the defaults of torch
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.LSTM):
            module.reset_parameters()
    return model


def mask_features(features: torch.Tensor, rng: np.random.Generator) -> None:
    """Set random time and frequency bands of the (T, F) features of one example to 0, in place."""
    for _ in range(TIME_MASKS):
        start, width = rng.integers(features.shape[0]), rng.integers(TIME_WIDTH + 1)
        features[start : start + width] = 0.0
    for _ in range(BIN_MASKS):
        start, width = rng.integers(features.shape[1]), rng.integers(BIN_WIDTH + 1)
        features[:, start : start + width] = 0.0


def compute_aligned_path(
    spans: Sequence[tuple[float, float]], num_frames: int
) -> list[tuple[int, int, bool, int]] | None:
    """Compute the TDT lattice path on which every word is emitted at its true start, with its true duration.

    Args:
        spans: start and end of every word in seconds; each word is one token.
        num_frames: number of encoder frames of the clip.

    Returns:
        The steps of the path as tuples (frame, number of words emitted before the step, whether the step emits a word,
        duration in frames); None if the words do not fit into the frames.
    """
    steps: list[tuple[int, int, bool, int]] = []
    frame = 0
    starts = [round(start / FRAME_S) for start, _ in spans] + [num_frames]
    for index, start in enumerate(starts):
        # blanks up to the start of the word
        while frame < start:
            duration = min(start - frame, DURATIONS[-1])
            steps.append((frame, index, False, duration))
            frame += duration
        if index == len(spans):
            break
        if frame >= num_frames:
            return None
        end = round(spans[index][1] / FRAME_S)
        frames_to_next_word = max(1, min(starts[index + 1], num_frames) - frame)
        duration = min(max(1, end - frame), frames_to_next_word, DURATIONS[-1])
        steps.append((frame, index, True, duration))
        frame += duration
    return steps


class Collator:
    """Collates examples into batches with masked features and word times.

    Args:
        processor: processor of the model.
    """

    def __init__(self, processor: ParakeetProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples into a padded batch.

        Args:
            examples: items of `TrainingExamples`.

        Returns:
            `input_features` (B, T, F), `attention_mask` (B, T), `labels` (B, U) padded with the blank, and `spans`, the
            word times of each example.
        """
        batch = self.processor([example["audio"] for example in examples], sampling_rate=SAMPLE_RATE)
        for features, mask, example in zip(batch["input_features"], batch["attention_mask"], examples, strict=True):
            if example["seed"] is not None:
                mask_features(features[: int(mask.sum())], np.random.default_rng(example["seed"]))
        # `pad_to_multiple_of` gives a batch of empty texts at least one column of labels
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
    """Compute the mean cross-entropy of tokens and durations along the known alignments.

    Args:
        model: the model; the joint network is evaluated only along the alignments.
        encoded: encoder output from `get_audio_features`.
        labels: (B, U) one token per word, padded with the blank.
        spans: for each example, the start and end of every word in seconds; None if unknown.

    Returns:
        The scalar loss; 0 if no alignment is known.
    """
    blank_id, frame_lengths = model.config.blank_token_id, encoded.attention_mask.sum(-1).tolist()
    nodes = []
    for row, word_times in enumerate(spans):
        path = None if word_times is None else compute_aligned_path(word_times, frame_lengths[row])
        for frame, num_emitted, emits_word, duration in path or ():
            token = int(labels[row, num_emitted]) if emits_word else blank_id
            nodes.append((row, frame, num_emitted, token, duration))
    if not nodes:
        return encoded.pooler_output.sum() * 0
    rows, frames, label_positions, tokens, durations = torch.tensor(nodes).unbind(1)
    predictor_states = model.decoder(F.pad(labels, (1, 0), value=blank_id))[rows, label_positions]
    logits = model.joint(predictor_states, encoded.pooler_output[rows, frames])
    # the durations are 0, 1, 2, ..., so the index of a duration equals the duration
    vocab_size = model.config.vocab_size
    return F.cross_entropy(logits[:, :vocab_size], tokens) + F.cross_entropy(logits[:, vocab_size:], durations)


class AligningTrainer(Trainer):
    """A trainer that adds the alignment loss to the loss of the model."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the weighted sum of the model's loss and the alignment loss."""
        encoded = model.get_audio_features(inputs["input_features"], attention_mask=inputs["attention_mask"])
        loss = model(encoder_outputs=encoded, labels=inputs["labels"]).loss
        return loss + ALIGNMENT_WEIGHT * alignment_loss(model, encoded, inputs["labels"], inputs["spans"])


class Progress(TrainerCallback):
    """Prints scores at every checkpoint, only for information: the scores do not select a checkpoint.

    Args:
        processor: processor of the model.
        data: folder with the packed speech.
    """

    def __init__(self, processor: ParakeetProcessor, data: Path) -> None:
        self.processor = processor
        self.data = data

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the model on 100 strings per set."""
        model = kwargs["model"]
        evaluate(model, self.processor, self.data, number=100)
        model.train()


def create_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Create the training arguments: many updates with small batches, by default 4 strings or about 13 s of audio."""
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
    """Train from random weights, and save the model and the processor in the output folder."""
    set_seed(options.seed)
    tokenizer = build_tokenizer()
    processor = ParakeetProcessor(
        ParakeetFeatureExtractor(), tokenizer, blank_token=tokenizer.pad_token, decoder_type="tdt"
    )
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} pieces", flush=True)
    examples = TrainingExamples(
        load_training_voices(options.data), options.steps * options.batch_size, options.batch_size, options.seed
    )
    trainer = AligningTrainer(
        model=model,
        args=create_arguments(options),
        train_dataset=examples,
        data_collator=Collator(processor),
        callbacks=[Progress(processor, options.data)],
    )
    trainer.train()
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    return model, processor


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with packed speech: fsdd, speechocean762")
    parser.add_argument("--output", type=Path, default=Path("digits-tdt-ctc"), help="folder to write the model to")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only evaluate the model in this folder")
    parser.add_argument("--steps", type=int, default=10_000, help="number of updates")
    parser.add_argument("--batch-size", type=int, default=4, help="strings per batch")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-steps", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=17)
    return parser.parse_args()


def main() -> None:
    """Train the model and write the model card, or only evaluate a model."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.evaluate:
        model = ParakeetForTDT.from_pretrained(options.evaluate)
        processor = ParakeetProcessor.from_pretrained(options.evaluate)
    else:
        started = time.monotonic()
        model, processor = train(options)
        minutes = (time.monotonic() - started) / 60
    scores = evaluate(model, processor, options.data, NUM_EVALUATION_STRINGS)
    if not options.evaluate:
        training = {
            "parameters": model.num_parameters(),
            "weight": ALIGNMENT_WEIGHT,
            "steps": options.steps,
            "batch_size": options.batch_size,
            "run_seed": options.seed,
            "minutes": minutes,
        }
        write_card(scores, training, options.output)


if __name__ == "__main__":
    main()
