"""Imports packages that only some functions need, with an error that names the extra that installs them.

A function calls `import_optional` when it needs such a package, so importing this package does not need it.
"""

import importlib
from typing import Any


def import_optional(module: str, purpose: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: name of the module.
        purpose: feature that needs the package, such as "LoRA"; used as the subject of the error message.
        extra: name of the extra of this package that installs the package.

    Returns:
        The imported module.

    Raises:
        ImportError: the package is not installed; the message says how to install the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs the package {package}, which is not installed: install the extra `{extra}`: "
            f"pip install -e '.[{extra}]' in a checkout of transformers-parakeet"
        ) from error


__all__ = ["import_optional"]
