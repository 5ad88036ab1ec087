"""Time and memory of the kernel against plain PyTorch, forward and backward: `python benchmarks/loss.py` on a GPU.

PyTorch is log-softmax and a loop over frames in float32, with autograd through it: what a transducer loss without a
kernel does. Each size first checks that both sides give the same loss and gradients; then each side runs in turn, and
medians of their times and peaks of memory above the inputs are printed with their ratios. What PyTorch has no memory
for is run by the kernel alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent.parent / "torch-ext"))

from transducer_loss import transducer_loss, transducer_loss_from_logits

DURATIONS = (0, 1, 2, 3, 4)
WIDTH = 640
# batch, frames, labels, tokens
SIZES = ((1, 50, 15, 1025), (1, 50, 15, 8193), (2, 100, 25, 8193), (4, 200, 50, 8193), (8, 400, 100, 8193))
FUSED_SIZES = ((2, 125, 40, 8193), (4, 200, 50, 8193), (16, 375, 100, 8193))
SMALL = ((1, 3, 2, 9), (2, 4, 1, 9))
# relative to the largest value; products in TF32 are rounded to 5e-4
AGREEMENT = 5e-3


def plain_loss(token_logits, duration_logits, labels):
    """Sum of the losses of utterances of full length, by a loop over frames."""
    batch, frames, columns, _ = token_logits.shape
    tokens = token_logits.float().log_softmax(-1)
    timing = duration_logits.float().log_softmax(-1)
    blank = tokens[..., -1]
    index = labels[:, None, :, None].expand(batch, frames, columns - 1, 1)
    label = tokens[:, :, :-1].gather(-1, index)[..., 0]
    never = blank.new_full((batch, columns), -1e30)
    rows = []
    for frame in range(frames + 1):
        arriving = [never]
        if frame == 0:
            arriving.append(torch.cat((never[:, :1] * 0, never[:, 1:]), 1))
        for place, duration in enumerate(DURATIONS):
            start = frame - duration
            if duration > 0 and start >= 0:
                arriving.append(rows[start] + blank[:, start] + timing[:, start, :, place])
                if frame < frames:
                    spoken = rows[start][:, :-1] + label[:, start] + timing[:, start, :-1, place]
                    arriving.append(torch.cat((never[:, :1], spoken), 1))
        row = torch.stack(arriving).logsumexp(0)
        if frame < frames:
            # labels of duration 0: a recurrence along the labels, as a cumulative sum
            stay = (label[:, frame] + timing[:, frame, :-1, DURATIONS.index(0)]).double()
            total = torch.cat((stay.new_zeros(batch, 1), stay.cumsum(1)), 1)
            row = (total + torch.logcumsumexp(row.double() - total, 1)).float()
        rows.append(row)
    # the last row is reached by blanks alone, from the last label
    landing = [
        rows[frames - duration][:, -1] + blank[:, frames - duration, -1] + timing[:, frames - duration, -1, place]
        for place, duration in enumerate(DURATIONS)
        if 0 < duration <= frames
    ]
    return -torch.stack(landing).logsumexp(0).sum()


def logits_case(size, device, dtype):
    """Two ways to the loss of logits, and their inputs."""
    batch, frames, count, tokens = size
    torch.manual_seed(0)
    inputs = [
        torch.randn(batch, frames, count + 1, outputs, device=device, dtype=dtype)
        for outputs in (tokens, len(DURATIONS))
    ]
    labels = torch.randint(tokens - 1, (batch, count), device=device)
    lengths = [torch.full((batch,), value, device=device) for value in (frames, count)]

    def kernel(*leaves, overwrite=True):
        return transducer_loss_from_logits(
            *leaves, labels, *lengths, tokens - 1, DURATIONS, reduction="sum", overwrite_logits=overwrite
        )

    return inputs, lambda *leaves: plain_loss(*leaves, labels), kernel


def fused_case(size, device, dtype):
    """Two ways to the loss of the joint network's inputs, and these."""
    batch, frames, count, tokens = size
    torch.manual_seed(0)
    outputs = tokens + len(DURATIONS)
    shapes = ((batch, frames, WIDTH), (batch, count + 1, WIDTH), (outputs, WIDTH), (outputs,))
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    inputs[2] /= WIDTH**0.5
    labels = torch.randint(tokens - 1, (batch, count), device=device)
    lengths = [torch.full((batch,), value, device=device) for value in (frames, count)]

    def plain(encoder, predictor, weight, bias):
        logits = torch.relu(encoder[:, :, None] + predictor[:, None]) @ weight.t() + bias
        return plain_loss(logits[..., :tokens], logits[..., tokens:], labels)

    def kernel(*leaves, overwrite=True):
        return transducer_loss(*leaves, labels, *lengths, tokens - 1, DURATIONS, reduction="sum")

    return inputs, plain, kernel


def gradients(side, inputs, **options):
    """Loss and gradients."""
    leaves = [given.detach().clone().requires_grad_() for given in inputs]
    loss = side(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(inputs, plain, kernel):
    """Refuse to time sides that disagree."""
    for one, other in zip(gradients(plain, inputs), gradients(kernel, inputs, overwrite=False), strict=True):
        error = ((one - other).abs().max() / one.abs().max()).item()
        if not error <= AGREEMENT:
            raise SystemExit(f"the sides differ by {error:.2g} of the largest value")


def measure(side, inputs):
    """Seconds of one forward and backward, and bytes at its peak above the inputs."""
    leaves = [given.detach().clone().requires_grad_() for given in inputs]
    on_gpu = leaves[0].is_cuda
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    side(*leaves).backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before if on_gpu else 0


def compare(name, size, case, args):
    """Print one line of the table."""
    inputs, plain, kernel = case
    sides = {"kernel": kernel, "PyTorch": plain}
    try:
        check(inputs, plain, kernel)
        measure(plain, inputs)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        del sides["PyTorch"]
    measure(kernel, inputs)
    found = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, run in sides.items():
            found[side].append(measure(run, inputs))
    seconds = {side: statistics.median(once for once, _ in runs) for side, runs in found.items()}
    peak = {side: max(memory for _, memory in runs) for side, runs in found.items()}
    line = f"{name:7} {size!s:22} {seconds['kernel'] * 1e3:10.2f} {peak['kernel'] / 2**20:10.1f}"
    if "PyTorch" in sides:
        line += f" {seconds['PyTorch'] * 1e3:12.1f} {peak['PyTorch'] / 2**20:12.1f}"
        line += f" {seconds['PyTorch'] / seconds['kernel']:8.1f} {peak['PyTorch'] / max(1, peak['kernel']):8.1f}"
    else:
        line += " PyTorch has too little memory"
    print(line, flush=True)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument(
        "--small", action="store_true", help="sizes that Triton's interpreter can do, to try the script"
    )
    args = parser.parse_args()
    dtype, device = getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted: times mean nothing"
    print(f"{name}; torch {torch.__version__}, triton {triton.__version__}; {args.dtype}; durations {DURATIONS}")
    print("                                 kernel     kernel      PyTorch      PyTorch    times     less")
    print("form    batch, frames, labels, V     ms        MiB           ms          MiB   faster   memory")
    for size in SMALL if args.small else SIZES:
        compare("logits", size, logits_case(size, device, dtype), args)
    for size in SMALL if args.small else FUSED_SIZES:
        compare("fused", size, fused_case(size, device, dtype), args)


if __name__ == "__main__":
    main()
