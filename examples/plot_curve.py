"""Draws the training loss and the error rates on dev clips of a run of `train_english.py`.

    python examples/plot_curve.py english-ctc/curve.json curve.svg

Needs matplotlib, which this package does not install.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def read_series(curve: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Read the values of a curve by name: the number of updates and the value.

    Args:
        curve: the entries of `curve.json`, each with `step` and values.

    Returns:
        The loss, and the word and character error rate of each dev set as fractions.
    """
    series: dict[str, list[tuple[int, float]]] = {"loss": []}
    for entry in curve:
        for name, value in entry.items():
            if name == "loss" or name.endswith(("_wer", "_cer")):
                label = name.removeprefix("eval_").replace("_", " ")
                series.setdefault(label, []).append((entry["step"], float(value)))
    return series


def draw(series: dict[str, list[tuple[int, float]]], picture: str) -> None:
    """Draw the loss above the error rates, and write the picture to a file.

    Args:
        series: see `read_series`.
        picture: path of the file; its suffix selects the format.
    """
    # imported here, so that `--help` and the tests of `read_series` work without matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 6.0), layout="constrained")
    loss_axes, error_axes = figure.subplots(2, sharex=True)
    loss_axes.plot(*zip(*series["loss"], strict=True), color="#76b900")
    loss_axes.set_ylabel("training loss")
    for name, points in series.items():
        if name != "loss":
            style = "-" if name.endswith("wer") else "--"
            error_axes.plot(*zip(*((step, 100 * value) for step, value in points), strict=True), style, label=name)
    error_axes.set_ylabel("errors on dev clips, %")
    error_axes.set_xlabel("updates")
    error_axes.set_ylim(0, 100)
    error_axes.legend()
    for axes in (loss_axes, error_axes):
        axes.grid(alpha=0.3)
    figure.savefig(picture)


def main() -> None:
    """Read the options and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", type=Path, help="curve.json of a run")
    parser.add_argument("picture", help="file to write, such as curve.svg or curve.png")
    options = parser.parse_args()
    draw(read_series(json.loads(options.curve.read_text(encoding="utf-8"))), options.picture)


if __name__ == "__main__":
    main()
