"""The official client of OpenAI's API against the server."""

import gc
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from elutq.runtime import LanguageModel

openai = pytest.importorskip("openai")

HI = [{"role": "user", "content": "Tell me of a dog."}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 99, "minimum": 0}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "An animal.",
            "parameters": {
                "type": "object",
                "properties": {"kind": {"$ref": "#/$defs/Kind"}},
                "required": ["kind"],
                "additionalProperties": False,
                "$defs": {"Kind": {"enum": ["cat", "dog"]}},
            },
        },
    }
    for name in ("feed", "walk")
]


@pytest.fixture(scope="module")
def client(live: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def refused(client: Any, path: str = "chat", **changes: Any) -> Any:
    """The error that a request gets."""
    resource, default = (
        (client.chat.completions, {"messages": HI})
        if path == "chat"
        else (client.completions, {"prompt": "A"})
    )
    with pytest.raises(openai.APIStatusError) as caught:
        resource.create(**{"model": "tiny", "max_tokens": 4} | default | changes)
    return caught.value


# ---- Answers ---------------------------------------------------------------------------------------------


def test_an_answer_is_what_the_model_says_by_itself(client: Any, chat_model: LanguageModel) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=30)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == chat_model.chat(HI, max_new_tokens=30)
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(chat_model.tokenizer.encode_chat(HI))
    assert answer.usage.completion_tokens == 30
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 30


def test_a_stream_says_the_same_in_pieces(client: Any, chat_model: LanguageModel) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=HI,
        temperature=0,
        max_completion_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    *pieces, last = chunks
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == chat_model.chat(HI, max_new_tokens=20)
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in pieces)
    assert last.choices == []
    assert last.usage.completion_tokens == 20


def test_a_stream_without_options_ends_without_usage(client: Any) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=HI, max_tokens=3, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_content_in_parts_and_the_developer_role(client: Any, chat_model: LanguageModel) -> None:
    plain = [{"role": "system", "content": "Be kind."}, *HI]
    parts = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
        },
        *HI,
    ]
    answer = client.chat.completions.create(model="tiny", messages=parts, temperature=0, max_tokens=10)
    assert answer.choices[0].message.content == chat_model.chat(plain, max_new_tokens=10)


def test_choices_differ_by_seed_and_repeat_with_it(client: Any, chat_model: LanguageModel) -> None:
    def ask(seed: int, n: int) -> list[str]:
        answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=12, seed=seed, n=n)
        assert [choice.index for choice in answer.choices] == list(range(n))
        assert answer.usage.completion_tokens == 12 * n
        assert answer.usage.prompt_tokens == len(chat_model.tokenizer.encode_chat(HI))
        return [choice.message.content for choice in answer.choices]

    three = ask(7, 3)
    assert len(set(three)) == 3
    assert ask(7, 3) == three
    assert ask(8, 1) == three[1:2]
    assert three[0] == chat_model.chat(HI, max_new_tokens=12, temperature=1.0, seed=7)


def test_a_stream_of_several_choices(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 12, "seed": 7, "n": 3}
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in client.chat.completions.create(**options).choices]


def test_sampling_options_reach_the_sampler(client: Any, chat_model: LanguageModel) -> None:
    ours = {
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "top_p": 0.9,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "temperature": 0.7,
    }
    common = {k: v for k, v in ours.items() if k not in ("top_k", "min_p", "repetition_penalty")}
    answer = client.completions.create(
        model="tiny",
        prompt="Once upon a time",
        max_tokens=30,
        logit_bias={"13": -100, "300": 2},
        extra_body={k: v for k, v in ours.items() if k not in common},
        **common,
    )
    assert answer.choices[0].text == chat_model.generate(
        "Once upon a time", max_new_tokens=30, logit_bias={13: -100.0, 300: 2.0}, **ours
    )


@pytest.mark.parametrize("stop", [".", [".", "!"]])
def test_stop_strings(client: Any, stop: Any) -> None:
    options = {"model": "tiny", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60}
    whole = client.completions.create(**options).choices[0]
    stopped = client.completions.create(**options, stop=stop).choices[0]
    assert "." in whole.text
    assert stopped.text == whole.text[: whole.text.index(".")]
    assert stopped.finish_reason == "stop"


def test_completions(client: Any, chat_model: LanguageModel) -> None:
    prompts = ["Once upon a time", "The dog"]
    answer = client.completions.create(model="tiny", prompt=prompts, temperature=0, n=2)
    assert answer.object == "text_completion"
    texts = [chat_model.generate(prompt, max_new_tokens=16) for prompt in prompts]
    assert [c.text for c in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    tokenizer = chat_model.tokenizer
    assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    ids = client.completions.create(
        model="tiny", prompt=tokenizer.encode(prompts[1]), temperature=0, echo=True
    )
    assert ids.choices[0].text == prompts[1] + texts[1]
    lists = client.completions.create(
        model="tiny", prompt=[tokenizer.encode(p) for p in prompts], temperature=0, stream=True, echo=True
    )
    streamed = ["", ""]
    for chunk in lists:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def test_the_end_of_the_context_ends_an_answer(client: Any, chat_model: LanguageModel) -> None:
    answer = client.completions.create(
        model="tiny", prompt=[5] * (chat_model.context - 3), max_tokens=99, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4


# ---- Log-probabilities -----------------------------------------------------------------------------------


def test_chat_logprobs(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 8}
    choice = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 8
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert 0 < sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
    streamed = [
        entry
        for chunk in client.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_completion_logprobs(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 8}
    choice = client.completions.create(**options, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(8)]
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())
    offsets = [
        offset
        for chunk in client.completions.create(**options, logprobs=0, stream=True)
        for offset in chunk.choices[0].logprobs.text_offset
    ]
    assert offsets == logprobs.text_offset


# ---- Formats and tools -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_json_schema(client: Any, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=HI, seed=seed, response_format=form, max_tokens=60, n=2
    )
    for choice in answer.choices:
        animal = json.loads(choice.message.content)
        assert animal["kind"] in ("cat", "dog")
        assert 0 <= animal["age"] <= 99
        assert choice.finish_reason == "stop"


def test_json_object(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=HI,
        temperature=0,
        response_format={"type": "json_object"},
        max_tokens=200,
        logit_bias={"13": -100},
    )
    content = answer.choices[0].message.content
    assert content.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


def test_a_required_tool_is_called(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=1
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name in ("feed", "walk")
    assert json.loads(call.function.arguments)["kind"] in ("cat", "dog")


def test_a_named_tool_is_called_and_its_answer_understood(client: Any) -> None:
    choice = {"type": "function", "function": {"name": "walk"}}
    options: dict[str, Any] = {"model": "tiny", "tools": TOOLS, "seed": 2}
    chunks = list(client.chat.completions.create(messages=HI, tool_choice=choice, stream=True, **options))
    deltas = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(d.index, d.function.name) for d in deltas] == [(0, "walk")]
    assert json.loads(deltas[0].function.arguments)["kind"] in ("cat", "dog")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    call = {
        "id": deltas[0].id,
        "type": "function",
        "function": {"name": "walk", "arguments": '{"kind": "cat"}'},
    }
    conversation = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": deltas[0].id, "content": "done"},
    ]
    answer = client.chat.completions.create(messages=conversation, max_tokens=10, **options)
    assert answer.choices[0].message.content


def test_tools_that_are_not_called(client: Any, chat_model: LanguageModel) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 20}
    told = client.chat.completions.create(**options, tools=TOOLS)
    assert told.choices[0].message.content == chat_model.chat(HI, tools=TOOLS, max_new_tokens=20)
    assert told.choices[0].message.tool_calls is None
    not_told = client.chat.completions.create(**options, tools=TOOLS, tool_choice="none")
    assert not_told.choices[0].message.content == chat_model.chat(HI, max_new_tokens=20)


# ---- Other endpoints -------------------------------------------------------------------------------------


def test_models(client: Any, chat_model: LanguageModel) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.elutq == {"context_length": chat_model.context, "chat": True}
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")


def test_embeddings_are_refused_with_a_reason(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there are no embeddings"):
        client.embeddings.create(model="tiny", input="x")


def test_tokenize_and_detokenize(live: Any, chat_model: LanguageModel) -> None:
    tokens = httpx.post(live.url + "/tokenize", json={"prompt": "A dog.<|endoftext|>"}).json()
    assert tokens["tokens"] == chat_model.tokenizer.encode("A dog.<|endoftext|>")
    assert tokens["count"] == len(tokens["tokens"])
    text = httpx.post(live.url + "/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "A dog.<|endoftext|>"}
    conversation = httpx.post(live.url + "/tokenize", json={"messages": HI}).json()
    assert conversation["tokens"] == chat_model.tokenizer.encode_chat(HI)


# ---- Refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 100}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, None, "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            None,
        ),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x", "unsupported_parameter"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing_required_parameter"),
        ({"extra_body": {"best_of": 2}}, "best_of", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"tool_choice": "required"}, None, "invalid_value"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, None, "invalid_value"),
        ({"top_logprobs": 2}, None, "invalid_value"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
        ({"extra_body": {"chat_template_kwargs": {"messages": 1}}}, None, "invalid_value"),
    ],
)
def test_bad_fields_are_named(
    client: Any, change: dict[str, Any], param: str | None, code: str | None
) -> None:
    error = refused(client, **change)
    assert error.status_code == 400
    assert error.body["type"] == "invalid_request_error"
    assert error.body["param"] == param
    assert code in (None, error.body["code"])
    assert error.body["message"]


def test_null_is_the_default(client: Any) -> None:
    body = {"stop": None, "seed": None, "tools": None, "best_of": None, "user": "u", "metadata": {"a": "b"}}
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2, extra_body=body)
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"type": "string", "pattern": "(("}, {"$ref": "#/nowhere"}, {"not": {}}]
)
def test_a_schema_that_cannot_be_enforced(client: Any, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = refused(client, response_format=form)
    assert error.status_code == 400
    assert "JSON schema cannot be enforced" in error.body["message"]


def test_a_constraint_that_a_bias_contradicts(client: Any, chat_model: LanguageModel) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}}
    seven = chat_model.tokenizer.encode("7")[0]
    answer = client.chat.completions.create(
        model="tiny", messages=HI, response_format=form, logit_bias={str(seven): -100}
    )
    assert answer.choices[0].message.content == "7"


def test_the_context_overflows(client: Any, chat_model: LanguageModel) -> None:
    error = refused(client, messages=[{"role": "user", "content": "dog " * 2000}])
    assert error.status_code == 400
    assert error.body["code"] == "context_length_exceeded"
    assert str(chat_model.context) in error.body["message"]
    assert refused(client, "completions", prompt="dog " * 2000).body["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": ""}, "0 tokens"),
        ({"prompt": [[1], []]}, "0 tokens"),
        ({"prompt": [1, 99999]}, "not in the vocabulary"),
        ({"prompt": [1 << 70]}, "prompt"),
        ({"prompt": ["a"] * 100}, "100 answers"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"suffix": "x"}, "suffix is not supported"),
    ],
)
def test_bad_prompts(client: Any, change: dict[str, Any], words: str) -> None:
    error = refused(client, "completions", **change)
    assert error.status_code == 400
    assert words in error.body["message"]


def test_a_refused_prompt_takes_the_others_with_it(client: Any, live: Any) -> None:
    assert refused(client, "completions", prompt=[[1], [99999]]).status_code == 400
    live.wait_for("elutq_requests_running", 0)


def test_another_model(client: Any) -> None:
    error = refused(client, model="gpt-4")
    assert error.status_code == 404
    assert error.body["code"] == "model_not_found"


# ---- Together --------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_what_else_runs(client: Any, chat_model: LanguageModel) -> None:
    prompts = [f"Once there were {i} dogs" for i in range(12)]

    def ask(number: int) -> str:
        answer = client.completions.create(
            model="tiny", prompt=prompts[number], max_tokens=20 + number, seed=number
        )
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(12)))
    assert texts == [
        chat_model.generate(prompt, max_new_tokens=20 + i, temperature=1.0, seed=i)
        for i, prompt in enumerate(prompts)
    ]


def test_a_client_that_leaves_cancels_its_request(live: Any, client: Any, hold: Any) -> None:
    before = live.metric('elutq_requests_finished_total{reason="cancelled"}')
    hold.go.set()
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": "A",
        "max_tokens": 500,
        "extra_body": {"ignore_eos": True},
    }
    stream = client.completions.create(stream=True, **options)
    next(iter(stream))
    hold.go.clear()
    stream.close()
    hold.go.set()
    live.wait_for('elutq_requests_finished_total{reason="cancelled"}', before + 1)
    hold.go.clear()
    hold.reached.clear()
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(timeout=0.5, **options)
    assert hold.reached.is_set()
    hold.go.set()
    live.wait_for('elutq_requests_finished_total{reason="cancelled"}', before + 2)
    live.wait_for("elutq_requests_running", 0)


def test_ended_requests_do_not_wait_for_the_garbage_collector(client: Any) -> None:
    from elutq.server.job import Job

    gc.collect()
    gc.disable()
    try:
        for number in range(10):
            client.completions.create(model="tiny", prompt="A", max_tokens=2)
            for _ in client.completions.create(model="tiny", prompt="A", max_tokens=2 + number, stream=True):
                pass
        deadline = time.monotonic() + 10  # the server's side of a request ends a moment after the client's

        def jobs() -> int:
            return sum(type(thing) is Job for thing in gc.get_objects())  # isinstance would run others' code

        while jobs() > 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert jobs() <= 2  # of the last requests, perhaps
    finally:
        gc.enable()
