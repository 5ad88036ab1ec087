"""`parakeet serve`: a server for transcription over HTTP and WebSocket."""

from __future__ import annotations

from typing import Annotated

import typer

from .messages import print_error_and_exit, print_note
from .models import load_pipeline, print_model_note
from .transcribe import DEFAULT_MODEL, AttentionOption, Device, DtypeOption, Model, QuantizeOption, get_value

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def serve(
    model: Model = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to bind to; 0.0.0.0 lets other machines connect and needs an API key.")
    ] = DEFAULT_HOST,
    port: Annotated[int, typer.Option(help="Port to bind to.", min=0, max=65535)] = DEFAULT_PORT,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must have; repeatable. Default: no key.", envvar="PARAKEET_API_KEY"),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may call this server (CORS); repeatable.")
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(help="Maximum size of an upload in MB.", min=1)] = 100,
    max_duration: Annotated[float, typer.Option(help="Maximum length of a recording in seconds.")] = 7200.0,
    max_waiting: Annotated[int, typer.Option(help="Maximum number of requests that wait.", min=1)] = 256,
    max_streams: Annotated[int, typer.Option(help="Maximum number of live streams.", min=1)] = 32,
    attention: AttentionOption = None,
    device: Device = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Serve a model with OpenAI's API for transcription, live captions and a web page."""
    with print_error_and_exit():
        from transformers_parakeet.optional_packages import import_optional

        uvicorn = import_optional("uvicorn", "the server", "serve")
        for package in ("fastapi", "multipart", "pebble", "prometheus_client", "websockets"):
            import_optional(package, "the server", "serve")
        from transformers_parakeet.serving import ServerOptions, TimedProtocol, create_app, is_local_host

        if not is_local_host(host) and not api_key:
            raise ValueError(
                f"a server that other machines can reach must have an API key, got the host {host} without a key: add "
                f"`--api-key KEY`, or use `--host {DEFAULT_HOST}`"
            )
        options = ServerOptions(
            api_keys=tuple(api_key or ()),
            allowed_origins=tuple(allow_origin or ()),
            max_upload_bytes=max_upload_mb * 1024**2,
            max_duration_s=max_duration,
            max_waiting=max_waiting,
            max_streams=max_streams,
        )
        choices = {"dtype": dtype, "attention": attention, "quantize": quantize}
        pipeline = load_pipeline(model, device=device, **{name: get_value(choice) for name, choice in choices.items()})
        print_model_note(pipeline, is_default_dtype=dtype is None)
        print_note(f"open http://{host}:{port} in a browser, or send requests to http://{host}:{port}/v1")
        uvicorn.run(
            create_app(pipeline, options),
            host=host,
            port=port,
            http=TimedProtocol,
            log_level="warning",
            timeout_keep_alive=30,
        )


__all__ = ["serve"]
