"""Calls of tools: the form by the template, the rule of what may be written, and reading it back whole and in pieces."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from glassformer.core.errors import InputError, SamplerError
from glassformer.infer import Constrained, ToolForm, generate
from glassformer.infer.constrain import ToolCall
from glassformer.text import train
from infer.fake import Bigram

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"$ref": "#/$defs/Days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"Days": {"enum": [1, 2]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
TEXT = 'The quick fox <tool_call> </tool_call> [TOOL_CALLS] {"name": "weather", "arguments": {"city": "Rome"}} naïve "parameters" 0123456789\n'
KINDS = ["hermes", "llama", "mistral", "args", "plain"]


@pytest.fixture(scope="module", params=["marks are text", "marks are tokens"])
def tokenizer(request):
    marks = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"] if request.param == "marks are tokens" else []
    marks += ["[ARGS]"] if marks else []
    return train("bpe", texts=[TEXT * 30], vocab_size=330, special=["<eos>", *marks])


def call(kind, name="weather", arguments='{"city": "Rome", "days": 1}'):
    if kind == "args":
        return f"[TOOL_CALLS]{name}[ARGS]{arguments}"
    return f'{{"name": "{name}", "{"parameters" if kind == "llama" else "arguments"}": {arguments}}}'


def written(kind, *calls):
    if kind == "hermes":
        return "\n".join(f"<tool_call>\n{c}\n</tool_call>" for c in calls)
    return f"[TOOL_CALLS] [{', '.join(calls)}]" if kind == "mistral" else "".join(calls) if kind == "args" else calls[0]


def ends(rule, tokenizer, text):
    """Whether the rule allows a text as a whole: True, or False for the beginning of one; None if it does not begin one."""
    link = Constrained(rule, tokenizer)
    try:
        place = link._matchers.at(np.array(tokenizer.encode(text), dtype=np.int64))
    except SamplerError:
        return None
    return None if place.over else place.may_end


# Which form


QWEN = "{%- if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools> return within <tool_call></tool_call> XML tags{% endif %}"
LLAMA = (
    '{%- if builtin_tools %}<|python_tag|>{%- endif %}{{- \'{"name": function name, "parameters": dictionary of argument name and its value}.\' }}'
    "{{- '{\"name\": \"' + tool_call.name + '\", ' }}{{- '\"parameters\": ' }}"
)
MISTRAL = "{%- if tools %}[AVAILABLE_TOOLS] {{ tools }}[/AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS] ["


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (QWEN, "hermes"),
        (LLAMA, "llama"),
        (MISTRAL, "mistral"),
        (MISTRAL + "[ARGS]", "args"),
        (MISTRAL + "[CALL_ID][ARGS]", "plain"),
        (QWEN + "<function=example>", "plain"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "plain"),
        ("", "plain"),
        (None, "plain"),
    ],
)
def test_the_form_by_the_template(template, kind):
    assert ToolForm.of(template) == ToolForm(kind)
    assert repr(ToolForm(kind)) == (f"ToolForm(kind={kind!r})" if kind != "plain" else "ToolForm()")


# The rule


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_rule_allows(kind, tokenizer):
    form, good, bad = ToolForm(kind), call(kind), call(kind, arguments='{"city": "Rome", "days": 3}')
    auto, required = form.constraint(TOOLS), form.constraint(TOOLS, "required")
    one = form.constraint(TOOLS, {"type": "function", "function": {"name": "now"}})
    for rule in (auto, required):
        assert ends(rule, tokenizer, written(kind, good)) is True
        assert ends(rule, tokenizer, written(kind, call(kind, "now", "{}"))) is True
        assert ends(rule, tokenizer, written(kind, bad)) is None
        assert ends(rule, tokenizer, written(kind, call(kind, "nothing"))) is None
        assert ends(rule, tokenizer, written(kind, good)[:-16]) is False
    assert ends(auto, tokenizer, "No call: {braces} and [brackets].\n") is True
    assert ends(auto, tokenizer, "") is True
    assert ends(required, tokenizer, "No call") is None
    assert ends(required, tokenizer, "") is False
    assert ends(one, tokenizer, written(kind, call(kind, "now", "{}"))) is True
    assert ends(one, tokenizer, written(kind, good)) is None
    if kind in ("hermes", "mistral", "args"):
        text = "Let me see. <tool " if kind == "hermes" else "Let me [TOOL see. "
        assert ends(auto, tokenizer, text + written(kind, good)) is True
        assert ends(auto, tokenizer, text + written(kind, bad)) is None
        assert ends(required, tokenizer, written(kind, good, good)) is True
        assert ends(form.constraint(TOOLS, "required", parallel=False), tokenizer, written(kind, good, good)) is None
        assert ends(form.constraint(TOOLS, parallel=False), tokenizer, written(kind, good)) is True
        assert ends(form.constraint(TOOLS, parallel=False), tokenizer, written(kind, good, good)) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["required", {"function": {"name": "weather"}}])
def test_whatever_the_model_a_required_call_is_read_back_and_valid(kind, choice, tokenizer):
    form = ToolForm(kind)
    rule = form.constraint(TOOLS, choice, parallel=False)
    for seed in range(4):
        out = generate(Bigram.random(tokenizer.vocab_size, seed), [[1], [2, 3]], tokenizer=tokenizer, constraint=rule, seed=seed, max_new_tokens=150)
        for row in out:
            assert row.finish_reason in ("stop", "eos")
            content, (made,) = form.parse(row.text)
            assert content is None
            assert made.name in ("weather", "now") if choice == "required" else made.name == "weather"
            assert made.values == {} if made.name == "now" else (len(made.values["city"]) <= 5 and made.values["days"] in (1, 2))


def test_auto_binds_at_the_mark_wherever_it_comes(tokenizer):
    table = torch.randn(tokenizer.vocab_size, tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    for a in tokenizer.encode("<tool_call>")[:1]:
        table[:, a] += 5.0
    for before, after in zip(tokenizer.encode("<tool_call>"), tokenizer.encode("<tool_call>")[1:], strict=False):
        table[before, after] += 30.0
    table[:, tokenizer.eos_id] += 3.0
    form, calls = ToolForm("hermes"), 0
    for seed in range(6):
        out = generate(Bigram(table), [1], tokenizer=tokenizer, constraint=form.constraint(TOOLS), seed=seed, max_new_tokens=300)
        content, found = form.parse(out.text)
        calls += len(found)
        if out.finish_reason != "length":
            assert out.text.count("<tool_call>") == out.text.count("</tool_call>") == len(found)
            assert "<tool_call>" not in (content or "")
    assert calls > 3


def test_nothing_to_rule():
    assert ToolForm().constraint(TOOLS, "none") is None
    assert ToolForm().constraint([]) is None
    assert ToolForm().constraint(TOOLS, None) == ToolForm().constraint(TOOLS, "auto")
    assert repr(ToolForm("hermes").constraint(TOOLS)) == "Calls('hermes', ['weather', 'now'], text=True, parallel=True)"


@pytest.mark.parametrize(
    ("tools", "choice", "why"),
    [
        ({"name": "f"}, "auto", "tools is a list of functions"),
        ("f", "auto", "tools is a list of functions"),
        ([{"type": "retrieval"}], "auto", r"tools\[0\] is no function: only"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", r"tools\[0\] has the name 'a b': a function's name is 1 to 128"),
        ([{"type": "function", "function": "f"}], "auto", r"tools\[0\] has the name None"),
        ([{"name": "f", "parameters": {"type": "string"}}], "auto", r"The parameters of tools\[0\] \(f\) are a JSON schema of type 'object'"),
        ([{"name": "f"}, {"name": "f"}], "auto", r"tools\[1\] is the second function named 'f'"),
        (TOOLS, "sometimes", "tool_choice is 'auto', 'none', 'required' or .* but 'sometimes' was given"),
        (TOOLS, {"type": "function", "function": {"name": "g"}}, "tool_choice asks for the function 'g', but tools has weather, now"),
        ([], "required", "tool_choice is 'required', but there are no tools"),
    ],
)
def test_what_is_no_tool_and_no_choice(tools, choice, why):
    with pytest.raises(InputError, match=why):
        ToolForm().constraint(tools, choice)


def test_a_schema_of_arguments_that_cannot_be_met_is_told(tokenizer):
    rule = ToolForm().constraint([{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integre"}}}}])
    with pytest.raises(SamplerError, match="The form of tool calls cannot be used: properties.a.type is 'integre'. Did you mean 'integer'"):
        Constrained(rule, tokenizer)


# Reading


ARGUMENTS = '{"city": "R{o}m\\"]"}'
READ = [
    ("hermes", "Hi.", ("Hi.", [])),
    ("hermes", "", ("", [])),
    ("hermes", f"Hi.\n<tool_call>\n{call('hermes', arguments=ARGUMENTS)}\n</tool_call>", ("Hi.", [ToolCall("weather", ARGUMENTS)])),
    ("hermes", written("hermes", call("h", "a", "{}"), call("h", "b", "{}")), (None, [ToolCall("a", "{}"), ToolCall("b", "{}")])),
    ("hermes", 'a <tool_call>\n{"name": "f"', ('a <tool_call>\n{"name": "f"', [])),
    ("hermes", "a <tool_call> b", ("a <tool_call> b", [])),
    ("hermes", '<tool_call>{"x": 1}</tool_call>', ('<tool_call>{"x": 1}</tool_call>', [])),
    ("hermes", "a <tool_", ("a <tool_", [])),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', (None, [ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")])),
    ("mistral", 'Well. [TOOL_CALLS] [{"name": "f", "arguments": {}}]', ("Well.", [ToolCall("f", "{}")])),
    ("mistral", "[TOOL_CALLS] [1]", ("[TOOL_CALLS] [1]", [])),
    ("args", 'Well. [TOOL_CALLS]f[ARGS]{"a": {"b": 1}}[TOOL_CALLS]g.h[ARGS]{}', ("Well.", [ToolCall("f", '{"a": {"b": 1}}'), ToolCall("g.h", "{}")])),
    ("args", "[TOOL_CALLS]f[ARGS]{", ("[TOOL_CALLS]f[ARGS]{", [])),
    ("args", "[TOOL_CALLS]f [A", ("[TOOL_CALLS]f [A", [])),
    ("args", "[TOOL_CALLS]f[A", ("[TOOL_CALLS]f[A", [])),
    ("args", "[TOOL_CALLS]f[ARGS][1]", ("[TOOL_CALLS]f[ARGS][1]", [])),
    ("llama", '{"name": "f", "parameters": {"a": "é"}}', (None, [ToolCall("f", '{"a": "é"}')])),
    ("llama", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', (None, [ToolCall("f", "{}"), ToolCall("g", "{}")])),
    ("llama", '{"answer": 1}', ('{"answer": 1}', [])),
    ("plain", '\n{"name": "f", "arguments": "{\\"a\\": 2}"}\n', (None, [ToolCall("f", '{"a": 2}')])),
    ("plain", '[{"name": "f", "arguments": {}}, {"name": "g"}]', (None, [ToolCall("f", "{}"), ToolCall("g", "{}")])),
    ("plain", 'It is {"name": "f", "arguments": {}}', ('It is {"name": "f", "arguments": {}}', [])),
    ("plain", '{"name": "f", "arguments": {}', ('{"name": "f", "arguments": {}', [])),
    ("plain", '{"name": "f", "arguments": "x"}', ('{"name": "f", "arguments": "x"}', [])),
]


@pytest.mark.parametrize(("kind", "text", "said"), READ)
def test_what_an_answer_says(kind, text, said):
    assert ToolForm(kind).parse(text) == said


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(READ), st.data())
def test_read_in_pieces_is_read_whole(case, data):
    kind, text, (content, calls) = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parser = ToolForm(kind).parser()
    parts = [part for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for part in parser.push(text[a:b])] + parser.flush()
    assert [p for p in parts if isinstance(p, ToolCall)] == calls
    assert "".join(p for p in parts if isinstance(p, str)).strip() == (content or "").strip()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.text(alphabet='<tol_cal>/[TOCS]{"name":,} \n', max_size=60))
def test_text_of_any_kind_is_read_and_nothing_but_calls_is_lost(kind, text):
    content, calls = ToolForm(kind).parse(text)
    assert calls or content == text


def test_text_is_given_out_as_soon_as_it_is_certain():
    parser = ToolForm("hermes").parser()
    assert parser.push("Let me <to") == ["Let me "]
    assert parser.push("day") == ["<today"]
    assert parser.push("<tool_call>\n{") == []
    assert parser.push('"name": "f", "arguments": {}}\n</tool_call>') == [ToolCall("f", "{}")]
    assert parser.push("\n") == [] and parser.flush() == []
    assert ToolForm("plain").parser().push("Well, ") == ["Well, "]
    assert json.loads(ToolCall("f", '{"a": 1}').arguments) == ToolCall("f", '{"a": 1}').values


def test_a_template_shows_tools_or_the_system_message_does():
    assert all(ToolForm.shown_by(t) for t in (QWEN, MISTRAL)) and not ToolForm.shown_by("Our tools: {{ messages }}") and not ToolForm.shown_by(None)
    for kind in KINDS:
        text = ToolForm(kind).instructions(TOOLS)
        assert '{"name": "weather", "description": "The weather.", "parameters": {"type": "object"' in text and '\n{"name": "now"}\n' in text
        assert (ToolForm(kind).mark or "{") in text.splitlines()[-1] + text.splitlines()[-3]
