"""What is searched for, and by which score: the choices of a beam search as one Spec."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar, Literal

from glassformer.core.errors import GlassformerError, SamplerError
from glassformer.core.spec import Spec, part

from ..drawing import AdaptiveP, Mirostat1, Mirostat2
from ..links import Draw, Greedy
from ..sampler import Chain

NAMES = (
    *("num_beams", "num_return_sequences", "length_penalty", "early_stopping", "coverage_penalty"),
    *("num_beam_groups", "diversity_penalty", "force_words", "beam_tree"),
)
"""The options of ``generate`` that concern a search."""
OFF = {
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "coverage_penalty": 0.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "force_words": [],
    "beam_tree": False,
}
"""With these values they ask for nothing."""


@part
class BeamSearch(Spec):
    """Keep the ``num_beams`` best beginnings at every step, and give the ``num_return_sequences`` (None: all that are kept) best texts.

    A text y of n new tokens, end-of-sequence counted, has the score

        s(y) = (Σ ln p(token) - diversity) / n^length_penalty + coverage_penalty · Σ_i ln min(Σ_j a_ij, 1)

    where p is what the links of the sampler make of the model's log-probabilities, and a_ij the attention of new token j to source token i (mean over
    the heads and layers of an encoder-decoder; the second term is for finished texts only: Wu et al. 2016, arXiv 1609.08144).

    ``early_stopping``: True ends as soon as num_beams texts are finished, False (usual) once the best beginning at its present length is no better
    than the worst of them, "never" once it cannot become better at any length.

    With ``num_beam_groups`` the beams are divided into groups that are searched one after the other; a token that earlier groups have chosen c times
    at this step costs a later group ``diversity_penalty`` · c (Vijayakumar et al. 2016, arXiv 1610.02424). The penalties stay in the score.

    The rules of choosing and ending are those of ``transformers``. Raises :class:`SamplerError` for values that make no sense.
    """

    _error: ClassVar[type[GlassformerError]] = SamplerError

    num_beams: int = 4
    num_return_sequences: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    coverage_penalty: float = 0.0
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise SamplerError(f"num_beams is {self.num_beams}; a search keeps at least 1 beginning.")
        n = self.num_return_sequences
        if n is not None and not 1 <= n <= self.num_beams:
            raise SamplerError(
                f"num_return_sequences is {n}, but a search with num_beams={self.num_beams} finds 1 to {self.num_beams} texts: ask for more beams."
            )
        if self.num_beam_groups < 1 or self.num_beams % self.num_beam_groups:
            raise SamplerError(
                f"num_beam_groups={self.num_beam_groups} does not divide num_beams={self.num_beams}: every group gets as many beams as the others."
            )
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise SamplerError(f"diversity_penalty={self.diversity_penalty} tells groups of beams apart, but there is one group: give num_beam_groups.")
        for name, least in (("length_penalty", None), ("coverage_penalty", 0.0), ("diversity_penalty", 0.0)):
            value = getattr(self, name)
            if not isfinite(value) or (least is not None and value < least):
                raise SamplerError(f"{name} is {value}; it is a finite number{'' if least is None else ', 0 (off) or more'}.")

    @property
    def width(self) -> int:
        """Beams of one group."""
        return self.num_beams // self.num_beam_groups

    def divisor(self, n: int) -> float:
        """n^length_penalty. Raises :class:`SamplerError` where that is too large or too small to divide by."""
        try:
            found = float(n) ** self.length_penalty
        except OverflowError:
            found = float("inf")
        if not isfinite(found) or found <= 0:
            raise SamplerError(f"length_penalty={self.length_penalty} makes {n} tokens count {found}: take a number nearer to 1.")
        return found


def read_search(options: Mapping[str, Any]) -> BeamSearch | None:
    """The search that these options ask for; None if they ask for none. Raises :class:`SamplerError` for what goes only with beams."""
    said = {name: options[name] for name in NAMES if options.get(name) is not None}
    wanted = [name for name, value in said.items() if name != "num_beams" and value != OFF.get(name, ())]
    if "num_beams" not in said:
        if wanted:
            raise SamplerError(f"{wanted[0]} is about a search with beams, and none was asked for: give num_beams=4 too, or leave {wanted[0]} out.")
        return None
    if said.get("num_beam_groups", 1) > 1 and "diversity_penalty" not in said:
        raise SamplerError(
            f"num_beam_groups={said['num_beam_groups']} without diversity_penalty would find the same texts in every group: give a penalty, such as 1.0."
        )
    search = BeamSearch(**{name: value for name, value in said.items() if name not in ("force_words", "beam_tree")})
    return None if search.num_beams == 1 and not {"force_words", "beam_tree"} & set(wanted) else search


def check_together(search: BeamSearch, chain: Chain, phrases: int, source: bool) -> None:
    """Raise :class:`SamplerError` if a search does not go with the sampler, or with the kind of model."""
    if not isinstance(chain.final, Greedy | Draw):
        raise SamplerError(
            f"Beams are chosen by their scores or drawn by them, so a chain for num_beams ends with Greedy() or Draw(), but this one with {chain.final!r}."
        )
    for link in chain.links:
        if isinstance(link, Mirostat1 | Mirostat2 | AdaptiveP):
            raise SamplerError(f"{link!r} steers by the single token drawn at each step, and a search keeps several: leave it out, or num_beams.")
    if isinstance(chain.final, Draw):
        for what, given in (("num_beam_groups", search.num_beam_groups > 1), ("force_words", phrases > 0)):
            if given:
                raise SamplerError(
                    f"{what} chooses beams by their scores, but the sampler draws: leave out what draws (temperature, top_k, seed, …), or {what}."
                )
    if phrases and search.num_beam_groups > 1:
        raise SamplerError("force_words and num_beam_groups both divide the beams, one by what is still to come and one by group: leave one out.")
    if search.coverage_penalty and not source:
        raise SamplerError("coverage_penalty asks how much of the source was attended to, and this model has no source: it is for encoder-decoders.")
