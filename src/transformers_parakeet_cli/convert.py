"""`parakeet convert`: `.nemo` files to folders, and folders to `.nemo` files."""

from __future__ import annotations

from typing import Annotated

import typer

from .messages import print_error_and_exit, print_next_command, print_note, print_text


def convert(
    source: Annotated[str, typer.Argument(help="A .nemo file, a folder, or a Hub id; demo: the bundled digits.")],
    target: Annotated[str, typer.Argument(help="Folder or .nemo file to write; with --push-to-hub a Hub id.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: the dtype of the source.")
    ] = None,
    push_to_hub: Annotated[bool, typer.Option(help="Also upload the folder to the Hub.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
) -> None:
    """Convert a .nemo file to a transformers folder, or a folder to a .nemo file.

    The result is loaded and compared with the source: the weights, and the output for random noise.
    """
    from transformers.utils import logging

    from transformers_parakeet.nemo import convert_checkpoint, resolve_model_name

    logging.disable_progress_bar()
    print_note(f"converting {source} and comparing the result with it")
    with print_error_and_exit():
        written_path = convert_checkpoint(
            resolve_model_name(source), target, dtype=dtype, push_to_hub=push_to_hub, revision=revision
        )
    print_text(f"wrote {written_path}; weights and output for random noise equal those of {source}")
    print_next_command("parakeet", "transcribe", "--model", str(written_path), "FILE")


__all__ = ["convert"]
