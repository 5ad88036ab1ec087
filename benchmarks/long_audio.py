"""Measures speed and peak memory of recognising long recordings, compared with stock transformers.

    python benchmarks/long_audio.py [--minutes 1 5 20 60] [--heads ctc rnnt tdt] [--json long_audio.json]
    python benchmarks/long_audio.py --plot docs/long_audio.png --json long_audio.json

The models have the sizes of the 110M checkpoints and random weights. The bias of the blank is chosen so that about 3.5
labels are emitted per second, as in speech; otherwise a transducer with random weights could emit labels up to its
limit on every frame. The recordings are noise. Each measurement runs in a separate process, for stock transformers in
one that does not import this package and whose address space is limited. The benchmark first checks that both sides
give the same text for the shortest recording with full attention.

Methods: `full` attention, `local` attention with 128 frames on each side, and `windows` of 30 s. Stock transformers has
no local attention. Memory is the peak of resident memory minus the resident memory after the model was loaded and used
once.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rival

MINUTES = (1.0, 5.0, 20.0, 60.0)
HEADS = ("ctc", "rnnt", "tdt")
METHODS = ("full", "local", "windows")
SIDES = ("ours", "stock")
SAMPLING_RATE, VOCAB_SIZE, LOCAL_CONTEXT, WINDOW_S = 16000, 1025, 128, 30.0
ENCODER_SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 17,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "num_mel_bins": 80,
    "subsampling_conv_channels": 256,
}

# numbers on the vertical axes of the plot
TICKS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)

# labels per second of speech, and the range in which the bias of the blank is searched
LABELS_PER_SECOND, MAX_BLANK_SHIFT = 3.5, 30.0
# amount by which the scores of TDT's durations are lowered, so that they are below those of all tokens
DURATION_SHIFT = 100.0


def write_noise(path: Path, minutes: float) -> None:
    """Write a 16-bit WAV file of white noise whose loudness changes every 0.1 s."""
    import soundfile

    generator = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", SAMPLING_RATE, 1, "PCM_16") as file:
        for _ in range(round(minutes * 600)):
            amplitude = generator.uniform(0.005, 0.2)
            file.write((amplitude * generator.standard_normal(SAMPLING_RATE // 10)).astype(np.float32))


def build_tokenizer(tp: Any, head: str, vocab_size: int = VOCAB_SIZE) -> Any:
    """Build a tokenizer in which every label is a word, and the blank is the last token.

    Args:
        tp: the module `transformers_parakeet`.
        head: `ctc`, `rnnt` or `tdt`.
        vocab_size: number of tokens with the blank.
    """
    from tokenizers import Tokenizer, decoders, models

    # the full stop is in the vocabulary of every released checkpoint with punctuation
    special_tokens = ["<unk>", "."] if head == "ctc" else ["<unk>", "<pad>", "."]
    words = [f"\u2581w{index}" for index in range(vocab_size - 1 - len(special_tokens))]
    vocabulary = {token: index for index, token in enumerate([*special_tokens, *words])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.add_special_tokens([*special_tokens[:-1], "<pad>" if head == "ctc" else "<blank>"])
    return tp.ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def shift_blank_bias(model: Any, features: Any, seconds: float) -> None:
    """Shift the output bias of the blank until decoding emits about `LABELS_PER_SECOND`.

    Args:
        model: CTC, RNN-T or TDT model; changed in place.
        features: (1, T, F) log-mel features.
        seconds: duration of the features in seconds.
    """
    import torch

    vocab_size = model.config.vocab_size
    blank_id, num_labels = vocab_size - 1, LABELS_PER_SECOND * seconds
    if hasattr(model, "ctc_head"):
        logits = model(features).logits[0]
        margins = logits[:, :blank_id].amax(-1) - logits[:, blank_id]
        model.ctc_head.bias[blank_id] += torch.quantile(margins, 1 - num_labels / len(margins))
        return
    bias = model.joint.head.bias
    # no duration of 0; stock transformers searches for the best token among the durations as well
    bias[vocab_size : vocab_size + 1] -= DURATION_SHIFT
    bias[vocab_size:] -= DURATION_SHIFT
    encoded = model.get_audio_features(features)
    # all trials decode the same encoder output
    model.get_audio_features = lambda *args, **kwargs: encoded
    original_bias, low, high = bias[blank_id].item(), -MAX_BLANK_SHIFT, MAX_BLANK_SHIFT
    for _ in range(12):
        shift = (low + high) / 2
        bias[blank_id] = original_bias + shift
        emits_too_many = int(model.generate(features).hypotheses.lengths.sum()) > num_labels
        low, high = (shift, high) if emits_too_many else (low, shift)
    del model.get_audio_features


def save_model(head: str, folder: Path, recording: Path) -> None:
    """Save a model with random weights and its processor.

    Args:
        head: `ctc`, `rnnt` or `tdt`.
        folder: folder to write.
        recording: audio file on whose first 20 s (at most) the bias of the blank is shifted.
    """
    import soundfile
    import torch

    import transformers_parakeet as tp

    torch.manual_seed(0)
    name = {"ctc": "CTC", "rnnt": "RNNT", "tdt": "TDT"}[head]
    tokenizer = build_tokenizer(tp, head)
    fields: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "encoder_config": ENCODER_SIZES}
    fields["pad_token_id"] = tokenizer.pad_token_id
    if head != "ctc":
        fields.update(blank_token_id=VOCAB_SIZE - 1, decoder_hidden_size=640)
    model = getattr(tp, f"ParakeetFor{name}")(getattr(tp, f"Parakeet{name}Config")(**fields)).eval()
    extractor = tp.ParakeetFeatureExtractor()
    samples = soundfile.read(recording, frames=20 * SAMPLING_RATE, dtype="float32")[0]
    features = extractor(samples, sampling_rate=SAMPLING_RATE)["input_features"]
    if head != "ctc":
        model.generation_config.decoder_start_token_id = VOCAB_SIZE - 1
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith(("decoder.", "joint.")):
                parameter.normal_(std=1.0 if "embedding" in parameter_name else 0.08)
        shift_blank_bias(model, features, len(samples) / SAMPLING_RATE)
    model.save_pretrained(folder)
    tp.ParakeetProcessor(extractor, tokenizer).save_pretrained(folder)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Recognise one recording in this process.

    Args:
        case: `side` (`stock` or `ours`), `folder` of the model, `method`, `recording`, and `max_gb`, the limit of the
            address space of stock transformers in GB.

    Returns:
        `seconds` of computation, `mib`, the peak memory above that of the loaded model, and the recognised `text`.
    """
    if case["side"] == "ours":
        import transformers_parakeet  # noqa: F401
    import soundfile
    from transformers import pipeline

    recognise = pipeline("automatic-speech-recognition", case["folder"])
    options = {"chunk_length_s": WINDOW_S} if case["method"] == "windows" else {}
    if case["method"] == "local":
        recognise.model.set_attention_context(LOCAL_CONTEXT, LOCAL_CONTEXT)
    short = soundfile.read(case["recording"], frames=2 * SAMPLING_RATE, dtype="float32")[0]
    recognise({"raw": short, "sampling_rate": SAMPLING_RATE}, **options)
    if case["side"] == "stock":
        resource.setrlimit(resource.RLIMIT_AS, (int(case["max_gb"] * 1e9),) * 2)
    memory_before = rival.reset_peak()
    start = time.perf_counter()
    audio: Any = case["recording"]
    if case["side"] == "stock":
        # stock transformers needs FFmpeg or torchcodec to read a file
        audio = {"raw": soundfile.read(audio, dtype="float32")[0], "sampling_rate": SAMPLING_RATE}
    text = recognise(audio, **options)["text"]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "mib": (rival.peak_memory() - memory_before) / 1024, "text": text}


def measure_in_process(case: dict[str, Any]) -> dict[str, Any]:
    """Run `measure` in a new process; return its result, or `{"error": last line of standard error}`."""
    command = [sys.executable, __file__, "--measure", json.dumps(case)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode == 0:
        return dict(json.loads(process.stdout.splitlines()[-1]))
    lines = process.stderr.strip().splitlines()
    return {"error": lines[-1] if lines else f"signal {-process.returncode}"}


def choose_cases(heads: list[str], minutes: list[float], methods: list[str], sides: list[str]) -> list[dict[str, Any]]:
    """List the cases in the order of the table; stock transformers has no local attention."""
    return [
        {"head": head, "method": method, "minutes": length, "side": side}
        for head in heads
        for method in methods
        for length in sorted(minutes)
        for side in sides
        if side == "ours" or method != "local"
    ]


def run_cases(cases: list[dict[str, Any]], max_gb: float) -> list[dict[str, Any]]:
    """Measure all cases, print a row for each, and return the cases with their results.

    A longer recording is skipped if stock transformers failed on a shorter one.

    Args:
        cases: see `choose_cases`.
        max_gb: limit of the address space of stock transformers, in GB.

    Raises:
        SystemExit: The texts of the two sides differ for the shortest recording with full attention.
    """
    results: list[dict[str, Any]] = []
    failed: set[tuple[str, str, str]] = set()
    print("| head | method | minutes | side | seconds of audio per second | peak MiB | labels per second |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        recordings = {length: Path(folder) / f"{length:g}.wav" for length in {case["minutes"] for case in cases}}
        for length, path in recordings.items():
            write_noise(path, length)
        for head in dict.fromkeys(case["head"] for case in cases):
            command = [sys.executable, __file__, "--save", head, folder, str(recordings[min(recordings)])]
            subprocess.run(command, check=True, capture_output=True)
        for case in cases:
            group = (case["head"], case["method"], case["side"])
            paths = {"folder": str(Path(folder) / case["head"]), "recording": str(recordings[case["minutes"]])}
            skipped = {"error": "skipped, because a shorter recording failed"}
            outcome = skipped if group in failed else measure_in_process({**case, **paths, "max_gb": max_gb})
            if "error" in outcome:
                failed.add(group)
            results.append({**case, **outcome})
            print_row(results[-1])
            check_text(results)
    return results


def print_row(result: dict[str, Any]) -> None:
    """Print a row of the table."""
    columns = [result["head"], result["method"], f"{result['minutes']:g}", result["side"]]
    if "error" in result:
        columns += [result["error"][:100].replace("|", "/"), "", ""]
    else:
        seconds = 60 * result["minutes"]
        labels_per_second = len(result["text"].split()) / seconds
        columns += [f"{seconds / result['seconds']:.1f}", f"{result['mib']:.0f}", f"{labels_per_second:.1f}"]
    print("| " + " | ".join(columns) + " |", flush=True)


def check_text(results: list[dict[str, Any]]) -> None:
    """Check that the last two results have the same text, if they are both sides of full attention.

    Raises:
        SystemExit: The texts differ.
    """
    if len(results) < 2 or results[-1]["side"] != "stock" or results[-1]["method"] != "full":
        return
    ours, stock = results[-2], results[-1]
    is_shortest = ours["minutes"] == min(result["minutes"] for result in results)
    if is_shortest and "text" in ours and "text" in stock and ours["text"] != stock["text"]:
        raise SystemExit(f"the texts of {ours['head']} differ: {ours['text'][:200]!r} and {stock['text'][:200]!r}")


def draw_plot(results: list[dict[str, Any]], path: str) -> None:
    """Draw speed and memory over the length of the recording, averaged over the heads.

    Args:
        results: see `run_cases`.
        path: image file to write.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.ticker import NullFormatter, ScalarFormatter
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib, which is not installed: run `pip install matplotlib`") from error
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 4))
    measured = [result for result in results if "error" not in result]
    for side, method in dict.fromkeys((result["side"], result["method"]) for result in measured):
        lines: dict[float, list[dict[str, Any]]] = {}
        for result in measured:
            if (result["side"], result["method"]) == (side, method):
                lines.setdefault(result["minutes"], []).append(result)
        style = {"marker": "o", "linestyle": "-" if side == "ours" else "--", "label": f"{method}, {side}"}
        speeds = [60 * length / np.mean([result["seconds"] for result in group]) for length, group in lines.items()]
        speed.plot(list(lines), speeds, **style)
        memory.plot(list(lines), [max(result["mib"] for result in group) for group in lines.values()], **style)
    for axes, title in ((speed, "seconds of audio per second"), (memory, "peak memory above the model, MiB")):
        axes.set(xlabel="minutes of audio", title=title, xscale="log", yscale="log")
        # plain numbers instead of powers of ten
        for axis, ticks in ((axes.xaxis, MINUTES), (axes.yaxis, TICKS)):
            lowest, highest = axis.get_view_interval()
            axis.set_ticks([tick for tick in ticks if lowest <= tick <= highest])
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        axes.grid(True, which="both", alpha=0.3)
    memory.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure all cases, or one case in a child process, or draw the plot of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", nargs="+", type=float, default=list(MINUTES))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--max-gb", type=float, default=16.0, help="address space of stock transformers in GB")
    parser.add_argument("--json", default="long_audio.json", help="file for the results")
    parser.add_argument("--plot", help="draw the results in the JSON file to this image, without measuring")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
    elif options.save:
        head, folder, recording = options.save
        save_model(head, Path(folder) / head, Path(recording))
    elif options.plot:
        draw_plot(json.loads(Path(options.json).read_text())["results"], options.plot)
    else:
        import torch
        import transformers

        machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"{machine}, {versions}; stock limited to {options.max_gb:g} GB of address space")
        results = run_cases(
            choose_cases(options.heads, options.minutes, options.methods, options.sides), options.max_gb
        )
        report = {"machine": machine, "versions": versions, "max_gb": options.max_gb, "results": results}
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
