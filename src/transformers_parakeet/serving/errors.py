"""Defines the errors of the server, in the form of the errors of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ApiError(Exception):
    """An error that ends a request.

    Args:
        status: HTTP status.
        message: what must hold, what the request had, and what to do.
        code: short name of the error for programs, such as `queue_full`; `None` for no name.
        param: name of the parameter that is wrong; `None` if the error has another cause.
        headers: additional headers of the response.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the message."""
        return self.message

    def to_body(self) -> dict[str, Any]:
        """Return the body of the response: https://platform.openai.com/docs/guides/error-codes."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 401:
            kind = "authentication_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


__all__ = ["ApiError"]
