"""`parakeet verify`: a checkpoint against stock transformers and test data.

`transformers_parakeet.verification` does the work.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .messages import print_error, print_error_and_exit, print_note, print_text


def verify(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .nemo file; demo: the bundled digits.")],
    clips: Annotated[int, typer.Option(help="Number of clips of the test data to score; 0: none.", min=0)] = 100,
    data: Annotated[
        str | None,
        typer.Option(help="Test data: NeMo manifest, folder or Hub dataset; default: LibriSpeech test-clean."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of clips per batch.", min=1)] = 8,
    device: Annotated[
        str | None, typer.Option(help="Device for the test data: cpu, cuda or cuda:1; default: cuda if there is a GPU.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
) -> None:
    """Compare a checkpoint with stock transformers, score test data, and print a table for an issue.

    The model and the first clips of LibriSpeech test-clean are downloaded if necessary. The exit status is 1 if tokens,
    times or text differ from those of stock transformers.
    """
    with print_error_and_exit():
        from transformers.utils import logging

        from transformers_parakeet.nemo import resolve_model_name
        from transformers_parakeet.verification import VerifyOptions, verify_checkpoint

        logging.disable_progress_bar()
        options = VerifyOptions(clips, data, batch_size, device, revision)
        verification = verify_checkpoint(str(resolve_model_name(model)), options, print_note)
    print_text(format_verification(verification))
    differences = verification.comparison.differences
    if differences:
        print_error(f"{model} differs from stock transformers: {'; '.join(differences)}")
    print_note("next: paste the table into an issue of transformers-parakeet")
    raise typer.Exit(int(bool(differences)))


def format_verification(verification: Any) -> str:
    """Format the result of a verification as a Markdown table.

    Args:
        verification: a `Verification`.
    """
    commit = f" at {verification.commit}" if verification.commit else ""
    rows = [("model", f"{verification.model}{commit}"), *list_comparison(verification.comparison)]
    if verification.evaluation is not None:
        rows += list_scores(verification.evaluation, verification.data)
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in verification.versions.items())))
    rows += verification.machine.items()
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(["| parakeet verify | |", "| --- | --- |", *lines])


def list_comparison(comparison: Any) -> list[tuple[str, str]]:
    """List the names and values of the comparison with stock transformers.

    Args:
        comparison: a `Comparison`.
    """
    is_equal = f"yes: {comparison.num_tokens} tokens with their times, and the text"
    rows = [
        (
            "equal to stock transformers",
            f"no: {'; '.join(comparison.differences)}" if comparison.differences else is_equal,
        )
    ]
    rows.append(("text of the bundled clip", comparison.text or "(empty)"))
    seconds = f"{comparison.seconds:.2f} s"
    if comparison.stock_seconds is not None:
        seconds += f"; stock transformers {comparison.stock_seconds:.2f} s"
    rows.append(("time for 10.5 s of audio, first run on the CPU in float32", seconds))
    return rows


def list_scores(evaluation: Any, data: str) -> list[tuple[str, str]]:
    """List the names and values of the error rates and the speed on the test data.

    Args:
        evaluation: an `Evaluation`.
        data: name of the test data.
    """
    word_rate, character_rate = evaluation.rates["wer"], evaluation.rates["cer"]
    return [
        (
            "test data",
            f"{data}, the first {len(evaluation.scores)} clips, {evaluation.audio_seconds:.0f} s, in float32",
        ),
        ("text normalisation", "that of Whisper for English, without a list of British spellings"),
        ("word error rate (95 % interval)", format_rate(word_rate)),
        ("character error rate (95 % interval)", format_rate(character_rate)),
        ("seconds of audio per second", f"{1 / evaluation.real_time_factor:.1f}"),
    ]


def format_rate(rate: Any) -> str:
    """Format an error rate with its 95 % interval in per cent.

    Args:
        rate: a `Rate`.
    """
    return f"{rate.value:.2%} ({rate.low:.2%} to {rate.high:.2%})"


__all__ = ["verify"]
