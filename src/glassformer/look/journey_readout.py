"""The last steps of a journey: from the stream to scores, from scores to a token, a class or a vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glassformer.core.modes import evaluating
from glassformer.infer.sampler import Chain, Step
from glassformer.parts.readout import ClassifierLayer, LanguageModelLayer, TaggerLayer, VectorLayer

from .journey_formulas import linear
from .journey_run import ALL, Pick
from .journey_steps import Plan


class Ending:
    """What follows the final norm. ``chain`` draws from the scores at ``position``."""

    def __init__(self, plan: Plan, chain: Chain, position: int):
        self.plan, self.chain, self.position = plan, chain, position
        self.readout: Any = plan.half.stack.readout
        self._drawn: list[Step] | None = None

    def build(self, x: str) -> None:
        """Append the steps; a stack without a read-out has none."""
        readout = self.readout
        if isinstance(readout, LanguageModelLayer):
            self.sampled(self.words(readout, x))
        elif isinstance(readout, TaggerLayer):
            y = self.transform(readout, x, True)
            self.plan.add(
                "logits",
                "classes",
                "scores of the classes",
                linear("logits", "W", "h", readout.linear),
                "t v",
                (self.plan.t, readout.spec.n_classes),
                (y,),
                lambda pick: readout.linear(self.plan.of(y, pick)),
                by_row=True,
            )
        elif isinstance(readout, ClassifierLayer | VectorLayer):
            self.pooled(readout, x)

    # Over the vocabulary

    def words(self, readout: LanguageModelLayer, x: str) -> str:
        """Logits and probabilities; returns the logits' name."""
        plan, t, v = self.plan, self.plan.t, self.plan.half.stack.spec.vocab_size
        h = self.transform(readout, x, True)
        factor, cap = readout.factor, readout.spec.cap
        if factor != 1.0:
            source, shape = h, plan.steps[h].shape
            h = plan.add(
                "readout.scaled",
                "scaled",
                "multiply by a constant",
                f"h = {factor:g} · h",
                plan.steps[h].axes,
                shape,
                (h,),
                lambda pick: plan.of(source, pick) * factor,
                by_row=True,
            )
        matrix = "E" if readout.tied else "W_U"
        formula = f"logits[t] = {matrix} h[t]" + ("" if readout.bias is None else " + b") + (f" ({matrix}: the embedding's own table)" if readout.tied else "")
        name = "logits" if cap is None else "readout.scores"
        title = "a score for every token of the vocabulary"
        x = plan.add(name, "logits", title, formula, "t v", (t, v), (h,), lambda pick: readout.scores(plan.of(h, pick)), by_row=True)
        if cap is not None:
            scores = x
            formula = f"logits = {cap:g} tanh(scores / {cap:g})"
            x = plan.add("logits", "logits", "soft cap", formula, "t v", (t, v), (x,), lambda pick: cap * torch.tanh(plan.of(scores, pick) / cap), by_row=True)
        formula = "p[t] = exp(logits[t]) / Σ_v exp(logits[t, v])"
        plan.add("probabilities", "probabilities", "soft-max", formula, "t v", (t, v), (x,), lambda pick: _wide(plan.of(x, pick)).softmax(-1), by_row=True)
        return x

    def sampled(self, logits: str) -> None:
        """What each link leaves at the position, and the token that is picked."""
        plan, v = self.plan, self.plan.steps[logits].shape[-1]
        at = plan.add(
            "sampler.logits",
            "sampler.logits",
            f"the scores at position {self.position}",
            f"l = logits[{self.position}]",
            "v",
            (v,),
            (logits,),
            lambda _: plan.of(logits, Pick(rows=(self.position,)))[0].float(),
            dtype="float32",
        )
        for n, link in enumerate(self.chain.links):
            at = plan.add(
                f"sampler.{n}.{type(link).__name__}",
                "sampler.link",
                "a link of the sampler",
                f"l = {link!r}(l), −∞ where a token is removed",
                "v",
                (v,),
                (at,),
                lambda _, n=n: self.drawn[n].logits[0],  # type: ignore[misc]
                dtype="float32",
                module=(self, n),
            )
        plan.add(
            "next",
            "next",
            "the token that is picked",
            "next = the one token left",
            "",
            (),
            (at,),
            lambda _: torch.tensor(self.picked),
            dtype="int64",
            module=self,
        )

    @property
    def drawn(self) -> list[Step]:
        """The steps of the chain at the position, drawn once."""
        if self._drawn is None:
            with torch.no_grad(), evaluating(self.plan.half.model):
                row = self.plan.of(f"{self.plan.prefix}sampler.logits")
                self._drawn = list(self.chain.steps(row[None], [list(self.plan.half.ids[: self.position + 1])]))
        return self._drawn

    @property
    def picked(self) -> int:
        """The id of the token that is picked; -1 if the links left none."""
        chosen = self.drawn[-1].chosen
        assert chosen is not None
        return chosen[0]

    # Others

    def transform(self, readout: Any, x: str, by_row: bool) -> str:
        """The map before vocabulary or classes."""
        made, plan = readout.transform, self.plan
        if made is None:
            return x
        source, axes = x, plan.steps[x].axes.split()
        shape = (*plan.steps[x].shape[:-1], made.width)
        letters = " ".join([*axes[:-1], "d" if made.width == plan.d else "w"])
        name = plan.add(
            "readout.transform.linear",
            "map",
            "a map before the read-out",
            linear("y", "W_T", "h", made.linear),
            letters,
            shape,
            (x,),
            lambda pick: made.linear(plan.of(source, pick if by_row else ALL)),
            by_row=by_row,
        )
        act = self.readout.spec.transform.act
        x = plan.add(
            "readout.transform.act",
            "act",
            "its activation",
            f"y = {act}(y)",
            letters,
            shape,
            (name,),
            lambda pick: made.act(plan.of(name, pick if by_row else ALL)),
            by_row=by_row,
        )
        return plan.norm("readout.transform.norm", made.norm, x, "readout.transform.normed", by_row=by_row)

    def pooled(self, readout: Any, x: str) -> None:
        """One vector of the whole text, and the classes or the vector that it becomes."""
        plan, pool = self.plan, readout.spec.pool
        kind = type(pool).__name__
        formula = {"First": "h = h[0]", "Last": "h = h[last]", "Mean": "h = Σ_t h[t] / t"}.get(kind, f"h = {pool!r}(h)")
        source = x
        x = plan.add(
            "readout.pooled", "pooled", "one vector of the whole text", formula, "d", (plan.d,), (x,), lambda _: pool.pool(plan.of(source)[None], None)[0]
        )
        x = self.transform(readout, x, False)
        last = x
        if isinstance(readout, ClassifierLayer):
            n = readout.spec.n_classes
            formula = linear("logits", "W", "h", readout.linear)
            plan.add("logits", "classes", "scores of the classes", formula, "v", (n,), (x,), lambda _: readout.linear(plan.of(last)))
        elif readout.spec.normalise:
            formula, shape = "vector = h / |h|", plan.steps[x].shape
            plan.add("logits", "vector", "scale to length one", formula, plan.steps[x].axes, shape, (x,), lambda _: F.normalize(plan.of(last), dim=-1))
        else:
            plan.aliases[f"{plan.prefix}logits"] = x


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
