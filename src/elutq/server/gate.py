"""Who gets in, and with what: checks made before an endpoint sees a request."""

import asyncio
import logging
import re
import secrets
import time

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elutq.server.errors import ApiError, shutting_down
from elutq.server.service import Service

_log = logging.getLogger(__name__)


class Gate:
    """ASGI middleware: host, key, media type, size and time limits, counting and logging of responses.

    A request with a body is read here, wholly, so that no endpoint waits for a slow client.
    """

    def __init__(
        self, app: ASGIApp, service: Service, open_paths: frozenset[str], paths: frozenset[str]
    ) -> None:
        """Guard `app`.

        Args:
            app: the application.
            service: whose settings count.
            open_paths: paths that need no key.
            paths: all paths; others are counted as one.
        """
        self._app = app
        self._service = service
        self._open_paths = open_paths
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        status = 499  # until the response starts: the client has left

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                receive = await self._admit(scope, receive)
            except ApiError as error:
                # What is left of the body must not be taken for the next request.
                error.headers["Connection"] = "close"
                await error.response(scope, receive, observed_send)
                return
            await self._app(scope, receive, observed_send)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.count_response(path, status)
            _log.info("%s %s: %d in %.3f s", scope["method"], path, status, time.monotonic() - begin)

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """The request's messages, if it may come in."""
        headers = Headers(scope=scope)
        self._check_host(headers)
        if scope["path"] not in self._open_paths:
            self._check_key(headers)
        if scope["method"] != "POST":
            return receive
        if self._service.draining.is_set():
            raise shutting_down()
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Content-Type must be application/json", code="unsupported_media_type")
        body = await self._read(headers, receive)
        try:
            from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
        return _replay(body, receive)

    def _check_host(self, headers: Headers) -> None:
        hosts = self._service.settings.hosts
        name = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if hosts and name not in hosts:
            raise ApiError(
                403,
                f"this server is not called {name!r:.100}; start it with --allowed-host, or with an API key",
                code="unknown_host",
            )

    def _check_key(self, headers: Headers) -> None:
        key = self._service.settings.api_key
        if key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        settings = self._service.settings
        too_large = ApiError(
            413, f"the request is larger than the limit of {settings.body_bytes} bytes", code="body_too_large"
        )
        if int(headers.get("content-length", 0)) > settings.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client closed the connection", code="client_closed")
                    body += message.get("body", b"")
                    if len(body) > settings.body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            message_text = f"the request did not arrive within {settings.body_seconds:g} s"
            raise ApiError(408, message_text, code="request_timeout") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what else comes: the client's leaving."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
