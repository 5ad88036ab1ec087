"""Extends transformers' `pipeline` function by `.nemo` files, and by folders and Hub ids that contain only such a file.

All other models are passed to transformers' own function. The pipeline class is in `pipeline_parakeet.py`.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from .hub import find_checkpoint
from .reader import load_nemo

TASK = "automatic-speech-recognition"

# options of `pipeline` that `load_nemo` takes
LOADING_OPTIONS = ("revision", "token", "dtype")


def with_nemo_files(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does what transformers' `pipeline` does and also accepts `.nemo` files.

    It calls transformers' function first, so that safetensors are preferred and other models do not change. Without a
    `config.json` that function raises OSError or ValueError, and only then a `.nemo` file is looked for.

    Args:
        stock: `transformers.pipeline`.
    """

    @wraps(stock)
    def pipeline(task: str | None = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build a pipeline; see `transformers.pipeline`."""
        is_asr_name = isinstance(model, (str, Path)) and task in (None, TASK)
        if is_asr_name and str(model).endswith(".nemo") and Path(model).is_file():
            return build_nemo_pipeline(stock, model, args, kwargs)
        try:
            return stock(task, model, *args, **kwargs)
        except (OSError, ValueError):
            # a caller who gives a configuration or a tokenizer means a checkpoint of transformers
            has_other_parts = bool(args) or kwargs.get("config") is not None
            if not is_asr_name or has_other_parts or not has_nemo_file(model, kwargs):
                raise
        return build_nemo_pipeline(stock, model, args, kwargs)

    return pipeline


def has_nemo_file(model: str | Path, options: dict[str, Any]) -> bool:
    """Return whether `load_nemo` would read a `.nemo` file for this model.

    Args:
        model: a file, a folder or a Hub id.
        options: keyword arguments of `pipeline`.
    """
    try:
        return find_checkpoint(model, **hub_options(options)).is_file()
    except OSError:
        return False


def build_nemo_pipeline(
    stock: Callable[..., Any], model: str | Path, args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Load a `.nemo` file and build its pipeline.

    Args:
        stock: `transformers.pipeline`.
        model: the file, or the folder or Hub id that contains it.
        args: positional arguments of `stock` after the model.
        options: keyword arguments of `stock`.
    """
    dtype = options.get("dtype")
    if isinstance(dtype, str):
        # "auto" is the type of the file, and not an attribute of torch
        dtype = getattr(torch, dtype, None)
    loaded_model, processor = load_nemo(model, dtype=dtype, **hub_options(options))
    pipeline_options = {name: value for name, value in options.items() if name not in LOADING_OPTIONS}
    parts: dict[str, Any] = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    if not parts.keys() & pipeline_options.keys():
        # `stock` needs the parts even if the processor is given
        parts["processor"] = processor
    return stock(TASK, loaded_model, *args, **{**parts, **pipeline_options})


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the Hub arguments of `load_nemo` for the keyword arguments of `pipeline`.

    transformers takes `cache_dir` and `local_files_only` as model arguments (`model_kwargs`).
    """
    model_options = options.get("model_kwargs") or {}
    return {
        "revision": options.get("revision"),
        "token": options.get("token"),
        "cache_dir": model_options.get("cache_dir"),
        "local_files_only": bool(options.get("local_files_only", model_options.get("local_files_only", False))),
    }
