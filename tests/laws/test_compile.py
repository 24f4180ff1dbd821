"""Under torch.compile: the same numbers, every site recorded, and no trace of observation in a graph that nobody observes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from glassformer.core.flow import Pass
from glassformer.core.tap import Edit, Record, Tap
from glassformer.models import TransformerModel
from tools import ALL, SOURCE_LENGTHS, built, call, each, fresh, same, source, tokens


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operations(model: Any, tap: Tap | None) -> Counter[str]:
    """The operations of the one graph that a call compiles to."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(tokens(), tap=tap)
    assert len(graphs) == 1
    return Counter(str(n.target) for n in graphs[0].graph.nodes if n.op in ("call_function", "call_method", "call_module"))


def quick(first: str, *others: str) -> Any:
    """Tracing takes seconds: one variant every time, the others among the slow tests."""
    return pytest.mark.parametrize("name", [first, *(pytest.param(n, marks=pytest.mark.slow) for n in others)])


@quick("llama", "gpt2", "gemma2")
def test_the_graph_has_the_same_operations_with_and_without_taps(name, monkeypatch):
    model = fresh(ALL[name].replace(blocks=ALL[name].blocks[:1]))
    unobserved = operations(model, None)
    assert sum(unobserved.values()) > 15
    looked = operations(model, Tap())
    recorded = operations(model, Record("**.resid_post", "**.q", "**.z"))
    assert looked == unobserved
    assert recorded - unobserved == Counter({"detach": 3}), "recording adds nothing but the detached views that it keeps"
    assert unobserved - recorded == Counter()
    # And without the mechanism at all:
    monkeypatch.setattr(Pass, "see", lambda self, site, x: x)
    monkeypatch.setattr(Pass, "offer", lambda self, site, compute: None)
    monkeypatch.setattr(Pass, "edits", lambda self, site: False)
    assert operations(model, None) == unobserved


@quick("llama", "gpt2", "gemma2", "sink", "t5-of-model", "bert")
def test_an_observed_graph_records_every_site(name):
    """Traced without a code generator (the slow tests below have one), in one graph."""
    model, ids = built(name), tokens()
    plain, compiled = Record("**"), Record("**")
    with torch.no_grad():
        call(model, ids, tap=plain)
        torch.compile(model, backend="eager", fullgraph=True)(ids, tap=compiled)
    assert compiled.paths == plain.paths and set(plain.paths) == {s.path for s in model.sites()}
    for path in plain.paths:
        same(compiled[path], plain[path], what=path)


def test_a_tap_added_after_the_first_compiled_call_is_not_ignored():
    model, ids = fresh(ALL["llama"].replace(blocks=ALL["llama"].blocks[:1])), tokens()
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = run(ids)
        tap = Record("blocks.0.attn.pattern", "blocks.0.attn.z[1]")
        assert torch.equal(run(ids, tap=tap), plain)
        same(tap["blocks.0.attn.pattern"].sum(-1), torch.ones(2, 4, 9))
        assert tap["blocks.0.attn.z"].shape == (2, 9, 1, 6)
        assert (run(ids, tap=Edit("blocks.0.attn.z[1]", torch.zeros_like)) - plain).abs().max() > 1e-3


def test_recorded_gradients_under_compile_are_those_of_the_plain_pass():
    model, ids = fresh("llama"), tokens()
    taps = [Record("blocks.*.resid_post", "blocks.1.attn.pattern", grad=True) for _ in range(2)]
    for run, tap in zip((model, torch.compile(model, backend="eager")), taps, strict=True):
        run(ids, tap=tap).square().sum().backward()
    for path in taps[0].paths:
        same(taps[1].grad(path), taps[0].grad(path), atol=1e-4, what=path)  # gradients are tens here: 1e-4 is their seventh digit


def first_block(name: str) -> Any:
    """The model with one block, where a second one would only be compiled once more."""
    return fresh(ALL[name].replace(blocks=ALL[name].blocks[:1]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("llama", "inductor"), ("gpt2", "inductor"), ("gemma2", "inductor"), ("t5", "aot_eager"), ("sink", "aot_eager")])
def test_compiled_equals_eager(name, backend):
    """Two unlike blocks in gemma2 and t5; of alike ones, the first (with all their blocks they are traced and recorded above)."""
    model, ids = built(name) if name in ("gemma2", "t5") else first_block(name), tokens()
    run = torch.compile(model, backend=backend)
    tap, plain = Record("**"), Record("**")
    with torch.no_grad():
        want = call(model, ids, tap=plain)
        same(run_of(model, run, ids), want)
        same(run_of(model, run, ids, tap=tap), want)
    assert set(tap.paths) == {s.path for s in model.sites()}
    for path in tap.paths:
        same(tap[path], plain[path], what=path)


def run_of(model: Any, run: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    if isinstance(model, TransformerModel):
        return run(ids, **options)
    return run(source(2), ids, source_lengths=list(SOURCE_LENGTHS[:2]), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("llama", "inductor"), ("window", "aot_eager"), ("t5-of-model", "aot_eager")])
def test_compiled_training_equals_eager(name, backend):
    spec = ALL[name].replace(blocks=ALL[name].blocks[:1])
    plain, compiled, ids = fresh(spec), fresh(spec), tokens()
    plain(ids).square().mean().backward()
    torch.compile(compiled, backend=backend)(ids).square().mean().backward()
    for (n, x), y in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        same(y.grad, x.grad, what=n)


@pytest.mark.slow
@each(["llama", "window", "gemma2"])
def test_compiled_decoding_equals_eager(name):
    model, ids = built(name) if name == "gemma2" else first_block(name), tokens()
    run, cache = torch.compile(model, backend="eager"), model.cache(batch=2, capacity=16)
    with torch.no_grad():
        same(torch.cat([run(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 9))], 1), model(ids))
