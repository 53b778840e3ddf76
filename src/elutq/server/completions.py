"""POST /v1/completions: plain prompts."""

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from elutq.errors import InvalidArgumentError
from elutq.generation import GenerationRequest
from elutq.server.answers import respond
from elutq.server.job import Job
from elutq.server.logprobs import CompletionLogprobs
from elutq.server.scheduler import Event
from elutq.server.schemas import CompletionBody
from elutq.server.service import Service
from elutq.server.streams import now


def completion_routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Continue one or several texts."""
        service.check_model(body.model)
        service.check_choices(len(body.prompts) * body.n)
        return await respond(service, _Answer(service, body), request, stream=body.stream)

    return router


class _Answer:
    """One request's answer in the making."""

    def __init__(self, service: Service, body: CompletionBody) -> None:
        self._service = service
        self._body = body
        self._head = {
            "id": "cmpl-" + secrets.token_hex(12),
            "object": "text_completion",
            "created": now(),
            "model": service.settings.model_name,
        }
        choices = len(body.prompts) * body.n
        self._logprobs = [CompletionLogprobs(service.vocabulary) for _ in range(choices)]
        self._echoes = [""] * choices

    def requests(self) -> list[GenerationRequest]:
        """What to generate: `n` texts for each prompt."""
        tokenizer, body = self._service.model.tokenizer, self._body
        if not body.prompts:
            raise InvalidArgumentError("prompt is an empty list; give at least one prompt")
        requests = []
        for number, prompt in enumerate(body.prompts):
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            if body.echo:
                text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
                self._echoes[number * body.n : (number + 1) * body.n] = [text] * body.n
            requests += [
                GenerationRequest(
                    ids,
                    max_new_tokens=body.max_tokens,
                    sampling=body.sampling(choice),
                    stop=body.stops,
                    logprobs=body.logprobs,
                    ignore_eos=body.ignore_eos,
                )
                for choice in range(body.n)
            ]
        return requests

    async def chunks(self, job: Job) -> AsyncIterator[Mapping[str, Any]]:
        """The objects of a stream."""
        head = self._head | ({"usage": None} if self._body.include_usage else {})
        for index, echo in enumerate(self._echoes):
            if echo:
                yield head | {"choices": [_choice(index, echo, None, None)]}
        async for index, event in job.events():
            logprobs = self._event_logprobs(index, event)
            yield head | {"choices": [_choice(index, event.text, logprobs, event.finish_reason)]}
        if self._body.include_usage:
            yield head | {"choices": [], "usage": job.usage(self._body.n)}

    async def whole(self, job: Job) -> Mapping[str, Any]:
        """The object of an answer in one piece."""
        events: list[list[Event]] = [[] for _ in self._echoes]
        async for index, event in job.events():
            events[index].append(event)
        choices = [self._whole_choice(index, parts) for index, parts in enumerate(events)]
        return self._head | {"choices": choices, "usage": job.usage(self._body.n)}

    def _whole_choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        text = self._echoes[index] + "".join(event.text for event in events)
        tokens = [token for event in events for token in event.tokens]
        logprobs = None if self._body.logprobs is None else self._logprobs[index].add(tokens)
        return _choice(index, text, logprobs, events[-1].finish_reason)

    def _event_logprobs(self, index: int, event: Event) -> dict[str, Any] | None:
        return None if self._body.logprobs is None else self._logprobs[index].add(event.tokens)


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
