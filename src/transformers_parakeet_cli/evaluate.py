"""`parakeet evaluate`: the word error rate of a model; `transformers_parakeet.training` computes it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .messages import print_error_and_exit, print_text
from .models import load_pipeline


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .nemo file.")],
    data: Annotated[str, typer.Argument(help="NeMo manifest, folder, or name of a Hub dataset.")],
    split: Annotated[str | None, typer.Option(help="Split of the dataset; default: test.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    batch_size: Annotated[int, typer.Option(help="Number of clips per batch.")] = 8,
    decoder: Annotated[str | None, typer.Option(help="ctc: use the CTC head of a hybrid.")] = None,
    output_path: Annotated[
        str | None, typer.Option("--output", help="File for references and hypotheses, one JSON object per line.")
    ] = None,
) -> None:
    """Measure the word error rate of a model on audio with transcripts."""
    with print_error_and_exit():
        from transformers_parakeet.training import evaluate_pipeline, load_speech

        dataset = load_speech(data, split, name, default_split="test")
        result = evaluate_pipeline(load_pipeline(model, dtype="float32"), dataset, batch_size, decoder)
    if output_path is not None:
        with open(output_path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(clip, ensure_ascii=False) + "\n" for clip in result["clips"])
    print_text(
        f"{len(result['clips'])} clips, word error rate {result['wer']:.2%}, character error rate {result['cer']:.2%}"
    )


__all__ = ["evaluate"]
