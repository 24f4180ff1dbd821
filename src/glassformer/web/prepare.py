"""From a request's body to what the engine is asked: prompts as ids, options by our names, everything checked before anything runs.

This is done in a thread: a long text takes its time to be tokenised, and a chat template is a program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glassformer.core.errors import GlassformerError
from glassformer.infer.constrain import ToolForm
from glassformer.infer.options import read_prompts
from glassformer.infer.session import vocabulary

from . import inside
from .problems import Problem, of_error
from .schemas import Answering, ChatRequest, CompletionRequest, Message, Sampling
from .served import settings

if TYPE_CHECKING:
    from .served import Served

USUAL_NEW_TOKENS = 16
"""Of a completion that does not say how many: OpenAI's number. An answer in a chat goes on until it ends, or the context does."""


@dataclass
class Plan:
    """What one request asks for, read: ``prompts`` times ``n`` answers of at most ``most`` tokens (of each prompt its own number)."""

    chat: bool
    prompts: list[list[int]]
    texts: list[str]
    n: int
    most: list[int]
    options: dict[str, Any]
    seed: int | None
    stream: bool
    usage: bool
    top: int | None
    echo: bool
    wanted: inside.Wanted
    user: str
    form: Any = None
    params: tuple[str, ...] = field(default=(), repr=False)


def completion(served: Served, body: CompletionRequest) -> Plan:
    """The plan of ``/v1/completions``."""
    _check_model(served, body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Problem(
            400, f"best_of is {body.best_of} and n is {body.n or 1}: only answers that are returned are made here, so leave best_of out.", param="best_of"
        )
    if body.logprobs is not None and body.logprobs > served.limits.candidates:
        raise Problem(400, f"logprobs is {body.logprobs}, and this server reports at most {served.limits.candidates} candidates.", param="logprobs")
    prompts, texts = _prompts(served, body.prompt)
    most = USUAL_NEW_TOKENS if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise Problem(400, "max_tokens is 0, so there is nothing to answer: ask for at least 1, or for echo with the prompt's logprobs.", param="max_tokens")
    if body.echo and body.stream and (body.logprobs is not None or most == 0):
        raise Problem(400, "echo with logprobs, or without new tokens, cannot be streamed: leave echo or stream out.", param="echo")
    if most == 0 and body.return_trace:
        raise Problem(400, "max_tokens is 0, so no token is chosen, and there is nothing to trace: leave return_trace out.", param="return_trace")
    if body.echo and body.logprobs is not None and served.pair:
        raise Problem(400, "The prompt of an encoder-decoder is read, not predicted, so echo has no logprobs of it: leave echo out.", param="echo")
    return _plan(served, body, False, prompts, texts, [most] * len(prompts), body.logprobs, echo=bool(body.echo))


def chat(served: Served, body: ChatRequest) -> Plan:
    """The plan of ``/v1/chat/completions``."""
    _check_model(served, body)
    top = body.top_logprobs or 0
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(400, f"top_logprobs is {top}, but logprobs was not asked for: give logprobs=true too.", param="top_logprobs")
    if top > served.limits.candidates:
        raise Problem(400, f"top_logprobs is {top}, and this server reports at most {served.limits.candidates} candidates.", param="top_logprobs")
    said = {v for v in (body.max_tokens, body.max_completion_tokens) if v is not None}
    if len(said) > 1:
        raise Problem(
            400,
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}, two names of one number: leave max_tokens out.",
            param="max_tokens",
        )
    if 0 in said:
        raise Problem(400, "max_completion_tokens is 0, so there is nothing to answer: ask for at least 1.", param="max_completion_tokens")
    form, constraint = _tools(served, body)
    variables = dict(body.chat_template_kwargs or {})
    tools = body.tools if form is not None else None
    ids = conversation(served, body.messages, tools, variables)
    left = served.context - (0 if served.pair else len(ids)) + 1
    most = max(1, min(left, served.limits.new_tokens)) if not said else said.pop()
    plan = _plan(served, body, True, [ids], [""], [most], top if body.logprobs else None, constraint=constraint)
    plan.form = form
    return plan


def conversation(served: Served, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any]) -> list[int]:
    """The ids of a conversation, by the model's own template. Raises a :class:`Problem` where there is none, and where it refuses."""
    tokenizer = served.check_text()
    if not served.chats:
        raise Problem(
            400, "This model has no chat template, so it was not made for conversations: ask /v1/completions to continue a text.", code="no_chat_template"
        )
    plain = [_message(m) for m in messages]
    wrong = {"messages", "tools", "add_generation_prompt", "continue_final_message"} & set(variables)
    if wrong:
        raise Problem(400, f"chat_template_kwargs holds {sorted(wrong)[0]!r}, which the request itself says.", param="chat_template_kwargs")
    try:
        ids: list[int] = tokenizer.chat(plain, tools=list(tools) if tools else None, **variables)
    except GlassformerError as error:
        problem = of_error(error)
        problem.param = "messages"
        raise problem from None
    return ids


def _message(message: Message) -> dict[str, Any]:
    """As templates read it: parts of text joined, the arguments of calls as objects."""
    made = message.model_dump(exclude_none=True)
    if isinstance(parts := made.get("content"), list):
        strange = [p for p in parts if p.get("type") != "text" or not isinstance(p.get("text"), str)]
        if strange:
            said = str(strange[0].get("type"))[:100]
            raise Problem(400, f"A message holds a part of type {said!r}, and this server reads {{'type': 'text', 'text': …}} only.", param="messages")
        made["content"] = "".join(p["text"] for p in parts)
    for call in made.get("tool_calls", ()) if isinstance(made.get("tool_calls"), list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise Problem(400, f"The arguments of a tool call in the messages are no JSON ({error}).", param="messages") from None
    if "content" not in made and "tool_calls" in made:
        made["content"] = ""
    return made


def _prompts(served: Served, given: Any) -> tuple[list[list[int]], list[str]]:
    """The ids of each prompt, and its text for ``echo``."""
    single = isinstance(given, str) or (bool(given) and all(isinstance(i, int) for i in given))
    rows = [given] if single else list(given)
    if not rows:
        raise Problem(400, "prompt is empty: give a text, a list of ids, or a list of either.", param="prompt")
    try:
        ids, _ = read_prompts(rows, served.tokenizer)
    except GlassformerError as error:
        problem = of_error(error)
        problem.param = "prompt"
        raise problem from None
    _check_ids(served, ids)
    return ids, [r if isinstance(r, str) else "" if served.tokenizer is None else served.tokenizer.decode(r) for r in rows]


def _check_ids(served: Served, rows: list[list[int]]) -> None:
    spec = getattr(served.model.spec, "encoder", served.model.spec)
    size = getattr(spec, "vocab_size", None)
    top = max((max(r, default=0) for r in rows), default=0)
    if size is not None and top >= size:
        raise Problem(400, f"The prompt holds id {top}, but the model's vocabulary has {size} tokens, 0 to {size - 1}.", param="prompt")


def _check_model(served: Served, body: Answering) -> None:
    served.check_name(body.model)
    if not served.writes:
        raise Problem(400, f"{served.name!r} predicts no tokens, so it cannot write: ask /v1/embeddings for vectors.", code="model_not_supported")


def _plan(
    served: Served,
    body: Answering,
    talks: bool,
    prompts: list[list[int]],
    texts: list[str],
    most: list[int],
    top: int | None,
    echo: bool = False,
    constraint: Mapping[str, Any] | None = None,
) -> Plan:
    """What both ways of asking share: sizes, options, the inside."""
    n, limits = body.n or 1, served.limits
    if n * len(prompts) > limits.answers:
        words = "One prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
        raise Problem(
            400,
            f"{words} with n={n} would be {n * len(prompts)} answers, and one request has at most {limits.answers}.",
            param="n" if n > 1 else "prompt",
        )
    if n * len(prompts) > (most_waiting := served.engine.most(body.user or "")):
        room = f"{most_waiting} of one user" if body.user else str(most_waiting)
        raise Problem(
            400,
            f"The request makes {n * len(prompts)} answers, and on this server at most {room} may wait at once "
            f"(--queue {served.engine.most()}): ask for fewer.",
            param="n" if n > 1 else "prompt",
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > 64 or any(len(s) > 1000 for s in stops):
        raise Problem(400, f"stop has {len(stops)} texts, the longest of {max(map(len, stops))} characters; at most 64 of 1,000 are looked for.", param="stop")
    if body.stream_options is not None and not body.stream:
        raise Problem(400, "stream_options was given, but the answer is not streamed: give stream=true too.", param="stream_options")
    _check_lengths(served, prompts, most, talks)
    wanted = inside.read(body, served.anatomy, limits, served.allow_edits, served.allow_sites)
    rows = [(m if served.pair else len(p) + max(m, 1) - 1, len(p)) for p, m in zip(prompts, most, strict=True)]
    wanted.check_size([r for r in rows for _ in range(n)], limits)
    said = {name: value for name, value in body.model_dump(include=set(Sampling.model_fields) - {"seed"}).items() if value is not None}
    if "logit_bias" in said:
        said["logit_bias"] = {_token(k): v for k, v in said["logit_bias"].items()}
    options = settings(served.standing, said)
    for stop in ("stop", "stop_strings"):
        if getattr(body, stop):
            options[stop] = getattr(body, stop)
    options |= _ends(served, body) | _form(body, constraint or {})
    options |= {"logprobs": top or 0, "trace": wanted.trace}
    params = tuple(dict.fromkeys((*said, *(name for name in type(body).model_fields if getattr(body, name) is not None))))
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return Plan(talks, prompts, texts, n, most, options, body.seed, bool(body.stream), usage, top, echo, wanted, body.user or "", params=params)


def _check_lengths(served: Served, prompts: list[list[int]], most: list[int], talks: bool) -> None:
    for prompt, new in zip(prompts, most, strict=True):
        if new > served.limits.new_tokens:
            raise Problem(400, f"max_tokens is {new}, and an answer has at most {served.limits.new_tokens} tokens on this server.", param="max_tokens")
        own = 0 if served.pair else len(prompt)
        if own + max(new, 1) - 1 > served.context:
            raise Problem(
                400,
                f"The context here is {served.context} tokens (of the model, or --capacity of the server). You asked for "
                f"{own + new} of them ({own} of the prompt, {new} of the answer; the last one "
                "is not read): shorten the prompt, or ask for fewer tokens.",
                param=("messages" if talks else "prompt") if not new or own >= served.context else "max_tokens",
                code="context_length_exceeded",
            )


def _token(key: str) -> int | str:
    """A key of ``logit_bias``: an id written as text, as OpenAI does, or a text."""
    if key.isascii() and key.isdigit():
        return int(key[:20])
    if _NUMBER.fullmatch(key):
        raise Problem(
            400, f"logit_bias names the token {key[:40]!r}, and ids are whole numbers from 0 on; a text with that in it is said by its ids.", param="logit_bias"
        )
    return key


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def _ends(served: Served, body: Answering) -> dict[str, Any]:
    size = vocabulary(served.model)
    if size is not None and (top := max(body.stop_token_ids or (), default=0)) >= size:
        raise Problem(400, f"stop_token_ids holds id {top}, but the vocabulary has {size} tokens, 0 to {size - 1}.", param="stop_token_ids")
    if body.ignore_eos:
        return {"eos_id": tuple(body.stop_token_ids or ())}
    if body.stop_token_ids:
        known = served.loaded.eos_ids
        own = known if known is not None else tuple(i for i in (getattr(served.tokenizer, "eos_id", None),) if i is not None)
        return {"eos_id": (*own, *body.stop_token_ids)}
    return {}


def _form(body: Answering, constraint: Mapping[str, Any]) -> dict[str, Any]:
    """What the answer has to look like: at most one of the ways to say it."""
    made: dict[str, Any] = {name: value for name in ("regex", "grammar", "json_schema", "choices") if (value := getattr(body, name)) is not None}
    asked = body.response_format
    if asked is not None and asked.type != "text":
        schema = {"type": "object"} if asked.type == "json_object" else (asked.json_schema or {})["schema"]
        if made:
            raise Problem(400, f"response_format and {next(iter(made))} both say what the answer looks like: leave one out.", param="response_format")
        made = {"json_schema": schema}
    if len(made) > 1:
        raise Problem(400, f"{' and '.join(made)} all say what the answer looks like: leave all but one out.", param=next(iter(made)))
    if made and constraint:
        raise Problem(400, "response_format and the tools both say what the answer looks like: leave one out, or give tool_choice='none'.", param="tool_choice")
    return made or dict(constraint)


def _tools(served: Served, body: ChatRequest) -> tuple[Any, dict[str, Any]]:
    """How this model writes calls of tools, and what the answer is held to."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none"):
            raise Problem(400, "tool_choice was given, but there are no tools to choose from: give tools too.", param="tool_choice")
        return None, {}
    if choice == "none":
        return None, {}
    served.check_text()
    try:
        form = ToolForm.of(getattr(served.tokenizer, "chat_template", None) or "")
        rule = form.constraint(body.tools, choice or "auto", parallel=body.parallel_tool_calls is not False)
        return form, {} if rule is None else {"constraint": rule}
    except GlassformerError as error:
        problem = of_error(error)
        problem.param = "tools"
        raise problem from None
