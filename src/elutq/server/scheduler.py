"""Continuous batching: many requests, one engine thread, every step shared."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from elutq.errors import ElutqError, InvalidArgumentError, QueueFullError, ShuttingDownError
from elutq.generation import Generation, GenerationRequest, common_prefix
from elutq.runtime import LanguageModel, SequenceState
from elutq.sampling import Token
from elutq.server.pacing import PrefillPace
from elutq.server.prefix_cache import FEWEST_TOKENS, PrefixCache

_log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them had been computed for an earlier request.
        completion_tokens: tokens generated. One that ended the sequence does not count.
        queue_seconds: from submission to the first step.
        prefill_seconds: from there to the first token.
        decode_seconds: from there to the last token.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Event:
    """News of a request. There is one last event, which has a finish reason, and nothing comes after it.

    Attributes:
        text: whole characters that were added.
        tokens: the tokens generated since the event before; those of an incomplete character or of what might
            have become a stop string come with the text that follows, or with the last event.
        finish_reason: None while there is more to come. "stop": end of sequence, stop string, or constraint
            complete. "length": `max_new_tokens`, or the context is full. "cancelled": by its owner, or as the
            scheduler closed. "error": see `error`.
        usage: with the last event.
        error: what went wrong, if anything did: an `ElutqError` for what the request itself, or the model, is
            to blame for; anything else is a fault of the program.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None


#: Is called in the engine's thread, between steps: it must return at once, and hand the event over to others.
EventHandler = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts since the start, and how things stand.

    Attributes:
        running: requests that take part in steps.
        queued: requests that wait.
        finished: requests that ended, by finish reason.
        rejected: requests refused because the queue was full.
        prompt_tokens: tokens of all prompts begun.
        cached_tokens: how many of them had been computed for an earlier request.
        completion_tokens: tokens generated.
        steps: steps of the engine.
        step_seconds: time spent in them.
        cached_sequences: sequences kept for requests that begin alike.
        cached_bytes: their memory.
    """

    running: int
    queued: int
    finished: dict[FinishReason, int]
    rejected: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: int
    step_seconds: float
    cached_sequences: int
    cached_bytes: int


@dataclass(eq=False, slots=True)
class _Request:
    """A request on its way, in the engine's thread; `cancelled` is set by others."""

    generation: Generation
    on_event: EventHandler
    submitted: float
    cancelled: bool = False
    started: float | None = None  # when its first piece went into a step
    generating: float | None = None  # when its first token came
    sequence: SequenceState | None = None
    cached_tokens: int = 0
    held: list[Token] = field(default_factory=list)  # not in an event yet


class Submission:
    """A request that was taken. Everything else about it comes as events."""

    def __init__(self, request: _Request) -> None:
        self._request = request

    def cancel(self) -> None:
        """End the request at the next step; its last event says "cancelled". Any thread may call this."""
        self._request.cancelled = True


class Scheduler:
    """Runs many requests on one model.

    One thread steps the engine. A step takes one token of every request that is generating and, as far as the
    time allows, pieces of the oldest prompts. What a request gets does not depend on what else runs: logits
    are the same bit for bit, and each request has its own sampler.

    Attributes:
        capacity: most requests that run and wait together.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        parallel: int = 4,
        queue_size: int = 64,
        cache_bytes: int = 1 << 30,
        stall_seconds: float = 0.2,
    ) -> None:
        """Start the engine's thread.

        Args:
            model: the model. Others may use it too, and then wait for each other's steps.
            parallel: most requests that step together.
            queue_size: most requests that wait beside them.
            cache_bytes: most memory of sequences kept for requests that begin alike; 0 keeps none.
            stall_seconds: how long prompts may keep the others from their next token, about.

        Raises:
            InvalidArgumentError: an argument is out of range.
        """
        for name, value, least in (
            ("parallel", parallel, 1),
            ("queue_size", queue_size, 0),
            ("cache_bytes", cache_bytes, 0),
        ):
            if value < least:
                raise InvalidArgumentError(f"{name} must be at least {least}, not {value}")
        if not 0.001 <= stall_seconds <= 60:
            raise InvalidArgumentError(f"stall_seconds must be from 0.001 to 60, not {stall_seconds}")
        self._model = model
        self._parallel = parallel
        self.capacity = parallel + queue_size
        self._cache = PrefixCache(cache_bytes)
        # While others generate; and while nobody waits for a token, when only a cancellation would be late.
        self._shared_pace = PrefillPace(0.8 * stall_seconds)
        self._lone_pace = PrefillPace(5 * stall_seconds)
        self._lock = threading.Condition()  # guards what follows
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # oldest first
        self._closing = False
        self._rejected = 0
        self._finished: Counter[FinishReason] = Counter()
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = self._steps = 0
        self._cached_sequences = self._cached_bytes = 0
        self._step_seconds = self._request_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="elutq-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: EventHandler) -> Submission:
        """Take a request. Any thread may call this.

        Args:
            request: what to generate.
            on_event: gets the events, the last of which has a finish reason.

        Raises:
            InvalidArgumentError: the request is not one the model can serve; `ContextOverflowError` if its
                prompt exceeds the context.
            QueueFullError: too many requests wait.
            ShuttingDownError: the scheduler is being closed.
        """
        generation = self._model.new_generation(request)
        taken = _Request(generation, on_event, submitted=time.monotonic())
        with self._lock:
            if self._closing:
                raise ShuttingDownError("the server is shutting down; it takes no more requests")
            if len(self._running) + len(self._waiting) >= self.capacity:
                self._rejected += 1
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting already; try again later", self._retry_after()
                )
            self._waiting.append(taken)
            self._lock.notify()
        return Submission(taken)

    @property
    def stats(self) -> SchedulerStats:
        """How things stand."""
        with self._lock:
            return SchedulerStats(
                running=len(self._running),
                queued=len(self._waiting),
                finished=dict(self._finished),
                rejected=self._rejected,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                completion_tokens=self._completion_tokens,
                steps=self._steps,
                step_seconds=self._step_seconds,
                cached_sequences=self._cached_sequences,
                cached_bytes=self._cached_bytes,
            )

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those there are finish for so long, cancel the rest, end the thread."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join(drain_seconds)
        with self._lock:
            for request in (*self._waiting, *self._running):
                request.cancelled = True
        self._thread.join()

    def _retry_after(self) -> float:
        """Seconds until a place is likely to be free, from how long requests took so far."""
        finished = sum(self._finished.values())
        mean = self._request_seconds / finished if finished else 1.0
        return min(60.0, max(1.0, mean / self._parallel))

    # ---- The engine's thread ------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                if not self._admit():
                    return
                self._step()
            except Exception as error:
                _log.exception("a step failed; the requests in it end")
                for request in list(self._running):
                    self._finish(request, "error", error=error)

    def _admit(self) -> bool:
        """Wait for work, drop what was cancelled, fill free places in order of arrival; False to end."""
        with self._lock:
            while not (self._waiting or self._running or self._closing):
                self._lock.wait()
            cancelled = [r for r in (*self._running, *self._waiting) if r.cancelled]
        for request in cancelled:
            self._finish(request, "cancelled")
        with self._lock:
            while self._waiting and len(self._running) < self._parallel:
                self._running.append(self._waiting.popleft())
            return bool(self._running) or not self._closing

    def _step(self) -> None:
        batch = self._plan()
        if not batch:
            return
        begin = time.monotonic()
        results = self._forward([(r.sequence, piece) for r, piece in batch if r.sequence is not None])
        now = time.monotonic()
        pieces = [piece for request, piece in batch if request.generating is None]
        if pieces:
            pace = self._lone_pace if len(pieces) == len(batch) else self._shared_pace
            pace.record(sum(len(piece) for _, piece in batch), now - begin)
        with self._lock:
            self._steps += 1
            self._step_seconds += now - begin
        for (request, _), result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                self._finish(request, "error", error=result)
            elif request.sequence is not None and len(request.sequence) == len(request.generation.tokens):
                self._advance(request, result, now)

    def _plan(self) -> list[tuple[_Request, NDArray[np.int32]]]:
        """Tokens of the next step: the last one of every text, then pieces of the oldest prompts."""
        generating = [r for r in self._running if r.generating is not None]
        batch = [(r, r.generation.tokens[-1:]) for r in generating]
        pace = self._shared_pace if generating else self._lone_pace
        room = max(pace.tokens - len(batch), pace.FEWEST)
        prompts: list[NDArray[np.int32]] = []
        for request in self._running:
            if request.generating is not None or room == 0:
                continue
            tokens = request.generation.tokens
            sequence = self._begin(request, prompts) if request.sequence is None else request.sequence
            if sequence is not None:
                prompts.append(tokens)
                batch.append((request, tokens[len(sequence) :][:room]))
                room -= len(batch[-1][1])
        return batch

    def _begin(self, request: _Request, prompts: Sequence[NDArray[np.int32]]) -> SequenceState | None:
        """The request's sequence; None while one of these unfinished prompts computes what it needs."""
        tokens = request.generation.tokens
        running = [(r.generation.tokens[: len(r.sequence)], r.sequence) for r in self._running if r.sequence]
        cached, sequence = self._cache.find(tokens, running)
        if any(common_prefix(prompt, tokens[:-1]) >= cached + FEWEST_TOKENS for prompt in prompts):
            return None
        request.started = time.monotonic()
        request.sequence = self._model.new_sequence() if sequence is None else sequence.fork(cached)
        request.cached_tokens = cached
        with self._lock:
            self._prompt_tokens += len(tokens)
            self._cached_tokens += cached
        return request.sequence

    def _forward(
        self, items: Sequence[tuple[SequenceState, NDArray[np.int32]]]
    ) -> Sequence[NDArray[np.float32] | Exception]:
        """Logits of each item. If a step fails, each is tried alone, so that only the guilty one fails."""
        try:
            return self._model.step(items)
        except Exception as error:
            _log.warning("a step of %d requests failed, they are tried one by one: %s", len(items), error)
        self._cache.clear()  # it may have been for want of memory; a failed step has changed no sequence
        results: list[NDArray[np.float32] | Exception] = []
        for item in items:
            try:
                results += self._model.step([item])
            except Exception as error:
                results.append(error)
        return results

    def _advance(self, request: _Request, logits: NDArray[np.float32], now: float) -> None:
        if request.generating is None:
            request.generating = now
        try:
            piece = request.generation.advance(logits)
        except Exception as error:
            self._finish(request, "error", error=error)
            return
        if piece.token is not None:
            request.held.append(piece.token)
            with self._lock:
                self._completion_tokens += 1
        if piece.finish_reason is not None:
            self._finish(request, piece.finish_reason, piece.text)
        elif piece.text:
            self._emit(request, Event(piece.text, tuple(request.held)))
            request.held.clear()

    def _finish(
        self, request: _Request, reason: FinishReason, text: str = "", error: Exception | None = None
    ) -> None:
        now = time.monotonic()
        generation, sequence = request.generation, request.sequence
        request.sequence = None  # whoever keeps the submission must not keep its memory
        if error is not None and not isinstance(error, ElutqError):
            _log.error("a request failed", exc_info=error)
        if sequence is not None and error is None:
            self._cache.put(generation.tokens[: len(sequence)].copy(), sequence)
        with self._lock:
            (self._running if request in self._running else self._waiting).remove(request)
            self._finished[reason] += 1
            self._request_seconds += now - request.submitted
            self._cached_sequences, self._cached_bytes = len(self._cache), self._cache.memory_bytes
        started = request.started or now
        generating = request.generating or now
        usage = Usage(
            prompt_tokens=generation.prompt_tokens,
            cached_tokens=request.cached_tokens,
            completion_tokens=generation.new_tokens,
            queue_seconds=started - request.submitted,
            prefill_seconds=generating - started,
            decode_seconds=now - generating,
        )
        self._emit(request, Event(text, tuple(request.held), reason, usage, error))

    def _emit(self, request: _Request, event: Event) -> None:
        try:
            request.on_event(event)
        except Exception:
            _log.exception("an event could not be delivered; its request ends")
            request.cancelled = True
