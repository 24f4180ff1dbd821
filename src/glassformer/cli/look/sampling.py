"""``glassformer look sampling``: what a sampler does to one distribution."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import sampling as options
from .common import Device, Dtype, Edits, Model, Out, Position, Rows, Source, edits_of, open_loaded, position_of, show


def sampling(
    text: Annotated[str, typer.Argument(help="The text that is continued; penalties look at it.")],
    model: Model,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Tokens that are followed.")] = 24,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    top_n_sigma: options.TopNSigma = None,
    xtc_probability: options.XTCProbability = None,
    xtc_threshold: options.XTCThreshold = None,
    mirostat: options.Mirostat = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    dry_multiplier: options.DryMultiplier = None,
    no_repeat_ngram_size: options.NoRepeatNGram = None,
    bad_word: options.BadWord = None,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    amateur: options.Amateur = None,
    dola_layers: options.DolaLayers = None,
    order: options.Order = None,
    more: options.More = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw that is shown.")] = 0,
    position: Position = None,
    source: Source = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
    edits: Edits = None,
) -> None:
    """Show what each link of a sampler leaves of the next token's distribution; with nothing said, of the sampler that generate uses."""
    given = options.given(locals())
    from ...look.sampled import sampling as ask

    loaded = open_loaded(model, device, dtype)
    given |= {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "dola_layers": options.layers(dola_layers)}
    if amateur:
        given["contrast"] = open_loaded(amateur, device, dtype).model
    said = options.only_said(given, more, ("contrast_alpha", "contrast_beta"))
    chosen = said or options.settings(getattr(loaded, "extra", {}).get("generation", {}), {})
    tap = edits_of(edits, loaded)
    show(ask(loaded, text, k=k, seed=seed, position=position_of(position), source=source, tap=tap, **chosen), out, max(rows, k))
