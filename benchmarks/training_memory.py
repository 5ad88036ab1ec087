"""Measures the peak memory of a training step, with the model's loss and with the joint network's scores built in full.

    python benchmarks/training_memory.py [--layers 24] [--bf16]

Every cell runs in a process of its own: on a GPU its peak of allocated memory, on a CPU the growth of its resident
memory. A cell that does not fit says so.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys

import torch

import transformers_parakeet as tp
from transformers_parakeet.losses.transducer import tdt_loss

# clips, seconds of each, labels of each, tokens
CASES = (
    (4, 10, 40, 1025),
    (4, 10, 40, 8193),
    (16, 10, 40, 1025),
    (16, 10, 40, 8193),
    (16, 20, 80, 8193),
    (32, 20, 80, 8193),
)
FRAMES_PER_SECOND = 100


def build(vocabulary: int, layers: int, device: str) -> tp.ParakeetForTDT:
    """A TDT model of the width of the 0.6B checkpoints."""
    encoder = {"num_hidden_layers": layers, "num_mel_bins": 128, "attention_bias": False, "convolution_bias": False}
    config = tp.ParakeetTDTConfig(vocab_size=vocabulary, blank_token_id=vocabulary - 1, encoder_config=encoder)
    return tp.ParakeetForTDT(config).to(device).train()


def peak(device: str) -> float:
    """GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(case: tuple[int, int, int, int], form: str, layers: int, bf16: bool) -> float:
    """Return what a forward and backward pass adds to model and gradients, GiB."""
    batch, seconds, labels, vocabulary = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(vocabulary, layers, device)
    for parameter in model.parameters():
        # filled, as zeros are not in memory before they are written to
        parameter.grad = torch.empty_like(parameter).fill_(0.0)
    features = torch.randn(batch, seconds * FRAMES_PER_SECOND, 128, device=device)
    targets = torch.randint(3, vocabulary - 1, (batch, labels), device=device)
    before = peak(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        if form == "model":
            loss = model(input_features=features, labels=targets).loss
        else:
            prefixes = torch.nn.functional.pad(targets, (1, 0), value=vocabulary - 1)
            scores = model(input_features=features, decoder_input_ids=prefixes).logits
            frames = torch.full((batch,), scores.shape[1])
            lengths = torch.full((batch,), labels)
            tokens, durations = scores[..., :vocabulary], scores[..., vocabulary:]
            loss = tdt_loss(tokens, durations, targets, frames, lengths, vocabulary - 1, model.config.durations)
    loss.backward()
    return peak(device) - before


def cell(case: tuple[int, int, int, int], form: str, options: argparse.Namespace) -> str:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--layers", str(options.layers), "--form", form, "--case", *map(str, case)]
    done = subprocess.run(command + ["--bf16"] * options.bf16, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "does not fit"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24, help="conformer blocks")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--form", choices=("model", "scores"), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(f"{measure(tuple(options.case), options.form, options.layers, options.bf16):.2f}")
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(
        f"torch {torch.__version__}, {where}, {options.layers} blocks, {'bf16 autocast' if options.bf16 else 'float32'}"
    )
    print("| clips | seconds | labels | vocabulary | GiB, model's loss | GiB, scores built |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        ours, full = cell(case, "model", options), cell(case, "scores", options)
        print("| " + " | ".join([*map(str, case), ours, full]) + " |", flush=True)


if __name__ == "__main__":
    main()
