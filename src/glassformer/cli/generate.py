"""``glassformer generate``: continue a text."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import beams, sampling
from .look.common import Edits, edits_of

if TYPE_CHECKING:
    from ..infer import Token, Trace


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
    from ..infer import Trace, generation, stream
    from .models import open_model, tokenizer_of

    given = (
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p, "top_n_sigma": top_n_sigma}
        | {"xtc_probability": xtc_probability, "xtc_threshold": xtc_threshold, "mirostat": mirostat, "repetition_penalty": repetition_penalty}
        | {"frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty, "dry_multiplier": dry_multiplier, "bad_words": bad_word}
        | {"no_repeat_ngram_size": no_repeat_ngram_size, "min_new_tokens": min_new_tokens, "order": order}
        | sampling.rules(json_schema, regex, grammar, choice)
        | {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "dola_layers": sampling.layers(dola_layers)}
        | ({"contrast": open_model(amateur, device, dtype, packed, quantise, weights).model} if amateur else {})
    )
    loaded = open_model(model, device, dtype, packed, quantise, weights)
    text = _standard_input() if prompt == "-" else prompt
    asked = beams.said(
        {"num_beams": num_beams, "num_return_sequences": num_return_sequences, "length_penalty": length_penalty, "coverage_penalty": coverage_penalty}
        | {"num_beam_groups": num_beam_groups, "diversity_penalty": diversity_penalty, "force_words": force_word},
        *(early_stopping, beam_tree),
    )
    known = loaded.extra.get("generation", {})
    chosen = beams.settings(known, given, more, asked) if asked else sampling.settings(known, given, more)
    if show_sampler:
        print(generation(loaded, max_new_tokens=max_new_tokens, seed=seed, **chosen), file=sys.stderr)
    beginning = "" if chat or hasattr(loaded.model, "encoder") else text  # an encoder-decoder reads the text and writes another
    asked_of = loaded.chat([{"role": "user", "content": text}]) if chat else text
    if asked:
        run: dict[str, Any] = {
            "tokenizer": tokenizer_of(loaded, model),
            "eos_id": loaded.eos_ids,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "stop": stop or (),
            "deterministic": deterministic,
        }
        run |= {"draft": draft, "prompt_lookup_num_tokens": prompt_lookup}  # which a search refuses
        beams.run(loaded.model, asked_of, beginning, beam_tree, **run, **chosen, logprobs=logprobs, trace=bool(trace), tap=edits_of(edits, loaded))
        return
    tokens = stream(
        loaded.model,
        asked_of,
        tokenizer=tokenizer_of(loaded, model),
        eos_id=loaded.eos_ids,
        max_new_tokens=max_new_tokens,
        **chosen,
        seed=seed,
        stop=stop or (),
        logprobs=logprobs,
        trace=candidates if trace else False,
        tap=edits_of(edits, loaded),
        deterministic=deterministic,
        draft=None if draft is None else open_model(draft, device, dtype, packed, quantise),
        draft_tokens=draft_tokens,
        prompt_lookup_num_tokens=prompt_lookup,
    )
    choices = []
    if not logprobs:
        print(beginning, end="", flush=True)
    guesses = None
    for token in tokens:
        choices.append(token.trace)
        guesses = token.guesses
        print(_line(token) if logprobs else token.text, end="\n" if logprobs else "", flush=True)
    if not logprobs:
        print()
    if guesses is not None:
        print(guesses, file=sys.stderr)
    if trace:
        _show(Trace(tuple(c for c in choices if c is not None), text), trace)


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
