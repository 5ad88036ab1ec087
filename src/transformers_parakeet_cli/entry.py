"""Starts the command `parakeet`, or explains how to install the packages that the command needs.

The subcommands are defined in `app.py`.
"""

from __future__ import annotations

import sys

# names of the modules that the extra `cli` installs
CLI_MODULES = ("rich", "typer")


def main() -> None:
    """Run the command `parakeet` with the arguments in `sys.argv`.

    Raises:
        SystemExit: always, with the exit status of the command. If a package of the extra `cli` is missing, the status
            is 1, and a message on stderr explains how to install the package.
    """
    try:
        from .app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in CLI_MODULES:
            # a missing dependency of another part of the package, or a programming error
            raise
        sys.stderr.write(
            f"the command `parakeet` needs the package {package}: install transformers-parakeet with its extra "
            "`cli`, for example by `pip install '.[cli]'` in a checkout\n"
        )
        raise SystemExit(1) from None
    app()
