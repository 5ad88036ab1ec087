"""Serves the files of the web page, with headers that keep the page from loading anything from other servers."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from fastapi.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

STATIC_FOLDER = Path(__file__).parent / "static"

# https://www.w3.org/TR/CSP3/; the player plays recordings that the page holds in memory, whose addresses start with
# `blob:`
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "media-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # the browser asks whether a file has changed before it uses its copy
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """The files of the web page."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC_FOLDER, html=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with a file; a WebSocket with an unknown path is refused."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            """Add the headers of the page to the start of the response."""
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in PAGE_HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await super().__call__(scope, receive, send_with_headers)


__all__ = ["CONTENT_SECURITY_POLICY", "PageFiles"]
