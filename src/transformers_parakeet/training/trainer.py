"""What training needs beside the model: collator, batches by duration, freezing, and a `Trainer`.

Where clips come from is for `training_data.py`, error rates are in `metrics.py`; the command `parakeet finetune` is in
`finetuning.py`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..audio import AudioError
from ..augmentation import dither
from ..losses import compact_labels
from ..processing_parakeet import SUBSAMPLING_FACTOR
from .data import clip_durations, clip_name, read_clip
from .metrics import ErrorRates, error_rates, normalize_text
from .update_guard import NonFiniteGuard

logger = logging.get_logger(__name__)

# NeMo's noise in training: parts/preprocessing/features.py
DITHER = 1e-5
# label positions that no loss and no metric looks at
IGNORED = -100
# clips are sorted by duration into steps of so many seconds, within which every epoch shuffles
BUCKET_S = 0.5
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Counts:
    """What a collator met, added up over its worker processes."""

    broken: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))
    unfit: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))
    unknown: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))

    def as_dict(self) -> dict[str, int]:
        """Return the counts that are not 0, by what to call them in a log."""
        named = {
            "broken_clips": self.broken.value,
            "transcripts_too_long": self.unfit.value,
            "transcripts_with_unknown_characters": self.unknown.value,
        }
        return {name: value for name, value in named.items() if value}


def count_up(counter: Any) -> int:
    """Add one to a shared counter; return the sum."""
    with counter.get_lock():
        counter.value += 1
        return int(counter.value)


@dataclass(frozen=True)
class SpeechCollator:
    """Turns rows into a padded batch: `input_features`, `attention_mask`, and `labels` filled up with -100.

    A row has `audio`, anything that `load_audio` takes, with `offset` and `duration` for a part of it, or
    `input_features` (T, F); and `text`, or `labels`.

    Args:
        processor: a `ParakeetProcessor`.
        dither: standard deviation of the noise added to samples; 0 for evaluation.
        seed: of that noise.
        skip_broken: skip clips that cannot be read, with a warning, instead of raising.
        keep_size: replace a skipped clip by a second of silence without a transcript, so that the batch keeps its size.
            Processes that gather their results need it in evaluation.
        ctc: look for transcripts that do not fit into their frames, which a CTC loss counts as zero; default: when the
            processor is that of a CTC model.
        counts: of clips that were skipped and of transcripts that do not fit.
    """

    processor: Any
    dither: float = DITHER
    seed: int = 0
    skip_broken: bool = False
    keep_size: bool = False
    ctc: bool | None = None
    counts: Counts = field(default_factory=Counts)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Build a batch.

        Args:
            rows: the examples.

        Returns:
            `input_features` (B, T, F), `attention_mask` (B, T), `labels` (B, U) where the rows have transcripts.

        Raises:
            AudioError: a clip cannot be read, is empty, or has samples that are not finite; the message names it.
        """
        features = [self._features(row, position) for position, row in enumerate(rows)]
        kept = [(row, found) for row, found in zip(rows, features, strict=True) if found is not None]
        if self.keep_size and len(kept) < len(rows):
            silence = ({"text": ""}, self._silence())
            kept = [silence if found is None else (row, found) for row, found in zip(rows, features, strict=True)]
        elif not kept:
            logger.warning("No clip of a batch could be read: a second of silence takes their place.")
            kept = [({"text": ""}, self._silence())]
        lengths = torch.tensor([len(found) for _, found in kept])
        padded = torch.nn.utils.rnn.pad_sequence([found for _, found in kept], batch_first=True)
        batch = {"input_features": padded, "attention_mask": torch.arange(padded.shape[1]) < lengths[:, None]}
        if all("text" in row or "labels" in row for row, _ in kept):
            labels = [self._labels(row) for row, _ in kept]
            self._check_fit(kept, labels)
            # one column at least, also when nobody speaks
            batch["labels"] = torch.full((len(kept), max(1, *map(len, labels))), IGNORED)
            for target, ids in zip(batch["labels"], labels, strict=True):
                target[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return batch

    def _features(self, row: Mapping[str, Any], position: int) -> Tensor | None:
        """(T, F) features of a row; None for a clip to leave out."""
        if "input_features" in row:
            return torch.as_tensor(np.asarray(row["input_features"]), dtype=torch.float32)
        extractor = self.processor.feature_extractor
        try:
            samples = read_clip(row, extractor.sampling_rate)
            if len(samples) < extractor.hop_length:
                raise AudioError(f"a clip to train on must hold a frame of {extractor.hop_length} samples, "
                                 f"this one has {len(samples)}")  # fmt: skip
        except (OSError, ValueError) as error:
            name = clip_name(row, position)
            # most errors name their file already
            message = str(error) if name in str(error) else f"{name}: {error}"
            if not self.skip_broken:
                raise AudioError(f"{message}; correct or remove it, or set `skip_broken`") from error
            result = "a second of silence takes its place" if self.keep_size else "skipped"
            logger.warning(f"{message}: {result} ({count_up(self.counts.broken)} so far)")
            return None
        return self._extract(dither(samples, self.dither, self.seed))

    def _silence(self) -> Tensor:
        """(T, F) features of a second of silence."""
        return self._extract(np.zeros(self.processor.feature_extractor.sampling_rate, np.float32))

    def _extract(self, samples: Any) -> Tensor:
        extractor = self.processor.feature_extractor
        found = extractor([samples], sampling_rate=extractor.sampling_rate, return_attention_mask=True)
        features: Tensor = found["input_features"][0][found["attention_mask"][0].bool()]
        return features

    def _labels(self, row: Mapping[str, Any]) -> list[int]:
        """Token ids of a row."""
        if "labels" in row:
            return [int(label) for label in row["labels"] if label >= 0]
        tokenizer = self.processor.tokenizer
        ids: list[int] = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id in ids and count_up(self.counts.unknown) == 1:
            logger.warning(
                f"A transcript has characters that the vocabulary lacks, and is trained on with {tokenizer.unk_token}: "
                f"{row['text']!r}. Change the transcripts (lower case? digits?) or extend the vocabulary. Others are "
                "not named, but counted in the log as `transcripts_with_unknown_characters`."
            )
        return ids

    def _check_fit(self, kept: Sequence[tuple[Mapping[str, Any], Tensor]], labels: Sequence[list[int]]) -> None:
        """Count and name the transcripts that are too long for CTC."""
        if not (self.processor._decoder_type == "ctc" if self.ctc is None else self.ctc):
            return
        for position, ((row, features), ids) in enumerate(zip(kept, labels, strict=True)):
            # a repeated token needs a blank between
            needed = len(ids) + sum(a == b for a, b in pairwise(ids))
            frames = -(-len(features) // SUBSAMPLING_FACTOR)
            if needed > frames:
                logger.warning(
                    f"{clip_name(row, position)}: the transcript needs {needed} frames and the clip has {frames}: a "
                    f"CTC loss counts it as zero ({count_up(self.counts.unfit)} so far). With a larger vocabulary "
                    "transcripts are shorter."
                )


class DurationBatchSampler:
    """Batches of clips of similar duration, as many as fit into so many seconds, padding included.

    Every epoch shuffles clips of one `BUCKET_S` and the batches. The number of batches does not change, and a clip
    longer than the limit has a batch of its own. Each process takes every n-th batch; the first ones come again when
    they do not divide evenly.

    Args:
        durations: seconds of each clip.
        batch_duration_s: most seconds in a batch, clips times the longest.
        seed: of the order.
        process_index: of this process.
        num_processes: that train together.
    """

    def __init__(
        self,
        durations: Sequence[float],
        batch_duration_s: float,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        # rounded up, so that shuffling inside a step keeps the limit
        self.steps = np.ceil(np.asarray(durations, dtype=np.float64) / BUCKET_S).clip(min=1)
        self.seed, self.epoch = seed, 0
        self.process_index, self.num_processes = process_index, num_processes
        self.sizes = list(self._sizes(np.sort(self.steps) * BUCKET_S, batch_duration_s))

    @staticmethod
    def _sizes(sorted_durations: Any, limit: float) -> Iterator[int]:
        """Clips of each batch."""
        size = 0
        for duration in sorted_durations:
            if size and (size + 1) * duration > limit:
                yield size
                size = 0
            size += 1
        if size:
            yield size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; `Trainer` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.sizes) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        shuffled = rng.permutation(len(self.steps))
        order = shuffled[np.argsort(self.steps[shuffled], kind="stable")]
        batches = np.split(order, np.cumsum(self.sizes)[:-1])
        turn = rng.permutation(len(batches))
        # filled up so that every process has as many
        turn = np.resize(turn, len(self) * self.num_processes)
        for index in turn[self.process_index :: self.num_processes]:
            yield batches[index].tolist()


def freeze(model: Any, names: Sequence[str]) -> int:
    """Keep parts of a model as they are.

    `ParakeetTrainer` also keeps the running statistics of batch norms whose weights are frozen.

    Args:
        model: a Parakeet model.
        names: modules, such as `encoder`, `encoder.subsampling` or `encoder.layers.0`.

    Returns:
        Number of frozen parameters.

    Raises:
        ValueError: no such module.
    """
    frozen = 0
    for name in names:
        found = [p for key, p in model.named_parameters() if key == name or key.startswith(f"{name}.")]
        if not found:
            parts = ", ".join(key for key, _ in model.named_children())
            raise ValueError(f"`freeze` takes names of modules, and there is no {name!r}: the model has {parts}")
        for parameter in found:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


def keep_frozen_statistics(model: Any) -> None:
    """Put the batch norms whose weights are frozen into evaluation mode, so that data does not move them."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()


def add_lora(model: Any, rank: int, alpha: int | None = None, targets: Sequence[str] = ATTENTION_PROJECTIONS) -> Any:
    """Freeze a model and add low-rank adapters (arXiv 2106.09685) to its attention projections.

    Args:
        model: a Parakeet model.
        rank: of the adapters.
        alpha: their scale times `rank`; default twice the rank.
        targets: names of the linear layers.

    Returns:
        A `PeftModel`; `merge_and_unload()` gives a plain model back.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs the package peft: pip install peft") from error
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(targets)))


def generated_tokens(output: Any, config: Any) -> Tensor:
    """Turn what `generate` returns into (B, L) token ids without blanks and repeats, filled up with -100."""
    blank = getattr(config, "blank_token_id", config.pad_token_id)
    sequences = output if isinstance(output, Tensor) else output.sequences
    keep = sequences != blank
    if getattr(output, "durations", None) is None:
        # a CTC head has a token per frame and no durations
        keep[:, 1:] &= sequences[:, 1:] != sequences[:, :-1]
    else:
        keep &= sequences != config.pad_token_id
    tokens, lengths = compact_labels(sequences, keep)
    tokens = tokens[:, : max(1, int(lengths.max()))]
    return tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None], IGNORED)


def adapted_arguments(arguments: Any) -> Any:
    """Set what rows of audio and text need in `TrainingArguments`, in place.

    Raises:
        ValueError: they ask for label smoothing.
    """
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` must be 0, got {arguments.label_smoothing_factor}: the losses sum over "
            "alignments and have no single correct label per frame; leave it out"
        )
    # the collator reads columns that the model does not take
    arguments.remove_unused_columns = False
    if arguments.accelerator_config.dispatch_batches is None:
        # one process cannot make the batches of all from a stream: their lengths differ
        arguments.accelerator_config.dispatch_batches = False
    return arguments


class ParakeetTrainer(Trainer):
    """`transformers.Trainer` whose evaluation decodes with `generate`, so that metrics see token ids.

    Args:
        model: a Parakeet model, or a `PeftModel` of one.
        args: `TrainingArguments`; `remove_unused_columns` is switched off, because the collator reads other columns
            than the model.
        data_collator: makes batches; default a `SpeechCollator` of the processor.
        *others: further arguments of `Trainer` by position.
        processing_class: the processor; gives the default collator and the default metrics, `wer` and `cer`.
        batch_duration_s: seconds per batch and process, in place of a number of clips.
        generate_kwargs: of `generate` in evaluation, such as `{"decoder": "ctc"}` for a hybrid.
        **kwargs: of `Trainer`.

    Raises:
        ValueError: `args` asks for label smoothing.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *others: Any,
        processing_class: Any = None,
        batch_duration_s: float | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.data_collator: Any
        self.batch_duration_s = batch_duration_s
        self.generate_kwargs = dict(generate_kwargs or {})
        self.guard = NonFiniteGuard()
        if processing_class is not None and data_collator is None:
            data_collator = SpeechCollator(processing_class)
        if processing_class is not None and kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = ErrorRates(processing_class)
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), self.guard]
        args = adapted_arguments(TrainingArguments("tmp_trainer") if args is None else args)
        super().__init__(model, args, data_collator, *others, processing_class=processing_class, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the training batches; by duration where that was asked for."""
        if self.batch_duration_s is None:
            return super().get_train_dataloader()
        from accelerate.data_loader import prepare_data_loader

        args = self.args
        sampler = DurationBatchSampler(
            clip_durations(self.train_dataset),
            self.batch_duration_s,
            seed=args.seed if args.data_seed is None else args.data_seed,
            process_index=args.process_index,
            num_processes=args.world_size,
        )
        loader: Any = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # one process, because the sampler has dealt the batches out already
        return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the evaluation batches, without dither and with all rows."""
        with self._for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the test batches, without dither and with all rows."""
        with self._for_evaluation():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _for_evaluation(self) -> Iterator[None]:
        collator = self.data_collator
        if isinstance(collator, SpeechCollator):
            self.data_collator = replace(collator, dither=0.0, keep_size=True)
        try:
            yield
        finally:
            self.data_collator = collator

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch; frozen batch norms keep their statistics."""
        keep_frozen_statistics(model)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss, the generated token ids and the labels of a batch, ids filled up with -100."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = None if labels is None else self.compute_loss(model, inputs).detach().mean()
            if prediction_loss_only:
                return loss, None, None
            with whole_weights(model):
                plain = self.accelerator.unwrap_model(model)
                output = plain.generate(
                    input_features=inputs["input_features"],
                    attention_mask=inputs.get("attention_mask"),
                    **self.generate_kwargs,
                )
        return loss, generated_tokens(output, plain.config), labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the numbers of skipped clips and updates."""
        counts = self.data_collator.counts.as_dict() if isinstance(self.data_collator, SpeechCollator) else {}
        if self.guard.skipped:
            counts["skipped_updates"] = self.guard.skipped
        super().log({**logs, **counts}, *args, **kwargs)


@contextlib.contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Gather the weights of a model that FSDP has sharded, for code that does not go through its `forward`."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


__all__ = [
    "DurationBatchSampler",
    "ErrorRates",
    "NonFiniteGuard",
    "ParakeetTrainer",
    "SpeechCollator",
    "add_lora",
    "error_rates",
    "freeze",
    "normalize_text",
]
