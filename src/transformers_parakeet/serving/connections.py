"""Closes HTTP connections that do not send the head of a request in time, or that go on sending after the response.

`limits.py` limits the bodies of requests.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# seconds in which a client must send the head of a request
HEAD_TIMEOUT_S = 10.0
# seconds for which the rest of a body is read and ignored after a response that did not need it. Closing at once could
# reset the connection before the client has read the response.
REST_TIMEOUT_S = 5.0


class TimedProtocol(H11Protocol):
    """The HTTP protocol of uvicorn, with time-outs outside of requests; for `uvicorn.run(…, http=TimedProtocol)`."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to wait for the head of the first request."""
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Process data of the client."""
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        """Continue after a response."""
        super().on_response_complete()
        self._update_timer()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Pass the connection on to the WebSocket protocol."""
        self._stop_timer()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def _update_timer(self) -> None:
        """Start the timer if the client must send something, and stop it during a request and between two requests.

        Further data does not extend the time.
        """
        is_in_request = self.cycle is not None and not self.cycle.response_complete
        # uvicorn has a timer for a connection between two requests
        is_between = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        is_upgraded = self.transport.get_protocol() is not self
        if is_in_request or is_between or is_upgraded or self.transport.is_closing():
            self._stop_timer()
        elif self._timer is None:
            is_in_body = self.conn.their_state is h11.SEND_BODY
            self._timer = self.loop.call_later(REST_TIMEOUT_S if is_in_body else HEAD_TIMEOUT_S, self.transport.close)

    def _stop_timer(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


__all__ = ["TimedProtocol"]
