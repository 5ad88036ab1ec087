"""Servers for the tests: the command in a separate process, and an application in a thread; clips and raw requests."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import cache

import uvicorn

import transformers_parakeet as tp
from transformers_parakeet.serving import ServerOptions, TimedProtocol, create_app
from transformers_parakeet.transcription import TranscriptionOptions, load_pipeline, transcribe

CLIPS = sorted((tp.demo_model_path() / "clips").glob("*.flac"))
CLIP = tp.demo_model_path() / "clips" / "one_two_three.flac"
# seconds in which a server must start on a loaded machine
START_S = 120.0
BOUNDARY = "boundary-of-the-tests"


@cache
def load_demo_pipeline():
    """Load the demo model once per process."""
    return load_pipeline("demo", device="cpu", dtype="float32")


@cache
def expected_texts():
    """Return the text of each clip, transcribed alone without the server."""
    results = (next(iter(transcribe(str(path), load_demo_pipeline(), batch_size=1))) for path in CLIPS)
    return {path: result.text for path, result in zip(CLIPS, results, strict=True)}


def find_free_port():
    """Return a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(url, **headers):
    """Return the status and the text of a GET request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_until_ready(url, process=None):
    """Wait until a server answers `/ready` with the status 200."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended: {process.communicate()}")
        with contextlib.suppress(OSError):
            if fetch(f"{url}/ready")[0] == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{url} is not ready after {START_S} s")


@contextlib.contextmanager
def start_command(*arguments):
    """Run `parakeet serve --model demo` in a separate process.

    Args:
        *arguments: more options of the command.

    Yields:
        The address, and the process.
    """
    port = find_free_port()
    command = [sys.executable, "-W", "ignore", "-m", "transformers_parakeet_cli", "serve", "--model", "demo"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32", "--port", str(port), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        yield url, process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def start_app(pipeline=None, **options):
    """Run the application in a thread of this process, with one process that decodes files.

    Args:
        pipeline: the pipeline; `None` for the demo model.
        **options: fields of `ServerOptions`.

    Yields:
        The address, and the `TranscriptionServer`.
    """
    # more windows than the server's default has are not needed: the clips are short
    fields = {"num_decoders": 1, "transcription": TranscriptionOptions(chunk_length_s=30.0), **options}
    app = create_app(pipeline or load_demo_pipeline(), ServerOptions(**fields))
    port = find_free_port()
    config = uvicorn.Config(app, host="127.0.0.1", port=port, http=TimedProtocol, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url)
        yield url, app.state.server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def encode_form(content=None, name="clip.flac", **fields):
    """Encode a multipart form.

    Args:
        content: content of the file; `None` for no file.
        name: name of the file.
        **fields: other fields; the default of `model` is "demo".

    Returns:
        The body.
    """
    parts = []
    for key, value in {"model": "demo", **fields}.items():
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n'
        parts.append(head.encode() + (value if isinstance(value, bytes) else str(value).encode()))
    if content is not None:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + content)
    return b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def encode_request(body, length=None, **headers):
    """Encode a POST request to `/v1/audio/transcriptions`.

    Args:
        body: the body, or the part of it that is sent.
        length: the length that the header states; `None` for that of the body.
        **headers: more headers, with underscores for hyphens.
    """
    lines = [
        "POST /v1/audio/transcriptions HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
        f"Content-Length: {len(body) if length is None else length}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def connect(url):
    """Connect to a server with a socket that waits 15 s at most."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=15)


def read_response(connection):
    """Read a response with a length; the status and the body, or status 0 if the connection was closed without one."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in content:
            received = connection.recv(65536)
            if not received:
                return 0, content
            content += received
    head, _, body = content.partition(b"\r\n\r\n")
    if not head:
        return 0, b""
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    with contextlib.suppress(ConnectionError):
        while len(body) < (int(lengths[0]) if lengths else 2**31) and (received := connection.recv(65536)):
            body += received
    return int(head.split(b" ")[1]), body


def send_raw(url, content):
    """Send bytes to a server; the status and the body of its response."""
    with connect(url) as connection:
        # the server can close the connection before it has read everything
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        return read_response(connection)


def post(url, content, **fields):
    """Send a file to a server; the status and the body of its response."""
    return send_raw(url, encode_request(encode_form(content, **fields)))
