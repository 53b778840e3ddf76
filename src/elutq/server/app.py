"""The HTTP application."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from elutq import __version__
from elutq.runtime import LanguageModel
from elutq.server.chat import chat_routes
from elutq.server.completions import completion_routes
from elutq.server.errors import ErrorBody, add_error_handlers
from elutq.server.gate import Gate
from elutq.server.info import info_routes
from elutq.server.metrics import Metrics
from elutq.server.page_files import page_paths, page_routes
from elutq.server.scheduler import Scheduler
from elutq.server.service import Service, Settings
from elutq.server.vocabulary import Vocabulary

_API_PATHS = frozenset(
    (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/metrics",
        "/openapi.json",
    )
)


def create_service(model: LanguageModel, scheduler: Scheduler, settings: Settings) -> Service:
    """A model at work.

    Raises:
        TokenizerError: the model has no tokenizer.
    """
    vocabulary = Vocabulary(model.tokenizer, model.config.vocab_size)
    return Service(model, scheduler, settings, vocabulary, Metrics(scheduler))


def create_app(service: Service) -> FastAPI:
    """The OpenAI-compatible API and the chat page, for any ASGI server.

    The interactive documentation that FastAPI offers is off: it loads scripts from elsewhere.
    """
    app = FastAPI(
        title="elutq",
        version=__version__,
        description=f"OpenAI-compatible API of {service.settings.model_name}.",
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    for router in (chat_routes(service), completion_routes(service), info_routes(service), page_routes()):
        app.include_router(router)
    add_error_handlers(app)
    page = frozenset(page_paths())
    app.add_middleware(Gate, service=service, open_paths=page | {"/health"}, paths=page | _API_PATHS)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    return app
