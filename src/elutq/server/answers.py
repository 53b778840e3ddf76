"""From a request's answer in the making to the HTTP response: in one piece, or as a stream."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from elutq.generation import GenerationRequest
from elutq.server.job import Job, unless_disconnected
from elutq.server.service import Service
from elutq.server.streams import EventStream


class Answer(Protocol):
    """What an endpoint makes of the generations it asks for."""

    def requests(self) -> list[GenerationRequest]:
        """What to generate. Encodes text, so it may take a while."""

    def chunks(self, job: Job) -> AsyncIterator[Mapping[str, Any]]:
        """The objects of a stream."""

    async def whole(self, job: Job) -> Mapping[str, Any]:
        """The object of an answer in one piece."""


async def respond(service: Service, answer: Answer, request: Request, *, stream: bool) -> Response:
    """Submit what the answer needs, and respond with it.

    Raises:
        ElutqError: it cannot be generated; see `Job`.
        ApiError: it failed on the way. A stream ends with the error instead.
    """
    job = Job(service, await asyncio.to_thread(answer.requests))
    if stream:
        return EventStream(job, answer.chunks(job))
    with job:
        return JSONResponse(await unless_disconnected(request, answer.whole(job)))
