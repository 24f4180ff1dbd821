"""The tree of continuations: every path is what a computation from nothing says."""

from __future__ import annotations

import json

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, SamplerError
from glassformer.core.mask import Window
from glassformer.infer import Draw, Mirostat2, Session, Temperature, generate
from glassformer.infer.branching import Branch, Branches, put
from look import zoo

torch.set_num_threads(1)


def model_of(name: str):
    if name != "window":
        return zoo.model(name)
    block = zoo.block(attention=gf.Attention(4, position=gf.Rotary(), mask=Window(3)), norm=gf.RMSNorm())
    return gf.Decoder(zoo.V, zoo.D, (block,) * 2).build(seed=0).eval()


def hold(tree: Branches, source: list[int] | None = None) -> None:
    """Every path's probabilities are those of one forward over the whole of it."""
    for path in tree:
        whole = torch.tensor([[*tree._start, *path.ids]])
        with torch.no_grad():
            logits = tree.model(whole) if source is None else tree.model(torch.tensor([source]), whole)
        expected = logits[0].log_softmax(-1)[len(tree._start) - 1 : -1].gather(1, torch.tensor(path.ids).long()[:, None])[:, 0]
        assert path.logprobs == pytest.approx(expected.tolist(), abs=2e-4)
        assert path.logprob == pytest.approx(float(expected.sum()), abs=2e-3)


def grown(model, keep: int = 8, prompt=(3, 1, 4), **options) -> Branches:
    """A tree with all kinds of branches."""
    tree = Branches(model, list(prompt), keep=keep, **options)
    first = tree.grow(8)
    one, two = first.branch(at=3, n=2)
    one.grow(5)
    first.branch(at=0, tokens=[5, [6, 7]])
    two.branch(draw=True, n=2)
    one.branch(at=-2, draw=True, n=2)[1].grow(3)
    first.grow(2)
    two.grow(1)
    return tree


@pytest.mark.parametrize("name", [*zoo.DECODERS, "window"])
@pytest.mark.parametrize("keep", [1, 8])
def test_every_path_is_a_fresh_computation(name: str, keep: int) -> None:
    tree = grown(model_of(name), keep, temperature=0.9, top_k=12, seed=3)
    hold(tree)
    assert len(tree) == 9 and len(tree._sessions) <= keep
    assert [len(b) for b in tree] == [10, 9, 5, 1, 2, 5, 5, 8, 11]
    assert tree.chain.endswith("Draw(seed=3)")
    assert tree.branches[0].ids == generate(model_of(name), [3, 1, 4], temperature=0.9, top_k=12, seed=3, max_new_tokens=10).ids


def test_encoder_decoders() -> None:
    tree = grown(zoo.model("t5"), prompt=(9, 8, 7, 6), temperature=1.0, seed=0)
    hold(tree, [9, 8, 7, 6])


@pytest.mark.parametrize("chain", [Mirostat2(2.0, 0.4) | Draw(5), Temperature(1.2) | Draw(5)], ids=["mirostat", "plain"])
def test_the_sampler_s_memory_goes_along(chain) -> None:
    """A path draws what a session says that was given its tokens one by one and drew the rest, whatever was kept."""
    model = zoo.model("llama")
    trees = [grown(model, keep, sampler=chain, seed=5) for keep in (1, 2, 8)]
    assert len({tuple(map(tuple, (b.ids for b in tree))) for tree in trees}) == 1
    path = trees[0].branches[1]  # a given token at 3, then five drawn
    session = Session(model, [[3, 1, 4]], chain, seed=trees[0].seed, seeds=[path.seed], cache=False)
    for token in path.ids[:4]:
        put(session, token)
    assert [session.step().ids[0] for _ in range(5)] == path.ids[4:]


def test_the_most_probable_ones_are_those_that_are_not_there() -> None:
    model = zoo.model("gpt2")
    tree = Branches(model, [3, 1, 4], seed=0)
    first = tree.grow(4)
    with torch.no_grad():
        order = model(torch.tensor([[3, 1, 4, *first.ids[:2]]]))[0, -1].argsort(descending=True).tolist()
    order.remove(first.ids[2])
    found = [b.ids[2] for b in [*first.branch(at=2, n=2), *first.branch(at=2, n=3)]]
    assert found == order[:5]
    assert all(b.parent is first and b.at == 2 and b.ids[:2] == first.ids[:2] for b in tree.branches[1:])
    assert len(first.branch(at=2, n=99)) == zoo.V - 6
    assert first.branch(at=2, n=1) == []


def test_nothing_shared_is_read_again() -> None:
    """A branch costs the tokens that it does not share."""
    read: list[int] = []

    class Counts(gf.Tap):
        def begin(self, path, index, lengths) -> None:
            read.append(index.shape[-1])

    tree = Branches(zoo.model("llama"), list(range(1, 21)), tap=Counts(), temperature=1.0, seed=1)
    first = tree.grow(10)
    assert read == [20] + [1] * 9
    read.clear()
    (other,) = first.branch(at=6, tokens=[2])
    other.grow(3)
    assert read == [1, 1, 1, 1]  # the token before the place once more, for what follows it; then one for each but the last
    read.clear()
    first.grow(2)
    assert read == [1, 1]


def test_luck() -> None:
    model = zoo.model("llama")
    tree = Branches(model, [3, 1, 4], temperature=1.5, seed=2)
    first = tree.grow(9)
    (same,) = first.branch(at=4, tokens=[first.ids[4]])
    assert same.grow(4).ids == first.ids  # with the same random numbers
    others = first.branch(at=4, n=6, draw=True)
    for b in others:
        b.grow(4)
    assert len({tuple(b.ids) for b in others}) > 3
    again = Branches(model, [3, 1, 4], temperature=1.5, seed=2)
    again.grow(9).branch(at=4, tokens=[first.ids[4]])
    assert [b.grow(4).ids for b in again.trunk.branch(at=4, n=6, draw=True)] == [b.ids for b in others]
    torch.manual_seed(0)
    free = Branches(model, [3, 1, 4], temperature=1.5)
    assert free.grow(5).ids == generate(model, [3, 1, 4], temperature=1.5, seed=free.seed, max_new_tokens=5).ids


def test_the_end_of_the_text() -> None:
    model = zoo.model("llama")
    ids = generate(model, [3, 1, 4], max_new_tokens=9).ids
    end = ids[5]
    tree = Branches(model, [3, 1, 4], eos_id=end)
    first = tree.grow(20)
    assert first.ended and first.ids == ids[: ids.index(end) + 1] and first.grow(5) is first and len(first) == ids.index(end) + 1
    with pytest.raises(InputError, match="come to the end of the text"):
        first.branch(n=2)
    assert first.branch(at=0, tokens=[end])[0].ended
    assert ", at its end" in str(tree)


def test_what_it_prints_and_saves(tmp_path) -> None:
    class Letters:
        eos_id = None

        def encode(self, text):
            return [ord(c) - 96 for c in text]

        def decode(self, ids):
            return "".join(chr(96 + i) if i else "_" for i in ids)

    table = torch.log(torch.tensor([[0.5, 0.3, 0.2]] * 3))

    from infer.test_speculative import Counting

    tree = Branches(Counting(table), "ab", tokenizer=Letters())
    first = tree.grow(4)
    tree.branch(at=2, tokens=["a", "bb"])
    tree.branch(at=0, n=1)
    assert first.text == "____" and repr(first) == "Branch('____', 4 tokens, ln p -2.77)"
    assert str(tree).splitlines() == [
        "ab",
        "├─ '__'   50.0 %",
        "│  ├─ '__'   50.0 %   4 tokens, ln p -2.8",
        "│  ├─ 'a'   30.0 %   3 tokens, ln p -2.6",
        "│  └─ 'bb'   20.0 %   4 tokens, ln p -4.6",
        "└─ 'a'   30.0 %   1 token, ln p -1.2",
    ]
    assert [p.ids for p in tree.paths()] == [[1], [0, 0, 1], [0, 0, 0, 0], [0, 0, 2, 2]]
    assert repr(tree) == "Branches(4 paths, 8 tokens)" and tree.bytes == 0
    told = json.loads(tree.save(tmp_path / "tree.json").read_text())
    assert told["prompt"] == "ab" and [piece["text"] for piece in told["tree"]] == ["__", "a"] and told["tree"] == tree.nested()
    assert [piece["text"] for piece in told["tree"][0]["children"]] == ["__", "a", "bb"]
    assert tree.save(tmp_path / "tree.txt").read_text() == str(tree) + "\n"
    with pytest.raises(InputError, match=r"'tree\.png' ends in '\.png', but the ending says how a tree is written: one of \.html, \.json, \.txt"):
        tree.save(tmp_path / "tree.png")


def test_memory_is_bounded() -> None:
    model = zoo.model("llama")
    tree = Branches(model, [1, 2, 3], keep=3, max_new_tokens=40, temperature=1.0, seed=0)
    first = tree.grow(10)
    one = tree.bytes
    for at in range(8):
        first.branch(at=at, n=2, draw=True)
    assert len(tree._sessions) == 3 and tree.bytes == 3 * one
    assert isinstance(first, Branch) and len(first.grow(5)) == 15
    hold(tree)


def test_errors() -> None:
    model = zoo.model("llama")
    tree = Branches(model, [1, 2, 3], max_new_tokens=12)
    first = tree.grow(5)
    for words, call in {
        "5 tokens, so others leave it at 0 to 5, its end; at=6": lambda: first.branch(at=6),
        "at=-6": lambda: first.branch(at=-6),
        "n is how many paths branch off, 1 or more; 0": lambda: first.branch(n=0),
        "give the one or the others": lambda: first.branch(n=2, tokens=[1]),
        "grow(n) draws n tokens, 1 or more; 0": lambda: first.grow(0),
        "A path of 14 tokens was asked for, but this tree has room for 12": lambda: first.grow(9),
        "A path of 13 tokens": lambda: first.branch(at=1, tokens=[[1] * 12]),
        "without a tokenizer it cannot be read": lambda: first.branch(tokens=["so"]),
        "An alternative is a text, an id or a list of ids, but [] was given": lambda: first.branch(tokens=[[]]),
        "the id 31, but the model's 31 tokens are 0 to 30": lambda: first.branch(tokens=[31]),
        "grows from one prompt, but 2 were given": lambda: Branches(model, [[1], [2]]),
        "keep is how many sessions": lambda: Branches(model, [1], keep=0),
        "max_new_tokens is how long a path may become": lambda: Branches(model, [1], max_new_tokens=0),
        "decoder_start is for encoder-decoder": lambda: Branches(model, [1], decoder_start=3),
    }.items():
        with pytest.raises(InputError) as said:
            call()
        assert words in str(said.value)
    assert len(tree) == 1  # what was refused left nothing behind
    refused = (({"stop": ["a"]}, "takes no stop"), ({"draft": model}, "takes no draft"), ({"num_beams": 3}, "takes no num_beams"), ({"top_kk": 3}, "'top_k'"))
    for options, words in refused:
        with pytest.raises(SamplerError, match=words):
            Branches(model, [1], **options)
