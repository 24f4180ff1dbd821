"""Initialisation by table: the first rule whose pattern meets a parameter's name fills it.

    Rule("**.{qkv,q,kv,up,gate_up}.weight", Normal(0.02))

A parameter that no rule claims is an error. Every parameter draws from a generator of its own,
seeded by the seed and its name, so that a change in one part leaves the others' values as they were.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from glassformer.core.errors import SpecError
from glassformer.core.spec import Spec, part


class Distribution(Spec):
    """How a parameter is filled."""

    def fill(self, x: Tensor, owner: nn.Module, name: str, n_layers: int, generator: torch.Generator) -> Tensor:
        """New values of the shape of ``x`` (on the processor, float32)."""
        raise NotImplementedError


@part
class Normal(Distribution):
    """Mean 0, standard deviation ``std``."""

    std: float = 0.02

    def fill(self, x: Tensor, owner: nn.Module, name: str, n_layers: int, generator: torch.Generator) -> Tensor:
        return torch.empty(x.shape).normal_(0.0, self.std, generator=generator)


@part
class ResidualNormal(Distribution):
    """Standard deviation ``std / sqrt(2 layers)``: for what is added to the stream twice a layer (GPT-2)."""

    std: float = 0.02

    def fill(self, x: Tensor, owner: nn.Module, name: str, n_layers: int, generator: torch.Generator) -> Tensor:
        return torch.empty(x.shape).normal_(0.0, self.std / math.sqrt(2 * max(n_layers, 1)), generator=generator)


@part
class FanIn(Distribution):
    """Standard deviation ``gain / sqrt(inputs)``."""

    gain: float = 1.0

    def fill(self, x: Tensor, owner: nn.Module, name: str, n_layers: int, generator: torch.Generator) -> Tensor:
        return torch.empty(x.shape).normal_(0.0, self.gain / math.sqrt(x.shape[-1]), generator=generator)


@part
class Xavier(Distribution):
    """Uniform in ``±gain sqrt(6 / (inputs + outputs))`` (Glorot and Bengio 2010; the 2017 transformer)."""

    gain: float = 1.0

    def fill(self, x: Tensor, owner: nn.Module, name: str, n_layers: int, generator: torch.Generator) -> Tensor:
        bound = self.gain * math.sqrt(6.0 / sum(x.shape[-2:]))
        return torch.empty(x.shape).uniform_(-bound, bound, generator=generator)


@part
class Fill(Distribution):
    """A constant."""

    value: float = 0.0

    def fill(self, x: Tensor, owner: nn.Module, name: str, n_layers: int, generator: torch.Generator) -> Tensor:
        return torch.full(x.shape, self.value)


@part
class Declared(Distribution):
    """What the part itself says it starts from (norms: the identity)."""

    def fill(self, x: Tensor, owner: nn.Module, name: str, n_layers: int, generator: torch.Generator) -> Tensor:
        constants: dict[str, float] = getattr(owner, "constants", {})
        if name not in constants:
            raise SpecError(f"{type(owner).__name__} declares no starting value for {name!r}: give it a rule with a distribution of its own.")
        return torch.full(x.shape, constants[name])


@part
class Rule(Spec):
    """Parameters whose name ends in one of ``names`` are filled by ``how``; ``name`` alone matches anywhere as a segment run at the end."""

    names: tuple[str, ...]
    how: Distribution

    def claims(self, path: str) -> bool:
        """Whether the rule is for the parameter at ``path``."""
        return any(path == n or path.endswith("." + n) for n in self.names)


@part
class Init(Spec):
    """A table of rules; the first that claims a parameter fills it."""

    rules: tuple[Rule, ...]

    def apply(self, model: nn.Module, n_layers: int, seed: int, root: str = "", skip: tuple[str, ...] = ()) -> None:
        """Fill every parameter of ``model``, which stands at ``root`` in a larger one, but those named in ``skip``.

        Raises :class:`SpecError` for a parameter that no rule claims.
        """
        owners = {f"{path}.{name}".lstrip("."): (module, name) for path, module in model.named_modules() for name, _ in module.named_parameters(recurse=False)}
        with torch.no_grad():
            for inner, x in model.named_parameters():
                if inner in skip:
                    continue
                path = f"{root}.{inner}" if root else inner
                rule = next((r for r in self.rules if r.claims(path)), None)
                if rule is None:
                    raise SpecError(
                        f"No initialisation rule claims the parameter {path!r} {tuple(x.shape)}: "
                        f"add a Rule(({path.rsplit('.', 1)[-1]!r},), ...) to the model's init table."
                    )
                digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                owner, name = owners[inner]
                x.copy_(rule.how.fill(x, owner, name, n_layers, generator))


NORMS = Rule(
    names=tuple(
        f"{n}.{w}"
        for n in ("norm", "norm1", "norm2", "norm_cross", "norm1_post", "norm2_post", "norm_cross_post", "final_norm", "q_norm", "k_norm", "kv_norm")
        for w in ("weight", "bias", "alpha")
    ),
    how=Declared(),
)
ZEROS = Rule(names=("bias", "normaliser.sinks", "routing.correction"), how=Fill(0.0))


ATTENTION = ("qkv", "q", "kv", "q_down", "q_up", "kv_down", "kv_up")
MATRICES = (*ATTENTION, "up", "gate_up", "router", "transform.linear", "lift_tokens", "lift_sum")


def table(matrices: Distribution, into_stream: Distribution, embeddings: Distribution, readout: Distribution) -> Init:
    """The usual table: norms as declared, biases zero, and four kinds of matrices."""
    return Init(
        rules=(
            NORMS,
            ZEROS,
            Rule(("out.weight", "down.weight"), into_stream),
            Rule(tuple(f"{n}.weight" for n in MATRICES), matrices),
            Rule(("embed.weight", "embed.types", "position.table"), embeddings),
            Rule(("readout.matrix", "readout.linear.weight"), readout),
        )
    )


GPT2_INIT = table(Normal(0.02), ResidualNormal(0.02), Normal(0.02), Normal(0.02))
"""Normal of 0.02, divided by sqrt(2 layers) where the stream is added to (GPT-2)."""

BERT_INIT = table(Normal(0.02), Normal(0.02), Normal(0.02), Normal(0.02))
"""Normal of 0.02 throughout (arXiv 1810.04805)."""

XAVIER_INIT = table(Xavier(), Xavier(), FanIn(), Xavier())
"""Xavier uniform matrices, embeddings of variance 1/d (the 2017 transformer)."""
