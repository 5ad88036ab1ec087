"""Live transcription over a WebSocket, with the events of OpenAI's realtime transcription API.

`live.py` decodes the streams of all connections together.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import secrets
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from ..audio import FloatArray
from ..long_audio import StreamUpdate, StreamWord, join_stream_words
from .live import LiveStreams, StreamsFullError

# sampling rate in Hz of OpenAI's format pcm16
DEFAULT_RATE = 24_000
MIN_RATE, MAX_RATE = 8_000, 48_000
# seconds of audio of a connection that may wait for the model; the server then stops reading from the connection
MAX_WAITING_S = 20.0
# seconds between two checks of the waiting audio
WAIT_STEP_S = 0.05
# events that may wait for a client that does not read; the server then closes the connection
MAX_WAITING_EVENTS = 1000
# status of a WebSocket that is closed because the server is full (RFC 6455 registry: try again later)
CLOSE_TRY_AGAIN = 1013
# subprotocol that OpenAI's browser clients request
SUBPROTOCOL = "realtime"


class EventError(Exception):
    """An event of a client that cannot be used; the connection stays open."""


def make_id(prefix: str) -> str:
    """Make a random id.

    Args:
        prefix: first part of the id, such as `item`.
    """
    return f"{prefix}_{secrets.token_hex(8)}"


class Pcm16Reader:
    """Converts base64 text with 16-bit samples to float32 samples at the rate of the model.

    Args:
        rate: sampling rate in Hz of the client.
        target_rate: sampling rate in Hz of the model.
    """

    def __init__(self, rate: int, target_rate: int) -> None:
        import soxr

        self.rate, self.target_rate = rate, target_rate
        self._resampler: Any = None
        if rate != target_rate:
            self._resampler = soxr.ResampleStream(rate, target_rate, 1, dtype="float32")

    def read(self, text: Any) -> FloatArray:
        """Convert one block.

        Args:
            text: base64 text of little-endian 16-bit samples, mono.

        Returns:
            (S,) float32 samples.

        Raises:
            EventError: the text is not base64, or has half a sample.
        """
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise EventError(f"`audio` must be base64 text of 16-bit samples ({error}): correct it") from error
        if len(content) % 2:
            raise EventError(f"`audio` must have whole 16-bit samples, got {len(content)} bytes: send an even number")
        samples = np.frombuffer(content, dtype="<i2").astype(np.float32) / np.float32(32768)
        return self._resample(samples, is_last=False)

    def finish(self) -> FloatArray:
        """Return the (S,) last samples of the resampler, and start a new recording."""
        samples = self._resample(np.zeros(0, dtype=np.float32), is_last=True)
        if self._resampler is not None:
            self._resampler.clear()
        return samples

    def _resample(self, samples: FloatArray, is_last: bool) -> FloatArray:
        """Resample (S,) samples; `is_last` whether no samples follow."""
        if self._resampler is None:
            return samples
        return np.asarray(self._resampler.resample_chunk(samples, last=is_last), dtype=np.float32)


class Connection:
    """One connection: a session with one stream, whose recordings are the items of the conversation.

    Args:
        websocket: the connection.
        live: the streams of the server.
        model_name: name of the model.
    """

    def __init__(self, websocket: WebSocket, live: LiveStreams, model_name: str) -> None:
        self.websocket, self.live, self.model_name = websocket, live, model_name
        self.reader = Pcm16Reader(DEFAULT_RATE, live.sampling_rate)
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        # the item of the next update of the stream
        self.item_id = make_id("item")
        self.previous_item_id: str | None = None
        # committed words of the present item
        self.words: list[StreamWord] = []
        self.stream_index = -1
        self.has_audio = False

    async def run(self) -> None:
        """Serve the connection until one side closes it."""
        loop = asyncio.get_running_loop()

        def add_update(update: StreamUpdate | Exception, is_last: bool) -> None:
            """Process an update in the thread of the event loop."""
            # the loop can be closed while the server stops
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.process_update, update, is_last)

        protocols = self.websocket.scope.get("subprotocols", ())
        await self.websocket.accept(SUBPROTOCOL if SUBPROTOCOL in protocols else None)
        try:
            self.stream_index = self.live.open(add_update)
        except StreamsFullError as error:
            await self.websocket.send_json(build_error(str(error), "streams_full"))
            await self.websocket.close(CLOSE_TRY_AGAIN)
            return
        self.send({"type": "session.created", "session": self.describe_session()})
        sender = asyncio.ensure_future(self._send_events())
        receiver = asyncio.ensure_future(self._receive_events())
        try:
            await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.live.close(self.stream_index)
            for task in (sender, receiver):
                task.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await self.websocket.close()

    def send(self, event: dict[str, Any]) -> None:
        """Add an event to the queue of events for the client.

        Args:
            event: the event without its id.
        """
        self.events.put_nowait({"event_id": make_id("event"), **event})

    async def _send_events(self) -> None:
        """Send events until the connection is closed, or the client does not read."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while self.events.qsize() <= MAX_WAITING_EVENTS:
                await self.websocket.send_json(await self.events.get())

    async def _receive_events(self) -> None:
        """Receive and process events until the connection is closed."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                message = await self.websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                self.process_message(message.get("text"))
                # not reading further slows down a client that sends faster than the model decodes
                while self.live.get_waiting_s(self.stream_index) > MAX_WAITING_S:
                    await asyncio.sleep(WAIT_STEP_S)

    def process_message(self, text: str | None) -> None:
        """Process a message of the client. A wrong message is answered with an error event.

        Args:
            text: the text of the message; `None` for a binary message.
        """
        client_event_id = None
        try:
            event = parse_event(text)
            client_event_id = event.get("event_id")
            self.process_event(event)
        except EventError as error:
            self.send(build_error(str(error), "invalid_event", client_event_id))

    def process_event(self, event: dict[str, Any]) -> None:
        """Process an event of the client.

        Args:
            event: the event.

        Raises:
            EventError: the event is unknown or wrong.
        """
        kind = event.get("type")
        if kind == "input_audio_buffer.append":
            self.has_audio = True
            self.live.feed(self.stream_index, self.reader.read(event.get("audio")))
        elif kind == "input_audio_buffer.commit":
            if not self.has_audio:
                raise EventError("the audio buffer must not be empty when it is committed: append audio first")
            self.has_audio = False
            self.live.feed(self.stream_index, self.reader.finish())
            # the stream answers with the last update of the recording
            self.live.finish(self.stream_index)
        elif kind in ("session.update", "transcription_session.update"):
            self.update_session(event.get("session"))
            self.send({"type": "session.updated", "session": self.describe_session()})
        else:
            raise EventError(
                "an event must be input_audio_buffer.append, input_audio_buffer.commit or session.update, got "
                f"{kind!r}: correct it"
            )

    def update_session(self, session: Any) -> None:
        """Change the format of the audio.

        Args:
            session: the object `session` of an event, in the present form or in the earlier form with
                `input_audio_format`.

        Raises:
            EventError: the format is not supported, or audio was already received.
        """
        audio_format = session
        for name in ("audio", "input", "format"):
            audio_format = audio_format.get(name) or {} if isinstance(audio_format, dict) else None
        if not isinstance(session, dict) or not isinstance(audio_format, dict):
            raise EventError("`session`, and in it `audio`, `input` and `format`, must be objects: correct it")
        kind, rate = audio_format.get("type", "audio/pcm"), audio_format.get("rate", self.reader.rate)
        earlier_format = session.get("input_audio_format", "pcm16")
        if kind != "audio/pcm" or earlier_format != "pcm16":
            raise EventError(f"the audio format must be audio/pcm (16 bits, mono), got {kind!r}: convert the audio")
        if not isinstance(rate, int) or not MIN_RATE <= rate <= MAX_RATE:
            raise EventError(f"`rate` must be an integer from {MIN_RATE} to {MAX_RATE} Hz, got {rate!r}: correct it")
        if rate != self.reader.rate:
            if self.has_audio:
                raise EventError("the rate must not change within a recording: commit the audio buffer first")
            self.reader = Pcm16Reader(rate, self.live.sampling_rate)

    def describe_session(self) -> dict[str, Any]:
        """Describe the session."""
        audio_input = {
            "format": {"type": "audio/pcm", "rate": self.reader.rate},
            "transcription": {"model": self.model_name},
            "turn_detection": None,
        }
        return {"type": "transcription", "id": make_id("session"), "object": "realtime.transcription_session",
                "audio": {"input": audio_input}}  # fmt: skip

    def process_update(self, update: StreamUpdate | Exception, is_last: bool) -> None:
        """Send the events of an update of the stream.

        Args:
            update: the new words, or the exception that ended the recording.
            is_last: whether it is the last update of a recording.
        """
        if isinstance(update, Exception):
            self.send(build_error(f"the recording cannot be transcribed ({update})", "transcription_failed"))
            self._start_item()
            return
        if is_last:
            # the item of the end of a recording is known only now, because each `<EOU>` before it ends an item
            ids = {"item_id": self.item_id, "previous_item_id": self.previous_item_id}
            self.send({"type": "input_audio_buffer.committed", **ids})
        is_utterance_end = is_last or any(event.name == "<EOU>" for event in update.events)
        if update.committed or update.tentative:
            before = join_stream_words(self.words)
            self.words += update.committed
            self.send(
                {
                    "type": "conversation.item.input_audio_transcription.delta",
                    "item_id": self.item_id,
                    "content_index": 0,
                    "delta": join_stream_words(self.words)[len(before) :],
                    # additions to OpenAI's fields
                    "words": [asdict(word) for word in update.committed],
                    "tentative": [asdict(word) for word in update.tentative],
                }
            )
        if is_utterance_end:
            duration = self.words[-1].end - self.words[0].start if self.words else 0.0
            self.send(
                {
                    "type": "conversation.item.input_audio_transcription.completed",
                    "item_id": self.item_id,
                    "content_index": 0,
                    "transcript": join_stream_words(self.words),
                    "usage": {"type": "duration", "seconds": round(duration, 3)},
                }
            )
            self._start_item()

    def _start_item(self) -> None:
        """Start a new item of the conversation."""
        self.previous_item_id, self.item_id, self.words = self.item_id, make_id("item"), []


def parse_event(text: str | None) -> dict[str, Any]:
    """Parse an event of a client.

    Args:
        text: the text of a message; `None` for a binary message.

    Raises:
        EventError: it is not a JSON object.
    """
    try:
        # JSON that is nested too deeply is a RecursionError
        event = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise EventError(f"an event must be a text message with a JSON object ({error}): correct it") from error
    if not isinstance(event, dict):
        raise EventError("an event must be a JSON object: correct it")
    return event


def build_error(message: str, code: str, client_event_id: Any = None) -> dict[str, Any]:
    """Build an error event.

    Args:
        message: what must hold, what was given, and what to do.
        code: short name of the error.
        client_event_id: id of the event of the client that caused the error; `None` if it has none.
    """
    details = {"type": "invalid_request_error", "code": code, "message": message, "param": None}
    return {"type": "error", "event_id": make_id("event"), "error": {**details, "event_id": client_event_id}}


async def serve_connection(websocket: WebSocket) -> None:
    """Serve one connection: `WebSocket /v1/realtime`."""
    server = websocket.app.state.server
    await Connection(websocket, server.live, server.model_name).run()


def add_realtime_route(app: FastAPI) -> None:
    """Add the path `/v1/realtime` to an application.

    Args:
        app: the application, whose state has the server.
    """
    app.add_api_websocket_route("/v1/realtime", serve_connection)


__all__ = ["add_realtime_route"]
