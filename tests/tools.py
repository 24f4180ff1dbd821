"""What the truth tests share: a list of small models in which every registered part appears, and ways to call them alike.

@each(DECODERS)                      one test per variant
model = built("llama")               random weights, large enough that every part matters
logits = call(model, ids)            an encoder-decoder is given a fixed source
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from glassformer.core.flow import Pass
from glassformer.core.mask import Causal, Not, Window
from glassformer.core.spec import Spec
from glassformer.models import Block, Decoder, Encoder, EncoderDecoder, EncoderDecoderModel
from glassformer.models.init import BERT_INIT, XAVIER_INIT
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding, InverseSqrtWidth, LiftSum, LiftTokens, SqrtWidth, Times
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import ClampedGated, Gated, Plain
from glassformer.parts.kernels import Sigmoid, SoftmaxPlusOne, SoftmaxSink
from glassformer.parts.latent import LatentAttention
from glassformer.parts.norm import DynamicTanh, Joint, LayerNorm, NoNorm, RMSNorm
from glassformer.parts.position import ALiBi, Learned, Sinusoidal, T5Buckets
from glassformer.parts.readout import Classifier, Dense, First, LanguageModel, Last, Mean, Tagger, Vector
from glassformer.parts.rotary import DynamicNTKScaling, LinearScaling, Llama3Scaling, LongRope, NTKScaling, Rotary, YaRNScaling
from glassformer.parts.routing import Groups, SigmoidRouting, SoftmaxRouting
from glassformer.parts.wiring import Parallel, PostNorm, PreNorm, ReorderedNorm, Sandwich

D, VOCAB, T = 24, 31, 9


def decoder(attention: Attention, feedforward: Any = None, n: int = 2, norm: Any = None, wiring: Any = None, **fields: Any) -> Decoder:
    block = Block(attention, Plain(32) if feedforward is None else feedforward, norm=RMSNorm() if norm is None else norm)
    return Decoder(VOCAB, D, ((block if wiring is None else block.replace(wiring=wiring)),) * n, **fields)


def rotary(**fields: Any) -> Decoder:
    return decoder(Attention(4, n_kv_heads=2, position=Rotary(base=100.0, **fields)), Gated(32))


def gemma2() -> Decoder:
    norm = RMSNorm(offset=1.0, cast="late")
    block = Block(
        Attention(4, n_kv_heads=2, d_head=8, position=Rotary(base=100.0), cap=5.0, scale=0.4), Gated(32, act="gelu_tanh"), norm=norm, wiring=Sandwich()
    )
    local = block.at("attention.mask").set(Window(4))
    return Decoder(VOCAB, D, (local, block), final_norm=norm, tied=True, embedding=Embedding(scale=SqrtWidth()), readout=LanguageModel(cap=3.0))


def first_bare() -> Decoder:
    """The first attention reads the embedding's norm and has none of its own (ModernBERT)."""
    block = Block(Attention(4, position=Rotary(base=100.0), mask=Window(5)), Gated(32, act="gelu"), norm=LayerNorm(bias=False))
    return Decoder(VOCAB, D, (block.replace(wiring=PreNorm(bare=("attn",))), block), embedding=Embedding(norm=LayerNorm(bias=False)))


def bert(readout: Any = None, attention: Attention | None = None) -> Encoder:
    norm = LayerNorm(eps=1e-12)
    block = Block(attention or Attention(4, qkv_bias=True, out_bias=True), Plain(32, bias=True), norm=norm, wiring=PostNorm())
    return Encoder(
        VOCAB,
        D,
        (block,) * 2,
        final_norm=NoNorm(),
        tied=True,
        embedding=Embedding(n_types=2, norm=norm, dropout=0.1),
        position=Learned(24),
        readout=LanguageModel(bias=True, transform=Dense("gelu", norm)) if readout is None else readout,
        init=BERT_INIT,
    )


def electra(readout: Any, width: int = 10) -> Encoder:
    """A table narrower than the stream, lifted after positions, types and norm."""
    return bert(readout).replace(embedding=Embedding(n_types=2, norm=LayerNorm(eps=1e-12), lift=LiftSum(width)))


def narrow_opt() -> Decoder:
    """A table narrower than the stream, lifted before positions; the tied read-out narrows first."""
    attention, narrow = Attention(4, qkv_bias=True, out_bias=True), Dense("identity", bias=False, width=10)
    return decoder(
        attention,
        Plain(32, act="relu", bias=True),
        norm=LayerNorm(),
        wiring=PostNorm(),
        final_norm=NoNorm(),
        tied=True,
        position=Learned(40, offset=2),
        embedding=Embedding(lift=LiftTokens(10)),
        readout=LanguageModel(transform=narrow),
    )


def bart() -> EncoderDecoder:
    """Post-norm halves of other depths, a normed and scaled embedding, a bias on the logits."""
    attention = Attention(4, qkv_bias=True, out_bias=True)
    block = Block(attention, Plain(32, bias=True), norm=LayerNorm(), wiring=PostNorm())
    common: dict[str, Any] = {"final_norm": NoNorm(), "tied": True, "position": Learned(40, offset=2), "init": BERT_INIT}
    common["embedding"] = Embedding(scale=SqrtWidth(), norm=LayerNorm())
    narrow = block.replace(feedforward=Plain(20, bias=True), cross=attention)
    return EncoderDecoder(Encoder(VOCAB, D, (block,), **common), Decoder(VOCAB, D, (narrow,) * 2, readout=LanguageModel(bias=True), **common), start=2)


def t5() -> EncoderDecoder:
    attention = Attention(4, d_head=5, scale=1.0)
    block = Block(attention, Plain(32, act="relu"), norm=RMSNorm())
    return EncoderDecoder(
        Encoder(VOCAB, D, (block,) * 2, tied=True, position=T5Buckets(8, 12)),
        Decoder(
            VOCAB,
            D,
            (block.replace(cross=attention),) * 2,
            tied=True,
            position=T5Buckets(8, 12, bidirectional=False),
            readout=LanguageModel(scale=InverseSqrtWidth()),
        ),
    )


def vaswani() -> EncoderDecoder:
    block = Block(Attention(4), Plain(32, act="relu", bias=True), norm=LayerNorm(), wiring=PostNorm(), dropout=0.1)
    common: dict[str, Any] = {"final_norm": NoNorm(), "tied": True, "embedding": Embedding(scale=SqrtWidth()), "position": Sinusoidal(), "init": XAVIER_INIT}
    return EncoderDecoder(Encoder(VOCAB, D, (block,) * 2, **common), Decoder(VOCAB, D, (block.replace(cross=Attention(4)),) * 2, **common))


def unlike_halves() -> EncoderDecoder:
    """Other widths, other vocabularies, grouped and capped cross-attention with norms of its own."""
    cross = Attention(4, n_kv_heads=2, d_value=5, qk_norm=RMSNorm(), cap=8.0, normaliser=SoftmaxSink(), qkv_bias=True)
    own = Attention(4, n_kv_heads=2, position=Rotary(base=100.0), mask=Window(4))
    encoder = Encoder(VOCAB, 16, (Block(Attention(2, position=ALiBi()), Gated(20)),) * 2)
    return EncoderDecoder(encoder, Decoder(VOCAB, D, (Block(own, Gated(20), cross=cross, wiring=Sandwich()),) * 2), shared=False)


DECODERS: dict[str, Spec] = {
    "bare": decoder(Attention(4), norm=LayerNorm(bias=False), final_norm=LayerNorm()),
    "gpt2": decoder(
        Attention(4, qkv_bias=True, out_bias=True),
        Plain(32, act="gelu_tanh", bias=True),
        norm=LayerNorm(),
        final_norm=LayerNorm(),
        tied=True,
        position=Learned(40),
    ),
    "opt": decoder(Attention(4), Plain(32, act="relu"), position=Learned(40, offset=2), norm=LayerNorm()),
    "opt-narrow": narrow_opt(),
    "llama": rotary(),
    "gptj": decoder(Attention(4, position=Rotary(fraction=2 / 3, layout="interleaved")), wiring=Parallel(), norm=LayerNorm()),
    "neox": decoder(Attention(4, position=Rotary(fraction=0.34)), wiring=Parallel(norms=2), norm=LayerNorm()),
    "mqa": decoder(Attention(4, n_kv_heads=1, position=Rotary()), Plain(32, act="relu2")),
    "linear": rotary(scaling=LinearScaling(2.0)),
    "ntk": rotary(scaling=NTKScaling(2.0)),
    "yarn": rotary(scaling=YaRNScaling(2.0, 16, beta_fast=4.0)),
    "llama3": rotary(scaling=Llama3Scaling(2.0, original_context=16)),
    "dynamic-ntk": rotary(scaling=DynamicNTKScaling(2.0, 16)),
    "longrope": rotary(scaling=LongRope((1.0, 1.1, 1.3), (1.5, 2.0, 4.0), 16, factor=2.0)),
    "alibi": decoder(Attention(6, n_kv_heads=2, position=ALiBi())),
    "alibi-of-model": decoder(Attention(6), position=ALiBi()),
    "t5-own": decoder(Attention(4, position=T5Buckets(8, 12, bidirectional=False))),
    "t5-of-model": decoder(Attention(4, n_kv_heads=2), position=T5Buckets(8, 12, bidirectional=False)),
    "gemma2": gemma2(),
    "window": decoder(Attention(4, n_kv_heads=2, position=Rotary(), mask=Window(4))),
    "window-biased": decoder(Attention(4, position=ALiBi(), mask=Window(3))),
    "holes": decoder(Attention(4, mask=Window(3) | ~Window(6))),
    "sink": decoder(Attention(4, n_kv_heads=2, normaliser=SoftmaxSink())),
    "plus-one": decoder(Attention(4, normaliser=SoftmaxPlusOne(), mask=Window(5))),
    "sigmoid": decoder(Attention(4, normaliser=Sigmoid())),
    "sigmoid-bias": decoder(Attention(4, n_kv_heads=2, normaliser=Sigmoid(bias=-2.0), mask=Window(5), position=ALiBi())),
    "vaswani-decoder": decoder(Attention(4), norm=LayerNorm(), wiring=PostNorm(), final_norm=NoNorm(), position=Sinusoidal(), init=XAVIER_INIT),
    "halves": decoder(Attention(4, dropout=0.1), position=Sinusoidal(base=100.0, layout="halves"), embedding=Embedding(scale=Times(0.5))),
    "tanh": decoder(Attention(4, qk_norm=LayerNorm()), Plain(32, act="tanh", dropout=0.1), norm=DynamicTanh(), final_norm=DynamicTanh(0.7)),
    "qk-norm": decoder(Attention(4, n_kv_heads=2, qk_norm=RMSNorm(), position=Rotary(), d_value=5, scale=1.0), Gated(32, act="gelu", bias=True)),
    "olmo2": decoder(Attention(4, n_kv_heads=2, d_head=5, qk_norm=Joint(RMSNorm(eps=1e-5)), position=Rotary(fraction=0.4)), Gated(32), wiring=ReorderedNorm()),
    "first-bare": first_bare(),
    "experts": decoder(Attention(4), Experts(4, 2, Gated(16)), position=Learned(40)),
    "experts-plain": decoder(Attention(4), Experts(3, 1, Plain(16, act="silu"), normalise=False, balance=0.0), norm=LayerNorm()),
    "experts-shared": decoder(Attention(4), Experts(6, 2, Gated(8), shared=Gated(20), normalise=False, routing=SoftmaxRouting(groups=Groups(3, 2), scale=1.5))),
    "experts-sigmoid": decoder(
        Attention(4, n_kv_heads=2, position=Rotary()), Experts(8, 3, Gated(8), shared=Gated(12), routing=SigmoidRouting(groups=Groups(4, 2, best=2), scale=2.5))
    ),
    "experts-clamped": decoder(
        Attention(4, n_kv_heads=1, normaliser=SoftmaxSink(), qkv_bias=True, out_bias=True),
        Experts(4, 2, ClampedGated(10, limit=1.5), routing=SoftmaxRouting(bias=True)),
        position=Learned(40),
    ),
    "latent": decoder(LatentAttention(4, 10, d_nope=6, d_rope=4, d_value=5, q_lora_rank=12, position=Rotary(base=100.0, layout="interleaved")), Gated(32)),
    "latent-window": decoder(
        LatentAttention(3, 7, d_nope=4, d_rope=6, position=Rotary(base=100.0), mask=Window(4), cap=6.0, scale=0.4, down_bias=True, out_bias=True),
        ClampedGated(16),
    ),
    "latent-sink": decoder(LatentAttention(4, 8, d_nope=4, d_rope=2, position=ALiBi(), normaliser=SoftmaxSink(), norm=LayerNorm()), norm=LayerNorm()),
}
ENCODERS: dict[str, Spec] = {
    "bert": bert(),
    "unordered": Encoder(VOCAB, D, (Block(Attention(4), Gated(32), norm=RMSNorm()),) * 2),
    "causal-encoder": bert(attention=Attention(4, mask=Causal())),
    "not-window": Encoder(VOCAB, D, (Block(Attention(4, mask=~Window(2) | Window(1)), Gated(32)),) * 2),
    "t5-encoder": Encoder(VOCAB, D, (Block(Attention(4), Gated(32)),) * 2, position=T5Buckets(8, 12)),
    "tagger": bert(Tagger(5, dropout=0.1)),
    "electra": electra(LanguageModel(bias=True, transform=Dense("gelu", LayerNorm(eps=1e-12), width=10))),
    "discriminator": electra(Tagger(1, transform=Dense("gelu"))),
    "classifier": bert(Classifier(3, pool=First(), transform=Dense("tanh"))),
    "classifier-last": bert(Classifier(3, pool=Last(), dropout=0.1)),
    "vector": bert(Vector(pool=Mean(), transform=Dense("identity", LayerNorm()), normalise=True)),
}
PAIRS: dict[str, Spec] = {"t5": t5(), "vaswani": vaswani(), "bart": bart(), "unlike-halves": unlike_halves()}
CAUSAL = DECODERS | PAIRS
ALL = DECODERS | ENCODERS | PAIRS
assert isinstance(Not(Window(1)), Spec)


def each(variants: Iterable[str]) -> Any:
    """Run a test once per variant, as its argument ``name``."""
    return pytest.mark.parametrize("name", list(variants))


@cache
def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The variant as a model in evaluation mode. One object per process: tests must not change it."""
    return fresh(name, dtype)


def fresh(name_or_spec: str | Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A new model of the variant."""
    spec: Any = ALL[name_or_spec] if isinstance(name_or_spec, str) else name_or_spec
    return lively(spec.build(dtype=dtype, seed=seed)).eval()


def lively(model: Any, seed: int = 0) -> Any:
    """Weights large enough that attention is not flat and no layer is nearly linear; norms and biases off their starting values."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
            x.copy_(x + 0.2 * noise if x.ndim == 1 else noise / math.sqrt(x.shape[-1]) * 1.3)
    return model


def tokens(b: int = 2, t: int = T, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


SOURCE = tokens(1, 7, seed=99)
SOURCE_LENGTHS = (7, 4, 6)


def source(b: int) -> Tensor:
    """A fixed source of ``b`` rows."""
    return torch.cat([(SOURCE + i) % VOCAB for i in range(b)])


def call(model: Any, ids: Tensor | None, **options: Any) -> Tensor:
    """Logits; an encoder-decoder reads the fixed source (rows of different lengths)."""
    if isinstance(model, EncoderDecoderModel):
        assert ids is not None
        b = ids.shape[0]
        return model(source(b), ids, source_lengths=[SOURCE_LENGTHS[i % 3] for i in range(b)], **options)
    return model(ids, **options)


def a_pass(t: int = T) -> Pass:
    """Side inputs for a part that is called by itself."""
    index = torch.arange(t)
    return Pass(positions=index, index=index)


def half(model: Any) -> str:
    """Where the causal half's sites begin."""
    return "decoder." if isinstance(model, EncoderDecoderModel) else ""


def same(a: Tensor, b: Tensor, atol: float = 1e-5, what: str = "") -> None:
    """Equal up to rounding: 1e-5 in float32, 1e-11 in float64."""
    if a.dtype == torch.float64:
        atol = min(atol, 1e-11)
    torch.testing.assert_close(a, b, atol=atol, rtol=atol, msg=lambda m: f"{what}: {m}")


def draw(shape: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
