"""The way of one text through a model, step by step, in the order of computation.

    way = journey(loaded, "The old man sat down")
    print(way)                                              every step: name, shape, what it means for this text
    way["blocks.2.attn.pattern"].formula                    and .title .axes .shape .inputs .meaning .values
    way.values("blocks.2.attn.pattern", head=3)             only that head is computed
    way.to_json()                                           the steps without their numbers
    way.slice_of("blocks.2.attn.pattern", "3, :, 0:4")      numbers on demand, ready for JSON

Held is the stream that enters each block; all else is computed again when it is asked for (``journey_run``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError, did_you_mean
from glassformer.infer.links import Greedy
from glassformer.infer.sampler import Chain, Link
from glassformer.models.encoder_decoder import EncoderDecoderModel

from . import meaning
from .figure import Theme
from .journey_index import Index, axis_names, plain_index, read_index
from .journey_page import page_of
from .journey_picture import draw_journey
from .journey_readout import Ending
from .journey_run import Half, Pick, quiet
from .journey_steps import JourneyStep, Plan
from .result import Grid, Result, plain
from .subject import Positions, Subject, Text, check_layer, n_heads, read, shorten, with_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERS = 1_000_000
"""Numbers that :meth:`Journey.slice_of` gives at once."""


class Way:
    """What the steps of a journey are computed by."""

    def __init__(self, s: Subject, chain: Chain, position: int, head: int | None):
        stack = with_weights(s.stack, "A journey")
        self.subject, self.position, self.head, self.memory = s, position, head, ""
        plans = []
        memory = None
        if isinstance(s.model, EncoderDecoderModel):
            source = Half(s.model, s.model.encoder, "encoder.", "source", s.source_ids, s.source_pieces)
            memory = source.final
            plans.append(Plan(self, source))
            self.memory = plans[0].build()
        self.main = Plan(self, Half(s.model, stack, s.prefix, "text", s.ids, s.pieces, memory))
        plans.append(self.main)
        Ending(self.main, chain, position).build(self.main.build())
        self.plans = tuple(plans)
        self.steps = {name: step for plan in plans for name, step in plan.steps.items()}
        self.aliases = {name: step for plan in plans for name, step in plan.aliases.items()}
        self.said: dict[tuple[str, int, int | None], str] = {}
        self.narrowest: dict[tuple[str, int], int] = {}

    def step(self, name: str) -> JourneyStep:
        """A step by its name (that of a decoder also without its prefix); raises :class:`SiteError` with the nearest ones."""
        for tried in (name, f"{self.subject.prefix}{name}"):
            found = self.aliases.get(tried, tried)
            if found in self.steps:
                return self.steps[found]
        raise SiteError(
            f"{name!r} is no step of this journey.{did_you_mean(str(name), [*self.steps, *self.aliases])} print(journey) lists all {len(self.steps)}."
        )

    def half(self, step: JourneyStep) -> Half:
        """The stack that a step belongs to."""
        return self.plans[0].half if step.side == "source" else self.main.half

    def keys(self, step: JourneyStep) -> tuple[str, ...]:
        """The pieces that the axis ``s`` of a step counts."""
        crossed = ".cross." in step.name
        return self.plans[0].half.pieces if crossed else self.half(step).pieces

    def index(self, step: JourneyStep, where: str | None, given: dict[str, Index]) -> list[int | list[int] | None]:
        """What a part of a step's values is, axis by axis."""
        group = 1
        if "g" in step.axes.split() and step.layer is not None:
            heads = self.half(step).stack.blocks[step.layer].cross if ".cross." in step.name else self.half(step).stack.blocks[step.layer].attn
            group = heads.n_heads // heads.n_kv_heads
            if (asked := given.get("head")) is not None and isinstance(asked, int) and asked >= heads.n_heads:
                raise SiteError(f"Head {asked} was asked for at {step.name}, whose layer has {heads.n_heads} heads, 0 to {heads.n_heads - 1}.")

        return read_index(step.name, step.axes, step.shape, where, given, group, lambda letter, text: self.where(step, letter, text))

    def where(self, step: JourneyStep, letter: str, text: str) -> list[int]:
        """The places along a position axis of a step where a word stands."""
        pieces = self.keys(step) if letter == "s" else self.half(step).pieces
        return dataclasses.replace(self.subject, ids=(0,) * len(pieces), pieces=pieces).positions(text)

    def values(self, name: str, where: str | None = None, **given: Index) -> Tensor:
        """The values of a step, or the part of them that is asked for."""
        step = self.step(name)
        return self.taken(step, self.index(step, where, given))

    def taken(self, step: JourneyStep, picked: list[int | list[int] | None]) -> Tensor:
        """The part of a step's values; of attention matrices only the heads picked are computed, of scores over words only the positions."""
        letters = step.axes.split()
        many = [[p] if isinstance(p, int) else p for p in picked]

        def at(letter: str, able: bool) -> tuple[int, ...] | None:
            chosen = many[letters.index(letter)] if able and letter in letters else None
            return None if chosen is None else tuple(chosen)

        pick = Pick(at("h", step.by_head), at("t", step.by_row))
        x = quiet(self.subject.model, lambda: step._compute(pick))
        done = ("h" if pick.heads is not None else "") + ("t" if pick.rows is not None else "")
        for axis, (letter, chosen) in enumerate(zip(letters, many, strict=True)):
            if chosen is not None and letter not in done:
                x = x.index_select(axis, torch.tensor(chosen, device=x.device))
        for axis in reversed([n for n, p in enumerate(picked) if isinstance(p, int)]):
            x = x.squeeze(axis)
        x = x.detach().cpu()
        return x if not x.is_floating_point() or x.dtype in (torch.float32, torch.float64) else x.float()

    def meaning(self, name: str, position: int | None = None, head: int | None = None) -> str:
        """What a step means for this text, at a position and (where it has heads) of a head."""
        step = self.step(name)
        half = self.half(step)
        at = self.position if step.side == "text" else len(half.pieces) - 1
        key = (step.name, at if position is None else position, self.head if head is None else head)
        if key not in self.said:
            self.said[key] = meaning.sentence(self, step, key[1], key[2])
        return self.said[key]


@dataclass(frozen=True, eq=False)
class Journey(Result):
    """Every step of one text's way through a model.

    ``position`` and ``head`` are what the sentences speak of (``head`` None: in each layer the one that says most). ``layer``: the one that tables and
    pages show (None: all); ``steps`` are always all. ``journey[name]`` is one :class:`JourneyStep`.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    source_ids: tuple[int, ...]
    source_pieces: tuple[str, ...]
    position: int
    head: int | None
    layer: int | None
    steps: tuple[JourneyStep, ...]
    _way: Way = field(repr=False)

    def __getitem__(self, name: str) -> JourneyStep:
        return self._way.step(name)

    def __iter__(self) -> Iterator[JourneyStep]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, name: object) -> bool:
        return any(n in self._way.steps or n in self._way.aliases for n in (name, f"{self._way.subject.prefix}{name}"))

    @property
    def shown(self) -> tuple[JourneyStep, ...]:
        """The steps that tables and pages show."""
        return tuple(s for s in self.steps if self.layer is None or s.layer == self.layer)

    @property
    def bytes(self) -> int:
        """Bytes held now: the streams, and the blocks that were computed again last."""
        return sum(plan.half.bytes for plan in self._way.plans)

    @property
    def next(self) -> int | None:
        """The token that is picked at the position; None where the model predicts none."""
        return int(self.values("next")) if "next" in self else None

    # Numbers on demand

    def values(self, name: str, where: str | None = None, **axes: Index) -> Tensor:
        """The values of a step, or a part: ``head=3``, ``position="fox"``, ``feature=slice(0, 8)``; or by place, ``"3, :, 0:4"``.

        An axis at one place goes. Of scores and patterns only the heads that are asked for are computed. ``head`` of keys and values is the query head
        that reads them. Raises :class:`SiteError` for a step or a head that does not exist, :class:`InputError` for a part that does not.
        """
        return self._way.values(name, where, **axes)

    def slice_of(self, name: str, where: str | None = None, *, most: int = MOST_NUMBERS, **axes: Index) -> dict[str, Any]:
        """The same as plain data for JSON: name, axes and shape of what is given, the index, and the numbers as lists (None: infinite, or not a number).

        Raises :class:`InputError` for more than ``most`` numbers, before anything is computed.
        """
        step = self[name]
        picked = self._way.index(step, where, axes)
        sizes = [1 if isinstance(p, int) else n if p is None else len(p) for p, n in zip(picked, step.shape, strict=True)]
        if (total := int(torch.tensor(sizes, dtype=torch.int64).prod())) > most:
            raise InputError(f"This part of {step.name} holds {total:,} numbers, but at most {most:,} are given at once: narrow it, or set most=.")
        values = self._way.taken(step, picked)
        letters = [a for a, p in zip(step.axes.split(), picked, strict=True) if not isinstance(p, int)]
        return {
            "name": step.name,
            "axes": " ".join(letters),
            "shape": list(values.shape),
            "dtype": step.dtype,
            "index": plain_index(picked, step.axes),
            "values": plain(values),
        }

    def meaning(self, name: str, *, position: Positions = None, head: int | None = None) -> str:
        """What a step means for this text, said of another position or head. Raises :class:`SiteError` for a head that it has not."""
        step = self[name]
        at = None
        if isinstance(position, int | str):
            n = len(self._way.half(step).pieces)
            found = read_index(step.name, "t", (n,), None, {"position": position}, 1, lambda letter, text: self._way.where(step, letter, text))[0]
            at = found[-1] if isinstance(found, list) else found
        elif position is not None:
            raise InputError(f"One position is spoken of at a time, but {position!r} was given: a number or a word.")
        if head is not None and "h" in step.axes.split():
            self._way.index(step, None, {"head": head})
        return self._way.meaning(step.name, at, head)

    def labels(self, name: str) -> dict[str, list[str]]:
        """The pieces along a step's position axes, by the axis's name: for whoever draws it."""
        step = self[name]
        pieces = {"position": self._way.half(step).pieces, "key": self._way.keys(step)}
        return {n: list(pieces[n]) for n in axis_names(step.axes) if n in pieces}

    # Showing

    @property
    def title(self) -> str:
        """One line: what was asked of what."""
        where = "" if self.layer is None else f", layer {self.layer}"
        return f"The way of {shorten(' '.join(self.pieces))!r}, said of {self.pieces[self.position]!r} at {self.position}{where}"

    def grid(self) -> Grid:
        """One row per step."""
        rows = [(s.name, " × ".join(map(str, s.shape)) or "1", s.meaning) for s in self.shown]
        return Grid(("step", "shape", "what it means for this text"), tuple(rows), "Formulas: journey[step].formula; numbers: journey.values(step).")

    def size(self) -> tuple[float, float]:
        return (min(14.0, 8.0 + 0.22 * min(len(self.ids), 48)), 4.2 + 0.16 * min(2 * len(self._way.main.half.streams), 48))

    def draw(self, figure: Figure, theme: Theme) -> None:
        draw_journey(self, figure, theme)

    def to_dict(self) -> dict[str, Any]:
        """The journey without its numbers: pieces, and of every step all but the values (those come from :meth:`slice_of`)."""
        head = {n: plain(getattr(self, n)) for n in ("ids", "pieces", "source_ids", "source_pieces", "position", "head", "layer")}
        words = ("name", "layer", "title", "formula", "axes", "shape", "inputs", "dtype", "kind", "side", "meaning")
        return {"kind": "Journey", "title": self.title, **head, "steps": [{w: plain(getattr(s, w)) for w in words} for s in self.steps]}

    def to_html(self) -> str:
        """A chapter: every step that is shown with its formula, its sentence and a small picture of its numbers."""
        return page_of(self)


def journey(
    model: Any,
    text: Text,
    *,
    tokenizer: Any = None,
    source: Text | None = None,
    sampler: Chain | Link | None = None,
    position: Positions = None,
    layer: int | None = None,
    head: int | None = None,
) -> Journey:
    """The whole way of one text through a model: every step with its formula, its numbers on demand, and a sentence of what it means for this text.

    ``position``: what sentences speak of and where the next token is drawn (None: the last; in an encoder the mask token, where there is one).
    ``sampler``: the chain that draws it (None: ``Greedy()``). ``head``: the head that sentences speak of (None: in each layer the one whose pattern is
    narrowest at the position). ``layer``: the one that tables and pages show (None: all).
    Raises :class:`InputError` for an empty text or one too long, :class:`SiteError` for a layer or head that the model has not,
    :class:`SamplerError` for a chain that picks no token.
    """
    s = read(model, text, tokenizer, source=source)
    stack = with_weights(s.stack, "A journey")
    if layer is not None:
        check_layer(stack, layer)
    if head is not None:
        most = max((n_heads(stack, i) for i in ([layer] if layer is not None else range(len(stack.blocks)))), default=0)
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < most:
            where = "the model" if layer is None else f"layer {layer}"
            raise SiteError(f"Head {head!r} was asked for, but {where} has {most} heads, 0 to {most - 1}.")
    chain = sampler if isinstance(sampler, Chain) else Chain((Greedy(),)) if sampler is None else Chain((sampler,)) if isinstance(sampler, Link) else None
    if chain is None:
        raise InputError(f"sampler= is a chain of links such as TopK(40) | Greedy(), but {type(sampler).__name__} was given.")
    _ = chain.final
    at = s.position(position)
    with torch.no_grad():
        way = Way(s, chain, at, head)
    return Journey(s.ids, s.pieces, s.source_ids, s.source_pieces, at, head, layer, tuple(way.steps.values()), way)
