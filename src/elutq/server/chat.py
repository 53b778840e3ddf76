"""POST /v1/chat/completions: conversations, tools, answers in a given format."""

import copy
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from elutq.errors import InvalidArgumentError
from elutq.generation import GenerationRequest
from elutq.sampling import Token
from elutq.server.answers import respond
from elutq.server.job import Job
from elutq.server.logprobs import chat_logprobs
from elutq.server.scheduler import Event
from elutq.server.schemas import ChatBody, Message, NamedTool
from elutq.server.service import Service
from elutq.server.streams import now
from elutq.server.tools import ToolCall, ToolFormat, ToolParser, tool_format
from elutq.server.vocabulary import GrammarConstraint


def chat_routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        service.check_choices(body.n)
        return await respond(service, _Answer(service, body), request, stream=body.stream)

    return router


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: texts in one piece, arguments of calls as objects.

    OpenAI's newer name for the system's role is unknown to templates.
    """
    rendered = []
    for message in messages:
        fields = message.model_dump(exclude_none=True)
        if fields["role"] == "developer":
            fields["role"] = "system"
        if isinstance(message.content, list):
            fields["content"] = "".join(part.text for part in message.content)
        for call in fields.get("tool_calls", ()):
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        rendered.append(fields)
    return rendered


class _Answer:
    """One request's answer in the making."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        self._service = service
        self._body = body
        self._format = _tool_format(service, body)
        self._head = {
            "id": "chatcmpl-" + secrets.token_hex(12),
            "created": now(),
            "model": service.settings.model_name,
        }

    def requests(self) -> list[GenerationRequest]:
        """What to generate: `n` answers."""
        body, tokenizer = self._body, self._service.model.tokenizer
        if not tokenizer.has_chat_template:
            raise InvalidArgumentError(
                f"{self._service.settings.model_name} is not a chat model: it has no chat template; "
                "send a plain prompt to /v1/completions"
            )
        tools = [
            tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.active_tools
        ]
        ids = tokenizer.encode_chat(
            template_messages(body.messages), tools=tools or None, **body.chat_template_kwargs
        )
        constraint = self._constraint()
        return [
            GenerationRequest(
                ids,
                max_new_tokens=body.max_completion_tokens or body.max_tokens or self._service.model.context,
                sampling=body.sampling(choice),
                stop=body.stops,
                logprobs=body.top_logprobs if body.logprobs else None,
                constraint=copy.copy(constraint),
            )
            for choice in range(body.n)
        ]

    async def chunks(self, job: Job) -> AsyncIterator[Mapping[str, Any]]:
        """The objects of a stream."""
        head = self._head | {"object": "chat.completion.chunk"}
        head |= {"usage": None} if self._body.include_usage else {}
        choices = self._choices()
        for index in range(len(choices)):
            yield head | {"choices": [_chunk(index, {"role": "assistant", "content": ""})]}
        async for index, event in job.events():
            for chunk in choices[index].chunks(index, event):
                yield head | {"choices": [chunk]}
        if self._body.include_usage:
            yield head | {"choices": [], "usage": job.usage(self._body.n)}

    async def whole(self, job: Job) -> Mapping[str, Any]:
        """The object of an answer in one piece."""
        choices = self._choices()
        async for index, event in job.events():
            choices[index].add(event)
        return self._head | {
            "object": "chat.completion",
            "choices": [choice.whole(index) for index, choice in enumerate(choices)],
            "usage": job.usage(self._body.n),
        }

    def _choices(self) -> list["_Choice"]:
        names = [tool.function.name for tool in self._body.active_tools]
        return [
            _Choice(self._service, self._body, None if self._format is None else self._format.parser(names))
            for _ in range(self._body.n)
        ]

    def _constraint(self) -> GrammarConstraint | None:
        """What the answer must look like, if anything is asked of it."""
        body, vocabulary = self._body, self._service.vocabulary
        if self._format is not None and body.tool_choice != "auto":
            chosen = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
            functions = [t.function for t in body.active_tools if chosen in (None, t.function.name)]
            return vocabulary.call_constraint(
                self._format,
                [(function.name, function.parameters) for function in functions],
                several=chosen is None and body.parallel_tool_calls,
            )
        if body.response_format is None or body.response_format.type == "text":
            return None
        wanted = body.response_format.json_schema
        return vocabulary.json_constraint({"type": "object"} if wanted is None else wanted.schema_)


class _Choice:
    """One of the `n` answers."""

    def __init__(self, service: Service, body: ChatBody, parser: ToolParser | None) -> None:
        self._vocabulary = service.vocabulary
        self._body = body
        self._parser = parser
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._tokens: list[Token] = []
        self._finish_reason: str | None = None

    def add(self, event: Event) -> list[str | ToolCall]:
        """Take the next event; the words and calls that it completes."""
        self._tokens += event.tokens
        self._finish_reason = event.finish_reason
        parts: list[str | ToolCall] = []
        if self._parser is None:
            parts += [event.text] if event.text else []
        else:
            parts += self._parser.push(event.text)
            parts += self._parser.flush() if event.finish_reason is not None else ()
        return list(self._keep(parts))

    def chunks(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """The pieces of a stream that the next event gives."""
        for part in self.add(event):
            if isinstance(part, str):
                delta: dict[str, Any] = {"content": part}
            else:
                delta = {"tool_calls": [{"index": self._calls.index(part)} | _call(part)]}
            yield _chunk(index, delta, self._take_logprobs())
        if event.finish_reason is not None:
            yield _chunk(index, {}, self._take_logprobs(), self._reason)

    def whole(self, index: int) -> dict[str, Any]:
        """The choice in one piece."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content or None, "tool_calls": [_call(call) for call in self._calls]}
        logprobs = self._take_logprobs()
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._reason}

    @property
    def _reason(self) -> str | None:
        return "tool_calls" if self._calls and self._finish_reason == "stop" else self._finish_reason

    def _keep(self, parts: Sequence[str | ToolCall]) -> Iterator[str | ToolCall]:
        for part in parts:
            if isinstance(part, str):
                self._content.append(part)
            elif self._calls and not self._body.parallel_tool_calls:
                continue
            else:
                self._calls.append(part)
            yield part

    def _take_logprobs(self) -> dict[str, Any] | None:
        tokens, self._tokens = self._tokens, []
        return chat_logprobs(self._vocabulary, tokens) if self._body.logprobs and tokens else None


def _tool_format(service: Service, body: ChatBody) -> ToolFormat | None:
    """How the model writes calls; None if it is told of no tools.

    Raises:
        InvalidArgumentError: it cannot use tools, or in a way that is not known.
    """
    template = service.model.tokenizer.chat_template(with_tools=True)
    if not body.active_tools or template is None:
        return None
    found = tool_format(template)
    if found is None:
        raise InvalidArgumentError(
            f"tools: the chat template of {service.settings.model_name} does not take tools, or writes calls "
            "in a format other than Llama 3's and Qwen's; leave them out, or describe them in a message"
        )
    return found


def _arguments(text: str) -> Any:
    """Arguments as an object, which templates write in their own way; text that is not JSON stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chunk(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
