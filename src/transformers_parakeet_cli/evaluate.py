"""`parakeet evaluate`: the error rates and the speed of a model; `transformers_parakeet.training` computes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .messages import print_error_and_exit, print_next_command, print_note, print_rows
from .models import load_pipeline, print_model_note
from .threads import check_threads, read_cpu_times, set_threads
from .transcribe import Beams, Boost, LanguageModel, LanguageModelWeight, QuantizeOption, Threads, get_value

# number of clips with the most errors that are printed
NUM_WORST_CLIPS = 3

# names of the rates in `Evaluation.rates`, and their names in the output
RATE_NAMES = {
    "wer": "word error rate",
    "substitutions": "  substitutions",
    "deletions": "  deletions",
    "insertions": "  insertions",
    "cer": "character error rate",
}


class Normalization(str, Enum):
    """Text normalisations before scoring."""

    basic = "basic"
    english = "english"
    none = "none"


Model = Annotated[str, typer.Argument(help="Hub id, folder or .nemo file; demo: the bundled digits.")]
Data = Annotated[str, typer.Argument(help="NeMo manifest, folder, or name of a Hub dataset.")]
Split = Annotated[str | None, typer.Option(help="Split of the dataset; default: test.")]
Name = Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")]
NormalizeOption = Annotated[
    Normalization,
    typer.Option(help="basic: lower case, no punctuation; english: as the Open ASR leaderboard; none: as it is."),
]
Spellings = Annotated[
    Path | None,
    typer.Option(help="normalizer.json of a Whisper checkpoint: British spellings, for --normalize english."),
]
BatchSize = Annotated[int, typer.Option(help="Number of clips per batch.", min=1)]
DecoderOption = Annotated[str | None, typer.Option(help="ctc: use the CTC head of a hybrid.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; default: cuda if there is a GPU.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Report = Annotated[Path | None, typer.Option(help="HTML file with rates, diagram and worst clips.")]
OutputFile = Annotated[
    Path | None, typer.Option("--output", help="File for references and hypotheses, one JSON object per line.")
]


def evaluate(
    model: Model,
    data: Data,
    split: Split = None,
    name: Name = None,
    normalize: NormalizeOption = Normalization.basic,
    spellings: Spellings = None,
    batch_size: BatchSize = 8,
    decoder: DecoderOption = None,
    beams: Beams = None,
    boost: Boost = None,
    language_model: LanguageModel = None,
    lm_weight: LanguageModelWeight = 0.3,
    device: Device = None,
    dtype: DtypeOption = "float32",
    quantize: QuantizeOption = None,
    threads: Threads = None,
    report: Report = None,
    output_path: OutputFile = None,
) -> None:
    """Measure word and character error rates with 95 % intervals and the speed, on audio with transcripts."""
    with print_error_and_exit():
        check_threads(threads)
        cpu_times = read_cpu_times()
        from transformers_parakeet.training import load_speech, run_evaluation, write_report

        normalize_text = choose_normalization(normalize, spellings)
        dataset = load_speech(data, split, name, default_split="test")
        search = create_search(beams, boost, language_model, lm_weight)
        pipeline = load_pipeline(model, device=device, dtype=dtype, quantize=get_value(quantize))
        set_threads(threads, cpu_times)
        print_model_note(pipeline, is_default_dtype=False)
        evaluation = run_evaluation(pipeline, dataset, batch_size, decoder, normalize_text, search)
        # printed before files are written, because a file that cannot be written must not lose the result
        print_evaluation(evaluation)
        if output_path is not None:
            write_clips(evaluation, output_path)
        if report is not None:
            settings = {"model": model, "data": data, "normalisation": normalize.value, "decoder": decoder or "default"}
            further: dict[str, Any] = {"beams": beams, "boost": boost, "quantize": get_value(quantize)}
            if language_model is not None:
                further |= {"lm": language_model, "lm weight": lm_weight}
            settings |= {option: str(value) for option, value in further.items() if value is not None}
            write_report(evaluation, report, f"Evaluation of {model}", settings)
    for path in filter(None, (output_path, report)):
        print_note(f"wrote {path}")
    if report is None:
        print_next_command("parakeet", "evaluate", model, data, "--report", "REPORT.html")


def create_search(
    beams: int | None, phrase_file: Path | None, language_model: Path | None, lm_weight: float
) -> dict[str, Any]:
    """Create the arguments of the pipeline for the search.

    Args:
        beams: value of the option `--beams`.
        phrase_file: value of the option `--boost`.
        language_model: value of the option `--lm`.
        lm_weight: value of the option `--lm-weight`.

    Raises:
        OSError: the file of phrases cannot be read.
        ValueError: the file of phrases or an option is not valid.
    """
    from transformers_parakeet.phrases import read_phrases
    from transformers_parakeet.transcription import TranscriptionOptions, get_search_arguments

    options = TranscriptionOptions(
        num_beams=beams,
        boost=() if phrase_file is None else read_phrases(phrase_file),
        language_model=None if language_model is None else str(language_model),
        lm_weight=lm_weight,
    )
    return get_search_arguments(options)


def choose_normalization(normalization: Normalization, spellings: Path | None) -> Callable[[str], str]:
    """Return the text normalisation that an option names.

    Args:
        normalization: value of the option `--normalize`.
        spellings: value of the option `--spellings`.

    Raises:
        ValueError: `--spellings` was given for another normalisation than `english`, or is not a list of spellings.
        OSError: the file cannot be read.
    """
    from transformers_parakeet.training import create_english_normalizer, normalize_text

    if normalization is Normalization.english:
        return create_english_normalizer(spellings)
    if spellings is not None:
        raise ValueError(f"`--spellings` must come with `--normalize english`, got {normalization.value!r}: change one")
    return normalize_text if normalization is Normalization.basic else str


def print_evaluation(evaluation: Any) -> None:
    """Print the error rates and the speed to stdout, and the clips with the most word errors to stderr.

    Args:
        evaluation: an `Evaluation`.
    """
    print_rows(list_results(evaluation))
    for score in evaluation.worst_clips(NUM_WORST_CLIPS):
        errors = "1 word error" if score.words.errors == 1 else f"{score.words.errors} word errors"
        print_note(f"{errors} in {score.clip.name}")
        print_note(f"  reference:  {score.clip.reference}\n  hypothesis: {score.clip.hypothesis}")


def list_results(evaluation: Any) -> list[tuple[str, str]]:
    """List the names and values of the error rates and the speed.

    Args:
        evaluation: an `Evaluation`.
    """
    rates = evaluation.rates
    rows = [("data", f"{len(evaluation.scores)} clips, {evaluation.audio_seconds:.0f} s")]
    for key, name in RATE_NAMES.items():
        rows.append((name, f"{rates[key].value:.2%} (95 % interval {rates[key].low:.2%} to {rates[key].high:.2%})"))
    factor = evaluation.real_time_factor
    rows.append(("real-time factor", f"{factor:.4f} ({1 / factor:.1f} seconds of audio per second)"))
    return rows


def write_clips(evaluation: Any, path: Path) -> None:
    """Write the name, reference and hypothesis of each clip as one JSON object per line.

    Args:
        evaluation: an `Evaluation`.
        path: the file to write; an existing file is replaced.
    """
    with open(path, "w", encoding="utf-8") as file:
        for score in evaluation.scores:
            clip = {
                "name": score.clip.name,
                "duration": score.clip.duration,
                "reference": score.clip.reference,
                "hypothesis": score.clip.hypothesis,
                "word_errors": score.words.errors,
            }
            file.write(json.dumps(clip, ensure_ascii=False) + "\n")


__all__ = ["evaluate"]
