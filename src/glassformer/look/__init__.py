"""Looking inside: one question, one function, one answer that shows itself.

look.write_page("inside.html", model, tokenizer, "The cat sat on the mat")     a page for a text

Every function takes a model (or what ``gf.load`` gives) and a text or token ids (:mod:`~glassformer.look.subject`), and gives a
:class:`Result`: ``print`` it, ``.plot()`` it, ``.save("answer.html")`` it, or take its tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from glassformer.core.door import door

if TYPE_CHECKING:
    from .ablation import Ablated as Ablated, HeadAblation as HeadAblation, ablate as ablate, ablate_heads as ablate_heads
    from .activity import Sparsity as Sparsity, sparsity as sparsity
    from .alignment import Alignment as Alignment, align as align, align_vectors as align_vectors
    from .attribution import (
        Attribution as Attribution,
        BySource as BySource,
        Decomposition as Decomposition,
        decompose as decompose,
        direct_logit_attribution as direct_logit_attribution,
    )
    from .capturing import Captured as Captured, capture as capture
    from .changes import Add as Add, Change as Change, Remove as Remove, Scale as Scale, Set as Set, Zero as Zero
    from .circuits import (
        Circuit as Circuit,
        Composition as Composition,
        Direction as Direction,
        composition_scores as composition_scores,
        ov_circuit as ov_circuit,
        qk_circuit as qk_circuit,
    )
    from .comparison import Comparison as Comparison, compare as compare
    from .corpus import Activations as Activations, activations as activations, read_activations as read_activations
    from .edits import Intervention as Intervention, load_edits as load_edits
    from .factored import FactoredMatrix as FactoredMatrix
    from .forecasting import Forecast as Forecast, forecast as forecast
    from .foreign_model import Foreign as Foreign, foreign as foreign
    from .gradients import (
        SiteAttribution as SiteAttribution,
        TokenAttribution as TokenAttribution,
        gradient_x_input as gradient_x_input,
        integrated_gradients as integrated_gradients,
    )
    from .inside import Card as Card, Inside as Inside, Lens as Lens, Norms as Norms, gather as gather, head_figures as head_figures
    from .journey_steps import JourneyStep as JourneyStep
    from .journeys import Journey as Journey, journey as journey
    from .lenses import LogitLens as LogitLens, logit_lens as logit_lens
    from .matrices import PerLayer as PerLayer, Weights as Weights, exact_folds as exact_folds, weights as weights
    from .next_tokens import Candidates as Candidates, candidates as candidates
    from .pages import page as page, render as render, write_page as write_page
    from .patching import Patched as Patched, activation_patch as activation_patch, attribution_patch as attribution_patch
    from .paths import EdgeAttribution as EdgeAttribution, PathPatched as PathPatched, edge_attribution as edge_attribution, path_patch as path_patch
    from .probing import Probes as Probes, probe as probe
    from .readable import (
        Order as Order,
        PositionBack as PositionBack,
        Scalar as Scalar,
        probe_norm as probe_norm,
        probe_order as probe_order,
        probe_position_back as probe_position_back,
    )
    from .redundancy import HeadRedundancy as HeadRedundancy, head_redundancy as head_redundancy
    from .relations import (
        Analogies as Analogies,
        Analogy as Analogy,
        Axis as Axis,
        analogies as analogies,
        analogy as analogy,
        direction_against_axis as direction_against_axis,
    )
    from .result import Grid as Grid, Result as Result
    from .roles import HeadRoles as HeadRoles, head_roles as head_roles
    from .rollout import (
        Rollout as Rollout,
        ValueContribution as ValueContribution,
        attention_rollout as attention_rollout,
        value_contribution as value_contribution,
    )
    from .sampled import Sampling as Sampling, sampling as sampling
    from .segmentation import Edge as Edge, Match as Match, Merge as Merge, Segmentation as Segmentation, Trail as Trail, segment as segment
    from .statistics import SiteStatistics as SiteStatistics, site_statistics as site_statistics
    from .steering import Steered as Steered, SteeringVector as SteeringVector, steer as steer, steering_vector as steering_vector
    from .subject import Subject as Subject, Target as Target, read as read
    from .sweep import Patch as Patch, Sweep as Sweep
    from .syntax import Sentence as Sentence, SyntacticHeads as SyntacticHeads, read_conllu as read_conllu, syntactic_heads as syntactic_heads
    from .tracing import Traced as Traced, causal_trace as causal_trace
    from .tuned import TunedLens as TunedLens, load_tuned_lens as load_tuned_lens, tuned_lens as tuned_lens
    from .units import Neuron as Neuron, Neurons as Neurons, neurons as neurons
    from .vectors import Neighbours as Neighbours, NeighboursInContext as NeighboursInContext, nearest as nearest, nearest_in_context as nearest_in_context
    from .windows import Context as Context

_DOOR = {
    "ablation": (
        "Ablated",
        "HeadAblation",
        "ablate",
        "ablate_heads",
    ),
    "activity": (
        "Sparsity",
        "sparsity",
    ),
    "alignment": (
        "Alignment",
        "align",
        "align_vectors",
    ),
    "attribution": (
        "Attribution",
        "BySource",
        "Decomposition",
        "decompose",
        "direct_logit_attribution",
    ),
    "capturing": (
        "Captured",
        "capture",
    ),
    "changes": (
        "Add",
        "Change",
        "Remove",
        "Scale",
        "Set",
        "Zero",
    ),
    "circuits": (
        "Circuit",
        "Composition",
        "Direction",
        "composition_scores",
        "ov_circuit",
        "qk_circuit",
    ),
    "comparison": (
        "Comparison",
        "compare",
    ),
    "corpus": (
        "Activations",
        "activations",
        "read_activations",
    ),
    "edits": (
        "Intervention",
        "load_edits",
    ),
    "factored": ("FactoredMatrix",),
    "forecasting": (
        "Forecast",
        "forecast",
    ),
    "foreign_model": (
        "Foreign",
        "foreign",
    ),
    "gradients": (
        "SiteAttribution",
        "TokenAttribution",
        "gradient_x_input",
        "integrated_gradients",
    ),
    "inside": (
        "Card",
        "Inside",
        "Lens",
        "Norms",
        "gather",
        "head_figures",
    ),
    "journey_steps": ("JourneyStep",),
    "journeys": (
        "Journey",
        "journey",
    ),
    "lenses": (
        "LogitLens",
        "logit_lens",
    ),
    "matrices": (
        "PerLayer",
        "Weights",
        "exact_folds",
        "weights",
    ),
    "next_tokens": (
        "Candidates",
        "candidates",
    ),
    "pages": (
        "page",
        "render",
        "write_page",
    ),
    "patching": (
        "Patched",
        "activation_patch",
        "attribution_patch",
    ),
    "paths": (
        "EdgeAttribution",
        "PathPatched",
        "edge_attribution",
        "path_patch",
    ),
    "probing": (
        "Probes",
        "probe",
    ),
    "readable": (
        "Order",
        "PositionBack",
        "Scalar",
        "probe_norm",
        "probe_order",
        "probe_position_back",
    ),
    "redundancy": (
        "HeadRedundancy",
        "head_redundancy",
    ),
    "relations": (
        "Analogies",
        "Analogy",
        "Axis",
        "analogies",
        "analogy",
        "direction_against_axis",
    ),
    "result": (
        "Grid",
        "Result",
    ),
    "roles": (
        "HeadRoles",
        "head_roles",
    ),
    "rollout": (
        "Rollout",
        "ValueContribution",
        "attention_rollout",
        "value_contribution",
    ),
    "sampled": (
        "Sampling",
        "sampling",
    ),
    "segmentation": (
        "Edge",
        "Match",
        "Merge",
        "Segmentation",
        "Trail",
        "segment",
    ),
    "statistics": (
        "SiteStatistics",
        "site_statistics",
    ),
    "steering": (
        "Steered",
        "SteeringVector",
        "steer",
        "steering_vector",
    ),
    "subject": (
        "Subject",
        "Target",
        "read",
    ),
    "sweep": (
        "Patch",
        "Sweep",
    ),
    "syntax": (
        "Sentence",
        "SyntacticHeads",
        "read_conllu",
        "syntactic_heads",
    ),
    "tracing": (
        "Traced",
        "causal_trace",
    ),
    "tuned": (
        "TunedLens",
        "load_tuned_lens",
        "tuned_lens",
    ),
    "units": (
        "Neuron",
        "Neurons",
        "neurons",
    ),
    "vectors": (
        "Neighbours",
        "NeighboursInContext",
        "nearest",
        "nearest_in_context",
    ),
    "windows": ("Context",),
}
_ROOMS = ("transformer_lens",)

__all__ = [name for names in _DOOR.values() for name in names]
__getattr__, __dir__ = door(__name__, _DOOR, rooms=_ROOMS)
