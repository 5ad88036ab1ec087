"""A short test for every supported release: load, generate, pipeline, save, train one step.

    python tests/smoke.py

It needs the package with its extra `train`, and no pytest. `tests/matrix.py` runs it for each Python and release.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForTDT, AutoProcessor, TrainingArguments, pipeline

import transformers_parakeet as tp
from transformers_parakeet.training import ParakeetTrainer

FOLDER = tp.demo_model_path()
CLIP = next(
    clip
    for clip in json.loads((FOLDER / "clips" / "manifest.json").read_text(encoding="utf-8"))
    if clip["file"] == "one_two_three.flac"
)
SAMPLES = tp.load_audio(FOLDER / "clips" / CLIP["file"])


def check(name, result, expected):
    """Exit if a result is not the expected one."""
    if result != expected:
        raise SystemExit(f"{name} must be {expected!r}, got {result!r}")


def generated_text(model, processor):
    """Transcribe the clip by `generate`."""
    inputs = processor([SAMPLES], sampling_rate=16000)
    output = model.generate(**inputs)
    return processor.batch_decode(output.sequences, skip_special_tokens=True)[0]


def train_one_step(model, processor, folder):
    """Train on two rows for one step; return the loss and the number of weight tensors that changed."""
    rows = [{"audio": {"array": SAMPLES, "sampling_rate": 16000}, "text": CLIP["text"]}] * 2
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = ParakeetTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    loss = trainer.train().training_loss
    num_changed = sum(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    return loss, num_changed


def main():
    """Run all checks and print one line."""
    transformers.logging.set_verbosity_error()
    model, processor = AutoModelForTDT.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)
    check("the class of AutoModelForTDT", type(model), tp.ParakeetForTDT)
    check("the text of generate", generated_text(model, processor), CLIP["text"])
    recogniser = pipeline("automatic-speech-recognition", model=str(FOLDER))
    result = recogniser(str(FOLDER / "clips" / CLIP["file"]), return_timestamps="word")
    check("the text of the pipeline", result["text"], CLIP["text"])
    check("the words", [chunk["text"].strip() for chunk in result["chunks"]], CLIP["text"].split())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        reloaded = AutoModelForTDT.from_pretrained(folder).eval()
        check(
            "the text of the saved model", generated_text(reloaded, AutoProcessor.from_pretrained(folder)), CLIP["text"]
        )
        loss, num_changed = train_one_step(model, processor, Path(folder) / "training")
        check("whether the loss is finite", bool(np.isfinite(loss)), True)
        check("whether a step changes weights", num_changed > 0, True)
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"ok: Python {python}, torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
