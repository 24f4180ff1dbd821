"""Causal tracing: where in the model a fact about the subject passes (Meng et al., arXiv 2202.05262).

    clean       The Space Needle is in the city of ──► Seattle                       p
    corrupted   the subject's embeddings with noise ──► something else               p*
    restored    corrupted, but one state (layer, position) as in the clean run ──►   p* … p

The restored probability, less the corrupted one, is the indirect effect of that state. It says where a state suffices to bring the answer back after
this corruption; where the knowledge is stored, or where an edit would work, it does not say (Hase et al., arXiv 2301.04213).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.tap import Edit, Tap

from .figure import Theme, colour_bar, heatmap, plain_text
from .patching_question import site_path
from .result import Grid, Result
from .subject import Positions, Subject, Text, check_reads_tokens, check_whole, choose, read, with_weights
from .sweep import Patch, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATES = {"resid": "resid_post", "attn": "attn.out", "ffn": "ffn.out"}
NOTHING_LOST = "The noise did not lower the probability, so there is nothing to restore"


@dataclass(frozen=True, eq=False)
class Traced(Result):
    """The target's probability with single states restored: ``values`` [kind l t], the mean over the noise samples.

    ``clean``: without noise; ``corrupted``: with noise and nothing restored. ``window``: how many layers of attn and ffn are restored together, around each.
    """

    pieces: tuple[str, ...]
    subject: tuple[int, ...]
    kinds: tuple[str, ...]
    values: Tensor
    clean: float
    corrupted: float
    target: str
    noise: float
    samples: int
    window: int

    @property
    def title(self) -> str:
        return f"causal tracing of {self.target}: probability {self.clean:.3g}, {self.corrupted:.3g} with noise on the subject"

    @property
    def lowered(self) -> bool:
        """Whether the noise lowered the probability: only then is there something to restore."""
        return self.corrupted < self.clean

    def _labels(self) -> list[str]:
        return [f"{p}*" if i in self.subject else p for i, p in enumerate(self.pieces)]

    def best(self, n: int = 5) -> list[tuple[str, int, int, float]]:
        """The states that restore most: kind, layer, position, probability."""
        _, layers, t = self.values.shape
        order = self.values.flatten().argsort(descending=True)[:n].tolist()
        return [(self.kinds[i // (layers * t)], i // t % layers, i % t, float(self.values.flatten()[i])) for i in order]

    def grid(self) -> Grid:
        labels = self._labels()
        rows = tuple((k, layer, i, labels[i], p, p - self.corrupted) for k, layer, i, p in self.best(self.values.numel()))
        note = f"* the subject; noise {self.noise:g} times the embeddings' standard deviation, mean of {self.samples} samples; "
        note += f"attn and ffn in windows of {self.window} layers"
        note += "" if self.lowered else f"\n{NOTHING_LOST}: the effects are not to be read as restoring the answer."
        return Grid(("restored", "layer", "position", "token", "probability", "effect"), rows, note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        labels = self._labels()
        rows = [f"{i} {p}" for i, p in enumerate(labels)]
        effect = self.values - self.corrupted
        top = max(abs(self.clean - self.corrupted), float(effect.abs().max()))
        panels = figure.subplots(1, len(self.kinds), squeeze=False)[0]
        for axes, kind, values in zip(panels, self.kinds, effect, strict=True):
            image = heatmap(
                axes,
                theme,
                values.T,
                rows,
                [str(i) for i in range(values.shape[0])],
                title=kind,
                x="layer",
                limit=top,
                signed=True,
                bar=False,
            )
        colour_bar(panels, theme, image, "change of the probability")
        figure.suptitle(plain_text(self.title if self.lowered else f"{self.title}\n{NOTHING_LOST}"), color=theme.ink, fontsize=11)

    def size(self) -> tuple[float, float]:
        return (max(6.0, min(15.0, 4.6 * len(self.kinds))), max(3.2, min(14.0, 1.8 + 0.24 * len(self.pieces))))


def causal_trace(
    model: Any,
    text: Text,
    subject: Positions,
    *,
    target: Any = None,
    noise: float = 3.0,
    samples: int = 10,
    window: int = 1,
    kinds: Sequence[str] = ("resid", "attn", "ffn"),
    position: Positions = None,
    seed: int = 0,
    tokenizer: Any = None,
    source: Text | None = None,
    tap: Tap | None = None,
    memory: int | None = None,
    progress: bool | None = None,
) -> Traced:
    """Put noise on the embeddings of ``subject`` (words of the text, or positions), then restore one state at a time, by layer and position.

    ``target``: the token whose probability is asked (the model's own choice). ``noise``: times the standard deviation of the embedding table's
    numbers, as the stream
    receives them. ``window``: layers of attn and ffn restored together (the paper takes 10 of 48). ``kinds``: of resid (the stream as it leaves a
    block), attn, ffn.
    ``tap``: edits that hold in the clean, the noisy and the restored runs alike.
    Raises :class:`InputError` for a subject that does not stand in the text, :class:`SiteError` for a model without these states.
    """
    s = read(model, text, tokenizer, source=source, tap=tap)
    check_reads_tokens(s.stack, "Causal tracing")
    with_weights(s.stack, "Causal tracing")
    where, kinds = _asked(s, subject, kinds, noise, samples, window, seed)
    paths = {k: [site_path(s, STATES[k], n) for n in range(s.layers)] for k in kinds}
    clean = Sweep(s, [*(p for group in paths.values() for p in group), "embed"], memory=memory, progress=False)
    at = s.position(position)
    asked = s.target(target, clean.logits[at])
    if asked.against is not None:
        raise InputError("Causal tracing asks for the probability of one token, but a pair was given: name the first alone.")

    def score(logits: Tensor) -> Tensor:
        return logits[:, 0].double().softmax(-1)[:, asked.token]

    variants = _restored(clean, paths, window)
    total, start = torch.zeros(len(variants), dtype=torch.float64), 0.0
    for noisy in _noise(s, where, clean.base["embed"].shape[-1], noise, samples, seed):
        sweep = Sweep(s, tap=noisy, memory=memory, progress=progress)
        start += float(score(sweep.logits[at][None, None])[0]) / samples
        total += sweep.run(variants, score, (at,), "restoring states") / samples
    values = total.reshape(len(kinds), s.layers, len(s)).float()
    whole = float(score(clean.logits[at][None, None])[0])
    return Traced(tuple(s.pieces), tuple(where), kinds, values, whole, start, s.piece(asked.token), noise, samples, window)


def _asked(s: Subject, subject: Positions, kinds: Any, noise: Any, samples: int, window: int, seed: int) -> tuple[list[int], tuple[str, ...]]:
    """Where the noise goes, and which kinds of states are restored; all numbers checked."""
    if subject is None:
        raise InputError("The subject is missing: name the words of the text (or positions) whose embeddings get the noise.")
    where = s.positions(subject)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds) if isinstance(kinds, Iterable) else (kinds,)
    for kind in kinds:
        choose(kind, tuple(STATES), "kind of state")
    if not kinds:
        raise InputError(f"No kind of state was given: name at least one of {', '.join(STATES)}.")
    check_whole(1, samples=samples, window=window)
    check_whole(0, seed=seed)
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 < noise < math.inf:
        raise InputError(f"noise={noise!r}: it is a finite number above 0, times the embeddings' standard deviation.")
    return where, kinds


def _restored(clean: Sweep, paths: Mapping[str, Sequence[str]], window: int) -> list[list[Patch]]:
    """What is put back in each variant: one state, of attn and ffn with those of the layers around it."""
    made = []
    for kind, sites in paths.items():
        for n in range(len(sites)):
            span = [n] if kind == "resid" else [m for m in range(n - window // 2, n - window // 2 + window) if 0 <= m < len(sites)]
            made += [[Patch(sites[m], clean.base[sites[m]][0, i : i + 1], (i,)) for m in span] for i in range(len(clean.subject))]
    return made


def _noise(s: Subject, where: Sequence[int], width: int, noise: float, samples: int, seed: int) -> Iterator[Tap]:
    """The noise of each sample, as an edit of the embedding."""
    embed = s.stack.embed
    size = noise * float(embed.weight.detach().float().std()) * float(embed.factor)
    draw = torch.Generator().manual_seed(seed)
    index = torch.tensor(where, device=s.device)
    for _ in range(samples):
        change = size * torch.randn(len(where), width, generator=draw)
        yield Edit(s.prefix + "embed", lambda x, c=change: x.index_add(1, index, c.to(x).expand(x.shape[0], -1, -1)))  # type: ignore[misc]
