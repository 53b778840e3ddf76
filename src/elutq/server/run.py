"""Listening, and ending well."""

import asyncio
import logging
import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from elutq.errors import InvalidArgumentError
from elutq.server.app import create_app
from elutq.server.service import Service

_log = logging.getLogger(__name__)
#: Connections that may wait to be accepted.
_BACKLOG = 2048
#: For responses to be sent after their generations ended.
_FLUSH_SECONDS = 5


class DrainingServer(uvicorn.Server):
    """Lets running answers finish after a first SIGTERM or SIGINT; a second one ends them at once."""

    def __init__(self, service: Service, drain_seconds: float) -> None:
        """Serve `service`.

        Args:
            service: what to serve.
            drain_seconds: how long running answers may go on after a signal.
        """
        super().__init__(
            uvicorn.Config(
                create_app(service),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
            )
        )
        self._service = service
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. uvicorn's own way ends the process by the signal; ours ends it with status 0."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, wait for those that run, end what is left, close."""
        self._service.draining.set()
        scheduler = self._service.scheduler
        deadline = time.monotonic() + self._drain_seconds
        _log.info("shutting down: running answers have %g s to finish", self._drain_seconds)
        while time.monotonic() < deadline and not self.force_exit:
            stats = scheduler.stats
            if not stats.running and not stats.queued:
                break
            await asyncio.sleep(0.05)
        await asyncio.to_thread(scheduler.close)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections at an address.

    Raises:
        InvalidArgumentError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return _bound(socket.socket(family, kind, protocol), address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidArgumentError(f"cannot listen on {host}:{port}: {reason}; choose another") from None


def _bound(listener: socket.socket, address: Any) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
