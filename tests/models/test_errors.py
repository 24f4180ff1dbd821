"""What a model says about Specs that cannot be built and inputs that it cannot take."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from glassformer.core.errors import InputError, SpecError
from glassformer.core.mask import Visible, Window
from glassformer.core.tap import Record
from glassformer.models import Block, Decoder, Encoder, EncoderDecoder
from glassformer.models.init import NORMS, Declared, Fill, Init, Normal, Rule
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import Gated, Plain
from glassformer.parts.norm import RMSNorm
from glassformer.parts.position import ALiBi, Learned, Position, PositionLayer, Sinusoidal, T5Buckets
from glassformer.parts.readout import Classifier, Tagger, Vector
from glassformer.parts.rotary import LinearScaling, Llama3Scaling, NTKScaling, Rotary, YaRNScaling
from glassformer.parts.wiring import Parallel
from tools import VOCAB, D, a_pass, built, tokens

BLOCK = Block(Attention(4))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Attention(4, n_kv_heads=3), r"Attention has n_heads=4 and n_kv_heads=3: the first must be a multiple of the second\."),
        (lambda: Attention(0), r"Attention has n_heads=0 and n_kv_heads=0"),
        (lambda: Attention(4, position=Learned(3)), r"Learned adds to the embedding: give it to the model \(Decoder\(position=\.\.\.\)\), not to Attention\."),
        (lambda: Attention(4, position=Sinusoidal()), r"Sinusoidal adds to the embedding"),
        (lambda: Attention(4, cap=0.0), r"Attention\(cap=0\.0\): a soft-cap is above zero, or None for none\."),
        (lambda: Attention(4, dropout=1.0), r"Attention\(dropout=1\.0\): a dropout rate lies in \[0, 1\)\."),
        (lambda: Block(Attention(4), dropout=-0.1), r"Block\(dropout=-0\.1\): a dropout rate lies in \[0, 1\)\."),
        (lambda: Attention(5).build(24), r"d_model=24 is no multiple of n_heads=5: change one of them, or give d_head\."),
        (lambda: Plain(8, act="gelv"), r"No activation is named 'gelv'\. Did you mean 'gelu'.* Known: relu, gelu, "),
        (lambda: Gated(8, act="swish"), r"No activation is named 'swish'\."),
        (lambda: RMSNorm(cast="never"), r"RMSNorm\(cast='never'\): cast is 'early' \(Llama\) or 'late' \(Gemma\)\."),
        (lambda: Parallel(norms=3), r"Parallel\(norms=3\): one norm for both branches, or two\."),
        (
            lambda: Block(Attention(4), cross=Attention(4), wiring=Parallel()).build(D, D),
            r"Parallel wiring .* no place for cross-attention: use PreNorm or PostNorm\.",
        ),
        (lambda: Experts(4, 5), r"Experts\(top_k=5\) of n_experts=4: choose at least 1 and at most all\."),
        (lambda: Experts(4, 0), r"Experts\(top_k=0\)"),
        (lambda: Rotary(layout="whole"), r"Rotary\(layout='whole'\): layout is 'half' \(Llama\) or 'interleaved' \(GPT-J\)\."),
        (lambda: Rotary(fraction=0.0), r"Rotary\(fraction=0\.0\): a fraction lies above 0 and is at most 1\."),
        (lambda: Rotary(fraction=1.5), r"Rotary\(fraction=1\.5\)"),
        (lambda: Rotary().build(24, 4, 5), r"Rotary turns pairs, but fraction 1\.0 of d_head 5 is 5 features: choose an even number of them\."),
        (lambda: Rotary(fraction=0.1).build(24, 4, 8), r"is 0 features: choose an even number"),
        (lambda: Sinusoidal(layout="half"), r"Sinusoidal\(layout='half'\): layout is 'interleaved' \(the paper\) or 'halves' \(tensor2tensor\)\."),
        (lambda: Attention(4, position=ALiBi()).build_cross(D, D), r"Cross-attention takes no position encoding, but ALiBi was given: use NoPosition\(\)\."),
        (lambda: Decoder(0, D, (BLOCK,)), r"Decoder has vocab_size=0; it is at least 1\."),
        (lambda: Encoder(VOCAB, 0, (BLOCK,)), r"Encoder has d_model=0; it is at least 1\."),
        (lambda: Decoder(VOCAB, D, (BLOCK,), position=Rotary()), r"Rotary turns queries and keys: give it to Attention\(position=\.\.\.\), not to the model\."),
        (
            lambda: EncoderDecoder(Encoder(VOCAB, D, (BLOCK,)), Decoder(VOCAB, D, (BLOCK,))),
            r"A decoder block of this encoder-decoder has no cross-attention: give every one of them Block\(cross=Attention\(\.\.\.\)\)\.",
        ),
        (
            lambda: EncoderDecoder(Encoder(9, D, (BLOCK,)), Decoder(VOCAB, D, (BLOCK.replace(cross=Attention(4)),))),
            r"A shared embedding needs equal sizes, but the encoder has vocab_size=9, d_model=24 and the decoder "
            r"vocab_size=31, d_model=24: make them equal, or set shared=False\.",
        ),
        (lambda: Decoder(VOCAB, D, (BLOCK,)).build(dtype="bf17"), r"No data type is named 'bf17'\. Did you mean 'bf16'"),
    ],
)
def test_a_spec_that_cannot_be_built(make, said):
    with pytest.raises(SpecError, match=said):
        make()


def test_a_parameter_that_no_rule_claims():
    spec = Decoder(VOCAB, D, (BLOCK,), init=Init((Rule(("embed.weight",), Normal()),)))
    with pytest.raises(
        SpecError,
        match=r"No initialisation rule claims the parameter 'blocks\.0\.attn\.out\.weight' \(24, 24\): "
        r"add a Rule\(\('weight',\), \.\.\.\) to the model's init table\.",
    ):
        spec.build(seed=0)
    undeclared = Decoder(VOCAB, D, (BLOCK,), init=Init((Rule(("weight", "bias", "matrix"), Declared()),)))
    with pytest.raises(SpecError, match=r"EmbeddingLayer declares no starting value for 'weight': give it a rule with a distribution of its own\."):
        undeclared.build(seed=0)
    spec.build(device="meta")  # without memory there is nothing to fill


def test_rules_claim_whole_names():
    rule = Rule(("q.weight", "bias"), Normal())
    assert rule.claims("q.weight") and rule.claims("blocks.0.attn.q.weight") and rule.claims("x.bias")
    assert not rule.claims("blocks.0.attn.seq.weight") and not rule.claims("x.rebias")


# Inputs


@pytest.mark.parametrize(
    ("name", "give", "said"),
    [
        ("llama", lambda m: m(), r"Neither tokens nor inputs_embeds were given: a model reads one of them\."),
        ("llama", lambda m: m(tokens(), inputs_embeds=torch.zeros(2, 9, D)), r"Both tokens and inputs_embeds were given: a model reads one of them\."),
        ("llama", lambda m: m(tokens()[0]), r"Tokens have shape \(9,\), but a model reads \[batch, position\]: for one row use tokens\[None\]\."),
        ("llama", lambda m: m(tokens()[:, :0]), r"The rows hold no tokens: a model needs at least one position\."),
        ("llama", lambda m: m(tokens() + 31), r"Token id \d+ is outside this model's vocabulary of 31: encode the text with the model's own tokenizer\."),
        ("llama", lambda m: m(tokens() * 0 - 1), r"Token id -1 is outside this model's vocabulary of 31"),
        ("llama", lambda m: m(tokens(), lengths=[9]), r"lengths=\[9\] do not fit tokens of shape \(2, 9\): one length per row, none above 9\."),
        ("llama", lambda m: m(tokens(), lengths=[9, 10]), r"lengths=\[9, 10\] do not fit"),
        ("llama", lambda m: m(tokens(), lengths=[9, -1]), r"lengths=\[9, -1\] do not fit"),
        (
            "llama",
            lambda m: m(tokens(), types=tokens() * 0),
            r"Token types were given, but this model has none: build it with Embedding\(n_types=2\), or leave them out\.",
        ),
        ("llama", lambda m: m(tokens(), keep=0), r"keep=0 reads out nothing: give the number of last positions, at least 1, or None for all\."),
        ("llama", lambda m: m.states(tokens(), keep=1), r"states\(\) takes no option 'keep'; it takes inputs_embeds, positions, "),
        ("gpt2", lambda m: m(tokens(1, 41)), r"This model has learned 40 positions, but position 40 was asked for: shorten the text to 40 tokens\."),
        ("gpt2", lambda m: m(tokens(1, 3), positions=torch.tensor([0, 1, 40])), r"This model has learned 40 positions, but position 40 was asked for"),
        ("gpt2", lambda m: m(tokens(1, 3), positions=torch.tensor([-1, 0, 1])), r"Position -1 was given, but positions are counted from 0\."),
        ("bert", lambda m: m(tokens(1, 25)), r"This model has learned 24 positions, but position 24 was asked for"),
        ("t5", lambda m: m.decode(tokens(), None), r"This decoder attends to an encoder's output, but none was given: call it with memory=encoder_states\."),
    ],
)
def test_an_input_that_a_model_cannot_take(name, give, said):
    with pytest.raises(InputError, match=said):
        give(built(name))


def test_an_embedding_of_nothing():
    model = built("llama")
    with pytest.raises(InputError, match=r"Neither tokens nor inputs_embeds were given: a model reads one of them\."):
        model.embed(None, None, None, model.position, a_pass())


def test_a_cache_beyond_the_learned_positions():
    model = built("gpt2")
    cache = model.cache(capacity=64)
    model(tokens(1, 40), cache=cache)
    with pytest.raises(InputError, match=r"learned 40 positions, but position 40 was asked for"):
        model(tokens(1, 1), cache=cache)


def test_a_window_of_one_layer_does_not_need_the_others_to_have_one():
    model = Decoder(VOCAB, D, (BLOCK, BLOCK.at("attention.mask").set(Window(3)))).build(seed=0)
    assert model(tokens()).shape == (2, 9, VOCAB)


def test_a_model_without_blocks_is_an_embedding_and_a_read_out():
    model = Decoder(VOCAB, D, (), tied=True).build(seed=0)
    assert model(tokens()).shape == (2, 9, VOCAB) and [s.path for s in model.sites()] == ["embed", "final_norm.scale", "resid_final", "logits"]


# Layers and halves keep what is their own


@dataclass(frozen=True)
class _Lean(Position):
    """A bias towards one key place."""

    place: int

    @property
    def biases(self) -> bool:
        return True

    def build(self, d_model, n_heads, d_head):
        layer = PositionLayer()
        layer.bias = lambda q, k: (k == self.place).float()[None, None, None, :].expand(1, n_heads, q.shape[-1], -1) * 50
        return layer


def test_positions_of_ones_own_are_each_layers_own():
    blocks = tuple(Block(Attention(4, position=_Lean(n))) for n in (0, 2))
    tap = Record("blocks.*.attn.pattern")
    Encoder(VOCAB, D, blocks).build(seed=0)(tokens(), tap=tap)
    assert [set(tap[f"blocks.{i}.attn.pattern"].argmax(-1).flatten().tolist()) for i in (0, 1)] == [{0}, {2}]


def test_masks_that_hold_tensors_are_each_layers_own():
    t = 2_000  # a tensor so long is printed with its middle left out
    hidden = [torch.ones(1, t, dtype=torch.bool) for _ in range(2)]
    hidden[1][0, 1_000] = False
    blocks = tuple(Block(Attention(4, mask=Visible(m))) for m in hidden)
    tap = Record("blocks.*.attn.pattern[0]")
    Encoder(VOCAB, D, blocks).build(seed=0)(tokens(1, t), tap=tap)
    assert [bool((tap[f"blocks.{i}.attn.pattern"][..., 1_000] == 0).all()) for i in (0, 1)] == [False, True]


def test_each_half_of_an_encoder_decoder_is_initialised_by_its_own_table():
    crossed = Block(Attention(4), cross=Attention(4))
    fill = Init((NORMS, Rule(("weight", "bias", "matrix"), Fill(0.5))))
    spec = EncoderDecoder(Encoder(VOCAB, D, (BLOCK,), init=fill), Decoder(VOCAB, D, (crossed,) * 2))
    model = spec.build(seed=0)
    assert (model.encoder.blocks[0].attn.qkv.weight == 0.5).all() and (model.encoder.embed.weight == 0.5).all()
    assert model.decoder.embed.weight is model.encoder.embed.weight and model.decoder.blocks[0].attn.qkv.weight.std() < 0.1
    # One decoder layer less leaves the encoder alone, one encoder layer more leaves the decoder alone.
    a = EncoderDecoder(Encoder(VOCAB, D, (BLOCK,)), Decoder(VOCAB, D, (crossed,) * 2)).build(seed=0)
    b = EncoderDecoder(Encoder(VOCAB, D, (BLOCK,)), Decoder(VOCAB, D, (crossed,))).build(seed=0)
    c = EncoderDecoder(Encoder(VOCAB, D, (BLOCK,) * 3), Decoder(VOCAB, D, (crossed,) * 2)).build(seed=0)
    assert torch.equal(a.encoder.blocks[0].attn.out.weight, b.encoder.blocks[0].attn.out.weight)
    assert torch.equal(a.decoder.blocks[0].attn.out.weight, c.decoder.blocks[0].attn.out.weight)
    assert a.encoder.blocks[0].attn.out.weight.std() > c.encoder.blocks[0].attn.out.weight.std()


@pytest.mark.parametrize("readout", [Classifier(3), Vector()])
def test_a_pooled_read_out_has_no_positions_to_choose_from(readout):
    model = Encoder(VOCAB, D, (BLOCK,), readout=readout).build(seed=0)
    with pytest.raises(InputError, match=r"keep chooses positions to read out, but (Classifier|Vector) makes one vector of a whole row: leave keep out\."):
        model(tokens(), keep=1)
    with pytest.raises(InputError, match=r"makes one vector of a row, but row 1 has length 0: leave empty rows out\."):
        model(tokens(), lengths=[3, 0])


def test_tokens_that_are_no_integers_and_vectors_of_another_width():
    with pytest.raises(InputError, match=r"Tokens are torch\.float32, but token ids are integers: use tokens\.long\(\)"):
        built("llama")(tokens().float())
    with pytest.raises(InputError, match=rf"inputs_embeds have shape \(2, 3, 5\), but this model reads \[batch, position, d_model={D}\]\."):
        built("llama")(inputs_embeds=torch.zeros(2, 3, 5))


def test_a_bias_of_the_model_needs_blocks_of_equally_many_heads():
    spec = Decoder(VOCAB, D, (BLOCK, Block(Attention(2))), position=ALiBi())
    with pytest.raises(SpecError, match=r"ALiBi biases every head of every block alike, but the blocks have 2 and 4 heads: "):
        spec.build(seed=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Attention(4, d_head=0), r"Attention\(d_head=0\): a head has at least 1 feature"),
        (lambda: Attention(4, d_value=-1), r"Attention\(d_value=-1\): a head has at least 1 feature"),
        (lambda: Plain(0), r"Plain\(d_ff=0\): a feed-forward layer is at least 1 wide\."),
        (lambda: Gated(-3), r"Gated\(d_ff=-3\)"),
        (lambda: Plain(8, dropout=1.0), r"Plain\(dropout=1\.0\): a dropout rate lies in \[0, 1\)\."),
        (lambda: Gated(8, dropout=-0.1), r"Gated\(dropout=-0\.1\)"),
        (lambda: Embedding(dropout=1.5), r"Embedding\(dropout=1\.5\)"),
        (lambda: Tagger(3, dropout=1.0), r"Tagger\(dropout=1\.0\)"),
        (lambda: Classifier(3, dropout=1.0), r"Classifier\(dropout=1\.0\)"),
        (lambda: LinearScaling(0.0), r"LinearScaling\(factor=0\.0\): a context is stretched by a factor above 0\."),
        (lambda: NTKScaling(-1.0), r"NTKScaling\(factor=-1\.0\)"),
        (lambda: YaRNScaling(0.0, 64), r"YaRNScaling\(factor=0\.0\)"),
        (lambda: Llama3Scaling(0.0), r"Llama3Scaling\(factor=0\.0\)"),
        (lambda: T5Buckets(3), r"T5Buckets\(buckets=3\): with bidirectional=True at least 4 are needed\."),
        (lambda: T5Buckets(1, bidirectional=False), r"at least 2 are needed\."),
        (lambda: T5Buckets(32, 8), r"T5Buckets\(max_distance=8\): the first 8 distances have buckets of their own, so it lies above 8\."),
    ],
)
def test_sizes_rates_and_factors_outside_their_range(make, said):
    with pytest.raises(SpecError, match=said):
        make()


def test_reading_a_stream():
    model = built("llama")
    tap = Record("blocks.1.resid_post", "resid_final")
    logits = model(tokens(), tap=tap)
    assert torch.equal(model.read(tap["resid_final"]), logits)
    assert torch.equal(model.read(tap["blocks.1.resid_post"], normed=False), logits)
    with pytest.raises(InputError, match=rf"The stream has shape \(2, 5\), but this model's read-out reads \[batch, position, d_model={D}\]\."):
        model.read(torch.zeros(2, 5))
