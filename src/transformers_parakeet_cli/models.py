"""Loads the model that the command line names."""

from __future__ import annotations

import os
from typing import Any

from .messages import print_note


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
    """Print to stderr which model runs, on which device and in which dtype.

    Args:
        pipeline: the loaded pipeline.
        is_default_dtype: whether the dtype was chosen by `load_pipeline`.
    """
    dtype = str(pipeline.model.dtype).removeprefix("torch.")
    reason = ""
    if is_default_dtype:
        verb = "computes" if dtype == "bfloat16" else "does not compute"
        reason = f", because the device {verb} bfloat16 natively"
    # an int8 model has float layers, too
    int8 = "int8 and " if getattr(pipeline.model, "hf_quantizer", None) is not None else ""
    print_note(f"model {pipeline.model.name_or_path} on {pipeline.device} in {int8}{dtype}{reason}")


__all__ = ["load_pipeline", "print_model_note"]
