"""Reading messages from a terminal: line editing, history, several lines."""

from collections.abc import Callable, Sequence

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

_STYLE = Style.from_dict({"rprompt": "fg:ansibrightblack", "prompt": "bold"})


class Prompt:
    """The lines that a person types, until Ctrl-D. Ctrl-C clears the line."""

    def __init__(self, words: Sequence[str], status: Callable[[], str]) -> None:
        """Complete `words` at the start of a line; show `status` beside it."""
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=_history(),
            auto_suggest=AutoSuggestFromHistory(),
            completer=WordCompleter(list(words), sentence=True),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            rprompt=status,
            style=_STYLE,
        )

    def __iter__(self) -> "Prompt":
        return self

    def __next__(self) -> str:
        while True:
            try:
                return self._session.prompt()
            except KeyboardInterrupt:
                continue
            except EOFError:
                raise StopIteration from None


def _key_bindings() -> KeyBindings:
    """Enter sends; Alt-Enter starts a line. A paste comes as one event, its line ends included."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _history() -> History:
    """What was typed earlier, readable by its owner alone; kept in memory if there is no place for a file."""
    try:
        folder = user_state_path("elutq", appauthor=False)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / "chat_history"
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
