"""Train and evaluate Parakeet models with transformers' `Trainer`.

Clips are grouped into batches in `batching.py` and padded in `collator.py`. Error rates are computed in `metrics.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..decoding import Hypotheses
from .adapters import freeze_batch_norm_statistics
from .batching import DurationBatchSampler
from .clips import get_durations
from .collator import IGNORED_LABEL, SpeechCollator
from .metrics import ErrorRates
from .update_guard import NonFiniteGuard


class ParakeetTrainer(Trainer):
    """`transformers.Trainer` that decodes evaluation batches with `generate`; metrics receive token ids, not logits.

    Args:
        model: a Parakeet model, or a `PeftModel` around a Parakeet model.
        args: the `TrainingArguments`; None for the defaults of `Trainer`. `remove_unused_columns` is set to False,
            because the collator reads dataset columns that are not arguments of the model.
        data_collator: function that builds a batch from dataset rows; None for a `SpeechCollator` with the processor.
        *trainer_args: further positional arguments of `Trainer`.
        processing_class: the `ParakeetProcessor`, used by the default collator and the default metrics (`wer`, `cer`).
        batch_duration_s: maximum duration of a training batch per process in seconds, padding included. None means
            that every batch has `per_device_train_batch_size` clips.
        batch_sampler: sampler of the training batches of this process: an iterable of lists of indices, with a length.
            None for batches by `batch_duration_s` or by `per_device_train_batch_size`.
        generate_kwargs: arguments of `generate` in evaluation, such as `{"decoder": "ctc"}` for the CTC head of a
            hybrid model.
        **kwargs: further keyword arguments of `Trainer`.

    Raises:
        ValueError: label smoothing is enabled in `args`, or both `batch_duration_s` and `batch_sampler` are set.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *trainer_args: Any,
        processing_class: Any = None,
        batch_duration_s: float | None = None,
        batch_sampler: Any = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.data_collator: Any
        if batch_duration_s is not None and batch_sampler is not None:
            raise ValueError(
                "one of `batch_duration_s` and `batch_sampler` must be None, got both: leave out one of them"
            )
        self.batch_duration_s, self.batch_sampler = batch_duration_s, batch_sampler
        self.generate_kwargs = dict(generate_kwargs or {})
        self.guard = NonFiniteGuard()
        if processing_class is not None and data_collator is None:
            data_collator = SpeechCollator(processing_class)
        if processing_class is not None and kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = ErrorRates(processing_class)
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), self.guard]
        args = prepare_arguments(TrainingArguments("tmp_trainer") if args is None else args)
        super().__init__(model, args, data_collator, *trainer_args, processing_class=processing_class, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Create the data loader for training, with the batches of the sampler or of `batch_duration_s`, if it is set.

        Raises:
            ValueError: `batch_duration_s` is set, and the dataset has no durations.
        """
        args, sampler = self.args, self.batch_sampler
        if self.batch_duration_s is not None:
            sampler = DurationBatchSampler(
                get_durations(self.train_dataset),
                self.batch_duration_s,
                seed=args.seed if args.data_seed is None else args.data_seed,
                process_index=args.process_index,
                num_processes=args.world_size,
            )
        if sampler is None:
            return super().get_train_dataloader()
        from accelerate.data_loader import prepare_data_loader

        loader: Any = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # the sampler already yields only the batches of this process, so accelerate is told that there is one process
        return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Create the data loader for evaluation, with a collator that adds no dither and never drops a row.

        Args:
            eval_dataset: dataset to evaluate on; None for the evaluation dataset of the trainer.
        """
        with self._evaluation_collator():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Create the data loader for testing, with a collator that adds no dither and never drops a row.

        Args:
            test_dataset: dataset to test on.
        """
        with self._evaluation_collator():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _evaluation_collator(self) -> Iterator[None]:
        """Temporarily replace `self.data_collator` with a collator that adds no dither and never drops a row."""
        training_collator = self.data_collator
        if isinstance(training_collator, SpeechCollator):
            self.data_collator = replace(training_collator, dither=0.0, keep_size=True)
        try:
            yield
        finally:
            self.data_collator = training_collator

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch without updating the running statistics of frozen batch-norm layers.

        Args:
            model: the model, in distributed training wrapped by DDP or FSDP.
            inputs: batch built by the collator.
            *args: further arguments of `Trainer.compute_loss`.
            **kwargs: further arguments of `Trainer.compute_loss`.

        Returns:
            The scalar loss; with `return_outputs=True` a tuple (loss, model outputs).
        """
        # repeated for every batch, because `Trainer` calls `model.train()` before every batch
        freeze_batch_norm_statistics(model)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the loss of an evaluation batch and decode the batch.

        Args:
            model: the model, in distributed training wrapped by DDP or FSDP.
            inputs: batch built by the collator.
            prediction_loss_only: whether to skip decoding.
            ignore_keys: unused; in `Trainer`, names of model outputs to exclude from the predictions.

        Returns:
            A tuple (loss, token ids, labels). The loss is None if the batch has no labels. The generated token ids
            (B, L) and the labels (B, U) are padded with -100; both are None if decoding is skipped.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = None if labels is None else self.compute_loss(model, inputs).detach().mean()
            if prediction_loss_only:
                return loss, None, None
            with gather_weights(model):
                unwrapped_model = self.accelerator.unwrap_model(model)
                output = unwrapped_model.generate(
                    input_features=inputs["input_features"],
                    attention_mask=inputs.get("attention_mask"),
                    **{**self.generate_kwargs, "return_dict_in_generate": True},
                )
        return loss, extract_tokens(output.hypotheses), labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log values, together with the nonzero counts of data problems and of skipped updates.

        The collator counts clips that could not be read and transcripts that do not fit the model. The guard counts
        updates that were skipped because of non-finite gradients.

        Args:
            logs: values to log by name, such as the loss.
            *args: further arguments of `Trainer.log`.
            **kwargs: further arguments of `Trainer.log`.
        """
        counts = self.data_collator.counts.as_dict() if isinstance(self.data_collator, SpeechCollator) else {}
        if self.guard.num_skipped_updates:
            counts["skipped_updates"] = self.guard.num_skipped_updates
        super().log({**logs, **counts}, *args, **kwargs)


def prepare_arguments(arguments: Any) -> Any:
    """Set the training options that speech datasets require.

    Args:
        arguments: the `TrainingArguments`; changed in place.

    Returns:
        `arguments`.

    Raises:
        ValueError: label smoothing is enabled.
    """
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` must be 0, got {arguments.label_smoothing_factor}: omit it, because the losses "
            "sum over alignments, so no frame has a single correct label to smooth"
        )
    # the collator reads dataset columns that are not arguments of the model, such as `audio`
    arguments.remove_unused_columns = False
    if arguments.accelerator_config.dispatch_batches is None:
        # dispatching would concatenate the batches of all processes, which have different padded lengths
        arguments.accelerator_config.dispatch_batches = False
    return arguments


def extract_tokens(hypotheses: Hypotheses) -> Tensor:
    """Extract the recognised token ids of a batch in the form of padded labels.

    Args:
        hypotheses: hypotheses of a batch, as `generate` returns them in the field `hypotheses`.

    Returns:
        (B, U) token ids padded with -100; U is at least 1.
    """
    tokens = hypotheses.tokens[:, : max(1, int(hypotheses.lengths.max()))]
    is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= hypotheses.lengths[:, None]
    return tokens.masked_fill(is_padding, IGNORED_LABEL)


@contextlib.contextmanager
def gather_weights(model: Any) -> Iterator[None]:
    """Gather the weights of a model sharded by FSDP while the context is active.

    FSDP itself gathers the weights only for calls of the model's `forward`; `generate` bypasses `forward`.

    Args:
        model: any module; a module that is not sharded is left unchanged.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    # FSDP version 1 wraps the model in one module; version 2 makes each sharded module an `FSDPModule`
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
        return
    sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded_modules:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded_modules:
            module.reshard()


__all__ = ["ParakeetTrainer"]
