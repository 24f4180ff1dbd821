"""Chat templates: the ids of the reference library, errors that people understand, and templates that mean harm."""
# ruff: noqa: E501  (templates are long lines)

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glassformer.core.errors import TokenizerError
from glassformer.text import Tokenizer, train
from glassformer.text.chat import ChatTemplate, template_in_config

CHATML = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- if messages[0].role == 'system' %}\n        {{- messages[0].content + '\\n\\n' }}\n    {%- endif %}\n"
    "    {{- '# Tools\\n<tools>' }}\n    {%- for tool in tools %}\n        {{- '\\n' }}\n        {{- tool | tojson }}\n    {%- endfor %}\n"
    "    {{- '\\n</tools><|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- set ns = namespace(n=0) %}\n{%- for message in messages %}\n    {%- if message.role == 'tool' %}{% continue %}{% endif %}\n    {%- set ns.n = ns.n + 1 %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content | default('') }}{% endgeneration %}{{ '<|im_end|>\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}\n{%- endif %}\n"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{- bos_token }}\n{%- set date_string = date_string if date_string is defined else '26 Jul 2024' %}\n{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
MISTRAL = (
    "{%- set user_messages = messages | selectattr('role', 'equalto', 'user') | list %}\n{{- bos_token }}\n{%- for message in messages %}\n"
    "    {%- if message['role'] == 'user' %}\n        {%- if tools is not none and message == user_messages[-1] %}\n            {{- '[AVAILABLE_TOOLS] [' }}\n"
    "            {%- for tool in tools %}\n                {%- set tool = tool.function %}\n                {{- '{\"type\": \"function\", \"function\": {' }}\n"
    "                {%- for key, val in tool.items() if key != 'return' %}\n                    {%- if val is string %}\n                        {{- '\"' + key + '\": \"' + val + '\"' }}\n"
    "                    {%- else %}\n                        {{- '\"' + key + '\": ' + val | tojson }}\n                    {%- endif %}\n                    {%- if not loop.last %}{{ ', ' }}{% endif %}\n"
    "                {%- endfor %}\n                {{- '}}' }}\n                {{- ', ' if not loop.last else ']' }}\n            {%- endfor %}\n            {{- '[/AVAILABLE_TOOLS]' }}\n        {%- endif %}\n"
    "        {{- '[INST] ' + message['content'] + '[/INST]' }}\n    {%- elif message['role'] == 'assistant' %}\n        {%- if message.tool_calls is defined %}\n"
    "            {{- '[TOOL_CALLS] ' + (message.tool_calls | map(attribute='function') | list | tojson(indent=None)) + eos_token }}\n        {%- else %}\n"
    "            {{- ' ' + message['content'] + eos_token }}\n        {%- endif %}\n    {%- else %}\n        {{- raise_exception('Only user and assistant roles are supported!') }}\n    {%- endif %}\n{%- endfor %}\n"
)  # fmt: skip

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TALK = [
    {"role": "user", "content": 'Hi <b>you</b> & "me" \'é 日本'},
    {"role": "assistant", "content": "Hello!  "},
    {"role": "user", "content": "  And now?\n"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "<é>", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
]


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return train("bytes", special=SPECIAL, roles={"bos": "<s>", "eos": "</s>"})


def talking(plain: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(plain.library, plain.given_roles, chat_template=template)


@pytest.mark.parametrize(
    ("template", "messages", "extra"),
    [
        (CHATML, SYSTEM, {}),
        (CHATML, SYSTEM, {"tools": TOOLS}),
        (CHATML, TALK, {"enable_thinking": False}),
        (CHATML, [*TALK, {"role": "tool", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": []}], {}),
        (CHATML, TALK[:2], {"continue_final_message": True, "add_generation_prompt": False}),
        (LLAMA_2, SYSTEM, {}),
        (LLAMA_2, TALK[:2], {"continue_final_message": True, "add_generation_prompt": False}),
        (LLAMA_3, SYSTEM, {}),
        (LLAMA_3, SYSTEM, {"add_generation_prompt": False, "date_string": "today"}),
        (MISTRAL, TALK, {"tools": TOOLS}),
        (MISTRAL, [TALK[0], {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}]}], {}),
    ],
)
def test_the_ids_are_those_of_transformers(plain: Tokenizer, template: str, messages: list[dict[str, Any]], extra: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=plain.library, bos_token="<s>", eos_token="</s>", chat_template=template)
    ours = talking(plain, template)
    before = json.dumps(messages)
    asked = {"add_generation_prompt": True, **extra}
    text = theirs.apply_chat_template(messages, tokenize=False, **asked)
    assert ours.chat_text(messages, **extra) == text
    assert ours.chat(messages, **extra) == theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **asked)
    assert json.dumps(messages) == before
    assert len(text) > 20


def test_a_date_and_documents_reach_the_template() -> None:
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(TALK)) == 10
    text = ChatTemplate("{% for d in documents %}{{ d.title }}={{ d['text'] }};{% endfor %}").render(TALK, documents=[{"title": "a", "text": "<b>"}])
    assert text == "a=<b>;"
    assert ChatTemplate("{{ messages[0].content[0].text }}").render([{"role": "user", "content": [{"type": "text", "text": "in parts"}]}]) == "in parts"
    assert ChatTemplate("{{ messages[0].reasoning_content }}").render([{"role": "assistant", "content": "x", "thinking": "hm"}]) == "hm"


def test_the_template_is_saved_and_loaded(plain: Tokenizer, tmp_path: Path) -> None:
    tokenizer = talking(plain, CHATML)
    tokenizer.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML
    again = Tokenizer.load(tmp_path)
    assert again.chat_template == CHATML
    assert again.chat(TALK) == tokenizer.chat(TALK)
    assert pickle.loads(pickle.dumps(again)).chat_template == CHATML
    transformers = pytest.importorskip("transformers")
    opened = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert opened.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False) == tokenizer.chat(TALK)


def test_a_template_of_a_hugging_face_config_counts(plain: Tokenizer, tmp_path: Path) -> None:
    plain.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for entry, expected in (
        (CHATML, CHATML),
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": LLAMA_3}], LLAMA_3),
        ([{"name": "rag", "template": LLAMA_2}], LLAMA_2),
        ([{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}], None),
        ({"default": MISTRAL, "x": "y"}, MISTRAL),
        (7, None),
    ):
        assert template_in_config({"chat_template": entry}) == expected
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": entry}))
        assert Tokenizer.load(tmp_path).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ 1 }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8.*copy it again"):
        Tokenizer.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"a" * (5 << 20))
    with pytest.raises(TokenizerError, match=r"5,242,880 bytes, and a chat template has a few thousand"):
        Tokenizer.load(tmp_path)


def test_without_a_template_it_says_what_to_do(plain: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"no chat template: .*Encode plain text.*chat_template\.jinja beside tokenizer\.json"):
        plain.chat(TALK)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "has no message: give at least one"),
        ("Hi", "a conversation is a list of messages.*this is of type str"),
        ({"role": "user", "content": "Hi"}, "a conversation is a list of messages.*of type dict"),
        (["Hi"], "message 0 is of type str, not a message"),
        ([TALK[0], {"content": "Hi"}], r"message 1 has no 'role' that says who speaks \(it has only 'content'\): write 'system', 'user'"),
        ([{"role": 3, "content": "Hi"}], r"its role is of type int"),
        ([{"role": "user"}], "message 0 of the user has no 'content': give the text, or ''"),
        ([{"role": "user", "content": 5}], r"the content of message 0 \(user\) is of type int, not text"),
        ([{"role": "user", "content": ["Hi"]}], r"the content of message 0 \(user\) is of type list, not text"),
        ([{"role": "user", "content": [{"text": 5}]}], r"'text' that is of type int"),
        ([{"role": "user", "content": "a", "image": object()}], "message 0 holds of type object, and a chat template takes str"),
        ([{"role": "narrator", "content": "Hi"}], "the chat template refuses these messages: Only user and assistant roles are supported!"),
    ],
)
def test_messages_that_are_none_are_refused_in_words(plain: Tokenizer, messages: Any, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        talking(plain, MISTRAL).chat(messages)


def test_other_arguments_are_checked_too() -> None:
    template = ChatTemplate(LLAMA_3, {"bos_token": "<s>"})
    with pytest.raises(TokenizerError, match="tools is a list of dicts, each the JSON schema of a function, and this is of type dict"):
        template.render(TALK, tools={"a": 1})  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="goes on with the last message, add_generation_prompt=True begins another"):
        template.render(TALK, continue_final_message=True)
    with pytest.raises(TokenizerError, match="no text to go on with"):
        template.render([{"role": "assistant", "tool_calls": []}], continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(TokenizerError, match="leaves the last message out"):
        ChatTemplate("{{ messages[0].content }}").render(TALK, continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(TokenizerError, match=r"no Jinja template: line 2 \('{% if %}'\).*Copy the file again"):
        ChatTemplate("{{ 1 }}\n{% if %}")
    with pytest.raises(TokenizerError, match="reads what these messages lack: .*'name'"):
        ChatTemplate("{{ messages[0].name.first }}").render(TALK)
    with pytest.raises(TokenizerError, match="failed with TypeError"):
        ChatTemplate("{{ 1 + 'a' }}").render(TALK)
    with pytest.raises(TokenizerError, match="alternate user/assistant"):
        ChatTemplate(LLAMA_2, {"bos_token": "", "eos_token": ""}).render([TALK[0], TALK[0]])


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ (messages | attr('__class__')).__name__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ ('a' * 10**10) | length }}",
    "{{ ([0] * 10**10) | length }}",
    "{{ 10**(10**10) }}",
    "{{ 'a'.ljust(10**12) | length }}",
    "{{ '%999999999999d' % 1 }}",
    "{{ '%999999999999d' | format(1) }}",
    "{{ '{:>999999999999}'.format('a') }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set ns = namespace(x=3**99) %}{% for i in range(45) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set x = 'a' * 10**6 %}{{ ([x] * 10**6) | join | length }}",
    "{% set x = 'a' * 10**6 %}{{ x.join([x] * 10**6) | length }}",
    "{% set x = 'a' * 10**6 %}{{ x | replace('a', x) | length }}",
    "{% set x = 'a' * 10**6 %}{{ x.replace('a', x) | length }}",
    "{{ ('a\\n' * 10**6) | indent(10**6) | length }}",
    "{{ ('a b ' * 10**6) | wordwrap(1, wrapstring='b' * 10**6) | length }}",
    "{{ [[1]] | tojson(indent=900000000) | length }}",
    "{{ ([1] * 10**6) | tojson(indent='a' * 10**6) | length }}",
    "{{ ([1] * 10**6) | tojson(separators=('a' * 10**6, ':')) | length }}",
    "{{ range(99999) | map('center', 999999) | list | length }}",
    "{{ range(99999) | slice(10**9) | list | length }}",
    "{{ [1] | batch(10**9, 0) | list | length }}",
    "{{ ('\\t' * 10**6).expandtabs(10**6) | length }}",
    "{{ ('%(a)s' * 10**6) | format(a='a' * 10**6) | length }}",
    "{{ ('{0}' * 10**6).format('a' * 10**6) | length }}",
    "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) | length }}",
    "{{ (5).to_bytes(10**10, 'big') | length }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "{% set y %}{% for i in range(99999) %}" + "a" * 100_000 + "{% endfor %}{% endset %}{{ y | length }}",
    "{% set x = 'a' * 10**7 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
]

# What is counted or added item by item takes time in proportion to the bound, or more: `{{ ns.x }}` above has all of it, these a tenth.
COUNTED = [
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson | length }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ (ns.x | string) | length }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ raise_exception(ns.x) }}",
    "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "{{ ([[1] * 10**5] * 10**5) | sum(start=[]) | length }}",
]


@pytest.fixture(scope="module")
def ended() -> dict[str, Any]:
    """How each of them ended, in a process of its own that may take six gigabytes of addresses and no more: its seconds, its error; and the most memory."""
    code = (
        "import json, resource, sys, time; sys.path[:0] = sys.argv[1:]; import test_chat as t; from glassformer.text import chat\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "ended, longest = {}, chat.LONGEST\n"
        "for source in t.HOSTILE + t.COUNTED:\n"
        "    print(json.dumps(source), flush=True)\n"
        "    chat.LONGEST = longest // 10 if source in t.COUNTED else longest\n"
        "    begun, error = time.monotonic(), None\n"
        "    try: t.ChatTemplate(source).render([{'role': 'user', 'content': 'Hi'}])\n"
        "    except t.TokenizerError as one: error = str(one)\n"
        "    except BaseException as one: error = f'{type(one).__name__}, which is no TokenizerError: {one}'[:500]\n"
        "    ended[source] = time.monotonic() - begun, error\n"
        "print(json.dumps({'each': ended, 'most': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    begun = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"exit code {done.returncode} in {begun[-1:]}: {done.stderr[-2000:]}"
    return begun[-1]


@pytest.mark.slow
@pytest.mark.parametrize("source", HOSTILE + COUNTED)
def test_a_template_that_means_harm_is_stopped(ended: dict[str, Any], source: str) -> None:
    seconds, error = ended["each"][source]
    assert error is not None, "let through"
    assert "which is no TokenizerError" not in error
    assert re.search(r"does what no template may|reads what these messages lack|failed with OverflowError|no Jinja template", error)
    assert "MemoryError" not in error
    assert seconds < (6 if source in COUNTED else 60)


@pytest.mark.slow
def test_what_is_bounded_stays_small_in_memory(ended: dict[str, Any]) -> None:
    assert len(ended["each"]) == len(HOSTILE) + len(COUNTED)
    assert ended["most"] < 3 << 20, f"{ended['most']:,} kB"


def test_long_conversations_are_far_from_every_bound() -> None:
    """Two million characters in a thousand messages, with what templates do to each."""
    template = ChatTemplate(
        "{% macro say(m) %}{{ m.role + ': ' + m.content | trim ~ '\\n' }}{% endmacro %}{% set sep = joiner(', ') %}{% set odd = cycler('a', 'b') %}"
        "{% for m in messages[1:] %}{{ say(m) }}{{ m.content.split('.')[-1].replace('x', 'y') }}{{ m | tojson(indent=4) | length }}{{ sep() }}{{ odd.next() }}{% endfor %}"
    )
    text = template.render([{"role": "user", "content": "x" * 2_000}] * 1_000)
    assert text.count("user: xxx") == 999 and text.count(", ") == 998 and text.endswith("a")


def test_joiners_and_cyclers_are_there(plain: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    template = (
        "{% set c = cycler('x', 'y') %}{% set j = joiner('|') %}{% for m in messages %}{{ j() }}{{ c.next() }}{{ m.content[1:3] ~ 1 ~ none }}{% endfor %}"
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=plain.library, chat_template=template)
    assert ChatTemplate(template).render(TALK) == theirs.apply_chat_template(TALK, tokenize=False)


def test_entries_that_are_none_are_as_the_reference_has_them(plain: Tokenizer) -> None:
    """It leaves them out before the template sees them."""
    transformers = pytest.importorskip("transformers")
    template = (
        "{% for m in messages %}{% if m['content'] is none %}none{% elif m['content'] is defined %}{{ m['content'] }}{% else %}absent{% endif %}{% endfor %}"
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=plain.library, chat_template=template)
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": None}}]}]
    assert ChatTemplate(template).render(talk) == theirs.apply_chat_template(talk, tokenize=False)


def test_what_needs_a_file_or_an_import_is_stopped() -> None:
    for source in ("{% include '/etc/hostname' %}", "{% import 'os' as os %}", "{% extends 'base' %}"):
        with pytest.raises(TokenizerError):
            ChatTemplate(source).render(TALK)
    with pytest.raises(TokenizerError, match="RecursionError"):
        ChatTemplate("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").render(TALK)
