"""Evaluate a speech recognition pipeline on a dataset, for `parakeet evaluate`.

Error rates are computed in `metrics.py`; evaluation during training is in `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..configuration_parakeet import get_head_type
from .clips import read_clip
from .metrics import error_rates


def check_decoder(config: Any, decoder: str | None) -> None:
    """Check that a model has the requested decoder.

    Args:
        config: configuration of the model.
        decoder: `"transducer"` or `"ctc"`; None for the default decoder, which every model has.

    Raises:
        ValueError: the model does not have this decoder.
    """
    is_ctc_model = get_head_type(config) == "ctc"
    decoders = [] if is_ctc_model else ["transducer"]
    if is_ctc_model or config.ctc_head:
        decoders.append("ctc")
    if decoder is not None and decoder not in decoders:
        raise ValueError(
            f"`decoder` must be {' or '.join(decoders)} for this model, got {decoder!r}: choose another decoder"
        )


def evaluate_pipeline(pipe: Any, dataset: Any, batch_size: int = 8, decoder: str | None = None) -> dict[str, Any]:
    """Transcribe every clip of a dataset and compute the error rates.

    Args:
        pipe: a speech recognition pipeline with a Parakeet model.
        dataset: dataset with the columns `audio` and `text`, as returned by `load_speech`.
        batch_size: number of clips per batch.
        decoder: `"ctc"` for the CTC head of a hybrid model; None for the default decoder of the model.

    Returns:
        `wer` (word error rate), `cer` (character error rate), and `clips`, a list with a dict of `reference` and
        `hypothesis` for each clip.

    Raises:
        ValueError: the model does not have this decoder.
        AudioError: a clip cannot be read.
    """
    check_decoder(pipe.model.config, decoder)
    sampling_rate = pipe.feature_extractor.sampling_rate
    references: list[str] = []

    def read_clips() -> Iterator[dict[str, Any]]:
        """Yield the pipeline input of each clip, and append the transcript of the clip to `references`."""
        for row in dataset:
            references.append(row["text"])
            yield {"raw": read_clip(row, sampling_rate), "sampling_rate": sampling_rate}

    pipeline_options = {"generate_kwargs": {"decoder": decoder}} if decoder else {}
    outputs = pipe(read_clips(), batch_size=batch_size, **pipeline_options)
    hypotheses = [output["text"] for output in outputs]
    clips = [
        {"reference": reference, "hypothesis": hypothesis}
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return {**error_rates(references, hypotheses), "clips": clips}


__all__ = ["check_decoder", "evaluate_pipeline"]
