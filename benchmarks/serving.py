"""Measures the server: results under load, throughput compared with one request at a time, and times of requests.

    python benchmarks/serving.py [--requests 200] [--clients 1 8 32] [--threads 2] [--json serving.json]
    python benchmarks/serving.py --soak MINUTES [--json soak.json]

1. The demo model answers 200 concurrent requests. Every text is compared with the text of the clip alone.
2. A model of the 110M shape with random weights answers short clips of 1, 8 and 32 clients, each of which sends its
   next request after the response. The texts are compared with those of `transcribe`, clip by clip. The speed of one
   request at a time is that of one client, and that of a loop over `transcribe` with the same model without a server.
3. `--soak` runs `serving_soak.py`: good, broken, huge, slow and cut-off requests, and the memory of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import long_audio
import numpy as np
import serving_soak
import soundfile
from serving_client import Client, Server, encode_form, start_server

import transformers_parakeet as tp
from transformers_parakeet.transcription import load_pipeline, transcribe

SAMPLING_RATE = 16000
# lengths in seconds of the short clips
CLIP_LENGTHS_S = (1.0, 1.5, 2.0, 2.5, 3.0)
# requests per client in a measurement, and at least in total
REQUESTS_PER_CLIENT, MIN_REQUESTS = 4, 24


def make_clips() -> list[bytes]:
    """Make short WAV files: cuts from the demo clips at different positions."""
    paths = sorted((tp.demo_model_path() / "clips").glob("*.flac"))
    samples = np.concatenate([soundfile.read(path, dtype="float32")[0] for path in paths])
    clips, start = [], 0
    for index in range(20):
        length = round(CLIP_LENGTHS_S[index % len(CLIP_LENGTHS_S)] * SAMPLING_RATE)
        buffer = io.BytesIO()
        soundfile.write(buffer, samples[start : start + length], SAMPLING_RATE, format="WAV", subtype="PCM_16")
        clips.append(buffer.getvalue())
        start = (start + length // 2) % (len(samples) - 3 * SAMPLING_RATE)
    return clips


async def run_clients(server: Server, forms: Sequence[bytes], num_clients: int, num_requests: int) -> dict[str, Any]:
    """Send requests from several clients, each of which sends its next request after the response.

    Args:
        server: the server.
        forms: the forms; request i sends form i modulo their number.
        num_clients: number of clients.
        num_requests: number of requests of all clients together.

    Returns:
        The texts of the requests, the seconds of each, and the seconds of all together.
    """
    texts: list[str] = [""] * num_requests
    seconds = [0.0] * num_requests
    indices = iter(range(num_requests))

    async def run_client() -> None:
        """Send requests until none is left."""
        client = Client(server.port)
        for index in indices:
            start = time.perf_counter()
            status, content = await client.post(forms[index % len(forms)])
            seconds[index] = time.perf_counter() - start
            if status != 200:
                raise RuntimeError(f"request {index} must succeed, got the status {status}: {content!r}")
            texts[index] = json.loads(content)["text"]
        client.close()

    start = time.perf_counter()
    await asyncio.gather(*(run_client() for _ in range(num_clients)))
    return {"texts": texts, "seconds": seconds, "total_s": time.perf_counter() - start}


def count_different(texts: Sequence[str], expected: Sequence[str]) -> int:
    """Count the requests whose text is not that of their clip."""
    return sum(text != expected[index % len(expected)] for index, text in enumerate(texts))


def check_load(num_requests: int, threads: int) -> dict[str, Any]:
    """Send concurrent requests to the demo model, and compare every text with that of the clip alone.

    Args:
        num_requests: number of requests, all at the same time.
        threads: number of threads of the model.
    """
    paths = sorted((tp.demo_model_path() / "clips").glob("*.flac"))
    pipeline = load_pipeline("demo", device="cpu", dtype="float32")
    expected = [next(iter(transcribe(str(path), pipeline, batch_size=1))).text for path in paths]
    assert len(set(expected)) == len(expected), "the clips must have different texts"
    forms = [encode_form(path.read_bytes(), "demo") for path in paths]
    with start_server("demo", "--dtype", "float32", threads=threads) as server:
        run = asyncio.run(run_clients(server, forms, num_requests, num_requests))
        num_different = count_different(run["texts"], expected)
    result = {"requests": num_requests, "wrong": num_different, "seconds": round(run["total_s"], 3),
              "p95_s": round(quantile(run["seconds"], 0.95), 3)}  # fmt: skip
    print(f"demo model, {num_requests} requests at the same time: {num_requests - num_different} right in "
          f"{run['total_s']:.2f} s")  # fmt: skip
    if num_different:
        raise RuntimeError(f"all texts must be right, but {num_different} of {num_requests} are wrong")
    return result


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return the smallest value that at least a fraction of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(np.ceil(fraction * len(ordered))) - 1)]


def time_transcribe(folder: str, clips: Sequence[bytes], threads: int) -> tuple[list[str], float]:
    """Transcribe clips one at a time without a server; the texts, and the requests per second (best of 3 rounds)."""
    import torch

    torch.set_num_threads(threads)
    pipeline = load_pipeline(folder)
    texts = [result.text for result in transcribe(clips, pipeline, batch_size=1)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert [result.text for result in transcribe(clips, pipeline, batch_size=1)] == texts
        seconds.append(time.perf_counter() - start)
    return texts, len(clips) / min(seconds)


def measure_throughput(clients: Sequence[int], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Measure a model of the 110M shape with several numbers of clients.

    Args:
        clients: numbers of clients.
        threads: number of threads of the model.
        rounds: number of measurements per number of clients, of which the best is printed.
    """
    clips = make_clips()
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder, "recording.wav")
        recording.write_bytes(clips[-1])
        long_audio.save_model("tdt", Path(folder, "model"), recording)
        name = str(Path(folder, "model"))
        expected, direct_rate = time_transcribe(name, clips, threads)
        assert len(set(expected)) > len(clips) // 2, "the texts must differ, so that swapped results are noticed"
        forms = [encode_form(clip, name) for clip in clips]
        rows = []
        with start_server(name, threads=threads) as server:
            asyncio.run(run_clients(server, forms, 8, 40))
            for num_clients in clients:
                num_requests = max(MIN_REQUESTS, REQUESTS_PER_CLIENT * num_clients)
                runs = [asyncio.run(run_clients(server, forms, num_clients, num_requests)) for _ in range(rounds)]
                num_different = sum(count_different(run["texts"], expected) for run in runs)
                best = min(runs, key=lambda run: run["total_s"])
                rows.append(
                    {
                        "clients": num_clients,
                        "requests_per_s": num_requests / best["total_s"],
                        "p50_s": statistics.median(best["seconds"]),
                        "p95_s": quantile(best["seconds"], 0.95),
                        "different": num_different,
                        "of": rounds * num_requests,
                    }
                )
            batches = [line for line in server.fetch("/metrics").splitlines() if "parakeet_batch_windows_" in line]
    print("\n".join(line for line in batches if "bucket" not in line))
    print(f"one at a time with `transcribe`, without a server: {direct_rate:.2f} clips per second")
    print("| clients | requests per second | to `transcribe` | to one client | p50 | p95 | different texts |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        row["to_transcribe"] = row["requests_per_s"] / direct_rate
        row["to_one_client"] = row["requests_per_s"] / rows[0]["requests_per_s"]
        print(
            f"| {row['clients']} | {row['requests_per_s']:.1f} | {row['to_transcribe']:.2f} | "
            f"{row['to_one_client']:.2f} | {1000 * row['p50_s']:.0f} ms | {1000 * row['p95_s']:.0f} ms | "
            f"{row['different']} of {row['of']} |"
        )
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="concurrent requests to the demo model; 0 for none")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32], help="numbers of clients")
    parser.add_argument("--rounds", type=int, default=2, help="measurements per number of clients")
    parser.add_argument("--threads", type=int, default=2, help="threads of the model")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes of mixed requests instead of the measurements")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "threads": arguments.threads}
    if arguments.soak:
        result["soak"] = serving_soak.run_soak(arguments.soak, arguments.threads)
    else:
        if arguments.requests:
            result["load"] = check_load(arguments.requests, arguments.threads)
        if arguments.clients:
            result["throughput"] = measure_throughput(arguments.clients, arguments.threads, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
