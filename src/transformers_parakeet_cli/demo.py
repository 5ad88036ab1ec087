"""`parakeet demo`: the bundled model on the bundled clips."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Column, Table

from .messages import print_error_and_exit, print_next_command, print_table, print_text
from .models import load_pipeline


def demo() -> None:
    """Transcribe the bundled clips with both heads of the demo model, TDT and CTC, and print the word error rates."""
    from transformers_parakeet import demo_model_path

    folder = demo_model_path()
    with print_error_and_exit():
        pipeline = load_pipeline("demo", dtype="float32")
    clips = json.loads((folder / "clips" / "manifest.json").read_text(encoding="utf-8"))
    files = [str(folder / "clips" / clip["file"]) for clip in clips]
    tdt_results = pipeline(files, return_timestamps="word", return_confidence=True)
    ctc_results = pipeline(files, generate_kwargs={"decoder": "ctc"})
    print_demo_table(clips, tdt_results, ctc_results)
    references = [clip["text"] for clip in clips]
    for head, results in (("TDT", tdt_results), ("CTC", ctc_results)):
        rate = compute_word_error_rate(references, [result["text"] for result in results])
        rate_text = "not computed, because it needs jiwer (in the extra `cli`)" if rate is None else f"{rate:.1%}"
        print_text(f"word error rate, {head}: {rate_text} on {len(clips)} clips")
    print_next_command("parakeet", "transcribe", "FILE", "--model", "nvidia/parakeet-tdt-0.6b-v3")


def print_demo_table(
    clips: list[dict[str, Any]], tdt_results: list[dict[str, Any]], ctc_results: list[dict[str, Any]]
) -> None:
    """Print a table with one row per clip: file, reference, TDT words with times and confidence, and CTC text.

    Args:
        clips: one dict `{"file", "text"}` per clip; `text` is the reference.
        tdt_results: pipeline output of the TDT head, one dict per clip; `chunks` contains the words with times and
            confidence.
        ctc_results: pipeline output of the CTC head, one dict `{"text"}` per clip.
    """
    words_column = Column("TDT: seconds, confidence", no_wrap=True)
    table = Table("clip", "reference", words_column, "CTC", title="Parakeet demo model: spoken English digits")
    for clip, tdt_result, ctc_result in zip(clips, tdt_results, ctc_results, strict=True):
        words = "\n".join(map(format_word, tdt_result["chunks"]))
        table.add_row(clip["file"], clip["text"], words, ctc_result["text"], end_section=True)
    print_table(table)


def format_word(chunk: dict[str, Any]) -> str:
    """Format a word of the pipeline output with start and end in seconds and the confidence.

    Args:
        chunk: a dict `{"text", "timestamp", "confidence"}`, with start and end in seconds.
    """
    start, end = chunk["timestamp"]
    return f"{chunk['text'].strip():5} {start:.2f}-{end:.2f}  {chunk['confidence']:.2f}"


def compute_word_error_rate(references: list[str], hypotheses: list[str]) -> float | None:
    """Compute the word error rate over all clips; return None if jiwer is not installed.

    Args:
        references: the correct text of each clip.
        hypotheses: the recognised text of each clip.
    """
    try:
        import jiwer
    except ImportError:
        return None
    return float(jiwer.wer(references, hypotheses))


__all__ = ["demo"]
