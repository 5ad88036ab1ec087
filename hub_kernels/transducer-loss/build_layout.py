"""Writes the kernel in the layout of the Hub, which the library `kernels` loads: `python build_layout.py FOLDER`.

The kernel has no compiled code, so every variant is a copy of the source and a `metadata.json`. A release is built by
kernel-builder with `flake.nix`; this script serves local use and tests.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KERNEL_FOLDER = Path(__file__).parent


def make_metadata(general: dict[str, Any], backend: str) -> dict[str, Any]:
    """Return the content of `metadata.json` for one backend.

    Args:
        general: table `general` of `build.toml`.
        backend: `cpu` or `cuda`.

    Returns:
        The fields that the library `kernels` reads. `python-depends` is empty: Triton is installed with torch, and
        `kernels` does not allow it in the list.
    """
    identifier = general["name"].replace("-", "_")
    return {
        "name": general["name"],
        "id": f"_{identifier}_{backend}_{general['version']}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
    }


def build_layout(folder: Path) -> list[Path]:
    """Write one variant of the kernel for each backend in `build.toml`.

    Args:
        folder: receives `build/torch-<backend>`; older variants in it are replaced.

    Returns:
        The folders of the variants.
    """
    general = tomllib.loads((KERNEL_FOLDER / "build.toml").read_text(encoding="utf-8"))["general"]
    source = KERNEL_FOLDER / "torch-ext" / general["name"].replace("-", "_")
    variants = []
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        shutil.copytree(source, variant, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = json.dumps(make_metadata(general, backend), indent=2)
        (variant / "metadata.json").write_text(metadata + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


def main() -> None:
    """Build into the folder of the command line and print the folders of the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for variant in build_layout(parser.parse_args().folder):
        print(variant)


if __name__ == "__main__":
    main()
