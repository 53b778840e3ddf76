"""`elutq serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elutq.cli.options import IsaOption, KvCacheOption, ModelArgument, ThreadsOption
from elutq.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    import socket

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def serve(
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every interface.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File whose first line is the key that clients must send."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The key itself; other users of this machine can see it."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients; by default that of its folder.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Most answers worked on at once.")] = 4,
    queue: Annotated[int, typer.Option(min=0, help="Most requests waiting beside them.")] = 64,
    context: Annotated[
        int | None,
        typer.Option("--ctx", min=1, help="Most tokens of prompt and answer; by default the model's."),
    ] = None,
    cache: Annotated[
        int, typer.Option(metavar="MB", min=0, help="Memory to keep conversations' keys and values in.")
    ] = 1024,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Most seconds for an answer.")] = 600.0,
    max_body: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Largest request.")] = 4 << 20,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let pages of this origin call from a browser; may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name the server may be called by; may be repeated."),
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that running answers have to finish after SIGTERM.")
    ] = 30.0,
    threads: ThreadsOption = None,
    isa: IsaOption = None,
    kv_cache: KvCacheOption = "fp16",
) -> None:
    """Serve a model by an OpenAI-compatible HTTP API, with a chat page at /."""
    import ipaddress
    import logging

    try:
        from elutq.server.app import create_service
        from elutq.server.run import DrainingServer, listen
        from elutq.server.scheduler import Scheduler
        from elutq.server.service import Settings
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"serving needs {error.name}; install it with: pip install 'elutq[serve]'"
        ) from None
    from elutq.runtime import load

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    key = _key(api_key, api_key_file)
    listener = listen(host, port)
    local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    settings = Settings(
        model_name=name or (Path(model).resolve().name if Path(model).is_dir() else model),
        api_key=key,
        request_seconds=request_timeout,
        body_bytes=max_body,
        hosts=() if key is not None or not local else (*_LOCAL_NAMES, *(allowed_host or ())),
        cors_origins=tuple(cors_origin or ()),
    )
    with (
        listener,
        load(model, threads=threads, isa=isa, kv_cache=kv_cache, context=context) as language_model,
    ):
        scheduler = Scheduler(language_model, parallel=parallel, queue_size=queue, cache_bytes=cache * 10**6)
        try:
            server = DrainingServer(create_service(language_model, scheduler, settings), drain)
            typer.echo(f"{settings.model_name} is served on {_url(listener)}", err=True)
            server.run([listener])
        finally:
            scheduler.close()


def _key(key: str | None, file: Path | None) -> str | None:
    if key is not None and file is not None:
        raise InvalidArgumentError("give --api-key or --api-key-file, not both")
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").split("\n", 1)[0].strip()
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(f"--api-key-file {file} cannot be read: {error}") from None
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise InvalidArgumentError("the API key must be one line of printable ASCII characters")
    return key


def _url(listener: "socket.socket") -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
