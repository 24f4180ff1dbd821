"""The official client against a real server: what it gets is what ``generate`` gives."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import glassformer as gf
from web import serving

HELLO = [{"role": "user", "content": "Hello, old friend"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": False},
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.running(serving.loaded()) as made:
        yield made


def generated(prompt: Any, **options: Any) -> Any:
    what = serving.loaded()
    return gf.generate(what.model, prompt, tokenizer=what.tokenizer, **options)


# Texts


def test_the_model_is_listed(server: serving.Running) -> None:
    assert [m.id for m in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "glassformer"


def test_a_completion_is_what_generate_gives(server: serving.Running) -> None:
    got = server.client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=12, temperature=0)
    want = generated("Once upon a time", max_new_tokens=12)
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == "length"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(want.prompt_ids), 12)


def test_a_seed_draws_what_generate_draws_and_repeats(server: serving.Running) -> None:
    ask = {"model": "tiny", "prompt": "It was the", "max_tokens": 10, "temperature": 0.9, "seed": 11, "extra_body": {"top_k": 50, "min_p": 0.01}}
    first, second = (server.client.completions.create(**ask).choices[0].text for _ in range(2))
    assert first == second == generated("It was the", max_new_tokens=10, temperature=0.9, top_k=50, min_p=0.01, seed=11).text


def test_nothing_said_draws_from_the_models_own_distribution(server: serving.Running) -> None:
    ids = generated("Once", max_new_tokens=16, temperature=1.0, seed=5).ids
    got = server.client.completions.create(model="tiny", prompt="Once", seed=5)
    assert got.usage.completion_tokens == 16 == len(ids)
    assert got.choices[0].text == generated("Once", max_new_tokens=16, temperature=1.0, seed=5).text


def test_a_stream_joins_to_the_whole(server: serving.Running) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "The sea", "max_tokens": 20, "seed": 4}
    whole = server.client.completions.create(**ask).choices[0]
    chunks = list(server.client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20
    assert all(c.usage is None for c in chunks[:-1])


def test_prompts_and_n_give_as_many_choices_in_order(server: serving.Running) -> None:
    got = server.client.completions.create(model="tiny", prompt=["One", "Two", [5, 6, 7]], n=2, max_tokens=6, seed=3)
    assert [c.index for c in got.choices] == list(range(6))
    alone = server.client.completions.create(model="tiny", prompt="Two", n=2, max_tokens=6, seed=3)
    assert [c.text for c in got.choices[2:4]] == [c.text for c in alone.choices]
    assert alone.choices[0].text != alone.choices[1].text
    streamed = dict.fromkeys(range(6), "")
    for chunk in server.client.completions.create(model="tiny", prompt=["One", "Two", [5, 6, 7]], n=2, max_tokens=6, seed=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [c.text for c in got.choices]


def test_stop_strings_cut_and_say_so(server: serving.Running) -> None:
    whole = generated("The sea", max_new_tokens=20).text
    stop = whole[8:11]
    for extra in ({"stop": [stop, "never comes"]}, {"extra_body": {"stop_strings": stop}}):
        got = server.client.completions.create(model="tiny", prompt="The sea", max_tokens=20, temperature=0, **extra).choices[0]
        assert got.text == whole[: whole.find(stop)]
        assert got.finish_reason == "stop"


def test_ids_that_end_an_answer(server: serving.Running) -> None:
    ids = generated("The sea", max_new_tokens=6).ids
    got = server.client.completions.create(model="tiny", prompt="The sea", max_tokens=20, temperature=0, extra_body={"stop_token_ids": [ids[3]]})
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.completion_tokens == ids.index(ids[3]) + 1


def test_logprobs_of_a_completion(server: serving.Running) -> None:
    got = server.client.completions.create(model="tiny", prompt="The sea", max_tokens=5, temperature=0, logprobs=2, echo=True).choices[0]
    want = generated("The sea", max_new_tokens=5, logprobs=2)
    n = len(want.prompt_ids)
    assert got.logprobs.token_logprobs[0] is None
    assert got.logprobs.token_logprobs[n:] == pytest.approx(want.logprobs, abs=1e-4)
    assert got.logprobs.top_logprobs[n][want.top[0][0].text] == pytest.approx(want.top[0][0].logprob, abs=1e-4)
    assert len(got.logprobs.tokens) == len(got.logprobs.text_offset) == n + 5
    assert got.text.startswith("The sea")
    for token, at in zip(got.logprobs.tokens, got.logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or got.text[at:].startswith(token)


def test_a_prompts_own_logprobs_without_an_answer(server: serving.Running) -> None:
    model = serving.loaded().model
    ids = serving.tokenizer().encode("The sea was calm")
    import torch

    logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    want = [logp[i, t].item() for i, t in enumerate(ids[1:])]
    got = server.client.completions.create(model="tiny", prompt="The sea was calm", max_tokens=0, logprobs=0, echo=True)
    assert got.choices[0].logprobs.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
    assert got.choices[0].text == "The sea was calm"
    assert got.usage.completion_tokens == 0


def test_logit_bias_by_id_rules(server: serving.Running) -> None:
    token = serving.tokenizer().encode(" whale")[0]
    got = server.client.completions.create(model="tiny", prompt="The", max_tokens=4, temperature=0, logit_bias={str(token): 100}, logprobs=0)
    assert got.choices[0].logprobs.tokens == [serving.tokenizer().decode([token])] * 4


# Chats


def test_a_chat_is_the_template_and_generate(server: serving.Running) -> None:
    got = server.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, temperature=0)
    want = generated(serving.loaded().chat(HELLO), max_new_tokens=9)
    assert got.choices[0].message.content == want.text
    assert got.choices[0].message.role == "assistant"
    assert got.usage.prompt_tokens == len(want.prompt_ids)


def test_a_chat_without_a_limit_ends_where_the_context_does(server: serving.Running) -> None:
    got = server.client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    assert got.choices[0].finish_reason == "length"
    assert got.usage.total_tokens == server.served.context + 1


def test_content_in_parts_is_text(server: serving.Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "old friend"}]}]
    one, two = (server.client.chat.completions.create(model="tiny", messages=m, max_tokens=4, temperature=0) for m in (HELLO, parts))
    assert one.choices[0].message.content == two.choices[0].message.content


def test_logprobs_of_a_chat(server: serving.Running) -> None:
    got = server.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    want = generated(serving.loaded().chat(HELLO), max_new_tokens=4, logprobs=3)
    content = got.logprobs.content
    assert [t.logprob for t in content] == pytest.approx(want.logprobs, abs=1e-4)
    assert [[c.logprob for c in t.top_logprobs] for t in content] == [pytest.approx([c.logprob for c in top], abs=1e-4) for top in want.top]
    assert b"".join(bytes(t.bytes) for t in content) == serving.tokenizer().decode_bytes(want.ids)
    streamed = server.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3, stream=True)
    tokens = [t for c in streamed if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in tokens] == [t.token for t in content]


def test_a_streamed_chat_joins_to_the_whole(server: serving.Running) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 8, "n": 2}
    whole = server.client.chat.completions.create(**ask)
    texts, ends = ["", ""], [None, None]
    for chunk in server.client.chat.completions.create(**ask, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [c.message.content for c in whole.choices]
    assert ends == ["length", "length"]


def test_the_asynchronous_client(server: serving.Running) -> None:
    async def both() -> list[str]:
        async with server.asynchronous as client:
            answers = await asyncio.gather(*(client.completions.create(model="tiny", prompt="One", max_tokens=5, seed=s) for s in (1, 2, 1)))
        return [a.choices[0].text for a in answers]

    one, two, again = asyncio.run(both())
    assert one == again != two


# Forms


def test_json_by_a_schema(server: serving.Running) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}, "ok": {"type": "boolean"}}, "required": ["n", "ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in (1, 2):
        got = server.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=60, seed=seed, response_format=form).choices[0]
        value = json.loads(got.message.content)
        assert set(value) == {"n", "ok"}
        assert value["n"] in (1, 2, 3)
        assert got.finish_reason == "stop"


def test_any_json_object(server: serving.Running) -> None:
    got = server.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, seed=1, response_format={"type": "json_object"})
    assert got.choices[0].message.content.lstrip().startswith("{")


def test_a_pattern_and_choices(server: serving.Running) -> None:
    got = server.client.completions.create(model="tiny", prompt="Year:", max_tokens=30, seed=1, extra_body={"regex": "[0-9]{4}"})
    assert got.choices[0].text.isdigit()
    assert len(got.choices[0].text) == 4
    got = server.client.completions.create(model="tiny", prompt="Yes?", max_tokens=30, seed=1, extra_body={"choices": ["yes", "no"]})
    assert got.choices[0].text in ("yes", "no")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(server: serving.Running, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 90, "seed": 2, "tools": [WEATHER], "tool_choice": "required"}
    if not stream:
        choice = server.client.chat.completions.create(**ask, parallel_tool_calls=False).choices[0]
        (call,), reason = choice.message.tool_calls, choice.finish_reason
    else:
        chunks = [c.choices[0] for c in server.client.chat.completions.create(**ask, parallel_tool_calls=False, stream=True)]
        (call,) = [t for c in chunks for t in c.delta.tool_calls or []]
        reason = chunks[-1].finish_reason
        assert not any(c.delta.content for c in chunks)
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    assert reason == "tool_calls"


def test_a_conversation_with_a_call_in_it_is_read(server: serving.Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
    got = server.client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=3, temperature=0)
    plain = "user: Hello, old friendassistant: Rometool: sunnyassistant:"
    assert got.choices[0].message.content == generated(serving.tokenizer().encode(plain), max_new_tokens=3).text


# Vectors


def test_vectors_of_a_decoder_are_the_mean_of_its_last_states(server: serving.Running) -> None:
    import torch

    tap = gf.Record("resid_final")
    ids = serving.tokenizer().encode("The sea was calm")
    serving.loaded().model(torch.tensor([ids]), tap=tap)
    got = server.client.embeddings.create(model="tiny", input=["The sea was calm", "A much longer text about the sea, and about ships"])
    assert got.data[0].embedding == pytest.approx(tap["resid_final"][0].mean(0).tolist(), abs=1e-5)
    floats = server.client.embeddings.create(model="tiny", input="The sea was calm", encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(got.data[0].embedding, abs=1e-5)
    assert floats.usage.prompt_tokens == len(ids)


def test_vectors_of_a_sentence_encoder_are_its_own() -> None:
    import torch

    what = serving.encoder()
    with serving.running(what) as server:
        got = server.client.embeddings.create(model="tiny", input=["The sea", "Ships on the sea"])
        ids = what.tokenizer.encode("The sea", add_special=True)
        assert got.data[0].embedding == pytest.approx(what.model(torch.tensor([ids]))[0].tolist(), abs=1e-5)
        assert math.isclose(sum(x * x for x in got.data[1].embedding), 1, abs_tol=1e-4)
        with pytest.raises(openai.BadRequestError, match="predicts no tokens, so it cannot write"):
            server.client.completions.create(model="tiny", prompt="x")
        with pytest.raises(openai.BadRequestError, match="dimensions is 7, and the vectors of this model have 32"):
            server.client.embeddings.create(model="tiny", input="x", dimensions=7)
