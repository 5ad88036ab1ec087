"""Starts the command `parakeet`, or names the extra that installs what it needs.

The commands themselves are in `app.py`.
"""

from __future__ import annotations

import sys

# top-level modules that the extra `cli` installs
CLI_MODULES = ("rich", "typer")


def main() -> None:
    """Run the command `parakeet`.

    Raises:
        SystemExit: with status 1 and one line on stderr if a package of the extra `cli` is missing; otherwise with the
            status of the command.
    """
    try:
        from .app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in CLI_MODULES:
            raise
        sys.stderr.write(
            f"the command `parakeet` needs the package {package}: install transformers-parakeet with its extra "
            "`cli`, for example by `pip install '.[cli]'` in a checkout\n"
        )
        raise SystemExit(1) from None
    app()
