"""What one caller asks of an engine, and how it is read before anything runs.

    Request("Once upon", max_new_tokens=50, temperature=0.8, seed=7, user="ann")

The options are those of :func:`~glassformer.infer.generate`; what belongs to a whole run (``cache``, ``tokenizer``) belongs to the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

from glassformer.core.errors import InputError, SamplerError, did_you_mean
from glassformer.core.fields import hints
from glassformer.core.tap import Tap

from ..generate import _Row
from ..named import Settings, eos_ids
from ..options import MAX_NEW_TOKENS, Options, Prompt, _checked, _read_sampler, _read_seed, _read_start, _seed_of, read_prompts
from ..sampler import Chain
from ..state import State
from ..text import StopStrings
from ..trace import read_trace
from .limits import check_ids

OWN = ("max_new_tokens", "sampler", "seed", "stop", "eos_id", "tap", "logprobs", "trace", "decoder_start")
"""The options that an engine takes beside the names of Settings."""


class Request:
    """One prompt (a text, or a list of ids) and how to go on from it.

    ``user``: whose it is; users take turns. ``sample``: which of several answers to one prompt with one seed this is (0, 1, …): they go different ways,
    as equal prompts in one batch of ``generate`` do. ``options``: as :func:`~glassformer.infer.generate` takes them (``max_new_tokens``, ``temperature``, …,
    or ``sampler``, ``seed``, ``stop``, ``eos_id``, ``logprobs``, ``trace``, ``tap``; ``decoder_start`` where the prompt is an encoder's source).
    Raises :class:`SamplerError` for an option of another name.
    """

    def __init__(self, prompt: Prompt, *, user: str = "", sample: int = 0, **options: Unpack[Options]):
        self.prompt, self.user, self.sample = prompt, user, sample
        self.options: dict[str, Any] = _checked(options)
        known = (*OWN, *hints(Settings))
        for name, value in self.options.items():
            if name not in known and value is not None:
                whose = "the engine's own: Engine(model, tokenizer)" if name in ("tokenizer", "cache") else "not what an engine does: generate() takes it"
                raise SamplerError(f"A request has no option {name!r}; it is {whose}.{did_you_mean(name, known)}")

    def __repr__(self) -> str:
        said = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Request({self.prompt!r}{f', user={self.user!r}' if self.user else ''}{said})"


@dataclass(eq=False, repr=False)
class Job:
    """A request that was read: what to feed, how to draw, and how far it has come.

    ``ids``: what the model reads, prompt (or the target's beginning) and then the tokens drawn; ``source``: an encoder's ids. ``held``: how many of
    ``ids`` lie in the cache. ``top``, ``kept``: candidates to report, and to trace. ``number``: in the order of asking. ``begun``: whether any of its
    ``held`` it has read itself.
    """

    row: _Row
    ids: list[int]
    chain: Chain
    state: State
    source: list[int] | None = None
    tap: Tap | None = None
    top: int = 0
    kept: int = 0
    user: str = ""
    held: int = 0
    number: int = 0
    begun: bool = False
    ticket: Any = None

    @property
    def drawn(self) -> int:
        """How many tokens it was given."""
        return len(self.row.ids)

    @property
    def reading(self) -> bool:
        """Whether more than the last token is still to be read."""
        return self.held < len(self.ids) - 1 or not self.row.ids


def read(request: Request, model: Any, tokenizer: Any, eos_id: Any, seed: int | None, device: Any) -> Job:
    """The job that a request stands for. Raises :class:`InputError` and :class:`SamplerError` as ``generate`` does; nothing runs."""
    given = dict(request.options)
    limit = given.pop("max_new_tokens", MAX_NEW_TOKENS)
    sampler, stop, tap = given.pop("sampler", None), given.pop("stop", None) or (), given.pop("tap", None)
    top, kept, start = given.pop("logprobs", 0) or 0, read_trace(given.pop("trace", False)), given.pop("decoder_start", None)
    own_seed = given.pop("seed", None)
    seed = seed if own_seed is None else own_seed  # the engine's own makes nobody draw who does not
    ends = given.pop("eos_id", None)
    ends = eos_id if ends is None else ends
    if limit < 1:
        raise InputError(f"max_new_tokens is {limit}; ask for at least 1.")
    if top < 0:
        raise InputError(f"logprobs is {top}; it is the number of candidates to report, 0 or more.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if stops and tokenizer is None:
        raise InputError("Stop strings are text, and without a tokenizer there is only ids: give Engine(model, tokenizer), or end on ids by eos_id=….")
    prompts, single = read_prompts(request.prompt, tokenizer)
    if not single and len(prompts) > 1:
        raise InputError(f"A request has one prompt, but {len(prompts)} were given: submit one request for each, or engine.generate(prompts).")
    prompt = prompts[0]
    check_ids(prompt, model)
    chain = _read_sampler(sampler, own_seed, given, tokenizer, ends, limit)
    # The seed of this answer only: those of the samples before it are other requests'.
    seeds, run_seed = ([_seed_of(prompt, request.sample)], seed) if seed is None or isinstance(seed, int) else _read_seed(seed, prompts)
    translates = hasattr(model, "encode") and hasattr(model, "decode")
    if start is not None and not translates:
        raise InputError("decoder_start is for encoder-decoder models; this one continues the prompt itself.")
    ids = list(_read_start(start, model)) if translates else list(prompt)
    row = _Row(0, prompt, tokenizer, limit, eos_ids(ends, tokenizer), StopStrings(stops), [] if translates else prompt, choices=[] if kept else None)
    return Job(row, ids, chain, chain.state(1, seeds, run_seed, device), prompt if translates else None, tap, top, kept, request.user)
