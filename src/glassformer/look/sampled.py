"""What a sampler does to one real distribution, link by link.

    sampling(model, "She opened the", temperature=0.8, top_k=40, min_p=0.05)      a panel per link: who is left, and how probable

    model ──► Temperature ──► TopK ──► MinP ──► the draw
      p0          p1           p2       p3      one token

    model ──► guided, contrasted, … ──► links as above         where the numbers of several passes are combined first
      p0                p1

The links work on the logits at one position exactly as they do in generation, with the text as their history: what is shown is what
would be drawn from there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SamplerError
from glassformer.core.numerics import wide
from glassformer.core.tap import Tap
from glassformer.infer import Chain, Final, Greedy, Link, Session, Settings, build_chain
from glassformer.infer.combining import NAMES, combine

from .distributions import entropy
from .figure import Theme, dress, plain_text
from .next_tokens import check_k, quoted
from .result import Cell, Grid, Result
from .subject import Positions, Text, check_reads_tokens, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glassformer.text import Tokenizer


class Chosen(Settings, total=False):
    """The sampler's settings, and those that combine the model with another pass, as :func:`glassformer.generate` takes them."""

    guidance_scale: float | None
    negative_prompt: str | Iterable[int] | None
    contrast: Any
    contrast_alpha: float | None
    contrast_beta: float | None
    dola_layers: str | Sequence[int] | None


SHOWN = 24
"""Tokens that are followed, where the caller says nothing."""


@dataclass(frozen=True, eq=False)
class Sampling(Result):
    """What stands after each link (s stages, the first the model's own) for the most probable tokens (k), the most probable for the model first."""

    text: str
    position: int
    stages: tuple[str, ...]
    """[s] ``"model"``, what it was combined with (if it was), then the links that work, as they print."""
    ids: Tensor
    """[k]"""
    pieces: tuple[str, ...]
    p: Tensor
    """[s k] Probabilities; 0 where a token is not left."""
    left: tuple[int, ...]
    """[s] Tokens left, of the whole vocabulary."""
    entropy: Tensor
    """[s] Of the whole distribution, in bits."""
    removed: Tensor
    """[s] The probability, before a link, of all that it removes."""
    drawn: str | None
    """The token that would be drawn with this seed; None if the sampler has no link that picks."""

    @property
    def title(self) -> str:
        picks = "" if self.drawn is None else f"; the draw picks {self.drawn}"
        return f"After {self.text}: {self.left[0]:,} tokens and {self.entropy[0]:.2f} bits become {self.left[-1]:,} and {self.entropy[-1]:.2f}{picks}"

    def best(self, n: int = 5) -> list[tuple[str, float]]:
        """The ``n`` most probable tokens after the last link."""
        order = self.p[-1].argsort(descending=True)[:n].tolist()
        return [(self.pieces[i], float(self.p[-1, i])) for i in order if self.p[-1, i] > 0]

    def grid(self) -> Grid:
        rows: list[tuple[Cell, ...]] = []
        for i, piece in enumerate(self.pieces):
            rows.append((piece, int(self.ids[i]), *(float(x) if x > 0 else None for x in self.p[:, i])))
        said = [
            f"{name}: {n:,} tokens left, {h:.2f} bits" + (f", removes {mass:.1%} of the probability" if mass > 0 else "")
            for name, n, h, mass in zip(self.stages, self.left, self.entropy.tolist(), self.removed.tolist(), strict=True)
        ]
        return Grid(("token", "id", *(re.split("[(=]", name)[0] for name in self.stages)), tuple(rows), "\n".join(said))

    def size(self) -> tuple[float, float]:
        return (min(1.6 + 2.9 * len(self.stages), 24.0), 1.6 + 0.2 * len(self.pieces))

    def draw(self, figure: Figure, theme: Theme) -> None:
        """A panel per stage. Filled: the probability after the link; the line around it: before it; a cross: removed here or earlier."""
        from matplotlib.ticker import MaxNLocator

        panels = figure.subplots(1, len(self.stages), sharey=True, sharex=True, squeeze=False)[0]
        rows, most = range(len(self.pieces)), float(self.p.max())
        for s, axes in enumerate(panels):
            before, now = self.p[max(s - 1, 0)], self.p[s]
            axes.barh(rows, now.tolist(), color=theme.series[0], height=0.72)
            if s:
                axes.barh(rows, before.tolist(), facecolor="none", edgecolor=theme.series[1], linewidth=0.9, height=0.72)
            for i in rows:
                if now[i] <= 0:
                    fresh = before[i] > 0
                    axes.plot([float(before[i]) + 0.025 * most], [i], "x", color=theme.series[1] if fresh else theme.dim, markersize=4)
            title, rest = _folded(self.stages[s]), f"{self.left[s]:,} left, {self.entropy[s]:.2f} bits"
            lost = f", −{self.removed[s]:.1%}" if self.removed[s] >= 5e-4 else ""
            dress(axes, theme, title, f"probability\n{rest}{lost}")
            axes.title.set_fontsize(9)
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(rows, [plain_text(p) for p in self.pieces])
        panels[0].set_ylim(len(self.pieces) - 0.4, -0.6)
        panels[0].set_xlim(0, most * 1.08)
        panels[0].xaxis.set_major_locator(MaxNLocator(4))
        figure.suptitle(
            plain_text(f"After {self.text}" + ("" if self.drawn is None else f"   (drawn: {self.drawn})")), color=theme.ink, fontsize=11, x=0.01, ha="left"
        )


def _folded(name: str, width: int = 34) -> str:
    """The name of a link in lines that a panel has room for."""
    lines = [""]
    for part in plain_text(name).replace(", ", ", \n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    if len(lines) > 3:
        lines = [*lines[:2], lines[2].rstrip(", ") + ", …)"]
    return "\n".join(line if len(line) <= width + 8 else line[: width + 7] + "…" for line in lines)


@torch.no_grad()
def sampling(
    model: Any,
    text: Text,
    sampler: Chain | Link | None = None,
    k: int = SHOWN,
    *,
    seed: int = 0,
    position: Positions = None,
    tokenizer: Tokenizer | None = None,
    source: Text | None = None,
    tap: Tap | None = None,
    **settings: Unpack[Chosen],
) -> Sampling:
    """What each link of a sampler does to the distribution at one position (None: the last), for the ``k`` most probable tokens.

    The sampler is a chain (``TopK(40) | MinP(0.05)``; a link that picks may stand last) or ``settings`` as :func:`glassformer.generate` takes them,
    ``guidance_scale``, ``contrast`` and ``dola_layers`` among them: what these make of the model's numbers is then the second stage (of a decoder).
    The text up to the position is the history that penalties look at. ``p_s = softmax(logits after link s)``. ``tap``: edits that hold meanwhile.
    Raises :class:`InputError` for a model without scores over tokens or ``k`` below 1, and :class:`SamplerError` as generation does.
    """
    s = read(model, text, tokenizer, source=source, tap=tap)
    check_reads_tokens(s.stack, "sampling()")
    check_k(k)
    if sampler is not None and (both := [name for name in settings if name not in NAMES]):
        raise SamplerError(f"sampler={sampler!r} and {', '.join(both)} were both given: put what you want into the sampler, or leave it out.")
    together = {name: value for name, value in settings.items() if name in NAMES and value is not None}
    combined, left = combine(s.model, {**settings, "tokenizer": s.tokenizer})
    left.pop("tokenizer")
    if combined is not s.model and (tap is not None or source is not None):
        raise InputError(f"{next(iter(together))} is shown for a decoder as it is: leave {'tap' if tap is not None else 'source'} out.")
    if sampler is None:
        chain = build_chain(**left, seed=seed, tokenizer=s.tokenizer, eos_id=getattr(model, "eos_ids", None), max_new_tokens=1 << 20)
    else:
        chain = sampler if isinstance(sampler, Chain) else Chain((sampler,))
    if not chain.links:
        raise InputError("The chain has no links, so that there is nothing to see. Give one: TopK(40) | MinP(0.05), or settings such as top_k=40.")
    at = s.position(position)
    _, every = s.run()
    logits = wide(every[at])[None].cpu()
    mixed = None
    if combined is not s.model:
        session = Session(combined, [list(s.ids[: at + 1])], Greedy(), room=1)
        mixed = (", ".join(_said(name, value) for name, value in together.items()), wide(session.read())[:1].cpu())
    return _measured(s, at, logits, chain, min(k, logits.shape[1]), seed, mixed)


def _said(name: str, value: Any) -> str:
    """A setting in the title of a panel; a model has no short form."""
    if isinstance(value, str) and len(value) > 20:
        value = value[:18] + "…"
    return f"{name}={value!r}" if isinstance(value, str | int | float | list | tuple) else name


def _measured(s: Any, at: int, logits: Tensor, chain: Chain, k: int, seed: int, mixed: tuple[str, Tensor] | None = None) -> Sampling:
    picks = isinstance(chain.links[-1], Final)
    state = chain.state(1, seed=seed) if picks else None
    names, logp, drawn = ["model"], [logits.double().log_softmax(-1)[0]], None
    if mixed is not None:
        names.append(mixed[0])
        logits = mixed[1]
        logp.append(logits.double().log_softmax(-1)[0])
    for step in chain.steps(logits, [list(s.ids[: at + 1])], state):
        if isinstance(step.link, Final):
            drawn = (step.chosen or [-1])[0]
        elif not step.link.off:
            names.append(repr(step.link))
            logp.append(step.logits.double().log_softmax(-1)[0])
    stages = torch.stack(logp)
    shown = _followed(stages, k)
    p, alive = stages.exp(), stages > -math.inf
    lost = [0.0, *(float(p[i - 1][alive[i - 1] & ~alive[i]].sum()) for i in range(1, len(p)))]
    return Sampling(
        text=quoted(s, at),
        position=at,
        stages=tuple(names),
        ids=shown,
        pieces=tuple(s.piece(i) for i in shown.tolist()),
        p=p[:, shown].nan_to_num(0.0).float(),
        left=tuple(alive.sum(-1).tolist()),
        entropy=torch.stack([entropy(x[x > -math.inf]) for x in stages]).clamp(min=0).float(),
        removed=torch.tensor(lost),
        drawn=None if drawn is None or drawn < 0 else s.piece(drawn),
    )


def _followed(stages: Tensor, k: int) -> Tensor:
    """The model's ``k`` most probable tokens; where a link lifts others among the first few, those in place of the last ones."""
    own = stages[0].argsort(descending=True, stable=True)[:k]
    lifted = [i for x in stages[1:] for i in x.topk(min(3, k)).indices.tolist() if x[i] > -math.inf and i not in own]
    lifted = list(dict.fromkeys(lifted))[: k // 2]
    return torch.cat([own[: k - len(lifted)], torch.tensor(lifted, dtype=torch.long)])


__all__ = ["Sampling", "sampling"]
