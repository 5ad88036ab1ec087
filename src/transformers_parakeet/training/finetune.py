"""Fine-tune a model from the command line, for `parakeet finetune`: parse options, load, train, evaluate and save.

The options of the training loop are transformers' `TrainingArguments`; the loop is in `trainer.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..generation_arguments import check_decoder
from ..modeling_parakeet import ParakeetForCTC
from ..nemo import load_nemo, resolve_model_name
from ..optional_packages import import_optional
from .adapters import add_lora, freeze
from .clips import add_durations
from .collator import SpeechCollator
from .data import load_speech
from .progress import ProgressReporter
from .trainer import ParakeetTrainer
from .vocabulary import extend_vocabulary, replace_tokenizer

logger = logging.get_logger(__name__)

# number of updates between two reports of the loss, unless `--logging_steps` is given
DEFAULT_LOGGING_STEPS = 10

# replaces the list of all options, more than 150 lines, which argparse prints before an error message
USAGE = """parakeet finetune --model MODEL --train_data DATA [--eval_data DATA] [--output_dir FOLDER] [options]
       parakeet finetune OPTIONS.yaml
       parakeet finetune --help lists all options"""


def create_option(default: Any, help_text: str) -> Any:
    """Create a dataclass field that `HfArgumentParser` turns into a command-line option.

    Args:
        default: default value of the option.
        help_text: description of the option in the output of `--help`.
    """
    return field(default=default, metadata={"help": help_text})


@dataclass
class FinetuneArguments:
    """Options of `parakeet finetune` for the model, the data and the trained parameters.

    The options of the training loop are `TrainingArguments`.
    """

    model: str = field(metadata={"help": "Hub id, folder or .nemo file of the model; demo: the bundled digits"})
    train_data: str = field(metadata={"help": "training data: NeMo manifest (.json, .jsonl), folder, or Hub dataset"})
    eval_data: str | None = create_option(
        None, "evaluation data, in the forms of train_data; default: train_data if eval_split is set, otherwise none"
    )
    data_name: str | None = create_option(None, "configuration of the Hub dataset")
    train_split: str | None = create_option(None, "split of train_data; default: train")
    eval_split: str | None = create_option(
        None, "split of the evaluation data; default: validation, if the data has splits"
    )
    audio_column: str | None = create_option(None, "column of the audio; default: detected by its name")
    text_column: str | None = create_option(None, "column of the transcripts; default: detected by its name")
    streaming: bool = create_option(False, "read the data during training instead of downloading it; needs max_steps")
    shuffle_buffer: int = create_option(
        1000, "size of the shuffle buffer for streamed data, in clips; 0: do not shuffle"
    )
    skip_broken: bool = create_option(
        False, "skip and count clips that cannot be read, instead of stopping with an error"
    )
    batch_duration_s: float | None = create_option(
        None, "maximum seconds of audio per batch and process; replaces per_device_train_batch_size"
    )
    tokenizer: str | None = create_option(None, "SentencePiece model that replaces the vocabulary of the model")
    new_tokens: list[str] = field(
        default_factory=list, metadata={"help": "tokens to add to the vocabulary, separated by spaces: ä ö ü ß"}
    )
    freeze: str | None = create_option(
        None, "modules to exclude from training, separated by commas: encoder,decoder or encoder.layers.0"
    )
    lora_rank: int = create_option(
        0, "train only LoRA adapters of this rank on the attention projections; 0: no adapters"
    )
    spec_augment: str | None = create_option(
        None, "SpecAugment as JSON with freq_masks, freq_width, time_masks, time_width; none: no SpecAugment"
    )
    decoder: str | None = create_option(None, "ctc: evaluate a hybrid model with its CTC head")
    early_stopping_patience: int | None = create_option(
        None, "stop after this number of evaluations without a lower word error rate"
    )


def prepare_model(options: FinetuneArguments) -> tuple[Any, Any]:
    """Load the model and the processor, and apply the options that modify the model.

    These options replace or extend the vocabulary, set SpecAugment, freeze modules and add LoRA adapters.

    Args:
        options: options of `parakeet finetune`.

    Returns:
        The model (a `PeftModel` if `lora_rank` is set) and the processor.

    Raises:
        ValueError: an option is not valid for the model.
    """
    model, processor = load_nemo(resolve_model_name(options.model), dtype=torch.float32)
    if options.tokenizer is not None:
        replace_tokenizer(model, processor, options.tokenizer)
    if options.new_tokens:
        extend_vocabulary(model, processor, options.new_tokens)
    if options.spec_augment is not None:
        model.config.spec_augment = parse_spec_augment(options.spec_augment)
    check_decoder(model.config, options.decoder)
    num_frozen = freeze(model, options.freeze.split(",") if options.freeze else ())
    if options.lora_rank:
        model = add_lora(model, options.lora_rank)
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.warning(f"{num_trainable:,} parameters are trainable; `freeze` excluded {num_frozen:,} parameters.")
    return model, processor


def parse_spec_augment(text: str) -> Any:
    """Parse the value of the option `spec_augment`.

    Args:
        text: a JSON object, or the word `none`.

    Returns:
        The SpecAugment settings; None (no SpecAugment) for the word `none`.

    Raises:
        ValueError: the value is not valid JSON and not `none`.
    """
    if text == "none":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`spec_augment` must be a JSON object or none, got {text!r} ({error}): correct it") from error


def load_data(options: FinetuneArguments, seed: int) -> tuple[Any, Any]:
    """Open the training dataset and the evaluation dataset.

    Args:
        options: options of `parakeet finetune`.
        seed: random seed for shuffling streamed data.

    Returns:
        The training dataset, and the evaluation dataset (None without evaluation data).

    Raises:
        ValueError: the data has no such split or column.
    """
    columns: dict[str, Any] = {"audio_column": options.audio_column, "text_column": options.text_column}
    train_dataset = load_speech(
        options.train_data, options.train_split, options.data_name, options.streaming, **columns
    )
    if options.batch_duration_s is not None and not options.streaming:
        train_dataset = add_durations(train_dataset)
    # streamed data is shuffled here, because `Trainer` shuffles only datasets that have a length
    if options.shuffle_buffer and not hasattr(train_dataset, "__len__"):
        train_dataset = train_dataset.shuffle(seed=seed, buffer_size=options.shuffle_buffer)
    if options.eval_data is None and options.eval_split is None:
        return train_dataset, None
    eval_dataset = load_speech(
        options.eval_data or options.train_data,
        options.eval_split,
        options.data_name,
        options.streaming,
        **columns,
        default_split="validation",
    )
    return train_dataset, eval_dataset


def create_trainer(options: FinetuneArguments, arguments: Any) -> ParakeetTrainer:
    """Load the model and the data, and create the trainer.

    Args:
        options: options of `parakeet finetune` for the model and the data.
        arguments: the `TrainingArguments`, changed in place. With early stopping or `load_best_model_at_end`, the word
            error rate becomes the criterion for the best model.

    Returns:
        The trainer.

    Raises:
        ValueError: an option is not valid for the model or the data.
    """
    model, processor = prepare_model(options)
    data_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    train_dataset, eval_dataset = load_data(options, data_seed)
    callbacks = []
    if options.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
    if arguments.load_best_model_at_end or callbacks:
        arguments.metric_for_best_model, arguments.greater_is_better = "wer", False
    base_model = model.get_base_model() if options.lora_rank else model
    has_ctc_loss = isinstance(base_model, ParakeetForCTC) or base_model.config.ctc_head
    collator = SpeechCollator(processor, seed=arguments.seed, skip_broken=options.skip_broken, ctc=has_ctc_loss)
    return ParakeetTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        data_collator=collator,
        batch_duration_s=options.batch_duration_s,
        generate_kwargs={"decoder": options.decoder} if options.decoder else None,
        callbacks=callbacks,
    )


def run_finetuning(
    options: FinetuneArguments, training_arguments: Any, report: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Train a model, evaluate it, and save it to `output_dir` in a form that `pipeline` can load.

    Args:
        options: options of `parakeet finetune` for the model and the data.
        training_arguments: the `TrainingArguments`. `resume_from_checkpoint="last"` resumes from the newest checkpoint
            in `output_dir`.
        report: function that is called with each line about the progress; None for the output of transformers.

    Returns:
        The metrics of the final evaluation, or the training metrics if there is no evaluation data.

    Raises:
        ValueError: an option is not valid for the model or the data.
    """
    set_seed(training_arguments.seed)
    trainer = create_trainer(options, training_arguments)
    if report is not None:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(ProgressReporter(report))
    checkpoint = training_arguments.resume_from_checkpoint
    # on the command line, `--resume_from_checkpoint True` is the text "True"
    if checkpoint in ("last", "True", "true"):
        checkpoint = get_last_checkpoint(training_arguments.output_dir)
    metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if trainer.eval_dataset is not None:
        metrics = get_final_evaluation(trainer) or trainer.evaluate()
    save_model(trainer, merge_adapters=bool(options.lora_rank))
    return metrics


def get_final_evaluation(trainer: Any) -> dict[str, float]:
    """Return the metrics of the evaluation after the last update.

    Args:
        trainer: the `ParakeetTrainer` after training.

    Returns:
        The metrics; empty if there was no such evaluation, or if the weights are now those of an earlier update.
    """
    last_entries = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
    evaluations = [entry for entry in last_entries if "eval_wer" in entry]
    return dict(evaluations[-1]) if evaluations and not trainer.args.load_best_model_at_end else {}


def save_model(trainer: Any, merge_adapters: bool) -> None:
    """Save the model and the processor to `output_dir`, and upload the folder to the Hub if `push_to_hub` is set.

    Args:
        trainer: the `ParakeetTrainer` after training.
        merge_adapters: whether to merge the adapters; requires a `PeftModel`. If True, the adapters are saved
            in the subfolder `adapter`, and the model with merged adapters is saved in `output_dir`.
    """
    arguments = trainer.args
    output_dir = Path(arguments.output_dir)
    if merge_adapters:
        adapted_model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            adapted_model.save_pretrained(output_dir / "adapter")
        # the merged model replaces the model of the trainer, because `push_to_hub` saves the model of the trainer again
        trainer.model = trainer.model_wrapped = adapted_model.merge_and_unload()
    # `_internal_call=True` prevents an upload at this point, before the processor is saved
    trainer.save_model(str(output_dir), _internal_call=True)
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(output_dir)
    if arguments.push_to_hub:
        trainer.push_to_hub()


def parse_options(command_line: Sequence[str] | None) -> tuple[FinetuneArguments, Any]:
    """Parse the options of `parakeet finetune`.

    Defaults on the command line that differ from those of transformers: `logging_steps` is 10, memory is pinned only if
    there is an accelerator, and the model is evaluated after every epoch if there is evaluation data.

    Args:
        command_line: command-line options, or a single path of a JSON or YAML file that contains the options; None to
            read the options from `sys.argv`.

    Returns:
        The options for the model and the data, and the `TrainingArguments`.
    """
    parser = HfArgumentParser((FinetuneArguments, TrainingArguments), prog="parakeet finetune", usage=USAGE)
    if command_line and len(command_line) == 1 and command_line[0].endswith((".json", ".yaml", ".yml")):
        (path,) = command_line
        parse_file = parser.parse_json_file if path.endswith(".json") else parser.parse_yaml_file
        options, training_arguments = parse_file(path)
        return options, training_arguments
    names = {argument.partition("=")[0] for argument in (sys.argv[1:] if command_line is None else command_line)}
    # without an accelerator, torch warns that it cannot pin memory
    has_accelerator = torch.accelerator.is_available()
    parser.set_defaults(logging_steps=DEFAULT_LOGGING_STEPS, dataloader_pin_memory=has_accelerator)
    if names & {"--eval_data", "--eval_split"}:
        parser.set_defaults(eval_strategy="epoch")
    options, training_arguments = parser.parse_args_into_dataclasses(command_line)
    return options, training_arguments


def finetune_main(
    arguments: Sequence[str] | None = None, report: Callable[[str], None] | None = None
) -> tuple[Path, dict[str, float]] | None:
    """Run the program `parakeet finetune`.

    Args:
        arguments: command-line options, or a single path of a JSON or YAML file that contains the options; None to
            read the options from `sys.argv`.
        report: function that is called with each line about the progress; None for the output of transformers.

    Returns:
        The written folder, and the metrics of the final evaluation or of the training. None in all processes of a
        distributed training except the first one.

    Raises:
        ImportError: the package `accelerate` is not installed.
    """
    # check for accelerate first: `TrainingArguments` needs it, and would otherwise suggest installing another package
    import_optional("accelerate", "training", "train")
    options, training_arguments = parse_options(None if arguments is None else list(arguments))
    metrics = run_finetuning(options, training_arguments, report)
    return (Path(training_arguments.output_dir), metrics) if training_arguments.process_index == 0 else None


__all__ = ["FinetuneArguments", "finetune_main", "run_finetuning"]
