"""`elutq chat` on a terminal of its own."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
GREEDY = ("--temperature", "0", "-t", "1")


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "XDG_STATE_HOME": str(home),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "COLUMNS": "200",
    }


class Terminal:
    """The program, typed at."""

    def __init__(self, folder: Path, home: Path, *options: str) -> None:
        self.process = pexpect.spawn(
            sys.executable,
            ["-m", "elutq", "chat", str(folder), *GREEDY, *options],
            env=environment(home),
            dimensions=(24, 200),
            encoding="utf-8",
            timeout=60,
            # As from a shell: who runs the tests in the background ignores Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.process.expect("Ctrl-D leaves")

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def see(self, pattern: str) -> str:
        """Wait for `pattern`; what came before it, without escape sequences."""
        self.process.expect(pattern)
        return ESCAPES.sub("", self.process.before)

    def leave(self) -> None:
        self.type("\x04")
        self.process.expect(pexpect.EOF)
        self.process.close()
        assert self.process.exitstatus == 0


@pytest.fixture
def terminal(chat_folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    started = Terminal(chat_folder, tmp_path / "state", "-n", "300")
    yield started
    started.process.close(force=True)


def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.see("0 of 512 token")
    terminal.type("/set max_new_tokens 8\r")
    terminal.see("max_new_tokens 8")
    terminal.type("Tell of a fox.\r")
    terminal.see("cut off")
    terminal.see(r"\d+ of 512 tokens · [\d.]+ tokens/")
    terminal.type("One line\x1b\rand another\r")  # Alt-Enter
    terminal.see("cut off")
    terminal.type("\x1b[200~pasted\nlines\x1b[201~")  # a bracketed paste
    terminal.type("\r")
    terminal.see("cut off")
    file = tmp_path / "talk.json"
    terminal.type(f"/save {file}\r")
    terminal.see("saved to")
    messages = json.loads(file.read_text())
    said = [m["content"] for m in messages if m["role"] == "user"]
    assert said == ["Tell of a fox.", "One line\nand another", "pasted\nlines"]
    terminal.type("/nonsense\r")
    terminal.see("there is no command /nonsense")
    terminal.leave()
    history = tmp_path / "state" / "elutq" / "chat_history"
    assert "+Tell of a fox." in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_stops_the_answer_and_not_the_program(chat_folder: Path, tmp_path: Path) -> None:
    # The slowest kernels: with fast ones the answer may be over before the key arrives.
    terminal = Terminal(chat_folder, tmp_path / "state", "-n", "300", "--isa", "scalar")
    terminal.type("Tell of a fox.\r")
    terminal.see(r"\x1b\[\?2004l")  # the prompt gives the terminal back: the answer follows
    terminal.see(r"\w+ \w+ \w+")
    terminal.type("\x03")
    terminal.see(r"\[stopped\]")
    terminal.type("half a line\x03")  # at the prompt it clears the line
    terminal.type("/undo\r")
    terminal.see("taken back: Tell of a fox.")
    terminal.leave()


def test_commands(terminal: Terminal, chat_folder: Path, tmp_path: Path) -> None:
    for keys, seen in (
        ("/help", "Alt-Enter"),
        ("/set max_new_tokens=5", "max_new_tokens 5"),
        ("/set speed 3", "there is no setting 'speed'"),
        ("/set top_k many", "top_k must be a number"),
        ("/set temperature -1", "error: temperature"),
        ("/system Be kind.", "system: Be kind."),
        ("/system", "system: Be kind."),
        ("/system -", r"system: \(none\)"),
        ("/retry", "nothing has been said"),
        ("A fox.", "cut off"),
        ("/retry", "cut off"),
        (" /slash", "cut off"),
        ("/save", "needs the name of a file"),
        (f"/save {tmp_path / 'a.json'}", "saved to"),
        (f"/save {tmp_path / 'a.json'}", "saved to"),
        ("/reset", "is empty"),
        (f"/load {tmp_path / 'a.json'}", "4 messages"),
        ("/load /no/such/file", "cannot be read"),
    ):
        terminal.type(f"{keys}\r")
        terminal.see(seen)
    terminal.type("/exit\r")
    terminal.process.expect(pexpect.EOF)
    again = Terminal(chat_folder, tmp_path / "state", "--load", str(tmp_path / "a.json"))
    again.type("\x1b[A\x1b[A\x1b[A")  # the history of the session before
    again.see("a.json")
    again.type("\x03/undo\r")
    again.see("taken back: /slash")
    again.leave()


def test_lines_of_a_pipe_are_messages(chat_folder: Path, tmp_path: Path) -> None:
    def run(text: str, *options: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "elutq", "chat", str(chat_folder), *GREEDY, "-n", "8", *options],
            input=text,
            capture_output=True,
            text=True,
            env=environment(tmp_path),
            check=False,
        )

    result = run("A fox.\n\nAnd then?\n/save " + str(tmp_path / "talk.json"))
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert result.stdout == f"{messages[1]['content']}\n{messages[3]['content']}\n"
    failed = run("/nonsense\nA fox.\n")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: there is no command /nonsense")
