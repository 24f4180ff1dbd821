"""``glassformer generate``: continue a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import beams, sampling
from .look.common import Edits, edits_of

if TYPE_CHECKING:
    from ..infer import Token, Trace
    from ..infer.trace import Choice


def _check_traces(places: list[str] | None) -> list[str] | None:
    """``--trace`` is refused before anything is computed for it."""
    if places:
        from ..infer.trace import check_place

        for place in places:
            if place != "-":
                check_place(place)
    return places


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A trained model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; '-' reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many tokens.")] = 200,
    temperature: sampling.Temperature = None,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    typical_p: sampling.TypicalP = None,
    top_n_sigma: sampling.TopNSigma = None,
    xtc_probability: sampling.XTCProbability = None,
    xtc_threshold: sampling.XTCThreshold = None,
    mirostat: sampling.Mirostat = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    frequency_penalty: sampling.FrequencyPenalty = None,
    presence_penalty: sampling.PresencePenalty = None,
    dry_multiplier: sampling.DryMultiplier = None,
    no_repeat_ngram_size: sampling.NoRepeatNGram = None,
    bad_word: sampling.BadWord = None,
    min_new_tokens: sampling.MinNewTokens = None,
    guidance_scale: sampling.GuidanceScale = None,
    negative_prompt: sampling.NegativePrompt = None,
    amateur: sampling.Amateur = None,
    dola_layers: sampling.DolaLayers = None,
    json_schema: sampling.JSONSchemaOption = None,
    regex: sampling.Regex = None,
    grammar: sampling.GrammarFile = None,
    choice: sampling.ChoiceTexts = None,
    draft: sampling.Draft = None,
    draft_tokens: sampling.DraftTokens = None,
    prompt_lookup: sampling.PromptLookup = None,
    order: sampling.Order = None,
    more: sampling.More = None,
    show_sampler: sampling.ShowSampler = False,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text. Repeatable.")] = None,
    logprobs: Annotated[int, typer.Option("--logprobs", metavar="N", help="One line per token: its probability and the N most probable ones.")] = 0,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            callback=_check_traces,
            help="Write how each token was chosen, link by link: a page (.html) or its numbers (.json); '-' prints a table. Repeatable.",
        ),
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", metavar="N", min=1, help="How many candidates --trace keeps of every stage.")] = 10,
    num_beams: beams.NumBeams = None,
    num_return_sequences: beams.NumReturn = None,
    length_penalty: beams.LengthPenalty = None,
    early_stopping: beams.EarlyStopping = None,
    coverage_penalty: beams.CoveragePenalty = None,
    num_beam_groups: beams.NumGroups = None,
    diversity_penalty: beams.DiversityPenalty = None,
    force_word: beams.ForceWord = None,
    beam_tree: beams.BeamTrees = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits with and without a draft, in any batch; slower.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message, put into the model's own chat template.")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; by default the file's (float16 becomes float32 on a CPU).")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep the quantised matrices of a .gguf file packed in memory.")] = False,
    quantise: Annotated[str | None, typer.Option("--quantise", metavar="KIND", help="int8 or int4: quantise while loading, by torchao.")] = None,
    weights: sampling.Weights = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")] = None,
    edits: Edits = None,
) -> None:
    """Continue a prompt with a trained model, token by token as they come."""
    options = locals()
    from ..infer import Trace, generation, stream
    from .models import open_model, tokenizer_of

    given = sampling.given(options) | sampling.rules(json_schema, regex, grammar, choice)
    given |= {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "dola_layers": sampling.layers(dola_layers)}
    if amateur:
        given["contrast"] = open_model(amateur, device, dtype, packed, quantise, weights).model
    loaded = open_model(model, device, dtype, packed, quantise, weights)
    text = _standard_input() if prompt == "-" else prompt
    asked = beams.said(options)
    known = loaded.extra.get("generation", {})
    chosen = beams.settings(known, given, more, asked) if asked else sampling.settings(known, given, more, sampling.BEYOND)
    if show_sampler:
        print(generation(loaded, max_new_tokens=max_new_tokens, seed=seed, **chosen), file=sys.stderr)
    beginning = "" if chat or hasattr(loaded.model, "encoder") else text  # an encoder-decoder reads the text and writes another
    read = loaded.chat([{"role": "user", "content": text}]) if chat else text
    run: dict[str, Any] = chosen | {"tokenizer": tokenizer_of(loaded, model), "eos_id": loaded.eos_ids, "max_new_tokens": max_new_tokens, "seed": seed}
    run |= {"stop": stop or (), "deterministic": deterministic, "prompt_lookup_num_tokens": prompt_lookup, "tap": edits_of(edits, loaded)}
    if asked:
        beams.run(loaded.model, read, beginning, beam_tree, **run, draft=draft, logprobs=logprobs, trace=bool(trace))
        return
    run |= {"draft": None if draft is None else open_model(draft, device, dtype, packed, quantise), "draft_tokens": draft_tokens}
    tokens = stream(loaded.model, read, **run, logprobs=logprobs, trace=candidates if trace else False)
    formed = any(chosen.get(name) is not None for name in ("json_schema", "regex", "grammar", "choices"))
    choices = _print(tokens, beginning, bool(logprobs), formed)
    if trace:
        _show(Trace(tuple(c for c in choices if c is not None), text), trace)


def _print(tokens: Iterable[Token], beginning: str, line_by_line: bool, formed: bool) -> list[Choice | None]:
    """Print the tokens as they come, as a text or one to a line, and (on standard error) what came of guesses and of a form; gives how each was chosen."""
    choices: list[Choice | None] = []
    guesses, reason = None, None
    try:
        for token in tokens:
            if not (choices or line_by_line):
                print(beginning, end="")  # not sooner: what is wrong with the sampler may show only where it meets the vocabulary
            choices.append(token.trace)
            guesses, reason = token.guesses, token.finish_reason
            print(_line(token) if line_by_line else token.text, end="\n" if line_by_line else "", flush=True)
    finally:
        if choices and not line_by_line:  # after Ctrl-C, too, the next line is one of its own
            print()
    if guesses is not None:
        print(guesses, file=sys.stderr)
    if formed and reason == "length":
        print(f"note: the text was cut after {len(choices)} tokens (-n), so it may be no more than the beginning of such a text.", file=sys.stderr)
    return choices


def _standard_input() -> str:
    """All of standard input. Raises :class:`InputError` if it is not UTF-8."""
    from ..core.errors import InputError

    try:
        return sys.stdin.buffer.read().decode("utf-8").replace("\r\n", "\n")  # whatever the locale says
    except UnicodeDecodeError as error:
        raise InputError(f"Standard input is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): convert it first.") from error


def _show(trace: Trace, places: list[str]) -> None:
    """Print the trace, or write it, wherever ``--trace`` says; what was written is said on standard error."""
    from rich.console import Console

    for place in places:
        if place == "-":
            console = Console(file=sys.stdout, highlight=False)
            if not console.is_terminal:
                console = Console(file=sys.stdout, highlight=False, width=160, color_system=None)
            print()
            console.print(trace)
        else:
            print(f"wrote {trace.save(place)}", file=sys.stderr)


def _line(token: Token) -> str:
    """``'e'  64.1%   best: 'e' 64.1%  'a' 12.0%``."""
    best = "  ".join(f"{c.text!r} {math.exp(c.logprob):.1%}" for c in token.top)
    return f"{token.text!r:12} {math.exp(token.logprob):6.1%}   best: {best}"
