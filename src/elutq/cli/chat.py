"""`elutq chat`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elutq.cli.options import IsaOption, KvCacheOption, ModelArgument, ThreadsOption
from elutq.errors import ElutqError, InvalidArgumentError, TokenizerError

if TYPE_CHECKING:
    from elutq.conversation import Conversation

#: Names that /set takes, and how their values are read.
_SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_new_tokens": int,
}
_HELP = """\
/help                 this list
/set [NAME VALUE]     show the settings, or change one: {settings}
/system [TEXT]        show the system message, or replace it; "-" removes it
/retry                another answer to the last message
/undo                 take the last message and its answer back
/reset                forget the conversation
/save FILE            write the conversation as JSON
/load FILE            go on with a saved one
/exit                 leave; Ctrl-D does too

Ctrl-C stops an answer. Alt-Enter starts a new line; pasted lines stay together.
A message that begins with "/" needs a space in front."""


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    load_file: Annotated[
        Path | None, typer.Option("--load", metavar="FILE", help="Go on with a conversation of /save.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among so many likeliest tokens; 0 is all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest that make up this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, tokens seen are less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Longest answer; by default what fits.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--ctx", help="Tokens of a conversation; by default the model's limit.")
    ] = None,
    threads: ThreadsOption = None,
    isa: IsaOption = None,
    kv_cache: KvCacheOption = "fp16",
) -> None:
    """Talk with a model in the terminal. From a pipe, each line is a message.

    Sampling is what the model's generation_config.json recommends, else temperature 0.7 and top-p 0.95.
    """
    from elutq.conversation import Conversation
    from elutq.runtime import load

    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
    }
    language_model = load(model, threads=threads, isa=isa, kv_cache=kv_cache, context=context)
    if not language_model.tokenizer.has_chat_template:
        raise TokenizerError(
            f"{model} has no chat template, so it is not a chat model; "
            f"let it continue a text: elutq generate {model} -p TEXT"
        )
    settings = {name: value for name, value in options.items() if value is not None}
    conversation = Conversation(language_model, system=system, settings=settings)
    if load_file is not None:
        conversation.load(load_file)
    talk = _Talk(conversation, load_file)
    if sys.stdin.isatty() and sys.stdout.isatty():
        from elutq.cli.terminal import Prompt

        _note(f"{model} on {language_model.threads} thread(s). /help lists the commands, Ctrl-D leaves.")
        talk.run(Prompt(_commands(), talk.status), interactive=True)
    else:
        talk.run((line.rstrip("\n") for line in sys.stdin), interactive=False)


class _Talk:
    """Carries messages and commands to a conversation, and answers to the screen."""

    def __init__(self, conversation: "Conversation", file: Path | None) -> None:
        self._conversation = conversation
        self._file = file  # ours to overwrite

    def run(self, lines: Iterator[str], interactive: bool) -> None:
        """Take lines until they end or one says /exit. Where nobody watches, an error ends it."""
        for line in lines:
            try:
                if line.startswith("/"):
                    if not self._command(line):
                        return
                elif line.strip():
                    self._print(self._conversation.say(line.strip()))
            except (ElutqError, KeyboardInterrupt) as error:
                if not interactive:
                    raise
                _note(f"error: {error}" if isinstance(error, ElutqError) else "[stopped]")

    def status(self) -> str:
        """Context used and speed, in a few words."""
        talk = self._conversation
        used = f"{talk.context_used} of {talk.model.context} tokens"
        speed = talk.statistics.tokens_per_second if talk.statistics else 0.0
        return f"{used} · {speed:.1f} tokens/s" if speed else used

    def _command(self, line: str) -> bool:
        """Obey a /command; False to leave."""
        name, _, argument = line[1:].strip().partition(" ")
        if name == "exit":
            return False
        command = getattr(self, f"_do_{name}", None) if name.isidentifier() else None
        if command is None:
            raise InvalidArgumentError(f"there is no command /{name}; /help lists them")
        command(argument.strip())
        return True

    def _do_help(self, argument: str) -> None:
        _note(_HELP.format(settings=", ".join(_SETTINGS)))

    def _do_set(self, argument: str) -> None:
        name, _, value = argument.replace("=", " ").partition(" ")
        if name:
            if name not in _SETTINGS:
                raise InvalidArgumentError(
                    f"there is no setting {name!r}; the settings are {', '.join(_SETTINGS)}"
                )
            try:
                number = _SETTINGS[name](value)
            except ValueError:
                raise InvalidArgumentError(f"{name} must be a number, not {value.strip()!r}") from None
            self._conversation.set(**{name: number})
        _note("  ".join(f"{name} {value}" for name, value in self._conversation.settings.items()))

    def _do_system(self, argument: str) -> None:
        if argument:
            self._conversation.system = None if argument == "-" else argument
        _note(f"system: {self._conversation.system or '(none)'}")

    def _do_retry(self, argument: str) -> None:
        self._print(self._conversation.retry())

    def _do_undo(self, argument: str) -> None:
        _note(f"taken back: {self._conversation.undo()}")

    def _do_reset(self, argument: str) -> None:
        self._conversation.reset()
        _note("the conversation is empty")

    def _do_save(self, argument: str) -> None:
        file = _path(argument, "/save")
        self._conversation.save(file, overwrite=file == self._file)
        self._file = file
        _note(f"saved to {file}")

    def _do_load(self, argument: str) -> None:
        file = _path(argument, "/load")
        self._conversation.load(file)
        self._file = file
        _note(f"{len(self._conversation.messages)} messages")

    def _print(self, pieces: Iterator[str]) -> None:
        with closing(pieces):  # type: ignore[type-var]
            try:
                for piece in pieces:
                    sys.stdout.write(_printable(piece))
                    sys.stdout.flush()
            finally:
                sys.stdout.write("\n")
                sys.stdout.flush()
        statistics = self._conversation.statistics
        if statistics is not None and not statistics.complete:
            _note("[cut off: the limit of tokens is reached; /set max_new_tokens, or /reset for a new start]")


def _commands() -> list[str]:
    return [f"/{name[4:]}" for name in dir(_Talk) if name.startswith("_do_")] + ["/exit"]


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise InvalidArgumentError(f"{command} needs the name of a file")
    return Path(argument).expanduser()


def _printable(text: str) -> str:
    """Control characters replaced: what a model writes must not steer the terminal."""
    if text.isprintable():
        return text
    return "".join("\ufffd" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    code = ord(character)
    return (code < 0x20 and character not in "\n\t") or 0x7F <= code < 0xA0


def _note(text: str) -> None:
    """Words of the program, not of the model: dim, on stderr."""
    from rich.console import Console

    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
