"""What the sources of a calibration hold, and what can be wrong with them."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from elutq.calibration import Calibration, corpus, load_calibration
from elutq.errors import InvalidArgumentError, MissingDependencyError
from elutq.models import bundled_model
from elutq.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(bundled_model())
END = TOKENIZER.special_token_id("eos_token")
STORIES = ["Once there was a fox.\n\nIt ran.", "A bear sang. Ünï 🙂", "The end of all stories came early."]


def encode(*documents: str) -> list[int]:
    ids: list[int] = []
    for document in documents:
        ids += [END] if ids else []
        ids += TOKENIZER.encode(document, add_special_tokens=False)
    return ids


def calibrate(source: Path | str, length: int = 4, tokenizer: Tokenizer = TOKENIZER) -> Calibration:
    return load_calibration([str(source)], tokenizer, samples=1, length=length, held_out=0)


def check_holds(source: Path | str, expected: list[int], tokenizer: Tokenizer = TOKENIZER) -> Calibration:
    """The source is these tokens, all of them and no more."""
    found = calibrate(source, len(expected), tokenizer)
    assert found.token_ids[0].tolist() == expected
    with pytest.raises(InvalidArgumentError, match=f"has {len(expected)} tokens, fewer than one window"):
        calibrate(source, len(expected) + 1, tokenizer)
    return found


def write_lines(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# ---- files -----------------------------------------------------------------------------------------------


def test_text_files_hold_documents(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(STORIES) + "\n")
    found = check_holds(file, encode(*STORIES))
    (entry,) = found.record["sources"]
    assert entry["file"] == "stories.txt"
    assert len(entry["sha256"]) == 64


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        (b"one fox ran home", ["one fox ran home"]),
        (b"\xef\xbb\xbfone fox\r\nran home\r\n", ["one fox\nran home"]),
        (b"<|endoftext|>\n<|endoftext|>\none fox\n\n<|endoftext|>", ["one fox\n"]),
        (b"one fox\n<|endoftext|>\n<|endoftext|>\nran home", ["one fox", "ran home"]),
    ],
)
def test_text_files_of_any_layout(content: bytes, documents: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_bytes(content)
    check_holds(tmp_path / "notes.md", encode(*documents))


def test_without_an_end_token_documents_follow_each_other(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(STORIES))
    bare = Tokenizer(TOKENIZER._backend)
    check_holds(file, [i for story in STORIES for i in encode(story)], bare)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_lines(suffix: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / f"a.{suffix}", *({"id": 1, "text": story} for story in STORIES))
    file.write_text(file.read_text() + "\n")
    check_holds(file, encode(*STORIES))


def test_conversations_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer(
        TOKENIZER._backend,
        special_tokens={"eos_token": "<|endoftext|>"},
        chat_templates={"default": template + "{% if add_generation_prompt %}[assistant]{% endif %}"},
    )
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file = write_lines(tmp_path / "chat.jsonl", {"messages": talk}, {"messages": talk[:1]})
    rendered = "[user] Hi<|endoftext|>[assistant] Hello<|endoftext|>[user] Hi<|endoftext|>"
    check_holds(file, encode(rendered), tokenizer)
    with pytest.raises(InvalidArgumentError, match=r"chat.jsonl, line 1: messages need a chat template"):
        calibrate(file)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for kind in (pyarrow.string(), pyarrow.large_string()):
        rows = pyarrow.array([STORIES[0], None, *STORIES[1:]], kind)
        parquet.write_table(pyarrow.table({"id": range(4), "text": rows}), tmp_path / "a.parquet")
        check_holds(tmp_path / "a.parquet", encode(*STORIES))
    parquet.write_table(pyarrow.table({"id": range(3), "body": STORIES}), tmp_path / "b.parquet")
    with pytest.raises(
        InvalidArgumentError, match=r"strings named text; it has id \(int64\), body \(string\)"
    ):
        calibrate(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": range(3)}), tmp_path / "c.parquet")
    with pytest.raises(InvalidArgumentError, match=r"strings named text; it has text \(int64\)"):
        calibrate(tmp_path / "c.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", b"text", whole[:-50], whole[:8] + bytes(len(whole) - 16) + whole[-8:]):
        (tmp_path / "d.parquet").write_bytes(damaged)
        with pytest.raises(InvalidArgumentError, match=r"d.parquet is not a readable Parquet file"):
            calibrate(tmp_path / "d.parquet")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'elutq\[calibrate\]'"):
        calibrate(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b"\n<|endoftext|>\n", "no text"),
        ("a.txt", b"one fox", "a.txt has 2 tokens, fewer than one window of 4.*longer text, or a smaller"),
        ("a.txt", "café".encode("latin-1"), "a.txt is not UTF-8 text.*convert it"),
        ("a.bin", b"\x7fELF\0\0", "zero bytes; it is not a text file"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": ', "a.jsonl, line 3: each line must be one JSON object"),
        ("a.jsonl", b'["text"]', "line 1: each line must be one JSON object, not list"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"body": "x", "id": 1}', r"a string `text` or a list `messages`.*\['body', 'id'\]"),
        ("a.jsonl", b'{"text": 3}', "a string `text`"),
        ("a.jsonl", b'{"messages": ["hi"]}', "a list of objects with role and content"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "line 1: .*surrogates not allowed"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl is not UTF-8 text"),
    ],
)
def test_damaged_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message):
        calibrate(tmp_path / name)


def test_what_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidArgumentError, match="is a folder; name the text files in it"):
        calibrate(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidArgumentError, match="is not a regular file"):
        calibrate(tmp_path / "pipe")
    for missing in (tmp_path / "no.txt", "texts/no.jsonl", "no", "", "a b/c", "x" * 5000, "a\0b"):
        with pytest.raises(InvalidArgumentError, match=r"there is no file .*wikitext2.*org/name"):
            calibrate(missing)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one fox")

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InvalidArgumentError, match=r"a.txt cannot be read: Permission denied"):
        calibrate(tmp_path / "a.txt")


# ---- data sets -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the library: `rows` is what any data set holds, `asked` what was asked for."""
    hub = SimpleNamespace(rows=[{"text": story} for story in STORIES], asked=None, read=0)

    def load_dataset_builder(name: str, config: str | None, revision: str | None) -> SimpleNamespace:
        def as_streaming_dataset(split: str) -> Iterator[dict[str, object]]:
            hub.asked = (name, config, revision, split)
            for row in hub.rows:
                hub.read += 1
                yield row

        return SimpleNamespace(
            hash="c0ffee",
            config=SimpleNamespace(name=config or "default"),
            as_streaming_dataset=as_streaming_dataset,
        )

    library = ModuleType("datasets")
    library.load_dataset_builder = load_dataset_builder
    monkeypatch.setitem(sys.modules, "datasets", library)
    return hub


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("c4", ("allenai/c4", "en", None, "train")),
        ("pile", ("NeelNanda/pile-10k", None, None, "train")),
        ("org/name", ("org/name", None, None, "train")),
        ("org/name:sub", ("org/name", "sub", None, "train")),
        ("org/name@v1:sub:test", ("org/name", "sub", "v1", "test")),
        ("org/name::test:text", ("org/name", None, None, "test")),
    ],
)
def test_data_sets_by_name(source: str, asked: tuple[str | None, ...], hub: SimpleNamespace) -> None:
    found = check_holds(source, encode(*STORIES))
    assert hub.asked == asked
    assert found.record["sources"] == [
        {
            "dataset": asked[0],
            "revision": "c0ffee",
            "config": asked[1] or "default",
            "split": asked[3],
            "column": "text",
            "samples": 1,
            "held_out": 0,
        }
    ]


def test_the_rows_of_wikitext_are_one_text(hub: SimpleNamespace) -> None:
    check_holds("wikitext2", encode("\n\n".join([*STORIES, ""])))
    assert hub.asked == ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train")


def test_another_column(hub: SimpleNamespace) -> None:
    hub.rows = [{"id": 1, "body": story} for story in STORIES]
    check_holds("org/name:::body", encode(*STORIES))
    with pytest.raises(InvalidArgumentError, match=r"no strings in a column text; its columns are id, body"):
        calibrate("org/name")


def test_of_a_large_data_set_the_start_is_read(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_DATASET_CHARACTERS", len(STORIES[0]) + 12)
    check_holds("org/name", encode(STORIES[0], STORIES[1][:12]))
    assert hub.read == 4  # two rows, twice


def test_an_empty_data_set(hub: SimpleNamespace) -> None:
    hub.rows = []
    with pytest.raises(InvalidArgumentError, match="c4 holds no text"):
        calibrate("c4")


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach the hub\nRetry"), RuntimeError()])
def test_a_data_set_that_cannot_be_loaded(
    error: Exception, hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset_builder", fail)
    expected = "Couldn't reach the hub$" if str(error) else "RuntimeError$"
    with pytest.raises(InvalidArgumentError, match=f"no file org/name, and the data set.*loaded: {expected}"):
        calibrate("org/name")


def test_data_sets_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"data set Salesforce/wikitext.*'elutq\[calibrate\]'"):
        calibrate("wikitext2")


def test_the_library_itself_on_a_local_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "validation.jsonl", *({"body": story} for story in STORIES))

    def local(load: Callable[..., object], name: str, *args: object, **options: object) -> object:
        assert name == "org/name"
        return load(str(tmp_path / "data"), *args, **options)

    monkeypatch.setattr(
        datasets, "load_dataset_builder", functools.partial(local, datasets.load_dataset_builder)
    )
    found = check_holds("org/name::validation:body", encode(*STORIES))
    assert found.record["sources"][0]["revision"]
    with pytest.raises(InvalidArgumentError, match=r"cannot be loaded: .*train"):
        calibrate("org/name::train:body")
    with pytest.raises(InvalidArgumentError, match=r"cannot be loaded: .*large"):
        calibrate("org/name:large:validation:body")
