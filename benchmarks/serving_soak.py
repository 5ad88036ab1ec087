"""Sends good, broken, huge, slow and cut-off requests to a server for some minutes, and measures its memory.

`serving.py --soak MINUTES` runs it. Every good request must be answered with the text that its file has alone. Every
bad request must get the status that its kind has. The memory of the processes of the server after the warm-up is
compared at the start and at the end.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import statistics
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soundfile
from serving_client import Client, Server, encode_form, encode_head, find_processes, read_memory_mib, start_server

import transformers_parakeet as tp
from transformers_parakeet.transcription import load_pipeline, transcribe

SAMPLING_RATE = 16000
# seconds in which a bad request must be answered
# on a machine that is shared with other programs
MAX_ANSWER_S = 15.0
# maximum length in seconds of a recording
MAX_DURATION_S = 600
# fraction of the time that is not used for the comparison of the memory, and at most this number of seconds
WARM_UP, MAX_WARM_UP_S = 0.2, 300.0
# the memory must not grow by more than this fraction
MAX_GROWTH = 0.05
# seconds after which a request is an error
MAX_REQUEST_S = 120.0
# seconds between two measurements of the memory
SAMPLE_S = 2.0
# seconds that a worker waits between two requests, so that the load is low
PAUSE_S = 0.25
NUM_WORKERS = 6


@dataclass
class Soak:
    """The state of a run.

    Args:
        server: the server.
        files: content and expected text of each good file.
        counts: number of requests of each kind.
        errors: what was wrong with the answers.
        seconds: time of each good request in seconds.
        slowest_s: longest time of the answer to a bad request, by kind.
    """

    server: Server
    files: list[tuple[bytes, str]]
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    slowest_s: dict[str, float] = field(default_factory=dict)

    async def send(self, body: bytes, rest: bytes = b"", length: int | None = None) -> tuple[int, bytes]:
        """Send a form with a new connection, the rest slowly, and return status and body of the response."""
        client = Client(self.server.port)
        await client.connect()
        try:
            client.writer.write(encode_head(len(body) + len(rest) if length is None else length) + body)
            if rest:
                # half a second for the rest, which is fast enough
                for start in range(0, len(rest), max(1, len(rest) // 5)):
                    await asyncio.sleep(0.1)
                    client.writer.write(rest[start : start + max(1, len(rest) // 5)])
            return await client.read_response()
        finally:
            client.close()

    async def expect(self, kind: str, statuses: tuple[int, ...], answer: Awaitable[tuple[int, bytes]]) -> None:
        """Check the status of the answer to a bad request, and its time."""
        start = time.monotonic()
        status, content = await answer
        elapsed = time.monotonic() - start
        self.slowest_s[kind] = max(self.slowest_s.get(kind, 0.0), elapsed)
        if status not in statuses or elapsed > MAX_ANSWER_S:
            self.errors.append(f"{kind}: status {status} after {elapsed:.1f} s, {content[:200]!r}")


async def send_good(soak: Soak, draw: random.Random) -> None:
    """Send a good file, with one connection, in one of the formats."""
    content, expected = draw.choice(soak.files)
    kind = draw.choice(("json", "verbose_json", "text"))
    start = time.monotonic()
    status, answer = await soak.send(encode_form(content, "demo", response_format=kind))
    soak.seconds.append(time.monotonic() - start)
    text = answer.decode().strip() if kind == "text" or status != 200 else json.loads(answer)["text"]
    if status != 200 or text != expected:
        soak.errors.append(f"good: status {status}, {text!r}, expected {expected!r}")


async def send_slow(soak: Soak, draw: random.Random) -> None:
    """Send a good file slowly, but fast enough."""
    content, expected = draw.choice(soak.files)
    body = encode_form(content, "demo")
    status, answer = await soak.send(body[:1000], body[1000:])
    if status != 200 or json.loads(answer)["text"] != expected:
        soak.errors.append(f"slow: status {status}, {answer[:200]!r}")


async def send_broken(soak: Soak, draw: random.Random) -> None:
    """Send a file that is cut, is noise, or is text; or a broken form."""
    content, _ = draw.choice(soak.files)
    broken = draw.choice(
        (content[: len(content) // 2], draw.randbytes(5000), b"some text " * 200, b"", b"RIFF" + content[4:400])
    )
    body = encode_form(broken, draw.choice(("demo", "other")), draw.choice(("a.flac", "../../etc/passwd", "\x00")))
    if draw.random() < 0.3:
        body = body[: len(body) // 2]
    await soak.expect("broken", (400, 404), soak.send(body))


async def send_huge(soak: Soak, draw: random.Random) -> None:
    """Send a file that is too long, or that expands; or state a length of 2 GB."""
    kind = draw.choice(("length", "header", "bomb"))
    if kind == "length":
        await soak.expect("huge", (413,), soak.send(b"", length=2 * 1024**3))
    elif kind == "header":
        num_bytes = 10 * 3600 * 2 * SAMPLING_RATE
        header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", num_bytes + 36, b"WAVE", b"fmt ", 16, 1, 1, SAMPLING_RATE,
                             2 * SAMPLING_RATE, 2, 16, b"data", num_bytes)  # fmt: skip
        await soak.expect("huge", (400, 413), soak.send(encode_form(header + bytes(3200), "demo")))
    else:
        await soak.expect("huge", (413,), soak.send(encode_form(make_bomb(), "demo")))


async def send_long(soak: Soak, draw: random.Random) -> None:
    """Send a recording of some minutes, which has many windows."""
    content, expected = soak.files[-1]
    status, answer = await soak.send(encode_form(content, "demo"))
    if status != 200 or json.loads(answer)["text"] != expected:
        soak.errors.append(f"long: status {status}, {answer[:200]!r}")


async def send_cut_off(soak: Soak, draw: random.Random) -> None:
    """Close the connection within the upload, or while the server computes."""
    content, _ = draw.choice(soak.files)
    body = encode_form(content, "demo", stream=draw.choice(("true", "false")))
    client = Client(soak.server.port)
    await client.connect()
    client.writer.write((encode_head(len(body)) + body)[: draw.choice((10, 300, 5000, 10**9))])
    await asyncio.sleep(draw.choice((0.0, 0.02, 0.1)))
    client.close()


async def send_loris(soak: Soak, draw: random.Random) -> None:
    """Send a part of an upload, and then nothing."""
    content, _ = draw.choice(soak.files)
    body = encode_form(content, "demo")
    await soak.expect("loris", (408,), soak.send(body[:500], length=len(body)))


async def send_live(soak: Soak, draw: random.Random) -> None:
    """Stream a clip over a WebSocket, or drop the connection in the middle."""
    import websockets

    content, expected = draw.choice(soak.files[:-1])
    samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    is_dropped = draw.random() < 0.5
    url = f"ws://127.0.0.1:{soak.server.port}/v1/realtime"
    async with websockets.connect(url) as socket:
        audio_format = {"type": "audio/pcm", "rate": rate}
        session = {"type": "transcription", "audio": {"input": {"format": audio_format}}}
        await socket.send(json.dumps({"type": "session.update", "session": session}))
        blocks = np.array_split(samples, 10)
        for block in blocks[: 5 if is_dropped else 10]:
            audio = base64.b64encode(block.tobytes()).decode()
            await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
        if is_dropped:
            socket.transport.abort()
            return
        await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        while True:
            event = json.loads(await asyncio.wait_for(socket.recv(), 30))
            if event["type"] == "error":
                soak.errors.append(f"live: {event}")
                return
            if event["type"].endswith(".completed"):
                break
    # a stream decodes in chunks, so its words can differ from those of the whole file
    if not event["transcript"]:
        soak.errors.append(f"live: no text, expected {expected!r}")


# kind, weight, function; about one request of three is good
KINDS: list[tuple[str, int, Callable[[Soak, random.Random], Awaitable[None]]]] = [
    ("good", 40, send_good),
    ("slow", 8, send_slow),
    ("broken", 16, send_broken),
    ("huge", 8, send_huge),
    ("long", 2, send_long),
    ("cut_off", 14, send_cut_off),
    ("loris", 2, send_loris),
    ("live", 10, send_live),
]


def make_bomb() -> bytes:
    """Make a FLAC file of silence that is longer than the maximum, and whose header does not state the length."""
    if not _BOMB:
        buffer = io.BytesIO()
        with soundfile.SoundFile(buffer, "w", SAMPLING_RATE, 1, format="FLAC") as file:
            for _ in range(round(1.5 * MAX_DURATION_S / 60)):
                file.write(np.zeros(60 * SAMPLING_RATE, dtype=np.int16))
        content = bytearray(buffer.getvalue())
        # the number of samples has 36 bits, which end at byte 26; 0 means unknown
        content[21] &= 0xF0
        content[22:26] = bytes(4)
        _BOMB.append(bytes(content))
    return _BOMB[0]


_BOMB: list[bytes] = []


def make_files() -> list[tuple[bytes, str]]:
    """Return content and text of the demo clips, and at the end of a recording of three minutes."""
    pipeline = load_pipeline("demo", device="cpu", dtype="float32")
    paths = sorted((tp.demo_model_path() / "clips").glob("*.flac"))
    contents = [path.read_bytes() for path in paths]
    clips = [soundfile.read(path, dtype="float32")[0] for path in paths]
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate(clips * 6), SAMPLING_RATE, format="FLAC")
    contents.append(buffer.getvalue())
    # the windows of the server
    return [(content, next(iter(transcribe([content], pipeline, chunk_length_s=30.0))).text) for content in contents]


async def run_worker(soak: Soak, seed: int, deadline: float) -> None:
    """Send requests of random kinds until the deadline."""
    draw = random.Random(seed)
    while time.monotonic() < deadline:
        name, _, send = draw.choices(KINDS, [weight for _, weight, _ in KINDS])[0]
        soak.counts[name] += 1
        try:
            await asyncio.wait_for(send(soak, draw), MAX_REQUEST_S)
        # a connection that breaks is an error only for a request that must succeed
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            soak.errors.append(f"{name}: {error!r}")
        await asyncio.sleep(PAUSE_S)


async def watch_memory(pid: int, deadline: float) -> list[tuple[float, float, float]]:
    """Measure the memory until the deadline: time in seconds, MiB of the server, MiB of the processes that decode."""
    start, values = time.monotonic(), []
    while time.monotonic() < deadline:
        others = [process for process in find_processes(pid) if process != pid]
        values.append((time.monotonic() - start, read_memory_mib(pid), sum(map(read_memory_mib, others))))
        if len(values) % 15 == 1:
            print("{:.0f} s: server {:.0f} MiB, decoders {:.0f} MiB".format(*values[-1]), file=sys.stderr, flush=True)
        await asyncio.sleep(SAMPLE_S)
    return values


def compare_memory(values: list[tuple[float, float, float]], total_s: float) -> dict[str, Any]:
    """Compare the median of the memory after the warm-up with that at the end.

    Args:
        values: the measurements.
        total_s: seconds of the whole run.
    """
    warm_up_s = min(WARM_UP * total_s, MAX_WARM_UP_S)
    span_s = (total_s - warm_up_s) / 5
    report: dict[str, Any] = {"warm_up_s": warm_up_s}
    for index, name in ((1, "server"), (2, "decoders")):
        first = statistics.median(value[index] for value in values if warm_up_s <= value[0] < warm_up_s + span_s)
        last = statistics.median(value[index] for value in values if value[0] >= total_s - span_s)
        report[name] = {"start_mib": round(first, 1), "end_mib": round(last, 1), "growth": round(last / first - 1, 4),
                        "max_mib": round(max(value[index] for value in values), 1)}  # fmt: skip
    first, last = (sum(report[name][key] for name in ("server", "decoders")) for key in ("start_mib", "end_mib"))
    report["all"] = {"start_mib": round(first, 1), "end_mib": round(last, 1), "growth": round(last / first - 1, 4)}
    return report


async def run_all(server: Server, minutes: float) -> tuple[Soak, list[tuple[float, float, float]]]:
    """Run all workers and the measurement of the memory."""
    soak = Soak(server, make_files())
    deadline = time.monotonic() + 60 * minutes
    workers = [run_worker(soak, seed, deadline) for seed in range(NUM_WORKERS)]
    values, *_ = await asyncio.gather(watch_memory(server.pid, deadline), *workers)
    return soak, values


def run_soak(minutes: float, threads: int) -> dict[str, Any]:
    """Run mixed requests, and print and return the numbers.

    Args:
        minutes: length of the run.
        threads: number of threads of the model.

    Raises:
        RuntimeError: an answer was wrong, or the memory has grown.
    """
    options = ("--dtype", "float32", "--max-duration", str(MAX_DURATION_S))
    with start_server("demo", *options, threads=threads) as server:
        soak, values = asyncio.run(run_all(server, minutes))
        metrics = server.fetch("/metrics")
    memory = compare_memory(values, 60 * minutes)
    statuses = [line for line in metrics.splitlines() if line.startswith("parakeet_requests_total")]
    times = sorted(soak.seconds)
    report = {
        "minutes": minutes,
        "requests": dict(soak.counts),
        "statuses": statuses,
        "errors": len(soak.errors),
        "good_p50_s": round(statistics.median(times), 3),
        "good_p95_s": round(times[int(0.95 * len(times))], 3),
        "slowest_bad_s": {kind: round(value, 2) for kind, value in soak.slowest_s.items()},
        "memory": memory,
        "samples": [tuple(round(number, 1) for number in value) for value in values[:: max(1, len(values) // 60)]],
    }
    print(json.dumps(report, indent=2))
    print("\n".join(soak.errors[:20]))
    if soak.errors or memory["all"]["growth"] > MAX_GROWTH:
        raise RuntimeError("every answer must be right and the memory flat: see the numbers above")
    return report
