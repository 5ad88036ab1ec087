"""Lets transformers' `pipeline` take a `.nemo` file, or a folder or Hub id that holds only such a file.

Everything else goes to transformers' own function; the pipeline class is in `pipeline_parakeet.py`.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from .hub import find_checkpoint
from .reader import load_nemo

TASK = "automatic-speech-recognition"


def with_nemo_files(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' `pipeline` function, extended by `.nemo` files.

    transformers' own way is tried first, so that safetensors are preferred and other models are not touched. Without a
    `config.json` it fails, with OSError or ValueError.

    Args:
        stock: `transformers.pipeline`.
    """

    @wraps(stock)
    def pipeline(task: str | None = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        is_name = isinstance(model, (str, Path)) and task in (None, TASK)
        if is_name and str(model).endswith(".nemo") and Path(model).is_file():
            return pipeline_of(stock, model, args, kwargs)
        try:
            return stock(task, model, *args, **kwargs)
        except (OSError, ValueError):
            # a configuration or tokenizer of one's own belongs to a folder of transformers
            if not is_name or args or kwargs.get("config") is not None or not holds_nemo_file(model, kwargs):
                raise
        return pipeline_of(stock, model, args, kwargs)

    return pipeline


def holds_nemo_file(model: str | Path, options: dict[str, Any]) -> bool:
    """Tell whether `load_nemo` would read a `.nemo` file for this name."""
    try:
        return find_checkpoint(model, **hub_options(options)).is_file()
    except OSError:
        return False


def pipeline_of(stock: Callable[..., Any], model: str | Path, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Load a `.nemo` file and build the pipeline of it.

    Args:
        stock: `transformers.pipeline`.
        model: the file, folder or Hub id.
        args: positional arguments of `stock` after the model.
        options: keyword arguments of `stock`.
    """
    rest = {name: value for name, value in options.items() if name not in ("revision", "token", "dtype")}
    dtype = options.get("dtype")
    if isinstance(dtype, str):
        # "auto" is the type of the file
        dtype = getattr(torch, dtype, None)
    loaded, processor = load_nemo(model, dtype=dtype, **hub_options(options))
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    return stock(TASK, loaded, *args, **{**parts, **rest})


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `pipeline` that say where a checkpoint is, as `load_nemo` takes them."""
    inner = options.get("model_kwargs") or {}
    return {
        "revision": options.get("revision"),
        "token": options.get("token"),
        "cache_dir": inner.get("cache_dir"),
        "local_files_only": bool(options.get("local_files_only", inner.get("local_files_only", False))),
    }
