"""The HTTP API of the server: transcription in the form of OpenAI's API, health and metrics.

`batching.py` runs the model, `uploads.py` decodes files, `limits.py` checks requests, and `realtime.py` serves live
streams.
"""

from __future__ import annotations

import asyncio
import io
import time
import wave
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ..results import TimedText, TranscriptionResult
from ..transcription import get_version
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

# seconds after which a client may try again when the queue is full
RETRY_AFTER_S = 2


class TranscriptionServer:
    """The parts of a running server.

    Args:
        pipeline: pipeline with a model of this package.
        options: limits, keys and options of the transcription.
    """

    def __init__(self, pipeline: Any, options: ServerOptions) -> None:
        self.pipeline, self.options = pipeline, options
        self.model_name = str(pipeline.model.name_or_path or "parakeet")
        self.metrics = ServerMetrics()
        self.live = LiveStreams(pipeline, options.max_streams)
        self.worker = ModelWorker(
            pipeline,
            options.transcription,
            options.max_waiting,
            options.batch_wait_s,
            self.live,
            self.metrics.add_batch,
        )
        self.live.notify = self.worker.notify
        sampling_rate = pipeline.processor.feature_extractor.sampling_rate
        self.decoder = UploadDecoder(
            options.num_decoders, sampling_rate, options.max_duration_s, options.decoding_timeout_s
        )

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
        # the queue is checked before the work of decoding, and again by `submit`
        if self.worker.num_waiting >= self.options.max_waiting:
            raise self._build_full_error()
        samples = await self.decoder.decode(parameters.content, parameters.file_name)
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

    # the pages of FastAPI about the API load files from other servers
    app = FastAPI(
        title="transformers-parakeet",
        version=get_version() or "0",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_exception_handler(ApiError, handle_api_error)
    app.add_exception_handler(HTTPException, handle_http_error)
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


async def handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with the status 500; the framework logs the exception."""
    return JSONResponse(ApiError(500, "the server failed: see its log", "internal_error").to_body(), 500)


async def transcribe(request: Request) -> Response:
    """Transcribe the file of a request: `POST /v1/audio/transcriptions`."""
    server: TranscriptionServer = request.app.state.server
    start, status = time.monotonic(), 500
    response: Response
    try:
        async with request.form(max_files=1, max_fields=32) as form:
            parameters = await read_parameters(form, server.model_name, UploadFile)
        if parameters.is_streamed:
            response = await _stream_events(request, server, parameters)
        else:
            result = await _wait_for_result(request, server, await server.submit(parameters))
            body = build_body(result, parameters.response_format, parameters.granularities, parameters.language)
            response = Response(body, media_type=MEDIA_TYPES[parameters.response_format])
        status = response.status_code
    except ApiError as error:
        status = error.status
        raise
    except HTTPException as error:
        status = error.status_code
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
            raise ApiError(499, "the client has closed the connection", "client_disconnected")
        message = f"a request must be answered within {server.options.request_timeout_s:g} s: send a shorter file"
        raise ApiError(504, message, "timeout")
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


async def _stream_events(
    request: Request, server: TranscriptionServer, parameters: TranscriptionRequest
) -> StreamingResponse:
    """Answer with server-sent events: the text of each window as a delta, and the whole text at the end.

    With verbose JSON, which is an addition to OpenAI's API, a delta also has the new words and the number of seconds
    decoded so far, and the last event has the fields of verbose JSON.

    Args:
        request: the request.
        server: the server.
        parameters: the parameters of the request.
    """
    loop = asyncio.get_running_loop()
    updates: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue()
    all_words: list[str] = []

    def add_text(text: str) -> None:
        """Add a text in the thread of the event loop."""
        # the last word of a window can change with the next window
        loop.call_soon_threadsafe(updates.put_nowait, (text.rpartition(" ")[0], {}))

    def add_words(words: tuple[TimedText, ...], seconds: float) -> None:
        """Add words in the thread of the event loop."""
        all_words.extend(word.text for word in words)
        fields = {"words": [build_word(word) for word in words], "seconds": seconds}
        loop.call_soon_threadsafe(updates.put_nowait, (" ".join(all_words), fields))

    is_verbose = parameters.response_format == "verbose_json"
    callbacks = {"on_words": add_words} if is_verbose else {"on_text": add_text}
    future = await server.submit(parameters, **callbacks)
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(updates.put_nowait, None))

    return StreamingResponse(_iterate_events(server, parameters, future, updates), media_type="text/event-stream")


async def _iterate_events(
    server: TranscriptionServer,
    parameters: TranscriptionRequest,
    future: Future[TranscriptionResult],
    updates: asyncio.Queue[tuple[str, dict[str, Any]] | None],
) -> AsyncIterator[str]:
    """Yield the events of a stream. If the client disconnects, the framework ends the iteration.

    Args:
        server: the server.
        parameters: the parameters of the request.
        future: the future of the result.
        updates: the text so far and the additional fields of each delta; `None` after the last one.
    """
    sent, timeout_s = "", server.options.request_timeout_s
    try:
        while (update := await asyncio.wait_for(updates.get(), timeout_s)) is not None:
            text, fields = update
            delta = text[len(sent) :] if text.startswith(sent) else ""
            if delta or fields:
                yield build_event({"type": "transcript.text.delta", "delta": delta, **fields})
                sent += delta
        result = _get_result(server, future)
        if result.text.startswith(sent) and result.text != sent:
            yield build_event({"type": "transcript.text.delta", "delta": result.text[len(sent) :]})
        yield build_event(_build_last_event(result, parameters))
    except asyncio.TimeoutError:
        message = f"the next text must be ready within {timeout_s:g} s: send a shorter file"
        yield build_event({"type": "error", **ApiError(504, message, "timeout").to_body()})
    except ApiError as error:
        yield build_event({"type": "error", **error.to_body()})
    finally:
        future.cancel()


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
