from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq.errors import ContextOverflowError, InvalidArgumentError
from elutq.generation import Generation, GenerationRequest, Piece, token_array
from elutq.models import bundled_model
from elutq.tokenizer import Tokenizer

VOCAB = 4096


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(bundled_model())


def logits_of(token: int) -> NDArray[np.float32]:
    return np.eye(1, VOCAB, token, dtype=np.float32)[0]


def run(text: str, tokenizer: Tokenizer, **options: Any) -> list[Piece]:
    """Feed the tokens of a text as the model's choices, until the generation is finished."""
    options = {"max_new_tokens": 100, **options}
    generation = Generation(
        GenerationRequest(tokenizer.encode("So"), **options),
        context=300,
        vocab_size=VOCAB,
        tokenizer=tokenizer,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    pieces = []
    for token in [*tokenizer.encode(text), *tokenizer.eos_token_ids]:
        pieces.append(generation.advance(logits_of(token)))
        if pieces[-1].finish_reason is not None:
            break
    assert generation.new_tokens == sum(piece.token is not None for piece in pieces)
    assert generation.tokens[generation.prompt_tokens :].tolist() == [p.token.id for p in pieces if p.token]
    return pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_pieces_are_the_text(tokenizer: Tokenizer) -> None:
    pieces = run(" she saw é, 日本 and 🙂", tokenizer)
    assert text_of(pieces) == " she saw é, 日本 and 🙂"
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert (pieces[-1].token, pieces[-1].finish_reason) == (None, "stop")


def test_what_is_held_back_comes_with_the_end(tokenizer: Tokenizer) -> None:
    """The beginning of a stop string, or of a character, is text after all when nothing follows it."""
    pieces = run(" one two", tokenizer, stop=["two three"])
    assert text_of(pieces) == " one two"
    assert pieces[-1].text == "two"
    cut = len(tokenizer.encode(" 日")) - 1
    pieces = run(" 日", tokenizer, max_new_tokens=cut)
    assert text_of(pieces) == " \ufffd"
    assert pieces[-1].finish_reason == "length"


def test_a_stop_string_ends_before_itself(tokenizer: Tokenizer) -> None:
    pieces = run(" one two three", tokenizer, stop=[" three", "wo"])
    assert text_of(pieces) == " one t"
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].token is not None


def test_lengths(tokenizer: Tokenizer) -> None:
    pieces = run(" one two three four", tokenizer, max_new_tokens=2)
    assert [piece.finish_reason for piece in pieces] == [None, "length"]
    short = Generation(GenerationRequest([5, 6, 7]), context=3, vocab_size=VOCAB)
    assert short.advance(logits_of(9)).finish_reason == "length", "one token fits: nothing follows it"
    with pytest.raises(ContextOverflowError, match="3 tokens, but the context is limited to 2"):
        Generation(GenerationRequest([5, 6, 7]), context=2, vocab_size=VOCAB)


def test_without_a_tokenizer_there_is_no_text() -> None:
    generation = Generation(GenerationRequest([5], max_new_tokens=2), context=9, vocab_size=VOCAB)
    assert [generation.advance(logits_of(t)).text for t in (8, 9)] == ["", ""]
    assert generation.tokens.tolist() == [5, 8, 9]
    with pytest.raises(InvalidArgumentError, match="tokenizer"):
        Generation(GenerationRequest([5], stop=["x"]), context=9, vocab_size=VOCAB)


def test_token_arrays() -> None:
    assert token_array([1, 2]).dtype == np.int32
    assert token_array(np.array([1, 2], np.uint16)).tolist() == [1, 2]
    assert token_array([-(2**40)]).tolist() == [-(2**31)], "out of the vocabulary, whatever its size"
    for bad in ([0.5], ["a"], [[1]], [2**40], [None]):
        with pytest.raises(InvalidArgumentError, match="token ids"):
            token_array(bad)  # type: ignore[arg-type]
