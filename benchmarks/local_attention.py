"""Measures time and peak memory of the encoder with full attention and with local attention.

    python benchmarks/local_attention.py [--minutes 1 2 4 8] [--window 128] [--rounds 3]

The encoder has the sizes of Parakeet TDT-CTC 110M and random weights. Every measurement runs in a separate process.
The benchmark first checks that attention in blocks equals attention in one masked block.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from unittest import mock

import torch
import transformers

from transformers_parakeet import ParakeetEncoder, ParakeetEncoderConfig
from transformers_parakeet.networks import attention, attention_layout, conformer

FRAMES_PER_MINUTE = 6000
ENCODER_SIZES = {"hidden_size": 512, "num_hidden_layers": 17, "num_attention_heads": 8, "intermediate_size": 2048}


def build_encoder(num_layers: int, context: list[int]) -> ParakeetEncoder:
    """Build an encoder with random weights, in eval mode.

    Args:
        num_layers: number of Conformer blocks.
        context: attention context in frames, [left, right]; -1 for no limit.
    """
    torch.manual_seed(0)
    fields = {**ENCODER_SIZES, "num_hidden_layers": num_layers, "attention_context_size": context}
    return ParakeetEncoder(ParakeetEncoderConfig(**fields)).eval()


def choose_one_block(style: str, context: Sequence[int], num_frames: int) -> attention_layout.BlockLayout:
    """Return a layout with a single block of all frames; replaces `choose_block_layout`."""
    return attention_layout.BlockLayout(num_frames, num_frames)


@torch.inference_mode()
def compute_block_error(window: int) -> float:
    """Compute the largest difference between attention in blocks and in one masked block, for one minute of audio."""
    model = build_encoder(2, [window, window])
    features = torch.randn(1, FRAMES_PER_MINUTE, 80)
    blockwise_output = model(features).last_hidden_state
    # both modules call the function that chooses the layout
    with (
        mock.patch.object(attention, "choose_block_layout", choose_one_block),
        mock.patch.object(conformer, "choose_block_layout", choose_one_block),
    ):
        masked_output = model(features).last_hidden_state
    return (blockwise_output - masked_output).abs().max().item()


@torch.inference_mode()
def measure(minutes: float, window: int, rounds: int) -> dict[str, float]:
    """Measure the encoder on audio of one length.

    Args:
        minutes: duration of the audio.
        window: attention context on each side in frames; -1 for full attention.
        rounds: number of runs.

    Returns:
        `seconds` of the fastest run, and `mib`, the peak memory in MiB minus the memory of the loaded model.
    """
    model = build_encoder(ENCODER_SIZES["num_hidden_layers"], [window, window])
    # warm-up run
    model(torch.randn(1, 400, 80))
    features = torch.randn(1, int(minutes * FRAMES_PER_MINUTE), 80)
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(features)
        seconds.append(time.perf_counter() - start)
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "mib": (peak_memory - memory_before) / 1024}


def main() -> None:
    """Print a table with one row per length of audio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 2, 4, 8])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        minutes, window = float(options.measure[0]), int(options.measure[1])
        print(json.dumps(measure(minutes, window, options.rounds)))
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    error = compute_block_error(options.window)
    assert error < 1e-5, error
    print(f"largest difference between attention in blocks and in one masked block: {error:.1e}")
    print("minutes  local s  local MiB  full s  full MiB")
    for minutes in options.minutes:
        results = []
        for window in (options.window, -1):
            command = [
                sys.executable,
                __file__,
                "--measure",
                str(minutes),
                str(window),
                "--rounds",
                str(options.rounds),
            ]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        local, full = results
        print(f"{minutes:7g} {local['seconds']:8.2f} {local['mib']:10.0f} {full['seconds']:7.2f} {full['mib']:9.0f}")


if __name__ == "__main__":
    main()
