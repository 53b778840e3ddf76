"""Stop strings in a text that comes in pieces."""

from collections.abc import Iterable, Iterator, Sequence


def stop_before(stop: Sequence[str], pieces: Iterable[str]) -> Iterator[str]:
    """The text of `pieces` up to the first stop string, in pieces, none of them empty.

    What may be the beginning of a stop string is held back until it is clear whether it is. Nothing more is
    taken from `pieces` once a stop string is complete.

    Args:
        stop: the stop strings, none empty.
        pieces: the text.
    """
    held = ""
    for piece in pieces:
        text = held + piece
        places = [place for s in stop if (place := text.find(s)) >= 0]
        if places:
            if text := text[: min(places)]:
                yield text
            return
        overlap = max((_overlap(text, s) for s in stop), default=0)
        held = text[len(text) - overlap :]
        if text := text[: len(text) - overlap]:
            yield text
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
