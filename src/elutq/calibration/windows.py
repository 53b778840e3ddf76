"""Windows of tokens from random places of a text, of which only the surroundings are tokenized.

Documents are tokenized one by one, without special tokens, and joined by the end-of-sequence token if the
tokenizer names one, as texts are packed for training. Windows may span documents, and begin anywhere.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from elutq.calibration.corpus import Corpus, Piece
from elutq.errors import InvalidArgumentError
from elutq.tokenizer import Tokenizer

#: Characters tokenized for each token wanted, at first. English has four.
_CHARACTERS_PER_TOKEN = 8


def cut_windows(
    corpus: Corpus, tokenizer: Tokenizer, count: int, length: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Windows that do not overlap, at random places of the whole text, in its order: int64 [found, length].

    Around each place an excerpt is tokenized that is long enough for a window by a wide margin; excerpts do
    not overlap either. Should one still have too few tokens, all are taken anew at twice the length, in the
    end the whole text. So fewer than `count` windows, one at least, are found only if there are no more.

    Raises:
        InvalidArgumentError: the text has fewer than `length` tokens.
    """
    size = _CHARACTERS_PER_TOKEN * length
    while count * size < corpus.characters:
        places = _places(corpus.characters, count, size, rng)
        # The first and the last token of an excerpt may be of half a word.
        excerpts = (
            _encode(documents, tokenizer)[1:-1] for documents in _excerpts(corpus.pieces(), places, size)
        )
        windows = [window for ids in excerpts for window in _cut(ids, 1, length, rng)]
        if len(windows) == count:
            return np.stack(windows)
        size *= 2
    (whole,) = _excerpts(corpus.pieces(), [0], corpus.characters)
    ids = _encode(whole, tokenizer)
    if len(ids) < length:
        raise InvalidArgumentError(
            f"{corpus.name} has {len(ids)} tokens, fewer than one window of {length}; "
            "give a longer text, or a smaller calibration length"
        )
    return np.stack(_cut(ids, count, length, rng))


def _places(total: int, count: int, size: int, rng: np.random.Generator) -> list[int]:
    """Ascending random starts of `count` stretches of `size` within `total` that do not overlap."""
    before = np.sort(rng.integers(0, total - count * size, count, endpoint=True))
    return [int(start) for start in before + size * np.arange(count)]


def _cut(
    ids: NDArray[np.int64], count: int, length: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """At most `count` windows of some tokens."""
    count = min(count, len(ids) // length)
    return [ids[start : start + length] for start in _places(len(ids), count, length, rng)]


def _excerpts(pieces: Iterable[Piece], starts: Sequence[int], size: int) -> Iterator[list[str]]:
    """The documents, or parts of them, in the `size` characters from each of the ascending `starts`."""
    upcoming = iter(starts)
    start = next(upcoming)
    documents: list[list[str]] = [[]]
    position = 0  # characters of all pieces so far
    for piece in pieces:
        if piece is None:
            if documents[-1]:
                documents.append([])
            continue
        begin, position = position, position + len(piece)
        while position > start:
            documents[-1].append(piece[max(start - begin, 0) : start + size - begin])
            if position < start + size:
                break
            yield ["".join(parts) for parts in documents]
            documents = [[]]
            try:
                start = next(upcoming)
            except StopIteration:
                return


def _encode(documents: Iterable[str], tokenizer: Tokenizer) -> NDArray[np.int64]:
    end = tokenizer.special_token_id("eos_token")
    ids: list[int] = []
    for document in documents:
        if document:
            if ids and end is not None:
                ids.append(end)
            ids += tokenizer.encode(document, add_special_tokens=False)
    return np.array(ids, np.int64)
