import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq.errors import (
    ContextOverflowError,
    InvalidArgumentError,
    QueueFullError,
    ShuttingDownError,
    TensorValueError,
)
from elutq.generation import GenerationRequest
from elutq.runtime import LanguageModel, SequenceState, load
from elutq.server.scheduler import Event, Scheduler, Submission, Usage

REFERENCE_MODEL = Path(__file__).parents[2] / "src" / "elutq" / "models" / "llama-7m"
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    with load(REFERENCE_MODEL, threads=2) as loaded:
        yield loaded


@pytest.fixture
def start(model: LanguageModel) -> Iterator[Callable[..., Scheduler]]:
    """`start(**options)` makes a scheduler, which the test's end closes."""
    made: list[Scheduler] = []

    def make(**options: Any) -> Scheduler:
        made.append(Scheduler(model, **options))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


class Client:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()
        self.submission: Submission | None = None

    def __call__(self, event: Event) -> None:
        assert not self.done.is_set(), "an event came after the last one"
        self.events.append(event)
        if event.finish_reason is not None:
            self.done.set()

    @classmethod
    def of(cls, scheduler: Scheduler, request: GenerationRequest) -> "Client":
        client = cls()
        client.submission = scheduler.submit(request, client)
        return client

    def wait(self) -> "Client":
        assert self.done.wait(TIMEOUT), "the request did not end"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def token_ids(self) -> list[int]:
        return [token.id for event in self.events for token in event.tokens]

    @property
    def finish_reason(self) -> str | None:
        return self.events[-1].finish_reason

    @property
    def usage(self) -> Usage:
        usage = self.events[-1].usage
        assert usage is not None
        return usage


class Gate:
    """Holds the engine before each step until it is let through."""

    def __init__(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[int]] = []  # tokens per item of each step
        self._permits = threading.Semaphore(0)
        self._open = False
        step = LanguageModel.step

        def held(self_: LanguageModel, batch: Any, all_logits: bool = False) -> list[NDArray[np.float32]]:
            if not self._open:
                self._permits.acquire()
            self.batches.append([len(tokens) for _, tokens in batch])
            return step(self_, batch, all_logits)

        monkeypatch.setattr(LanguageModel, "step", held)

    def let_through(self, steps: int) -> None:
        before = len(self.batches)
        self._permits.release(steps)
        wait_until(lambda: len(self.batches) >= before + steps)

    def open(self) -> None:
        self._open = True
        self._permits.release()


@pytest.fixture
def gate(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = Gate(model, monkeypatch)
    yield held
    held.open()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def tokens(count: int, seed: int = 0) -> list[int]:
    result: list[int] = np.random.default_rng(seed).integers(3, 4096, count).tolist()
    return result


def solo(model: LanguageModel, request: GenerationRequest) -> tuple[str, list[int], str | None]:
    pieces = list(model.pieces(request))
    ids = [piece.token.id for piece in pieces if piece.token is not None]
    return "".join(piece.text for piece in pieces), ids, pieces[-1].finish_reason


# ---- What requests get -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_requests_get_what_they_would_get_alone(
    model: LanguageModel, start: Callable[..., Scheduler], seed: int
) -> None:
    """Random prompts, options, arrivals and cancellations; conversations that share beginnings."""
    random = np.random.default_rng(seed)
    beginnings = [tokens(int(n), seed=i) for i, n in enumerate((20, 90, 200))]
    requests = []
    for i in range(16):
        beginning = beginnings[int(random.integers(3))] if random.random() < 0.7 else []
        options: dict[str, Any] = [
            {},
            {"temperature": 0.9, "seed": i},
            {"temperature": 1.3, "top_p": 0.9, "frequency_penalty": 0.4, "presence_penalty": 0.2, "seed": i},
            {"temperature": 0.7, "top_k": 30, "repetition_penalty": 1.2, "logit_bias": {5: 1.0}, "seed": i},
        ][int(random.integers(4))]
        requests.append(
            GenerationRequest(
                beginning + tokens(int(random.integers(1, 60)), seed=100 + i),
                max_new_tokens=int(random.integers(1, 40)),
                sampling=options,  # type: ignore[arg-type]
                stop=(" the", "\n") if random.random() < 0.3 else (),
                logprobs=2 if random.random() < 0.3 else None,
            )
        )
    expected = [solo(model, request) for request in requests]
    scheduler = start(parallel=5, cache_bytes=8 << 20, stall_seconds=0.02)
    clients = []
    for request in requests:
        clients.append(Client.of(scheduler, request))
        if random.random() < 0.3:
            time.sleep(0.005)
    cancelled = set(random.choice(len(requests), 4, replace=False).tolist())
    for i in cancelled:
        clients[i].submission.cancel()  # type: ignore[union-attr]
    for i, (client, (text, ids, reason)) in enumerate(zip(clients, expected, strict=True)):
        client.wait()
        if i in cancelled and client.finish_reason == "cancelled":
            assert text.startswith(client.text)
            assert ids[: len(client.token_ids)] == client.token_ids
        else:
            assert (client.text, client.token_ids, client.finish_reason) == (text, ids, reason)
        assert client.usage.completion_tokens == len(client.token_ids)
        assert client.usage.prompt_tokens == len(requests[i].token_ids)
    stats = scheduler.stats
    assert (stats.running, stats.queued, sum(stats.finished.values())) == (0, 0, len(requests))
    assert stats.completion_tokens == sum(client.usage.completion_tokens for client in clients)


def test_events_carry_log_probabilities(model: LanguageModel, start: Callable[..., Scheduler]) -> None:
    ids = model.tokenizer.encode("Once upon a time")
    client = Client.of(start(), GenerationRequest(ids, max_new_tokens=5, logprobs=3)).wait()
    logits = model.logits([*ids, *client.token_ids])[len(ids) - 1 :]
    for event_token, row in zip((t for e in client.events for t in e.tokens), logits, strict=False):
        logprobs = row - np.logaddexp.reduce(row.astype(np.float64))
        best = np.argsort(-row, kind="stable")[:3]
        assert [i for i, _ in event_token.alternatives] == best.tolist()
        assert event_token.logprob == pytest.approx(logprobs[event_token.id], abs=1e-4)


class Letters:
    """Allows the tokens of a list, one after the other."""

    def __init__(self, wanted: list[int]) -> None:
        self.left = list(wanted)

    def mask(self) -> NDArray[np.int32]:
        bits = np.zeros(4096, np.uint8)
        bits[self.left[0]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)

    @property
    def is_done(self) -> bool:
        return not self.left


def test_a_constraint_decides_and_ends(model: LanguageModel, start: Callable[..., Scheduler]) -> None:
    wanted = model.tokenizer.encode(" yes, we can")
    client = Client.of(start(), GenerationRequest(tokens(9), constraint=Letters(wanted))).wait()
    assert client.text == " yes, we can"
    assert client.finish_reason == "stop"


def test_end_of_sequence_ends_unless_ignored(model: LanguageModel, start: Callable[..., Scheduler]) -> None:
    (eos,) = model.tokenizer.eos_token_ids
    scheduler = start()
    request = GenerationRequest(tokens(9), max_new_tokens=4, sampling={"logit_bias": {eos: 100.0}})
    client = Client.of(scheduler, request).wait()
    assert (client.text, client.token_ids, client.finish_reason) == ("", [], "stop")
    request = GenerationRequest(tokens(9), 4, {"logit_bias": {eos: 100.0}}, ignore_eos=True)
    client = Client.of(scheduler, request).wait()
    assert (client.token_ids, client.finish_reason) == ([eos] * 4, "length")


# ---- Order, queue, cancellation --------------------------------------------------------------


def test_first_come_first_served(gate: Gate, start: Callable[..., Scheduler]) -> None:
    order: list[int] = []
    scheduler = start(parallel=1)
    for i in range(6):
        scheduler.submit(GenerationRequest(tokens(5, i), max_new_tokens=1), lambda _, i=i: order.append(i))  # type: ignore[misc]
    gate.open()
    wait_until(lambda: len(order) == 6)
    assert order == list(range(6))


def test_prompts_are_cut_and_mixed_with_running_texts(
    gate: Gate, model: LanguageModel, start: Callable[..., Scheduler]
) -> None:
    scheduler = start(parallel=3, stall_seconds=0.001)
    running = Client.of(scheduler, GenerationRequest(tokens(4), max_new_tokens=400, ignore_eos=True))
    gate.let_through(1)
    long = GenerationRequest(tokens(150, 1), max_new_tokens=2)
    client = Client.of(scheduler, long)
    gate.let_through(3)
    short = Client.of(scheduler, GenerationRequest(tokens(5, 2), max_new_tokens=1))
    gate.open()
    client.wait()
    mixed = [batch for batch in gate.batches if len(batch) > 1]
    assert len(mixed) > 5
    assert all(batch[0] == 1 for batch in mixed), "the running text got its token in every step"
    assert client.text == solo(model, long)[0]
    assert short.wait().usage.queue_seconds > 0
    assert not running.done.is_set()


def test_a_full_queue_refuses(gate: Gate, start: Callable[..., Scheduler]) -> None:
    scheduler = start(parallel=2, queue_size=3)
    clients = [Client.of(scheduler, GenerationRequest(tokens(4), max_new_tokens=2)) for _ in range(5)]
    with pytest.raises(QueueFullError, match="waiting") as refused:
        scheduler.submit(GenerationRequest(tokens(4)), Client())
    assert 1 <= refused.value.retry_after <= 60
    assert scheduler.stats.rejected == 1
    gate.open()
    for client in clients:
        client.wait()
    Client.of(scheduler, GenerationRequest(tokens(4), max_new_tokens=2)).wait()


def test_cancelling_ends_at_the_next_step_and_frees_the_place(
    gate: Gate, start: Callable[..., Scheduler]
) -> None:
    scheduler = start(parallel=1)
    first = Client.of(scheduler, GenerationRequest(tokens(4), max_new_tokens=400))
    second = Client.of(scheduler, GenerationRequest(tokens(4, 1), max_new_tokens=3))
    third = Client.of(scheduler, GenerationRequest(tokens(4, 2), max_new_tokens=3))
    gate.let_through(5)
    assert first.submission is not None
    assert third.submission is not None
    third.submission.cancel()  # while it waits
    first.submission.cancel()  # a step that has begun is its last
    gate.open()
    assert first.wait().finish_reason == "cancelled"
    assert first.usage.completion_tokens in (5, 6)
    assert second.wait().finish_reason == "length"
    assert third.wait().finish_reason == "cancelled"
    assert third.events[-1].tokens == ()
    assert scheduler.stats.finished == {"cancelled": 2, "length": 1}


def test_a_long_prompt_can_be_cancelled(gate: Gate, start: Callable[..., Scheduler]) -> None:
    scheduler = start(stall_seconds=0.001)
    client = Client.of(scheduler, GenerationRequest(tokens(500)))
    gate.let_through(2)
    assert client.submission is not None
    client.submission.cancel()
    gate.open()
    assert client.wait().finish_reason == "cancelled"
    assert client.token_ids == []
    assert sum(map(sum, gate.batches)) < 500


# ---- Prefixes --------------------------------------------------------------------------------


def test_a_conversation_computes_only_what_is_new(
    model: LanguageModel, start: Callable[..., Scheduler]
) -> None:
    scheduler = start()
    text = tokens(100)
    for turn in range(3):
        request = GenerationRequest(text, max_new_tokens=10, sampling={"temperature": 0.8, "seed": turn})
        client = Client.of(scheduler, request).wait()
        assert client.text == solo(model, request)[0]
        # All but the last token that was generated, which nothing had to be computed from.
        assert client.usage.cached_tokens == (len(text) - 21 if turn else 0)
        text = [*text, *client.token_ids, *tokens(20, turn)]
    stats = scheduler.stats
    assert stats.cached_tokens == 2 * 100 + 9 + 30 + 9
    assert stats.cached_sequences == 1


def test_the_same_prompt_again_computes_one_token(start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    request = GenerationRequest(tokens(80), max_new_tokens=1)
    usages = [Client.of(scheduler, request).wait().usage for _ in range(2)]
    assert [usage.cached_tokens for usage in usages] == [0, 79]


def test_requests_that_arrive_together_compute_what_they_share_once(
    gate: Gate, model: LanguageModel, start: Callable[..., Scheduler]
) -> None:
    """As the choices of one chat request do, or conversations under one system prompt."""
    scheduler = start(parallel=4)
    shared = tokens(150)
    requests = [GenerationRequest(shared + tokens(n, n), max_new_tokens=12) for n in (1, 3, 70, 10)]
    requests.append(GenerationRequest(shared[:70] + tokens(9, 5), max_new_tokens=12))
    clients = [Client.of(scheduler, request) for request in requests]
    gate.open()
    for client, request in zip(clients, requests, strict=True):
        assert client.wait().text == solo(model, request)[0]
    assert [client.usage.cached_tokens for client in clients] == [0, 150, 150, 150, 70]


def test_branches_of_a_conversation_are_all_kept(start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    trunk = tokens(100)
    branches = [[*trunk, *tokens(40, seed)] for seed in (1, 2, 3)]
    for branch in branches:
        Client.of(scheduler, GenerationRequest(branch, max_new_tokens=1)).wait()
    assert scheduler.stats.cached_sequences == 3
    for branch in branches:
        client = Client.of(scheduler, GenerationRequest([*branch, 5], max_new_tokens=1)).wait()
        assert client.usage.cached_tokens == 140


def test_without_memory_nothing_is_kept(start: Callable[..., Scheduler]) -> None:
    scheduler = start(cache_bytes=0)
    for _ in range(2):
        client = Client.of(scheduler, GenerationRequest(tokens(80), max_new_tokens=1)).wait()
        assert client.usage.cached_tokens == 0
    assert scheduler.stats.cached_bytes == 0


# ---- Faults ----------------------------------------------------------------------------------


def test_bad_requests_are_refused_at_once(start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    for request, match in (
        (GenerationRequest([]), "0 tokens"),
        (GenerationRequest([4096]), "token 4096"),
        (GenerationRequest([5], max_new_tokens=0), "max_new_tokens"),
        (GenerationRequest([5], sampling={"top_p": 2.0}), "top_p"),
        (GenerationRequest([5], sampling={"temprature": 2.0}), "temprature"),  # type: ignore[typeddict-unknown-key]
        (GenerationRequest([5], sampling={"logit_bias": {4096: 1.0}}), "logit_bias"),
        (GenerationRequest([5], stop=("",)), "stop"),
        (GenerationRequest([5], logprobs=-1), "logprobs"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            scheduler.submit(request, Client())
    with pytest.raises(ContextOverflowError, match="600 tokens"):
        scheduler.submit(GenerationRequest([5] * 600), Client())
    assert scheduler.stats.finished == {}


class Broken:
    """A constraint that fails at its third token."""

    def __init__(self) -> None:
        self.count = 0
        self.is_done = False

    def mask(self) -> None:
        return None

    def accept(self, token: int) -> None:
        self.count += 1
        if self.count == 3:
            raise RuntimeError("the grammar is broken")


class Forbidding(Broken):
    def mask(self) -> NDArray[np.int32]:  # type: ignore[override]
        return np.zeros(128, np.int32)


def test_a_fault_ends_its_own_request_only(model: LanguageModel, start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    good = GenerationRequest(tokens(9), max_new_tokens=30)
    clients = [
        Client.of(scheduler, request)
        for request in (
            good,
            GenerationRequest(tokens(8), constraint=Broken()),
            GenerationRequest(tokens(7), constraint=Forbidding()),
        )
    ]
    whole, broken, forbidding = [client.wait() for client in clients]
    assert (whole.text, whole.token_ids, whole.finish_reason) == solo(model, good)
    assert broken.finish_reason == forbidding.finish_reason == "error"
    assert isinstance(broken.events[-1].error, RuntimeError)
    assert isinstance(forbidding.events[-1].error, InvalidArgumentError)
    assert len(broken.token_ids) == 2


def test_a_step_that_fails_is_tried_one_by_one(
    model: LanguageModel, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [GenerationRequest(tokens(n), max_new_tokens=12) for n in (5, 13, 6)]
    expected = [solo(model, request)[0] for request in requests]
    step = LanguageModel.step

    def failing(self: LanguageModel, batch: list[tuple[SequenceState, Any]], all_logits: bool = False) -> Any:
        if any(len(sequence) == 16 for sequence, _ in batch):
            raise MemoryError
        return step(self, batch, all_logits)

    monkeypatch.setattr(LanguageModel, "step", failing)
    requests[0] = GenerationRequest(tokens(5), max_new_tokens=8)
    requests[2] = GenerationRequest(tokens(6), max_new_tokens=8)
    scheduler = start()
    clients = [Client.of(scheduler, request).wait for request in requests]
    first, second, third = [wait() for wait in clients]
    assert second.finish_reason == "error"
    assert isinstance(second.events[-1].error, MemoryError)
    assert expected[0].startswith(first.text)
    assert expected[2].startswith(third.text)
    assert first.finish_reason == third.finish_reason == "length"


def test_a_handler_that_fails_loses_its_request_only(start: Callable[..., Scheduler]) -> None:
    scheduler = start()

    def fail(event: Event) -> None:
        raise OSError("gone")

    scheduler.submit(GenerationRequest(tokens(9), max_new_tokens=300), fail)
    assert (
        Client.of(scheduler, GenerationRequest(tokens(5), max_new_tokens=5)).wait().finish_reason == "length"
    )
    wait_until(lambda: scheduler.stats.running == 0)
    assert scheduler.stats.finished["cancelled"] == 1


def test_damaged_weights_are_an_error(
    start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LanguageModel.step
    monkeypatch.setattr(LanguageModel, "step", lambda *a: [x * np.float32(np.nan) for x in step(*a)])
    client = Client.of(start(), GenerationRequest(tokens(9))).wait()
    assert isinstance(client.events[-1].error, TensorValueError)


@pytest.mark.parametrize(
    "options", [{"parallel": 0}, {"queue_size": -1}, {"cache_bytes": -1}, {"stall_seconds": 0.0}]
)
def test_options_out_of_range_are_named(start: Callable[..., Scheduler], options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        start(**options)


# ---- Closing ---------------------------------------------------------------------------------


def test_close_lets_requests_finish(start: Callable[..., Scheduler]) -> None:
    scheduler = start(parallel=2)
    requests = [GenerationRequest(tokens(4, i), max_new_tokens=20, ignore_eos=True) for i in range(5)]
    clients = [Client.of(scheduler, request) for request in requests]
    scheduler.close(drain_seconds=TIMEOUT)
    assert [client.finish_reason for client in clients] == ["length"] * 5
    with pytest.raises(ShuttingDownError):
        scheduler.submit(GenerationRequest([5]), Client())
    scheduler.close()


def test_close_cancels_what_does_not_finish(gate: Gate, start: Callable[..., Scheduler]) -> None:
    scheduler = start(parallel=1)
    clients = [Client.of(scheduler, GenerationRequest(tokens(4), max_new_tokens=400)) for _ in range(3)]
    gate.let_through(3)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(scheduler.close, 0.05)
        time.sleep(0.1)
        gate.open()
        closing.result(TIMEOUT)
    assert [client.finish_reason for client in clients] == ["cancelled"] * 3
