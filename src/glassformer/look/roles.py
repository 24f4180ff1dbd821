"""What heads attend to: scores for the roles that the field has names for, each beside what an even head would get.

    texts ───────────────────► patterns ─┬─► previous, next, first, last, local, positional, uniform, entropy, distance
    random tokens, twice ────► patterns ─┴─► itself, same, duplicate, induction        (content means nothing there)

A role says where weight goes. It does not say what the head hands over from there, nor that the model's answer depends on it:
an ablation (``ablate``, ``head_redundancy``) does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.text import Tokenizer

from .patterns import each_pattern, head_names
from .result import Cell, Grid, Result
from .subject import check_whole, choose, n_heads, n_layers, read_head, vocabulary
from .windows import Batch, Reading, Texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .figure import Theme

DEFINITIONS = {
    "previous": "weight on the position before (t-1)",
    "next": "weight on the position after (t+1), where the mask lets it be seen",
    "first": "weight on position 0, over queries after it (a sink)",
    "last": "weight on the last position, over queries before it, where the mask lets it be seen (a sink: [SEP])",
    "itself": "weight on the query's own position, over queries whose token stood earlier too",
    "local": "weight on the three positions before and the three after, the query's own not counted",
    "same": "weight on all positions that hold the query's token, its own among them, over queries whose token stands elsewhere too",
    "duplicate": "weight on earlier positions that hold the query's token",
    "induction": "weight on positions right after an earlier occurrence of the query's token (its own position not counted)",
    "positional": "R^2 of the weights against their mean by signed distance t-s (own position left out): what distance alone says of the pattern",
    "uniform": "entropy of the row over the logarithm of the number of visible positions: 1 is even",
}
"""What each score is; a mean over the queries that have a target and something else to see. Rows that sum to more than 1 are divided by their sum."""
ROLES = tuple(DEFINITIONS)
RELATIONS = ROLES[:9]
BY_TOKEN = ("itself", "same", "duplicate", "induction")
"""Roles that go by token identity: measured on random tokens, where nothing else tells positions apart."""
NARROWER = {"same": ("itself", "duplicate"), "local": ("previous", "next"), "positional": ("previous", "next", "local")}
"""A wider role is named only where no narrower one that it holds is."""
EVEN = 0.9
"""Share of the largest possible entropy from which a head is called uniform."""
WINDOW = 3
FEWEST = 4
"""Shortest random row that is repeated."""


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
        if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
            raise InputError(f"threshold={threshold!r}: it is a share of the way from an even head (0) to all weight on the target (1).")
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
        return f"Roles of {len(self.heads)} heads on {read}{len(self.lengths)} rows of random tokens, each twice"

    def grid(self) -> Grid:
        named = self.roles()
        shown = self.applicable
        order = sorted(range(len(self.heads)), key=lambda i: (not named[self.heads[i]], -self._strongest(i, named[self.heads[i]])))
        rows: list[tuple[Cell, ...]] = []
        for i in order:
            own = tuple(round(float(self.scores[i, ROLES.index(r)]), 3) for r in shown)
            rows.append((self.heads[i], ", ".join(named[self.heads[i]]) or "–", *own, round(float(self.entropy[i]), 2), round(float(self.distance[i]), 1)))
        even = ", ".join(f"{r} {float(self.baseline[:, ROLES.index(r)].nanmean()):.3f}" for r in shown if r != "uniform")
        token = ", ".join(r for r, m in zip(ROLES, self.measured_on, strict=True) if m == "repeats" and r in shown)
        where = f"Measured on repeated random tokens: {token}; the rest on the texts." if self.tokens else "All measured on repeated random tokens."
        note = f"Named at half of the way from an even head to all weight on the target (uniform: from {EVEN}). An even head gets: {even}. {where}"
        return Grid(("head", "roles", *shown, "entropy", "distance"), tuple(rows), note)

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
    rows, first, random_source = _random_rows(model, tokenizer, source, repeats, length, seed)
    twice = Reading(model, rows, tokenizer, source=random_source, context=max(map(len, rows)))
    lengths = tuple((len(r) - first[0] - first[1]) // 2 for r in rows)
    on_repeats = _measure(twice, [first[0] + n for n in lengths])
    read = None if texts is None else Reading(model, texts, tokenizer, source=source, context=context, tokens=tokens)
    on_texts = None if read is None else _measure(read, None)
    found = on_repeats if on_texts is None else on_texts
    entropy, distance, entropy_rest, distance_rest = (
        torch.cat([f[k] for f in found.figures]).float() for k in ("entropy", "distance", "entropy_rest", "distance_rest")
    )
    r, r_even = on_repeats.scores()
    t, t_even = on_texts.scores() if on_texts is not None else (torch.full_like(r, torch.nan), torch.full_like(r, torch.nan))
    n = 0 if on_texts is None else on_texts.tokens
    return HeadRoles(head_names(twice.stack), t, t_even, r, r_even, entropy, distance, entropy_rest, distance_rest, lengths, n, stack=twice.stack)


def _random_rows(model: Any, tokenizer: Tokenizer | None, source: Any, repeats: int, length: int, seed: int) -> tuple[list[list[int]], tuple[int, int], Any]:
    """Rows ``before + r + r + after``, how many tokens stand around them, and a source for them where one is needed."""
    from glassformer.infer.session import position_limit
    from glassformer.models.encoder_decoder import EncoderDecoderModel
    from glassformer.weights.own import Loaded

    bare = model.model if isinstance(model, Loaded) else model
    halves = isinstance(bare, EncoderDecoderModel)
    probe = Reading(model, [[0]], tokenizer, source=[0] if halves else None)
    before, after = probe.around
    special = (
        set(probe.tokenizer.special.values()) | {i for r in probe.tokenizer.roles if (i := probe.tokenizer.role_id(r)) is not None}
        if probe.tokenizer
        else set()
    )
    v = vocabulary(probe.stack) if probe.tokenizer is None else min(vocabulary(probe.stack), probe.tokenizer.vocab_size)
    ordinary = torch.tensor([i for i in range(v) if i not in special and i not in (*before, *after)])
    limit = position_limit(bare)
    room = length if limit is None else min(length, (limit - len(before) - len(after)) // 2)
    most = min(room, len(ordinary))
    if most < FEWEST:
        raise InputError(
            f"Random rows of {FEWEST} different tokens are repeated, but this model has {f'{limit:,}' if limit is not None else 'unlimited'} positions "
            f"and {len(ordinary)} ordinary tokens: too few to look for induction."
        )
    draw = torch.Generator().manual_seed(seed)
    least = max(FEWEST, most // 2)
    rows = []
    for i in range(repeats):
        n = most if repeats == 1 else least + round(i * (most - least) / (repeats - 1))
        r = ordinary[torch.randperm(len(ordinary), generator=draw)[:n]].tolist()
        rows.append([*before, *r, *r, *after])
    random_source = ordinary[torch.randperm(len(ordinary), generator=draw)[:most]].tolist() if halves else None
    return rows, (len(before), len(after)), random_source


# Measuring


def relations(ids: Tensor) -> Tensor:
    """Which keys are the target of which query, for each of :data:`RELATIONS`: ids [t] -> [r t s]."""
    t = len(ids)
    at = torch.arange(t)
    d = at[:, None] - at
    same = ids[:, None] == ids
    follows = torch.zeros(t, t, dtype=torch.bool)
    follows[:, 1:] = same[:, :-1]
    earlier = d > 0
    again = same & (d != 0)
    masks = {
        "previous": d == 1,
        "next": d == -1,
        "first": (at == 0) & (at[:, None] > 0),
        "last": (at == t - 1) & (at[:, None] < t - 1),
        "itself": (d == 0) & (same & earlier).any(-1, keepdim=True),
        "local": (d.abs() <= WINDOW) & (d != 0),
        "same": same & again.any(-1, keepdim=True),
        "duplicate": same & earlier,
        "induction": follows & earlier,
    }
    return torch.stack([masks[r] for r in RELATIONS])


class _Tally:
    """Sums over queries for the heads of one layer."""

    def __init__(self, h: int, reach: int):
        f = torch.float64
        self.weight, self.count, self.even = torch.zeros(h, len(RELATIONS), dtype=f), torch.zeros(len(RELATIONS), dtype=f), torch.zeros(len(RELATIONS), dtype=f)
        self.of_rows = {k: torch.zeros(h, dtype=f) for k in ("entropy", "distance", "uniform", "entropy_rest", "distance_rest", "rest")}
        self.rows, self.choices = 0, 0
        # By signed distance, for each head and (last) the even head: number, sum, sum of squares.
        self.reach = reach
        self.n, self.sum, self.square = (
            torch.zeros(2 * reach + 1, dtype=f),
            torch.zeros(h + 1, 2 * reach + 1, dtype=f),
            torch.zeros(h + 1, 2 * reach + 1, dtype=f),
        )

    def add(self, heads: slice, pattern: Tensor, visible: Tensor, masks: Tensor, fresh: int) -> None:
        """Weights [h t s] of some heads on one text; ``fresh``: how many positions from the first on make up the profile by distance."""
        t = pattern.shape[-1]
        seen = visible.sum(-1)
        once = heads.start == 0  # what is the same for all heads is counted with the first group
        reach = masks & visible
        counted = reach.any(-1) & (visible & ~reach).any(-1)
        # Sigmoid attention may give away more than 1: its rows are divided by their sum.
        pattern = pattern / pattern.sum(-1, keepdim=True).clamp_min(1.0)
        self.weight[heads] += pattern.flatten(1) @ (reach & counted[..., None]).flatten(1).double().T
        if once:
            self.count += counted.sum(-1)
            self.even += (reach.sum(-1) / seen.clamp_min(1) * counted).sum(-1)
            self.rows, self.choices = self.rows + t, self.choices + int((seen > 1).sum())
        self._rows(heads, pattern, seen)
        self._profile(heads, pattern, visible, seen, fresh, once)

    def _rows(self, heads: slice, pattern: Tensor, seen: Tensor) -> None:
        t = pattern.shape[-1]
        at = torch.arange(t)
        far = (at[:, None] - at).abs().double()
        share = pattern.abs()
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-30)
        bits = torch.special.entr(share).sum(-1) / math.log(2)
        self.of_rows["entropy"][heads] += bits.sum(-1)
        self.of_rows["distance"][heads] += (share * far).sum((-1, -2))
        choice = seen > 1
        self.of_rows["uniform"][heads] += (bits[:, choice] / seen[choice].double().log2()).sum(-1)
        left = share[:, 1:, 1:].sum(-1)
        kept = left > 1e-3
        rest = share[:, 1:, 1:] / left.clamp_min(1e-3)[..., None]
        self.of_rows["entropy_rest"][heads] += (torch.special.entr(rest).sum(-1) / math.log(2) * kept).sum(-1)
        self.of_rows["distance_rest"][heads] += ((rest * far[1:, 1:]).sum(-1) * kept).sum(-1)
        self.of_rows["rest"][heads] += kept.sum(-1)

    def _profile(self, heads: slice, pattern: Tensor, visible: Tensor, seen: Tensor, fresh: int, once: bool) -> None:
        at = torch.arange(pattern.shape[-1])
        d = at[:, None] - at
        pairs = visible & (d != 0) & (at[:, None] < fresh) & (at < fresh)
        index = d[pairs] + self.reach
        values = pattern[:, pairs]
        self.sum[:-1][heads] += torch.zeros_like(self.sum[:-1][heads]).index_add_(1, index, values)
        self.square[:-1][heads] += torch.zeros_like(self.sum[:-1][heads]).index_add_(1, index, values**2)
        if once:
            even = (1 / seen.clamp_min(1).double())[:, None].expand_as(d)[pairs]
            self.n.index_add_(0, index, torch.ones_like(even))
            self.sum[-1].index_add_(0, index, even)
            self.square[-1].index_add_(0, index, even**2)

    def scores(self) -> tuple[Tensor, Tensor]:
        """Scores [h r] and those of the even head [r], in the order of :data:`ROLES`."""
        explained = self._explained()
        uniform = self.of_rows["uniform"] / self.choices if self.choices else torch.full_like(self.of_rows["uniform"], torch.nan)
        scores = torch.cat([self.weight / self.count, explained[:-1, None], uniform[:, None]], -1)
        return scores, torch.cat([self.even / self.count, explained[-1:], explained.new_zeros(1)])

    def _explained(self) -> Tensor:
        """R^2 by distance for every head and the even head; 0 where there is nothing to explain."""
        n = self.n.sum()
        total = self.square.sum(-1) - self.sum.sum(-1) ** 2 / n
        within = (self.square - self.sum**2 / self.n.clamp_min(1)).sum(-1)
        return torch.where(total > 1e-10 * n, 1 - within / total.clamp_min(1e-300), torch.zeros_like(total)) if n else torch.full_like(total, torch.nan)

    def figures(self) -> dict[str, Tensor]:
        """Entropy and distance [h], of whole rows and of what is left of them without the first position."""
        o = self.of_rows
        return {k: o[k] / self.rows for k in ("entropy", "distance")} | {k: o[k] / o["rest"] for k in ("entropy_rest", "distance_rest")}


@dataclass(frozen=True, eq=False)
class _Measured:
    tallies: list[_Tally]
    tokens: int

    def scores(self) -> tuple[Tensor, Tensor]:
        """[n r] of all heads and of the even head in their layers."""
        found = [t.scores() for t in self.tallies]
        return torch.cat([s for s, _ in found]).float(), torch.cat([e.expand_as(s) for s, e in found]).float()

    @property
    def figures(self) -> list[dict[str, Tensor]]:
        return [t.figures() for t in self.tallies]


def _measure(reading: Reading, fresh: list[int] | None) -> _Measured:
    """Read everything once; ``fresh``: for every row, how many positions hold no repetition (None: profiles take all positions)."""
    stack = reading.stack
    tallies = [_Tally(n_heads(stack, i), reading.context) for i in range(n_layers(stack))]
    masks: dict[int, Tensor] = {}
    tokens = 0

    def take(layer: int, heads: slice, pattern: Tensor, visible: Tensor, batch: Batch) -> None:
        nonlocal tokens
        if layer == 0 and heads.start == 0:
            masks.clear()
            tokens += int(batch.real.sum())
        for row, window in enumerate(batch.windows):
            n = len(window.ids)
            if row not in masks:
                masks[row] = relations(torch.tensor(window.ids))
            own = visible[row % len(visible), :n, :n]
            tallies[layer].add(heads, pattern[row, :, :n, :n], own, masks[row], n if fresh is None else fresh[batch.number + row])

    each_pattern(reading, take)
    return _Measured(tallies, tokens)


__all__ = ["DEFINITIONS", "ROLES", "HeadRoles", "head_roles"]
