"""Hides the messages of the packages that export and quantise ONNX graphs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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


__all__ = ["quiet_libraries"]
