"""Measures what beam search, a language model and phrase boosting change in the word errors of the demo model.

    python benchmarks/search_accuracy.py DATA [--strings 200]

DATA is a folder with packed speech, of which the dev and test splits of fsdd are used. The clips are strings of spoken
digits, joined from recordings of single digits by `examples/digit_strings.py`:

- dates: year from 1950 to 2029, month, day, as eight digits; the n-gram model is trained on other dates;
- phone numbers: one of 40 area codes of three digits, then seven random digits; the n-gram model is trained on other
  numbers with the same area codes;
- phrases: random digits with one of ten phrases of four digits, which are boosted, and random digits without them.

Weights of n-gram models are chosen on the dev split, whose speakers the model knows. Word errors and recall are those
of the test split, whose speaker the model does not know. The recall is the number of clips whose phrase is in the text.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from digit_strings import DIGITS, Clip, DigitString, group_by_speaker, join_clips, read_digit_recordings, scale_to_peak
from train_ngram import train, write_arpa

from transformers_parakeet import demo_model_path
from transformers_parakeet.transcription import load_pipeline

DECODERS = ("transducer", "ctc")
BATCH_SIZE = 16
# each digit is one token and one word
NUM_TRAINING_STRINGS, NGRAM_ORDER = 20_000, 5
NUM_AREA_CODES, NUM_PHRASES, PHRASE_LENGTH = 40, 10, 4
LM_WEIGHTS = (0.1, 0.2, 0.4, 0.8)
BOOSTING_WEIGHTS = (0.0, 0.25, 0.5, 1.0)

Rng = np.random.Generator


def draw_date(rng: Rng) -> str:
    """Draw a date and return its eight digits."""
    first = datetime.date(1950, 1, 1)
    num_days = (datetime.date(2029, 12, 31) - first).days
    return (first + datetime.timedelta(days=int(rng.integers(num_days + 1)))).strftime("%Y%m%d")


def draw_digits(rng: Rng, length: int) -> str:
    """Draw independent digits."""
    return "".join(map(str, rng.integers(10, size=length)))


def draw_phone_number(rng: Rng) -> str:
    """Draw a phone number: an area code, then seven digits."""
    codes = np.random.default_rng(99)
    area_codes = [draw_digits(codes, 3) for _ in range(NUM_AREA_CODES)]
    return area_codes[rng.integers(NUM_AREA_CODES)] + draw_digits(rng, 7)


def draw_phrases() -> list[str]:
    """Draw the phrases that are boosted; each is a string of digits."""
    rng = np.random.default_rng(7)
    return [draw_digits(rng, PHRASE_LENGTH) for _ in range(NUM_PHRASES)]


def draw_string_with_phrase(rng: Rng) -> str:
    """Draw one of the phrases with one to three random digits on each side."""
    phrases = draw_phrases()
    before, after = rng.integers(1, 4, size=2)
    return draw_digits(rng, before) + phrases[rng.integers(NUM_PHRASES)] + draw_digits(rng, after)


def draw_string_without_phrase(rng: Rng) -> str:
    """Draw six to ten random digits without any of the phrases."""
    while True:
        digits = draw_digits(rng, int(rng.integers(6, 11)))
        if not any(phrase in digits for phrase in draw_phrases()):
            return digits


def to_words(digits: str) -> str:
    """Return the words of digits, for example `one two` for `12`."""
    return " ".join(DIGITS[int(digit)] for digit in digits)


def speak(digits: Sequence[str], recordings: Sequence[Clip], rng: Rng) -> list[DigitString]:
    """Join recordings to strings of digits, each by one speaker.

    Args:
        digits: the strings.
        recordings: recordings of single digits.
        rng: random generator for speakers, recordings and pauses.
    """
    speakers = [
        {word: [clip for clip in clips if clip.text == word] for word in DIGITS}
        for clips in group_by_speaker(recordings).values()
    ]
    strings = []
    for string in digits:
        clips_of_word = speakers[rng.integers(len(speakers))]
        words = [clips_of_word[word] for word in to_words(string).split()]
        strings.append(scale_to_peak(join_clips([clips[rng.integers(len(clips))] for clips in words], rng), 0.5))
    return strings


def recognise(pipe: Any, strings: Sequence[DigitString], decoder: str, **options: Any) -> list[str]:
    """Recognise strings with one decoder; `options` are arguments of the pipeline and of `generate`."""
    audio = [{"raw": string.audio, "sampling_rate": 16_000} for string in strings]
    return [result["text"] for result in pipe(audio, batch_size=BATCH_SIZE, decoder=decoder, **options)]


def count_errors(strings: Sequence[DigitString], texts: Sequence[str]) -> int:
    """Count the word errors of recognised texts."""
    measures = jiwer.process_words([string.text for string in strings], list(texts))
    return measures.substitutions + measures.deletions + measures.insertions


def choose_weight(
    pipe: Any, strings: Sequence[DigitString], decoder: str, name: str, weights: Any, **options: Any
) -> Any:
    """Return the weight with the fewest word errors.

    Args:
        pipe: the pipeline.
        strings: strings of the dev split.
        decoder: the decoder.
        name: name of the argument of `generate`.
        weights: values to try; the first of equally good values is chosen.
        **options: further arguments.
    """
    errors = [
        count_errors(strings, recognise(pipe, strings, decoder, **options, **{name: weight})) for weight in weights
    ]
    return weights[int(np.argmin(errors))]


def print_row(title: str, strings: Sequence[DigitString], texts: Sequence[str], note: str = "") -> None:
    """Print the word error rate of one row."""
    num_words = sum(len(string.spans) for string in strings)
    errors = count_errors(strings, texts)
    print(f"| {title} | {errors} of {num_words} | {100 * errors / num_words:.2f} % | {note} |", flush=True)


def measure_grammar(pipe: Any, draw: Any, name: str, recordings: dict[str, list[Clip]], number: int) -> None:
    """Measure greedy decoding and beam search with and without an n-gram model, on one kind of string.

    Args:
        pipe: the pipeline.
        draw: function of a random generator that draws a string of digits.
        name: name of the kind of string.
        recordings: recordings of single digits of each split.
        number: number of strings of each split.
    """
    language_models = train_language_models(pipe.processor, draw)
    strings = {}
    for seed, split in enumerate(("dev", "test"), start=2):
        rng = np.random.default_rng(seed)
        strings[split] = speak([draw(rng) for _ in range(number)], recordings[split], rng)
    for decoder in DECODERS:
        for beams in (1, 4):
            search = f"{name}, {decoder}, " + ("greedy" if beams == 1 else f"beam {beams}")
            print_row(search, strings["test"], recognise(pipe, strings["test"], decoder, num_beams=beams))
            for units, language_model in language_models.items():
                options = {"num_beams": beams, "language_model": language_model}
                weight = choose_weight(pipe, strings["dev"], decoder, "lm_weight", LM_WEIGHTS, **options)
                texts = recognise(pipe, strings["test"], decoder, **options, lm_weight=weight)
                print_row(f"{search}, n-grams of {units}", strings["test"], texts, f"`lm_weight` {weight}")


def train_language_models(processor: Any, draw: Any) -> dict[str, Any]:
    """Train n-gram models of tokens and of words on random strings of digits.

    Args:
        processor: the processor, whose tokenizer divides words into tokens.
        draw: function of a random generator that draws a string of digits.
    """
    rng = np.random.default_rng(1)
    lines = [to_words(draw(rng)) for _ in range(NUM_TRAINING_STRINGS)]
    sentences = {"tokens": [processor.tokenizer.tokenize(line) for line in lines], "words": map(str.split, lines)}
    language_models = {}
    with tempfile.TemporaryDirectory() as folder:
        for units, unit_sentences in sentences.items():
            path = Path(folder) / f"{units}.arpa"
            write_arpa(train(unit_sentences, NGRAM_ORDER), path)
            language_models[units] = processor.load_language_model(path)
    return language_models


def measure_boosting(pipe: Any, recordings: dict[str, list[Clip]], number: int) -> None:
    """Measure phrase boosting on clips with and without the phrases.

    Args:
        pipe: the pipeline.
        recordings: recordings of single digits of each split.
        number: number of strings with a phrase, and number of strings without.
    """
    tree = pipe.processor.boosting_tree([to_words(phrase) for phrase in draw_phrases()])
    rng = np.random.default_rng(5)
    with_phrase = speak([draw_string_with_phrase(rng) for _ in range(number)], recordings["test"], rng)
    without_phrase = speak([draw_string_without_phrase(rng) for _ in range(number)], recordings["test"], rng)
    for decoder in DECODERS:
        for beams in (1, 4):
            search = f"{decoder}, " + ("greedy" if beams == 1 else f"beam {beams}")
            for weight in BOOSTING_WEIGHTS:
                options = {"num_beams": beams, "boosting": tree, "boosting_weight": weight}
                texts = recognise(pipe, with_phrase, decoder, **options)
                recall = f"`boosting_weight` {weight}, recall {count_recalled(with_phrase, texts)} of {len(texts)}"
                print_row(f"{search}, with a phrase", with_phrase, texts, recall)
                texts = recognise(pipe, without_phrase, decoder, **options)
                print_row(f"{search}, without", without_phrase, texts, f"`boosting_weight` {weight}")


def count_recalled(strings: Sequence[DigitString], texts: Sequence[str]) -> int:
    """Count the clips whose text contains the phrase of the clip."""
    phrases = [to_words(phrase) for phrase in draw_phrases()]
    return sum(
        all(phrase in text for phrase in phrases if phrase in string.text)
        for string, text in zip(strings, texts, strict=True)
    )


def main() -> None:
    """Print one table for each kind of string."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with packed speech")
    parser.add_argument("--strings", type=int, default=200, help="number of strings of each kind and split")
    parser.add_argument("--only", choices=("dates", "phone numbers", "phrases"), help="measure one kind of string")
    args = parser.parse_args()
    pipe = load_pipeline(str(demo_model_path()), dtype="float32")
    recordings = {split: read_digit_recordings(args.data, split) for split in ("dev", "test")}
    print(f"torch {torch.__version__}, {platform.machine()}, {args.strings} strings of each kind\n")
    print("| strings and search | word errors | WER | settings |\n| --- | --- | --- | --- |")
    for name, draw in (("dates", draw_date), ("phone numbers", draw_phone_number)):
        if args.only in (None, name):
            measure_grammar(pipe, draw, name, recordings, args.strings)
    if args.only in (None, "phrases"):
        measure_boosting(pipe, recordings, args.strings)


if __name__ == "__main__":
    main()
