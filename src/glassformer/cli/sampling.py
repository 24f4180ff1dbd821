"""The options of ``glassformer generate`` that say how the next token is chosen, and what stands where nothing is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", help="0 takes the most probable token each time, higher is bolder; by default the checkpoint's, or 0.8."),
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Choose among the k most probable tokens; by default the checkpoint's, or 40.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Choose among the fewest tokens that hold this probability.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Leave out tokens below this share of the best one's probability.")]
TypicalP = Annotated[float | None, typer.Option("--typical-p", help="Choose among the tokens of the most usual surprise that hold this probability.")]
TopNSigma = Annotated[float | None, typer.Option("--top-n-sigma", help="Leave out logits more than n standard deviations below the largest.")]
XTCProbability = Annotated[
    float | None,
    typer.Option("--xtc-probability", help="How often all of the strongest tokens but the weakest of them are left out (XTC)."),
]
XTCThreshold = Annotated[float | None, typer.Option("--xtc-threshold", help="From which probability on XTC calls a token strong; 0.1.")]
Mirostat = Annotated[
    int | None,
    typer.Option("--mirostat", min=0, max=2, help="Steer the surprise of the text by Mirostat 1 or 2, in place of other filters."),
]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 makes tokens that were there less likely.")]
FrequencyPenalty = Annotated[float | None, typer.Option("--frequency-penalty", help="Lower a token's logit by this for each time that it was there.")]
PresencePenalty = Annotated[float | None, typer.Option("--presence-penalty", help="Lower a token's logit by this if it was there.")]
DryMultiplier = Annotated[float | None, typer.Option("--dry-multiplier", help="Lower what would continue a repeat, more the longer it is (DRY); 0.8 is usual.")]
NoRepeatNGram = Annotated[int | None, typer.Option("--no-repeat-ngram-size", help="Never so many tokens in a row a second time.")]
BadWord = Annotated[list[str] | None, typer.Option("--bad-word", help="A text that never comes. Repeatable.")]
MinNewTokens = Annotated[int | None, typer.Option("--min-new-tokens", help="Do not end the text before so many tokens.")]
JSONSchemaOption = Annotated[
    str | None,
    typer.Option("--json-schema", metavar="FILE|TEXT", help="The text is JSON of this schema: a file, or the schema itself; 'any' for any JSON."),
]
Regex = Annotated[str | None, typer.Option("--regex", metavar="PATTERN", help="The text matches this regular expression from end to end.")]
GrammarFile = Annotated[str | None, typer.Option("--grammar", metavar="FILE", help="The text follows the grammar in this file: Lark, or llama.cpp's GBNF.")]
ChoiceTexts = Annotated[list[str] | None, typer.Option("--choice", metavar="TEXT", help="The text is one of these. Repeatable.")]
Order = Annotated[
    str | None,
    typer.Option("--order", help="In which order all this works: hf (default), llama.cpp, or names with ';' between: 'top_k;min_p;temperature'."),
]
More = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of generate() in Python: --set adaptive_target=0.4. Repeatable."),
]
GuidanceScale = Annotated[float | None, typer.Option("--guidance-scale", help="Follow the prompt more than the model's habits (1 is off; twice the work).")]
NegativePrompt = Annotated[str | None, typer.Option("--negative-prompt", help="The text that --guidance-scale goes away from; by default no text.")]
Amateur = Annotated[str | None, typer.Option("--amateur", metavar="MODEL", help="A weaker model of the same tokens to go away from (contrastive decoding).")]
DolaLayers = Annotated[str | None, typer.Option("--dola-layers", help="Go away from an early layer (DoLa): low, high, or layers such as 2,4.")]
Draft = Annotated[str | None, typer.Option("--draft", metavar="MODEL", help="A smaller model of the same tokens that guesses for this one: same text, sooner.")]
PromptLookup = Annotated[
    int | None,
    typer.Option("--prompt-lookup", metavar="N", min=1, help="Guess N tokens at a time from what stood behind the same words before; for texts that copy."),
]
DraftTokens = Annotated[int | None, typer.Option("--draft-tokens", metavar="N", min=1, help="How many tokens --draft guesses at a time; 5.")]
ShowSampler = Annotated[bool, typer.Option("--show-sampler", help="Say first (on standard error) what is done in which order.")]

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="KIND",
        help="How the matrices are held in memory: float32, bfloat16, int8 or int4 (blocks of 32 numbers), or auto (float32 or bfloat16, whichever "
        "is faster here, where both hold the file exactly). By default the file's type.",
    ),
]

ON_TOKENS = ("repetition_penalty", "no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id")
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", *ON_TOKENS)
"""What a checkpoint's own settings may say."""
PLAIN = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "mirostat"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "dry_multiplier", "no_repeat_ngram_size", "min_new_tokens", "order"),
)
"""The options that bear the names of their settings."""
BEYOND = ("penalty_alpha", "contrast_alpha", "contrast_beta", "draft_rule")
"""What ``--set`` knows of ``generate`` besides the settings of its sampler."""
PYTHON = ("allowed", "constraint", "prefix_allowed_tokens_fn")
"""Settings that only Python can say."""


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that the options of a command say one by one."""
    return {name: options[name] for name in PLAIN if name in options} | {"bad_words": options["bad_word"]}


def settings(known: dict[str, Any], given: dict[str, Any], more: list[str] | None = None, beyond: tuple[str, ...] = ()) -> dict[str, Any]:
    """What was said on the command line; where nothing was, what came with the checkpoint; where it says nothing either, the usual."""
    said = only_said(given, more, beyond)
    greedy = known.get("do_sample") is False
    usual = {"temperature": 0.0 if greedy else 0.8, "top_k": 40}
    came: dict[str, Any] = {k: v for k, v in known.items() if k in NUMBERS and isinstance(v, int | float) and not isinstance(v, bool)}
    if isinstance(words := known.get("bad_words_ids"), list):
        came["bad_words_ids"] = words
    if greedy:
        came.pop("temperature", None)
    standing = usual | came
    if any(name in said for name in ("json_schema", "regex", "grammar", "choices")):
        standing = {k: v for k, v in standing.items() if k not in ("forced_bos_token_id", "forced_eos_token_id")}  # they may break the rule
    if said.get("penalty_alpha"):  # contrastive search chooses by itself, among fewer than the usual 40
        standing = {k: v for k, v in standing.items() if k in (*ON_TOKENS, "bad_words_ids")}
    if said.get("mirostat"):
        standing = {k: v for k, v in standing.items() if k in (*ON_TOKENS, "temperature", "bad_words_ids")}
    if ";" in str(order := said.get("order", "")):
        standing = {k: v for k, v in standing.items() if k in order.split(";")}  # an order of one's own has a place for what it names only
    return standing | said


def layers(text: str | None) -> str | list[int] | None:
    """``2,4`` as numbers; a name stays a name."""
    parts = [] if text is None else text.split(",")
    return [int(part) for part in parts] if parts and all(part.strip().isdigit() for part in parts) else text


def only_said(given: dict[str, Any], more: list[str] | None = None, beyond: tuple[str, ...] = ()) -> dict[str, Any]:
    """What was said on the command line, by an option or by ``--set``, which may name ``beyond`` too; twice is an error."""
    said = {name: value for name, value in given.items() if value is not None and value != []}
    for name, value in (read_setting(text, beyond) for text in more or ()):
        if name in said:
            from ..core.errors import SamplerError

            raise SamplerError(f"{name} was given twice, as {said[name]!r} and as {value!r}: leave one out.")
        said[name] = value
    return said


def rules(json_schema: str | None, regex: str | None, grammar: str | None, choices: list[str] | None) -> dict[str, Any]:
    """What the options about the whole text say; files are read. Raises :class:`InputError` for a file that cannot be."""
    schema: Any = json_schema
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        schema = True if json_schema == "any" else _file("--json-schema", json_schema)
    return {"json_schema": schema, "regex": regex, "grammar": None if grammar is None else _file("--grammar", grammar), "choices": choices or None}


def _file(option: str, name: str) -> str:
    from ..core.errors import InputError

    if not name.strip():
        raise InputError(f"{option} is empty: name a file" + (", or give the schema itself." if option == "--json-schema" else "."))
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {name}: the file cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError:
        raise InputError(f"{option} {name}: the file is not UTF-8 text.") from None


def read_setting(text: str, beyond: tuple[str, ...] = ()) -> tuple[str, Any]:
    """``NAME=VALUE``: a value is JSON, or else a text; ``5.0`` is a whole number too. Raises :class:`SamplerError`."""
    from ..core.errors import SamplerError, did_you_mean
    from ..core.fields import fits, hints
    from ..infer.named import Settings
    from ..infer.options import Options

    name, equals, value = text.partition("=")
    name, known = name.strip().replace("-", "_"), (*(n for n in hints(Settings) if n not in PYTHON), *beyond)
    if not equals:
        raise SamplerError(f"--set takes NAME=VALUE, such as adaptive_target=0.4, but got {text!r}.")
    if name in BEYOND and name not in known:
        raise SamplerError(f"{name} is no setting of a sampler but of a run: 'glassformer generate' takes --set {text}. Leave it out here.")
    if name in PYTHON:
        raise SamplerError(f"{name} is written in Python, glassformer.generate({name}=…), and --set takes numbers and texts: leave it out.")
    if name not in known:
        raise SamplerError(f"There is no setting {name!r} of a sampler.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")
    try:
        read = json.loads(re.sub(r"^([+-]?)(?=\.\d)", r"\g<1>0", value))  # .1 is 0.1
    except json.JSONDecodeError:
        return name, value
    kind = hints(Options)[name]
    return name, int(read) if isinstance(read, float) and read.is_integer() and not fits(read, kind) and fits(int(read), kind) else read
