from collections.abc import Iterable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elutq.stopping import StopFilter


def stop_before(stop: Sequence[str], pieces: Iterable[str]) -> list[str]:
    """What comes out, without what is empty."""
    watch = StopFilter(stop)
    return [text for text in (*map(watch.push, pieces), watch.flush()) if text]


def test_stop_string_across_pieces() -> None:
    assert stop_before(["\n\n"], ["one", " two\n", "\nthree"]) == ["one", " two"]


def test_what_only_began_like_a_stop_string_comes_out() -> None:
    assert stop_before(["END"], ["aE", "Nb", "E", "N"]) == ["a", "ENb", "EN"]


def test_the_first_of_several_wins() -> None:
    assert stop_before(["yz", "x"], ["axyz"]) == ["a"]


def test_nothing_comes_out_after_a_stop_string() -> None:
    stop = StopFilter(["stop"])
    assert [stop.push(piece) for piece in ("a", "stop", "never")] == ["a", "", ""]
    assert stop.stopped
    assert stop.flush() == ""


letters = st.text("ab", max_size=4)


@given(st.lists(letters), st.lists(letters.filter(bool), max_size=3))
@example(["ab", "b"], ["b", "abb"])
def test_same_text_however_it_is_cut(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    # The string that is complete first counts, though a longer one may have begun before it.
    found = [(place + len(s), place) for s in stop if (place := text.find(s)) >= 0]
    end = min(found)[1] if found else len(text)
    assert "".join(stop_before(stop, pieces)) == text[:end]


@pytest.mark.parametrize("stop", [["aab"], ["ab", "aab"]])
def test_overlapping_beginnings(stop: list[str]) -> None:
    assert "".join(stop_before(stop, "aaab")) == "a"
