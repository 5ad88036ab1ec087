"""Time and memory of the kernel against plain PyTorch, forward and backward: `python benchmarks/loss.py` on a GPU.

The PyTorch loss is a log-softmax and a loop over frames in float32, differentiated by autograd. For each size the
script first checks that both sides give the same loss and gradients. Then the sides take turns; the medians of their
times, the peaks of their memory above the inputs, and the ratios are printed. A size for which PyTorch has too little
memory is run by the kernel alone.
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
JOINT_SIZE = 640
# utterances, frames, labels, vocabulary
SIZES = ((1, 50, 15, 1025), (1, 50, 15, 8193), (2, 100, 25, 8193), (4, 200, 50, 8193), (8, 400, 100, 8193))
FUSED_SIZES = ((2, 125, 40, 8193), (4, 200, 50, 8193), (16, 375, 100, 8193))
SMALL_SIZES = ((1, 3, 2, 9), (2, 4, 1, 9))
# largest difference of the sides, relative to the largest value; TF32 rounds products to 5e-4
TOLERANCE = 5e-3


def pytorch_loss(token_logits, duration_logits, labels):
    """Compute the sum of the TDT losses of utterances of full length by a loop over frames.

    Args:
        token_logits: (B, T, U+1, V).
        duration_logits: (B, T, U+1, D).
        labels: (B, U).

    Returns:
        Scalar.
    """
    batch, num_frames, num_positions, _ = token_logits.shape
    token_log_probs = token_logits.float().log_softmax(-1)
    duration_log_probs = duration_logits.float().log_softmax(-1)
    blank = token_log_probs[..., -1]
    label_index = labels[:, None, :, None].expand(batch, num_frames, num_positions - 1, 1)
    label = token_log_probs[:, :, :-1].gather(-1, label_index)[..., 0]
    impossible = blank.new_full((batch, num_positions), -1e30)
    # log_alpha of each frame, (B, U+1)
    log_alpha = []
    for frame in range(num_frames):
        terms = [impossible]
        if frame == 0:
            terms.append(torch.cat((impossible[:, :1] * 0, impossible[:, 1:]), 1))
        for index, duration in enumerate(DURATIONS):
            source = frame - duration
            if duration > 0 and source >= 0:
                path = log_alpha[source] + duration_log_probs[:, source, :, index]
                terms.append(path + blank[:, source])
                terms.append(torch.cat((impossible[:, :1], path[:, :-1] + label[:, source]), 1))
        entering = torch.stack(terms).logsumexp(0)
        # labels of duration 0 are a recurrence along the labels, computed by cumulative sums
        weights = (label[:, frame] + duration_log_probs[:, frame, :-1, DURATIONS.index(0)]).double()
        total = torch.cat((weights.new_zeros(batch, 1), weights.cumsum(1)), 1)
        log_alpha.append((total + torch.logcumsumexp(entering.double() - total, 1)).float())
    # the last arc is a blank from the last label to the end of the frames
    final_terms = [
        log_alpha[num_frames - duration][:, -1]
        + blank[:, num_frames - duration, -1]
        + duration_log_probs[:, num_frames - duration, -1, index]
        for index, duration in enumerate(DURATIONS)
        if 0 < duration <= num_frames
    ]
    return -torch.stack(final_terms).logsumexp(0).sum()


def make_logits_case(size, device, dtype):
    """Return the inputs of the loss from logits, and the functions of the two sides.

    Args:
        size: utterances, frames, labels and vocabulary.
        device: device of the inputs.
        dtype: dtype of the inputs.
    """
    batch, num_frames, num_labels, vocab_size = size
    torch.manual_seed(0)
    inputs = [
        torch.randn(batch, num_frames, num_labels + 1, outputs, device=device, dtype=dtype)
        for outputs in (vocab_size, len(DURATIONS))
    ]
    labels = torch.randint(vocab_size - 1, (batch, num_labels), device=device)
    lengths = [torch.full((batch,), length, device=device) for length in (num_frames, num_labels)]

    def run_kernel(*leaves, overwrite=True):
        return transducer_loss_from_logits(
            *leaves, labels, *lengths, vocab_size - 1, DURATIONS, reduction="sum", overwrite_logits=overwrite
        )

    return inputs, lambda *leaves: pytorch_loss(*leaves, labels), run_kernel


def make_fused_case(size, device, dtype):
    """Return the inputs of the fused loss, and the functions of the two sides; see `make_logits_case`."""
    batch, num_frames, num_labels, vocab_size = size
    torch.manual_seed(0)
    outputs = vocab_size + len(DURATIONS)
    shapes = ((batch, num_frames, JOINT_SIZE), (batch, num_labels + 1, JOINT_SIZE), (outputs, JOINT_SIZE), (outputs,))
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    inputs[2] /= JOINT_SIZE**0.5
    labels = torch.randint(vocab_size - 1, (batch, num_labels), device=device)
    lengths = [torch.full((batch,), length, device=device) for length in (num_frames, num_labels)]

    def run_pytorch(encoder, predictor, weight, bias):
        logits = torch.relu(encoder[:, :, None] + predictor[:, None]) @ weight.t() + bias
        return pytorch_loss(logits[..., :vocab_size], logits[..., vocab_size:], labels)

    def run_kernel(*leaves, overwrite=True):
        return transducer_loss(*leaves, labels, *lengths, vocab_size - 1, DURATIONS, reduction="sum")

    return inputs, run_pytorch, run_kernel


def compute_gradients(loss_function, inputs, **options):
    """Return the loss of the inputs and its gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    loss = loss_function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check_agreement(inputs, run_pytorch, run_kernel):
    """Exit if the two sides differ."""
    results = compute_gradients(run_kernel, inputs, overwrite=False)
    for expected, result in zip(compute_gradients(run_pytorch, inputs), results, strict=True):
        error = ((expected - result).abs().max() / expected.abs().max()).item()
        # this form of the comparison also catches NaN
        if not error <= TOLERANCE:
            raise SystemExit(f"the sides differ by {error:.2g} of the largest value")


def measure(loss_function, inputs):
    """Return the seconds of one forward and backward, and the bytes at its peak above the inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    on_gpu = leaves[0].is_cuda
    allocated = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    start = time.perf_counter()
    loss_function(*leaves).backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - allocated if on_gpu else 0


def print_comparison(name, size, case, rounds):
    """Check one size, measure both sides and print one line of the table.

    Args:
        name: `logits` or `fused`.
        size: utterances, frames, labels and vocabulary.
        case: inputs and the functions of the two sides.
        rounds: number of measurements of each side.
    """
    inputs, run_pytorch, run_kernel = case
    sides = {"kernel": run_kernel, "PyTorch": run_pytorch}
    try:
        check_agreement(inputs, run_pytorch, run_kernel)
        measure(run_pytorch, inputs)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        del sides["PyTorch"]
    measure(run_kernel, inputs)
    measurements = {side: [] for side in sides}
    for _ in range(rounds):
        for side, loss_function in sides.items():
            measurements[side].append(measure(loss_function, inputs))
    seconds = {side: statistics.median(time for time, _ in runs) for side, runs in measurements.items()}
    peak = {side: max(memory for _, memory in runs) for side, runs in measurements.items()}
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
    parser.add_argument("--small", action="store_true", help="sizes for Triton's interpreter, to test this script")
    args = parser.parse_args()
    dtype, device = getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted: its times say nothing about a GPU"
    print(f"{name}; torch {torch.__version__}, triton {triton.__version__}; {args.dtype}; durations {DURATIONS}")
    print("                                 kernel     kernel      PyTorch      PyTorch    times     less")
    print("form    batch, frames, labels, V     ms        MiB           ms          MiB   faster   memory")
    for size in SMALL_SIZES if args.small else SIZES:
        print_comparison("logits", size, make_logits_case(size, device, dtype), args.rounds)
    for size in SMALL_SIZES if args.small else FUSED_SIZES:
        print_comparison("fused", size, make_fused_case(size, device, dtype), args.rounds)


if __name__ == "__main__":
    main()
