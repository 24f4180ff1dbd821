"""``glassformer chat``: a conversation in the terminal, every token of which can be asked why it came."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import sampling


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A trained model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")],
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before the first message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="At most so many tokens of one answer.")] = 512,
    temperature: sampling.Temperature = None,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    more: sampling.More = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answers.")] = None,
    capacity: Annotated[int, typer.Option("--capacity", min=16, help="Tokens of the whole conversation: twice what serve keeps for each of many.")] = 4096,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; by default the file's (float16 becomes float32 on a CPU).")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep the quantised matrices of a .gguf file packed in memory.")] = False,
    quantise: Annotated[str | None, typer.Option("--quantise", metavar="KIND", help="int8 or int4: quantise while loading, by torchao.")] = None,
    weights: sampling.Weights = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")] = None,
) -> int:
    """Talk to a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends. What comes through a pipe is one message per line."""
    from .models import open_model, tokenizer_of
    from .talk import Talk
    from .terminal import Terminal

    loaded = open_model(model, device, dtype, packed, quantise, weights)
    tokenizer_of(loaded, model)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings = sampling.settings(loaded.extra.get("generation", {}), given, more)
    talk = Talk(loaded, settings, system=system, max_new_tokens=max_new_tokens, seed=seed, capacity=capacity)
    return Terminal(talk, interactive=sys.stdin.isatty()).run()
