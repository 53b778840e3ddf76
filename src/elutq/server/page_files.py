"""The chat page: static files, and what browsers may do with them."""

from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

HEADERS = {
    # Nothing but the page's own files, no way out for what a model might say, and no text taken for HTML.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def page_paths() -> dict[str, Path]:
    """The file at each path."""
    folder = Path(str(files("elutq.server"))) / "page"
    found = {f"/{file.name}": file for file in sorted(folder.iterdir()) if file.suffix in _MEDIA_TYPES}
    return {"/": folder / "index.html", **found}


def page_routes() -> APIRouter:
    """The page at `/`, and its files beside it."""
    router = APIRouter()
    for path, file in page_paths().items():
        router.add_api_route(path, _responder(file), methods=["GET"], include_in_schema=False)
    return router


def _responder(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def respond() -> FileResponse:
        return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=HEADERS)

    return respond
