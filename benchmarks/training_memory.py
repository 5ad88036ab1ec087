"""Measures the peak memory of a training step, with the fused loss of the model and with the loss of full logits.

    python benchmarks/training_memory.py [--layers 24] [--bf16]

Each measurement runs in a separate process. It is the peak of allocated memory on a GPU, or the growth of resident
memory on a CPU. If the process fails, the table says "does not fit".
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys

import torch

import transformers_parakeet as tp
from transformers_parakeet.losses import tdt_loss

# (number of clips, seconds per clip, labels per clip, vocabulary size with the blank)
CASES = (
    (4, 10, 40, 1025),
    (4, 10, 40, 8193),
    (16, 10, 40, 1025),
    (16, 10, 40, 8193),
    (16, 20, 80, 8193),
    (32, 20, 80, 8193),
)
MEL_FRAMES_PER_SECOND = 100


def build_model(vocab_size: int, num_layers: int, device: str) -> tp.ParakeetForTDT:
    """Build a TDT model with the width of the 0.6B checkpoints and random weights."""
    encoder = {"num_hidden_layers": num_layers, "num_mel_bins": 128, "attention_bias": False, "convolution_bias": False}
    config = tp.ParakeetTDTConfig(vocab_size=vocab_size, blank_token_id=vocab_size - 1, encoder_config=encoder)
    return tp.ParakeetForTDT(config).to(device).train()


def get_peak_gib(device: str) -> float:
    """Return the peak memory of this process in GiB: allocated memory on a GPU, resident memory on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compute_loss_of_full_logits(model: tp.ParakeetForTDT, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the logits of all (frame, label) pairs, and then the TDT loss of these logits.

    Args:
        model: TDT model.
        features: (B, T, 128) log-mel features.
        labels: (B, U) token ids without padding.

    Returns:
        The scalar loss.
    """
    blank_id, vocab_size = model.config.blank_token_id, model.config.vocab_size
    prefixes = torch.nn.functional.pad(labels, (1, 0), value=blank_id)
    logits = model(input_features=features, decoder_input_ids=prefixes).logits
    batch, num_frames, _, _ = logits.shape
    lengths = torch.full((batch,), num_frames), torch.full((batch,), labels.shape[1])
    token_logits, duration_logits = logits[..., :vocab_size], logits[..., vocab_size:]
    return tdt_loss(token_logits, duration_logits, labels, *lengths, blank_id, model.config.durations)


def measure(case: tuple[int, int, int, int], form: str, num_layers: int, bf16: bool) -> float:
    """Measure the peak memory of one forward and backward pass.

    Args:
        case: an entry of `CASES`.
        form: `model` for the loss of the model, `logits` for the loss of full logits.
        num_layers: number of Conformer blocks of the model.
        bf16: whether to use bfloat16 autocast.

    Returns:
        The peak memory in GiB, minus the memory of the model and the gradients.
    """
    batch, seconds, num_labels, vocab_size = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(vocab_size, num_layers, device)
    for parameter in model.parameters():
        # `fill_` writes to the memory, because the system allocates memory only at the first write
        parameter.grad = torch.empty_like(parameter).fill_(0.0)
    features = torch.randn(batch, seconds * MEL_FRAMES_PER_SECOND, 128, device=device)
    labels = torch.randint(3, vocab_size - 1, (batch, num_labels), device=device)
    memory_before = get_peak_gib(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        if form == "model":
            loss = model(input_features=features, labels=labels).loss
        else:
            loss = compute_loss_of_full_logits(model, features, labels)
    loss.backward()
    return get_peak_gib(device) - memory_before


def measure_in_process(case: tuple[int, int, int, int], form: str, options: argparse.Namespace) -> str:
    """Run `measure` in a new process; return the printed GiB, or "does not fit" if the process fails."""
    command = [sys.executable, __file__, "--layers", str(options.layers), "--form", form, "--case", *map(str, case)]
    process = subprocess.run(command + ["--bf16"] * options.bf16, capture_output=True, text=True)
    return process.stdout.strip() if process.returncode == 0 else "does not fit"


def main() -> None:
    """Print the table, or one measurement if `--case` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24, help="number of Conformer blocks")
    parser.add_argument("--bf16", action="store_true", help="use bfloat16 autocast")
    parser.add_argument("--form", choices=("model", "logits"), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(f"{measure(tuple(options.case), options.form, options.layers, options.bf16):.2f}")
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    precision = "bf16 autocast" if options.bf16 else "float32"
    print(f"torch {torch.__version__}, {device}, {options.layers} blocks, {precision}")
    print("| clips | seconds | labels | vocabulary | GiB, model's loss | GiB, full logits |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        model_gib, logits_gib = measure_in_process(case, "model", options), measure_in_process(case, "logits", options)
        print("| " + " | ".join([*map(str, case), model_gib, logits_gib]) + " |", flush=True)


if __name__ == "__main__":
    main()
