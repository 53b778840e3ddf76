"""Keys and values of finished requests, kept for requests that begin alike."""

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from elutq.generation import common_prefix
from elutq.runtime import SequenceState

#: Computing fewer tokens again costs less than it is worth.
FEWEST_TOKENS = 16


class PrefixCache:
    """Sequences of finished requests, the least recently used forgotten first.

    A conversation that grows replaces what it grew from.
    """

    def __init__(self, memory_limit: int, entry_limit: int = 64) -> None:
        """Keep at most so many bytes of keys and values, in at most so many sequences."""
        self._memory_limit = memory_limit
        self._entry_limit = entry_limit
        self._entries: OrderedDict[int, tuple[NDArray[np.int32], SequenceState]] = OrderedDict()
        self._next_key = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def memory_bytes(self) -> int:
        """Memory of all sequences. What they share with others counts for each."""
        return sum(sequence.memory_bytes for _, sequence in self._entries.values())

    def find(
        self, tokens: NDArray[np.int32], running: Iterable[tuple[NDArray[np.int32], SequenceState]] = ()
    ) -> tuple[int, SequenceState | None]:
        """The sequence that begins like a prompt for longest, and for how many tokens; (0, None) if short.

        It is never the whole prompt: the logits after its last token are wanted.

        Args:
            tokens: int32 [n], the prompt.
            running: more sequences to look at, and what they hold.
        """
        candidates: list[tuple[int | None, NDArray[np.int32], SequenceState]] = [
            (None, held, sequence) for held, sequence in running
        ]
        candidates += [(key, held, sequence) for key, (held, sequence) in self._entries.items()]
        lengths = [common_prefix(held, tokens[:-1]) for _, held, _ in candidates]
        length = max(lengths, default=0)
        if length < FEWEST_TOKENS:
            return 0, None
        key, _, sequence = candidates[lengths.index(length)]
        if key is not None:
            self._entries.move_to_end(key)
        return length, sequence

    def put(self, tokens: NDArray[np.int32], sequence: SequenceState) -> None:
        """Keep a sequence, which holds `tokens`, as far as the limits allow."""
        if len(tokens) < FEWEST_TOKENS:
            return
        for key, (held, _) in list(self._entries.items()):
            shared = common_prefix(held, tokens)
            if shared == len(tokens):
                self._entries.move_to_end(key)
                return
            if shared == len(held):
                del self._entries[key]
        self._entries[self._next_key] = (tokens, sequence)
        self._next_key += 1
        while len(self) > self._entry_limit or self.memory_bytes > self._memory_limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
