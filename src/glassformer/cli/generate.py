"""``glassformer generate``: continue a text."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .look.common import Edits, edits_of

if TYPE_CHECKING:
    from ..infer import Token


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A trained model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; '-' reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many tokens.")] = 200,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "-t", help="0 takes the most probable token each time, higher is bolder; by default the checkpoint's, or 0.8."),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Choose among the k most probable tokens; by default the checkpoint's, or 40.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Choose among the fewest tokens that hold this probability.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Leave out tokens below this share of the best one's probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 makes tokens that were there less likely.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text. Repeatable.")] = None,
    logprobs: Annotated[int, typer.Option("--logprobs", metavar="N", help="One line per token: its probability and the N most probable ones.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message, put into the model's own chat template.")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; by default the file's (float16 becomes float32 on a CPU).")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep the quantised matrices of a .gguf file packed in memory.")] = False,
    quantise: Annotated[str | None, typer.Option("--quantise", metavar="KIND", help="int8 or int4: quantise the matrices while loading.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")] = None,
    edits: Edits = None,
) -> None:
    """Continue a prompt with a trained model, token by token as they come."""
    from ..infer import stream
    from .models import open_model, tokenizer_of

    loaded = open_model(model, device, dtype, packed, quantise)
    text = _standard_input() if prompt == "-" else prompt
    tokens = stream(
        loaded.model,
        loaded.chat([{"role": "user", "content": text}]) if chat else text,
        tokenizer=tokenizer_of(loaded, model),
        eos_id=loaded.eos_ids,
        max_new_tokens=max_new_tokens,
        **_settings(loaded.extra.get("generation", {}), temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        stop=stop or (),
        logprobs=logprobs,
        tap=edits_of(edits, loaded),
    )
    if logprobs:
        for token in tokens:
            print(_line(token))
        return
    if not chat and not hasattr(loaded.model, "encoder"):  # an encoder-decoder reads the text and writes another
        print(text, end="", flush=True)
    for token in tokens:
        print(token.text, end="", flush=True)
    print()


def _settings(
    known: dict[str, Any], temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, repetition_penalty: float | None
) -> dict[str, Any]:
    """What was said on the command line; where nothing was, what came with the checkpoint; where it says nothing either, the usual."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    usual = {"temperature": 0.0 if known.get("do_sample") is False else 0.8, "top_k": 40}
    came = {k: v for k, v in known.items() if k in given and isinstance(v, int | float) and not isinstance(v, bool)}
    if known.get("do_sample") is False:
        came.pop("temperature", None)
    return usual | came | {k: v for k, v in given.items() if v is not None}


def _standard_input() -> str:
    """All of standard input. Raises :class:`InputError` if it is not UTF-8."""
    from ..core.errors import InputError

    try:
        return sys.stdin.buffer.read().decode("utf-8").replace("\r\n", "\n")  # whatever the locale says
    except UnicodeDecodeError as error:
        raise InputError(f"Standard input is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): convert it first.") from error


def _line(token: Token) -> str:
    """``'e'  64.1%   best: 'e' 64.1%  'a' 12.0%``."""
    best = "  ".join(f"{c.text!r} {math.exp(c.logprob):.1%}" for c in token.top)
    return f"{token.text!r:12} {math.exp(token.logprob):6.1%}   best: {best}"
