"""The HTTP API of the server: transcription in the form of OpenAI's API, health and metrics.

`batching.py` runs the model, `uploads.py` decodes files, `limits.py` checks requests, and `realtime.py` serves live
streams.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
import wave
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..results import TimedText, TranscriptionResult
from .batching import ModelWorker, OnText, OnWords, QueueFullError, WorkerClosedError
from .errors import ApiError
from .formats import MEDIA_TYPES, build_body, build_details, build_event, build_usage, build_word
from .limits import RequestLimits
from .live import LiveStreams
from .monitoring import ServerMetrics
from .options import ServerOptions
from .page import PageFiles
from .parameters import TranscriptionRequest, read_parameters
from .realtime import add_realtime_route
from .uploads import UploadDecoder

logger = logging.getLogger(__name__)

# number of files per decoder process whose contents are in memory, so that the process never waits for the next one
CONTENTS_PER_DECODER = 2
# seconds after which a client may try again when the queue is full
RETRY_AFTER_S = 2
# status of a request whose client has closed the connection, as in nginx; it is only counted
CLIENT_CLOSED_STATUS = 499
INTERNAL_MESSAGE = "the server failed: see its log"


class TranscriptionServer:
    """The parts of a running server.

    Args:
        pipeline: pipeline with a model of this package.
        options: limits, keys and options of the transcription.
    """

    def __init__(self, pipeline: Any, options: ServerOptions) -> None:
        self.pipeline, self.options = pipeline, options
        self.model_name = str(pipeline.model.name_or_path or "parakeet")
        sampling_rate = pipeline.processor.feature_extractor.sampling_rate
        self.metrics = ServerMetrics()
        self.live = LiveStreams(pipeline, options.max_streams)
        self.worker = ModelWorker(
            pipeline,
            options.transcription,
            options.max_waiting,
            options.batch_wait_s,
            options.max_waiting_audio_s * sampling_rate,
            self.live,
            self.metrics.add_batch,
        )
        self.live.notify = self.worker.notify
        self.decoder = UploadDecoder(
            options.num_decoders, sampling_rate, options.max_duration_s, options.decoding_timeout_s
        )
        # number of requests that are received or decoded
        self._num_received = 0
        # the contents of other files stay in the temporary files of the forms
        self._content_slots = asyncio.Semaphore(CONTENTS_PER_DECODER * options.num_decoders)

    async def warm_up(self) -> None:
        """Start the processes and run the model once, so that the first request is not slower than the others."""
        silence = io.BytesIO()
        with wave.open(silence, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.decoder.sampling_rate)
            file.writeframes(bytes(2 * self.decoder.sampling_rate))
        samples = await self.decoder.decode(silence.getvalue(), "silence")
        await asyncio.wrap_future(self.worker.submit(samples))

    def close(self) -> None:
        """Finish the requests that were accepted, and end the thread and the processes."""
        self.worker.close()
        self.decoder.close()

    @contextmanager
    def receive_request(self) -> Iterator[None]:
        """Count a request while it is received and decoded.

        Raises:
            ApiError: 429 if too many requests are received, decoded or wait for the model.
        """
        if self._num_received + self.worker.num_waiting >= self.options.max_waiting:
            raise self._build_full_error()
        self._num_received += 1
        try:
            yield
        finally:
            self._num_received -= 1

    async def submit(
        self, parameters: TranscriptionRequest, on_text: OnText | None = None, on_words: OnWords | None = None
    ) -> Future[TranscriptionResult]:
        """Decode the file of a request, and submit its samples to the model.

        Args:
            parameters: the parameters of the request.
            on_text: called in the thread of the model with the text so far; `None` for no call.
            on_words: called in the thread of the model with the new words; `None` for no call.

        Raises:
            ApiError: the file cannot be decoded, the queue is full, or the server is stopping.
        """
        async with self._content_slots:
            samples = await self.decoder.decode(await parameters.file.read(), parameters.file_name)
        boosting = None
        if parameters.phrases:
            boosting = await asyncio.to_thread(self.pipeline.processor.boosting_tree, parameters.phrases)
        try:
            return self.worker.submit(samples, boosting, on_text, on_words)
        except QueueFullError:
            raise self._build_full_error() from None
        except WorkerClosedError:
            raise ApiError(503, "the server is stopping: send the request again later", "stopping") from None

    def _build_full_error(self) -> ApiError:
        """Build the error of a full queue."""
        message = f"at most {self.options.max_waiting} requests can wait: try again in {RETRY_AFTER_S} s"
        return ApiError(429, message, "queue_full", headers={"Retry-After": str(RETRY_AFTER_S)})


def create_app(pipeline: Any, options: ServerOptions | None = None) -> FastAPI:
    """Create the application of the server.

    The thread and the processes start with the application and end with it.

    Args:
        pipeline: pipeline with a model of this package; see `transformers_parakeet.transcription.load_pipeline`.
        options: limits, keys and options of the transcription.

    Returns:
        An ASGI application, for example for uvicorn.
    """
    options = options or ServerOptions()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """Start the parts of the server, and stop them at the end."""
        app.state.server = TranscriptionServer(pipeline, options)
        try:
            await app.state.server.warm_up()
            yield
        finally:
            await asyncio.to_thread(app.state.server.close)

    # the pages of the framework load scripts from other servers
    app = FastAPI(title="transformers-parakeet", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, handle_api_error)
    app.add_exception_handler(HTTPException, handle_http_error)
    app.add_exception_handler(ClientDisconnect, handle_disconnection)
    app.add_exception_handler(Exception, handle_unexpected_error)
    app.add_api_route("/v1/audio/transcriptions", transcribe, methods=["POST"])
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", get_model, methods=["GET"])
    app.add_api_route("/health", get_health, methods=["GET"])
    app.add_api_route("/ready", get_readiness, methods=["GET"])
    app.add_api_route("/metrics", get_metrics, methods=["GET"])
    add_realtime_route(app)
    app.mount("/", PageFiles())
    app.add_middleware(RequestLimits, options=options)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


async def handle_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error of the API."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.to_body(), error.status, headers=dict(error.headers))


async def handle_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error of the framework, such as a wrong path or a broken form."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return JSONResponse(ApiError(error.status_code, str(error.detail)).to_body(), error.status_code, headers=headers)


async def handle_disconnection(request: Request, error: Exception) -> JSONResponse:
    """Answer a client that has closed the connection within its upload; nobody receives the answer."""
    return JSONResponse(build_disconnection_error().to_body(), CLIENT_CLOSED_STATUS)


def build_disconnection_error() -> ApiError:
    """Build the error of a client that has closed the connection; it is only counted."""
    return ApiError(CLIENT_CLOSED_STATUS, "the client has closed the connection", "client_disconnected")


async def handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with the status 500; the framework logs the exception."""
    return JSONResponse(ApiError(500, INTERNAL_MESSAGE, "internal_error").to_body(), 500)


async def transcribe(request: Request) -> Response:
    """Transcribe the file of a request: `POST /v1/audio/transcriptions`."""
    server: TranscriptionServer = request.app.state.server
    start, status = time.monotonic(), 500
    response: Response
    try:
        updates = UpdateQueue()
        with server.receive_request():
            async with request.form(max_files=1, max_fields=32) as form:
                parameters = read_parameters(form, server.model_name, UploadFile)
                callbacks = updates.get_callbacks(parameters) if parameters.is_streamed else {}
                future = await server.submit(parameters, **callbacks)
        if parameters.is_streamed:
            response = _stream_events(server, parameters, future, updates)
        else:
            result = await _wait_for_result(request, server, future)
            body = build_body(result, parameters.response_format, parameters.granularities, parameters.language)
            response = Response(body, media_type=MEDIA_TYPES[parameters.response_format])
        status = response.status_code
    except ApiError as error:
        status = error.status
        raise
    except HTTPException as error:
        status = error.status_code
        raise
    except ClientDisconnect:
        status = CLIENT_CLOSED_STATUS
        raise
    finally:
        server.metrics.requests.labels(str(status)).inc()
        server.metrics.request_seconds.observe(time.monotonic() - start)
    return response


async def _wait_for_result(
    request: Request, server: TranscriptionServer, future: Future[TranscriptionResult]
) -> TranscriptionResult:
    """Wait for the result of a recording; a client that disconnects cancels it.

    Args:
        request: the request.
        server: the server.
        future: the future of the result.

    Raises:
        ApiError: 504 if the result takes too long, 400 if the recording cannot be transcribed, 499 if the client has
            disconnected.
    """
    result: asyncio.Future[Any] = asyncio.wrap_future(future)
    disconnection: asyncio.Future[Any] = asyncio.ensure_future(_wait_for_disconnection(request))
    try:
        await asyncio.wait(
            {result, disconnection}, timeout=server.options.request_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if result.done():
            return _get_result(server, future)
        if disconnection.done():
            raise build_disconnection_error()
        raise build_timeout_error(server.options)
    finally:
        result.cancel()
        disconnection.cancel()


def _get_result(server: TranscriptionServer, future: Future[TranscriptionResult]) -> TranscriptionResult:
    """Return the result of a future that is done.

    Args:
        server: the server.
        future: the future of the result.

    Raises:
        ApiError: 400 if the recording cannot be transcribed.
    """
    try:
        result = future.result()
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), "invalid_audio", "file") from error
    server.metrics.audio_seconds.inc(result.duration)
    return result


async def _wait_for_disconnection(request: Request) -> None:
    """Wait until the client closes the connection. The body of the request must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_timeout_error(options: ServerOptions) -> ApiError:
    """Build the error of a result that takes too long.

    Args:
        options: the options of the server.
    """
    message = f"a request must be answered within {options.request_timeout_s:g} s: send a shorter file"
    return ApiError(504, message, "timeout")


class UpdateQueue:
    """The texts of the windows of a recording, from the thread of the model to the thread of the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue()
        self._words: list[str] = []

    def get_callbacks(self, parameters: TranscriptionRequest) -> dict[str, Any]:
        """Return the arguments of `TranscriptionServer.submit` by which it adds updates.

        Args:
            parameters: the parameters of the request.
        """
        is_verbose = parameters.response_format == "verbose_json"
        return {"on_words": self.add_words} if is_verbose else {"on_text": self.add_text}

    def add_text(self, text: str) -> None:
        """Add the text so far; may be called in any thread.

        Args:
            text: the text.
        """
        # the last word of a window can change with the next window
        self._add((text.rpartition(" ")[0], {}))

    def add_words(self, words: tuple[TimedText, ...], seconds: float) -> None:
        """Add new words; may be called in any thread.

        Args:
            words: the new words.
            seconds: number of seconds that are decoded so far.
        """
        self._words.extend(word.text for word in words)
        self._add((" ".join(self._words), {"words": [build_word(word) for word in words], "seconds": seconds}))

    def close(self) -> None:
        """Add the end of the updates; may be called in any thread."""
        self._add(None)

    def _add(self, update: tuple[str, dict[str, Any]] | None) -> None:
        """Add an update."""
        # the loop can be closed while the server stops
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._updates.put_nowait, update)

    async def get(self) -> tuple[str, dict[str, Any]] | None:
        """Wait for the next update: the text so far and the fields of its event; `None` after the last update."""
        return await self._updates.get()


def _stream_events(
    server: TranscriptionServer,
    parameters: TranscriptionRequest,
    future: Future[TranscriptionResult],
    updates: UpdateQueue,
) -> StreamingResponse:
    """Answer with server-sent events: the text of each window as a delta, and the whole text at the end.

    With verbose JSON, which is an addition to OpenAI's API, a delta also has the new words and the number of seconds
    decoded so far, and the last event has the fields of verbose JSON.

    Args:
        server: the server.
        parameters: the parameters of the request.
        future: the future of the result.
        updates: the texts of the windows.
    """
    future.add_done_callback(lambda _: updates.close())

    async def iterate_events() -> AsyncIterator[str]:
        """Yield the events. If the client disconnects, the framework ends the iteration."""
        sent = ""
        try:
            while (update := await asyncio.wait_for(updates.get(), server.options.request_timeout_s)) is not None:
                text, fields = update
                delta = text[len(sent) :] if text.startswith(sent) else ""
                if delta or fields:
                    yield build_event({"type": "transcript.text.delta", "delta": delta, **fields})
                    sent += delta
            result = _get_result(server, future)
            if result.text.startswith(sent) and result.text != sent:
                yield build_event({"type": "transcript.text.delta", "delta": result.text[len(sent) :]})
            yield build_event(_build_last_event(result, parameters))
        except ApiError as error:
            yield build_event({"type": "error", **error.to_body()})
        except asyncio.TimeoutError:
            yield build_event({"type": "error", **build_timeout_error(server.options).to_body()})
        # the status of the response is already sent, so the framework cannot answer with an error
        except Exception:
            logger.exception("a stream of events failed")
            yield build_event({"type": "error", **ApiError(500, INTERNAL_MESSAGE, "internal_error").to_body()})
        finally:
            future.cancel()

    return StreamingResponse(iterate_events(), media_type="text/event-stream")


def _build_last_event(result: TranscriptionResult, parameters: TranscriptionRequest) -> dict[str, Any]:
    """Build the event that ends a stream of events.

    Args:
        result: the result of the recording.
        parameters: the parameters of the request.
    """
    fields: dict[str, Any] = {"text": result.text, "usage": build_usage(result.duration)}
    if parameters.response_format == "verbose_json":
        fields |= build_details(result, parameters.granularities, parameters.language)
    return {"type": "transcript.text.done", **fields}


async def list_models(request: Request) -> dict[str, Any]:
    """List the model: `GET /v1/models`."""
    return {"object": "list", "data": [_describe_model(request.app.state.server)]}


async def get_model(request: Request, model_id: str) -> dict[str, Any]:
    """Describe the model: `GET /v1/models/ID`."""
    server: TranscriptionServer = request.app.state.server
    if model_id != server.model_name:
        raise ApiError(404, f"the model must be {server.model_name!r}, got {model_id!r}", "model_not_found", "model")
    return _describe_model(server)


def _describe_model(server: TranscriptionServer) -> dict[str, Any]:
    """Describe the model in the form of OpenAI's API."""
    return {"id": server.model_name, "object": "model", "created": 0, "owned_by": "transformers-parakeet"}


async def get_health() -> dict[str, str]:
    """Return that the process runs: `GET /health`."""
    return {"status": "ok"}


async def get_readiness(request: Request) -> JSONResponse:
    """Return whether requests are accepted: `GET /ready`."""
    is_ready = request.app.state.server.worker.is_alive
    return JSONResponse({"status": "ready" if is_ready else "stopping"}, 200 if is_ready else 503)


async def get_metrics(request: Request) -> Response:
    """Return the measurements in the text format of Prometheus: `GET /metrics`."""
    server: TranscriptionServer = request.app.state.server
    server.metrics.waiting.set(server.worker.num_waiting)
    server.metrics.streams.set(server.live.num_open)
    return Response(server.metrics.to_text(), media_type="text/plain; version=0.0.4; charset=utf-8")


__all__ = ["TranscriptionServer", "create_app"]
