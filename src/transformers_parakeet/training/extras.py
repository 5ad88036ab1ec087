"""Import the optional packages of the extra `train` where they are used.

What the packages are used for is up to the modules that import them.
"""

import importlib
from typing import Any

INSTALL_HINT = "install the extra `train`: pip install -e '.[train]' in a checkout of transformers-parakeet"


def import_optional(package: str, purpose: str) -> Any:
    """Import a package of the extra `train`.

    Args:
        package: import name of the package.
        purpose: what needs it, as the subject of the error message, such as "LoRA".

    Returns:
        The module.

    Raises:
        ImportError: the package is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(f"{purpose} needs the package {package}, which is not installed: {INSTALL_HINT}") from error


__all__ = ["import_optional"]
