"""Checks the API key, the size and the speed of requests before the application reads them."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import ApiError
from .options import ServerOptions

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# paths below this prefix need an API key
API_PREFIX = "/v1/"
# subprotocol of a WebSocket by which a browser, which cannot set headers, sends the API key; OpenAI's name
KEY_SUBPROTOCOL = "openai-insecure-api-key."


def has_valid_key(scope: MutableMapping[str, Any], api_keys: tuple[str, ...]) -> bool:
    """Return whether a request has a valid API key, or needs none. All keys are compared in constant time.

    Args:
        scope: the ASGI scope of the request.
        api_keys: the valid keys; empty if no key is needed.
    """
    if not api_keys or not scope["path"].startswith(API_PREFIX):
        return True
    headers = {name.lower(): value for name, value in scope["headers"]}
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    candidates = [key.strip()] if scheme.lower() == b"bearer" else []
    protocols = scope.get("subprotocols", ())
    candidates += [
        name.removeprefix(KEY_SUBPROTOCOL).encode() for name in protocols if name.startswith(KEY_SUBPROTOCOL)
    ]
    # a list, so that the time does not depend on which key is equal
    matches = [hmac.compare_digest(candidate, valid.encode()) for candidate in candidates for valid in api_keys]
    return any(matches)


class RequestLimits:
    """ASGI middleware that refuses requests without a key, and uploads that are too large or too slow.

    Args:
        app: the application.
        options: the limits and the keys.
    """

    def __init__(self, app: Any, options: ServerOptions) -> None:
        self.app, self.options = app, options

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer with an error."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if not has_valid_key(scope, self.options.api_keys):
            if scope["type"] == "websocket":
                # the server answers a handshake that is closed before it is accepted with the status 403
                await send({"type": "websocket.close", "code": 1008})
            else:
                message = "the header `Authorization` must be `Bearer KEY` with a valid API key: add or correct it"
                await send_error(send, ApiError(401, message, "invalid_api_key"))
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        await self._pass_request(scope, receive, send)

    async def _pass_request(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, and answer with an error if its body breaks a limit before a response has started.

        Args:
            scope: the ASGI scope.
            receive: receives messages of the client.
            send: sends messages to the client.
        """
        has_started = False

        async def send_and_note(message: Message) -> None:
            """Send a message, and note whether the response has started."""
            nonlocal has_started
            has_started = has_started or message["type"] == "http.response.start"
            await send(message)

        body = LimitedBody(receive, self.options)
        try:
            for name, value in scope["headers"]:
                if name.lower() == b"content-length" and value.isdigit():
                    body.check_size(int(value))
            await self.app(scope, body.receive, send_and_note)
        except ApiError as error:
            if has_started:
                raise
            await send_error(send, error)


class LimitedBody:
    """Receives the body of one request within the limits.

    Args:
        receive: receives messages of the client.
        options: the limits.
    """

    def __init__(self, receive: Receive, options: ServerOptions) -> None:
        self._receive, self.options = receive, options
        self.start = time.monotonic()
        self.num_bytes = 0
        self.is_complete = False

    def check_size(self, num_bytes: int) -> None:
        """Raise an `ApiError` with the status 413 if a body is too large.

        Args:
            num_bytes: size in bytes that the body has at least.
        """
        limit = self.options.max_upload_bytes
        if num_bytes > limit:
            message = f"a request must have at most {limit} bytes, got {num_bytes}: send a shorter or compressed file"
            raise ApiError(413, message, "upload_too_large", "file")

    async def receive(self) -> Message:
        """Receive the next message.

        Raises:
            ApiError: 413 if the body is too large, 408 if it arrives too slowly.
        """
        if self.is_complete:
            return await self._receive()
        # after the grace period, the average rate must be at least the minimum
        allowed_s = self.options.upload_grace_s + self.num_bytes / self.options.min_upload_rate
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self.start + allowed_s - time.monotonic()))
        except asyncio.TimeoutError:
            rate = self.options.min_upload_rate
            message_text = f"an upload must have at least {rate:g} bytes per second: use a faster connection"
            raise ApiError(408, message_text, "upload_too_slow") from None
        if message["type"] == "http.request":
            self.num_bytes += len(message.get("body", b""))
            self.check_size(self.num_bytes)
            self.is_complete = not message.get("more_body", False)
        return message


async def send_error(send: Send, error: ApiError) -> None:
    """Send the response of an error.

    Args:
        send: sends messages to the client.
        error: the error.
    """
    body = json.dumps(error.to_body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["RequestLimits", "has_valid_key", "send_error"]
