"""The small endpoints: models, tokens, health, metrics."""

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from elutq.server.chat import template_messages
from elutq.server.errors import ApiError, shutting_down
from elutq.server.schemas import DetokenizeBody, TokenizeBody
from elutq.server.service import Service
from elutq.server.streams import now


def info_routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter()
    tokenizer = service.model.tokenizer
    model = {
        "id": service.settings.model_name,
        "object": "model",
        "created": now(),
        "owned_by": "elutq",
        "max_model_len": service.model.context,
        "elutq": {"context_length": service.model.context, "chat": tokenizer.has_chat_template},
    }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model, with its context length and whether it can chat."""
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The model, if that is its name."""
        service.check_model(name)
        return model

    @router.post("/v1/embeddings", responses={404: {"description": "Always"}})
    async def embeddings() -> Response:
        """Not supported."""
        raise ApiError(
            404,
            "there are no embeddings: this model was trained to write, and its hidden states compare badly; "
            "use an embedding model",
            code="unsupported_endpoint",
        )

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Tokens of a text, or of a conversation as the chat template renders it."""
        service.check_model(body.model)
        if body.messages is not None:
            ids = await asyncio.to_thread(tokenizer.encode_chat, template_messages(body.messages))
        else:
            ids = await asyncio.to_thread(tokenizer.encode, body.prompt or "", body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.model.context}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """Text of tokens, special ones included."""
        service.check_model(body.model)
        if outside := [token for token in body.tokens if not tokenizer.is_known(token)]:
            raise ApiError(400, f"tokens: {outside[0]} is not a token", code="invalid_value", param="tokens")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return {"prompt": text}

    @router.get("/health", responses={503: {"description": "Shutting down"}})
    async def health() -> Response:
        """Whether requests are taken."""
        if service.draining.is_set():
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.render(), headers={"Content-Type": service.metrics.content_type})

    return router
