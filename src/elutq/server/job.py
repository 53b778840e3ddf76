"""One HTTP request's generations: from the engine's thread to the event loop, with a time limit."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from fastapi import Request

from elutq.generation import GenerationRequest
from elutq.server.errors import ApiError, api_error, shutting_down
from elutq.server.scheduler import Event, EventHandler, Submission, Usage
from elutq.server.service import Service

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Job:
    """Generations that belong together. Leaving its context cancels what is not finished."""

    def __init__(self, service: Service, requests: Sequence[GenerationRequest]) -> None:
        """Submit them all, or none.

        Raises:
            InvalidArgumentError: the model cannot serve one of them.
            QueueFullError: there is no room for all of them.
            ShuttingDownError: the server takes no more requests.
        """
        loop = asyncio.get_running_loop()
        self._service = service
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._submissions: list[Submission] = []
        self._usages: dict[int, Usage] = {}
        self._number = len(requests)
        self._expired = False
        self._timer = loop.call_later(service.settings.request_seconds, self._expire)
        try:
            for index, request in enumerate(requests):
                self._submissions.append(service.scheduler.submit(request, self._receiver(loop, index)))
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all generations as they come, each with the generation's index.

        Raises:
            ApiError: one failed, the time is over, or the server shuts down.
        """
        while len(self._usages) < self._number:
            index, event = await self._queue.get()
            if event.error is not None:
                raise api_error(event.error)
            if event.finish_reason == "cancelled":
                raise self._timeout() if self._expired else shutting_down()
            if event.usage is not None:
                self._record(index, event, event.usage)
            yield index, event

    def usage(self, choices: int) -> dict[str, Any]:
        """OpenAI's `usage` of all, once finished. A prompt that `choices` generations share counts once."""
        usages = [self._usages[index] for index in range(self._number)]
        prompt_tokens = sum(u.prompt_tokens for u in usages[::choices])
        completion_tokens = sum(u.completion_tokens for u in usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages[::choices])},
        }

    def close(self) -> None:
        """Cancel what is not finished."""
        self._timer.cancel()
        for submission in self._submissions:
            submission.cancel()
        # They lead back to this job by its event handlers: such a cycle would keep keys and values.
        self._submissions.clear()

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receiver(self, loop: asyncio.AbstractEventLoop, index: int) -> EventHandler:
        def receive(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return receive

    def _record(self, index: int, event: Event, usage: Usage) -> None:
        self._usages[index] = usage
        self._service.metrics.count_usage(usage)
        _log.info(
            "%d prompt tokens (%d cached), %d generated, %s; queued %.2f s, prefill %.2f s, decode %.2f s",
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            event.finish_reason,
            usage.queue_seconds,
            usage.prefill_seconds,
            usage.decode_seconds,
        )

    def _expire(self) -> None:
        self._expired = True
        self.close()

    def _timeout(self) -> ApiError:
        limit = self._service.settings.request_seconds
        message = f"the answer took longer than the limit of {limit:g} s; ask for fewer tokens"
        return ApiError(504, message, code="timeout")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is given up as soon as the client leaves."""
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnection(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection", code="client_closed")
    finally:
        leaving.cancel()
        task.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
