"""Values of the wrong type are named, with what is wanted instead, before anything is computed from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.core import fields, spec
from glassformer.core.errors import GlassformerError, InputError
from glassformer.core.mask import Causal, Window
from glassformer.text import train
from glassformer.train.data import TokenData


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [3, np.int64(3)], [3.0, True, "3", None]),
        (float, [3, 3.5, np.float32(1), torch.tensor(0.5)], [False, "3.5"]),
        (bool, [True, np.bool_(True)], [1, None]),
        (Annotated[int, "x"], [3], ["3"]),
        (tuple, [(), (1,)], [[1]]),
        (list, [[1]], [(1,)]),
        (str | None, ["a", None], [3, b"a"]),
        (None, [None], [0]),
        (Literal["a", "b"], ["a"], ["c", None]),
        (tuple[int, ...], [(), (1, 2)], [[1], (1, "a"), 3]),
        (tuple[float, float], [(1, 2.5), (1,)], [("a", 2.0), [1.0, 2.0]]),  # how many there are is for the owner to judge
        (Sequence[str], [["a"], ("a", "b")], ["ab", [1], {"a"}]),
        (Mapping[int, float], [{1: 2.0}], [[(1, 2.0)], 3]),
        (Callable[[int], int], [len], [3]),
        (gf.RMSNorm | gf.LayerNorm, [gf.RMSNorm()], [gf.RMSNorm, "RMSNorm"]),
        (torch.Tensor, [torch.zeros(1)], [[0.0]]),
        (Any, [3, None], []),
    ],
)
def test_what_fits_an_annotation_and_what_does_not(kind, good, bad):
    assert [v for v in good if not fields.fits(v, kind)] == []
    assert [v for v in bad if fields.fits(v, kind)] == []


def test_every_field_of_every_part_can_be_checked():
    unknown = [f"{name}.{f}" for name, part in spec.registered().items() for f in part.__dataclass_fields__ if f not in fields.hints(part)]
    assert unknown == [] and len(spec.registered()) > 40


def test_a_typed_function_keeps_its_name_and_checks_what_it_is_given():
    @fields.typed(InputError)
    def double(n: int, times: float = 2, *rest: Any, where: "NotKnownHere" = None, **more: Any) -> float:  # type: ignore[name-defined]
        """Twice."""
        return n * times

    assert double(3) == 6 and double(n=3, times=1.5, where=object()) == 4.5 and (double.__name__, double.__doc__) == ("double", "Twice.")
    with pytest.raises(InputError, match=r"^double\(n='3'\): n is a whole number, but a text was given\.$"):
        double("3")
    with pytest.raises(InputError, match=r"^double\(times=None\): times is a number, but None was given\.$"):
        double(3, times=None)


MODEL = gf.Decoder(11, 8, (gf.Block(gf.Attention(2), gf.Plain(16)),))
BUILT = MODEL.build(seed=0)
TOKENS = torch.zeros(1, 3, dtype=torch.long)
OTHER = train("characters", texts=["abc"])
TEXT = TokenData.from_text("abc" * 99, train("bytes"))
DATA = TokenData.from_ids(list(range(11)) * 9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gf.Decoder(11, "8", ()), "Decoder(d_model='8'): d_model is a whole number, but a text was given."),
        (lambda: gf.Decoder(11, 8), "Decoder needs blocks."),
        (lambda: gf.RMSNorm(1e-6, 0.0, "early", 5), "RMSNorm has 3 fields (eps, offset, cast), but 4 values were given."),
        (lambda: gf.Decoder(11, 8, [MODEL.blocks[0]]), "blocks is a tuple of Block, as in (Block(...),) * 4, but a list was given."),
        (lambda: gf.Decoder(11, 8, (gf.Block,)), "blocks is a tuple of Block, as in (Block(...),) * 4, but item 0 is the class Block."),
        (lambda: MODEL.replace(final_norm=gf.LayerNorm), "final_norm is a Norm, but the class LayerNorm itself was given: write LayerNorm(...)."),
        (lambda: MODEL.replace(final_norm="rms"), "final_norm is a Norm, but a text was given. Known: DynamicTanh, Joint, LayerNorm, NoNorm, RMSNorm."),
        (lambda: gf.Attention(2, mask=512), "Attention(mask=512): mask is a Mask, but a whole number was given."),
        (lambda: gf.Attention(n_head=4), "Attention has no field 'n_head'. Did you mean 'n_heads'"),
        (lambda: Window("8"), "Window(size='8'): the size is a whole number of places."),
        (lambda: gf.AdamW(betas=(0.9, "0.99")), "AdamW(betas=(0.9, '0.99')): betas is a tuple of numbers, but item 1 is '0.99'."),
        (lambda: gf.TopK("40"), "TopK(k='40'): k is a whole number, but a text was given."),
        (lambda: MODEL.diff(3), "diff compares two Specs, but a whole number was given."),
        (lambda: MODEL.at(3), "A path is a text, such as 'blocks.*.attention.position', but a whole number was given."),
        (lambda: MODEL.build(device="gpu"), "There is no device 'gpu' here. There is: "),
        (lambda: MODEL.build(seed="a"), "build(seed='a'): seed is a whole number or None, but a text was given."),
        (lambda: BUILT([[1, 2]]), "tokens is a list, but a Tensor is needed: use torch.tensor(...)."),
        (lambda: BUILT("hello"), "tokens is a text, but a Tensor is needed: generate(model, text, tokenizer=...) reads text,"),
        (
            lambda: BUILT(TOKENS, tap="embed"),
            "tap is a text, but a Tap is needed: tap = Record('embed'), then model(tokens, tap=tap); several are joined by |.",
        ),
        (lambda: BUILT(TOKENS, mask=8), "mask is a whole number, but a Mask is needed: Window(8), for example."),
        (lambda: BUILT(TOKENS, cache=True), "cache is True or False, but a Cache is needed: cache = model.cache(batch)."),
        (lambda: BUILT(TOKENS, lengths=3), "lengths is a whole number, but a list is needed: lengths=[5, 3], one per row."),
        (lambda: BUILT(TOKENS, keep="last"), "keep is a text, but it is a number of last positions, or a tensor with one position per row."),
        (lambda: BUILT.cache(batch="1"), "cache(batch='1'): batch is a whole number, but a text was given."),
        (lambda: gf.Record(), "Record() keeps nothing: name what to keep, such as Record('blocks.*.attn.pattern'), or Record('**') for everything."),
        (lambda: gf.Record(3), "A site is named by a text, such as 'blocks.3.attn.pattern', but a whole number was given."),
        (lambda: gf.Edit("embed", 3), "the second is a function of the value, such as lambda x: 0 * x, but a whole number was given."),
        (lambda: gf.generate(BUILT, [1], temperature="hot"), "generate(temperature='hot'): temperature is a number or None, but a text was given."),
        (lambda: gf.generate(BUILT, [1], max_new_tokens="4"), "max_new_tokens is a whole number, but a text was given."),
        (lambda: gf.generate(BUILT, [1], stop=[3]), "stop is a text or a sequence of texts, but item 0 is 3."),
        (lambda: gf.generate(MODEL, [1]), "Generation needs a model, but a Decoder was given: spec.build() makes one of a Spec, load(folder) reads one."),
        (lambda: gf.generate(MODEL.build(device="meta"), [1]), "This model stands on the meta device, where tensors have shapes but no numbers"),
        (lambda: gf.Trainer(BUILT, gf.NextToken(), DATA, steps=1, optimizer="adam"), "optimizer is an Optimizer, but a text was given. Known: AdamW, Muon."),
        (lambda: gf.Trainer(BUILT, gf.NextToken(), DATA, steps=1, optimizer=gf.AdamW), "but the class AdamW itself was given: write AdamW(...)."),
        (lambda: gf.Trainer(BUILT, gf.NextToken(), DATA, steps="1"), "Trainer(steps='1'): steps is a whole number or None, but a text was given."),
        (lambda: gf.Trainer(MODEL, gf.NextToken(), DATA, steps=1), "model is a model, but its description was given: Decoder(...).build() makes one."),
        (lambda: TokenData.from_text("abc", None), "A text is read by a tokenizer, but None was given: gf.text.train makes one, gf.load(folder) has one."),
        (lambda: TokenData.from_ids("abc"), "Token ids are one row of whole numbers; an array of shape () and type <U3 was given."),
        (lambda: gf.LayerNorm(eps=-1), "LayerNorm(eps=-1): eps stands under a square root and is 0 or more."),
        (lambda: gf.Rotary(base=0), "Rotary(base=0): the base lies above 0"),
        (lambda: gf.Learned(0), "Learned(max_positions=0, offset=0): there is at least one position"),
        (lambda: gf.Attention(0), "Attention has n_heads=0 and n_kv_heads=0: there is at least one of each."),
        (lambda: BUILT.cache(batch=0), "A cache has rows and room for tokens: batch=0, capacity=512 and rewind=0 were given."),
        (lambda: BUILT.flops_per_token(0), "context is a number of tokens, 1 or more; 0 was given."),
        (lambda: BUILT(TOKENS, positions=torch.arange(2)), "positions have shape (2,), but the tokens have 3 places: one position for each, [t] or [b t]."),
        (lambda: BUILT(TOKENS, tap=gf.Edit("logits", lambda x: 3)), "The edit at 'logits' returned a whole number, but the value is a tensor"),
        (lambda: gf.Record("logits") | 3, "a | b joins two taps, but a whole number was given."),
        (lambda: Causal() & 3, "a & b joins two masks, but 3 was given: Causal() & Window(512), for example."),
        (lambda: gf.preset(["tiny"]), "preset(name=['tiny']): name is a text, but a list was given."),
        (lambda: gf.page(BUILT, None, "abc"), "tokenizer is None, but a text is read by one: gf.load(folder) has one."),
        (lambda: gf.evaluate(BUILT, gf.NextToken, DATA), "but the class NextToken itself was given: write NextToken(...)."),
        (lambda: gf.save(3, "m"), "A model that was built from a Spec can be saved, but a whole number was given."),
        (lambda: gf.save(BUILT, "m", train("bytes")), "The tokenizer has 256 tokens, but the model's vocabulary has 11: it is another model's."),
        (lambda: gf.generate(BUILT, "ab", tokenizer="T"), "tokenizer is a text, but it has to encode and decode: gf.load(folder).tokenizer is one."),
        (lambda: gf.Session(BUILT, [1], gf.Greedy()), "prompts is a sequence of sequence of whole numbers, but item 0 is 1."),
        (lambda: gf.Session(BUILT, [[1]], gf.Greedy(), room=-1), "room is how many tokens may be drawn, 0 or more; -1 was given."),
        (lambda: gf.Session(BUILT, [[1]], gf.Greedy()).fork(0), "fork(n) makes every row n times, 1 or more; 0 was given."),
        (lambda: gf.Session(BUILT, [[1]], gf.Greedy()).select([9]), "select() takes rows of this session, a list of numbers from 0 to 0; 9 was given."),
        (lambda: train("bytes").decode("abc"), "decode takes token ids in one row, such as [5, 3]; a text of something else was given."),
        (lambda: gf.Tokenizer.load(3), "load(path=3): path is a text or a Path, but a whole number was given."),
        (
            lambda: train("bpe", texts=["abc"], vocab_size=10**9),
            "vocab_size=1000000000 is no size that a tokenizer can have: it lies between 1 and 10,000,000.",
        ),
        (lambda: train("characters", texts=[]), "there is no text to train on: what was given is empty."),
        (lambda: train("characters", files="."), ". is a folder: give the files in it."),
        (lambda: DATA.part(5, 2), "A part goes from its first token to its last one; first=5 and last=2 were given."),
        (lambda: gf.Trainer(BUILT, gf.NextToken(), DATA, steps=1, seed=-1), "seed is a whole number from 0 to 2^63 - 1; -1 was given."),
        (lambda: gf.Recipe(MODEL, steps=1, seed=-1), "seed is a whole number from 0 to 2^63 - 1; -1 was given."),
        (lambda: gf.Trainer(MODEL.build(device="meta"), gf.NextToken(), DATA, steps=1), "This model stands on the meta device"),
        (lambda: gf.Trainer(MODEL.replace(vocab_size=300).build(), gf.NextToken(), TEXT, steps=1, tokenizer=OTHER), "is not the one that made the data"),
        (lambda: next(iter(gf.Trainer(BUILT, gf.NextToken(), DATA, steps=1, batch=1, context=4))).every(0), "step.every(n) counts steps"),
        (lambda: gf.RMSNorm(1e-5, eps=1e-6), "RMSNorm was given eps twice: 1e-05 by its place and 1e-06 by its name."),
        (lambda: train("bpe", texts="abc"), "train(texts='abc'): texts is a sequence of texts or None, but a text was given."),
        (lambda: gf.load(3), "load(path=3): path is a text or a path, but a whole number was given."),
        (lambda: gf.preset("t5-small").build(device="meta")(TOKENS), "but only the source was given: a target begins with the token 0 (spec.start)"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_sentence(make, said):
    with pytest.raises(GlassformerError) as caught:
        make()
    assert said in str(caught.value)


def test_parts_of_a_user_s_own_are_made_as_they_say():
    @spec.part
    class Strange(spec.Spec):
        width: "the width in rooms"
        other: "torch.nosuch"
        hidden: int = field(default=3, init=False)
        given: InitVar[int] = 5
        last: float = 0.5

        def __post_init__(self, given: int) -> None:
            object.__setattr__(self, "hidden", given)

    assert (Strange("a", None, 7).hidden, Strange("a", None, given=8, last=1).hidden) == (7, 8)
    with pytest.raises(GlassformerError, match="Strange has no field 'lost'. Did you mean 'last'"):
        Strange("a", None, lost=1)

    @spec.part
    class Own(spec.Spec):
        size: int

        def __init__(self, text: str):
            object.__setattr__(self, "size", len(text))

    assert Own("abc").size == 3


def test_a_spec_made_inside_a_compiled_function_is_made():
    made = torch.compile(lambda x: x * gf.RMSNorm(eps=2.0).eps, backend="eager", fullgraph=True)
    assert made(torch.ones(2)).tolist() == [2.0, 2.0]


def test_values_of_the_right_type_pass_as_they_are():
    assert gf.Attention(2, mask=Causal() & Window(3)).mask == Causal() & Window(3)
    assert gf.Attention(np.int64(2)).n_heads == 2 and gf.AdamW(1).lr == 1
    assert Window(np.int64(3)).size == 3 and gf.LogitBias([(3, 1.0), (3, 1.0)]).apply(torch.zeros(1, 5))[0, 3] == 2.0
    assert gf.Suppress({1}) == gf.Suppress(range(1, 2)) and len(TokenData.from_ids(torch.arange(3))) == 3
    assert torch.equal(BUILT(TOKENS, lengths=np.array([3]), positions=torch.arange(3)), BUILT(TOKENS, lengths=[3]))
    assert gf.LogitBias({3: -1.0}) == gf.LogitBias(((3, -1.0),)) and gf.Suppress([1]) == gf.Suppress((1,))
    assert fields.fits(Path("x"), fields.hints(gf.load)["path"])
