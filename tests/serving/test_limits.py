"""Tests of the limits that the middleware checks: keys, sizes and speeds of uploads; without a server."""

import asyncio
import json

import pytest

from transformers_parakeet.serving import ServerOptions, is_local_host
from transformers_parakeet.serving.errors import ApiError
from transformers_parakeet.serving.limits import LimitedBody, RequestLimits, has_valid_key


def make_scope(path="/v1/models", kind="http", **fields):
    """Return the ASGI scope of a request."""
    return {"type": kind, "path": path, "headers": [], **fields}


def with_key(value):
    """Return the headers with a value of `Authorization`."""
    return [(b"Authorization", value)]


@pytest.mark.parametrize(
    ("value", "is_valid"),
    [
        (b"Bearer secret", True),
        (b"bearer  secret ", True),
        ("Bearer clé".encode(), True),
        (b"Bearer secre", False),
        (b"Bearer secrett", False),
        (b"Bearer ", False),
        (b"Bearer", False),
        (b"secret", False),
        (b"Basic secret", False),
        (b"Bearer \xff\xfe", False),
        (b"", False),
    ],
)
def test_the_key_is_in_the_header(value, is_valid):
    assert has_valid_key(make_scope(headers=with_key(value)), ("secret", "clé")) is is_valid


def test_every_key_is_compared(monkeypatch):
    import hmac

    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda first, second: compared.append(second) or compare(first, second))
    assert has_valid_key(make_scope(headers=with_key(b"Bearer a")), ("a", "b", "c"))
    assert compared == [b"a", b"b", b"c"]


def test_which_requests_need_a_key():
    for path in ("/", "/health", "/ready", "/metrics", "/app.js"):
        assert has_valid_key(make_scope(path), ("secret",))
    for path in ("/v1/models", "/v1/audio/transcriptions", "/v1/realtime", "/v1/"):
        assert not has_valid_key(make_scope(path), ("secret",))
        assert has_valid_key(make_scope(path), ())


def test_a_browser_sends_the_key_as_a_subprotocol():
    scope = make_scope("/v1/realtime", "websocket", subprotocols=["realtime", "openai-insecure-api-key.secret"])
    assert has_valid_key(scope, ("secret",))
    scope["subprotocols"] = ["realtime", "openai-insecure-api-key."]
    assert not has_valid_key(scope, ("secret",))


def receive_body(messages, options):
    """Receive a body with the limits.

    Args:
        messages: for each message, its content, whether more follows, and the seconds before it.
        options: fields of `ServerOptions`.

    Returns:
        The number of bytes received.
    """
    pending = list(messages)

    async def receive():
        """Receive the next message."""
        content, has_more, seconds = pending.pop(0)
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": content, "more_body": has_more}

    async def receive_all():
        """Receive all messages."""
        body = LimitedBody(receive, ServerOptions(**options))
        while not body.is_complete:
            await body.receive()
        return body.num_bytes

    return asyncio.run(receive_all())


def test_a_body_may_have_exactly_the_maximum_size():
    messages = [(bytes(600), True, 0), (bytes(400), False, 0)]
    assert receive_body(messages, {"max_upload_bytes": 1000}) == 1000
    with pytest.raises(ApiError, match="at most 999 bytes") as caught:
        receive_body(messages, {"max_upload_bytes": 999})
    assert (caught.value.status, caught.value.code) == (413, "upload_too_large")


def test_the_average_rate_of_an_upload_is_limited():
    options = {"upload_grace_s": 0.1, "min_upload_rate": 1000.0}
    # 500 bytes allow another 0.5 s
    assert receive_body([(bytes(500), True, 0), (bytes(1), False, 0.3)], options) == 501
    with pytest.raises(ApiError) as caught:
        receive_body([(bytes(50), True, 0), (bytes(1), False, 0.3)], options)
    assert (caught.value.status, caught.value.code) == (408, "upload_too_slow")


def call(scope, app, **options):
    """Call the middleware around an application; the messages that the client receives."""
    sent = []

    async def send(message):
        """Record a message."""
        sent.append(message)

    async def receive():
        """Receive an empty body."""
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(RequestLimits(app, ServerOptions(**options))(scope, receive, send))
    return sent


async def answer(scope, receive, send):
    """Answer with the status 200."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"fine"})


def test_a_request_without_a_key_does_not_reach_the_application():
    start, body = call(make_scope(), None, api_keys=("secret",))
    assert start["status"] == 401
    assert json.loads(body["body"])["error"]["type"] == "authentication_error"
    assert call(make_scope("/v1/realtime", "websocket"), None, api_keys=("secret",)) == [
        {"type": "websocket.close", "code": 1008}
    ]
    assert call(make_scope(headers=with_key(b"Bearer secret")), answer, api_keys=("secret",))[0]["status"] == 200


def test_a_declared_length_is_checked_before_the_body():
    scope = make_scope(headers=[(b"Content-Length", str(2 * 1024**3).encode())])
    start, body = call(scope, None)
    assert start["status"] == 413
    assert json.loads(body["body"])["error"]["code"] == "upload_too_large"


def test_an_error_after_the_start_of_a_response_is_raised():
    async def fail(scope, receive, send):
        """Fail within the response."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ApiError(408, "too late")

    with pytest.raises(ApiError, match="too late"):
        call(make_scope(), fail)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_waiting": 0}, "`max_waiting` must be at least 1"),
        ({"num_decoders": 0}, "`num_decoders` must be at least 1"),
        ({"max_duration_s": 0.0}, "`max_duration_s` must be greater than 0"),
        ({"max_waiting_audio_s": -1.0}, "`max_waiting_audio_s` must be greater than 0"),
        ({"request_timeout_s": float("nan")}, "`request_timeout_s` must be greater than 0"),
        ({"batch_wait_s": 2.0}, "`batch_wait_s` must be from 0 to 1 s"),
        ({"api_keys": ("a", " ")}, "an API key must not be empty"),
    ],
)
def test_options_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        ServerOptions(**fields)


def test_which_hosts_only_this_machine_reaches():
    assert all(map(is_local_host, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_local_host, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "")))
