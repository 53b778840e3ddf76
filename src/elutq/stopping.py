"""Stop strings in a text that comes in pieces."""

from collections.abc import Sequence


class StopFilter:
    """Lets a text through up to the stop string that is complete first, the longest of those.

    What may be the beginning of a stop string is held back until it is clear whether it is.

    Attributes:
        stopped: whether a stop string is complete; nothing comes out any more.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Watch for the strings of `stop`, none of them empty."""
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take the next piece, return the text that is now certain to precede any stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(place + len(s), place) for s in self._stop if (place := text.find(s)) >= 0]
        self.stopped = bool(found)
        end = min(found)[1] if found else len(text) - max((overlap(text, s) for s in self._stop), default=0)
        self._held = "" if found else text[end:]
        return text[:end]

    def flush(self) -> str:
        """End the text: return what was held back."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
