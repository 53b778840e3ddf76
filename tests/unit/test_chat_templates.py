"""Chat templates with the features of those that well-known models bring, against transformers."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from elutq.errors import InvalidArgumentError, TokenizerError
from elutq.models import bundled_model
from elutq.tokenizer import Tokenizer

LLAMA_3_STYLE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "1 Jan 2025" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- if tools is not none and messages | length != 0 %}
    {%- set first = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- 'Answer with {"name": function, "parameters": its arguments}.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
QWEN_STYLE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n<tool_call>\\n{\\"name\\": ..., \\"arguments\\": ...}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(asking=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.asking and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>')) %}
        {%- set ns.asking = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}
            {%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL_STYLE = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set plain_messages = loop_messages | rejectattr("role", "equalto", "tool") | list %}
{%- for message in plain_messages | rejectattr("tool_calls", "defined") %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" }}
        {%- else %}{{- "[INST] " }}{%- endif %}
        {{- message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- (call.function | tojson)[:-1] }}{{- ', "id": "' + call.id[:9] + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with a system message first") }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"llama 3": LLAMA_3_STYLE, "qwen": QWEN_STYLE, "mistral": MISTRAL_STYLE}
SYSTEM = {"role": "system", "content": "  Be <brief> & kind: 'é'.\n"}
USER = {"role": "user", "content": "Hi <there> 👋"}
ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello "}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call_123456789",
            "type": "function",
            "function": {"name": "now", "arguments": {"zone": "é<&", "n": [1, 2.5, None, True]}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_123456789", "content": '{"time": "12:00"}'}
CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "And\n\nnow?"}],
    "answered": [USER, ANSWER],
    "call": [USER, CALL, RESULT],
    "calls": [SYSTEM, USER, CALL, RESULT, RESULT, ANSWER, USER],
    "thought": [USER, {"role": "assistant", "content": "Yes", "reasoning_content": "\nHm.\n"}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells <b>é</b>.",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": []},
        },
    }
    for name in ("now", "then")
]


def chat_folder(path: Path, template: str | None) -> Path:
    shutil.copytree(bundled_model(), path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_by_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(tmp_path / "model", TEMPLATES[name])
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    cases = itertools.product(
        CONVERSATIONS.values(),
        (None, TOOLS),
        ({}, {"enable_thinking": False}, {"date_string": "26 Jul 2024"}),
        (True, False),
    )
    rendered = 0
    for messages, tools, variables, prompt in cases:
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, **variables}
        refusal = None
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            refusal = str(error)
        if refusal is not None:
            with pytest.raises(InvalidArgumentError, match=re.escape(refusal)):
                ours.apply_chat_template(messages, **options)
            continue
        assert ours.apply_chat_template(messages, **options) == expected
        ids = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert ours.encode_chat(messages, **options) == ids
        rendered += 1
    assert rendered >= 60


def test_a_model_without_a_template(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(tmp_path / "model", None)
    with pytest.raises(ValueError, match="chat_template is not set"):
        transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template([USER])
    with pytest.raises(TokenizerError, match="has no chat template"):
        Tokenizer.from_folder(folder).apply_chat_template([USER])


def test_the_formats_of_calls_are_recognized() -> None:
    from elutq.server.tools import HERMES, LLAMA, tool_format

    assert tool_format(LLAMA_3_STYLE) is LLAMA
    assert tool_format(QWEN_STYLE) is HERMES
    assert tool_format(MISTRAL_STYLE) is None


def test_messages_of_the_api_become_messages_of_templates() -> None:
    pytest.importorskip("fastapi")
    from elutq.server.chat import template_messages
    from elutq.server.schemas import Message

    call = json.loads(json.dumps(CALL))
    call["tool_calls"][0]["function"]["arguments"] = json.dumps(
        CALL["tool_calls"][0]["function"]["arguments"]
    )
    sent = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {**call, "content": None, "refusal": None},
        {**RESULT, "name": "now"},
    ]
    expected = [
        {"role": "system", "content": "ab"},
        {key: value for key, value in CALL.items() if key != "content"},
        {**RESULT, "name": "now"},
    ]
    assert template_messages([Message.model_validate(message) for message in sent]) == expected
