"""Measures what a way of recognition costs or gains in word errors, with a model of English sentences.

    python benchmarks/accuracy.py int8 --model MODEL --data FOLDER
    python benchmarks/accuracy.py windows --model MODEL --data FOLDER
    python benchmarks/accuracy.py streaming --model MODEL --data FOLDER
    python benchmarks/accuracy.py boosting --model MODEL --data FOLDER

FOLDER is a folder of packed speech, such as that of `examples/train_english.py`; the clips are those of its test split.

- int8: int8 weights and activations, and bfloat16, against float32.
- windows: recordings of about two minutes, joined from the clips of a speaker, as a whole and in windows.
- streaming: the same recordings as a stream, with several lengths of chunk and right context, and as a whole.
- boosting: 50 words of the test split that no more than two training clips contain. A recall is the share of their
  occurrences that are in the text; a false alarm is a boosted word in the text that is not in the transcript.

Each row has the word error rate with its 95 % interval over the clips or recordings.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from packed_speech import PackedSpeech

from transformers_parakeet import ParakeetStream, join_stream_words, load_audio
from transformers_parakeet.training.metrics import EvaluatedClip, compute_rates, score_clips
from transformers_parakeet.transcription import load_pipeline

SAMPLE_RATE = 16_000
# length of a recording that is joined from clips, and of the pause between two clips, in seconds
RECORDING_S, PAUSE_S = 120.0, 0.5
# lengths of windows in seconds
WINDOWS_S = (60.0, 30.0, 15.0, 8.0)
# chunk, left and right context of streams in seconds
STREAMS_S = ((4.0, 10.0, 4.0), (2.0, 10.0, 2.0), (1.0, 10.0, 1.0))
# number of boosted words, and the largest number of training clips with such a word
NUM_RARE_WORDS, MAX_TRAINING_CLIPS = 50, 2
BOOSTING_WEIGHTS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Recording:
    """Audio with its transcript.

    Args:
        name: name of the recording.
        samples: (S,) float32 samples at 16 kHz.
        text: the transcript.
    """

    name: str
    samples: np.ndarray
    text: str


def read_clips(folder: Path, split: str) -> list[tuple[str, Recording]]:
    """Read the clips of a split.

    Args:
        folder: folder of packed speech.
        split: name of the split.

    Returns:
        The speaker and the recording of each clip.
    """
    speech = PackedSpeech(folder, split)
    rows = [speech[index] for index in range(len(speech))]
    return [
        (row["speaker"], Recording(row["id"], load_audio(row["audio"], target_rate=SAMPLE_RATE), row["text"]))
        for row in rows
    ]


def join_recordings(clips: Sequence[tuple[str, Recording]]) -> list[Recording]:
    """Join the clips of each speaker to recordings of about `RECORDING_S` seconds.

    Args:
        clips: speaker and recording of each clip.
    """
    by_speaker: defaultdict[str, list[Recording]] = defaultdict(list)
    for speaker, clip in clips:
        by_speaker[speaker].append(clip)
    recordings = []
    for speaker, speaker_clips in by_speaker.items():
        groups: list[list[Recording]] = [[]]
        for clip in speaker_clips:
            if sum(len(other.samples) for other in groups[-1]) > RECORDING_S * SAMPLE_RATE:
                groups.append([])
            groups[-1].append(clip)
        pause = np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32)
        for number, group in enumerate(groups):
            samples = np.concatenate([part for clip in group for part in (clip.samples, pause)])
            recordings.append(Recording(f"{speaker}-{number}", samples, " ".join(clip.text for clip in group)))
    return recordings


def print_row(name: str, recordings: Sequence[Recording], texts: Sequence[str], *columns: str) -> None:
    """Print the word and character error rate of texts as a row of a table.

    Args:
        name: the way of recognition.
        recordings: the recordings.
        texts: the recognised text of each recording.
        *columns: further columns.
    """
    clips = [
        EvaluatedClip(recording.name, len(recording.samples) / SAMPLE_RATE, recording.text, text)
        for recording, text in zip(recordings, texts, strict=True)
    ]
    rates = compute_rates(score_clips(clips))
    wer, cer = rates["wer"], rates["cer"]
    interval = f"{100 * wer.low:.1f} to {100 * wer.high:.1f}"
    print("| " + " | ".join([name, f"{100 * wer.value:.2f}", interval, f"{100 * cer.value:.2f}", *columns]) + " |")


class Recogniser:
    """A loaded model that recognises recordings.

    Args:
        options: options of the command line.
        **model_options: arguments of `load_pipeline`, such as the dtype.
    """

    def __init__(self, options: argparse.Namespace, **model_options: Any) -> None:
        self.pipeline = load_pipeline(options.model, device="cpu", **{"dtype": "float32", **model_options})
        self.decoder = options.decoder

    def recognise(self, recordings: Sequence[Recording], **arguments: Any) -> list[str]:
        """Return the text of each recording.

        Args:
            recordings: the recordings.
            **arguments: arguments of the pipeline.
        """
        if self.decoder:
            arguments["decoder"] = self.decoder
        inputs = ({"raw": recording.samples, "sampling_rate": SAMPLE_RATE} for recording in recordings)
        return [output["text"] for output in self.pipeline(inputs, batch_size=4, num_workers=0, **arguments)]


def measure_int8(options: argparse.Namespace) -> None:
    """Print the error rates in float32, bfloat16 and int8."""
    clips = [clip for _, clip in read_clips(options.data, "test")]
    for name, arguments in (("float32", {}), ("bfloat16", {"dtype": "bfloat16"}), ("int8", {"quantize": "int8"})):
        print_row(name, clips, Recogniser(options, **arguments).recognise(clips))


def measure_windows(options: argparse.Namespace) -> None:
    """Print the error rates of whole recordings and of windows."""
    recordings = join_recordings(read_clips(options.data, "test"))
    recogniser = Recogniser(options)
    print_row("whole recording", recordings, recogniser.recognise(recordings, chunk_length_s=0))
    for window_s in WINDOWS_S:
        print_row(f"windows of {window_s:g} s", recordings, recogniser.recognise(recordings, chunk_length_s=window_s))


def measure_streaming(options: argparse.Namespace) -> None:
    """Print the error rates of whole recordings and of streams."""
    recordings = join_recordings(read_clips(options.data, "test"))
    recogniser = Recogniser(options)
    print_row("offline, whole recording", recordings, recogniser.recognise(recordings, chunk_length_s=0))
    pipeline = recogniser.pipeline
    for chunk_s, left_s, right_s in STREAMS_S:
        texts = []
        for recording in recordings:
            settings = {"chunk_s": chunk_s, "left_s": left_s, "right_s": right_s}
            stream = ParakeetStream(
                pipeline.model, pipeline.processor, **settings, decoder=options.decoder, confidence=None
            )
            blocks = np.array_split(recording.samples, max(1, len(recording.samples) // SAMPLE_RATE))
            texts.append(join_stream_words([word for update in stream.updates(blocks) for word in update.committed]))
        print_row(f"stream, chunk {chunk_s:g} s, right context {right_s:g} s", recordings, texts)


def choose_rare_words(folder: Path, clips: Sequence[Recording]) -> list[str]:
    """Choose the words of clips that are rare in the training clips, the longest first.

    Args:
        folder: folder of packed speech.
        clips: the clips.
    """
    training = Counter(word for text in PackedSpeech(folder, "train").texts for word in set(text.split()))
    words = {word for clip in clips for word in clip.text.split() if training[word] <= MAX_TRAINING_CLIPS}
    return sorted(words, key=lambda word: (-len(word), word))[:NUM_RARE_WORDS]


def measure_boosting(options: argparse.Namespace) -> None:
    """Print the recall of rare words, and the error rates of the clips with and without such a word."""
    clips = [clip for _, clip in read_clips(options.data, "test")]
    words = choose_rare_words(options.data, clips)
    has_word = [not set(words).isdisjoint(clip.text.split()) for clip in clips]
    recogniser = Recogniser(options)
    for weight in (0.0, *BOOSTING_WEIGHTS):
        texts = recogniser.recognise(clips, **({"boost": words, "boosting_weight": weight} if weight else {}))
        name = f"boosted with weight {weight:g}" if weight else "not boosted"
        for label, wanted in (("with", True), ("without", False)):
            rows = [index for index, has in enumerate(has_word) if has == wanted]
            if rows:
                selected = [clips[i] for i in rows], [texts[i] for i in rows]
                print_row(f"{name}, clips {label} such words", *selected, *count_words(words, *selected))


def count_words(words: Sequence[str], clips: Sequence[Recording], texts: Sequence[str]) -> tuple[str, str]:
    """Count how many occurrences of some words are recognised, and how many are recognised wrongly.

    Args:
        words: the words.
        clips: the clips.
        texts: the recognised text of each clip.

    Returns:
        The recall as `n of m`, and the number of false alarms.
    """
    num_expected = num_recognised = num_emitted = 0
    for clip, text in zip(clips, texts, strict=True):
        references, hypotheses = Counter(clip.text.split()), Counter(text.split())
        num_expected += sum(references[word] for word in words)
        num_emitted += sum(hypotheses[word] for word in words)
        num_recognised += sum(min(references[word], hypotheses[word]) for word in words)
    return f"{num_recognised} of {num_expected}", str(num_emitted - num_recognised)


MEASUREMENTS = {
    "int8": measure_int8,
    "windows": measure_windows,
    "streaming": measure_streaming,
    "boosting": measure_boosting,
}


def main() -> None:
    """Print the table of one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--model", required=True, help="Hub id, folder or .nemo file")
    parser.add_argument("--data", type=Path, required=True, help="folder of packed speech with a test split")
    parser.add_argument("--decoder", help="ctc for the CTC head of a hybrid")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    further = " recall | false alarms |" if options.measurement == "boosting" else ""
    print(f"| recognition | WER % | 95 % interval | CER % |{further}")
    print("| --- " * (4 + further.count("|")) + "|")
    MEASUREMENTS[options.measurement](options)


if __name__ == "__main__":
    main()
