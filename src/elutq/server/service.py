"""What the endpoints share: the model, who runs it, and the limits."""

import threading
from dataclasses import dataclass, field

from elutq.runtime import LanguageModel
from elutq.server.errors import ApiError
from elutq.server.metrics import Metrics
from elutq.server.scheduler import Scheduler
from elutq.server.vocabulary import Vocabulary


@dataclass(frozen=True)
class Settings:
    """What the operator decides.

    Attributes:
        model_name: by which clients know the model.
        api_key: that clients must send; None lets everybody in.
        request_seconds: most time for an answer, waiting included.
        body_bytes: largest request.
        body_seconds: most time for a request to arrive.
        hosts: names under which the server may be called; none allows all. A page whose name was made to
            resolve to this machine has the server's origin, to a browser, but not its name.
        cors_origins: origins whose pages may call from a browser; "*" is any.
    """

    model_name: str
    api_key: str | None = None
    request_seconds: float = 600.0
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Service:
    """A model at work.

    Attributes:
        model: the model.
        scheduler: runs it.
        settings: what the operator decided.
        vocabulary: bytes of its tokens, and grammars over them.
        metrics: what is counted.
        draining: set when no more work is taken.
    """

    model: LanguageModel
    scheduler: Scheduler
    settings: Settings
    vocabulary: Vocabulary
    metrics: Metrics
    draining: threading.Event = field(default_factory=threading.Event)

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model. A request need not name one.

        Raises:
            ApiError: 404.
        """
        if name not in (None, self.settings.model_name):
            raise ApiError(
                404,
                f"there is no model {name!r:.100}; this server runs {self.settings.model_name!r}",
                code="model_not_found",
                param="model",
            )

    def check_choices(self, number: int) -> None:
        """Refuse a request for more answers than could ever be worked on at once.

        Raises:
            ApiError: 400.
        """
        if number > self.scheduler.capacity:
            raise ApiError(
                400,
                f"{number} answers are asked for; this server works on {self.scheduler.capacity} at most",
                code="invalid_value",
                param="n",
            )
