"""Import the packages of the extra `onnx`, with an error that names the extra, and hide their messages."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INSTALL_HINT = "install the extra `onnx`: pip install -e '.[onnx]' in a checkout of transformers-parakeet"


def import_optional(module: str) -> Any:
    """Import a module of an optional package of the extra `onnx`.

    Args:
        module: name of the module.

    Returns:
        The imported module.

    Raises:
        ImportError: the package is not installed; the message says how to install the extra `onnx`.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(f"the export needs the package {package}, which is not installed: {INSTALL_HINT}") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide warnings and log messages below errors in the `with` block.

    The exporter reports packages that the graph does not need, such as torchvision, and deprecated functions that it
    calls itself. The quantiser recommends a preparation that changes nothing here.
    """
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)


__all__ = ["import_optional", "quiet_libraries"]
