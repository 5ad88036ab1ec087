"""Import the optional packages of the extra `train`, with an error that names the extra.

The modules that use these packages call `import_optional` when they need one.
"""

import importlib
from typing import Any

INSTALL_HINT = "install the extra `train`: pip install -e '.[train]' in a checkout of transformers-parakeet"


def import_optional(package: str, purpose: str) -> Any:
    """Import an optional package of the extra `train`.

    Args:
        package: import name of the package.
        purpose: feature that needs the package, such as "LoRA"; used as the subject of the error message.

    Returns:
        The imported package.

    Raises:
        ImportError: the package is not installed; the message says how to install the extra `train`.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(f"{purpose} needs the package {package}, which is not installed: {INSTALL_HINT}") from error


__all__ = ["import_optional"]
