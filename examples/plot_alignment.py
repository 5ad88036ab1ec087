"""Draws the spectrogram of a clip with the recognised words, their times and their confidence.

python examples/plot_alignment.py audio.wav picture.png --model FOLDER_OR_HUB_ID

Needs matplotlib, which this package does not install. Without `--model` the demo model recognises spoken digits. The
recognition is in the pipeline; this file only draws its result.
"""

import argparse
import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

import transformers_parakeet as tp

# inches; the width grows with the clip, so that words do not overlap
HEIGHT, WIDTH_PER_SECOND, MIN_WIDTH = 3.6, 3.0, 6.0
PIXELS_PER_INCH = 100
# below 1, so that text on a bar is readable
BAR_ALPHA = 0.6
# range in percent of the log-mel energies that the colours show; the quietest values would use most of the colours
COLOUR_RANGE_PERCENT = (40, 99.5)


def recognise(audio: str, model: str) -> tuple[NDArray[np.float32], float, list[dict[str, Any]]]:
    """Compute what the picture shows.

    Args:
        audio: path or URL of a clip.
        model: Hub id, folder or `.nemo` file.

    Returns:
        (T, F) log-mel features, the seconds from one feature frame to the next, and the words as the pipeline returns
        them: `{"text", "timestamp": (start, end) in seconds, "confidence"}`.
    """
    loaded_model, processor = tp.load_nemo(model)
    pipeline = tp.ParakeetASRPipeline(loaded_model, processor=processor, task="automatic-speech-recognition")
    extractor = processor.feature_extractor
    samples = tp.load_audio(audio, target_rate=extractor.sampling_rate)
    features = extractor(samples, sampling_rate=extractor.sampling_rate)["input_features"][0]
    words = pipeline(samples, return_timestamps="word", return_confidence=True)["chunks"]
    return np.asarray(features), extractor.hop_length / extractor.sampling_rate, words


def draw(features: NDArray[np.float32], frame_s: float, words: list[dict[str, Any]], picture: str) -> None:
    """Draw the features, and above them one bar per word, and write the picture to a file.

    Args:
        features: (T, F) log-mel features.
        frame_s: seconds from one feature frame to the next.
        words: words with times and confidence, see `recognise`.
        picture: path of the file; its suffix selects the format.
    """
    # imported here, so that `--help` and the tests of `recognise` work without matplotlib
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    duration_s = len(features) * frame_s
    figure = Figure(figsize=(max(MIN_WIDTH, WIDTH_PER_SECOND * duration_s), HEIGHT), layout="constrained")
    word_axes, mel_axes = figure.subplots(2, sharex=True, height_ratios=[1, 3])
    low, high = np.percentile(features, COLOUR_RANGE_PERCENT)
    extent = (0.0, duration_s, -0.5, features.shape[1] - 0.5)
    mel_axes.imshow(features.T, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, cmap="Greys")
    mel_axes.set(xlabel="seconds", ylabel="mel bin", xlim=(0, duration_s))
    colours = colormaps["RdYlGn"]
    for word in words:
        start, end = word["timestamp"]
        word_axes.barh(0, end - start, 1, left=start, color=colours(word["confidence"]), alpha=BAR_ALPHA)
        label = f"{word['text'].strip()}\n{word['confidence']:.2f}"
        word_axes.text((start + end) / 2, 0, label, ha="center", va="center")
        for time in (start, end):
            mel_axes.axvline(time, color="tab:blue", linewidth=1)
    word_axes.set(yticks=[], ylim=(-0.5, 0.5))
    word_axes.spines[["top", "right", "left"]].set_visible(False)
    # without values, the colours of a ScalarMappable stand for the range from 0 to 1
    scale = ScalarMappable(cmap=colours)
    figure.colorbar(scale, ax=[word_axes, mel_axes], alpha=BAR_ALPHA, pad=0.01, label="confidence")
    figure.savefig(picture, dpi=PIXELS_PER_INCH)


def main() -> None:
    """Recognise a clip and write its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", help="path or URL of a clip")
    parser.add_argument("picture", help="file to write: .png, .svg or .pdf")
    parser.add_argument("--model", default=str(tp.demo_model_path()), help="Hub id, folder or .nemo file")
    arguments = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib must be installed, and is not: pip install matplotlib")
    draw(*recognise(arguments.audio, arguments.model), arguments.picture)


if __name__ == "__main__":
    main()
