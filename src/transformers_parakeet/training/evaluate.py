"""Score a speech recognition pipeline on a dataset, for `parakeet evaluate`.

Error rates are computed in `metrics.py`; the evaluations during training are part of `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..configuration_parakeet import get_head_type
from .clips import read_clip
from .metrics import error_rates


def check_decoder(config: Any, decoder: str | None) -> None:
    """Refuse a decoder that the model does not have.

    Args:
        config: configuration of the model.
        decoder: `"transducer"` or `"ctc"`; None for the default of the model, which is always accepted.

    Raises:
        ValueError: the model has no such decoder.
    """
    is_ctc_model = get_head_type(config) == "ctc"
    decoders = [] if is_ctc_model else ["transducer"]
    if is_ctc_model or config.ctc_head:
        decoders.append("ctc")
    if decoder is not None and decoder not in decoders:
        raise ValueError(
            f"`decoder` must be a decoder of the model, {' or '.join(decoders)}, got {decoder!r}: correct it"
        )


def evaluate_pipeline(pipe: Any, dataset: Any, batch_size: int = 8, decoder: str | None = None) -> dict[str, Any]:
    """Transcribe every clip of a dataset and compute the error rates.

    Args:
        pipe: a speech recognition pipeline with a Parakeet model.
        dataset: rows with `audio` and `text`, see `load_speech`.
        batch_size: number of clips that are recognised together.
        decoder: `"ctc"` for the CTC head of a hybrid model; None for the default of the model.

    Returns:
        `wer` and `cer`, see `error_rates`, and `clips`: one dict with `reference` and `hypothesis` per clip.

    Raises:
        ValueError: the model has no such decoder.
        AudioError: a clip cannot be read.
    """
    check_decoder(pipe.model.config, decoder)
    sampling_rate = pipe.feature_extractor.sampling_rate
    references: list[str] = []

    def read_clips() -> Iterator[dict[str, Any]]:
        """Yield the samples of each clip, and append its transcript to `references`."""
        for row in dataset:
            references.append(row["text"])
            yield {"raw": read_clip(row, sampling_rate), "sampling_rate": sampling_rate}

    options = {"generate_kwargs": {"decoder": decoder}} if decoder else {}
    hypotheses = [result["text"] for result in pipe(read_clips(), batch_size=batch_size, **options)]
    clips = [
        {"reference": reference, "hypothesis": hypothesis}
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return {**error_rates(references, hypotheses), "clips": clips}


__all__ = ["check_decoder", "evaluate_pipeline"]
