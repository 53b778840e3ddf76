import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from elutq.conversation import DEFAULT_SAMPLING, Conversation
from elutq.errors import ConfigError, InvalidArgumentError, TokenizerError
from elutq.models import bundled_model
from elutq.runtime import LanguageModel, load

SETTINGS = {"temperature": 0.0, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def model(chat_folder: Path) -> LanguageModel:
    return load(chat_folder, threads=2)


@pytest.fixture
def talk(model: LanguageModel) -> Conversation:
    return Conversation(model, settings=SETTINGS)


def answer(talk: Conversation, text: str) -> str:
    return "".join(talk.say(text))


def test_turns_are_those_of_chat(model: LanguageModel, talk: Conversation) -> None:
    talk.system = "You tell stories."
    first = answer(talk, "A fox.")
    second = answer(talk, "And then?")
    system = {"role": "system", "content": "You tell stories."}
    assert first == model.chat([system, talk.messages[0]], **SETTINGS)  # type: ignore[arg-type]
    assert second == model.chat([system, *talk.messages[:3]], **SETTINGS)  # type: ignore[arg-type]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[3]["content"] == second


def test_statistics(talk: Conversation) -> None:
    answer(talk, "A fox who liked to sing all day.")
    first = talk.statistics
    assert first is not None
    assert (first.new_tokens, first.complete) == (9, False)
    assert first.computed_tokens == first.prompt_tokens
    assert first.first_token_seconds > 0
    assert first.tokens_per_second > 0
    answer(talk, "And then?")
    second = talk.statistics
    assert second is not None
    assert second.prompt_tokens > first.prompt_tokens + 9
    assert second.computed_tokens < 15
    assert talk.context_used == second.prompt_tokens + 8


def test_an_answer_the_model_ends_is_complete(model: LanguageModel, talk: Conversation) -> None:
    tokenizer = model.tokenizer
    third = list(model.generate_ids(tokenizer.encode_chat([{"role": "user", "content": "A fox."}])))[2]
    eos, tokenizer.eos_token_ids = tokenizer.eos_token_ids, frozenset([third])
    try:
        answer(talk, "A fox.")
    finally:
        tokenizer.eos_token_ids = eos
    assert talk.statistics is not None
    assert (talk.statistics.new_tokens, talk.statistics.complete) == (3, True)


def test_an_answer_left_early_is_kept(talk: Conversation) -> None:
    pieces = talk.say("A fox.")
    some = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": some}
    assert talk.statistics is not None
    assert not talk.statistics.complete
    assert answer(talk, "And then?")


def test_an_interrupt_before_the_first_word_takes_the_message_back(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(talk, "A fox.")
    assert talk.messages == []
    assert answer(talk, "A fox.") == answer(Conversation(talk.model, settings=SETTINGS), "A fox.")


def test_retry_and_undo(talk: Conversation) -> None:
    first = answer(talk, "A fox.")
    assert "".join(talk.retry()) == first
    talk.set(temperature=1.0, seed=1)
    assert "".join(talk.retry()) != first
    assert len(talk.messages) == 2
    assert talk.undo() == "A fox."
    assert talk.messages == []
    for nothing in (talk.undo, talk.retry):
        with pytest.raises(InvalidArgumentError, match="nothing has been said"):
            nothing()
    answer(talk, "A fox.")
    talk.reset()
    assert talk.messages == []


def test_too_long_a_message_changes_nothing(talk: Conversation) -> None:
    with pytest.raises(InvalidArgumentError, match="limited to 512"):
        talk.say("fox " * 600)
    assert talk.messages == []


def test_settings_are_checked_when_they_are_set(talk: Conversation) -> None:
    for bad in ({"temperature": -1.0}, {"top_p": 2.0}, {"max_new_tokens": 0}):
        with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
            talk.set(**bad)
    assert talk.settings == {**DEFAULT_SAMPLING, **SETTINGS}


def test_save_and_load(model: LanguageModel, talk: Conversation, tmp_path: Path) -> None:
    talk.system = "Du erzählst."
    answer(talk, "A fox.")
    file = tmp_path / "talk.json"
    talk.save(file)
    assert json.loads(file.read_text())[0] == {"role": "system", "content": "Du erzählst."}
    other = Conversation(model, settings=SETTINGS)
    other.load(file)
    assert (other.system, other.messages) == (talk.system, talk.messages)
    with pytest.raises(InvalidArgumentError, match="File exists"):
        talk.save(file)
    talk.reset()
    talk.save(file, overwrite=True)
    other.load(file)
    assert other.messages == []


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is not a saved"),
        ('{"a": 1}', "a list of messages"),
        ('[{"role": "user"}]', "a list of messages"),
    ],
)
def test_what_is_no_conversation_is_not_loaded(
    content: str, match: str, talk: Conversation, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        talk.load(file)
    file.write_text(content)
    with pytest.raises(InvalidArgumentError, match=match):
        talk.load(file)


def test_a_model_without_a_template_cannot_talk() -> None:
    with load(bundled_model(), threads=1) as model, pytest.raises(TokenizerError, match="no chat template"):
        Conversation(model).say("A fox.")


def test_the_model_recommends_how_to_sample(chat_folder: Path, tmp_path: Path) -> None:
    def recommended(config: Any) -> object:
        folder = tmp_path / "model"
        shutil.copytree(chat_folder, folder, dirs_exist_ok=True)
        (folder / "generation_config.json").write_text(json.dumps(config))
        with load(folder, threads=1) as model:
            return model.recommended_sampling, Conversation(model).settings

    stated = {"do_sample": True, "top_k": 20, "temperature": 0.6, "max_length": 7}
    assert recommended(stated) == ({"temperature": 0.6, "top_k": 20},) * 2
    assert recommended({"do_sample": True}) == ({"temperature": 1.0},) * 2
    assert recommended({"temperature": 0.1}) == ({}, DEFAULT_SAMPLING)
    with pytest.raises(ConfigError, match="generation_config"):
        recommended([])
