"""What heads attend to: scores for the roles that the field has names for, each beside what an even head would get.

    texts ───────────────────► patterns ─┬─► previous, next, first, last, local, positional, uniform, entropy, distance
    random tokens, twice ────► patterns ─┴─► itself, same, duplicate, induction        (content means nothing there)

A role says where weight goes. It does not say what the head hands over from there, nor that the model's answer depends on it:
an ablation (``ablate``, ``head_redundancy``) does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.text import Tokenizer

from .patterns import head_names
from .random_rows import FEWEST, random_rows
from .result import Cell, Grid, Result
from .role_scores import DEFINITIONS, RELATIONS, ROLES, measure, relations
from .subject import check_whole, choose, read_head
from .windows import Reading, Texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .figure import Theme

BY_TOKEN = ("itself", "same", "duplicate", "induction")
"""Roles that go by token identity: measured on random tokens, where nothing else tells positions apart."""
NARROWER = {"same": ("itself", "duplicate"), "local": ("previous", "next"), "positional": ("previous", "next", "local")}
"""A wider role is named only where no narrower one that it holds is."""
EVEN = 0.9
"""Share of the largest possible entropy from which a head is called uniform."""


@dataclass(frozen=True, eq=False)
class HeadRoles(Result):
    """Scores of all heads; ``n`` counts heads (:attr:`heads`), ``r`` roles (:attr:`roles_known`).

    ``texts`` and ``repeats`` [n r]: the scores on the texts (NaN without) and on repeated random tokens; ``texts_even`` and ``repeats_even`` [n r]: what
    a head that spreads its weight evenly over all it sees gets on the same input (for uniform, where that is 1: what a head that sees one position gets, 0).
    ``entropy`` (bits) and ``distance`` (mean of \\|t - s\\|) [n]: of whole rows; ``entropy_rest`` and ``distance_rest``: with the first position taken
    out of every row and the row divided by what is left (rows with less than a thousandth left do not count).
    """

    heads: tuple[str, ...]
    texts: Tensor
    texts_even: Tensor
    repeats: Tensor
    repeats_even: Tensor
    entropy: Tensor
    distance: Tensor
    entropy_rest: Tensor
    distance_rest: Tensor
    lengths: tuple[int, ...]
    """Of the random rows before they are repeated."""
    tokens: int
    """Tokens of the texts (0: none were given; then all is measured on the random rows)."""
    roles_known: tuple[str, ...] = ROLES
    definitions: dict[str, str] = field(default_factory=lambda: dict(DEFINITIONS))
    stack: Any = field(default=None, repr=False)
    asked: tuple[str, float] | None = None
    """The role and the threshold that the table is about (:meth:`only`); None: all heads."""

    # Numbers

    @property
    def measured_on(self) -> tuple[str, ...]:
        """``"texts"`` or ``"repeats"`` for every role."""
        return tuple("repeats" if not self.tokens or r in BY_TOKEN else "texts" for r in ROLES)

    def _chosen(self, texts: Tensor, repeats: Tensor) -> Tensor:
        return torch.where(torch.tensor([m == "texts" for m in self.measured_on]), texts, repeats)

    @property
    def scores(self) -> Tensor:
        """[n r], each role on the input that it is judged by (:attr:`measured_on`)."""
        return self._chosen(self.texts, self.repeats)

    @property
    def baseline(self) -> Tensor:
        """[n r]: the even head on the same input."""
        return self._chosen(self.texts_even, self.repeats_even)

    @property
    def excess(self) -> Tensor:
        """``(score - baseline) / (1 - baseline)`` [n r]: 0 for an even head, 1 where all weight goes to the role's target."""
        return (self.scores - self.baseline) / (1 - self.baseline)

    @property
    def applicable(self) -> tuple[str, ...]:
        """The roles that some head could hold here (a decoder sees no next position)."""
        known = ~self.scores.isnan().all(0)
        return tuple(r for r, k in zip(ROLES, known.tolist(), strict=True) if k)

    def roles(self, threshold: float = 0.5) -> dict[str, tuple[str, ...]]:
        """The roles of every head: those whose :attr:`excess` is at least ``threshold`` (uniform: whose score is at least 0.9).

        At 0.5 or more, two roles with different targets cannot both hold on the same queries. Wider roles (same, local, positional) are named only where
        no narrower one that they contain is.
        """
        check_threshold(threshold)
        over = self.excess >= threshold
        over[:, ROLES.index("uniform")] = self.scores[:, ROLES.index("uniform")] >= EVEN
        found: dict[str, tuple[str, ...]] = {}
        for name, row in zip(self.heads, over.tolist(), strict=True):
            held = {r for r, has in zip(ROLES, row, strict=True) if has}
            found[name] = tuple(r for r in ROLES if r in held and not held & set(NARROWER.get(r, ())))
        return found

    def holding(self, role: str, threshold: float = 0.5) -> tuple[str, ...]:
        """The heads that hold a role, the highest score first."""
        column = self.scores[:, ROLES.index(choose(role, ROLES, "role"))]
        names = [n for n, held in self.roles(threshold).items() if role in held]
        return tuple(sorted(names, key=lambda n: -float(column[self.heads.index(n)])))

    def only(self, role: str, threshold: float | None = None) -> HeadRoles:
        """The same answer, its table about one role: the heads whose :attr:`excess` is at least ``threshold``, the highest score first.

        ``threshold`` None: 0.5, and for uniform, which an even head has at 1, 0.9. A wider role's table has the heads of the narrower ones too.
        Raises :class:`InputError` for what is no role or no threshold.
        """
        choose(role, ROLES, "role")
        least = (EVEN if role == "uniform" else 0.5) if threshold is None else threshold
        check_threshold(least)
        return replace(self, asked=(role, float(least)))

    def __getitem__(self, head: str | tuple[int, int]) -> dict[str, float]:
        """The scores of one head by role."""
        layer, h = read_head(self.stack, head)
        row = self.scores[self.heads.index(f"{layer}.{h}")]
        return {r: float(v) for r, v in zip(ROLES, row, strict=True) if r in self.applicable}

    def by_layer(self, values: Tensor) -> Tensor:
        """Mean over the heads of each layer, [n] -> [l]."""
        layer = torch.tensor([int(n.split(".")[0]) for n in self.heads])
        return torch.stack([values[layer == i].nanmean() for i in range(int(layer.max()) + 1)])

    # Showing

    @property
    def title(self) -> str:
        read = f"{self.tokens:,} tokens of text and " if self.tokens else ""
        about = "Roles" if self.asked is None else f"The role {self.asked[0]!r}"
        return f"{about} of {len(self.heads)} heads on {read}{len(self.lengths)} rows of random tokens, each twice"

    def grid(self) -> Grid:
        named = self.roles()
        shown = self.applicable
        rows: list[tuple[Cell, ...]] = []
        for i in self._order(named):
            own = tuple(round(float(self.scores[i, ROLES.index(r)]), 3) for r in shown)
            rows.append((self.heads[i], ", ".join(named[self.heads[i]]) or "–", *own, round(float(self.entropy[i]), 2), round(float(self.distance[i]), 1)))
        even = ", ".join(f"{r} {float(self.baseline[:, ROLES.index(r)].nanmean()):.3f}" for r in shown if r != "uniform")
        token = ", ".join(r for r, m in zip(ROLES, self.measured_on, strict=True) if m == "repeats" and r in shown)
        where = f"Measured on repeated random tokens: {token}; the rest on the texts." if self.tokens else "All measured on repeated random tokens."
        note = "" if self.asked is None else f"{self._answer()}\n"
        if self.asked is None:
            note += "Heads with a role come first, the highest of their roles' scores first; then those without one, by the highest of all scores. "
        note += f"Named at half of the way from an even head to all weight on the target (uniform: from {EVEN}). An even head gets: {even}. {where}"
        return Grid(("head", "roles", *shown, "entropy", "distance"), tuple(rows), note)

    def _order(self, named: dict[str, tuple[str, ...]]) -> list[int]:
        """The heads of the table: those with a role first, the highest score first; or those that come far enough in the role that was asked for."""
        if self.asked is None:
            return sorted(range(len(self.heads)), key=lambda i: (not named[self.heads[i]], -self._strongest(i, named[self.heads[i]])))
        role = ROLES.index(self.asked[0])
        reached = [i for i, excess in enumerate(self.excess[:, role].tolist()) if excess >= self.asked[1]]
        return sorted(reached, key=lambda i: -float(self.scores[i, role]))

    def _answer(self) -> str:
        """What the table is about, and what to do where it is empty."""
        assert self.asked is not None
        role, least = self.asked
        if role not in self.applicable:
            return f"No head can hold {role!r} here ({DEFINITIONS[role]}): no query of this model has such a target."
        way = "of the largest entropy" if role == "uniform" else "of the way from an even head to all weight on the target"
        said = f"{role}: {DEFINITIONS[role]}. "
        if reached := len(self._order({})):
            return f"{said}{reached} of {len(self.heads)} heads come at least {least:g} {way}, the highest score first."
        best = int(self.excess[:, ROLES.index(role)].nan_to_num(-9).argmax())
        near = float(self.excess[best, ROLES.index(role)])
        return f"{said}No head of {len(self.heads)} comes {least:g} {way}; the nearest is {self.heads[best]} with {near:.2g}: take a lower threshold to see it."

    def _strongest(self, i: int, held: Sequence[str]) -> float:
        return max((float(self.scores[i, ROLES.index(r)]) for r in held), default=float(self.scores[i].nan_to_num(0).max()))

    def size(self) -> tuple[float, float]:
        panels = len(self.applicable) + 2
        return (12.0, 2.6 * -(-panels // 4))

    def draw(self, figure: Figure, theme: Theme) -> None:
        from .figure import colours, dress, lines

        shown, named = self.applicable, self.roles()
        place = [tuple(int(x) for x in n.split(".")) for n in self.heads]
        n_layer, n_head = (max(p[i] for p in place) + 1 for i in (0, 1))
        axes = figure.subplots(-(-(len(shown) + 2) // 4), 4, squeeze=False).flatten()
        image = None
        for ax, role in zip(axes, shown, strict=False):
            values = torch.full((n_layer, n_head), torch.nan)
            for (layer, h), v in zip(place, self.scores[:, ROLES.index(role)], strict=True):
                values[layer, h] = v
            image = ax.imshow(values.clamp(0, 1).numpy(), cmap=colours(theme, False), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for (layer, h), name in zip(place, self.heads, strict=True):
                if role in named[name]:
                    ax.plot([h], [layer], marker="s", markersize=5, markerfacecolor="none", markeredgecolor=theme.series[1], markeredgewidth=1.4)
            dress(ax, theme, role, "head", "layer", grid=False)
            ax.set_xticks(range(0, n_head, -(-n_head // 12)))
            ax.set_yticks(range(0, n_layer, -(-n_layer // 12)))
        if image is not None:
            bar = figure.colorbar(image, ax=list(axes[: len(shown)]), fraction=0.012, pad=0.01)
            bar.ax.tick_params(colors=theme.dim, labelsize=8)
            bar.outline.set_visible(False)
        layers = range(n_layer)
        for ax, what, unit in ((axes[len(shown)], "entropy", "bits"), (axes[len(shown) + 1], "distance", "tokens")):
            both = {"whole rows": self.by_layer(getattr(self, what)), "without the first": self.by_layer(getattr(self, f"{what}_rest"))}
            lines(ax, theme, layers, both, title=f"{what} by layer", x_name="layer", y_name=unit)
            ax.set_xticks(range(0, n_layer, -(-n_layer // 12)))
        for ax in axes[len(shown) + 2 :]:
            ax.set_visible(False)


def check_threshold(threshold: Any) -> None:
    """Raise :class:`InputError` for what is no share above 0."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold!r}: it is a share of the way from an even head (0) to all weight on the target (1).")


def head_roles(
    model: Any,
    texts: Texts | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    source: Any = None,
    repeats: int = 8,
    length: int = 48,
    context: int | None = None,
    tokens: int | None = 4096,
    seed: int = 0,
) -> HeadRoles:
    """Score every self-attention head for the roles of :data:`DEFINITIONS`, on texts and on repeated random tokens.

    ``texts``: a text, a file (``Path``), ids, or a list; they are read in windows of ``context`` tokens, ``tokens`` in all. ``repeats``: rows ``r + r`` of
    random ordinary tokens, each at most once in ``r``, behind what the tokenizer puts before a text; the lengths of ``r`` are spread between ``length / 2``
    and ``length``, so that no fixed distance looks like induction (Olsson et al., arXiv 2209.11895). ``source``: of an encoder-decoder, whose decoder
    is looked at (random rows have a random source). Raises :class:`InputError` for a model whose positions or vocabulary are too few to repeat anything.
    """
    check_whole(0, repeats=repeats, length=length, seed=seed)
    if repeats < 1 or length < FEWEST:
        raise InputError(f"repeats={repeats} and length={length}: at least one row of {FEWEST} random tokens is repeated.")
    rows, first, random_source = random_rows(model, tokenizer, source, repeats, length, seed)
    twice = Reading(model, rows, tokenizer, source=random_source, context=max(map(len, rows)))
    lengths = tuple((len(r) - first[0] - first[1]) // 2 for r in rows)
    on_repeats = measure(twice, [first[0] + n for n in lengths])
    read = None if texts is None else Reading(model, texts, tokenizer, source=source, context=context, tokens=tokens)
    on_texts = None if read is None else measure(read, None)
    found = on_repeats if on_texts is None else on_texts
    entropy, distance, entropy_rest, distance_rest = (
        torch.cat([f[k] for f in found.figures]).float() for k in ("entropy", "distance", "entropy_rest", "distance_rest")
    )
    r, r_even = on_repeats.scores()
    t, t_even = on_texts.scores() if on_texts is not None else (torch.full_like(r, torch.nan), torch.full_like(r, torch.nan))
    n = 0 if on_texts is None else on_texts.tokens
    return HeadRoles(head_names(twice.stack), t, t_even, r, r_even, entropy, distance, entropy_rest, distance_rest, lengths, n, stack=twice.stack)


__all__ = ["DEFINITIONS", "RELATIONS", "ROLES", "HeadRoles", "head_roles", "relations"]
