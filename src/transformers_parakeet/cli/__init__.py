"""The command `parakeet`."""

from .entry import main

__all__ = ["main"]
