"""Closes HTTP connections that do not send the head of a request in time, or that go on sending after the response.

`limits.py` limits the bodies of requests.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

# seconds in which a client must send the head of a request
HEAD_TIMEOUT_S = 10.0
# seconds for which the rest of a body is read and ignored after a response that did not need it. Closing at once could
# reset the connection before the client has read the response.
REST_TIMEOUT_S = 5.0
# seconds for which a connection stays open between two requests
KEEP_ALIVE_S = 30


class TimedProtocol(H11Protocol):
    """The HTTP protocol of uvicorn, with time-outs outside of requests; for `uvicorn.run(…, http=TimedProtocol)`."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to wait for the head of the first request.

        Args:
            transport: the connection.
        """
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Process data of the client.

        Args:
            data: the bytes received.
        """
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        """Continue after a response."""
        super().on_response_complete()
        self._update_timer()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Pass the connection on to the WebSocket protocol.

        Args:
            event: the request for the upgrade.
        """
        self._stop_timer()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection.

        Args:
            exc: the error that closed the connection; `None` if there was none.
        """
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


def run_server(app: Any, host: str, port: int) -> None:
    """Run an application until the process gets SIGINT or SIGTERM, and then finish the requests.

    Args:
        app: the application.
        host: address to bind to.
        port: port to bind to.
    """
    uvicorn.run(app, host=host, port=port, http=TimedProtocol, log_level="warning", timeout_keep_alive=KEEP_ALIVE_S)


__all__ = ["TimedProtocol", "run_server"]
