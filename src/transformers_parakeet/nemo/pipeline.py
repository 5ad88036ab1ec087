"""Adds support for `.nemo` files to transformers' `pipeline` function.

All other models are passed to the original function. The pipeline class is defined in `pipeline_parakeet.py`.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from .hub import find_checkpoint

TASK = "automatic-speech-recognition"

# arguments of `pipeline` that are passed to `load_nemo`, not to the original function
LOADING_OPTIONS = ("revision", "token", "dtype")


def add_nemo_support(original_pipeline: Callable[..., Any], load_nemo: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap transformers' `pipeline` function so it also accepts `.nemo` files.

    If `model` is the path of a `.nemo` file, the wrapper loads the file. Otherwise the wrapper calls the original
    function first, so safetensors are preferred and other models behave as before. The original function raises OSError
    or ValueError if there is no `config.json`; only then does the wrapper look for a `.nemo` file in the folder or Hub
    repository.

    Args:
        original_pipeline: `transformers.pipeline`.
        load_nemo: function that loads a model and its processor from a `.nemo` file.
    """

    @wraps(original_pipeline)
    def pipeline(task: str | None = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build a pipeline; see `transformers.pipeline`."""
        may_be_nemo = isinstance(model, (str, Path)) and task in (None, TASK)
        if may_be_nemo and str(model).endswith(".nemo") and Path(model).is_file():
            return build_nemo_pipeline(original_pipeline, load_nemo, model, args, kwargs)
        try:
            return original_pipeline(task, model, *args, **kwargs)
        except (OSError, ValueError):
            # a caller who passes a configuration expects a transformers checkpoint; it is the first positional argument
            has_explicit_config = bool(args) or kwargs.get("config") is not None
            if not may_be_nemo or has_explicit_config or not has_nemo_file(model, kwargs):
                raise
        return build_nemo_pipeline(original_pipeline, load_nemo, model, args, kwargs)

    return pipeline


def has_nemo_file(model: str | Path, options: dict[str, Any]) -> bool:
    """Return whether a folder or Hub repository contains a `.nemo` file and no safetensors.

    Args:
        model: path of a file or folder, or Hub id `org/name`.
        options: keyword arguments of `pipeline`.

    Returns:
        False if there is no `.nemo` file, if there are safetensors, or if the Hub cannot be reached.
    """
    try:
        return find_checkpoint(model, **get_hub_options(options)).is_file()
    except OSError:
        return False


def build_nemo_pipeline(
    original_pipeline: Callable[..., Any],
    load_nemo: Callable[..., Any],
    model: str | Path,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """Load a `.nemo` file and build a speech recognition pipeline.

    Args:
        original_pipeline: `transformers.pipeline`.
        load_nemo: function that loads a model and its processor from a `.nemo` file.
        model: path of the `.nemo` file, or a folder or Hub id that contains the file.
        args: positional arguments of `original_pipeline` after `model`.
        options: keyword arguments of `original_pipeline`.

    Returns:
        The pipeline that `original_pipeline` builds.
    """
    dtype = options.get("dtype")
    if isinstance(dtype, str):
        # "auto" is not an attribute of torch, so it becomes None, which keeps the dtype in the file
        dtype = getattr(torch, dtype, None)
    loaded_model, processor = load_nemo(model, dtype=dtype, **get_hub_options(options))
    pipeline_options = {name: value for name, value in options.items() if name not in LOADING_OPTIONS}
    # `original_pipeline` requires the tokenizer and the feature extractor in addition to the processor
    components: dict[str, Any] = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    if not components.keys() & pipeline_options.keys():
        # the caller has replaced neither component, so the processor is consistent with both
        components["processor"] = processor
    return original_pipeline(TASK, loaded_model, *args, **{**components, **pipeline_options})


def get_hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Convert keyword arguments of `pipeline` to the Hub arguments of `load_nemo`.

    `pipeline` takes `revision`, `token` and `local_files_only` as direct arguments, and `cache_dir` and
    `local_files_only` in `model_kwargs`.

    Args:
        options: keyword arguments of `pipeline`.
    """
    model_options = options.get("model_kwargs") or {}
    return {
        "revision": options.get("revision"),
        "token": options.get("token"),
        "cache_dir": model_options.get("cache_dir"),
        "local_files_only": bool(options.get("local_files_only", model_options.get("local_files_only", False))),
    }
