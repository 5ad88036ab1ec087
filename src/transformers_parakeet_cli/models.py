"""Loads the model that the command line names."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .messages import print_note


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Pause garbage collection while modules are imported. It would take about 15 % of the time of the import."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_pipeline(model: str, **options: Any) -> Any:
    """Load a model and create a speech recognition pipeline.

    Args:
        model: Hub id, path of a folder, or path of a `.nemo` file; `demo` for the bundled demo model.
        **options: `device`, `dtype`, `attention` and `quantize`, as in
            `transformers_parakeet.transcription.load_pipeline`.

    Raises:
        OSError: the model cannot be found or downloaded. The message names the other kinds of models.
    """
    from transformers.utils import logging

    from transformers_parakeet import transcription

    logging.disable_progress_bar()
    try:
        return transcription.load_pipeline(model, **options)
    except OSError as error:
        if os.path.exists(model):
            raise
        raise OSError(
            f"{error}. For a model on this machine use `--model FOLDER` or `--model FILE.nemo`; for the bundled model "
            "of spoken digits use `--model demo`"
        ) from error


def print_model_note(pipeline: Any, is_default_dtype: bool) -> None:
    """Print to stderr which model runs, on which device and in which dtype, and the limit of the demo model.

    Args:
        pipeline: the loaded pipeline.
        is_default_dtype: whether the dtype was chosen by `load_pipeline`.
    """
    from transformers_parakeet.transcription import DEMO_MODEL

    dtype = str(pipeline.model.dtype).removeprefix("torch.")
    reason = ""
    if is_default_dtype:
        verb = "computes" if dtype == "bfloat16" else "does not compute"
        reason = f", because the device {verb} bfloat16 natively"
    if pipeline.model.name_or_path == DEMO_MODEL:
        print_note("the demo model recognises only spoken English digits")
    # an int8 model has float layers, too
    int8 = "int8 and " if getattr(pipeline.model, "hf_quantizer", None) is not None else ""
    print_note(f"model {pipeline.model.name_or_path} on {pipeline.device} in {int8}{dtype}{reason}")


__all__ = ["load_pipeline", "pause_garbage_collection", "print_model_note"]
