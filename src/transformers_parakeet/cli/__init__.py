"""The command `parakeet`."""

from .app import app, main

__all__ = [
    "app",
    "main",
]
