"""A conversation with a model: what was said, the settings, and the next answer."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elutq.errors import ElutqError, InvalidArgumentError
from elutq.generation import GenerationRequest, Piece
from elutq.runtime import LanguageModel, PromptCache
from elutq.sampling import SamplingOptions

#: Where neither the caller nor the model's `generation_config.json` says how to sample.
DEFAULT_SAMPLING = SamplingOptions(temperature=0.7, top_p=0.95)


@dataclass(frozen=True)
class AnswerStatistics:
    """How an answer came about.

    Attributes:
        prompt_tokens: of the whole conversation before it.
        computed_tokens: those of them that were not kept from the turn before.
        new_tokens: of the answer, as far as it came, the end-of-sequence token included.
        first_token_seconds: until the first token.
        tokens_per_second: of those after the first; 0 when there are none.
        complete: whether the model ended it, and not a limit or an interruption.
    """

    prompt_tokens: int
    computed_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    complete: bool


class Conversation:
    """Messages and settings; computes only what a turn adds to the one before.

    Attributes:
        model: who answers.
        system: text of the system message, or None.
        messages: `{"role": ..., "content": ...}`, oldest first, without the system message.
        settings: sampling options, and `max_new_tokens` if it is limited.
        statistics: of the last answer.
    """

    def __init__(
        self, model: LanguageModel, *, system: str | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        """An empty conversation. `settings` win over the model's recommendation, which wins over defaults.

        Raises:
            InvalidArgumentError: a setting is out of range.
        """
        self.model = model
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.settings: dict[str, Any] = {}
        self.statistics: AnswerStatistics | None = None
        self._cache = PromptCache(model)
        self.set(**{**(model.recommended_sampling or DEFAULT_SAMPLING), **(settings or {})})

    def set(self, **settings: Any) -> None:
        """Change settings.

        Raises:
            InvalidArgumentError: one is out of range; none has changed then.
        """
        changed = {**self.settings, **settings}
        self.model.new_generation(_request([0], changed, self.model.context))  # checks it
        self.settings = changed

    @property
    def context_used(self) -> int:
        """Tokens of the model's context that the last turn filled."""
        return len(self._cache)

    def say(self, text: str) -> Iterator[str]:
        """Add a message of the user; the answer, in pieces as it comes.

        An answer left early is kept as far as it came; if nothing came, the message is taken back.

        Raises:
            TokenizerError: the model has no chat template.
            InvalidArgumentError: the conversation exceeds the context. Nothing has changed then.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer()
        except ElutqError:
            self.messages.pop()
            raise

    def retry(self) -> Iterator[str]:
        """Another answer to the last message, in place of the last one; as :meth:`say`.

        Raises:
            InvalidArgumentError: nothing was said yet.
        """
        return self.say(self.undo())

    def undo(self) -> str:
        """Take the last message of the user back, and what came after it; returns its text.

        Raises:
            InvalidArgumentError: nothing was said yet.
        """
        last = next(
            (i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), -1
        )
        if last < 0:
            raise InvalidArgumentError("nothing has been said yet")
        text = self.messages[last]["content"]
        del self.messages[last:]
        return text

    def reset(self) -> None:
        """Forget what was said; system message and settings stay."""
        self.messages.clear()

    def save(self, file: Path, *, overwrite: bool = False) -> None:
        """Write the messages, the system message first, as a JSON list.

        Raises:
            InvalidArgumentError: the file exists and is not to be overwritten, or cannot be written.
        """
        text = json.dumps(self._all_messages(), indent=2, ensure_ascii=False) + "\n"
        try:
            with open(file, "w" if overwrite else "x", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise InvalidArgumentError(f"{file} cannot be written: {error.strerror}") from None

    def load(self, file: Path) -> None:
        """Replace messages and system message by those of a file that :meth:`save` wrote.

        Raises:
            InvalidArgumentError: the file cannot be read, or is not a list of messages. Nothing has changed.
        """
        try:
            messages = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidArgumentError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise InvalidArgumentError(f"{file} is not a saved conversation: {error}") from None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise InvalidArgumentError(
                f"{file} is not a saved conversation: it must be a list of messages with role and content"
            )
        system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        self.system, self.messages = system, messages

    def _all_messages(self) -> list[dict[str, str]]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.messages

    def _answer(self) -> Iterator[str]:
        prompt = self.model.tokenizer.encode_chat(self._all_messages())
        request = _request(prompt, self.settings, self.model.context)
        self._cache.rewind(prompt)
        return self._stream(len(prompt), len(self._cache), self.model.pieces(request, self._cache))

    def _stream(self, prompt_tokens: int, kept: int, pieces: Iterator[Piece]) -> Iterator[str]:
        texts: list[str] = []
        times = [time.perf_counter()]
        finish_reason = None
        try:
            for piece in pieces:
                times.append(time.perf_counter())
                finish_reason = piece.finish_reason
                texts.append(piece.text)
                yield piece.text
        finally:
            count = len(times) - 1
            self.statistics = AnswerStatistics(
                prompt_tokens=prompt_tokens,
                computed_tokens=prompt_tokens - kept,
                new_tokens=count,
                first_token_seconds=times[min(1, count)] - times[0],
                tokens_per_second=(count - 1) / (times[-1] - times[1]) if count > 1 else 0.0,
                complete=finish_reason == "stop",
            )
            if texts:
                self.messages.append({"role": "assistant", "content": "".join(texts)})
            else:
                self.messages.pop()


def _request(prompt: list[int], settings: dict[str, Any], context: int) -> GenerationRequest:
    sampling = {**settings}
    limit = sampling.pop("max_new_tokens", context)
    return GenerationRequest(prompt, limit, SamplingOptions(**sampling))  # type: ignore[typeddict-item]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
