"""Create strings of spoken digits with known word times from packed speech, and write the clips of the demo.

Tokens, features and training are in `train_demo.py`.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# duration in seconds of the fade at both ends of a clip
FADE_S = 0.005
CLIP_SEED = 0
# maximum duration in seconds of a line that is written as a demo clip, which keeps the files small
MAX_LINE_S = 2.8
# shares of the training examples: without digits, with several speakers, built from lines of several digits
NO_DIGIT_SHARE = 0.1
MIXED_SPEAKERS_SHARE = 0.15
LINE_SHARE = 0.25
# the first 400 batches repeat the same 20 clean batches; over the next 1600 the share of augmented examples rises to 1
REPEATING_BATCHES, REPEATED_BATCHES, RAMP_BATCHES = 400, 20, 1600

Array = NDArray[Any]
Rng = np.random.Generator
Row = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """One recording.

    Args:
        audio: (S,) float32 samples at 16 kHz.
        text: transcript.
        speaker: name of the speaker.
        name: id of the recording in its dataset.
    """

    audio: Array
    text: str
    speaker: str
    name: str


@dataclass(frozen=True)
class Span:
    """The transcript of one clip in a string, with the start and end of the clip in seconds."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class DigitString:
    """Clips joined with pauses.

    Args:
        audio: (S,) float32 samples at 16 kHz.
        spans: one span per clip; each recording of fsdd is one digit.
        speaker: names of the speakers, joined by `+`.
        sources: ids of the recordings.
    """

    audio: Array
    spans: tuple[Span, ...]
    speaker: str
    sources: tuple[str, ...]

    @property
    def text(self) -> str:
        """Transcript of the whole string."""
        return " ".join(span.text for span in self.spans)


@dataclass(frozen=True)
class Voices:
    """All training recordings.

    Args:
        digits: recordings of single digits, grouped by speaker.
        lines: recordings of several digits, grouped by speaker.
        other: recordings without digits.
    """

    digits: dict[str, list[Clip]]
    lines: dict[str, list[Clip]]
    other: list[Clip]


def resample(audio: Array, from_rate: float, to_rate: float) -> Array:
    """Resample (S,) samples; return `audio` itself if the rates are equal."""
    return audio if from_rate == to_rate else soxr.resample(audio, from_rate, to_rate).astype(np.float32)


def read_clips(folder: Path, is_selected: Callable[[Row], bool]) -> list[Clip]:
    """Decode selected recordings of a folder of packed speech.

    Args:
        folder: folder with `manifest.jsonl` and the tar files named in the manifest.
        is_selected: function that returns whether to read the recording of a manifest entry.

    Returns:
        The clips in the order of the manifest.
    """
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return [read_clip(folder, row) for row in rows if is_selected(row)]


def read_clip(folder: Path, row: Row) -> Clip:
    """Decode the recording of one manifest line at 16 kHz."""
    with (folder / row["tar"]).open("rb") as tar:
        tar.seek(row["offset"])
        audio, rate = soundfile.read(io.BytesIO(tar.read(row["nbytes"])), dtype="float32")
    return Clip(resample(audio, rate, SAMPLE_RATE), row["text"], row["speaker"], row["id"])


def read_digit_recordings(data: Path, split: str) -> list[Clip]:
    """Read single digits of fsdd; the split is `train`, `dev` (same four speakers) or `test` (another speaker)."""
    return read_clips(data / "fsdd", lambda row: row["split"] == split)


def read_digit_lines(data: Path, split: str) -> list[Clip]:
    """Read the lines of speechocean762 that consist of digits."""
    return read_clips(
        data / "speechocean762", lambda row: row["split"] == split and set(row["text"].split()) <= set(DIGITS)
    )


def read_lines_without_digits(data: Path, split: str) -> list[Clip]:
    """Read the lines of speechocean762 without any digit word."""
    return read_clips(
        data / "speechocean762", lambda row: row["split"] == split and not set(row["text"].split()) & set(DIGITS)
    )


def group_by_speaker(clips: Iterable[Clip]) -> dict[str, list[Clip]]:
    """Group clips by speaker; the order of the clips is kept."""
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.speaker, []).append(clip)
    return groups


def load_training_voices(data: Path) -> Voices:
    """Read the training recordings of the demo model, which are only from train splits."""
    return Voices(
        group_by_speaker(read_digit_recordings(data, "train")),
        group_by_speaker(read_digit_lines(data, "train")),
        read_lines_without_digits(data, "train"),
    )


def fade(audio: Array) -> Array:
    """Fade in and fade out (S,) samples, which avoids clicks at the cuts."""
    gain = np.ones_like(audio)
    fade_length = min(int(FADE_S * SAMPLE_RATE), len(audio) // 2)
    gain[:fade_length] = np.linspace(0, 1, fade_length)
    gain[len(audio) - fade_length :] = np.linspace(1, 0, fade_length)
    return audio * gain


def draw_pause(rng: Rng) -> float:
    """Draw a pause in seconds: 0 to 0.03 with probability 1/4, otherwise 0.05 to 0.5."""
    return float(rng.uniform(0.0, 0.03) if rng.random() < 0.25 else rng.uniform(0.05, 0.5))


def join_clips(clips: Sequence[Clip], rng: Rng, floor_db: float = 50.0) -> DigitString:
    """Join clips with random pauses, and add a low noise floor.

    Args:
        clips: one or more clips; the level of each clip is changed by up to 3 dB.
        rng: random generator for pauses, levels and noise.
        floor_db: signal-to-noise ratio in dB.

    Returns:
        The string with the start and end of every clip.
    """
    pieces: list[Array] = [np.zeros(int(rng.uniform(0.05, 0.4) * SAMPLE_RATE), np.float32)]
    spans: list[Span] = []
    position = len(pieces[0])
    for clip in clips:
        level = 10 ** (rng.uniform(-3, 3) / 20)
        spans.append(Span(clip.text, position / SAMPLE_RATE, (position + len(clip.audio)) / SAMPLE_RATE))
        pause = np.zeros(int(draw_pause(rng) * SAMPLE_RATE), np.float32)
        pieces += [fade(clip.audio) * level, pause]
        position += len(clip.audio) + len(pause)
    pieces.append(np.zeros(int(rng.uniform(0.05, 0.4) * SAMPLE_RATE), np.float32))
    audio = np.concatenate(pieces)
    noise = rng.standard_normal(len(audio)) * compute_level(audio) * 10 ** (-floor_db / 20)
    speakers = dict.fromkeys(clip.speaker for clip in clips)
    return DigitString(
        (audio + noise).astype(np.float32), tuple(spans), "+".join(speakers), tuple(clip.name for clip in clips)
    )


def create_evaluation_strings(
    clips: Sequence[Clip], number: int, seed: int, shortest: int = 3, longest: int = 7
) -> list[DigitString]:
    """Create strings of one speaker each, without augmentation.

    Args:
        clips: recordings to draw from.
        number: number of strings.
        seed: random seed.
        shortest: minimum number of clips in a string.
        longest: maximum number of clips in a string.
    """
    rng = np.random.default_rng(seed)
    speakers = list(group_by_speaker(clips).values())
    strings = []
    for _ in range(number):
        speaker_clips = speakers[rng.integers(len(speakers))]
        num_clips = rng.integers(shortest, longest + 1)
        drawn_clips = [speaker_clips[i] for i in rng.integers(len(speaker_clips), size=num_clips)]
        strings.append(scale_to_peak(join_clips(drawn_clips, rng), 0.5))
    return strings


def scale_to_peak(string: DigitString, peak: float) -> DigitString:
    """Scale the audio of a string to a peak amplitude."""
    audio = string.audio * (peak / max(float(np.abs(string.audio).max()), 1e-6))
    return DigitString(audio.astype(np.float32), string.spans, string.speaker, string.sources)


def compute_level(audio: Array) -> float:
    """Compute the root mean square of the non-silent samples; return 0.001 if all samples are silent."""
    non_silent = audio[np.abs(audio) > 1e-4]
    return float(np.sqrt(np.mean(non_silent**2))) if len(non_silent) else 1e-3


def change_speed(clip: Clip, speed: float) -> Clip:
    """Play a clip faster (speed above 1) or slower (speed below 1), which also changes the pitch and the formants."""
    return Clip(resample(clip.audio, SAMPLE_RATE * speed, SAMPLE_RATE), clip.text, clip.speaker, clip.name)


def filter_audio(audio: Array, gain: Callable[[Array], Array]) -> Array:
    """Multiply the spectrum of (S,) samples by a gain, a function of frequencies in Hz."""
    size = round_up_length(len(audio))
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum = np.fft.rfft(audio.astype(np.float32), size) * gain(frequencies).astype(np.float32)
    return np.fft.irfft(spectrum, size)[: len(audio)].astype(np.float32)


def round_up_length(length: int) -> int:
    """Round a length up to a multiple of 4096, because a Fourier transform of prime length takes ten times as long."""
    return -(-length // 4096) * 4096


def equalise(audio: Array, rng: Rng) -> Array:
    """Simulate another microphone with random gains of up to 8 dB that change smoothly with log frequency."""
    knots = np.log([60, 250, 700, 1500, 2500, 4000, 8000])
    gains_db = rng.uniform(-8, 8, size=len(knots))
    return filter_audio(audio, lambda f: 10 ** (np.interp(np.log(f + 1), knots, gains_db) / 20))


def limit_band(audio: Array, rng: Rng) -> Array:
    """Limit audio to a telephone band, about 200 Hz to 3.6 kHz, with random cutoff frequencies and slopes."""
    low, high = rng.uniform(60, 320), rng.uniform(3000, 4000)
    width = rng.uniform(20, 150)
    return filter_audio(audio, lambda f: smooth_step((f - low) / 20) * smooth_step((high - f) / width))


def smooth_step(x: Array) -> Array:
    """Compute the logistic function, a smooth step from 0 to 1 at x = 0."""
    return 0.5 * (1 + np.tanh(x / 2))


def reverberate(audio: Array, rng: Rng) -> Array:
    """Add the reverberation of a small room."""
    decay_s = rng.uniform(0.1, 0.4)
    time = np.arange(int(decay_s * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * np.exp(-6.9 * time / decay_s)
    tail *= rng.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    size = round_up_length(len(audio) + len(tail))
    wet = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(tail, size), size)[: len(audio)]
    return (audio + wet).astype(np.float32)


def draw_coloured_noise(length: int, rng: Rng) -> Array:
    """Draw noise with amplitude proportional to frequency to the power 0, -0.5 or -1, and root mean square 1."""
    slope = rng.choice([0.0, 0.5, 1.0])
    noise = filter_audio(rng.standard_normal(length), lambda f: (f + 20.0) ** -slope)
    return noise / float(np.sqrt(np.mean(noise**2)))


def draw_babble(length: int, other: Sequence[Clip], rng: Rng) -> Array:
    """Mix three to six recordings without digits, and scale the mix to root mean square 1."""
    mix = np.zeros(length, np.float32)
    for _ in range(rng.integers(3, 7)):
        audio = other[int(rng.integers(len(other)))].audio
        mix += np.resize(np.roll(audio, rng.integers(len(audio))), length) / compute_level(audio)
    return mix / max(float(np.sqrt(np.mean(mix**2))), 1e-6)


def add_noise(audio: Array, other: Sequence[Clip], rng: Rng) -> Array:
    """Add coloured noise (probability 0.67) or babble at a random signal-to-noise ratio."""
    if rng.random() < 0.67:
        noise, snr_db = draw_coloured_noise(len(audio), rng), rng.uniform(5, 40)
    else:
        noise, snr_db = draw_babble(len(audio), other, rng), rng.uniform(10, 35)
    return (audio + noise * compute_level(audio) * 10 ** (-snr_db / 20)).astype(np.float32)


def augment(audio: Array, other: Sequence[Clip], rng: Rng) -> Array:
    """Simulate a random room, microphone, noise and level; the times of the words do not change."""
    if rng.random() < 0.2:
        audio = reverberate(audio, rng)
    if rng.random() < 0.5:
        audio = equalise(audio, rng)
    noise_first = rng.random() < 0.5
    if noise_first and rng.random() < 0.7:
        audio = add_noise(audio, other, rng)
    if rng.random() < 0.3:
        audio = limit_band(audio, rng)
    if not noise_first and rng.random() < 0.7:
        audio = add_noise(audio, other, rng)
    peak = 10 ** (rng.uniform(-30, -0.5) / 20)
    return (audio * (peak / max(float(np.abs(audio).max()), 1e-6))).astype(np.float32)


def draw_clips(voices: Voices, count: int, rng: Rng) -> list[Clip]:
    """Draw clips with a given total number of digits.

    With probability `MIXED_SPEAKERS_SHARE` every clip has a random speaker and speed. Otherwise all clips have one
    speaker and approximately one speed.

    Args:
        voices: the recordings.
        count: approximate number of digits.
        rng: random generator.
    """
    if rng.random() < LINE_SHARE and count > 2:
        # a line has about four digits
        recordings, num_clips, speed_range = voices.lines, max(1, round(count / 4)), (0.7, 1.15)
    else:
        recordings, num_clips, speed_range = voices.digits, count, (0.8, 1.25)
    speakers = list(recordings.values())
    is_mixed = rng.random() < MIXED_SPEAKERS_SHARE
    speaker_clips, speed = speakers[rng.integers(len(speakers))], rng.uniform(*speed_range)
    drawn_clips = []
    for _ in range(num_clips):
        if is_mixed:
            speaker_clips, speed = speakers[rng.integers(len(speakers))], rng.uniform(*speed_range)
        jitter = rng.uniform(0.96, 1.04)
        drawn_clips.append(change_speed(speaker_clips[rng.integers(len(speaker_clips))], speed * jitter))
    return drawn_clips


def draw_audio_without_digits(voices: Voices, length: int, rng: Rng) -> Array:
    """Draw at most `length` samples without digits: other speech (probability 3/4) or noise."""
    if rng.random() < 0.25:
        return draw_coloured_noise(length, rng)
    clip = change_speed(voices.other[rng.integers(len(voices.other))], rng.uniform(0.75, 1.15))
    start = rng.integers(max(1, len(clip.audio) - length + 1))
    return clip.audio[start : start + length]


def get_word_times(string: DigitString) -> list[tuple[float, float]] | None:
    """Return the start and end of every word in seconds; None if a span has several words."""
    if any(" " in span.text for span in string.spans):
        return None
    return [(span.start_s, span.end_s) for span in string.spans]


class TrainingExamples:
    """A map-style dataset of augmented strings; each example depends only on the seed and the index.

    The examples of one batch have similar numbers of digits, so batches have little padding. The first batches repeat a
    few clean batches, because otherwise the model emits only blanks for a long time. After that, the share of augmented
    examples rises gradually.

    Args:
        voices: the recordings.
        size: number of examples.
        batch_size: number of examples per batch; the examples must be read in order.
        seed: random seed.
    """

    def __init__(self, voices: Voices, size: int, batch_size: int, seed: int) -> None:
        self.voices = voices
        self.size = size
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, object]:
        """Create one example.

        Returns:
            `audio`, (S,) float32 samples; `text`, the transcript, which is empty for a tenth of the examples; `spans`,
            the start and end of every word in seconds (None if unknown); and `seed`, the random seed for masking
            features (None for no masking).
        """
        batch = index // self.batch_size
        augmented_share = (batch - REPEATING_BATCHES) / RAMP_BATCHES
        if augmented_share < 0:
            batch %= REPEATED_BATCHES
            index %= REPEATED_BATCHES * self.batch_size
        rng = np.random.default_rng((self.seed, 1, index))
        is_augmented = rng.random() < augmented_share
        count = self.draw_count(batch, rng)
        if is_augmented and rng.random() < NO_DIGIT_SHARE:
            # about as long as a string of `count` digits
            length = int((0.5 + 0.7 * count) * SAMPLE_RATE)
            audio, text, spans = draw_audio_without_digits(self.voices, length, rng), "", []
        else:
            string = join_clips(draw_clips(self.voices, count, rng), rng, floor_db=rng.uniform(30, 65))
            audio, text, spans = string.audio, string.text, get_word_times(string)
        if is_augmented:
            audio = augment(audio, self.voices.other, rng)
        mask_seed = int(rng.integers(2**31)) if is_augmented else None
        return {"audio": audio, "text": text, "spans": spans, "seed": mask_seed}

    def draw_count(self, batch: int, rng: Rng) -> int:
        """Draw the number of digits of an example; the numbers within a batch differ by at most 2."""
        batch_rng = np.random.default_rng((self.seed, 0, batch))
        centre = batch_rng.integers(1, batch_rng.choice([5, 10]))
        return int(np.clip(centre + rng.integers(-1, 2), 1, 9))


def build_clip_entry(name: str, text: str, source: str, licence: str, speaker: str) -> dict[str, str]:
    """Build the manifest entry of a demo clip."""
    return {"file": name, "text": text, "source": source, "licence": licence, "speaker": speaker}


def write_flac(path: Path, audio: Array) -> None:
    """Write (S,) samples as a FLAC file with 16 kHz and 16 bits."""
    soundfile.write(path, np.clip(audio, -1, 1), SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)


def write_string_clips(data: Path, folder: Path, split: str, number: int) -> list[dict[str, str]]:
    """Write strings of digits from fsdd as demo clips, and return the manifest entries of the clips."""
    entries = []
    for index, string in enumerate(
        create_evaluation_strings(read_digit_recordings(data, split), number, CLIP_SEED, longest=4)
    ):
        name = f"fsdd_{split}_{index}_{string.speaker.removeprefix('fsdd-')}.flac"
        write_flac(folder / name, string.audio)
        source = f"Free Spoken Digit Dataset, {split}: recordings {', '.join(string.sources)} joined with pauses"
        entries.append(build_clip_entry(name, string.text, source, "CC BY-SA 4.0", string.speaker))
    return entries


def write_line_clips(data: Path, folder: Path, number: int) -> list[dict[str, str]]:
    """Write random short digit lines of speechocean762 as demo clips, and return the manifest entries of the clips."""
    lines = [clip for clip in read_digit_lines(data, "test") if len(clip.audio) < MAX_LINE_S * SAMPLE_RATE]
    entries = []
    for index in np.random.default_rng(CLIP_SEED).permutation(len(lines))[:number]:
        clip = lines[index]
        name = f"speechocean_{clip.name}.flac"
        write_flac(folder / name, clip.audio)
        source = f"speechocean762, test: utterance {clip.name}"
        entries.append(build_clip_entry(name, clip.text, source, "Apache-2.0 on the authors' card", clip.speaker))
    return entries


def write_counting_clip(data: Path, folder: Path) -> dict[str, str]:
    """Write the only fluent adult recording in the data as a demo clip, and return the manifest entry of the clip."""
    name = "one_two_three_mono_16_bit_44k.aiff"
    audio, rate = soundfile.read(data / "smoke_clips" / name, dtype="float32")
    write_flac(folder / "one_two_three.flac", resample(audio, rate, SAMPLE_RATE))
    source = f"SpeechRecognition (Uberi/speech_recognition), {name}, resampled"
    return build_clip_entry("one_two_three.flac", "one two three", source, "BSD-3-Clause", "unknown adult")


def write_clips(data: Path, folder: Path) -> None:
    """Write the eight held-out demo clips and the manifest; a random seed selects the clips, without any model."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = write_string_clips(data, folder, "dev", 3) + write_string_clips(data, folder, "test", 3)
    entries += write_line_clips(data, folder, 1)
    entries.append(write_counting_clip(data, folder))
    (folder / "manifest.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the demo clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with packed speech: fsdd, speechocean762, smoke_clips"
    )
    parser.add_argument("--clips", type=Path, required=True, help="folder to write the clips to")
    options = parser.parse_args()
    write_clips(options.data, options.clips)


if __name__ == "__main__":
    main()
