"""Tests of the HTTP API with OpenAI's client: formats, streams, errors, keys, metrics, and the end of the server."""

import io
import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import soundfile
import srt
import webvtt
from conftest import TESTS
from serving_helpers import (
    CLIP,
    CLIPS,
    connect,
    encode_form,
    encode_request,
    expected_texts,
    fetch,
    load_demo_pipeline,
    post,
    read_response,
    send_raw,
    start_app,
    start_command,
)

from transformers_parakeet.transcription import TranscriptionOptions, transcribe


def create_client(url, **options):
    """Create OpenAI's client, which tries a request only once."""
    return openai.OpenAI(base_url=f"{url}/v1", **{"api_key": "any", "max_retries": 0, "timeout": 60, **options})


@pytest.fixture(scope="module")
def client(demo_server):
    """OpenAI's client for the command in a separate process."""
    with create_client(demo_server) as client:
        yield client


def request_text(client, path=CLIP, **options):
    """Request the transcription of a file."""
    with open(path, "rb") as file:
        return client.audio.transcriptions.create(model="demo", file=file, **options)


@pytest.fixture(scope="module")
def result():
    """The result of the clip without the server."""
    return next(iter(transcribe(str(CLIP), load_demo_pipeline())))


def test_json_has_the_text_and_the_duration(client, result):
    answer = request_text(client)
    assert answer.text == result.text == "one two three"
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == pytest.approx(soundfile.info(CLIP).duration, abs=1e-3)


def test_text_is_the_text_alone(client):
    assert request_text(client, response_format="text") == "one two three\n"


def parse_time(text):
    """Return the seconds of a WebVTT time."""
    hours, minutes, seconds = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_subtitles_can_be_parsed(client, result, kind):
    content = request_text(client, response_format=kind)
    if kind == "srt":
        (cue,) = srt.parse(content)
        start, end, text = cue.start.total_seconds(), cue.end.total_seconds(), cue.content
    else:
        (cue,) = webvtt.from_buffer(io.StringIO(content))
        start, end, text = parse_time(cue.start), parse_time(cue.end), cue.text
    assert text == "one two three"
    assert start == pytest.approx(result.words[0].start, abs=1e-3)
    assert end >= result.words[-1].end - 1e-3


def test_verbose_json_has_words_and_segments(client, result):
    answer = request_text(
        client, response_format="verbose_json", timestamp_granularities=["word", "segment"], language="en"
    )
    assert (answer.text, answer.language) == ("one two three", "en")
    assert float(answer.duration) == pytest.approx(result.duration)
    assert [(word.word, word.start, word.end) for word in answer.words] == [
        (word.text, word.start, word.end) for word in result.words
    ]
    assert [word.confidence for word in answer.words] == pytest.approx([word.confidence for word in result.words])
    assert [(segment.id, segment.text, segment.start) for segment in answer.segments] == [
        (0, "one two three", result.segments[0].start)
    ]


def test_verbose_json_has_segments_unless_words_are_requested(client):
    answer = request_text(client, response_format="verbose_json")
    assert answer.words is None
    assert len(answer.segments) == 1
    assert answer.language == "unknown"
    answer = request_text(client, response_format="verbose_json", timestamp_granularities=["word"])
    assert answer.segments is None
    assert len(answer.words) == 3


def test_every_clip_has_the_text_that_it_has_alone(client):
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda path: request_text(client, path).text, CLIPS * 3))
    assert texts == [expected_texts()[path] for path in CLIPS * 3]


def test_the_parameters_without_a_meaning_are_accepted(client):
    options = {"temperature": 0.5, "chunking_strategy": "auto", "language": "de", "prompt": "seven, eight"}
    assert request_text(client, **options).text == "one two three"


def test_a_stream_has_deltas_that_join_to_the_text(client):
    events = list(request_text(client, stream=True))
    assert [event.type for event in events][-1] == "transcript.text.done"
    assert {event.type for event in events[:-1]} == {"transcript.text.delta"}
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == "one two three"


def join_clips(repeats):
    """Return a WAV file with all clips several times, and its samples."""
    clips = [soundfile.read(path, dtype="float32")[0] for path in CLIPS]
    samples = np.concatenate(clips * repeats)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="WAV", subtype="PCM_16")
    return buffer.getvalue(), samples


def test_a_stream_of_a_long_recording_has_a_delta_per_window(client):
    content, _ = join_clips(4)
    options = {"chunk_length_s": 30.0}
    expected = next(iter(transcribe([content], load_demo_pipeline(), **options))).text
    events = list(client.audio.transcriptions.create(model="demo", file=("long.wav", content), stream=True))
    deltas = [event.delta for event in events[:-1]]
    assert len(deltas) > 2
    assert "".join(deltas) == events[-1].text == expected
    assert len(expected.split()) > 60


def test_the_words_of_the_prompt_are_boosted(monkeypatch):
    build = load_demo_pipeline().processor.boosting_tree
    trees, submitted = {}, []

    def build_and_note(phrases):
        """Build a boosting tree, and note it by its phrases."""
        trees[phrases] = build(phrases)
        return trees[phrases]

    monkeypatch.setattr(load_demo_pipeline().processor, "boosting_tree", build_and_note, raising=False)
    with start_app() as (url, server):
        submit = server.worker.submit

        def submit_and_note(samples, boosting, *callbacks):
            """Submit a recording, and note its boosting tree."""
            submitted.append(boosting)
            return submit(samples, boosting, *callbacks)

        monkeypatch.setattr(server.worker, "submit", submit_and_note)
        client = create_client(url)
        assert request_text(client, prompt="three nine").text == "one two three"
        assert request_text(client).text == "one two three"
    assert list(trees) == [("three", "nine")]
    assert submitted == [trees["three", "nine"], None]


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"response_format": "diarized_json"}, "response_format"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities[]"),
        ({"response_format": "srt", "stream": True}, "response_format"),
        ({"include": ["logprobs"]}, "include[]"),
        ({"prompt": " ".join(f"word{index}" for index in range(1500))}, "prompt"),
    ],
)
def test_a_wrong_parameter_is_a_bad_request(client, options, parameter):
    with pytest.raises(openai.BadRequestError) as caught:
        request_text(client, **options)
    assert caught.value.param == parameter
    assert caught.value.type == "invalid_request_error"
    assert ": " in caught.value.body["message"]


def test_a_file_that_is_not_audio_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError, match=r"notes\.txt cannot be read as audio") as caught:
        client.audio.transcriptions.create(model="demo", file=("notes.txt", b"these are notes" * 100))
    assert caught.value.code == "invalid_audio"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="must be 'demo'"):
        client.audio.transcriptions.create(model="whisper-1", file=("clip.flac", CLIP.read_bytes()))
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("whisper-1")


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "transformers-parakeet"


def test_an_unknown_path_and_a_wrong_method_have_errors_of_the_api(demo_server):
    for path, method, status in (("/v1/nothing", "GET", 404), ("/v1/audio/transcriptions", "DELETE", 405)):
        response = httpx.request(method, f"{demo_server}{path}")
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_no_page_loads_scripts_from_other_servers(demo_server):
    assert [fetch(f"{demo_server}{path}")[0] for path in ("/docs", "/redoc", "/openapi.json")] == [404] * 3


def test_health_readiness_and_metrics(client, demo_server):
    assert fetch(f"{demo_server}/health") == (200, '{"status":"ok"}')
    assert fetch(f"{demo_server}/ready") == (200, '{"status":"ready"}')

    def read_metric(name):
        """Return the value of a metric."""
        lines = fetch(f"{demo_server}/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ['parakeet_requests_total{status="200"}', "parakeet_audio_seconds_total", "parakeet_batch_windows_count"]
    before = [read_metric(name) for name in names]
    request_text(client)
    requests, seconds, batches = (read_metric(name) - value for name, value in zip(names, before, strict=True))
    assert requests == 1
    assert seconds == pytest.approx(soundfile.info(CLIP).duration, abs=1e-3)
    assert batches == 1
    assert read_metric("parakeet_waiting_requests") == 0
    before = read_metric('parakeet_requests_total{status="400"}')
    with pytest.raises(openai.BadRequestError):
        client.audio.transcriptions.create(model="demo", file=("x", b"x"))
    assert read_metric('parakeet_requests_total{status="400"}') - before == 1


def test_cors_is_off_by_default(demo_server):
    response = httpx.get(f"{demo_server}/v1/models", headers={"Origin": "https://example.org"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_keys_and_origins():
    with start_app(api_keys=("first", "clé"), allowed_origins=("https://example.org",)) as (url, _):
        for key in ("first", "clé"):
            # header values of httpx are ASCII unless they are bytes
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        assert create_client(url, api_key="first").models.list().data[0].id == "demo"
        with pytest.raises(openai.AuthenticationError) as caught:
            request_text(create_client(url, api_key="firs"))
        assert caught.value.code == "invalid_api_key"
        for headers in ({}, {"Authorization": "Basic first"}, {"Authorization": "Bearer"}, {"X-Api-Key": "first"}):
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
        for path in ("/v1%2Fmodels", "/v1/../v1/models", "/v1/models/demo"):
            assert send_raw(url, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())[0] == 401
        assert [fetch(f"{url}{path}")[0] for path in ("/health", "/ready", "/metrics", "/")] == [200] * 4
        # a browser asks before it sends a request with a key; the answer needs no key
        origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        response = httpx.options(f"{url}/v1/audio/transcriptions", headers=origin)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        # the page must be able to read an error
        response = httpx.get(f"{url}/v1/models", headers={"Origin": "https://example.org"})
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        response = httpx.get(f"{url}/v1/models", headers={"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in response.headers


class Gate:
    """Stops the model of a server at its next batch until the gate is opened."""

    def __init__(self, monkeypatch):
        self.is_waiting, self.may_go = threading.Event(), threading.Event()
        forward = load_demo_pipeline().forward

        def wait(*args, **kwargs):
            """Wait for the gate, then run the model."""
            self.is_waiting.set()
            assert self.may_go.wait(60)
            return forward(*args, **kwargs)

        monkeypatch.setattr(load_demo_pipeline(), "forward", wait, raising=False)


def test_a_full_queue_is_a_rate_limit_with_a_time(monkeypatch):
    with start_app(max_waiting=2) as (url, server), ThreadPoolExecutor(2) as pool:
        client = create_client(url)
        gate = Gate(monkeypatch)
        accepted = [pool.submit(request_text, client) for _ in range(2)]
        assert gate.is_waiting.wait(30)
        while server.worker.num_waiting < 2:
            time.sleep(0.01)
        start = time.monotonic()
        with pytest.raises(openai.RateLimitError) as caught:
            request_text(client)
        assert caught.value.response.headers["retry-after"] == "2"
        assert caught.value.code == "queue_full"
        # the error does not wait for the model
        assert time.monotonic() - start < 5
        gate.may_go.set()
        assert [future.result().text for future in accepted] == ["one two three"] * 2
        assert request_text(client).text == "one two three"


def test_requests_that_are_still_received_count_as_waiting():
    with start_app(max_waiting=2) as (url, _):
        body = encode_form(CLIP.read_bytes())
        slow = [connect(url) for _ in range(2)]
        for connection in slow:
            connection.sendall(encode_request(body[:1000], len(body)))
        time.sleep(0.5)
        assert post(url, CLIP.read_bytes())[0] == 429
        for connection in slow:
            connection.sendall(body[1000:])
        assert [read_response(connection)[0] for connection in slow] == [200, 200]
        for connection in slow:
            connection.close()
        assert post(url, CLIP.read_bytes())[0] == 200


def test_the_audio_that_waits_is_limited(monkeypatch):
    # a clip has about 3 s
    with start_app(max_waiting_audio_s=5.0) as (url, _), ThreadPoolExecutor(2) as pool:
        client = create_client(url)
        gate = Gate(monkeypatch)
        first = pool.submit(request_text, client)
        assert gate.is_waiting.wait(30)
        with pytest.raises(openai.RateLimitError):
            request_text(client)
        gate.may_go.set()
        assert first.result().text == "one two three"
        # a single recording can be longer
        content, samples = join_clips(1)
        assert len(samples) > 5 * 16000
        assert len(client.audio.transcriptions.create(model="demo", file=("long.wav", content)).text.split()) > 10


def test_large_long_and_slow_uploads():
    options = {"max_upload_bytes": 200_000, "max_duration_s": 3.4, "upload_grace_s": 0.5, "min_upload_rate": 1e6}
    with start_app(**options) as (url, _):
        client = create_client(url)
        assert request_text(client).text == "one two three"
        with pytest.raises(openai.APIStatusError) as caught:
            client.audio.transcriptions.create(model="demo", file=("clip.wav", bytes(2_000_000)))
        assert (caught.value.status_code, caught.value.code) == (413, "upload_too_large")
        longest = max(CLIPS, key=lambda path: soundfile.info(path).duration)
        assert soundfile.info(longest).duration > 3.4
        with pytest.raises(openai.APIStatusError) as caught:
            request_text(client, longest)
        assert (caught.value.status_code, caught.value.code) == (413, "audio_too_long")
        body = encode_form(CLIP.read_bytes())
        status, answer = send_raw(url, encode_request(body[:1000], len(body)))
        assert (status, json.loads(answer)["error"]["code"]) == (408, "upload_too_slow")
        # a body without a declared length
        with pytest.raises(httpx.HTTPStatusError) as caught:
            httpx.post(f"{url}/v1/audio/transcriptions", content=(bytes(65536) for _ in range(30)), timeout=20,
                       headers={"Content-Type": "multipart/form-data; boundary=x"}).raise_for_status()  # fmt: skip
        assert caught.value.response.status_code in (400, 413)
        assert request_text(client).text == "one two three"


def test_a_result_that_takes_too_long_is_a_timeout(monkeypatch):
    with start_app(request_timeout_s=0.3) as (url, server):
        gate = Gate(monkeypatch)
        with pytest.raises(openai.InternalServerError) as caught:
            request_text(create_client(url))
        assert caught.value.status_code == 504
        events = httpx.post(
            f"{url}/v1/audio/transcriptions",
            data={"model": "demo", "stream": "true"},
            files={"file": CLIP.read_bytes()},
        ).text
        assert '"code": "timeout"' in events
        gate.may_go.set()
        while server.worker.num_waiting:
            time.sleep(0.01)


def test_a_client_that_disconnects_leaves_the_batch(monkeypatch):
    sizes = []
    with start_app() as (url, server), ThreadPoolExecutor(3) as pool:
        server.worker.on_batch = lambda num_windows, seconds: sizes.append(num_windows)
        client = create_client(url)
        gate = Gate(monkeypatch)
        first = pool.submit(request_text, client)
        assert gate.is_waiting.wait(30)
        connections = [connect(url) for _ in range(2)]
        for connection, streams in zip(connections, ("false", "true"), strict=True):
            connection.sendall(encode_request(encode_form(CLIP.read_bytes(), stream=streams)))
        while server.worker.num_waiting < 3:
            time.sleep(0.01)
        for connection in connections:
            connection.close()
        while sum(job.future.cancelled() for job in server.worker._jobs) < 2:
            time.sleep(0.01)
        third = pool.submit(request_text, client)
        while server.worker.num_waiting < 4:
            time.sleep(0.01)
        gate.may_go.set()
        assert first.result().text == third.result().text == "one two three"
        assert sizes == [1, 1]
        assert server.worker.num_waiting == 0


def test_a_failure_of_the_model_is_an_internal_error(monkeypatch):
    with start_app() as (url, server):

        def fail(*args, **kwargs):
            """Fail as a device without memory does."""
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(load_demo_pipeline(), "forward", fail, raising=False)
            with pytest.raises(openai.InternalServerError):
                request_text(create_client(url))
            with pytest.raises(openai.APIError, match="the server failed"):
                list(request_text(create_client(url), stream=True))
        assert request_text(create_client(url)).text == "one two three"
        assert server.worker.is_alive


def test_the_server_finishes_what_it_has_accepted_after_sigterm():
    with start_command("--max-waiting", "64") as (url, process), ThreadPoolExecutor(12) as pool:
        client = create_client(url)
        content, _ = join_clips(6)
        expected = request_text(client).text

        def request_long():
            """Request the transcription of a long recording."""
            return client.audio.transcriptions.create(model="demo", file=("long.wav", content)).text

        futures = [pool.submit(request_long) for _ in range(4)] + [pool.submit(request_text, client) for _ in range(4)]
        while float(re.search(r"^parakeet_waiting_requests (.*)$", fetch(f"{url}/metrics")[1], re.M).group(1)) < 4:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        texts = [future.result(timeout=60) for future in futures]
        assert len(set(texts[:4])) == 1
        assert len(texts[0].split()) > 100
        assert [text.text for text in texts[4:]] == [expected] * 4
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()


def test_a_file_without_samples_has_an_empty_text(client):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(1, dtype=np.float32), 16000, format="WAV")
    file = ("short.wav", buffer.getvalue())
    assert client.audio.transcriptions.create(model="demo", file=file).text == ""
    assert client.audio.transcriptions.create(model="demo", file=file, response_format="verbose_json").segments == []
    assert client.audio.transcriptions.create(model="demo", file=file, response_format="srt") == ""
    (event,) = client.audio.transcriptions.create(model="demo", file=file, stream=True)
    assert (event.type, event.text) == ("transcript.text.done", "")


def test_the_example_of_the_page_prints_what_the_page_says(demo_server, monkeypatch, capsys):
    page = (TESTS.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(CLIP.parent)
    address = "http://127.0.0.1:8000"
    assert address in program
    exec(compile(program.replace(address, demo_server), "serving.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"# prints (.*)", program)


def test_options_of_the_transcription_apply_to_all_requests():
    options = TranscriptionOptions(chunk_length_s=30.0, boost=("seven",), num_beams=2)
    with start_app(transcription=options) as (url, _):
        assert request_text(create_client(url)).text == "one two three"
