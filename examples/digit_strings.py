"""Knows how to read the packed speech data and to build strings of spoken digits with known digit boundaries.

It leaves tokens, features and training to `train_demo.py`.
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
FADE_S = 0.005
CLIPS_SEED = 0
# keeps the written clips small
LONGEST_LINE_S = 2.8
SILENT_SHARE = 0.1
MIXED_SPEAKERS_SHARE = 0.15
LINE_SHARE = 0.25
# the first 400 batches go through the same 20 clean ones; over the next 1600 more and more items are augmented
REPEATING_BATCHES, REPEATED_BATCHES, RAMP_BATCHES = 400, 20, 1600

Array = NDArray[Any]
Rng = np.random.Generator
Row = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """One recording: `audio` (S,) float32 at 16 kHz and the words in it."""

    audio: Array
    text: str
    speaker: str
    name: str


@dataclass(frozen=True)
class Span:
    """Where the words of one clip lie in a string, in seconds."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class DigitString:
    """Clips joined with pauses: `audio` (S,) float32 at 16 kHz, one span per clip (for fsdd: one per digit)."""

    audio: Array
    spans: tuple[Span, ...]
    speaker: str
    sources: tuple[str, ...]

    @property
    def text(self) -> str:
        """Join the words of all spans."""
        return " ".join(span.text for span in self.spans)


@dataclass(frozen=True)
class Voices:
    """All training recordings in memory."""

    digits: dict[str, list[Clip]]
    lines: dict[str, list[Clip]]
    other: list[Clip]


def resample(audio: Array, from_rate: float, to_rate: float) -> Array:
    """Return `audio` (S,) at another rate; the same array where the rates agree."""
    return audio if from_rate == to_rate else soxr.resample(audio, from_rate, to_rate).astype(np.float32)


def read_clips(folder: Path, keep: Callable[[Row], bool]) -> list[Clip]:
    """Decode the recordings of one data folder whose manifest line satisfies `keep`.

    Args:
        folder: holds `manifest.jsonl` and the tar files that it names.
        keep: predicate over a manifest line.

    Returns:
        The clips in the order of the manifest.
    """
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return [read_clip(folder, row) for row in rows if keep(row)]


def read_clip(folder: Path, row: Row) -> Clip:
    """Decode the recording of one manifest line to 16 kHz."""
    with (folder / row["tar"]).open("rb") as tar:
        tar.seek(row["offset"])
        audio, rate = soundfile.read(io.BytesIO(tar.read(row["nbytes"])), dtype="float32")
    return Clip(resample(audio, rate, SAMPLE_RATE), row["text"], row["speaker"], row["id"])


def only_digits(text: str) -> bool:
    """Say whether every word of `text` is a digit."""
    return all(word in DIGITS for word in text.split())


def fsdd_clips(data: Path, split: str) -> list[Clip]:
    """Read the single digits of fsdd; `split` is `train`, `dev` (same four speakers) or `test` (theo, unseen)."""
    return read_clips(data / "fsdd", lambda row: row["split"] == split)


def digit_lines(data: Path, split: str) -> list[Clip]:
    """Read the lines of speechocean762 that hold digit words only."""
    return read_clips(data / "speechocean762", lambda row: row["split"] == split and only_digits(row["text"]))


def other_lines(data: Path, split: str) -> list[Clip]:
    """Read the lines of speechocean762 without any digit word."""
    return read_clips(
        data / "speechocean762", lambda row: row["split"] == split and not set(row["text"].split()) & set(DIGITS)
    )


def by_speaker(clips: Iterable[Clip]) -> dict[str, list[Clip]]:
    """Group clips by speaker, keeping their order."""
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.speaker, []).append(clip)
    return groups


def training_voices(data: Path) -> Voices:
    """Read everything that the demo model is trained on: train splits only."""
    return Voices(
        by_speaker(fsdd_clips(data, "train")), by_speaker(digit_lines(data, "train")), other_lines(data, "train")
    )


def fade(audio: Array) -> Array:
    """Ramp both ends over 5 ms, so that a cut does not click."""
    ramp = np.ones_like(audio)
    width = min(int(FADE_S * SAMPLE_RATE), len(audio) // 2)
    ramp[:width] = np.linspace(0, 1, width)
    ramp[len(audio) - width :] = np.linspace(1, 0, width)
    return audio * ramp


def draw_pause(rng: Rng) -> float:
    """Draw a pause in seconds: mostly 0.05 to 0.5, one in four close to none."""
    return float(rng.uniform(0.0, 0.03) if rng.random() < 0.25 else rng.uniform(0.05, 0.5))


def join(clips: Sequence[Clip], rng: Rng, floor_db: float = 50.0) -> DigitString:
    """Join clips with random pauses over a low noise floor.

    Args:
        clips: at least one clip; levels are varied by up to 3 dB.
        rng: source of the pauses, levels and noise.
        floor_db: how far the noise lies below the level of the speech.

    Returns:
        The string with the true place of every clip.
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
    noise = rng.standard_normal(len(audio)) * loudness(audio) * 10 ** (-floor_db / 20)
    speakers = dict.fromkeys(clip.speaker for clip in clips)
    return DigitString(
        (audio + noise).astype(np.float32), tuple(spans), "+".join(speakers), tuple(clip.name for clip in clips)
    )


def evaluation_strings(
    clips: Sequence[Clip], number: int, seed: int, shortest: int = 3, longest: int = 7
) -> list[DigitString]:
    """Build `number` strings of one speaker each from a fixed seed, without augmentation."""
    rng = np.random.default_rng(seed)
    speakers = list(by_speaker(clips).values())
    strings = []
    for _ in range(number):
        pool = speakers[rng.integers(len(speakers))]
        count = rng.integers(shortest, longest + 1)
        chosen = [pool[i] for i in rng.integers(len(pool), size=count)]
        strings.append(scale_peak(join(chosen, rng), 0.5))
    return strings


def scale_peak(string: DigitString, peak: float) -> DigitString:
    """Scale a string to an absolute peak."""
    audio = string.audio * (peak / max(float(np.abs(string.audio).max()), 1e-6))
    return DigitString(audio.astype(np.float32), string.spans, string.speaker, string.sources)


def loudness(audio: Array) -> float:
    """Return the root mean square of `audio` where it is not silent."""
    loud = audio[np.abs(audio) > 1e-4]
    return float(np.sqrt(np.mean(loud**2))) if len(loud) else 1e-3


def change_speed(clip: Clip, speed: float) -> Clip:
    """Play a clip faster (`speed` > 1) or slower; its pitch and its vocal tract change with it."""
    return Clip(resample(clip.audio, SAMPLE_RATE * speed, SAMPLE_RATE), clip.text, clip.speaker, clip.name)


def filter_audio(audio: Array, gain: Callable[[Array], Array]) -> Array:
    """Multiply the spectrum of `audio` by `gain` over frequency in Hz."""
    size = fast_size(len(audio))
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum = np.fft.rfft(audio.astype(np.float32), size) * gain(frequencies).astype(np.float32)
    return np.fft.irfft(spectrum, size)[: len(audio)].astype(np.float32)


def fast_size(length: int) -> int:
    """Return the next multiple of 4096: prime lengths make the Fourier transform ten times slower."""
    return -(-length // 4096) * 4096


def equalise(audio: Array, rng: Rng) -> Array:
    """Colour the audio as another microphone would: random gains within 8 dB, smooth over log frequency."""
    knots = np.log([60, 250, 700, 1500, 2500, 4000, 8000])
    gains_db = rng.uniform(-8, 8, size=len(knots))
    return filter_audio(audio, lambda f: 10 ** (np.interp(np.log(f + 1), knots, gains_db) / 20))


def limit_band(audio: Array, rng: Rng) -> Array:
    """Keep a telephone's band: about 200 Hz to 3.6 kHz, slopes of random width."""
    low, high = rng.uniform(60, 320), rng.uniform(3000, 4000)
    width = rng.uniform(20, 150)
    return filter_audio(audio, lambda f: step((f - low) / 20) * step((high - f) / width))


def step(x: Array) -> Array:
    """Rise smoothly from 0 to 1 around 0."""
    return 0.5 * (1 + np.tanh(x / 2))


def reverberate(audio: Array, rng: Rng) -> Array:
    """Add the decaying tail of a small room."""
    decay_s = rng.uniform(0.1, 0.4)
    time = np.arange(int(decay_s * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * np.exp(-6.9 * time / decay_s)
    tail *= rng.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    size = fast_size(len(audio) + len(tail))
    wet = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(tail, size), size)[: len(audio)]
    return (audio + wet).astype(np.float32)


def coloured_noise(length: int, rng: Rng) -> Array:
    """Draw noise between white (slope 0) and brown (slope 1) with unit level."""
    slope = rng.choice([0.0, 0.5, 1.0])
    noise = filter_audio(rng.standard_normal(length), lambda f: (f + 20.0) ** -slope)
    return noise / float(np.sqrt(np.mean(noise**2)))


def babble(length: int, other: Sequence[Clip], rng: Rng) -> Array:
    """Mix three to six voices that say other things, with unit level."""
    mix = np.zeros(length, np.float32)
    for _ in range(rng.integers(3, 7)):
        audio = other[int(rng.integers(len(other)))].audio
        mix += np.resize(np.roll(audio, rng.integers(len(audio))), length) / loudness(audio)
    return mix / max(float(np.sqrt(np.mean(mix**2))), 1e-6)


def add_noise(audio: Array, other: Sequence[Clip], rng: Rng) -> Array:
    """Add coloured noise (two in three) or babble at a random distance in dB below the speech."""
    if rng.random() < 0.67:
        noise, distance_db = coloured_noise(len(audio), rng), rng.uniform(5, 40)
    else:
        noise, distance_db = babble(len(audio), other, rng), rng.uniform(10, 35)
    return (audio + noise * loudness(audio) * 10 ** (-distance_db / 20)).astype(np.float32)


def augment(audio: Array, other: Sequence[Clip], rng: Rng) -> Array:
    """Vary the room, the microphone, the noise and the level; the timing stays."""
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
    """Draw clips with about `count` digits in all, of one speaker at one speed, now and then of several."""
    if rng.random() < LINE_SHARE and count > 2:
        pool, number, speeds = voices.lines, max(1, round(count / 4)), (0.7, 1.15)
    else:
        pool, number, speeds = voices.digits, count, (0.8, 1.25)
    speakers = list(pool.values())
    mixed = rng.random() < MIXED_SPEAKERS_SHARE
    speaker, speed = speakers[rng.integers(len(speakers))], rng.uniform(*speeds)
    chosen = []
    for _ in range(number):
        if mixed:
            speaker, speed = speakers[rng.integers(len(speakers))], rng.uniform(*speeds)
        jitter = rng.uniform(0.96, 1.04)
        chosen.append(change_speed(speaker[rng.integers(len(speaker))], speed * jitter))
    return chosen


def draw_silent(voices: Voices, length: int, rng: Rng) -> Array:
    """Draw audio that holds no digit: other speech (three in four) or noise alone, at most `length` samples."""
    if rng.random() < 0.25:
        return coloured_noise(length, rng)
    clip = change_speed(voices.other[rng.integers(len(voices.other))], rng.uniform(0.75, 1.15))
    start = rng.integers(max(1, len(clip.audio) - length + 1))
    return clip.audio[start : start + length]


def word_spans(string: DigitString) -> list[tuple[float, float]] | None:
    """Return start and end of every word in seconds, if every span is one word; else `None`."""
    if any(" " in span.text for span in string.spans):
        return None
    return [(span.start_s, span.end_s) for span in string.spans]


class TrainingExamples:
    """A map-style dataset of augmented strings; an item depends on the seed and its index only.

    The items of one batch have a similar number of digits, so that little of a batch is padding. The first batches
    repeat a few clean ones, without which a model stays on blanks; augmentation and silence then come in gradually.
    """

    def __init__(self, voices: Voices, size: int, batch_size: int, seed: int) -> None:
        self.voices = voices
        self.size = size
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, object]:
        """Build one example.

        Returns:
            `audio` (S,) float32, its `text` (empty for a tenth), `spans`: start and end of every word in seconds or
            `None` where they are not known, and a `seed` for masking the features, if any.
        """
        batch = index // self.batch_size
        hardness = (batch - REPEATING_BATCHES) / RAMP_BATCHES
        if hardness < 0:
            batch %= REPEATED_BATCHES
            index %= REPEATED_BATCHES * self.batch_size
        rng = np.random.default_rng((self.seed, 1, index))
        hard = rng.random() < hardness
        count = self.draw_count(batch, rng)
        if hard and rng.random() < SILENT_SHARE:
            audio, text, spans = draw_silent(self.voices, int((0.5 + 0.7 * count) * SAMPLE_RATE), rng), "", []
        else:
            string = join(draw_clips(self.voices, count, rng), rng, floor_db=rng.uniform(30, 65))
            audio, text, spans = string.audio, string.text, word_spans(string)
        if hard:
            audio = augment(audio, self.voices.other, rng)
        return {"audio": audio, "text": text, "spans": spans, "seed": int(rng.integers(2**31)) if hard else None}

    def draw_count(self, batch: int, rng: Rng) -> int:
        """Draw the number of digits, close to that of the other items of the batch."""
        batch_rng = np.random.default_rng((self.seed, 0, batch))
        centre = batch_rng.integers(1, batch_rng.choice([5, 10]))
        return int(np.clip(centre + rng.integers(-1, 2), 1, 9))


def clip_entry(name: str, text: str, source: str, licence: str, speaker: str) -> dict[str, str]:
    """Describe one written clip."""
    return {"file": name, "text": text, "source": source, "licence": licence, "speaker": speaker}


def write_flac(path: Path, audio: Array) -> None:
    """Write `audio` (S,) as 16 kHz, 16 bit FLAC."""
    soundfile.write(path, np.clip(audio, -1, 1), SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)


def write_string_clips(data: Path, folder: Path, split: str, number: int) -> list[dict[str, str]]:
    """Write the first strings of a seeded draw from fsdd."""
    entries = []
    for index, string in enumerate(evaluation_strings(fsdd_clips(data, split), number, CLIPS_SEED, longest=4)):
        name = f"fsdd_{split}_{index}_{string.speaker.removeprefix('fsdd-')}.flac"
        write_flac(folder / name, string.audio)
        source = f"Free Spoken Digit Dataset, {split}: recordings {', '.join(string.sources)} joined with pauses"
        entries.append(clip_entry(name, string.text, source, "CC BY-SA 4.0", string.speaker))
    return entries


def write_line_clips(data: Path, folder: Path, number: int) -> list[dict[str, str]]:
    """Write the first of a seeded shuffle of the short digit lines of speechocean762, unmodified."""
    lines = [clip for clip in digit_lines(data, "test") if len(clip.audio) < LONGEST_LINE_S * SAMPLE_RATE]
    entries = []
    for index in np.random.default_rng(CLIPS_SEED).permutation(len(lines))[:number]:
        clip = lines[index]
        name = f"speechocean_{clip.name}.flac"
        write_flac(folder / name, clip.audio)
        source = f"speechocean762, test: utterance {clip.name}"
        entries.append(clip_entry(name, clip.text, source, "Apache-2.0 on the authors' card", clip.speaker))
    return entries


def write_counting_clip(data: Path, folder: Path) -> dict[str, str]:
    """Write the one fluent line of an adult that the data holds."""
    name = "one_two_three_mono_16_bit_44k.aiff"
    audio, rate = soundfile.read(data / "smoke_clips" / name, dtype="float32")
    write_flac(folder / "one_two_three.flac", resample(audio, rate, SAMPLE_RATE))
    source = f"SpeechRecognition (Uberi/speech_recognition), {name}, resampled"
    return clip_entry("one_two_three.flac", "one two three", source, "BSD-3-Clause", "unknown adult")


def write_clips(data: Path, folder: Path) -> None:
    """Write eight held-out clips and their manifest; a seed chooses them, not a model."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = write_string_clips(data, folder, "dev", 3) + write_string_clips(data, folder, "test", 3)
    entries += write_line_clips(data, folder, 1)
    entries.append(write_counting_clip(data, folder))
    (folder / "manifest.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the demo clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the speech data")
    parser.add_argument("--clips", type=Path, required=True, help="folder to write the clips to")
    options = parser.parse_args()
    write_clips(options.data, options.clips)


if __name__ == "__main__":
    main()
