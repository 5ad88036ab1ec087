"""Evaluate the demo model on held-out strings of spoken digits, and write its model card.

The model is trained in `train_demo.py`; the strings are created in `digit_strings.py`.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jiwer
import torch
import transformers
from digit_strings import (
    SAMPLE_RATE,
    Array,
    DigitString,
    Span,
    create_evaluation_strings,
    read_digit_lines,
    read_digit_recordings,
    read_lines_without_digits,
)
from transformers import pipeline

from transformers_parakeet import ParakeetForTDT, ParakeetProcessor

EVALUATION_SEED = 2026
NUM_EVALUATION_STRINGS = 400
# maximum error in seconds of the start and of the end of a correctly timed word
TIME_TOLERANCE_S = 0.15
CARD = """\
---
license: cc-by-sa-4.0
language: en
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [parakeet, tdt, ctc, digits, demo]
---

# digits-tdt-ctc: a demonstration model

A hybrid TDT-CTC Parakeet with {parameters:,} parameters that recognises strings of the English digits zero to nine,
16 kHz mono. It demonstrates and tests `transformers_parakeet` on real speech without a download. Intended use:
demonstration only. The model knows ten words; for other speech, noise and silence it gives empty text most of the time,
but not always.

## Scores

| held-out audio | lines | words | TDT word error rate | CTC word error rate | TDT words timed right |
| --- | --- | --- | --- | --- | --- |
{rows}

Greedy decoding, `jiwer.wer`, all lines of a row pooled. The fsdd strings are {number} draws per split with seed {seed}:
one speaker, three to seven recordings of the split joined with pauses of 0 to 0.5 s, no augmentation. "Timed right" is
the share of correct words whose start and end are both within {tolerance} s of the start and end of the recording in
the string. The digit lines of speechocean762 are unmodified. All are by children of six to nine with errors of
pronunciation; there are few, and the model often takes them for other speech and gives empty text. Of the {other} lines
of its dev split without any digit, {silent} give empty text. To repeat:

    python examples/train_demo.py --data DATA --evaluate FOLDER

## Training

`{command}`: {steps:,} updates of {batch_size} strings from random weights with `transformers.Trainer`, seed {run_seed},
cosine schedule; {minutes:.0f} minutes on one core of a shared CPU; {date}, Python {python}, torch {torch}, transformers
{transformers}. The last weights are kept. The loss is that of the model, 0.7 of TDT and 0.3 of CTC, plus {weight} of an
alignment loss: the times of the joined recordings are known, so the TDT head also learns to emit every digit where it
starts, with its duration. Data: the train splits only, augmented (speed, rooms, equalisation, telephone band, noise,
babble, masking); a tenth of the examples are other speech or noise with empty text.

## Data, licences, attribution

- Free Spoken Digit Dataset (`Jakobovski/free-spoken-digit-dataset`, commit 26eb9aa), (c) Zohar Jackson and its
  contributors, CC BY-SA 4.0, <https://creativecommons.org/licenses/by-sa/4.0/>. Four speakers in train and dev; theo is
  test. Changed here: resampled to 16 kHz, joined into strings. The `fsdd_*` clips, being adapted, keep that licence.
- speechocean762 (`jimbozhang/speechocean762`, commit 613968e), J. Zhang et al., "speechocean762: An Open-Source
  Non-native English Speech Corpus For Pronunciation Assessment", Interspeech 2021, arXiv:2104.01378; free for
  commercial and non-commercial use, Apache-2.0 on the authors' card. Split by speaker.
- `clips/one_two_three.flac` is from SpeechRecognition (`Uberi/speech_recognition`), not trained on, (c) 2014- Anthony
  Zhang, BSD-3-Clause: redistribution is permitted with this notice; it is provided by the copyright holders and
  contributors "as is", any express or implied warranties are disclaimed, and they are not liable for any damages
  arising from its use; their names may not be used to endorse products without permission.

The clips are held out from training. A seed selected each of them (`examples/digit_strings.py --clips FOLDER`). The
number of clips of each kind was chosen by hand: there is one of the children's lines, most of which the model misses.
"""


def transcribe(
    model: ParakeetForTDT, processor: ParakeetProcessor, audios: Sequence[Array], decoder: str
) -> list[dict[str, Any]]:
    """Transcribe clips greedily with the transducer or the CTC head.

    Args:
        model: the model; it is put into eval mode.
        processor: processor of the model.
        audios: (S,) float32 samples of each clip at 16 kHz.
        decoder: `transducer` or `ctc`.

    Returns:
        For each clip a dict with `text` and the word `chunks`.
    """
    pipe = pipeline(
        "automatic-speech-recognition",
        model=model.eval(),
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    inputs = [{"raw": audio, "sampling_rate": SAMPLE_RATE} for audio in audios]
    return pipe(inputs, batch_size=16, return_timestamps="word", generate_kwargs={"decoder": decoder})


def count_timed_words(string: DigitString, result: dict[str, Any]) -> tuple[int, int]:
    """Count the correct words of a hypothesis, and the correctly timed words among them.

    Args:
        string: the reference, with the start and end of every word.
        result: the hypothesis, with word `chunks`.

    Returns:
        The number of correct words, and the number of correct words with start and end within the tolerance.
    """
    words = [chunk["text"].strip() for chunk in result["chunks"]]
    if not words:
        return 0, 0
    num_correct = num_timed = 0
    for alignment in jiwer.process_words(string.text, " ".join(words)).alignments[0]:
        if alignment.type != "equal":
            continue
        for offset in range(alignment.ref_end_idx - alignment.ref_start_idx):
            span = string.spans[alignment.ref_start_idx + offset]
            start_s, end_s = result["chunks"][alignment.hyp_start_idx + offset]["timestamp"]
            num_correct += 1
            largest_error_s = max(abs(start_s - span.start_s), abs(end_s - span.end_s))
            num_timed += largest_error_s <= TIME_TOLERANCE_S
    return num_correct, num_timed


def create_evaluation_sets(data: Path, number: int) -> dict[str, list[DigitString]]:
    """Create the evaluation sets from the dev and test splits, as a dict from the name to the strings of each set."""
    sets = {}
    for split, name in (("dev", "fsdd dev strings"), ("test", "fsdd test strings (theo, unseen)")):
        sets[name] = create_evaluation_strings(read_digit_recordings(data, split), number, EVALUATION_SEED)
    for split in ("dev", "test"):
        sets[f"speechocean762 {split} digit lines"] = [
            DigitString(clip.audio, (Span(clip.text, 0.0, len(clip.audio) / SAMPLE_RATE),), clip.speaker, (clip.name,))
            for clip in read_digit_lines(data, split)
        ]
    return sets


@dataclass(frozen=True)
class Score:
    """Scores of both heads on one evaluation set.

    Args:
        name: name of the set.
        lines: number of strings.
        words: number of words of the references.
        tdt_wer: word error rate of the TDT head.
        ctc_wer: word error rate of the CTC head.
        timed: share of correctly timed words among the correct words of the TDT head; None if the true times are
            unknown.
    """

    name: str
    lines: int
    words: int
    tdt_wer: float
    ctc_wer: float
    timed: float | None


@dataclass(frozen=True)
class Scores:
    """Results of an evaluation.

    Args:
        rows: scores of each set.
        other: number of evaluated lines without digits.
        silent: number of lines without digits that give empty text.
    """

    rows: tuple[Score, ...]
    other: int
    silent: int


def score_set(model: ParakeetForTDT, processor: ParakeetProcessor, name: str, strings: Sequence[DigitString]) -> Score:
    """Evaluate both heads on one set of strings.

    Args:
        model: the model.
        processor: processor of the model.
        name: name of the set.
        strings: the strings of the set.
    """
    references = [string.text for string in strings]
    audios = [string.audio for string in strings]
    tdt_results = transcribe(model, processor, audios, "transducer")
    ctc_results = transcribe(model, processor, audios, "ctc")
    timed = None
    if all(" " not in span.text for string in strings for span in string.spans):
        counts = map(count_timed_words, strings, tdt_results)
        num_correct, num_timed = (sum(values) for values in zip(*counts, strict=True))
        timed = num_timed / max(num_correct, 1)
    return Score(
        name,
        len(strings),
        sum(len(text.split()) for text in references),
        jiwer.wer(references, [result["text"] for result in tdt_results]),
        jiwer.wer(references, [result["text"] for result in ctc_results]),
        timed,
    )


def evaluate(model: ParakeetForTDT, processor: ParakeetProcessor, data: Path, number: int) -> Scores:
    """Evaluate the model on all sets, with at most `number` strings per set; print and return the scores."""
    rows = []
    for name, strings in create_evaluation_sets(data, number).items():
        row = score_set(model, processor, name, strings)
        timed = "" if row.timed is None else f"timed right {row.timed:.1%}"
        print(
            f"{name:36} {row.lines:4} lines {row.words:5} words  TDT {row.tdt_wer:7.2%} CTC {row.ctc_wer:7.2%}  {timed}"
        )
        rows.append(row)
    other = transcribe(model, processor, [clip.audio for clip in read_lines_without_digits(data, "dev")], "transducer")
    num_silent = sum(not result["text"] for result in other)
    print(f"{'speechocean762 dev, no digit word':36} {len(other):4} lines  empty text for {num_silent}", flush=True)
    return Scores(tuple(rows), len(other), num_silent)


def format_table_row(row: Score) -> str:
    """Format the scores of one set as a row of the table in the model card."""
    timed = "" if row.timed is None else f"{row.timed:.1%}"
    return f"| {row.name} | {row.lines} | {row.words} | {row.tdt_wer:.2%} | {row.ctc_wer:.2%} | {timed} |"


def write_card(scores: Scores, training: dict[str, Any], folder: Path) -> None:
    """Write the model card.

    Args:
        scores: scores of the model.
        training: values for the card: `parameters` (number of parameters), `weight` (of the alignment loss), `steps`,
            `batch_size`, `run_seed` and `minutes`.
        folder: folder of the model.
    """
    card = CARD.format(
        rows="\n".join(map(format_table_row, scores.rows)),
        number=NUM_EVALUATION_STRINGS,
        seed=EVALUATION_SEED,
        tolerance=TIME_TOLERANCE_S,
        other=scores.other,
        silent=scores.silent,
        command="python examples/train_demo.py --data DATA",
        date=date.today().isoformat(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        **training,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
