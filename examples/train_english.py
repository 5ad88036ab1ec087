"""Train an English model from random weights, on a CPU in hours.

    python examples/train_english.py ctc --data FOLDER --output english-ctc
    python examples/train_english.py hybrid --data FOLDER --encoder english-ctc --output english-tdt
    python examples/score_english.py --model english-tdt --data FOLDER

The first command trains characters with a CTC head. The encoder has 4 mel frames per frame, because characters do not
fit 8 mel frames per frame. The second command adds a TDT head to the trained encoder. FOLDER has packed speech, see
`packed_speech.py`. Training continues from the last checkpoint in the output folder with `--resume`.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cached_speech import CachedSpeech
from from_scratch import create_head, initialise_layers, train_tokenizer
from packed_speech import ConcatenatedSpeech, PackedSpeech
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, set_seed

from transformers_parakeet import ParakeetFeatureExtractor, ParakeetProcessor, load_nemo
from transformers_parakeet.training import ParakeetTrainer, SpeechCollator
from transformers_parakeet.training.batching import DurationBatchSampler

CORPORA = ("english", "librispeech20", "speechocean762")
# the characters, the special tokens and one or two frequent pairs of characters
VOCABULARY = 32
SUBSAMPLING_FACTOR = 4
ENCODER = {
    "hidden_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 704,
    "subsampling_conv_channels": 32,
    "subsampling_factor": SUBSAMPLING_FACTOR,
    "layerdrop": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
}
SPEC_AUGMENT = {"freq_masks": 2, "freq_width": 15, "time_masks": 4, "time_width": 0.05}
DROPOUT = 0.1


@dataclass(frozen=True)
class Schedule:
    """How the batches change during training.

    Args:
        num_updates: number of updates.
        first_limit_s: maximum duration of a clip at the start, in seconds.
        last_limit_s: maximum duration of a clip after the first third.
        batch_s: duration of a batch up to the middle of training, in seconds.
        late_batch_s: duration of a batch after the middle.
        num_levels: number of steps in which the maximum duration grows.
    """

    num_updates: int
    first_limit_s: float = 2.5
    last_limit_s: float = 17.0
    batch_s: float = 24.0
    late_batch_s: float = 40.0
    num_levels: int = 8

    def list_phases(self) -> list[tuple[int, float, float]]:
        """List the phases of training: number of updates, maximum duration of a clip, duration of a batch."""
        growth = self.num_updates // 3
        sizes = [len(part) for part in np.array_split(range(growth), self.num_levels)]
        limits = np.geomspace(self.first_limit_s, self.last_limit_s, self.num_levels + 1)[:-1]
        phases = [(size, float(limit), self.batch_s) for size, limit in zip(sizes, limits, strict=True) if size]
        middle = self.num_updates // 2
        phases.append((middle - growth, self.last_limit_s, self.batch_s))
        phases.append((self.num_updates - middle, self.last_limit_s, self.late_batch_s))
        return [phase for phase in phases if phase[0] > 0]


class CurriculumSampler:
    """Samples batches whose clips become longer during training.

    Args:
        durations: duration of each clip in seconds.
        schedule: the phases of training.
        seed: random seed.
    """

    def __init__(self, durations: Sequence[float], schedule: Schedule, seed: int = 0) -> None:
        self.durations, self.schedule, self.seed = np.asarray(durations), schedule, seed

    def __len__(self) -> int:
        return self.schedule.num_updates

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the clips of each batch."""
        for phase, (num_updates, limit_s, batch_s) in enumerate(self.schedule.list_phases()):
            clips = np.flatnonzero(self.durations <= max(limit_s, self.durations.min()))
            sampler = DurationBatchSampler(self.durations[clips], batch_s, seed=self.seed + phase)
            for update in range(num_updates):
                epoch, position = divmod(update, len(sampler))
                if position == 0:
                    sampler.set_epoch(epoch)
                    batches = iter(sampler)
                yield clips[next(batches)].tolist()


class Regularisation(TrainerCallback):
    """Switches SpecAugment and dropout on after a fraction of the updates.

    Args:
        start: fraction of the updates.
    """

    def __init__(self, start: float) -> None:
        self.start = start

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Switch the regularisation on at the first update after the start."""
        if state.global_step >= self.start * state.max_steps and model.config.spec_augment is None:
            model.config.spec_augment = SPEC_AUGMENT
            for module in model.encoder.modules():
                if isinstance(getattr(module, "dropout", None), float):
                    module.dropout = DROPOUT


def open_corpora(folder: Path) -> tuple[ConcatenatedSpeech, dict[str, PackedSpeech]]:
    """Open the training clips of all corpora that the folder has, and the dev clips of each corpus.

    Args:
        folder: folder with packed speech.

    Raises:
        SystemExit: the folder has none of the corpora.
    """
    corpora = [corpus for corpus in CORPORA if (folder / corpus / "manifest.jsonl").exists()]
    if not corpora:
        raise SystemExit(f"--data must name a folder with packed speech ({', '.join(CORPORA)}), got {folder}")
    train = ConcatenatedSpeech([PackedSpeech(folder / corpus, "train") for corpus in corpora])
    return train, {corpus: PackedSpeech(folder / corpus, "dev") for corpus in corpora}


def create_model(head: str, texts: Sequence[str], encoder: Path | None) -> tuple[Any, ParakeetProcessor]:
    """Create a model with random weights and PyTorch's default initialisation, and its processor.

    Args:
        head: `ctc` or `hybrid`.
        texts: transcripts, from which the characters are taken.
        encoder: folder of a trained model whose encoder and CTC head are used; None for random weights.
    """
    tokenizer = train_tokenizer(texts, VOCABULARY, head)
    model = create_head(head, tokenizer, ENCODER["hidden_size"], dict(ENCODER))
    initialise_layers(model)
    if head == "hybrid":
        # random numbers for every frame, label and unit of the joint network would take a third of the time
        model.config.joint_dropout = model.joint.dropout = 0.0
    if encoder is not None:
        trained, trained_processor = load_nemo(str(encoder))
        model.encoder.load_state_dict(trained.encoder.state_dict())
        copy_head(trained.ctc_head, trained_processor.tokenizer, model.ctc_head, tokenizer)
    processor = ParakeetProcessor(
        ParakeetFeatureExtractor(),
        tokenizer,
        decoder_type="tdt" if head == "hybrid" else head,
        subsampling_factor=SUBSAMPLING_FACTOR,
    )
    return model, processor


@torch.no_grad()
def copy_head(source: Any, source_tokenizer: Any, target: Any, target_tokenizer: Any) -> None:
    """Copy the weights of a CTC head for the tokens that two tokenizers have in common.

    The tokenizer of a CTC model has other token ids than that of a hybrid, and its blank is the pad token.

    Args:
        source: trained head.
        source_tokenizer: tokenizer of the trained head.
        target: head to change in place.
        target_tokenizer: tokenizer of this head.
    """
    source_ids = source_tokenizer.get_vocab()
    for parameter, source_parameter in zip(target.parameters(), source.parameters(), strict=True):
        for token, token_id in target_tokenizer.get_vocab().items():
            if token in source_ids:
                parameter[token_id] = source_parameter[source_ids[token]]
        # the blank is the last token
        parameter[-1] = source_parameter[-1]


def average_checkpoints(folder: Path) -> dict[str, torch.Tensor]:
    """Average the weights of all checkpoints in a folder.

    Args:
        folder: output folder of a training.
    """
    paths = sorted(folder.glob("checkpoint-*/model.safetensors"))
    average = {name: weight.double() for name, weight in load_file(paths[0]).items()}
    for path in paths[1:]:
        for name, weight in load_file(path).items():
            average[name] += weight.double()
    return {name: weight / len(paths) for name, weight in average.items()}


def create_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Create the training arguments: AdamW, a cosine schedule and 20 checkpoints."""
    interval = max(1, options.updates // 20)
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.updates,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, options.updates // 5),
        weight_decay=1e-3,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        per_device_eval_batch_size=16,
        eval_strategy="steps",
        eval_steps=max(1, options.updates // options.evaluations),
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=options.averaged,
        logging_steps=max(1, options.updates // 100),
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=options.bfloat16,
        seed=options.seed,
    )


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", choices=("ctc", "hybrid"))
    parser.add_argument("--data", type=Path, required=True, help="folder with packed speech")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--cache", type=Path, help="folder of the features; default: features in the output folder")
    parser.add_argument(
        "--encoder", type=Path, help="folder of a trained model to take the encoder and the CTC head from"
    )
    parser.add_argument("--updates", type=int, default=30_000, help="number of updates")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate; 2e-3 diverges")
    parser.add_argument("--regularise-from", type=float, default=0.4, help="fraction of the updates without dropout")
    parser.add_argument("--averaged", type=int, default=4, help="number of checkpoints that are averaged")
    parser.add_argument("--evaluations", type=int, default=10, help="number of evaluations on the dev clips")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16; faster on CPUs with AMX")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")
    return parser.parse_args()


def main() -> None:
    """Train a model, average its last checkpoints, and save it with the curve of its errors."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    train_speech, dev_speech = open_corpora(options.data)
    model, processor = create_model(options.head, train_speech.texts, options.encoder)
    cache = options.cache or options.output / "features"
    train = CachedSpeech(train_speech, processor, cache, "train", changes_tempo=True)
    dev = {name: CachedSpeech(speech, processor, cache, f"{name}-dev") for name, speech in dev_speech.items()}
    print(f"{model.num_parameters():,} parameters, {sum(train.durations) / 3600:.1f} h of speech", flush=True)
    # an encoder that is already trained needs no short clips
    schedule = Schedule(options.updates) if options.encoder is None else Schedule(options.updates, first_limit_s=17.0)
    trainer = ParakeetTrainer(
        model=model,
        args=create_arguments(options),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=processor,
        data_collator=SpeechCollator(processor, seed=options.seed, ctc=True),
        batch_sampler=CurriculumSampler(train.durations, schedule, options.seed),
        callbacks=[Regularisation(options.regularise_from)],
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    model.load_state_dict(average_checkpoints(options.output), strict=False)
    trainer.save_model()
    curve = [
        entry for entry in trainer.state.log_history if "loss" in entry or any(name.endswith("_cer") for name in entry)
    ]
    (options.output / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
    for name, dataset in dev.items():
        scores = trainer.evaluate(dataset)
        print(f"{name:16} WER {scores['eval_wer']:7.2%}  CER {scores['eval_cer']:7.2%}", flush=True)
    losses = [entry["loss"] for entry in curve if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise SystemExit("the loss is not finite: lower the learning rate")


if __name__ == "__main__":
    main()
