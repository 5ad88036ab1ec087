"""`parakeet finetune`: passes its arguments to the program in `transformers_parakeet.training`."""

from __future__ import annotations

import typer

from .messages import print_error_and_exit, print_next_command, print_note, print_text


def finetune(context: typer.Context) -> None:
    """Fine-tune a model on audio with transcripts; `parakeet finetune --help` lists the options."""
    with print_error_and_exit():
        from transformers.utils import logging

        from transformers_parakeet.training import finetune_main

        logging.disable_progress_bar()
        result = finetune_main(context.args, print_note)
    if result is None:
        # another process of a distributed training prints the result
        return
    folder, metrics = result
    score = f"; word error rate {metrics['eval_wer']:.2%}" if "eval_wer" in metrics else ""
    print_text(f"wrote {folder}{score}")
    print_next_command("parakeet", "transcribe", "--model", str(folder), "FILE")


__all__ = ["finetune"]
