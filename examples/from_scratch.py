"""Train a small model of spoken digits from random weights, on a CPU in minutes or on a GPU.

    python examples/from_scratch.py                                      # smoke test on eight bundled clips
    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    python examples/from_scratch.py --data free-spoken-digit-dataset     # with held-out scores

For sentences see `train_english.py`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import soundfile
import torch
from packed_speech import PackedSpeech
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
)
from transformers_parakeet.training import ParakeetTrainer, SpeechCollator

HEADS = ("ctc", "rnnt", "tdt", "hybrid")
SPACE = "\u2581"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset"
# Free Spoken Digit Dataset: one speaker is the test split; the first five recordings of each digit by every other
# speaker are the dev split
TEST_SPEAKER, NUM_DEV_RECORDINGS = "theo", 5
SMOKE_TEST_NOTE = f"""\
SMOKE TEST: no --data, so training and scoring use the same eight clips that come with the demo model. The scores below
show only that training works. To train on spoken digits with held-out scores, get the Free Spoken Digit Dataset:
    git clone {DIGITS_URL}
    python examples/from_scratch.py --data free-spoken-digit-dataset
"""


class SpeechDataset(Protocol):
    """A map-style dataset with the duration in seconds (`durations`) and the transcript (`texts`) of every clip."""

    durations: Any
    texts: Any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SpeechData:
    """The data of a run.

    Args:
        train: dataset to train on.
        evaluation: datasets scored during and after training, by name.
        test: datasets scored only after training, by name.
    """

    train: SpeechDataset
    evaluation: dict[str, SpeechDataset]
    test: dict[str, SpeechDataset]


# maximum vocabulary size, with the blank
VOCAB_SIZE = 64
WIDTH = 96
ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 4 * WIDTH,
    "subsampling_conv_channels": 16,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
}


class DemoClips:
    """A dataset of the eight clips of the demo model, which are enough for a smoke test, but not to learn from."""

    def __init__(self) -> None:
        folder = demo_model_path() / "clips"
        entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.rows = [{"audio": load_audio(folder / entry["file"]), "text": entry["text"]} for entry in entries]
        self.durations = [len(row["audio"]) / 16000 for row in self.rows]
        self.texts = [row["text"] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `audio` ((S,) samples at 16 kHz) and `text`."""
        return self.rows[index]


class DigitRecordings:
    """A dataset of one split of the Free Spoken Digit Dataset.

    Args:
        folder: folder `recordings` of the dataset, with files such as `7_jackson_32.wav` (digit, speaker, number).
        split: `"train"`, `"dev"` (recordings of the training speakers) or `"test"` (another speaker).

    Raises:
        ValueError: the folder has no recording of this split.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.paths = sorted(path for path in folder.glob("[0-9]_*_*.wav") if self.get_split(path) == split)
        if not self.paths:
            raise ValueError(f"{folder} must have recordings of the split {split!r}, got none: clone {DIGITS_URL}")
        self.durations = [soundfile.info(path).duration for path in self.paths]
        self.texts = [DIGITS[int(path.name[0])] for path in self.paths]

    @staticmethod
    def get_split(path: Path) -> str:
        """Determine the split of a recording from the file name."""
        _, speaker, number = path.stem.split("_")
        if speaker == TEST_SPEAKER:
            return "test"
        return "dev" if int(number) < NUM_DEV_RECORDINGS else "train"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `audio` (path of the recording) and `text`."""
        return {"audio": str(self.paths[index]), "text": self.texts[index]}


def load_data(folder: Path | None) -> SpeechData:
    """Open the data.

    Args:
        folder: a clone of the Free Spoken Digit Dataset, or a folder with the packed speech `fsdd`; None for the demo
            clips.

    Raises:
        SystemExit: the folder does not contain the data. The message describes the expected content.
    """
    if folder is None:
        print(SMOKE_TEST_NOTE, flush=True)
        clips = DemoClips()
        return SpeechData(clips, {"demo clips (trained on)": clips}, {})
    splits: dict[str, SpeechDataset]
    if (folder / "recordings").is_dir():
        splits = {split: DigitRecordings(folder / "recordings", split) for split in ("train", "dev", "test")}
    elif (folder / "fsdd" / "manifest.jsonl").exists():
        splits = {split: PackedSpeech(folder / "fsdd", split) for split in ("train", "dev", "test")}
    else:
        raise SystemExit(
            f"--data must name a clone of {DIGITS_URL}, or a folder with the packed speech fsdd (see "
            f"examples/packed_speech.py), got {folder}"
        )
    return SpeechData(splits["train"], {"fsdd_dev": splits["dev"]}, {"fsdd_test": splits["test"]})


def train_tokenizer(texts: Sequence[str], vocab_size: int, head: str) -> ParakeetTokenizer:
    """Train a byte-pair tokenizer with the vocabulary layout of the released checkpoints; the blank is the last token.

    Args:
        texts: transcripts to train on.
        vocab_size: maximum vocabulary size, with the blank and other special tokens.
        head: one of `HEADS`. For `ctc` the pad token is the blank; for all others there is a separate blank token.
    """
    special_tokens, blank = (["<unk>"], "<pad>") if head == "ctc" else (["<unk>", "<pad>"], "<blank>")
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([blank])
    return ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def initialise_layers(model: Any) -> None:
    """Initialise linear layers and convolutions with the defaults of torch.

    transformers initialises weights with standard deviation 0.02, which suits 1024 channels; a narrow model would
    attenuate its input to almost zero.

    Args:
        model: the model; changed in place.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
            module.reset_parameters()


def create_head(head: str, tokenizer: ParakeetTokenizer, width: int, encoder_config: dict[str, Any]) -> Any:
    """Create a model with the given type of head and random weights.

    Args:
        head: one of `HEADS`.
        tokenizer: tokenizer whose last token is the blank.
        width: hidden size of the prediction network.
        encoder_config: fields of the encoder configuration.
    """
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "encoder_config": encoder_config,
    }
    if head == "ctc":
        return ParakeetForCTC(ParakeetCTCConfig(**fields))
    fields |= {
        "blank_token_id": len(tokenizer) - 1,
        "decoder_hidden_size": width,
        "num_decoder_layers": 1,
        "decoder_dropout": 0.1,
        "joint_dropout": 0.1,
        "loss_reduction": "mean_batch",
        "ctc_loss_reduction": "mean_batch",
        "ctc_head": head == "hybrid",
    }
    if head == "rnnt":
        return ParakeetForRNNT(ParakeetRNNTConfig(**fields))
    return ParakeetForTDT(ParakeetTDTConfig(**fields))


def create_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Create the training arguments: AdamW, a cosine schedule, and ten evaluations and checkpoints.

    Args:
        options: parsed command-line options.
    """
    num_steps = options.steps
    interval = max(1, num_steps // 10)
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=num_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(500, num_steps // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=5.0,
        per_device_eval_batch_size=32,
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=1,
        logging_steps=max(1, num_steps // 40),
        dataloader_num_workers=options.workers,
        report_to="none",
        disable_tqdm=True,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=HEADS, default="ctc")
    parser.add_argument("--data", type=Path, help="folder of the speech; default: the eight demo clips")
    parser.add_argument("--output", type=Path, default=Path("from-scratch"), help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=1200, help="number of updates")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    # with more than about 12 s, a model of this size emits only blanks for a long time
    parser.add_argument("--batch-duration", type=float, default=12.0, help="seconds of audio per batch")
    parser.add_argument("--workers", type=int, default=0, help="number of processes that decode audio")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 mixed precision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")
    return parser.parse_args()


def main() -> None:
    """Train a model, save it, and print its scores on all evaluation and test data."""
    options = parse_options()
    # for a model of this size, the overhead of a second thread is larger than the gain
    torch.set_num_threads(1)
    set_seed(options.seed)
    data = load_data(options.data)
    tokenizer = train_tokenizer(data.train.texts, VOCAB_SIZE, options.head)
    model = create_head(options.head, tokenizer, WIDTH, ENCODER)
    initialise_layers(model)
    decoder_type = "tdt" if options.head == "hybrid" else options.head
    processor = ParakeetProcessor(ParakeetFeatureExtractor(), tokenizer, decoder_type=decoder_type)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    trainer = ParakeetTrainer(
        model=model,
        args=create_arguments(options),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=processor,
        data_collator=SpeechCollator(processor, seed=options.seed, ctc=options.head in ("ctc", "hybrid")),
        batch_duration_s=options.batch_duration,
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model()
    for name, dataset in {**data.evaluation, **data.test}.items():
        scores = trainer.evaluate(dataset)
        rates = f"WER {scores['eval_wer']:7.2%}  CER {scores['eval_cer']:7.2%}"
        print(f"{name:24} {len(dataset):5} clips  {rates}", flush=True)


if __name__ == "__main__":
    main()
