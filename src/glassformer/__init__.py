"""glassformer: one transformer that you can build, train, run and look inside.

    import glassformer as gf

    model = gf.preset("tiny", vocab_size=65).build(seed=0)
    tap = gf.Record("blocks.*.attn.pattern")
    logits = model(tokens, tap=tap)

Every name of ``__all__`` is fetched from its room when it is first asked for, so importing this package imports
no torch. The rooms themselves are attributes too: ``gf.text``, ``gf.weights``, ``gf.look``.
"""

from __future__ import annotations

import importlib
import sys as _sys
from typing import TYPE_CHECKING

from .core.door import door as _door

if TYPE_CHECKING:
    from .core.cache import Cache as Cache
    from .core.errors import (
        CacheError as CacheError,
        Cancelled as Cancelled,
        CheckpointError as CheckpointError,
        DataError as DataError,
        EngineError as EngineError,
        GlassformerError as GlassformerError,
        GlassformerWarning as GlassformerWarning,
        InputError as InputError,
        MaskError as MaskError,
        NotFinite as NotFinite,
        QueueFull as QueueFull,
        RecipeError as RecipeError,
        SamplerError as SamplerError,
        SiteError as SiteError,
        SpecError as SpecError,
        TokenizerError as TokenizerError,
        TrainingError as TrainingError,
        WeightsError as WeightsError,
    )
    from .core.flow import Ledger as Ledger
    from .core.mask import (
        Causal as Causal,
        Everything as Everything,
        Mask as Mask,
        Padding as Padding,
        SameDocument as SameDocument,
        Visible as Visible,
        Window as Window,
    )
    from .core.modes import deterministic as deterministic
    from .core.numerics import seed_everything as seed_everything
    from .core.spec import Spec as Spec, part as part, registered as registered
    from .core.tap import Edit as Edit, Record as Record, Tap as Tap
    from .infer import (
        DRY as DRY,
        XTC as XTC,
        AdaptiveP as AdaptiveP,
        AnyJSON as AnyJSON,
        BadWords as BadWords,
        BeamTree as BeamTree,
        Branches as Branches,
        Breakers as Breakers,
        Chain as Chain,
        Choices as Choices,
        Constrained as Constrained,
        Contrast as Contrast,
        ContrastiveSearch as ContrastiveSearch,
        DoLa as DoLa,
        DraftModel as DraftModel,
        Draw as Draw,
        DynamicTemperature as DynamicTemperature,
        Engine as Engine,
        Epsilon as Epsilon,
        Eta as Eta,
        ForceFirst as ForceFirst,
        ForceLast as ForceLast,
        Generated as Generated,
        Grammar as Grammar,
        Greedy as Greedy,
        Guidance as Guidance,
        Gumbel as Gumbel,
        JSONSchema as JSONSchema,
        Link as Link,
        LogitBias as LogitBias,
        MinNewTokens as MinNewTokens,
        MinP as MinP,
        Mirostat1 as Mirostat1,
        Mirostat2 as Mirostat2,
        NoRepeatNGram as NoRepeatNGram,
        Penalties as Penalties,
        PromptLookup as PromptLookup,
        Regex as Regex,
        Request as Request,
        SequenceBias as SequenceBias,
        Session as Session,
        Speculative as Speculative,
        Suppress as Suppress,
        SuppressFirst as SuppressFirst,
        Temperature as Temperature,
        Ticket as Ticket,
        Token as Token,
        ToolForm as ToolForm,
        TopA as TopA,
        TopH as TopH,
        TopK as TopK,
        TopNSigma as TopNSigma,
        TopP as TopP,
        Trace as Trace,
        Typical as Typical,
        Where as Where,
        generate as generate,
        generation as generation,
        stream as stream,
    )
    from .look import page as page, write_page as write_page
    from .models import Block as Block, Decoder as Decoder, Encoder as Encoder, EncoderDecoder as EncoderDecoder
    from .models.init import Init as Init, Normal as Normal, Rule as Rule
    from .models.presets import preset as preset
    from .parts.attention import Attention as Attention
    from .parts.embed import (
        Embedding as Embedding,
        InverseSqrtWidth as InverseSqrtWidth,
        LiftSum as LiftSum,
        LiftTokens as LiftTokens,
        SqrtWidth as SqrtWidth,
    )
    from .parts.experts import Experts as Experts
    from .parts.feedforward import ClampedGated as ClampedGated, Gated as Gated, Plain as Plain
    from .parts.kernels import Sigmoid as Sigmoid, Softmax as Softmax, SoftmaxPlusOne as SoftmaxPlusOne, SoftmaxSink as SoftmaxSink
    from .parts.latent import LatentAttention as LatentAttention
    from .parts.norm import DynamicTanh as DynamicTanh, Joint as Joint, LayerNorm as LayerNorm, NoNorm as NoNorm, RMSNorm as RMSNorm
    from .parts.position import ALiBi as ALiBi, Learned as Learned, NoPosition as NoPosition, Sinusoidal as Sinusoidal, T5Buckets as T5Buckets
    from .parts.readout import (
        Classifier as Classifier,
        Dense as Dense,
        First as First,
        LanguageModel as LanguageModel,
        Last as Last,
        Mean as Mean,
        States as States,
        Tagger as Tagger,
        Vector as Vector,
    )
    from .parts.rotary import (
        DynamicNTKScaling as DynamicNTKScaling,
        LinearScaling as LinearScaling,
        Llama3Scaling as Llama3Scaling,
        LongRope as LongRope,
        NTKScaling as NTKScaling,
        Rotary as Rotary,
        YaRNScaling as YaRNScaling,
    )
    from .parts.routing import Groups as Groups, SigmoidRouting as SigmoidRouting, SoftmaxRouting as SoftmaxRouting
    from .parts.wiring import Parallel as Parallel, PostNorm as PostNorm, PreNorm as PreNorm, ReorderedNorm as ReorderedNorm, Sandwich as Sandwich
    from .tasks import Batch as Batch, Loss as Loss, NextToken as NextToken, Task as Task
    from .text import Piece as Piece, Tokenizer as Tokenizer
    from .train import (
        WSD as WSD,
        AdamW as AdamW,
        Constant as Constant,
        Cosine as Cosine,
        InverseSqrt as InverseSqrt,
        Muon as Muon,
        Step as Step,
        TokenData as TokenData,
        Trainer as Trainer,
        prepare as prepare,
    )
    from .train.evaluate import Evaluation as Evaluation, evaluate as evaluate
    from .train.recipe import LoadTokenizer as LoadTokenizer, Recipe as Recipe, TrainTokenizer as TrainTokenizer
    from .weights import Loaded as Loaded, Verification as Verification, load as load, quantise as quantise, save as save, verify as verify

__version__ = "0.1.0"

_DOOR: dict[str, tuple[str, ...]] = {
    "core.spec": (
        "Spec",
        "part",
        "registered",
    ),
    "core.tap": (
        "Tap",
        "Record",
        "Edit",
    ),
    "core.mask": (
        "Mask",
        "Everything",
        "Causal",
        "Window",
        "SameDocument",
        "Padding",
        "Visible",
    ),
    "core.flow": ("Ledger",),
    "core.cache": ("Cache",),
    "core.modes": ("deterministic",),
    "core.numerics": ("seed_everything",),
    "core.errors": (
        "GlassformerError",
        "GlassformerWarning",
        "SpecError",
        "InputError",
        "SiteError",
        "MaskError",
        "CacheError",
        "TokenizerError",
        "DataError",
        "WeightsError",
        "CheckpointError",
        "TrainingError",
        "NotFinite",
        "SamplerError",
        "RecipeError",
        "EngineError",
        "QueueFull",
        "Cancelled",
    ),
    "text": (
        "Tokenizer",
        "Piece",
    ),
    "parts.attention": ("Attention",),
    "parts.kernels": (
        "Softmax",
        "SoftmaxPlusOne",
        "SoftmaxSink",
        "Sigmoid",
    ),
    "parts.position": (
        "NoPosition",
        "Sinusoidal",
        "Learned",
        "ALiBi",
        "T5Buckets",
    ),
    "parts.rotary": (
        "Rotary",
        "LinearScaling",
        "NTKScaling",
        "DynamicNTKScaling",
        "YaRNScaling",
        "Llama3Scaling",
        "LongRope",
    ),
    "parts.norm": (
        "LayerNorm",
        "RMSNorm",
        "Joint",
        "DynamicTanh",
        "NoNorm",
    ),
    "parts.feedforward": (
        "Plain",
        "Gated",
        "ClampedGated",
    ),
    "parts.experts": ("Experts",),
    "parts.routing": (
        "SoftmaxRouting",
        "SigmoidRouting",
        "Groups",
    ),
    "parts.latent": ("LatentAttention",),
    "parts.wiring": (
        "PreNorm",
        "PostNorm",
        "ReorderedNorm",
        "Sandwich",
        "Parallel",
    ),
    "parts.embed": (
        "Embedding",
        "SqrtWidth",
        "InverseSqrtWidth",
        "LiftTokens",
        "LiftSum",
    ),
    "parts.readout": (
        "LanguageModel",
        "Classifier",
        "Tagger",
        "Dense",
        "States",
        "Vector",
        "First",
        "Last",
        "Mean",
    ),
    "models": (
        "Block",
        "Decoder",
        "Encoder",
        "EncoderDecoder",
    ),
    "models.init": (
        "Init",
        "Rule",
        "Normal",
    ),
    "models.presets": ("preset",),
    "weights": (
        "save",
        "load",
        "Loaded",
        "quantise",
        "verify",
        "Verification",
    ),
    "tasks": (
        "Task",
        "NextToken",
        "Batch",
        "Loss",
    ),
    "infer": (
        "generate",
        "stream",
        "generation",
        "Generated",
        "Token",
        "Session",
        "Engine",
        "AnyJSON",
        "Choices",
        "Constrained",
        "Grammar",
        "JSONSchema",
        "Regex",
        "ToolForm",
        "Where",
        "Request",
        "Ticket",
        "Chain",
        "Link",
        "Temperature",
        "TopK",
        "TopP",
        "MinP",
        "Penalties",
        "LogitBias",
        "Suppress",
        "BadWords",
        "BeamTree",
        "Breakers",
        "DRY",
        "ForceFirst",
        "ForceLast",
        "MinNewTokens",
        "NoRepeatNGram",
        "SequenceBias",
        "SuppressFirst",
        "Greedy",
        "Draw",
        "Typical",
        "TopNSigma",
        "TopH",
        "Epsilon",
        "Eta",
        "TopA",
        "DynamicTemperature",
        "XTC",
        "Mirostat1",
        "Mirostat2",
        "AdaptiveP",
        "Branches",
        "DraftModel",
        "PromptLookup",
        "Speculative",
        "Gumbel",
        "Guidance",
        "Contrast",
        "DoLa",
        "ContrastiveSearch",
        "Trace",
    ),
    "train.evaluate": (
        "evaluate",
        "Evaluation",
    ),
    "train": (
        "Trainer",
        "Step",
        "TokenData",
        "prepare",
        "AdamW",
        "Muon",
        "Constant",
        "Cosine",
        "WSD",
        "InverseSqrt",
    ),
    "train.recipe": (
        "Recipe",
        "TrainTokenizer",
        "LoadTokenizer",
    ),
    "look": (
        "page",
        "write_page",
    ),
}
_ROOMS = ("core", "text", "parts", "models", "weights", "tasks", "infer", "train", "look")
_ROOMS_OF_PARTS = ("core", "parts", "models", "tasks", "infer", "train")
_ASKED: list[bool] = []

__all__ = ["__version__", *(name for names in _DOOR.values() for name in names)]


def _let_the_registry_ask() -> None:
    """Have the registry of parts open every room that holds some, should anyone ask for them."""
    spec = _sys.modules.get(f"{__name__}.core.spec")
    if spec is not None and not _ASKED:
        _ASKED.append(True)
        spec.when_asked(lambda: [importlib.import_module(f".{room}", __name__) for room in _DOOR if room.split(".")[0] in _ROOMS_OF_PARTS])


__getattr__, __dir__ = _door(__name__, _DOOR, rooms=_ROOMS, opened=_let_the_registry_ask)
