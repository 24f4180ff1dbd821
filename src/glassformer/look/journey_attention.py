"""The steps of one attention layer: queries, keys, values, weights, what each head mixes and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from glassformer.parts.attention import CrossAttentionLayer
from glassformer.parts.latent import LatentAttentionLayer
from glassformer.parts.norm import NoNormLayer

from .journey_formulas import bias_formula, linear, normaliser_formula
from .journey_run import Pick

if TYPE_CHECKING:
    from .journey_steps import Plan

Compute = Callable[[Pick], Tensor]


class Heads:
    """The steps of one attention layer."""

    def __init__(self, plan: Plan, i: int, name: str, layer: Any):
        self.plan, self.i, self.name, self.layer = plan, i, name, layer
        self.root = f"blocks.{i}.{name}."
        self.cross = isinstance(layer, CrossAttentionLayer)
        memory = plan.half.memory
        self.s = memory.shape[1] if self.cross and memory is not None else plan.t
        self.h, self.g, self.k, self.kv = layer.n_heads, layer.n_kv_heads, layer.d_head, layer.d_value

    def add(self, name: str, kind: str, title: str, formula: str, axes: str, inputs: tuple[str, ...], compute: Compute | None = None, **rest: Any) -> str:
        sizes = {"t": self.plan.t, "s": self.s, "h": self.h, "g": self.g, "k": self.k, "d": self.plan.d}
        shape = rest.pop("shape", None) or tuple(sizes[a] for a in axes.split())
        done = compute or self.plan.site(self.i, f"{self.name}.{name}")
        return self.plan.add(self.root + name, kind, title, formula, axes, shape, inputs, done, **rest)

    def build(self, x: str) -> str:
        """From what the layer reads to what it gives."""
        if isinstance(self.layer, LatentAttentionLayer):
            q, k, v = self.latent(x)
        else:
            q, k, v = self.projected(x)
        pattern = self.weigh(q, k)
        z = self.add("z", "z", "mix the values", f"z[t,h] = Σ_s pattern[h,t,s] v[s,{self.group}]", "t h k", (pattern, v), shape=(self.plan.t, self.h, self.kv))
        layer, plan = self.layer, self.plan
        result = self.add(
            "result",
            "result",
            "each head writes into the stream",
            "result[t,h] = W_O[h] z[t,h]",
            "t h d",
            (z,),
            lambda pick: layer.result(plan.of(z, Pick(rows=pick.rows))[None], pick.heads)[0],
            by_head=True,
            by_row=True,
        )
        formula = "out = Σ_h result[t,h]" + (" + b_O" if layer.out.bias is not None else "")
        return self.add("out", "attn.out", "the output projection", formula, "t d", (result,))

    @property
    def group(self) -> str:
        return "h" if self.h == self.g else f"⌊h / {self.h // self.g}⌋"

    def projected(self, x: str) -> tuple[str, str, str]:
        layer = self.layer
        bias = (layer.q if self.cross else layer.qkv).bias is not None
        plus = [f" + b_{n}[{a}]" if bias else "" for n, a in (("Q", "h"), ("K", "g"), ("V", "g"))]
        m = self.plan.way.memory if self.cross else x
        s = "memory[s]" if self.cross else "x[s]"
        q = self.add("q", "q", "queries: what each position asks", f"q[t,h] = W_Q[h] x[t]{plus[0]}", "t h k", (x,))
        q = self.turned(q, "q", "t", "h")
        k = self.add("k", "k", "keys: what each position is found by", f"k[s,g] = W_K[g] {s}{plus[1]}", "s g k", (m,))
        k = self.turned(k, "k", "s", "g")
        shape = (self.s, self.g, self.kv)
        v = self.add("v", "v", "values: what each position hands over", f"v[s,g] = W_V[g] {s}{plus[2]}", "s g k", (m,), shape=shape)
        return q, k, v

    def turned(self, x: str, which: str, row: str, head: str) -> str:
        """QK-norm and rotation, where there are any."""
        layer, plan = self.layer, self.plan
        norm, rotates = getattr(layer, f"{which}_norm"), not self.cross and layer.spec.position.rotates
        site = f"{self.name}.{which}_rot"
        last = f"{self.root}{which}_rot"
        if not isinstance(norm, NoNormLayer):
            out = f"{self.root}{which}_normed" if rotates else last
            x = plan.norm(f"{self.root}{which}_norm", norm, x, out, None if rotates else plan.site(self.i, site))
        if rotates:
            formula = f"{which}_rot[{row},{head}] = R(position {row}) {plan._short(x).rsplit('.', 1)[-1]}[{row},{head}], pairs of features turned"
            return self.add(f"{which}_rot", "rotate", "turn by position", formula, f"{row} {head} k", (x,))
        if isinstance(norm, NoNormLayer):
            plan.aliases[plan.prefix + last] = x
        return x

    def latent(self, x: str) -> tuple[str, str, str]:
        """Keys and values by way of a short vector (DeepSeek's latent attention)."""
        layer, plan, t = self.layer, self.plan, self.plan.t
        spec, nope = layer.spec, layer.d_nope
        source = x
        if spec.q_lora_rank is not None:
            r = spec.q_lora_rank
            formula = linear("q_down", "W_down", "x", layer.q_down)
            down = self.add("q_down", "map", "narrow to the queries' latent", formula, "t r", (x,), lambda _: layer.q_down(plan.of(x)), shape=(t, r))
            source = self._normed(f"{self.root}q_norm", layer.q_norm, down, "q_latent")
        q = self.add("q", "q", "queries: what each position asks", f"q[t,h] = W_Q[h] {plan._short(source).rsplit('.', 1)[-1]}[t]", "t h k", (source,))
        turned = f"q_rot = [q[:{nope}], R(position) q[{nope}:]]"
        q = self.add("q_rot", "rotate", "turn the last features by position", turned, "t h k", (q,))
        width = layer.rank + layer.d_rope
        formula = f"{linear('kv_down', 'W_kv', 'x', layer.kv_down)}; the first {layer.rank} become the latent"
        down = self.add(
            "kv_down",
            "map",
            "narrow to the latent and the key that all heads share",
            formula,
            "s r",
            (x,),
            lambda _: layer.kv_down(plan.of(x)),
            shape=(t, width),
        )
        cut = self.add(
            "kv_cut",
            "map",
            "the part that becomes the latent",
            f"kv_cut = kv_down[:{layer.rank}]",
            "s r",
            (down,),
            lambda _: plan.of(down)[:, : layer.rank],
            shape=(t, layer.rank),
        )
        latent = self._normed(f"{self.root}kv_norm", layer.kv_norm, cut, "latent")
        formula = f"k[s,h] = [W_K[h] latent[s], kv_down[s, {layer.rank}:]]"
        k = self.add("k", "k", "keys: what each position is found by", formula, "s g k", (latent, down))
        k = self.add("k_rot", "rotate", "turn the last features by position", f"k_rot = [k[:{nope}], R(position) k[{nope}:]]", "s g k", (k,))
        v = self.add("v", "v", "values: what each position hands over", "v[s,h] = W_V[h] latent[s]", "s g k", (latent,), shape=(t, self.g, self.kv))
        return q, k, v

    def _normed(self, path: str, norm: Any, x: str, out: str) -> str:
        """A norm that ends at the site ``out``, whose steps before are called after the norm's path."""
        site = self.plan.site(self.i, f"{self.name}.{out}")
        made = self.plan.norm(path, norm, x, self.root + out, site)
        if made == x:
            self.plan.aliases[self.plan.prefix + self.root + out] = x
        return made

    def weigh(self, q: str, k: str) -> str:
        """From query-key products to attention weights."""
        layer, half, i = self.layer, self.plan.half, self.i
        rule = half.rule(i, self.name)

        def upto(stage: str) -> Compute:
            return lambda pick: half.scores(i, self.name, pick, stage)

        def step(stage: str, kind: str, title: str, formula: str, *inputs: str) -> str:
            return self.add(stage, kind, title, formula, "h t s", inputs, upto(stage), by_head=True, by_row=True)

        x = step("products", "products", "how well each query fits each key", f"products[h,t,s] = q[t,h] · k[s,{self.group}]", q, k)
        if rule.scale != 1.0:
            x = step("scaled", "scores", "scale", f"scaled = {rule.scale:.6g} · products", x)
        if rule.cap is not None:
            x = step("capped", "scores", "soft cap", f"capped = {rule.cap:g} tanh({self.plan._short(x).rsplit('.', 1)[-1]} / {rule.cap:g})", x)
        if rule.bias is not None:
            bias = step("bias", "bias", "a bias by distance", bias_formula(half.stack, layer))
            x = step("biased", "scores", "add the bias", f"biased = {self.plan._short(x).rsplit('.', 1)[-1]} + bias", x, bias)
        hidden = "nothing is hidden" if rule.mask.dense is None and not rule.mask.causal else f"−∞ where {rule.mask.rule!r} hides s from t"
        x = step("scores", "masked", "the mask", f"scores = {self.plan._short(x).rsplit('.', 1)[-1]}, {hidden}", x)
        return step("pattern", "pattern", "the weights of attention", normaliser_formula(rule.normaliser), x)
