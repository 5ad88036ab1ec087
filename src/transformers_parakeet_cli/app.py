"""Registers the subcommands of `parakeet`.

Each subcommand is the function with the name of its file.
"""

from __future__ import annotations

import typer

from .align import align
from .bulk import bulk
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .export import export
from .finetune import finetune
from .info import info
from .serve import serve
from .transcribe import transcribe
from .verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Speech recognition with NVIDIA Parakeet models.")
app.command()(transcribe)
app.command()(align)
app.command()(demo)
app.command()(info)
app.command()(convert)
app.command()(export)
# `finetune` parses its own options, so its `--help` must reach it as an argument
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(
    finetune
)
app.command()(evaluate)
app.command()(bulk)
app.command()(serve)
app.command()(verify)

__all__ = ["app"]
