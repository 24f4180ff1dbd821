"""Looking inside: one question, one function, one answer that shows itself.

look.write_page("inside.html", model, tokenizer, "The cat sat on the mat")     a page for a text

Every function takes a model (or what ``gf.load`` gives) and a text or token ids (:mod:`~glassformer.look.subject`), and gives a
:class:`Result`: ``print`` it, ``.plot()`` it, ``.save("answer.html")`` it, or take its tensors.
"""

from __future__ import annotations

from .ablation import Ablated, HeadAblation, ablate, ablate_heads
from .activity import Sparsity, sparsity
from .alignment import Alignment, align, align_vectors
from .attribution import Attribution, BySource, Decomposition, decompose, direct_logit_attribution
from .capturing import Captured, capture
from .changes import Add, Change, Remove, Scale, Set, Zero
from .circuits import Circuit, Composition, Direction, composition_scores, ov_circuit, qk_circuit
from .comparison import Comparison, compare
from .corpus import Activations, activations, read_activations
from .edits import Intervention, load_edits
from .factored import FactoredMatrix
from .forecasting import Forecast, forecast
from .foreign_model import Foreign, foreign
from .gather import Card, Inside, Lens, Norms, gather, head_figures
from .gradients import SiteAttribution, TokenAttribution, gradient_x_input, integrated_gradients
from .journey_steps import JourneyStep
from .journeys import Journey, journey
from .lenses import LogitLens, logit_lens
from .matrices import PerLayer, Weights, exact_folds, weights
from .next_tokens import Candidates, candidates
from .page import page, render, write_page
from .patching import Patched, activation_patch, attribution_patch
from .paths import EdgeAttribution, PathPatched, edge_attribution, path_patch
from .probing import Probes, probe
from .readable import Order, PositionBack, Scalar, probe_norm, probe_order, probe_position_back
from .redundancy import HeadRedundancy, head_redundancy
from .relations import Analogies, Analogy, Axis, analogies, analogy, direction_against_axis
from .result import Grid, Result
from .roles import HeadRoles, head_roles
from .rollout import Rollout, ValueContribution, attention_rollout, value_contribution
from .segmentation import Edge, Match, Merge, Segmentation, Trail, segment
from .statistics import SiteStatistics, site_statistics
from .steering import Steered, SteeringVector, steer, steering_vector
from .subject import Subject, Target, read
from .sweep import Patch, Sweep
from .syntax import Sentence, SyntacticHeads, read_conllu, syntactic_heads
from .tracing import Traced, causal_trace
from .tuned import TunedLens, load_tuned_lens, tuned_lens
from .units import Neuron, Neurons, neurons
from .vectors import Neighbours, NeighboursInContext, nearest, nearest_in_context
from .windows import Context

__all__ = [
    "Ablated",
    "Activations",
    "Add",
    "Alignment",
    "Analogies",
    "Analogy",
    "Attribution",
    "Axis",
    "BySource",
    "Candidates",
    "Captured",
    "Card",
    "Change",
    "Circuit",
    "Comparison",
    "Composition",
    "Context",
    "Decomposition",
    "Direction",
    "Edge",
    "EdgeAttribution",
    "FactoredMatrix",
    "Forecast",
    "Foreign",
    "Grid",
    "HeadAblation",
    "HeadRedundancy",
    "HeadRoles",
    "Inside",
    "Intervention",
    "Journey",
    "JourneyStep",
    "Lens",
    "LogitLens",
    "Match",
    "Merge",
    "Neighbours",
    "NeighboursInContext",
    "Neuron",
    "Neurons",
    "Norms",
    "Order",
    "Patch",
    "Patched",
    "PathPatched",
    "PerLayer",
    "PositionBack",
    "Probes",
    "Remove",
    "Result",
    "Rollout",
    "Scalar",
    "Scale",
    "Segmentation",
    "Sentence",
    "Set",
    "SiteAttribution",
    "SiteStatistics",
    "Sparsity",
    "Steered",
    "SteeringVector",
    "Subject",
    "Sweep",
    "SyntacticHeads",
    "Target",
    "TokenAttribution",
    "Traced",
    "Trail",
    "TunedLens",
    "ValueContribution",
    "Weights",
    "Zero",
    "ablate",
    "ablate_heads",
    "activation_patch",
    "activations",
    "align",
    "align_vectors",
    "analogies",
    "analogy",
    "attention_rollout",
    "attribution_patch",
    "candidates",
    "capture",
    "causal_trace",
    "compare",
    "composition_scores",
    "decompose",
    "direct_logit_attribution",
    "direction_against_axis",
    "edge_attribution",
    "exact_folds",
    "forecast",
    "foreign",
    "gather",
    "gradient_x_input",
    "head_figures",
    "head_redundancy",
    "head_roles",
    "integrated_gradients",
    "journey",
    "load_edits",
    "load_tuned_lens",
    "logit_lens",
    "nearest",
    "nearest_in_context",
    "neurons",
    "ov_circuit",
    "page",
    "path_patch",
    "probe",
    "probe_norm",
    "probe_order",
    "probe_position_back",
    "qk_circuit",
    "read",
    "read_activations",
    "read_conllu",
    "render",
    "segment",
    "site_statistics",
    "sparsity",
    "steer",
    "steering_vector",
    "syntactic_heads",
    "tuned_lens",
    "value_contribution",
    "weights",
    "write_page",
]
