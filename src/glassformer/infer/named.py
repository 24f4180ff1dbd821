"""Chains by the names that people know, in the orders of the programs that people know.

    chain = build_chain(temperature=0.8, top_k=40, xtc_probability=0.5, seed=7, order="llama.cpp")
    print(chain)          # TopK(k=40) | XTC(probability=0.5) | Temperature(t=0.8) | Draw(seed=7)

The order matters: the same numbers give other text. What rules single tokens (biases, bans, penalties) comes first in every
order, then the filters and the temperature:

    "hf"          temperature, top_n_sigma*, top_h, top_k, top_p, min_p, top_a*, typical, epsilon, eta, xtc*
    "llama.cpp"   top_n_sigma, top_k, typical, top_p, min_p, top_a*, top_h*, epsilon*, eta*, xtc, temperature

A star marks what the program itself does not have, put where it does least to the rest. ``order=["top_p", "temperature"]`` is an order
of your own: only what it names may be set, twice named works twice. Adaptive-p and Mirostat steer the draw and come last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

from glassformer.core.errors import SamplerError, did_you_mean
from glassformer.core.fields import check, hints

from .constrain import AnyJSON, Choices, Constrained, Grammar, JSONSchema, Regex, TextRule, Where
from .drawing import XTC, AdaptiveP, Mirostat1, Mirostat2
from .forcing import ForceFirst, ForceLast, MinNewTokens, SuppressFirst, token_bias, word_ids
from .history import BREAKERS, DRY, BadWords, Breakers, NoRepeatNGram, SequenceBias
from .links import Draw, Greedy, LogitBias, MinP, Penalties, Suppress, Temperature, TopK, TopP
from .sampler import Chain, Link
from .temperatures import DynamicTemperature
from .truncation import Epsilon, Eta, TopA, TopH, TopNSigma, Typical


class Settings(TypedDict, total=False):
    """What :func:`build_chain` and :func:`~glassformer.infer.generate` know about sampling. None is the same as nothing said."""

    do_sample: bool | None  # draw, or take the strongest; default: draw if anything is said about drawing
    temperature: float | None  # 0 takes the strongest token
    dynatemp_range: float | None  # the temperature goes up and down by so much with the entropy
    dynatemp_exponent: float | None  # 1
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    top_h: float | None
    top_a: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    min_keep: int | None  # how many tokens every filter that counts them leaves at least; 1
    xtc_probability: float | None
    xtc_threshold: float | None  # 0.1
    mirostat: int | None  # 1 or 2; 0 is off
    mirostat_tau: float | None  # 5
    mirostat_eta: float | None  # 0.1
    adaptive_target: float | None  # below 0 is off
    adaptive_decay: float | None  # 0.9
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    penalty_window: int | None  # how many tokens back penalties look; -1 all; default all, with order="llama.cpp" 64
    dry_multiplier: float | None
    dry_base: float | None  # 1.75
    dry_allowed_length: int | None  # 2
    dry_penalty_last_n: int | None  # how many tokens back DRY looks; as penalty_window
    dry_sequence_breakers: str | Iterable[Any] | None  # texts, or lists of ids; default newline, colon, quotation mark, asterisk
    no_repeat_ngram_size: int | None
    bad_words: str | Iterable[Any] | None  # texts, or lists of ids, that never come
    logit_bias: Mapping[Any, Any] | Iterable[Any] | None  # by id, or by text: on each of its tokens
    sequence_bias: Mapping[Any, float] | Iterable[Any] | None  # {(5, 9): -2.0}: on the last id, where the others stand before it
    suppress: Iterable[int] | None  # ids that are never drawn
    suppress_first: Iterable[int] | None  # ids that are not drawn at the first step that is free
    forced_first: int | Sequence[int] | None  # the first new tokens
    forced_last: int | Sequence[int] | None  # the last of max_new_tokens
    min_new_tokens: int | None  # no end-of-sequence before so many
    json_schema: Any  # the text is JSON of this schema: a dict, JSON text, a pydantic model class; True: any JSON
    regex: str | None  # the text matches this pattern from end to end
    grammar: str | None  # the text follows this grammar, Lark or GBNF
    choices: Sequence[str] | None  # the text is one of these
    constraint: Any  # the text follows this rule: one of the kinds above, or what a ToolForm makes of tools
    allowed: Callable[..., Any] | None  # a function of the ids so far that says which may follow: ids, a mask, or None for all
    order: str | Sequence[str] | None  # "hf" (default), "llama.cpp", or the names of the links in your order
    # Other names of the same
    typ_p: float | None
    repeat_penalty: float | None
    repeat_last_n: int | None
    bad_words_ids: Iterable[Any] | None
    suppress_tokens: Iterable[int] | None
    begin_suppress_tokens: Iterable[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | None
    prefix_allowed_tokens_fn: Callable[..., Any] | None
    samplers: str | Sequence[str] | None


ALIASES = {
    "typ_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_window",
    "bad_words_ids": "bad_words",
    "suppress_tokens": "suppress",
    "begin_suppress_tokens": "suppress_first",
    "forced_bos_token_id": "forced_first",
    "forced_eos_token_id": "forced_last",
    "prefix_allowed_tokens_fn": "allowed",
    "samplers": "order",
    "stop_strings": "stop",
    "eos_token_id": "eos_id",
    "force_words_ids": "force_words",
    "assistant_model": "draft",
    "num_assistant_tokens": "draft_tokens",
    "num_speculative_tokens": "draft_tokens",
    "negative_prompt_ids": "negative_prompt",
}
"""Names of other programs, and ours for the same."""

ON_TOKENS = (
    *("constraint", "allowed", "bias", "sequence_bias", "suppress", "penalties", "dry", "no_repeat_ngram"),
    *("bad_words", "min_new_tokens", "suppress_first", "forced"),
)
_HF = ("temperature", "top_n_sigma", "top_h", "top_k", "top_p", "min_p", "top_a", "typical", "epsilon", "eta", "xtc")
_LLAMA_CPP = ("top_n_sigma", "top_k", "typical", "top_p", "min_p", "top_a", "top_h", "epsilon", "eta", "xtc", "temperature")
ORDERS: dict[str, tuple[str, ...]] = {"hf": ON_TOKENS + _HF, "transformers": ON_TOKENS + _HF, "llama.cpp": ON_TOKENS + _LLAMA_CPP}
STEERING = ("mirostat", "adaptive")

# Which setting switches a link on, under the name of the link in an order. What else the link takes is said with it, or is an error.
_SWITCH = {
    "bias": "logit_bias",
    "typical": "typical_p",
    "epsilon": "epsilon_cutoff",
    "eta": "eta_cutoff",
    "xtc": "xtc_probability",
    "dry": "dry_multiplier",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "adaptive": "adaptive_target",
}
_NEEDS = {
    "xtc_threshold": "xtc_probability",
    "mirostat_tau": "mirostat",
    "mirostat_eta": "mirostat",
    "adaptive_decay": "adaptive_target",
    "dynatemp_exponent": "dynatemp_range",
    **dict.fromkeys(("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"), "dry_multiplier"),
}
_STAGES = {setting: stage for stage, setting in _SWITCH.items()} | {
    **dict.fromkeys(("repetition_penalty", "frequency_penalty", "presence_penalty"), "penalties"),
    "dynatemp_range": "temperature",
    "typ_p": "typical",
    "adaptive_p": "adaptive",
    "forced_first": "forced",
    "forced_last": "forced",
}
_DRAWING = (
    *("temperature", "dynatemp_range", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "top_h", "top_a", "epsilon_cutoff", "eta_cutoff"),
    *("xtc_probability", "mirostat", "adaptive_target"),
)
_WINDOWS = {"llama.cpp": 64}
_RULES: dict[str, Callable[[Any], TextRule]] = {
    "json_schema": lambda schema: AnyJSON() if schema is True else JSONSchema(schema),
    "regex": Regex,
    "grammar": Grammar,
    "choices": Choices,
    "constraint": lambda rule: rule,
}


def build_chain(
    *,
    seed: int | None = None,
    tokenizer: Any = None,
    eos_id: int | Iterable[int] | None = None,
    max_new_tokens: int | None = None,
    **settings: Unpack[Settings],
) -> Chain:
    """A chain from the names that people know (:class:`Settings`). Nothing said is nothing done.

    It draws if ``do_sample`` is true, or if it is None and anything is said about drawing (``temperature``, ``top_k``, … or ``seed``);
    else it is greedy. ``temperature=0`` and ``do_sample=False`` are greedy whatever else is said: then only what rules single tokens is in the chain.

    ``tokenizer`` reads texts (biases, bad words, sequence breakers) and knows end-of-sequence if ``eos_id`` is not given; ``min_new_tokens`` needs
    to know it, and ``forced_last`` needs ``max_new_tokens``.

    With ``mirostat`` no other filter may be set: llama.cpp drops them without a word, here they are an error, while penalties work on. ``order`` is said
    at the top of this module. Raises :class:`SamplerError` for a setting of another name, for values out of range, and for settings that disagree.
    """
    known = hints(Settings)
    for name in settings:
        if name not in known:
            raise SamplerError(f"There is no setting {name!r} of a sampler.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")
    check("build_chain", settings, known, SamplerError)
    said = {name: value for name, value in renamed(settings).items() if value is not None}
    for name, master in _NEEDS.items():
        if name in said and master not in said:
            raise SamplerError(f"{name} was given without {master}, which is off if nothing is said: give {master} too, or leave {name} out.")
    order, window = _read_order(said.pop("order", "hf"))
    spoken = seed is not None or any(name in said for name in _DRAWING)
    draws = said.get("temperature") != 0 and bool(said.get("do_sample", spoken))
    makers: dict[str, Callable[[], list[Link]]] = _filters(said) | _steering(said) if draws else {}
    makers |= _on_tokens(said, window, tokenizer, eos_id, max_new_tokens)
    made = {stage: [link for link in make() if not link.off] for stage, make in makers.items()}
    _check_order(order, made, said)
    links = [link for stage in (*order, *(s for s in STEERING if s not in order)) for link in made.get(stage, ())]
    return Chain((*links, Draw(seed) if draws else Greedy()))


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under our own names. Raises :class:`SamplerError` if one is given under two."""
    new = {name: value for name, value in options.items() if name not in ALIASES}
    for name, value in options.items():
        if name in ALIASES and value is not None:
            ours = ALIASES[name]
            if new.get(ours) not in (None, ()):
                raise SamplerError(f"{name} and {ours} are two names of one thing, and both were given: {value!r} and {new[ours]!r}. Leave one out.")
            new[ours] = value
    return new


def _read_order(given: Any) -> tuple[tuple[str, ...], int | None]:
    """The links in order, and how far back penalties look if nothing is said."""
    if isinstance(given, str) and ";" not in given:
        if given not in ORDERS:
            todo = f"Known: {', '.join(ORDERS)}, or links: 'top_k;temperature', 'top_k;'"
            raise SamplerError(f"There is no order of samplers named {given!r}.{did_you_mean(given, ORDERS)} {todo}.")
        return ORDERS[given], _WINDOWS.get(given)
    names = [_STAGES.get(name, name) for name in ([name for name in given.split(";") if name] if isinstance(given, str) else given)]
    known = dict.fromkeys((*ON_TOKENS, *_LLAMA_CPP, *STEERING))
    for name in names:
        if name not in known:
            raise SamplerError(f"An order names links, and there is none named {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}.")
    for name in STEERING:
        if name in names[:-1]:
            raise SamplerError(f"{name} steers the draw by what is left, so it is the last of the order, but {names[names.index(name) + 1]} follows it.")
    return (*(s for s in ON_TOKENS if s not in names), *names), None


def _check_order(order: Sequence[str], made: Mapping[str, list[Link]], said: Mapping[str, Any]) -> None:
    """Everything that is set has its place."""
    for stage, links in made.items():
        if links and stage not in order and stage not in STEERING:
            raise SamplerError(f"{links[0]!r} was asked for, but the order has no place for it: add {stage!r} to {', '.join(order)}.")
    for stage in (*_LLAMA_CPP, "adaptive") if made.get("mirostat") else ():
        if stage != "temperature" and made.get(stage):
            name = _SWITCH.get(stage, stage)
            raise SamplerError(f"Mirostat decides by itself how many tokens stay, so {made[stage][0]!r} cannot go with it: leave {name} out, or mirostat.")


def _filters(said: Mapping[str, Any]) -> dict[str, Callable[[], list[Link]]]:
    """The links that look at values, by their names in an order."""
    keep = said.get("min_keep", 1) or 1  # 0 is llama.cpp's way to say the same
    t, spread, exponent = (said.get(name, usual) for name, usual in (("temperature", 1.0), ("dynatemp_range", 0.0), ("dynatemp_exponent", 1.0)))
    return {
        "temperature": lambda: [DynamicTemperature(t, spread, exponent) if spread else Temperature(t)],
        "top_n_sigma": lambda: [TopNSigma(said.get("top_n_sigma", 0.0))],
        "top_h": lambda: [TopH(said.get("top_h", 1.0))],
        "top_k": lambda: [TopK(said.get("top_k", 0))],
        "top_p": lambda: [TopP(said.get("top_p", 1.0), keep)],
        "min_p": lambda: [MinP(said.get("min_p", 0.0), keep)],
        "top_a": lambda: [TopA(said.get("top_a", 0.0), keep)],
        "typical": lambda: [Typical(said.get("typical_p", 1.0), keep)],
        "epsilon": lambda: [Epsilon(said.get("epsilon_cutoff", 0.0), keep)],
        "eta": lambda: [Eta(said.get("eta_cutoff", 0.0), keep)],
        "xtc": lambda: [XTC(said.get("xtc_probability", 0.0), said.get("xtc_threshold", 0.1), keep)],
    }


def _steering(said: Mapping[str, Any]) -> dict[str, Callable[[], list[Link]]]:
    version = said.get("mirostat", 0)
    if version not in (0, 1, 2):
        raise SamplerError(f"mirostat is its version, 1 or 2, or 0 for none, but {version} was given.")
    tau, eta = said.get("mirostat_tau", 5.0), said.get("mirostat_eta", 0.1)
    return {
        "mirostat": lambda: [] if not version else [Mirostat1(tau, eta) if version == 1 else Mirostat2(tau, eta)],
        "adaptive": lambda: [AdaptiveP(said.get("adaptive_target", -1.0), said.get("adaptive_decay", 0.9))],
    }


def _on_tokens(
    said: Mapping[str, Any], window: int | None, tokenizer: Any, eos_id: int | Iterable[int] | None, max_new_tokens: int | None
) -> dict[str, Callable[[], list[Link]]]:
    """The links that rule single tokens, by their names in an order."""
    repetition, frequency, presence = (said.get(f"{name}_penalty", usual) for name, usual in (("repetition", 1.0), ("frequency", 0.0), ("presence", 0.0)))
    return {
        "constraint": lambda: _constrained(said, tokenizer, eos_id),
        "allowed": lambda: [Where(said["allowed"])] if "allowed" in said else [],
        "bias": lambda: [LogitBias(token_bias(said.get("logit_bias", ()), tokenizer))],
        "sequence_bias": lambda: [SequenceBias(said.get("sequence_bias", ()))],
        "suppress": lambda: [Suppress(said.get("suppress", ()))],
        "penalties": lambda: [Penalties(repetition, frequency, presence, _window(said.get("penalty_window", window)))],
        "dry": lambda: [_dry(said, window, tokenizer)] if said.get("dry_multiplier") else [],
        "no_repeat_ngram": lambda: [NoRepeatNGram(said.get("no_repeat_ngram_size", 0))],
        "bad_words": lambda: [BadWords(word_ids(said.get("bad_words", ()), tokenizer))],
        "min_new_tokens": lambda: [_min_new_tokens(said["min_new_tokens"], tokenizer, eos_id, max_new_tokens)] if said.get("min_new_tokens") else [],
        "suppress_first": lambda: [SuppressFirst(said.get("suppress_first", ()), 1 + len(_ids(said.get("forced_first", ()))))],
        "forced": lambda: [ForceFirst(_ids(said.get("forced_first", ()))), *_forced_last(_ids(said.get("forced_last", ())), max_new_tokens)],
    }


def _constrained(said: Mapping[str, Any], tokenizer: Any, eos_id: int | Iterable[int] | None) -> list[Link]:
    names = [name for name in _RULES if name in said]
    if len(names) > 1:
        raise SamplerError(f"{' and '.join(names)} were both given, and each says what the whole text is: leave one out.")
    if "constraint" in said and not isinstance(said["constraint"], TextRule):
        raise SamplerError(f"constraint is a rule such as Regex('[a-z]+') or JSONSchema(…), but {said['constraint']!r} was given.")
    forced = [name for name in ("forced_first", "forced_last") if _ids(said.get(name, ()))]
    if names and forced:
        raise SamplerError(f"{forced[0]} brings in tokens that {names[0]} may not allow: leave one of them out.")
    return [Constrained(_RULES[name](said[name]), tokenizer, sorted(eos_ids(eos_id, tokenizer))) for name in names]


def _window(n: int | None) -> int | None:
    """-1 is all of it, as in llama.cpp."""
    return None if n == -1 else n


def _dry(said: Mapping[str, Any], window: int | None, tokenizer: Any) -> Link:
    given = said.get("dry_sequence_breakers", () if tokenizer is None else BREAKERS)
    given = (given,) if isinstance(given, str) else tuple(given)
    texts = [text for text in given if isinstance(text, str)]
    if texts and tokenizer is None:
        raise SamplerError(f"The sequence breaker {texts[0]!r} is a text, and without a tokenizer there are only ids: give tokenizer=…, or lists of ids.")
    if texts and len(texts) != len(given):
        raise SamplerError("Sequence breakers are texts or lists of ids, but both were given: encode the texts, or write the ids as text.")
    return DRY(
        *(said["dry_multiplier"], said.get("dry_base", 1.75), said.get("dry_allowed_length", 2), _window(said.get("dry_penalty_last_n", window))),
        breakers=Breakers.of(tokenizer, texts) if texts else given,
    )


def _min_new_tokens(n: int, tokenizer: Any, eos_id: int | Iterable[int] | None, max_new_tokens: int | None) -> Link:
    if max_new_tokens is not None and n > max_new_tokens:
        raise SamplerError(f"min_new_tokens is {n}, but max_new_tokens is {max_new_tokens}: allow more, or ask for fewer.")
    eos = eos_ids(eos_id, tokenizer)
    if eos_id is None and not eos:
        raise SamplerError(f"min_new_tokens={n} keeps end-of-sequence away, but which token that is is not known: give eos_id=…, or a tokenizer that has one.")
    return MinNewTokens(n, sorted(eos))


def _forced_last(ids: tuple[int, ...], max_new_tokens: int | None) -> list[Link]:
    if not ids:
        return []
    if max_new_tokens is None:
        raise SamplerError(f"forced_last={list(ids)} is for the end of max_new_tokens tokens: give max_new_tokens too.")
    return [ForceLast(ids, max_new_tokens)]


def _ids(given: int | Iterable[int]) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given)


def eos_ids(eos_id: int | Iterable[int] | None, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text: those given, or the tokenizer's."""
    if eos_id is None:
        eos_id = getattr(tokenizer, "eos_id", None)
    return frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
