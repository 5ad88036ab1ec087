"""The commands `parakeet finetune` and `parakeet evaluate`: from names of models and data to a folder and to scores.

Every setting of the training itself is one of transformers' own `TrainingArguments`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..configuration_parakeet import kind_of
from ..modeling_parakeet import ParakeetForCTC
from ..nemo import load_nemo
from .data import add_durations, load_speech, read_clip
from .metrics import error_rates
from .trainer import ParakeetTrainer, SpeechCollator, add_lora, freeze
from .vocabulary import extend_vocabulary, replace_tokenizer

logger = logging.get_logger(__name__)


def option(default: Any, text: str) -> Any:
    """Describe a field that is an option of the command line."""
    return field(default=default, metadata={"help": text})


@dataclass
class FinetuneArguments:
    """What to train on what; the rest are `TrainingArguments`."""

    model: str = field(metadata={"help": "Hub id, folder, or .nemo file"})
    train_data: str = field(metadata={"help": "NeMo manifest (.json, .jsonl), folder, or name of a Hub dataset"})
    eval_data: str | None = option(None, "as train_data; default: the eval_split of train_data, if one is named")
    data_name: str | None = option(None, "configuration of a Hub dataset")
    train_split: str | None = option(None, "split to train on, where the data has splits; default: train")
    eval_split: str | None = option(None, "split to evaluate on; of eval_data with splits the default is validation")
    audio_column: str | None = option(None, "column of the audio")
    text_column: str | None = option(None, "column of the transcripts")
    streaming: bool = option(False, "read while training; needs --max_steps")
    shuffle_buffer: int = option(1000, "clips of a stream that are shuffled together; 0 keeps its order")
    skip_broken: bool = option(False, "skip clips that cannot be read, and count them")
    batch_duration_s: float | None = option(None, "seconds per batch and process, not per_device_train_batch_size")
    tokenizer: str | None = option(None, "SentencePiece model whose vocabulary replaces the model's own")
    new_tokens: list[str] = field(default_factory=list, metadata={"help": "tokens to add to the vocabulary: ä ö ü ß"})
    freeze: str | None = option(None, "modules to keep, with commas between: encoder,decoder or encoder.layers.0")
    lora_rank: int = option(0, "train adapters of this rank on the attention projections only")
    spec_augment: str | None = option(None, "JSON of freq_masks, freq_width, time_masks, time_width; or none")
    decoder: str | None = option(None, "ctc: evaluate a hybrid by its CTC head")
    early_stopping_patience: int | None = option(None, "evaluations without a better word error rate before the end")


def prepare_model(options: FinetuneArguments) -> tuple[Any, Any]:
    """Load the model and set what of it is trained, and how."""
    model, processor = load_nemo(options.model, dtype=torch.float32)
    if options.tokenizer is not None:
        replace_tokenizer(model, processor, options.tokenizer)
    if options.new_tokens:
        extend_vocabulary(model, processor, options.new_tokens)
    if options.spec_augment is not None:
        model.config.spec_augment = None if options.spec_augment == "none" else json.loads(options.spec_augment)
    check_decoder(model.config, options.decoder)
    frozen = freeze(model, options.freeze.split(",") if options.freeze else ())
    if options.lora_rank:
        model = add_lora(model, options.lora_rank)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.warning(f"{trained:,} parameters are trained, {frozen:,} were frozen by name.")
    return model, processor


def check_decoder(config: Any, decoder: str | None) -> None:
    """Refuse a head that a model does not have, before any data is read.

    Args:
        config: of the model.
        decoder: the head that was asked for, or None.

    Raises:
        ValueError: the model has no such head.
    """
    heads = ["ctc"] if kind_of(config) == "ctc" else ["transducer", *(["ctc"] if config.ctc_head else [])]
    if decoder is not None and decoder not in heads:
        raise ValueError(f"`decoder` must be a head of the model, {' or '.join(heads)}, got {decoder!r}: correct it")


def load_data(options: FinetuneArguments, seed: int) -> tuple[Any, Any]:
    """Open the training data, and the evaluation data or None; `seed` gives the order of a stream."""
    columns: dict[str, Any] = {"audio_column": options.audio_column, "text_column": options.text_column}
    train = load_speech(options.train_data, options.train_split, options.data_name, options.streaming, **columns)
    if options.batch_duration_s is not None and not options.streaming:
        train = add_durations(train)
    if options.shuffle_buffer and not hasattr(train, "__len__"):
        # `Trainer` shuffles data that has a length
        train = train.shuffle(seed=seed, buffer_size=options.shuffle_buffer)
    if options.eval_data is None and options.eval_split is None:
        return train, None
    source = options.eval_data or options.train_data
    evaluation = load_speech(
        source, options.eval_split, options.data_name, options.streaming, **columns, default_split="validation"
    )
    return train, evaluation


def finetune(options: FinetuneArguments, arguments: Any) -> dict[str, float]:
    """Train, evaluate, and save a folder that `pipeline` loads.

    Args:
        options: model and data.
        arguments: `TrainingArguments`; with `resume_from_checkpoint="last"`, the newest checkpoint in `output_dir`.

    Returns:
        The last evaluation, or the summary of the training where there is no evaluation data.
    """
    set_seed(arguments.seed)
    model, processor = prepare_model(options)
    train, evaluation = load_data(options, arguments.seed if arguments.data_seed is None else arguments.data_seed)
    callbacks = []
    if options.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
    if arguments.load_best_model_at_end or callbacks:
        # of word error rates the smallest is the best
        arguments.metric_for_best_model, arguments.greater_is_better = "wer", False
    base = model.get_base_model() if options.lora_rank else model
    trainer = ParakeetTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=SpeechCollator(
            processor,
            seed=arguments.seed,
            skip_broken=options.skip_broken,
            ctc=isinstance(base, ParakeetForCTC) or base.config.ctc_head,
        ),
        batch_duration_s=options.batch_duration_s,
        generate_kwargs={"decoder": options.decoder} if options.decoder else None,
        callbacks=callbacks,
    )
    resume = arguments.resume_from_checkpoint
    if resume in ("last", "True", "true"):
        resume = get_last_checkpoint(arguments.output_dir)
    metrics = dict(trainer.train(resume_from_checkpoint=resume).metrics)
    if evaluation is not None:
        metrics = trainer.evaluate()
    save(trainer, processor, arguments, merge=bool(options.lora_rank))
    return metrics


def save(trainer: Any, processor: Any, arguments: Any, merge: bool) -> None:
    """Write model and processor to `output_dir`, adapters merged and also on their own in `adapter`."""
    folder = Path(arguments.output_dir)
    if merge:
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            adapted.save_pretrained(folder / "adapter")
        # `push_to_hub` saves the trainer's model once more
        trainer.model = trainer.model_wrapped = adapted.merge_and_unload()
    # an internal call does not push: the processor is still missing
    trainer.save_model(str(folder), _internal_call=True)
    if trainer.is_world_process_zero():
        processor.save_pretrained(folder)
    if arguments.push_to_hub:
        trainer.push_to_hub()


def evaluate(pipe: Any, dataset: Any, batch_size: int = 8, decoder: str | None = None) -> dict[str, Any]:
    """Recognise every clip of a dataset and score the texts.

    Args:
        pipe: a speech recognition pipeline.
        dataset: rows with `audio` and `text`, see `load_speech`.
        batch_size: clips recognised together.
        decoder: `"ctc"` for the second head of a hybrid.

    Returns:
        `wer`, `cer`, and `clips`: a dict of `reference` and `hypothesis` each.
    """
    check_decoder(pipe.model.config, decoder)
    rate, references = pipe.feature_extractor.sampling_rate, []

    def clips() -> Iterator[Any]:
        for row in dataset:
            references.append(row["text"])
            yield {"raw": read_clip(row, rate), "sampling_rate": rate}

    options = {"generate_kwargs": {"decoder": decoder}} if decoder else {}
    hypotheses = [result["text"] for result in pipe(clips(), batch_size=batch_size, **options)]
    pairs = [{"reference": said, "hypothesis": heard} for said, heard in zip(references, hypotheses, strict=True)]
    return {**error_rates(references, hypotheses), "clips": pairs}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read options of the command line, or one JSON or YAML file of them, and train."""
    parser = HfArgumentParser((FinetuneArguments, TrainingArguments), prog="parakeet finetune")
    given = None if arguments is None else list(arguments)
    if given and len(given) == 1 and given[0].endswith((".json", ".yaml", ".yml")):
        read = parser.parse_json_file if given[0].endswith(".json") else parser.parse_yaml_file
        options, training = read(given[0])
    else:
        options, training = parser.parse_args_into_dataclasses(given)
    finetune(options, training)


__all__ = ["FinetuneArguments", "evaluate", "finetune", "main"]
