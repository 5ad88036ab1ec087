"""`parakeet finetune`: passes its arguments to the program in `transformers_parakeet.training`."""

from __future__ import annotations

import typer

from .messages import print_error_and_exit


def finetune(context: typer.Context) -> None:
    """Fine-tune a model on audio with transcripts; `parakeet finetune --help` lists the options."""
    with print_error_and_exit():
        from transformers_parakeet.training import finetune_main

        finetune_main(context.args)


__all__ = ["finetune"]
