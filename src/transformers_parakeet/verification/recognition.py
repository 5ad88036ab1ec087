"""Recognises a clip by a program that is written for stock transformers, and prints text, tokens and times as JSON.

`comparison.py` runs this file twice: in a process that does not import this package, in which the classes are those of
stock transformers, and in its own process, in which the same names are the classes of this package. Therefore this file
imports nothing of the package.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import soundfile
import torch
from transformers import AutoConfig, AutoModelForCTC, AutoModelForRNNT, AutoModelForTDT, AutoProcessor

# model type -> Auto class
AUTO_CLASSES = {"parakeet_ctc": AutoModelForCTC, "parakeet_rnnt": AutoModelForRNNT, "parakeet_tdt": AutoModelForTDT}


@torch.inference_mode()
def recognize(folder: str, clip: str) -> dict[str, Any]:
    """Recognise a clip on the CPU in float32.

    Args:
        folder: folder of a checkpoint in the format of transformers.
        clip: audio file with one channel at the sampling rate of the model.

    Returns:
        `model_module`: name of the module that defines the class of the model; `text`; `tokens`: a dict of `id`,
        `start` and `end` in seconds for each label; `seconds`: time of features and recognition.
    """
    config = AutoConfig.from_pretrained(folder)
    model = AUTO_CLASSES[config.model_type].from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    samples, sampling_rate = soundfile.read(clip, dtype="float32")
    start = time.perf_counter()
    output = model.generate(**processor(samples, sampling_rate=sampling_rate))
    seconds = time.perf_counter() - start
    frame_s = processor.feature_extractor.hop_length * config.encoder_config.subsampling_factor / sampling_rate
    if config.model_type == "parakeet_ctc":
        sequence = getattr(output, "sequences", output)[0].tolist()
        tokens = list_ctc_tokens(sequence, config.pad_token_id, frame_s)
    else:
        sequence = output.sequences[0].tolist()
        ignored_ids = {config.blank_token_id, config.pad_token_id}
        tokens = list_transducer_tokens(sequence, output.durations[0].tolist(), ignored_ids, frame_s)
    text = processor.decode(sequence, skip_special_tokens=True)
    return {"model_module": type(model).__module__, "text": text, "tokens": tokens, "seconds": seconds}


def list_ctc_tokens(sequence: list[int], blank_id: int, frame_s: float) -> list[dict[str, Any]]:
    """List the labels of a CTC output with their times.

    Args:
        sequence: token id of each frame.
        blank_id: id of the blank, which also fills the end of the sequence.
        frame_s: duration of a frame in seconds.

    Returns:
        `id`, `start` and `end` in seconds of each label: a run of equal ids that are not the blank.
    """
    tokens: list[dict[str, Any]] = []
    previous_id = blank_id
    for frame, token_id in enumerate(sequence):
        if token_id == previous_id != blank_id:
            tokens[-1]["end"] = (frame + 1) * frame_s
        elif token_id != blank_id:
            tokens.append({"id": token_id, "start": frame * frame_s, "end": (frame + 1) * frame_s})
        previous_id = token_id
    return tokens


def list_transducer_tokens(
    sequence: list[int], durations: list[int], ignored_ids: set[int], frame_s: float
) -> list[dict[str, Any]]:
    """List the labels of a transducer output with their times.

    Args:
        sequence: label or blank of each step.
        durations: number of frames that each step advances.
        ignored_ids: ids of blank and padding.
        frame_s: duration of a frame in seconds.

    Returns:
        `id`, `start` and `end` in seconds of each label. The start is the sum of the durations before the step.
    """
    tokens, frame = [], 0
    for token_id, duration in zip(sequence, durations, strict=True):
        if token_id not in ignored_ids:
            tokens.append({"id": token_id, "start": frame * frame_s, "end": (frame + duration) * frame_s})
        frame += duration
    return tokens


if __name__ == "__main__":
    # a prefix, because other packages may print to stdout
    sys.stdout.write(f"result: {json.dumps(recognize(*sys.argv[1:]))}\n")
