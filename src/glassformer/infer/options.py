"""What may be asked of ``generate``, and how it is read: options under their names, prompts as ids, a sampler, seeds.

    options ──► _checked ──► our own names ──► _read_sampler ──► Chain
    prompt ───► read_prompts ──► the ids of every row ──► _read_seed ──► a seed for each

Everything here happens before a model runs; nothing here knows one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence  # noqa: F401 : Callable for the annotations that Options takes over from Settings
from typing import Any, Literal

from torch import Tensor

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError, did_you_mean
from glassformer.core.fields import check, described, hints
from glassformer.core.tap import Tap

from .named import Settings, build_chain, renamed
from .sampler import Chain, Link

Prompt = str | list[int] | list[str] | list[list[int]] | Tensor
MAX_NEW_TOKENS = 128


class Options(Settings, total=False):
    """The options of :func:`generate` and :func:`stream`: these and the names of :class:`~glassformer.infer.named.Settings`; all have defaults."""

    tokenizer: Any  # to read a text prompt and to write text
    max_new_tokens: int  # 128
    sampler: Chain | Link | None  # a chain of links; or say some of the names of Settings (see build_chain for their order)
    seed: int | Sequence[int] | None  # one seed, or one per row
    stop: str | Sequence[str]  # texts that end a row
    stop_strings: str | Sequence[str] | None  # another name of stop
    eos_id: int | Iterable[int] | None  # ids that end a row; default the tokenizer's; () for none
    eos_token_id: int | Iterable[int] | None  # another name of eos_id
    cache: Cache | bool | None  # yours, or False for none (slow; for comparison)
    tap: Tap | None  # sees every call of the model; paths begin with step.{n}., step 0 is the prefill
    logprobs: int  # how many of the most probable tokens to report beside each
    trace: bool | int  # record what each link did to the candidates; a number says how many of every stage are kept (True: 10)
    deterministic: bool | None  # the same bits whatever the batch, the cache and the drafts are (slower: docs/generate/deterministic.md)
    decoder_start: int | Sequence[int] | None  # encoder-decoder: how the target begins; default the model's own (spec.start)
    # Speculative decoding: many tokens from one forward pass
    draft: Any  # who guesses: a smaller model of the same vocabulary, PromptLookup(), or anything with propose(ids, n)
    draft_tokens: int | None  # how many tokens are guessed at a time; 5
    draft_rule: str | None  # which guesses stay: "coupled" keeps the text of a seed, "rejection" accepts most; None chooses
    prompt_lookup_num_tokens: int | None  # short for draft=PromptLookup(), draft_tokens=n
    assistant_model: Any  # another name of draft
    num_assistant_tokens: int | None  # another name of draft_tokens
    num_speculative_tokens: int | None  # another name of draft_tokens
    # Combined models: logprobs and a trace's first stage are then those of the combination
    guidance_scale: float | None  # follow the prompt more (classifier-free guidance); 1 is off
    negative_prompt: str | Sequence[Any] | None  # a text or ids to go away from; default no prompt at all
    negative_prompt_ids: str | Sequence[Any] | None  # another name of negative_prompt
    contrast: Any  # a weaker model of the same vocabulary to go away from (contrastive decoding)
    contrast_alpha: float | None  # 0.1: tokens below this part of the best one's probability go
    contrast_beta: float | None  # 0.5: how strongly
    dola_layers: str | Sequence[int] | None  # "low", "high" or numbers: go away from an early layer (DoLa)
    penalty_alpha: float | None  # contrastive search among the top_k (4) most probable; 0 is off
    # Beam search (search.BeamSearch says how): the most probable text; with do_sample, temperature, … the beams are drawn
    num_beams: int | None  # how many beginnings are kept at every step; 1 is no search
    num_return_sequences: int | None  # how many of the best to give in .beams; default all that are kept
    length_penalty: float | None  # a score is divided by the length to this power: above 0 favours long texts, below 0 short ones; 1
    early_stopping: bool | Literal["never"] | None  # end: True: at num_beams texts; False (default): once the best beginning is behind; "never": for certain
    coverage_penalty: float | None  # encoder-decoder: how much it costs to leave parts of the source unattended
    num_beam_groups: int | None  # groups of beams that keep apart
    diversity_penalty: float | None  # what a token costs each time that another group has chosen it at this step
    force_words: str | Iterable[Any] | None  # phrases that must come: texts, lists of ids, or lists of alternatives
    force_words_ids: Iterable[Any] | None  # another name of force_words
    beam_tree: bool | None  # keep every hypothesis, alive and dead, in .tree


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under our own names, each of the kind that it should be."""
    kinds = hints(Options)
    for name in options:
        if name not in kinds:
            raise SamplerError(f"There is no option {name!r}.{did_you_mean(name, kinds)} Known: {', '.join(kinds)}.")
    check("generate", options, kinds, SamplerError)
    if options.get("tokenizer") is not None and not hasattr(options["tokenizer"], "decode"):
        raise InputError(f"tokenizer is {described(type(options['tokenizer']))}, but it has to encode and decode: gf.load(folder).tokenizer is one.")
    return renamed(options)


def read_prompts(prompt: Prompt, tokenizer: Any = None) -> tuple[list[list[int]], bool]:
    """The ids of every row, and whether a single prompt was given. Raises :class:`InputError` for anything that is no prompt."""
    given: Any = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    single = isinstance(given, str) or (isinstance(given, (list, tuple)) and bool(given) and all(isinstance(i, int) for i in given))
    rows = [given] if single else given
    if not isinstance(rows, (list, tuple)) or not rows:
        raise InputError(f"A prompt is a text, a list of ids, or a list of either, but got {prompt!r}.")
    return [_read_prompt(row, "The prompt" if len(rows) == 1 else f"Prompt {i}", tokenizer) for i, row in enumerate(rows)], single


def _read_prompt(row: Any, which: str, tokenizer: Any) -> list[int]:
    if isinstance(row, str):
        if tokenizer is None:
            raise InputError(f"{which} is a text ({row[:40]!r}), and without a tokenizer it cannot be read: give tokenizer=…, or ids.")
        row = getattr(tokenizer, "prompt", tokenizer.encode)(row) or _beginning(tokenizer)  # with what a text is to begin with
    if not isinstance(row, (list, tuple)) or not all(isinstance(t, int) for t in row):
        raise InputError(f"{which} is neither a text nor a list of ids: {row!r}.")
    if not row:
        raise InputError(f"{which} is empty, and the tokenizer has no beginning-of-text token to start from: give at least one token.")
    return list(row)


def _beginning(tokenizer: Any) -> list[int]:
    """What an empty text starts from: the beginning-of-text token, or (as in GPT-2) the one between texts."""
    known = (getattr(tokenizer, name, None) for name in ("bos_id", "eos_id"))
    return [token for token in known if token is not None][:1]


def _read_sampler(
    sampler: Chain | Link | None,
    seed: int | Sequence[int] | None,
    known: dict[str, Any],
    tokenizer: Any = None,
    eos_id: int | Iterable[int] | None = None,
    max_new_tokens: int | None = None,
) -> Chain:
    said = {name: value for name, value in known.items() if value is not None}
    if sampler is None:
        # The session is given the real seed; here it says that there is one, so that it is drawn.
        chain = build_chain(**said, seed=None if seed is None else 0, tokenizer=tokenizer, eos_id=eos_id, max_new_tokens=max_new_tokens)
    elif said:
        raise SamplerError(f"sampler={sampler!r} and {', '.join(said)} were both given: put what you want into the sampler, or leave it out.")
    else:
        chain = sampler if isinstance(sampler, Chain) else Chain((sampler,))
    _ = chain.final  # a chain without one is an error now, not at the first token
    return chain


def _read_seed(seed: int | Sequence[int] | None, prompts: list[list[int]]) -> tuple[list[int], int | None]:
    """The rows' own seeds, and the run's (None: as the chain says)."""
    if seed is None or isinstance(seed, int):
        seen: dict[tuple[int, ...], int] = {}
        own = []
        for ids in prompts:
            times = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
            own.append(_seed_of(ids, times))
        return own, seed
    if len(seed) != len(prompts):
        raise SamplerError(f"{len(seed)} seeds were given for {len(prompts)} prompts; give one seed, or one per prompt.")
    return [int(s) for s in seed], 0


def _seed_of(ids: list[int], times: int) -> int:
    """The own seed of a prompt that was there ``times`` times before."""
    return int.from_bytes(hashlib.blake2b(struct.pack(f"<{len(ids) + 1}q", times, *ids), digest_size=8).digest(), "little")


def _read_start(decoder_start: int | Sequence[int] | None, model: Any) -> list[int]:
    start = model.spec.start if decoder_start is None else decoder_start
    return [start] if isinstance(start, int) else list(start)
