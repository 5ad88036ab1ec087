"""Tests of live streams over WebSockets: OpenAI's events, many sockets, rates, wrong events, dropped clients."""

import asyncio
import base64
import contextlib
import json
import time

import numpy as np
import pytest
import soundfile
import soxr
import websockets
from openai.types.realtime import (
    ConversationItemInputAudioTranscriptionCompletedEvent,
    ConversationItemInputAudioTranscriptionDeltaEvent,
    InputAudioBufferCommittedEvent,
    RealtimeErrorEvent,
    SessionCreatedEvent,
    SessionUpdatedEvent,
)
from openai.types.realtime.realtime_server_event import RealtimeServerEvent
from pydantic import TypeAdapter
from serving_helpers import CLIP, CLIPS, load_demo_pipeline, start_app

from transformers_parakeet import ParakeetStream
from transformers_parakeet.long_audio import StreamEvent, StreamUpdate, StreamWord
from transformers_parakeet.serving import realtime
from transformers_parakeet.serving.live import MAX_STEP_S, LiveStreams
from transformers_parakeet.serving.realtime import Connection, Pcm16Reader

EVENT_CLASSES = {
    "session.created": SessionCreatedEvent,
    "session.updated": SessionUpdatedEvent,
    "input_audio_buffer.committed": InputAudioBufferCommittedEvent,
    "conversation.item.input_audio_transcription.delta": ConversationItemInputAudioTranscriptionDeltaEvent,
    "conversation.item.input_audio_transcription.completed": ConversationItemInputAudioTranscriptionCompletedEvent,
    "error": RealtimeErrorEvent,
}
DELTA = "conversation.item.input_audio_transcription.delta"
COMPLETED = "conversation.item.input_audio_transcription.completed"
ANY_EVENT = TypeAdapter(RealtimeServerEvent)
TIMEOUT_S = 60
# bytes of audio per event
BLOCK_BYTES = 9_600


def read_clip(path=CLIP, rate=16000):
    """Return the 16-bit samples of a clip at a rate."""
    samples, clip_rate = soundfile.read(path, dtype="float32")
    if rate != clip_rate:
        samples = soxr.resample(samples, clip_rate, rate)
    return np.clip(np.round(32767 * samples), -32768, 32767).astype("<i2")


def stream_text(path, rate=16000):
    """Return the text of a clip, streamed without the server."""
    reader = Pcm16Reader(rate, 16000)
    content = read_clip(path, rate).tobytes()
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    samples = [reader.read(base64.b64encode(block).decode()) for block in blocks]
    pipeline = load_demo_pipeline()
    stream = ParakeetStream(pipeline.model, pipeline.processor)
    words = [word for block in [*samples, reader.finish()] for word in stream.feed(block).committed]
    words += stream.finish().committed
    return " ".join(word.text.strip() for word in words)


class LiveClient:
    """A client that checks every event with the types of OpenAI's client.

    Args:
        socket: the WebSocket.
    """

    def __init__(self, socket):
        self.socket, self.rate = socket, None

    async def send(self, **event):
        """Send an event."""
        await self.socket.send(json.dumps(event))

    async def receive(self, *kinds):
        """Receive the next event, which must be of one of the kinds."""
        fields = json.loads(await asyncio.wait_for(self.socket.recv(), TIMEOUT_S))
        assert fields["type"] in (kinds or EVENT_CLASSES), fields
        # the types allow only 24 kHz; other rates are an addition
        audio_format = fields["session"]["audio"]["input"]["format"] if "session" in fields else {}
        rate = audio_format.get("rate")
        audio_format["rate"] = 24000
        event = EVENT_CLASSES[fields["type"]].model_validate(fields, strict=True)
        self.rate = rate or self.rate
        # the union of all events of the server
        assert type(ANY_EVENT.validate_python(fields)) is type(event)
        return event

    async def set_rate(self, rate):
        """Set the sampling rate."""
        audio = {"input": {"format": {"type": "audio/pcm", "rate": rate}}}
        await self.send(type="session.update", session={"type": "transcription", "audio": audio})
        return await self.receive("session.updated")

    async def append(self, samples):
        """Append samples in blocks."""
        content = samples.tobytes()
        for start in range(0, len(content), BLOCK_BYTES):
            audio = base64.b64encode(content[start : start + BLOCK_BYTES]).decode()
            await self.send(type="input_audio_buffer.append", audio=audio)

    async def commit(self):
        """Commit the buffer."""
        await self.send(type="input_audio_buffer.commit")

    async def receive_item(self):
        """Receive the events of one item: the text of the deltas, the committed event and the completed event."""
        deltas, committed = [], None
        while True:
            event = await self.receive(DELTA, COMPLETED, "input_audio_buffer.committed")
            if event.type == DELTA:
                deltas.append(event)
            elif event.type == COMPLETED:
                assert {delta.item_id for delta in deltas} <= {event.item_id}
                return "".join(delta.delta for delta in deltas), committed, event
            else:
                committed = event


@contextlib.asynccontextmanager
async def connect(url, **options):
    """Connect, and receive the first event."""
    address = url.replace("http://", "ws://") + "/v1/realtime?intent=transcription"
    async with websockets.connect(address, **options) as socket:
        client = LiveClient(socket)
        await client.receive("session.created")
        yield client


@pytest.fixture(scope="module")
def server():
    with start_app(max_streams=8) as (url, server):
        yield url, server


def wait_until_free(server):
    """Wait until all streams are closed."""
    deadline = time.monotonic() + TIMEOUT_S
    while server.live.num_open:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("rate", [24000, 16000, 8000, 48000])
def test_a_clip_has_the_text_of_the_stream_without_the_server(server, rate):
    async def run():
        """Stream the clip."""
        async with connect(server[0]) as client:
            # 24 kHz is the rate of OpenAI's format
            if rate != 24000:
                event = await client.set_rate(rate)
                assert event.session.audio.input.transcription.model == "demo"
            assert client.rate == rate
            await client.append(read_clip(rate=rate))
            await client.commit()
            return await client.receive_item()

    deltas, committed, completed = asyncio.run(run())
    assert deltas == completed.transcript == stream_text(CLIP, rate)
    assert committed.item_id == completed.item_id
    assert committed.previous_item_id is None
    assert completed.usage.type == "duration"
    assert 1.5 < completed.usage.seconds < 3
    if rate >= 16000:
        assert completed.transcript == "one two three"


def test_deltas_have_the_words_with_times_and_confidence_as_additions(server):
    async def run():
        """Stream the clip, and return the raw deltas."""
        async with connect(server[0]) as client:
            await client.set_rate(16000)
            await client.append(read_clip())
            await client.commit()
            events = []
            while not events or events[-1]["type"] != COMPLETED:
                events.append(json.loads(await asyncio.wait_for(client.socket.recv(), TIMEOUT_S)))
            return events

    words = [word for event in asyncio.run(run()) for word in event.get("words", [])]
    assert [word["text"].strip() for word in words] == ["one", "two", "three"]
    starts = [word["start"] for word in words]
    assert starts == sorted(starts)
    assert 0 <= starts[0] < words[0]["end"] <= starts[1]


def test_many_sockets_get_their_own_texts(server):
    url, state = server

    async def run_one(path):
        """Stream a clip twice on one socket."""
        async with connect(url) as client:
            await client.set_rate(16000)
            texts = []
            for _ in range(2):
                await client.append(read_clip(path))
                await client.commit()
                texts.append((await client.receive_item())[2].transcript)
            return texts

    async def run():
        """Stream all clips at the same time."""
        return await asyncio.gather(*map(run_one, CLIPS))

    for path, texts in zip(CLIPS, asyncio.run(run()), strict=True):
        assert texts == [stream_text(path)] * 2
    wait_until_free(state)


def test_recordings_that_are_sent_without_waiting_stay_apart(server):
    async def run():
        """Send all clips at once on one socket, then receive all items."""
        async with connect(server[0]) as client:
            await client.set_rate(16000)
            for path in CLIPS[:4]:
                await client.append(read_clip(path))
                await client.commit()
            return [await client.receive_item() for _ in range(4)]

    items = asyncio.run(run())
    assert [completed.transcript for _, _, completed in items] == [stream_text(path) for path in CLIPS[:4]]
    ids = [completed.item_id for _, _, completed in items]
    assert len(set(ids)) == 4
    assert [committed.item_id for _, committed, _ in items] == ids
    assert [committed.previous_item_id for _, committed, _ in items] == [None, *ids[:-1]]


def test_the_browser_gets_the_subprotocol(server):
    async def run():
        """Connect as OpenAI's client does in a browser."""
        async with connect(server[0], subprotocols=["realtime", "openai-insecure-api-key.any"]) as client:
            return client.socket.subprotocol

    assert asyncio.run(run()) == "realtime"


WRONG_EVENTS = [
    "no JSON",
    "",
    "[]",
    "5",
    "null",
    "[" * 100_000,
    b"\x00\x01\x02",
    {},
    {"type": None},
    {"type": ["input_audio_buffer.append"]},
    {"type": "response.create"},
    {"type": "input_audio_buffer.append"},
    {"type": "input_audio_buffer.append", "audio": 5},
    {"type": "input_audio_buffer.append", "audio": "§§§"},
    {"type": "input_audio_buffer.append", "audio": "abc"},
    {"type": "input_audio_buffer.append", "audio": base64.b64encode(b"abc").decode()},
    {"type": "input_audio_buffer.commit"},
    {"type": "session.update"},
    {"type": "session.update", "session": []},
    {"type": "session.update", "session": {"audio": "x"}},
    {"type": "session.update", "session": {"audio": {"input": [1]}}},
    {"type": "session.update", "session": {"audio": {"input": {"format": "pcm"}}}},
    {"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}},
    {"type": "session.update", "session": {"audio": {"input": {"format": {"rate": 10**9}}}}},
    {"type": "session.update", "session": {"audio": {"input": {"format": {"rate": "24000"}}}}},
    {"type": "session.update", "session": {"audio": {"input": {"format": {"rate": True}}}}},
    {"type": "transcription_session.update", "session": {"input_audio_format": "g711_ulaw"}},
]


def test_wrong_events_keep_the_connection(server):
    async def run():
        """Send wrong events, then a clip."""
        async with connect(server[0]) as client:
            for index, event in enumerate(WRONG_EVENTS):
                is_object = isinstance(event, dict)
                await client.socket.send(json.dumps({**event, "event_id": f"e{index}"}) if is_object else event)
                answer = await client.receive("error")
                assert answer.error.code == "invalid_event"
                assert answer.error.event_id == (f"e{index}" if is_object else None)
                assert len(answer.error.message) > 20
            await client.set_rate(16000)
            await client.append(read_clip())
            # the rate may not change within a recording
            await client.send(
                type="session.update", session={"audio": {"input": {"format": {"type": "audio/pcm", "rate": 8000}}}}
            )
            while (event := await client.receive()).type == DELTA:
                pass
            assert "must not change" in event.error.message
            await client.commit()
            return await client.receive_item()

    assert asyncio.run(run())[2].transcript == "one two three"


def test_a_dropped_client_frees_its_stream(server):
    url, state = server

    async def run():
        """Open more sockets one after another than there are streams, each with audio, and drop them."""
        for _ in range(20):
            async with connect(url) as client:
                await client.append(read_clip())
                client.socket.transport.abort()
            # the server notices that the connection is closed
            while state.live.num_open >= 8:
                await asyncio.sleep(0.01)
        async with connect(url) as client:
            await client.set_rate(16000)
            await client.append(read_clip())
            await client.commit()
            return (await client.receive_item())[2].transcript

    # a new stream has nothing of the dropped ones
    assert asyncio.run(run()) == "one two three"
    wait_until_free(state)
    assert not any(slot.blocks or slot.on_update for slot in state.live._slots)


def test_too_many_streams_are_told_to_try_again(server):
    url, state = server
    wait_until_free(state)

    async def run():
        """Open all streams, and one more."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(8):
                await stack.enter_async_context(connect(url))
            async with websockets.connect(url.replace("http", "ws", 1) + "/v1/realtime") as socket:
                event = RealtimeErrorEvent.model_validate_json(await socket.recv())
                assert event.error.code == "streams_full"
                with pytest.raises(websockets.ConnectionClosed) as caught:
                    await socket.recv()
                assert caught.value.rcvd.code == 1013

    asyncio.run(run())
    wait_until_free(state)


def test_a_client_that_sends_faster_than_the_model_decodes_is_slowed_down(server, monkeypatch):
    url, state = server
    wait_until_free(state)
    monkeypatch.setattr(realtime, "MAX_WAITING_S", 2.0)
    waiting = []
    step = state.live.step

    def step_slowly():
        """Wait before each step, and record how much audio waits."""
        time.sleep(0.1)
        waiting.append(max(state.live.get_waiting_s(index) for index in range(8)))
        step()

    monkeypatch.setattr(state.live, "step", step_slowly)

    async def run():
        """Send 20 s at once."""
        async with connect(url) as client:
            await client.set_rate(16000)
            await client.append(np.concatenate([read_clip(path) for path in CLIPS]))
            await client.commit()
            return (await client.receive_item())[2].transcript

    transcript = asyncio.run(run())
    assert len(transcript.split()) > 10
    # one more block can arrive before the server stops reading
    assert 1.0 < max(waiting) <= 2.0 + 2 * BLOCK_BYTES / 32000
    wait_until_free(state)


def test_a_client_that_does_not_read_is_disconnected(monkeypatch):
    monkeypatch.setattr(realtime, "MAX_WAITING_EVENTS", 5)

    class Socket:
        """A WebSocket whose client never reads."""

        scope: dict = {}  # noqa: RUF012

        async def send_json(self, event):
            """Never return."""
            await asyncio.sleep(3600)

    async def run():
        """Add events to a connection."""
        connection = Connection(Socket(), live, "demo")
        connection.sender = asyncio.ensure_future(connection._send_events())
        await asyncio.sleep(0)
        for index in range(6):
            connection.send({"type": "error", "index": index})
            await asyncio.sleep(0)
        assert not connection.sender.done()
        connection.send({"type": "error"})
        await asyncio.wait_for(asyncio.gather(connection.sender, return_exceptions=True), 5)

    live = LiveStreams(load_demo_pipeline(), 1)
    asyncio.run(run())


def test_keys_protect_the_live_streams():
    with start_app(api_keys=("secret",)) as (url, server):

        async def run():
            """Connect without and with keys."""
            for options in ({}, {"additional_headers": {"Authorization": "Bearer other"}}):
                with pytest.raises(websockets.InvalidStatus) as caught:
                    async with connect(url, **options):
                        pass
                assert caught.value.response.status_code == 403
            for options in (
                {"additional_headers": {"Authorization": "Bearer secret"}},
                {"subprotocols": ["realtime", "openai-insecure-api-key.secret"]},
            ):
                async with connect(url, **options):
                    pass

        asyncio.run(run())
        wait_until_free(server)


class IdleSocket:
    """A WebSocket that is not connected."""

    scope: dict = {}  # noqa: RUF012


def process(*updates):
    """Return the events that a connection sends, each as (last part of the type, item, text).

    Args:
        *updates: times of words, whose texts are their times; times of ends of utterances; and whether it is the last.
    """
    connection = Connection(IdleSocket(), LiveStreams(load_demo_pipeline(), 1), "eou")
    for word_times, end_times, is_last in updates:
        words = [StreamWord(str(start), start, start + 1.0) for start in word_times]
        events = [StreamEvent("<EOU>", end_time) for end_time in end_times]
        connection.process_update(StreamUpdate(words, [], [StreamEvent("<EOB>", 0.0), *events]), is_last)
    events = [connection.events.get_nowait() for _ in range(connection.events.qsize())]
    items = list(dict.fromkeys(event["item_id"] for event in events))
    for event in events:
        EVENT_CLASSES[event["type"]].model_validate(event, strict=True)
    return [
        (event["type"].rpartition(".")[2], items.index(event["item_id"]), event.get("delta", event.get("transcript")))
        for event in events
    ]


def test_the_end_of_an_utterance_completes_an_item():
    assert process(([1, 2], [], False), ([3], [4], False), ([5], [], False), ([], [], True)) == [
        ("delta", 0, "1 2"),
        ("delta", 0, " 3"),
        ("completed", 0, "1 2 3"),
        ("delta", 1, "5"),
        ("committed", 1, None),
        ("completed", 1, "5"),
    ]


def test_words_after_the_end_of_an_utterance_belong_to_the_next_item():
    assert process(([1, 2, 5, 8], [4, 6], False)) == [
        ("delta", 0, "1 2"),
        ("completed", 0, "1 2"),
        ("delta", 1, "5"),
        ("completed", 1, "5"),
        ("delta", 2, "8"),
    ]


def test_a_recording_that_ends_with_an_utterance_has_one_item():
    assert process(([1], [2], True), ([7], [], True)) == [
        ("delta", 0, "1"),
        ("committed", 0, None),
        ("completed", 0, "1"),
        ("delta", 1, "7"),
        ("committed", 1, None),
        ("completed", 1, "7"),
    ]


def test_an_error_of_the_model_starts_a_new_item():
    connection = Connection(IdleSocket(), LiveStreams(load_demo_pipeline(), 1), "demo")
    item_id = connection.item_id
    connection.process_update(RuntimeError("out of memory"), True)
    event = RealtimeErrorEvent.model_validate(connection.events.get_nowait(), strict=True)
    assert "out of memory" in event.error.message
    assert connection.item_id != item_id


def test_a_step_that_fails_ends_the_recordings_and_not_the_streams():
    live = LiveStreams(load_demo_pipeline(), 2)
    updates = []
    first = live.open(lambda update, is_last: updates.append(("first", update, is_last)))
    second = live.open(lambda update, is_last: updates.append(("second", update, is_last)))
    live.feed(first, np.full(16000, np.nan, np.float32))
    live.step()
    ((name, error, is_last),) = updates
    assert (name, type(error), is_last) == ("first", ValueError, True)
    updates.clear()
    for index in (first, second):
        live.feed(index, read_clip().astype(np.float32) / 32768)
        live.finish(index)
    while live.has_input():
        live.step()
    texts = {
        name: " ".join(word.text for other, update, _ in updates if other == name for word in update.committed)
        for name in ("first", "second")
    }
    assert texts == {"first": "one two three", "second": "one two three"}


def test_a_step_takes_a_few_seconds_of_each_stream_and_never_crosses_the_end_of_a_recording():
    live = LiveStreams(load_demo_pipeline(), 1)
    index = live.open(lambda update, is_last: None)
    num_samples = round(MAX_STEP_S * 16000)
    for length in (num_samples - 1000, 2000, 500):
        live.feed(index, np.full(length, 0.1, np.float32))
    live.finish(index)
    live.finish(index)
    live.feed(index, np.full(10, 0.2, np.float32))
    slot = live._slots[index]
    assert live.get_waiting_s(index) == (num_samples + 1510) / 16000
    samples, is_end = slot.take(num_samples)
    assert (len(samples), is_end) == (num_samples, False)
    samples, is_end = slot.take(num_samples)
    assert (len(samples), is_end) == (1500, True)
    assert slot.take(num_samples) == (None, True)
    samples, is_end = slot.take(num_samples)
    assert (samples.tolist(), is_end) == ([np.float32(0.2)] * 10, False)
    assert slot.take(num_samples) == (None, False)
    assert not live.has_input()


def test_the_resampler_joins_blocks_of_any_size():
    content = read_clip(rate=24000).tobytes()
    texts = [base64.b64encode(content[start : start + 1234]).decode() for start in range(0, len(content), 1234)]
    reader = Pcm16Reader(24000, 16000)
    for _ in range(2):
        samples = np.concatenate([*map(reader.read, texts), reader.finish()])
        whole = soxr.resample(np.frombuffer(content, "<i2").astype(np.float32) / 32768, 24000, 16000)
        np.testing.assert_allclose(samples, whole, atol=1e-6)
