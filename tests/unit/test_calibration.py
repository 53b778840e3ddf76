import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from elutq.calibration import Calibration, load_calibration, sample_text, self_text
from elutq.calibration.corpus import Corpus, Piece
from elutq.calibration.windows import cut_windows
from elutq.errors import InvalidArgumentError
from elutq.models import bundled_model
from elutq.runtime import load
from elutq.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(bundled_model())
#: No sentence comes twice, so that a window's place shows.
SENTENCES = [f"Fox {i} met bear {i} near the river, and {i} birds sang.\n" for i in range(8000)]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 kB, far more than the windows below need."""
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text("".join(SENTENCES))
    return file


def spans(windows: NDArray[np.int64], text: str) -> list[tuple[int, int]]:
    """Where windows lie in the text."""
    found = []
    for ids in windows:
        words = TOKENIZER.decode(ids.tolist())
        assert text.count(words) == 1
        found.append((text.index(words), text.index(words) + len(words)))
    return sorted(found)


def same(a: Calibration, b: Calibration) -> bool:
    return np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.held_out, b.held_out)


# ---- windows of a text -----------------------------------------------------------------------------------


def test_windows_are_parts_of_the_whole_text_and_do_not_overlap(story: Path) -> None:
    found = load_calibration([str(story)], TOKENIZER, samples=40, length=64, held_out=8)
    assert (found.token_ids.shape, found.held_out.shape) == ((40, 64), (8, 64))
    assert found.token_ids.dtype == found.held_out.dtype == np.int64
    assert found.warnings == ()
    text = story.read_text()
    for windows in (found.token_ids, found.held_out):
        starts = [start / len(text) for start, _ in spans(windows, text)]
        assert starts[0] < 0.35
        assert starts[-1] > 0.65
    everything = spans(np.concatenate([found.token_ids, found.held_out]), text)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(everything))


def test_only_the_surroundings_of_the_windows_are_tokenized(
    story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = Tokenizer.encode

    def counting(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    load_calibration([str(story)], TOKENIZER, samples=10, length=32, held_out=2)
    assert sum(encoded) <= 12 * 32 * 8 < story.stat().st_size / 100


class Numbers:
    """Every word is a number, which is its token; -1 ends a document."""

    def special_token_id(self, name: str) -> int | None:
        return {"eos_token": -1}.get(name)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [int(word) for word in text.split()]


@given(
    words=st.integers(1, 300),
    width=st.integers(3, 40),
    count=st.integers(1, 12),
    length=st.integers(2, 20),
    breaks=st.sets(st.integers(0, 300), max_size=20),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_any_text_gives_as_many_windows_as_it_has(
    words: int, width: int, count: int, length: int, breaks: set[int], seed: int
) -> None:
    pieces: list[Piece] = []
    stream: list[int] = []
    for number in range(words):
        if number in breaks:
            pieces.append(None)
            stream += [-1] if number else []
        pieces.append(f"{number:0{width}d} ")
        stream.append(number)
    corpus = Corpus("text", {}, lambda: pieces, words * (width + 1))
    rng = np.random.default_rng(seed)
    if len(stream) < length:
        with pytest.raises(InvalidArgumentError, match=f"text has {len(stream)} tokens, fewer than one"):
            cut_windows(corpus, Numbers(), count, length, rng)
        return
    windows = cut_windows(corpus, Numbers(), count, length, rng)
    assert windows.shape == (min(count, len(stream) // length), length)
    end = 0
    for window in windows.tolist():
        start = stream.index(max(window)) - window.index(max(window))
        assert stream[start : start + length] == window
        assert start >= end
        end = start + length


def test_windows_may_begin_anywhere() -> None:
    corpus = Corpus("text", {}, lambda: [f"{i} " for i in range(9)], 18)
    starts = {
        int(cut_windows(corpus, Numbers(), 1, 5, np.random.default_rng(seed))[0, 0]) for seed in range(99)
    }
    assert starts == {0, 1, 2, 3, 4}


def test_one_token_repeated_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" the" * 10_000)
    found = load_calibration([str(tmp_path / "a.txt")], TOKENIZER, samples=8, length=32, held_out=2)
    assert found.token_ids.shape == (8, 32)
    assert len(np.unique(found.token_ids)) == 1


# ---- seeds, shares and shortage --------------------------------------------------------------------------


def test_the_seed_decides(story: Path) -> None:
    def cut(seed: int) -> Calibration:
        return load_calibration([str(story)], TOKENIZER, samples=8, length=32, held_out=3, seed=seed)

    assert same(cut(5), cut(5))
    assert cut(5).record == cut(5).record
    assert not same(cut(5), cut(6))


def test_sources_get_equal_shares(story: Path, tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(9000))))
    sources = [str(story), str(tmp_path / "numbers.txt")]
    found = load_calibration(sources, TOKENIZER, samples=21, length=32, held_out=4)
    from_story = ["Fox" in TOKENIZER.decode(ids.tolist()) for ids in found.token_ids]
    assert len(from_story) == 21
    assert sum(from_story) == 11
    assert from_story != sorted(from_story, reverse=True)  # mixed
    assert sum("Fox" in TOKENIZER.decode(ids.tolist()) for ids in found.held_out) == 2
    assert [(e["file"], e["samples"], e["held_out"]) for e in found.record["sources"]] == [
        ("story.txt", 11, 2),
        ("numbers.txt", 10, 2),
    ]


@pytest.mark.parametrize(("tokens", "samples", "held_out"), [(100, 10, 0), (125, 12, 0), (149, 12, 2)])
def test_a_short_text_gives_what_it_has(tokens: int, samples: int, held_out: int, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(" the" * tokens)
    found = load_calibration([str(tmp_path / "short.txt")], TOKENIZER, samples=12, length=10, held_out=4)
    assert found.token_ids.shape == (samples, 10)
    assert found.held_out.shape == (held_out, 10)
    (warning,) = found.warnings
    assert f"room for {samples + held_out} windows of 10 tokens, not 16" in warning
    assert f"{samples} of 12 calibrate, {held_out} of 4 are held out" in warning
    assert found.record["samples"] == samples
    assert found.record["tokens"] == samples * 10
    assert found.record["held_out"] == held_out


def test_none_need_be_held_out(story: Path) -> None:
    found = load_calibration([str(story)], TOKENIZER, samples=3, length=16, held_out=0)
    assert found.held_out.shape == (0, 16)
    assert found.warnings == ()


def test_the_record_repeats_the_run(story: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("".join(SENTENCES[:20]))
    files = {"story.txt": story, "short.txt": tmp_path / "short.txt"}
    sources = [str(file) for file in files.values()]
    first = load_calibration(sources, TOKENIZER, samples=30, length=32, held_out=6, seed=3)
    assert first.warnings
    record = json.loads(json.dumps(first.record))
    again = load_calibration(
        [str(files[entry["file"]]) for entry in record["sources"]],
        TOKENIZER,
        **record["requested"],
        length=record["length"],
        seed=record["seed"],
    )
    assert same(first, again)
    assert again.record == first.record


def test_progress_ends_at_the_total(story: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    load_calibration(
        [str(story), "self"],
        TOKENIZER,
        samples=4,
        length=8,
        held_out=2,
        model=lambda: load(bundled_model(), threads=1),
        progress=lambda *call: seen.append(call),
    )
    done = [call[0] for call in seen]
    assert (done[0], done[-1]) == (0, 48)
    assert done == sorted(done)
    assert {call[1:] for call in seen} == {(48, str(story)), (48, "self")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"samples": -3}, "samples must be at least 1, not -3"),
        ({"length": 1}, "length must be at least 2"),
        ({"held_out": -1}, "held_out must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"sources": []}, "at least one"),
        ({"sources": "story.txt"}, "must be a list"),
        ({"sources": ["self"]}, "self needs the model"),
        ({"sources": ["self", "self"]}, "self is the same text as a source before it"),
        ({"sources": ["a.txt", "b.txt"], "samples": 1}, "there are 2 sources"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load_calibration(options.pop("sources", ["a.txt"]), TOKENIZER, **options)


def test_a_text_is_named_once(story: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_bytes(story.read_bytes())
    for source in (story, tmp_path / "copy.txt"):
        with pytest.raises(InvalidArgumentError, match=f"{source} is the same text as a source before it"):
            load_calibration([str(story), str(source)], TOKENIZER, samples=2, length=8)


# ---- text of the model itself ----------------------------------------------------------------------------


class FakeSequence(list):
    def truncate(self, length: int) -> None:
        del self[length:]


class FakeModel:
    """Tokens are drawn with fixed probabilities. Id 0 begins, 1 ends, 2 is special too, 7 names no token."""

    probabilities = np.array([0.05, 0.05, 0.2, 0.1, 0.2, 0.1, 0.05, 0.25])
    context = 200

    def __init__(self, bos: int | None = 0, stops: tuple[int, ...] = (1,)) -> None:
        self.config = SimpleNamespace(vocab_size=8)
        self.tokenizer = SimpleNamespace(
            eos_token_ids=frozenset(stops),
            special_token_ids=frozenset([0, 1, 2]),
            special_token_id=lambda name: bos if name == "bos_token" else None,
            is_known=lambda i: i < 7,
        )
        self.batches: list[int] = []
        self.contexts: list[list[int]] = []
        self.closed = False

    def new_sequence(self) -> FakeSequence:
        return FakeSequence()

    def bytes_per_token(self, context: int) -> int:
        return 1000 + 10 * context

    def step(self, work: list) -> list[NDArray[np.float32]]:
        self.batches.append(len(work))
        for sequence, ids in work:
            sequence += ids
            self.contexts.append(list(sequence))
        return [np.log(self.probabilities).astype(np.float32) for _ in work]

    def __enter__(self) -> "FakeModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


def frequencies(ids: NDArray[np.integer]) -> NDArray[np.float64]:
    return np.bincount(ids.ravel(), minlength=8) / ids.size


def test_sampled_text_follows_the_model() -> None:
    model = FakeModel()
    ids = sample_text(model, sequences=100, length=101, seed=0)
    assert ids.shape == (100, 101)
    assert ids.dtype == np.int32
    assert (ids[:, 0] == 0).all()
    assert np.abs(frequencies(ids[:, 1:]) - model.probabilities).max() < 0.02
    assert max(map(len, model.contexts)) == 100  # nothing is forgotten
    assert (sample_text(FakeModel(), 100, 101, seed=0) == ids).all()


@pytest.mark.parametrize(
    ("model", "first"),
    [
        (lambda: FakeModel(bos=0), {0}),
        (lambda: FakeModel(bos=None, stops=(2, 1)), {1}),
        (lambda: FakeModel(bos=None, stops=()), {3, 4, 5, 6}),
    ],
)
def test_sampled_text_begins_as_documents_do(model: Callable[[], FakeModel], first: set[int]) -> None:
    assert set(sample_text(model(), 100, 2, seed=0)[:, 0].tolist()) == first


def test_windows_of_the_model_itself() -> None:
    model = FakeModel()
    found = load_calibration(["self"], TOKENIZER, samples=90, length=150, held_out=20, model=lambda: model)
    assert (found.token_ids.shape, found.held_out.shape) == ((90, 150), (20, 150))
    assert found.record["sources"] == [{"model": "self", "samples": 90, "held_out": 20}]
    assert model.closed
    ids = np.concatenate([found.token_ids, found.held_out])
    allowed = np.array([0, 1, 0, 1, 1, 1, 1, 0])  # no special token but the one that ends a document
    expected = model.probabilities * allowed / (model.probabilities @ allowed)
    assert np.abs(frequencies(ids) - expected).max() < 0.02
    # Each document is sampled from a context of its own, which its first token begins.
    assert all(context[0] == 0 and not {0, 1} & set(context[1:]) for context in model.contexts)
    again = load_calibration(
        ["self"], TOKENIZER, samples=90, length=150, held_out=20, model=lambda: FakeModel()
    )
    assert same(found, again)


def test_sampling_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "_CACHE_BYTES", 3 * 10 * 20)
    model = FakeModel()
    load_calibration(["self"], TOKENIZER, samples=5, length=20, held_out=2, model=lambda: model)
    assert model.batches == [3] * 40 + [1] * 20


def test_the_bundled_model_writes_stories() -> None:
    found = load_calibration(
        ["self"],
        TOKENIZER,
        samples=4,
        length=48,
        held_out=0,
        model=lambda: load(bundled_model(), threads=1, context=48),
    )
    model = load(bundled_model(), threads=1)
    for ids in found.token_ids:
        logits = model.logits([0, *ids[:-1].tolist()]).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        entropy = -(np.exp(log_p) * log_p).sum(axis=1).mean()
        assert -log_p[np.arange(48), ids].mean() == pytest.approx(entropy, abs=1.0)


def test_windows_must_fit_the_context() -> None:
    with pytest.raises(InvalidArgumentError, match="context is 200 tokens: it cannot write windows of 201"):
        load_calibration(["self"], TOKENIZER, length=201, model=lambda: FakeModel())
