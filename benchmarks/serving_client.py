"""A small HTTP client, the start of a server, and its memory, for `serving.py` and `serving_soak.py`.

The client uses little time of the CPU, which it shares with the server.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUNDARY = "boundary-of-the-benchmark"
# seconds in which the server must start
START_S = 180.0


@dataclass(frozen=True)
class Server:
    """A server in a separate process.

    Args:
        port: port on 127.0.0.1.
        pid: id of the process.
    """

    port: int
    pid: int

    def fetch(self, path: str) -> str:
        """Return the body of a GET request."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return str(response.read().decode())


@contextmanager
def start_server(model: str, *arguments: str, threads: int) -> Iterator[Server]:
    """Run `parakeet serve`.

    Args:
        model: name or folder of the model.
        *arguments: more options of the command.
        threads: number of threads of the model.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "transformers_parakeet_cli", "serve", "--model", model]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*command, "--port", str(port), *arguments], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    server = Server(port, process.pid)
    try:
        deadline = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server must start, but it ended or hangs: run {' '.join(command)}")
            with suppress(OSError):
                server.fetch("/ready")
                break
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def encode_form(content: bytes, model: str, name: str = "clip.wav", **fields: str) -> bytes:
    """Encode a multipart form with a file.

    Args:
        content: content of the file.
        model: the field `model`.
        name: name of the file.
        **fields: other fields.
    """
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in {"model": model, **fields}.items()
    ]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    return b"".join([*parts, head.encode(), content, f"\r\n--{BOUNDARY}--\r\n".encode()])


def encode_head(length: int) -> bytes:
    """Encode the head of a request whose body has a length in bytes."""
    return (
        "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


class Client:
    """A client with one connection, which is opened again after the server has closed it.

    Args:
        port: port on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: Any = None
        self.writer: Any = None

    async def connect(self) -> None:
        """Open the connection."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)

    def close(self) -> None:
        """Close the connection."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Send a form.

        Args:
            body: the form.

        Returns:
            Status and body of the response.
        """
        if self.writer is None:
            await self.connect()
        self.writer.write(encode_head(len(body)) + body)
        return await self.read_response()

    async def read_response(self) -> tuple[int, bytes]:
        """Read a response; its status and its body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        content = await self.reader.readexactly(length)
        if b"connection: close" in head:
            self.close()
        return int(head.split(b" ")[1]), content


def find_processes(pid: int) -> list[int]:
    """Return the ids of a process and of all its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # the name of the program is in parentheses and can have spaces
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    ids = [pid]
    for parent in ids:
        ids += children.get(parent, [])
    return ids


def read_memory_mib(pid: int) -> float:
    """Return the memory in MiB that belongs to a process; memory that several processes share is divided among them."""
    with suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(rollup.split("\nPss:")[1].split()[0]) / 1024
    return 0.0
