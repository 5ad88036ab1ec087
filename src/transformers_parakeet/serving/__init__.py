"""A server for transcription over HTTP and WebSocket, in the form of OpenAI's API. It needs the extra `serve`."""

from .app import TranscriptionServer, create_app
from .connections import TimedProtocol
from .options import ServerOptions, is_local_host

__all__ = ["ServerOptions", "TimedProtocol", "TranscriptionServer", "create_app", "is_local_host"]
