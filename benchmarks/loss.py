"""Compares the time of the transducer loss and its gradients with the PyTorch loss of stock transformers, in one run.

    python benchmarks/loss.py [--rounds 5] [--threads 2] [--device cpu]

The benchmark first checks that both sides give the same loss and gradients. On a GPU, the cases include the sizes for
which stock transformers reports the speed of its CUDA kernel.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import rival
import torch

JOINT_WIDTH, DURATIONS = 640, (0, 1, 2, 3, 4)
# (B, T, U, V): clips, frames, labels, vocabulary. "fused": joint network and loss; "logits": loss of precomputed logits
FUSED_SHAPES = ((2, 250, 80, 1025), (2, 125, 40, 8193))
LOGITS_SHAPES = ((2, 50, 20, 1025),)
GPU_LOGITS_SHAPES = ((1, 50, 15, 1025), (1, 50, 15, 8193), (2, 100, 25, 8193), (4, 200, 50, 8193), (8, 400, 100, 8193))
# sizes that are measured only for this package; stock transformers would need 5 and 20 GB for the logits
LARGE_SHAPE = (4, 375, 100, 8193)
GPU_LARGE_SHAPE = (16, 375, 100, 8193)
# maximum difference between the sides, relative to the largest entry of the loss or of each gradient
TOLERANCE = 1e-4


def make_inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Draw the inputs of a case from a fixed seed, which gives both sides identical inputs."""
    batch, num_frames, num_labels, vocab_size = case["shape"]
    generator = torch.Generator().manual_seed(0)
    num_outputs = vocab_size + len(DURATIONS)

    def normal(*shape: int) -> torch.Tensor:
        """Draw a tensor from the normal distribution."""
        return torch.randn(*shape, generator=generator)

    inputs = {"labels": torch.randint(vocab_size - 1, (batch, num_labels), generator=generator)}
    if case["form"] == "logits":
        inputs["token_logits"] = normal(batch, num_frames, num_labels + 1, vocab_size)
        inputs["duration_logits"] = normal(batch, num_frames, num_labels + 1, len(DURATIONS))
    else:
        inputs["encoder_states"] = normal(batch, num_frames, JOINT_WIDTH)
        inputs["predictor_states"] = normal(batch, num_labels + 1, JOINT_WIDTH)
        inputs["weight"] = normal(num_outputs, JOINT_WIDTH) / JOINT_WIDTH**0.5
        inputs["bias"] = normal(num_outputs)
    inputs["frame_lengths"] = torch.full((batch,), num_frames)
    inputs["label_lengths"] = torch.full((batch,), num_labels)
    return {name: tensor.to(case["device"]) for name, tensor in inputs.items()}


def compute_loss(module: Any, side: str, case: dict[str, Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of a case with the implementation of one side.

    Args:
        module: `transformers` or `transformers_parakeet`.
        side: `stock` or `ours`.
        case: `form` is "fused" or "logits"; `shape` is (B, T, U, V).
        inputs: input tensors from `make_inputs`.

    Returns:
        The scalar loss.
    """
    vocab_size = case["shape"][3]
    arguments = inputs["labels"], inputs["frame_lengths"], inputs["label_lengths"], vocab_size - 1, DURATIONS
    if side == "ours" and case["form"] == "fused":
        losses = importlib.import_module(f"{module.__name__}.losses")
        states = inputs["encoder_states"], inputs["predictor_states"]
        return losses.transducer_loss(*states, inputs["weight"], inputs["bias"], *arguments, reduction="mean_volume")
    if case["form"] == "fused":
        hidden = torch.relu(inputs["encoder_states"][:, :, None] + inputs["predictor_states"][:, None])
        logits = torch.nn.functional.linear(hidden, inputs["weight"], inputs["bias"])
        token_logits, duration_logits = logits[..., :vocab_size], logits[..., vocab_size:]
    else:
        token_logits, duration_logits = inputs["token_logits"], inputs["duration_logits"]
    name = f"{module.__name__}.losses" if side == "ours" else "transformers.loss.loss_tdt"
    tdt_loss = importlib.import_module(name).tdt_loss
    return tdt_loss(token_logits, duration_logits, *arguments, reduction="mean_volume")


def prepare(module: Any, side: str, case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any, str], None]]:
    """Create the inputs of a case.

    Args:
        module: `transformers` or `transformers_parakeet`.
        side: `stock` or `ours`.
        case: form, shape, device and number of threads.

    Returns:
        A function that computes the loss and its gradients, and a function that saves them to a path.
    """
    torch.set_num_threads(case["threads"])
    inputs = make_inputs(case)
    leaves = [tensor.requires_grad_() for tensor in inputs.values() if tensor.is_floating_point()]

    def run() -> list[torch.Tensor]:
        """Compute the loss and its gradients."""
        for leaf in leaves:
            leaf.grad = None
        loss = compute_loss(module, side, case, inputs)
        loss.backward()
        if case["device"] != "cpu":
            torch.cuda.synchronize()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def save(result: list[torch.Tensor], path: str) -> None:
        """Save loss and gradients."""
        torch.save([tensor.cpu() for tensor in result], path)

    return run, save


def check(rivals: rival.Rivals, case: dict[str, Any]) -> None:
    """Exit with an error if loss or gradients of the two sides differ by more than `TOLERANCE`."""
    results = rivals.results(case, torch.load)
    pairs = zip(results["stock"], results["ours"], strict=True)
    error = max(float((stock - ours).abs().max() / stock.abs().max()) for stock, ours in pairs)
    print(f"{case}: largest difference {error:.1e}", file=sys.stderr)
    # `not <` instead of `>=`, because a NaN must fail
    if not error < TOLERANCE:
        raise SystemExit(f"loss or gradients of {case} differ between stock and ours by {error:.1e}")


def measure_alone(module: Any, case: dict[str, Any]) -> None:
    """Compute the loss and gradients of a case that is too large for stock transformers; print time and memory."""
    run, _ = prepare(module, "ours", case)
    memory_before = rival.reset_peak(case["device"])
    start = time.perf_counter()
    run()
    seconds, peak = time.perf_counter() - start, rival.peak_memory(case["device"])
    print(f"{seconds:.1f} s, {(peak - memory_before) / 1024:.0f} MiB above the inputs")


def list_cases(device: str) -> list[tuple[str, tuple[int, int, int, int]]]:
    """List the form and the shape of each case for a device."""
    cases = [("fused", shape) for shape in FUSED_SHAPES] + [("logits", shape) for shape in LOGITS_SHAPES]
    if device != "cpu":
        cases += [("logits", shape) for shape in GPU_LOGITS_SHAPES]
    return cases


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each case on each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", choices=rival.SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rival.serve(prepare)
        return
    options = {"threads": args.threads, "device": args.device}
    rivals = rival.Rivals(__file__)
    rows = []
    for form, shape in list_cases(args.device):
        case = {"form": form, "shape": shape, **options}
        check(rivals, case)
        name = "{}, B={}, T={}, U={}, V={}".format(form, *shape)
        rows.append((name, rivals.compare(args.rounds)))
    torch.set_num_threads(args.threads)
    rival.report(rows)
    large_shape = LARGE_SHAPE if args.device == "cpu" else GPU_LARGE_SHAPE
    print("\nours alone, fused, B={}, T={}, U={}, V={}: ".format(*large_shape), end="", flush=True)
    measure_alone(importlib.import_module("transformers_parakeet"), {"form": "fused", "shape": large_shape, **options})


if __name__ == "__main__":
    main()
