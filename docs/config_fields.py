"""Tells mkdocstrings the types and defaults of the configuration fields; `mkdocs.yml` loads this file.

The decorator `strict` of huggingface_hub creates the constructors of the configurations from their fields, as
`dataclasses.dataclass` does. mkdocstrings reads the source without running it, and knows only the latter.
"""

from typing import Any

import griffe


class ConfigFields(griffe.Extension):
    """Treats a class with the decorator `strict` as a dataclass."""

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Add the decorator of dataclasses to a class that has the decorator `strict`.

        Args:
            cls: class that griffe has read.
            **kwargs: unused.
        """
        if any(str(decorator.value) == "strict" for decorator in cls.decorators):
            dataclass = griffe.ExprName("dataclasses.dataclass")
            cls.decorators.append(griffe.Decorator(dataclass, lineno=None, endlineno=None))
