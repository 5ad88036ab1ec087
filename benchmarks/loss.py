"""Times the transducer loss, forward and backward, against stock's joint network and PyTorch loss, in one run.

    python benchmarks/loss.py [--rounds 5] [--threads 2] [--device cpu]

On a GPU it also runs the sizes that stock reports for its own CUDA kernel. Checks first that both sides give the same
loss and gradients.
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

WIDTH, DURATIONS = 640, (0, 1, 2, 3, 4)
# B, T, U, V: the sizes at which the loss is to be faster than stock's by a stated factor
FUSED = ((2, 250, 80, 1025), (2, 125, 40, 8193))
LOGITS = ((2, 50, 20, 1025),)
GPU_LOGITS = ((1, 50, 15, 1025), (1, 50, 15, 8193), (2, 100, 25, 8193), (4, 200, 50, 8193), (8, 400, 100, 8193))
# too large for stock here: 5 and 20 GB of scores
ALONE = (4, 375, 100, 8193)
GPU_ALONE = (16, 375, 100, 8193)
# largest relative distance of losses, and of gradients from the other side's, relative to the largest one
AGREEMENT = 1e-4


def random_inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Make inputs of a case that do not depend on the side."""
    batch, frames, labels, vocabulary = case["shape"]
    generator = torch.Generator().manual_seed(0)
    outputs = vocabulary + len(DURATIONS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"labels": torch.randint(vocabulary - 1, (batch, labels), generator=generator)}
    if case["form"] == "logits":
        tensors["tokens"] = normal(batch, frames, labels + 1, vocabulary)
        tensors["durations"] = normal(batch, frames, labels + 1, len(DURATIONS))
    else:
        tensors["encoder"], tensors["predictor"] = normal(batch, frames, WIDTH), normal(batch, labels + 1, WIDTH)
        tensors["weight"], tensors["bias"] = normal(outputs, WIDTH) / WIDTH**0.5, normal(outputs)
    tensors["frame_lengths"] = torch.full((batch,), frames)
    tensors["label_lengths"] = torch.full((batch,), labels)
    return {name: tensor.to(case["device"]) for name, tensor in tensors.items()}


def loss_of(module: Any, side: str, case: dict[str, Any], given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of a case as one side does it."""
    vocabulary = case["shape"][3]
    lengths = given["frame_lengths"], given["label_lengths"]
    if side == "ours" and case["form"] == "fused":
        losses = importlib.import_module(f"{module.__name__}.losses")
        states = given["encoder"], given["predictor"], given["weight"], given["bias"]
        return losses.transducer_loss(
            *states, given["labels"], *lengths, vocabulary - 1, durations=DURATIONS, reduction="mean_volume"
        )
    if case["form"] == "fused":
        hidden = torch.relu(given["encoder"][:, :, None] + given["predictor"][:, None])
        logits = torch.nn.functional.linear(hidden, given["weight"], given["bias"])
        tokens, durations = logits[..., :vocabulary], logits[..., vocabulary:]
    else:
        tokens, durations = given["tokens"], given["durations"]
    name = f"{module.__name__}.losses" if side == "ours" else "transformers.loss.loss_tdt"
    loss = importlib.import_module(name).tdt_loss
    return loss(tokens, durations, given["labels"], *lengths, vocabulary - 1, DURATIONS, reduction="mean_volume")


def prepare(module: Any, side: str, case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any, str], None]]:
    """Make the inputs of a case."""
    torch.set_num_threads(case["threads"])
    given = random_inputs(case)
    leaves = [tensor.requires_grad_() for tensor in given.values() if tensor.is_floating_point()]

    def run() -> list[torch.Tensor]:
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of(module, side, case, given)
        loss.backward()
        if case["device"] != "cpu":
            torch.cuda.synchronize()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def save(out: list[torch.Tensor], path: str) -> None:
        torch.save([tensor.cpu() for tensor in out], path)

    return run, save


def check(rivals: rival.Rivals, case: dict[str, Any]) -> None:
    """Compare loss and gradients of both sides."""
    out = rivals.results(case, torch.load)
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(out["stock"], out["ours"], strict=True))
    print(f"{case}: {worst:.1e} apart", file=sys.stderr)
    if not worst < AGREEMENT:
        raise SystemExit(f"loss or gradients of {case} differ between stock and ours by {worst:.1e}")


def alone(module: Any, case: dict[str, Any]) -> None:
    """Take one training step of a case that only this package can, and print what it needs."""
    run, _ = prepare(module, "ours", case)
    before = rival.reset_peak(case["device"])
    start = time.perf_counter()
    run()
    seconds, peak = time.perf_counter() - start, rival.peak_memory(case["device"])
    print(f"{seconds:.1f} s, {(peak - before) / 1024:.0f} MiB above the inputs")


def cases(device: str) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Forms and shapes to compare on a device."""
    rows = [("fused", shape) for shape in FUSED] + [("logits", shape) for shape in LOGITS]
    if device != "cpu":
        rows += [("logits", shape) for shape in GPU_LOGITS]
    return rows


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", choices=(*rival.SIDES, "alone"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    options = {"threads": args.threads, "device": args.device}
    if args.side in rival.SIDES:
        rival.serve(prepare)
        return
    large = {"form": "fused", "shape": ALONE if args.device == "cpu" else GPU_ALONE, **options}
    rivals = rival.Rivals(__file__)
    rows = []
    for form, shape in cases(args.device):
        case = {"form": form, "shape": shape, **options}
        check(rivals, case)
        name = "{}, B={}, T={}, U={}, V={}".format(form, *shape)
        rows.append((name, rivals.compare(args.rounds)))
    torch.set_num_threads(args.threads)
    rival.report(rows)
    print("\nours alone, fused, B={}, T={}, U={}, V={}: ".format(*large["shape"]), end="", flush=True)
    alone(importlib.import_module("transformers_parakeet"), large)


if __name__ == "__main__":
    main()
