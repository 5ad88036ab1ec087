"""Measures time and peak memory of the encoder with full and with local attention for audio of several lengths.

    python benchmarks/local_attention.py [--minutes 1 2 4 8] [--window 128] [--rounds 3]

The encoder has the shape of Parakeet TDT-CTC 110M and random weights. Every measurement runs in a separate process.
First checks that attention in blocks equals attention in one block with a mask.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import torch
import transformers

from transformers_parakeet import ParakeetEncoder, ParakeetEncoderConfig
from transformers_parakeet.networks import attention as attention_module

FRAMES_PER_MINUTE = 6000
SHAPE = {"hidden_size": 512, "num_hidden_layers": 17, "num_attention_heads": 8, "intermediate_size": 2048}


def encoder(layers: int, context: list[int]) -> ParakeetEncoder:
    """Return a random encoder in evaluation mode.

    Args:
        layers: number of blocks.
        context: attention context in frames, [left, right]; -1 for no limit.
    """
    torch.manual_seed(0)
    fields = {**SHAPE, "num_hidden_layers": layers, "attention_context_size": context}
    return ParakeetEncoder(ParakeetEncoderConfig(**fields)).eval()


@torch.inference_mode()
def largest_difference(window: int) -> float:
    """Return the largest difference between attention in blocks and in one masked block, for one minute of audio."""
    model = encoder(2, [window, window])
    features = torch.randn(1, FRAMES_PER_MINUTE, 80)
    in_blocks = model(features).last_hidden_state
    choose_block_layout = attention_module.choose_block_layout
    attention_module.choose_block_layout = lambda style, context, frames: attention_module.BlockLayout(frames, frames)
    in_one_block = model(features).last_hidden_state
    attention_module.choose_block_layout = choose_block_layout
    return (in_blocks - in_one_block).abs().max().item()


@torch.inference_mode()
def measure(minutes: float, window: int, rounds: int) -> dict[str, float]:
    """Return the seconds of the fastest run and the peak memory above that of the loaded model, in MiB."""
    model = encoder(SHAPE["num_hidden_layers"], [window, window])
    model(torch.randn(1, 400, 80))
    features = torch.randn(1, int(minutes * FRAMES_PER_MINUTE), 80)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(features)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "mib": (peak - before) / 1024}


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
    difference = largest_difference(options.window)
    assert difference < 1e-5, difference
    print(f"largest difference between blocks and one masked block: {difference:.1e}")
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
