"""Compares the time of the 0.6B encoder and of the feature extractor with stock transformers, in one run.

    python benchmarks/encoder.py [--rounds 5] [--layers 6]

The benchmark first checks that both sides give the same output: within 1e-4 in float32; in bfloat16, the error against
float32 must be at most 1.1 times the error of stock transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import rival
import torch

FRAMES_PER_SECOND = 100
MEL_BINS = 128

# (batch, seconds)
SHAPES = ((1, 10), (8, 10), (1, 60))


def prepare_encoder(module: Any, case: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Build the encoder of one side with fixed random weights; return a function that encodes a batch of features."""
    torch.manual_seed(0)
    config = module.ParakeetEncoderConfig(
        hidden_size=1024, num_hidden_layers=case["layers"], num_attention_heads=8, intermediate_size=4096,
        num_mel_bins=MEL_BINS, attention_bias=False, convolution_bias=False, scale_input=False,
    )  # fmt: skip
    model = module.ParakeetEncoder(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.state_dict().values():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    model = model.to(getattr(torch, case["dtype"]))
    num_frames = case["seconds"] * FRAMES_PER_SECOND + 1
    features = torch.randn(case["batch"], num_frames, MEL_BINS, generator=generator).to(model.dtype)
    mask = torch.ones(case["batch"], num_frames, dtype=torch.bool)
    mask[:, -1] = False

    @torch.inference_mode()
    def run() -> torch.Tensor:
        """Encode the batch."""
        return model(input_features=features, attention_mask=mask).last_hidden_state

    return run


def prepare_features(module: Any, case: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Build the feature extractor of one side; return a function that computes the features of a batch of noise."""
    extractor = module.ParakeetFeatureExtractor(feature_size=MEL_BINS)
    generator = torch.Generator().manual_seed(2)
    clips = [torch.randn(16000 * case["seconds"], generator=generator).numpy() for _ in range(case["batch"])]
    return lambda: extractor(clips, sampling_rate=16000, return_tensors="pt")["input_features"]


def prepare(module: Any, side: str, case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any, str], None]]:
    """Build one case on one side.

    Args:
        module: `transformers` or `transformers_parakeet`.
        side: `stock` or `ours`.
        case: `what` is "features" or "encoder"; the other entries are sizes and the dtype.

    Returns:
        A function that runs the case, and a function that saves the result to a path.
    """
    run = prepare_features(module, case) if case["what"] == "features" else prepare_encoder(module, case)
    run()
    return run, torch.save


def check(rivals: rival.Rivals, case: dict[str, Any], float32_output: torch.Tensor | None) -> torch.Tensor:
    """Compare the outputs of both sides, and return the output of stock transformers.

    Args:
        rivals: the two processes.
        case: shape and dtype of the input.
        float32_output: output of stock transformers in float32, if the case has another dtype; None for float32.
    """
    outputs = rivals.results(case, torch.load)
    # at these lengths the last encoder frame is padding
    stock, ours = (outputs[side].double()[:, :-1] for side in rival.SIDES)
    if float32_output is None:
        error, max_error = (stock - ours).abs().max().item(), 2e-3 if case["what"] == "features" else 1e-4
    else:
        error = (ours - float32_output).abs().mean().item()
        max_error = 1.1 * (stock - float32_output).abs().mean().item()
    print(f"{case}: error {error:.2g}, limit {max_error:.2g}", file=sys.stderr)
    if error > max_error:
        raise SystemExit(f"the error of {case} must be at most {max_error:.3g}, got {error:.3g}")
    return stock


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--side", choices=rival.SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rival.serve(prepare)
        return
    rivals = rival.Rivals(__file__)
    rows = []
    for batch, seconds in SHAPES:
        float32_output = None
        for dtype in ("float32", "bfloat16"):
            case = {"what": "encoder", "batch": batch, "seconds": seconds, "dtype": dtype, "layers": args.layers}
            float32_output = check(rivals, case, float32_output)
            rows.append((f"encoder, batch {batch}, {seconds} s, {dtype}", rivals.compare(args.rounds)))
    case = {"what": "features", "batch": 8, "seconds": 30}
    check(rivals, case, None)
    rows.append(("features, batch 8, 30 s", rivals.compare(args.rounds)))
    rival.report(rows)


if __name__ == "__main__":
    main()
