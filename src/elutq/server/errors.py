"""Everything that can go wrong, in the shape of OpenAI's API: `{"error": {message, type, param, code}}`."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from elutq.errors import (
    ContextOverflowError,
    ElutqError,
    InvalidArgumentError,
    QueueFullError,
    ShuttingDownError,
    TokenizerError,
)

_log = logging.getLogger(__name__)


class ErrorDetails(BaseModel):
    """What went wrong, for people (`message`) and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorDetails


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of the HTTP response.
        headers: of the HTTP response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self._code = code
        self._param = param

    @property
    def body(self) -> dict[str, Any]:
        """The object of the response, and of the last event of a stream that fails."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        details = ErrorDetails(message=str(self), type=kind, param=self._param, code=self._code)
        return ErrorBody(error=details).model_dump()

    @property
    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """What to tell a client of an error. Of a fault of the program it learns nothing; the log has it."""
    match error:
        case ApiError():
            return error
        case ContextOverflowError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case InvalidArgumentError() | TokenizerError():
            return ApiError(400, str(error), code="invalid_value")
        case QueueFullError():
            headers = {"Retry-After": str(math.ceil(error.retry_after))}
            return ApiError(429, str(error), code="queue_full", headers=headers)
        case ShuttingDownError():
            return shutting_down()
        case ElutqError():
            return ApiError(500, str(error), code="model_error")
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def shutting_down() -> ApiError:
    """The answer while the server drains."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the endpoints in OpenAI's shape."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response

    async def handle_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error.errors(), error.body).response

    async def handle_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = (
            f"{error.detail}: {request.method} {request.url.path}; GET /openapi.json lists what there is"
        )
        return ApiError(error.status_code, message, headers=error.headers).response

    app.add_exception_handler(RequestValidationError, handle_validation)
    app.add_exception_handler(HTTPException, handle_http)
    for kind in (ApiError, ElutqError, Exception):
        app.add_exception_handler(kind, handle)


def _validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    # Of the errors of a union, the one that got furthest is about the alternative that was meant.
    error = max(errors, key=lambda e: len(e["loc"]))
    param = _path(error["loc"], body)
    match error["type"]:
        case "extra_forbidden":
            message = f"{param} is not supported; docs/serve.md lists the fields that are"
            return ApiError(400, message, code="unsupported_parameter", param=param)
        case "missing" if not param:
            return ApiError(400, "the request has no body; send a JSON object", code="invalid_body")
        case "missing":
            return ApiError(400, f"{param} is missing", code="missing_required_parameter", param=param)
    message = error["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, code="invalid_value", param=param)


def _path(location: Sequence[int | str], body: Any) -> str | None:
    """Where in the body an error is: `messages[0].role`. pydantic's names of types are left out."""
    path, value = "", body
    parts = location[1:]  # after "body"
    for place, part in enumerate(parts):
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or place == len(parts) - 1):
            path, value = f"{path}.{part}", value.get(part)
    return path.removeprefix(".") or None
