"""The HTTP API on a free port, over a quantized chat model; and ways to hold the engine still."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from elutq.quantize import quantize
from elutq.runtime import LanguageModel, load

TEMPLATE = """\
{% if tools %}Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call> to use one of:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>
{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@dataclass
class Live:
    """A running server."""

    url: str
    service: Any
    server: Any
    thread: threading.Thread

    def metric(self, name: str) -> float:
        """A value that /metrics shows."""
        lines = httpx.get(self.url + "/metrics", headers=KEY).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + 20
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.01)


KEY = {"Authorization": "Bearer secret"}


@contextlib.contextmanager
def live_server(
    model: LanguageModel, *, parallel: int = 4, queue: int = 64, drain: float = 0.0, **settings: Any
) -> Iterator[Live]:
    """Serve `model` until the context ends."""
    pytest.importorskip("fastapi")
    from elutq.server.app import create_service
    from elutq.server.run import DrainingServer, listen
    from elutq.server.scheduler import Scheduler
    from elutq.server.service import Settings

    listener = listen("127.0.0.1", 0)
    scheduler = Scheduler(model, parallel=parallel, queue_size=queue)
    service = create_service(model, scheduler, Settings(model_name="tiny", **settings))
    server = DrainingServer(service, drain)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    host, port = listener.getsockname()
    live = Live(f"http://{host}:{port}", service, server, thread)
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield live
    finally:
        server.should_exit = True
        thread.join(30)
        scheduler.close()
        assert not thread.is_alive()


@pytest.fixture(scope="package")
def chat_model(tmp_path_factory: pytest.TempPathFactory, chat_folder: Path) -> Iterator[LanguageModel]:
    """The bundled model at 4 bits, with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    quantize(chat_folder, folder, bits=4)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with load(folder, threads=2) as model:
        yield model


@pytest.fixture(scope="package")
def live(chat_model: LanguageModel) -> Iterator[Live]:
    """A server with ordinary settings."""
    with live_server(chat_model) as server:
        yield server


@pytest.fixture
def start(chat_model: LanguageModel) -> Iterator[Callable[..., Live]]:
    """`start(parallel=..., queue=..., drain=..., **settings)` starts a server of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(live_server(chat_model, **options))


@dataclass
class Hold:
    """The engine stands still while `go` is clear."""

    go: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def hold(chat_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Holds the engine before its next step until `go` is set."""
    held, step = Hold(), chat_model.step

    def wait(*args: Any, **options: Any) -> Any:
        held.reached.set()
        assert held.go.wait(30)
        return step(*args, **options)

    monkeypatch.setattr(chat_model, "step", wait)
    yield held
    held.go.set()
