import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from elutq.errors import InvalidArgumentError, TokenizerError
from elutq.models import bundled_model
from elutq.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox laughs.",
    "Once upon a time there was a café by the sea, and the café was warm.",
    "naïve façade, 12 + 34 = 46\n\n  indented line\ttab",
]
HARD_TEXTS = [
    "",
    " ",
    "Hello world",
    "  two leading spaces",
    "trailing space ",
    "line\nbreak\n\n\ttab",
    "café naïve Ünïcödé",
    "你好,世界。",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, e\u0301 combining",
    "a\x00b",
    "\ufffd is a character too\ufffd",
    "ﬁ ligature ½",
    "<s> not really a special token </s>",
]


def sentencepiece_like(
    decoder: decoders.Decoder, normalizer: normalizers.Normalizer | None
) -> tokenizers.Tokenizer:
    """A BPE with byte fallback, laid out as Llama 2's: <unk> <s> </s>, 256 byte tokens, then the pieces."""
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = metaspace
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [p for p in sorted(model["vocab"], key=model["vocab"].get) if p not in pieces]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if normalizer is None:
        backend.pre_tokenizer = metaspace
    else:
        backend.normalizer = normalizer
    backend.decoder = decoder
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return backend


def llama2_like() -> tokenizers.Tokenizer:
    return sentencepiece_like(
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1, right=0),
            ]
        ),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )


def metaspace_like() -> tokenizers.Tokenizer:
    return sentencepiece_like(
        decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
        ),
        None,
    )


def bundled() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))


BACKENDS = {"byte-level": bundled, "llama2": llama2_like, "metaspace": metaspace_like}
TOKENIZERS = {name: Tokenizer(make()) for name, make in BACKENDS.items()}


def write_folder(folder: Path, backend: tokenizers.Tokenizer | None = None, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    (backend or bundled()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# ---- encode and decode -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("name", BACKENDS)
def test_encode_and_decode_agree_with_transformers(name: str, text: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if name != "byte-level":
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = write_folder(tmp_path, BACKENDS[name](), tokenizer_config=config)
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for add_special_tokens in (True, False):
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        for skip_special_tokens in (True, False):
            assert ours.decode(ids, skip_special_tokens) == theirs.decode(
                ids, skip_special_tokens=skip_special_tokens
            )


def test_bundled_model_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_folder(bundled_model())
    theirs = transformers.AutoTokenizer.from_pretrained(bundled_model())
    text = "\n".join(HARD_TEXTS) + "<|endoftext|>Once upon a time"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert ours.decode([0]) == ""
    assert ours.eos_token_ids == {0}
    assert ours.special_tokens["eos_token"] == "<|endoftext|>"
    assert ours.vocab_size == 4096


def test_the_post_processor_adds_the_special_tokens() -> None:
    tokenizer = TOKENIZERS["llama2"]
    assert tokenizer.encode("a fox")[0] == 1
    assert tokenizer.encode("a fox", add_special_tokens=False) == tokenizer.encode("a fox")[1:]


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = bundled()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    text = "one two three four five six seven"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_known_only_to_the_config_are_added(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "normalized": False, "special": True},
        "added_tokens_decoder": {"4096": {"content": "<|im_start|>", "special": True, "normalized": False}},
    }
    folder = write_folder(tmp_path, tokenizer_config=config)
    ours = Tokenizer.from_folder(folder)
    text = "<|im_start|>user hi<|im_end|>"
    assert ours.encode(text) == transformers.AutoTokenizer.from_pretrained(folder).encode(text)
    assert ours.encode(text)[0] == 4096
    assert ours.eos_token_ids == {4097}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [7, 9]}, "config": {"eos_token_id": 5}}, {7, 9}),
        ({"generation_config": {}, "config": {"eos_token_id": 5}}, {5}),
        (
            {"generation_config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "<|endoftext|>"}},
            {0},
        ),
        ({"special_tokens_map": {"eos_token": {"content": "<|endoftext|>"}}}, {0}),
        ({}, set()),
    ],
)
def test_eos_ids(files: dict[str, object], expected: set[int], tmp_path: Path) -> None:
    assert Tokenizer.from_folder(write_folder(tmp_path, **files)).eos_token_ids == expected


def test_ids_of_named_special_tokens() -> None:
    tokenizer = Tokenizer(bundled(), special_tokens={"eos_token": "<|endoftext|>", "pad_token": "<nowhere>"})
    assert tokenizer.special_token_id("eos_token") == 0
    assert tokenizer.special_token_id("bos_token") is None
    assert tokenizer.special_token_id("pad_token") is None


# ---- errors ----------------------------------------------------------------------------------------------


def test_missing_tokenizer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json.*AutoTokenizer.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}', "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "added_tokens_decoder",
        ),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "chat_template must be"),
        ("config.json", '{"eos_token_id": "2"}', "eos_token_id must be"),
        ("generation_config.json", '{"eos_token_id": [true]}', "eos_token_id must be"),
    ],
)
def test_broken_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


# ---- streaming -------------------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    decoder = tokenizer.stream(skip_special_tokens)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_stream_of_any_ids_joins_to_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    # A few ids beyond the vocabulary, and often the low ids: special and byte tokens.
    any_id = st.integers(0, tokenizer.vocab_size + 3) | st.integers(0, 260)
    ids = data.draw(st.lists(any_id, max_size=60))
    skip = data.draw(st.booleans())
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=60)
)
@settings(max_examples=150, deadline=None)
def test_stream_of_text_never_breaks_a_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_emits_a_character_as_soon_as_it_is_whole() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("a🙂b", add_special_tokens=False)
    assert len(ids) == 6  # four single bytes between the letters
    assert streamed(tokenizer, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_stream_holds_a_byte_fallback_run() -> None:
    tokenizer = TOKENIZERS["llama2"]
    ids = tokenizer.encode("fox🙂 fox", add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == "fox🙂 fox"
    assert next(p for p in pieces if "🙂" in p).startswith("🙂")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "text", ["the quick brown fox jumps over", "fox\n fox\n\nfox 🙂 the end", " the fox 🙂🙂"]
)
def test_a_continuation_keeps_the_space_between_it_and_the_prompt(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        if "\ufffd" in prompt:  # a character cut in two belongs to neither part
            continue
        decoder = tokenizer.stream(after=ids[:cut])
        rest = "".join([*(decoder.push(i) for i in ids[cut:]), decoder.flush()])
        assert prompt + rest == whole


def test_incomplete_bytes_are_flushed_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    assert streamed(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_a_special_token_does_not_eat_the_space_after_it() -> None:
    tokenizer = TOKENIZERS["llama2"]
    fox = tokenizer.encode("fox", add_special_tokens=False)
    assert "".join(streamed(tokenizer, [1, *fox, 2, *fox])) == "fox fox"


# ---- chat templates --------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}\n"
    "    {% if message.role == 'weird' %}{{ raise_exception('unknown role') }}{% endif %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "    {% if loop.index > 8 %}{% break %}{% endif %}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}\n"
    "{% if add_generation_prompt %}{{ bos_token }}<|im_start|>assistant\n{% endif %}\n"
)
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind: 'é'."},
    {"role": "user", "content": "Hi", "name": None},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Tell me a story"},
]
TOOLS = [{"type": "function", "function": {"name": "now", "description": "<b>é</b>"}}]


@pytest.mark.parametrize("placed", ["config", "list", "file"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_chat_template_agrees_with_transformers(
    placed: str, add_generation_prompt: bool, tools: list[dict[str, object]] | None, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }
    if placed == "config":
        config["chat_template"] = CHATML
    if placed == "list":
        config["chat_template"] = [
            {"name": "default", "template": CHATML},
            {"name": "tool_use", "template": "with tools: " + CHATML},
        ]
    folder = write_folder(tmp_path, tokenizer_config=config)
    if placed == "file":
        (folder / "chat_template.jinja").write_text(CHATML)
    ours = Tokenizer.from_folder(folder)
    assert ours.has_chat_template
    rendered = ours.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt, tools=tools)
    assert rendered == transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, add_generation_prompt=add_generation_prompt, tools=tools, tokenize=False
    )
    assert rendered.startswith("with tools") == (placed == "list" and tools is not None)


def chat_tokenizer(template: str) -> Tokenizer:
    return Tokenizer(bundled(), chat_templates={"default": template}, name="my-model")


def test_strftime_now() -> None:
    assert len(chat_tokenizer("{{ strftime_now('%Y') }}").apply_chat_template(MESSAGES)) == 4


def test_a_model_without_a_template_says_so() -> None:
    tokenizer = Tokenizer.from_folder(bundled_model())
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="has no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{% set _ = messages.append(1) %}"])
def test_templates_are_sandboxed(attack: str) -> None:
    with pytest.raises(InvalidArgumentError, match="my-model refuses"):
        chat_tokenizer(attack).apply_chat_template(MESSAGES)


def test_template_errors() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown role"):
        chat_tokenizer(CHATML).apply_chat_template([{"role": "weird", "content": ""}])
    with pytest.raises(TokenizerError, match="does not compile"):
        chat_tokenizer("{% if %}").apply_chat_template(MESSAGES)
    with pytest.raises(InvalidArgumentError, match="messages is empty"):
        chat_tokenizer(CHATML).apply_chat_template([])
