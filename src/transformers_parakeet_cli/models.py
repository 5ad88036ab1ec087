"""Loads the model that the command line names."""

from __future__ import annotations

from typing import Any


def load_pipeline(model: str | None, device: str | None = None) -> Any:
    """Load a model and create a speech recognition pipeline.

    Args:
        model: Hub id, path of a folder, or path of a `.nemo` file; None or `demo` for the bundled demo model.
        device: device of the model; None for a GPU if there is one.
    """
    from transformers.utils import logging

    from transformers_parakeet import ParakeetASRPipeline, demo_model_path, load_nemo

    logging.disable_progress_bar()
    loaded_model, processor = load_nemo(demo_model_path() if model in (None, "demo") else model)
    return ParakeetASRPipeline(loaded_model, processor=processor, task="automatic-speech-recognition", device=device)


__all__ = ["load_pipeline"]
