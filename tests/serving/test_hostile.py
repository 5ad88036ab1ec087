"""Tests of hostile uploads: each is answered with an error of the client in 5 s, and good requests are served."""

import base64
import contextlib
import gzip
import io
import json
import os
import struct
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from serving_helpers import (
    BOUNDARY,
    CLIP,
    connect,
    encode_form,
    encode_request,
    expected_texts,
    post,
    read_response,
    send_raw,
    start_app,
)

# seconds in which a hostile request must be answered
MAX_ANSWER_S = 5.0
# maximum length in seconds of the recordings of the server
MAX_DURATION_S = 600.0
# hostile requests at the same time
NUM_CONNECTIONS = 6
FLAC = CLIP.read_bytes()


def write_wav_header(num_bytes, rate=16000, channels=1, bits=16, form=1):
    """Return the header of a WAV file with a number of bytes of samples."""
    block = channels * bits // 8
    fields = (b"RIFF", (num_bytes + 36) % 2**32, b"WAVE", b"fmt ", 16, form, channels, rate, (rate * block) % 2**32,
              block % 2**16, bits, b"data", num_bytes % 2**32)  # fmt: skip
    return struct.pack("<4sI4s4sIHHIIHH4sI", *fields)


def make_flac_bomb(hides_length=True):
    """Make a FLAC file of an hour of silence with 200 KB, by default without the length in its header."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 16000, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 16000, dtype=np.int16))
    content = bytearray(buffer.getvalue())
    if hides_length:
        # the number of samples has 36 bits, which end at byte 26 (RFC 9639, section 8.2); 0 means unknown
        content[21] &= 0xF0
        content[22:26] = bytes(4)
    return bytes(content)


def make_zip():
    """Make a zip file that expands to 20 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("clip.wav", bytes(20_000_000))
    return buffer.getvalue()


def make_opus():
    """Make an Ogg Opus file with the clip."""
    import av

    samples, rate = soundfile.read(CLIP, dtype="int16")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate
        for resampled in (*av.AudioResampler("s16", "mono", 48000).resample(frame), None):
            container.mux(stream.encode(resampled))
    return buffer.getvalue()


def damage(content, seed):
    """Return a file with 2 % of its bytes changed."""
    generator = np.random.default_rng(seed)
    values = np.frombuffer(content, dtype=np.uint8).copy()
    positions = generator.integers(0, len(values), len(values) // 50)
    values[positions] = generator.integers(0, 256, len(positions))
    return values.tobytes()


def encode_parts(*parts, boundary=BOUNDARY, end=True):
    """Encode multipart parts, each a pair of the header lines and the content."""
    lines = [f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts]
    return b"".join(lines) + (f"--{boundary}--\r\n".encode() if end else b"")


FILE_HEAD = 'Content-Disposition: form-data; name="file"; filename="a.flac"'
MODEL_PART = ('Content-Disposition: form-data; name="model"', b"demo")


def make_files():
    """Return the content of each hostile file by its name."""
    wav = write_wav_header(32000) + bytes(32000)
    ogg = make_opus()
    return {
        "empty": b"",
        "one byte": b"\x00",
        "text": b"these are notes\n" * 500,
        "html": b"<!DOCTYPE html><html><body>audio</body></html>" * 20,
        "json": json.dumps({"audio": [0.1] * 1000}).encode(),
        "noise": np.random.default_rng(0).bytes(50_000),
        "zeros": bytes(50_000),
        "zip bomb": make_zip(),
        "gzip of audio": gzip.compress(wav),
        "program": Path(sys.executable).read_bytes()[:200_000],
        "playlist": b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "playlist of this server": b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:1/clip.flac\n#EXT-X-ENDLIST\n",
        "concat script": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "FLAC of an hour without a length": make_flac_bomb(),
        "FLAC of an hour": make_flac_bomb(hides_length=False),
        "WAV header of 10 hours": write_wav_header(36_000 * 32_000) + bytes(32_000),
        "WAV header of 0 channels": write_wav_header(32000, channels=0) + bytes(32000),
        "WAV header of 1000 channels": write_wav_header(32000, channels=1000) + bytes(32000),
        "WAV header of 1 Hz": write_wav_header(32000, rate=1) + bytes(32000),
        "WAV header of 4 GHz": write_wav_header(32000, rate=2**32 - 1) + bytes(32000),
        "WAV header of 7 bits": write_wav_header(32000, bits=7) + bytes(32000),
        "WAV of an unknown coding": write_wav_header(32000, form=0x4242) + bytes(32000),
        "WAV with NaN": write_wav_header(64000, bits=32, form=3) + np.full(16000, np.nan, dtype=np.float32).tobytes(),
        "WAV header alone": wav[:20],
        "half of a FLAC": FLAC[: len(FLAC) // 2],
        "FLAC header alone": FLAC[:42],
        "damaged FLAC": damage(FLAC, 0),
        "FLAC with another head": b"RIFF" + FLAC[4:],
        "half of a page of Ogg": ogg[:100],
        "Ogg head alone": b"OggS" + bytes(200),
        "MP4 box with a huge size": b"\x00\x00\x00\x01ftypmp42" + b"\xff" * 8 + bytes(100),
        "MP3 frame of noise": b"\xff\xfb" + np.random.default_rng(1).bytes(300),
        "ID3 tag with a huge size": b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + bytes(100),
        "Matroska with a huge element": b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff" + bytes(100),
    }


def make_forms():
    """Return each hostile request by its name."""
    good = encode_form(FLAC)
    length = f"Content-Length: {len(good)}\r\n"
    multipart = f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    start = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n"
    many_files = encode_parts(MODEL_PART, *[(FILE_HEAD, FLAC)] * 20)
    many_fields = encode_parts(*[(f'Content-Disposition: form-data; name="f{i}"', b"x") for i in range(5000)])
    urlencoded = b"&".join(b"a%d=1" % index for index in range(20_000))
    return {
        "no file": encode_request(encode_form()),
        "no body": encode_request(b""),
        "no model": encode_request(encode_parts((FILE_HEAD, FLAC))),
        "file as a field": encode_request(encode_form(file="clip.flac")),
        "field as a file": encode_request(encode_parts((FILE_HEAD.replace('"file"', '"model"'), b"demo"))),
        "other boundary": encode_request(good.replace(BOUNDARY.encode(), b"other")),
        "no boundary": f"{start}Content-Type: multipart/form-data\r\n{length}\r\n".encode() + good,
        "no content type": f"{start}{length}\r\n".encode() + good,
        "JSON": f"{start}Content-Type: application/json\r\nContent-Length: 16\r\n\r\n".encode() + b'{"model":"demo"}',
        "audio type": f"{start}Content-Type: audio/flac\r\nContent-Length: {len(FLAC)}\r\n\r\n".encode() + FLAC,
        "many urlencoded fields": (
            f"{start}Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(urlencoded)}\r\n\r\n"
        ).encode()
        + urlencoded,
        "huge field": encode_request(encode_form(FLAC, language="x" * 5_000_000)),
        "huge name of a field": encode_request(encode_form(FLAC, **{"x" * 2_000_000: "1"})),
        "many fields": encode_request(many_fields),
        "many files": encode_request(many_files),
        "unknown field": encode_request(encode_form(FLAC, callback="http://127.0.0.1")),
        "wrong format": encode_request(encode_form(FLAC, response_format="../../etc/passwd")),
        "field that is not UTF-8": encode_request(encode_form(FLAC, response_format=b"\xff\xfe\x00")),
        "huge prompt": encode_request(encode_form(FLAC, prompt="a, " * 100_000 + "b," * 100_000)[:900_000]),
        "prompt of many words": encode_request(encode_form(FLAC, prompt=" ".join(map(str, range(5000))))),
        "end within the head of a part": encode_request(good[:60]),
        "head of a part without an end": encode_request(f"--{BOUNDARY}\r\n{'x' * 1_000_000}".encode()),
        "part without a name": encode_request(encode_parts(("Content-Disposition: form-data", b"x"))),
        "declared 2 GB": encode_request(b"", length=2 * 1024**3),
        "declared 10^30 bytes": encode_request(b"", length=10**30),
        "negative length": encode_request(b"", length=-5),
        "length that is no number": f"{start}{multipart}Content-Length: abc\r\n\r\n".encode(),
        "two lengths": f"{start}{multipart}Content-Length: 5\r\nContent-Length: 6\r\n\r\n".encode() + bytes(6),
        "wrong chunk": f"{start}{multipart}Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n".encode(),
        "slow loris": encode_request(good[:200], length=len(good)),
        "slow loris without a body": encode_request(b"", length=len(good)),
        "huge header": f"{start}X-Long: {'x' * 200_000}\r\n\r\n".encode(),
        "many headers": f"{start}{''.join(f'X-{i}: 1' + chr(13) + chr(10) for i in range(20_000))}\r\n".encode(),
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "unknown version": b"GET / HTTP/9.9\r\n\r\n",
        "header without a colon": f"{start}nonsense\r\n\r\n".encode(),
        "null byte in a header": f"{start}X-A: \x00\r\n\r\n".encode(),
        "path outside of the files": b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        "encoded path outside of the files": b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        "null byte in a path": b"GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    }


def make_requests():
    """Return all hostile requests by their names."""
    files = {f"file: {name}": encode_request(encode_form(content)) for name, content in make_files().items()}
    return {**files, **make_forms()}


@pytest.fixture(scope="module")
def server():
    """A server with two processes that decode files."""
    with start_app(num_decoders=2, max_duration_s=MAX_DURATION_S) as (url, server):
        yield url, server


def send_timed(url, request):
    """Send a request; its status, the body of the response, and the seconds to it."""
    start = time.monotonic()
    status, body = send_raw(url, request)
    return status, body, time.monotonic() - start


def test_hostile_requests_are_errors_of_the_client_and_good_requests_are_served(server):
    url, _ = server
    requests = make_requests()
    assert len(requests) >= 60
    is_done = threading.Event()
    good_texts = []

    def send_good():
        """Send good requests until all hostile ones are answered."""
        while not is_done.is_set():
            status, body = post(url, FLAC)
            good_texts.append(json.loads(body)["text"] if status == 200 else body)
            time.sleep(0.05)

    with ThreadPoolExecutor(NUM_CONNECTIONS + 1) as pool:
        good = pool.submit(send_good)
        try:
            answers = list(pool.map(lambda request: send_timed(url, request), requests.values()))
        finally:
            is_done.set()
        good.result()
    assert len(good_texts) >= 5
    assert set(good_texts) == {"one two three"}
    wrong = {
        f"{name}: {status} after {seconds:.1f} s, {body[:150]!r}"
        for name, (status, body, seconds) in zip(requests, answers, strict=True)
        if not 400 <= status < 500 or seconds > MAX_ANSWER_S or b"root:" in body or b"Traceback" in body
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_the_server_still_answers_all_clips(server):
    url, state = server
    for path, text in expected_texts().items():
        assert json.loads(post(url, path.read_bytes())[1])["text"] == text
    assert state.worker.num_waiting == 0
    assert state._num_received == 0


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/dev/zero", "a\x00b", "x" * 1000, "|rm -rf", "-", "http://x/a", "日本"]
)
def test_the_name_of_a_file_has_no_effect(server, name):
    url, _ = server
    assert json.loads(post(url, FLAC, name=name)[1])["text"] == "one two three"
    status, body = post(url, b"no audio", name=name)
    assert status == 400
    assert b"/etc/passwd" not in body


def test_random_damage_is_never_an_error_of_the_server(server):
    url, _ = server
    opus = make_opus()
    for seed in range(30):
        content = damage((FLAC, opus)[seed % 2], seed)
        status, body = post(url, content)
        assert status in (200, 400), (seed, body)


def test_a_client_that_never_sends_a_head_is_disconnected(monkeypatch):
    from transformers_parakeet.serving import connections

    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.4)
    monkeypatch.setattr(connections, "REST_TIMEOUT_S", 0.4)
    with start_app() as (url, _):
        silent, partial = connect(url), connect(url)
        partial.sendall(b"POST /v1/audio")
        # after a response, the rest of the body is read for a short time only
        rest = connect(url)
        rest.sendall(encode_request(b"", length=2 * 1024**3))
        assert read_response(rest)[0] == 413
        start = time.monotonic()
        for connection in (silent, partial, rest):
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - start < 5:
                    # data after the start of the time does not extend it
                    if connection is not silent:
                        connection.sendall(b"x")
                    connection.settimeout(0.1)
                    with contextlib.suppress(TimeoutError):
                        if not connection.recv(1000):
                            break
            assert time.monotonic() - start < 5
        # a connection between two requests is not closed
        with connect(url) as kept:
            for _ in range(2):
                kept.sendall(encode_request(encode_form(FLAC)))
                assert read_response(kept)[0] == 200
                time.sleep(0.6)


def test_many_idle_connections_do_not_stop_the_server(server):
    url, _ = server
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(url))
        assert post(url, FLAC)[0] == 200


def test_an_upgrade_to_another_protocol_is_refused(server):
    url, _ = server
    key = base64.b64encode(os.urandom(16)).decode()
    for path in ("/v1/audio/transcriptions", "/v1/nothing", "/"):
        request = (
            f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        )
        assert 400 <= send_raw(url, request.encode())[0] < 500
    assert post(url, FLAC)[0] == 200
