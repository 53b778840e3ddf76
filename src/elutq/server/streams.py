"""Server-sent events."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from elutq.server.errors import api_error
from elutq.server.job import Job

_SILENCE_SECONDS = 15.0

_log = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """Objects as they come, then `[DONE]`. The job ends with the stream, also when the client leaves."""

    def __init__(self, job: Job, objects: AsyncIterator[Mapping[str, Any]]) -> None:
        """Stream what `objects` makes of the job."""
        # The second header keeps nginx from buffering the stream.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_kept_alive(_encode(objects)), media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        with self._job:
            await super().__call__(scope, receive, send)


async def _encode(objects: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[str]:
    try:
        async for item in objects:
            yield _event(item)
    except Exception as error:
        answer = api_error(error)
        if answer.status == 500:
            _log.error("a stream failed", exc_info=error)
        yield _event(answer.body)
    yield "data: [DONE]\n\n"


async def _kept_alive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events, with a comment where none comes for long: proxies close silent connections."""
    while True:
        following = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait({following}, timeout=_SILENCE_SECONDS))[0]:
                yield ": working\n\n"
        finally:
            following.cancel()
        event = following.result()
        if event is None:
            return
        yield event


def _event(item: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(item, ensure_ascii=False, separators=(',', ':'))}\n\n"


def now() -> int:
    """Unix time, as `created` has it."""
    return int(time.time())
