"""Train and evaluate Parakeet models with transformers' `Trainer`.

Batches are chosen in `batching.py` and built in `collator.py`; error rates are computed in `metrics.py`.
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

from ..configuration_parakeet import get_blank_id
from ..losses import compact_labels
from .adapters import freeze_batch_norm_statistics
from .batching import DurationBatchSampler
from .clips import get_durations
from .collator import IGNORED_LABEL, SpeechCollator
from .metrics import ErrorRates
from .update_guard import NonFiniteGuard


class ParakeetTrainer(Trainer):
    """`transformers.Trainer` that decodes with `generate` in evaluation, so that metrics get token ids.

    Args:
        model: a Parakeet model, or a `PeftModel` of one.
        args: the `TrainingArguments`. `remove_unused_columns` is set to False, because the collator reads columns that
            the model does not take.
        data_collator: function that builds batches from rows; None for a `SpeechCollator` of the processor.
        *trainer_args: further positional arguments of `Trainer`.
        processing_class: the processor. It gives the default collator and the default metrics, `wer` and `cer`.
        batch_duration_s: most seconds of a training batch per process, padding included. None means that
            `per_device_train_batch_size` counts clips.
        generate_kwargs: arguments of `generate` in evaluation, such as `{"decoder": "ctc"}` for the CTC head of a
            hybrid model.
        **kwargs: further arguments of `Trainer`.

    Raises:
        ValueError: `args` asks for label smoothing.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *trainer_args: Any,
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
        args = prepare_arguments(TrainingArguments("tmp_trainer") if args is None else args)
        super().__init__(model, args, data_collator, *trainer_args, processing_class=processing_class, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the loader of training batches, which are limited by duration if `batch_duration_s` is set.

        Raises:
            ValueError: batches are limited by duration, and the dataset does not state the durations.
        """
        if self.batch_duration_s is None:
            return super().get_train_dataloader()
        from accelerate.data_loader import prepare_data_loader

        args = self.args
        sampler = DurationBatchSampler(
            get_durations(self.train_dataset),
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
        # accelerate must not divide the batches among the processes again: the sampler has already done it
        return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of evaluation batches, without dither and with every row.

        Args:
            eval_dataset: the dataset; None for that of the trainer.
        """
        with self._evaluation_collator():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader of test batches, without dither and with every row.

        Args:
            test_dataset: the dataset.
        """
        with self._evaluation_collator():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _evaluation_collator(self) -> Iterator[None]:
        """Replace `self.data_collator` temporarily by one that adds no dither and never drops a row."""
        training_collator = self.data_collator
        if isinstance(training_collator, SpeechCollator):
            self.data_collator = replace(training_collator, dither=0.0, keep_size=True)
        try:
            yield
        finally:
            self.data_collator = training_collator

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch without updating the statistics of frozen batch norms.

        Args:
            model: the model, wrapped for distributed training if there are several processes.
            inputs: the batch.
            *args: further arguments of `Trainer.compute_loss`.
            **kwargs: further arguments of `Trainer.compute_loss`.

        Returns:
            The scalar loss; with `return_outputs=True` a pair of loss and model outputs.
        """
        # `Trainer` calls `model.train()` before every batch
        freeze_batch_norm_statistics(model)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the loss of an evaluation batch and decode it.

        Args:
            model: the model, wrapped for distributed training if there are several processes.
            inputs: the batch.
            prediction_loss_only: whether to skip decoding.
            ignore_keys: model outputs to leave out of the predictions; not used, because predictions are token ids.

        Returns:
            The loss (None without labels), the generated token ids (B, L) and the labels (B, U), both padded with -100;
            the latter two are None if decoding is skipped.
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
                    **self.generate_kwargs,
                )
        return loss, extract_tokens(output, unwrapped_model.config), labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log values, and add the counts of data problems and of skipped updates that are not 0.

        The collator counts clips that could not be read and unsuitable transcripts; the guard counts updates that it
        skipped because their gradients were not finite.

        Args:
            logs: values by name, such as the loss.
            *args: further arguments of `Trainer.log`.
            **kwargs: further arguments of `Trainer.log`.
        """
        counts = self.data_collator.counts.as_dict() if isinstance(self.data_collator, SpeechCollator) else {}
        if self.guard.skipped:
            counts["skipped_updates"] = self.guard.skipped
        super().log({**logs, **counts}, *args, **kwargs)


def prepare_arguments(arguments: Any) -> Any:
    """Set the options that rows of audio and text need.

    Args:
        arguments: the `TrainingArguments`; changed in place.

    Returns:
        The same object.

    Raises:
        ValueError: the arguments ask for label smoothing.
    """
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` must be 0, got {arguments.label_smoothing_factor}: the losses sum over "
            "alignments, so no frame has a single correct label to smooth; omit it"
        )
    # the collator reads columns that the model does not take
    arguments.remove_unused_columns = False
    if arguments.accelerator_config.dispatch_batches is None:
        # with dispatching, one process concatenates the batches of all processes, whose lengths differ
        arguments.accelerator_config.dispatch_batches = False
    return arguments


def extract_tokens(output: Any, config: Any) -> Tensor:
    """Extract the recognised tokens from the output of `generate`.

    Args:
        output: (B, L) sequences, or an output object with `sequences`. With `durations`, it has one entry per decoding
            step of a transducer; without, one entry per frame of a CTC head.
        config: configuration of the model.

    Returns:
        (B, U) token ids without blanks and CTC repetitions, padded with -100; U is at least 1.
    """
    sequences = output if isinstance(output, Tensor) else output.sequences
    is_token = sequences != get_blank_id(config)
    if getattr(output, "durations", None) is None:
        is_token[:, 1:] &= sequences[:, 1:] != sequences[:, :-1]
    else:
        is_token &= sequences != config.pad_token_id
    tokens, token_lengths = compact_labels(sequences, is_token)
    tokens = tokens[:, : max(1, int(token_lengths.max()))]
    is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= token_lengths[:, None]
    return tokens.masked_fill(is_padding, IGNORED_LABEL)


@contextlib.contextmanager
def gather_weights(model: Any) -> Iterator[None]:
    """Gather the weights of a model that FSDP has sharded, for calls that bypass its `forward`, such as `generate`.

    Args:
        model: any module. Nothing happens if it is not sharded.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    # FSDP version 1 wraps the model; version 2 changes the class of its modules
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
