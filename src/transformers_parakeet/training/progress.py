"""Reports the progress of a training run, one line of text per entry of the trainer's log.

`trainer.py` trains, and `finetune.py` adds this callback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

# log entry -> name and format in a line; entries that are not listed are reported under their own names
ENTRY_FORMATS = {
    "loss": "loss {:.4f}",
    "learning_rate": "learning rate {:.1e}",
    "eval_loss": "evaluation loss {:.4f}",
    "eval_wer": "word error rate {:.2%}",
    "eval_cer": "character error rate {:.2%}",
    "train_loss": "mean loss {:.4f}",
    "train_runtime": "trained for {:.0f} s",
    "broken_clips": "skipped clips {}",
    "transcripts_too_long": "transcripts too long for CTC {}",
}

# entries that say nothing about the quality of the model
HIDDEN_ENTRIES = {"epoch", "grad_norm", "total_flos", "num_input_tokens_seen"}
HIDDEN_SUFFIXES = ("_per_second", "_time")


class ProgressReporter(TrainerCallback):
    """Reports loss, learning rate and error rates during training, with the remaining time.

    Args:
        report: function that is called with each line.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.start_time, self.start_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the time and the step at which the training starts.

        Args:
            args: the `TrainingArguments`.
            state: the `TrainerState`; if the training is resumed, its step is not 0.
            control: the `TrainerControl`.
            **kwargs: model, data and optimizer.
        """
        self.start_time, self.start_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Report one entry of the log.

        Args:
            args: the `TrainingArguments`.
            state: the `TrainerState`.
            control: the `TrainerControl`.
            logs: names and values of the entry.
            **kwargs: model, data and optimizer.
        """
        values = format_logs(logs or {})
        if not state.is_world_process_zero or not values:
            return
        steps_done, steps_left = state.global_step - self.start_step, state.max_steps - state.global_step
        remaining = ""
        if steps_done > 0 and steps_left > 0:
            seconds = (time.monotonic() - self.start_time) / steps_done * steps_left
            remaining = f", about {format_duration(seconds)} left"
        epoch = f", epoch {state.epoch:.2f}" if state.epoch is not None else ""
        self.report(f"step {state.global_step} of {state.max_steps}{epoch}{remaining}: {values}")


def format_logs(logs: Mapping[str, Any]) -> str:
    """Format the values of a log entry as text, without those that say nothing about the model.

    Args:
        logs: names and values of the entry.
    """
    texts = []
    for name, value in logs.items():
        if name in HIDDEN_ENTRIES or name.endswith(HIDDEN_SUFFIXES) or name == "eval_runtime":
            continue
        texts.append(ENTRY_FORMATS[name].format(value) if name in ENTRY_FORMATS else f"{name} {value}")
    return ", ".join(texts)


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours.

    Args:
        seconds: the duration in seconds.
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["ProgressReporter"]
