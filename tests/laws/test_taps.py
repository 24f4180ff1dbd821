"""Looking does not change what is looked at; what is changed is changed; what is differentiated is the true gradient."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from glassformer.core.sites import HEAD_AXIS
from glassformer.core.tap import Edit, Record, Tap
from glassformer.parts import kernels
from tools import ALL, CAUSAL, built, call, each, fresh, half, same, tokens

F64 = torch.float64


def noise(x: torch.Tensor, size: float = 0.5) -> torch.Tensor:
    """The value with different noise in every element (a constant shift of keys or scores would be invisible to soft-max)."""
    return x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(x)


# Record


@each(ALL)
def test_recording_changes_no_bit_and_meets_every_site(name):
    model, ids = built(name), tokens()
    tap = Record("**")
    with torch.no_grad():
        assert torch.equal(call(model, ids), call(model, ids, tap=tap))
    assert set(tap.paths) == {s.path for s in model.sites()}
    assert all(not x.requires_grad for x in tap.values.values())


@each(ALL)
def test_recording_while_training_changes_no_gradient_bit(name):
    def gradients(tap: Tap | None) -> list[torch.Tensor]:
        model = fresh(name)
        call(model, tokens(), tap=tap).square().sum().backward()
        return [x.grad for x in model.parameters() if x.requires_grad]

    for a, b in zip(gradients(None), gradients(Record("**")), strict=True):
        assert torch.equal(a, b)


@each(["llama", "sink", "sigmoid", "gemma2", "t5", "unlike-halves", "alibi"])
def test_one_head_costs_one_head(name, monkeypatch):
    """Asking for one head's pattern computes one head's matrix of one layer, and no other."""
    made: list[tuple[int, ...]] = []
    scores_of = kernels.scores_of

    def counting(q: Any, k: Any, rule: Any, heads: Any = None) -> torch.Tensor:
        scores = scores_of(q, k, rule, heads)
        made.append(tuple(scores.shape))
        return scores

    model, ids = built(name), tokens()
    call(model, ids)
    path = half(model) + "blocks.1.attn.pattern"
    whole, one = Record(path), Record(path + "[2]")
    call(model, ids, tap=whole)
    monkeypatch.setattr(kernels, "scores_of", counting)
    call(model, ids)
    unwatched = len(made)  # capped and sigmoid layers have no fused kernel on this machine
    made.clear()
    call(model, ids, tap=one)
    assert len(made) == unwatched + 1 and sorted(made)[0] == (2, 1, 9, 9)
    same(one[path], whole[path][:, 2:3])


@each(["llama", "t5"])
def test_picked_heads_are_those_heads(name):
    model, ids = built(name), tokens()
    where = half(model) + "blocks.0.attn."
    whole = Record("**")
    call(model, ids, tap=whole)
    for site, axis in HEAD_AXIS.items():
        some = Record(f"{where}{site}[1]", f"{where}{site}[0]")
        call(model, ids, tap=some)
        same(some[where + site], whole[where + site].index_select(axis, torch.tensor([1, 0])), what=site)


def test_results_of_heads_and_bias_sum_to_what_the_layer_returns():
    for name in ("gpt2", "llama", "qk-norm"):
        model, tap = built(name, F64), Record("**.result", "**.out")
        model(tokens(), tap=tap)
        bias = model.blocks[0].attn.out.bias
        total = tap["blocks.0.attn.result"].sum(2) + (0 if bias is None else bias.detach())
        same(total, tap["blocks.0.attn.out"])


@each(["llama", "gpt2", "sink", "sigmoid", "gemma2", "unlike-halves", "t5-of-model"])
def test_the_recorded_values_are_consistent(name):
    """pattern = normaliser(scores) and z = pattern v, in the recorded values themselves."""
    model, tap = built(name, F64), Record("**")
    call(model, tokens(), tap=tap)
    path = half(model) + "blocks.1.attn"
    layer = model.get_submodule(path)
    same(tap[f"{path}.pattern"], layer.normaliser(tap[f"{path}.scores"]).detach())
    v = tap[f"{path}.v"].transpose(1, 2)
    same(tap[f"{path}.z"].transpose(1, 2), kernels.mix(tap[f"{path}.pattern"], v))


# Gradients


@each(["llama", "gpt2", "sink", "sigmoid", "gemma2", "bert", "t5", "experts", "tanh"])
def test_recorded_gradients_are_the_true_ones(name):
    """At every site: the derivative along a random direction, against a finite difference made by editing the site (float64)."""
    model, ids = built(name, F64), tokens()

    def loss(tap: Tap) -> torch.Tensor:
        return call(model, ids, tap=tap).square().sum()

    tap = Record("**", grad=True)
    loss(tap).backward()
    model.zero_grad()
    e = 1e-6
    checked = 0
    for path in [s.path for s in model.sites()]:
        if path.endswith("chosen") or ".0." in path or path.startswith("encoder.blocks"):
            continue  # indices have no gradient; the last layer stands for all
        direction = torch.where(torch.isfinite(tap[path]), noise(torch.zeros_like(tap[path]), 1.0), 0.0).detach()
        with torch.no_grad():
            up, down = (loss(Edit(path, lambda x, s=s, d=direction: x + s * d)) for s in (e, -e))
        measured = (up - down) / (2 * e)
        given = (tap.grad(path) * direction).nan_to_num().sum()
        assert given.item() == pytest.approx(measured.item(), rel=2e-5, abs=1e-4), path
        checked += 1
    assert checked > 10


@each(["llama", "bert", "t5", "experts"])
def test_recording_gradients_gives_the_output_and_the_gradients_of_the_plain_pass(name):
    a, b = fresh(name, F64), fresh(name, F64)
    x, tap = call(a, tokens()), Record("**", grad=True)
    y = call(b, tokens(), tap=tap)
    same(x.detach(), y.detach())
    x.square().sum().backward()
    y.square().sum().backward()
    for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        scale = p.grad.abs().max().clamp(min=1)
        same(q.grad / scale, p.grad / scale, what=n)


def test_gradients_reach_sites_of_a_frozen_model():
    model = fresh("llama", F64).requires_grad_(False)
    tap = Record("embed", "**.z", grad=True)
    model(tokens(), tap=tap).sum().backward()
    assert tap.grad("embed").abs().sum() > 0 and tap.grad("blocks.1.attn.z").abs().sum() > 0


def test_gradients_of_picked_heads():
    model = fresh("llama", F64)
    whole, some = Record("blocks.0.attn.z", "blocks.1.attn.pattern", grad=True), Record("blocks.0.attn.z[2,1]", "blocks.1.attn.pattern[3]", grad=True)
    model(tokens(), tap=whole).square().sum().backward()
    model(tokens(), tap=some).square().sum().backward()
    assert some["blocks.0.attn.z"].shape[2] == 2
    same(some["blocks.0.attn.z"].detach(), whole["blocks.0.attn.z"].detach()[:, :, [2, 1]])
    same(some.grad("blocks.0.attn.z"), whole.grad("blocks.0.attn.z")[:, :, [2, 1]])
    same(some.grad("blocks.1.attn.pattern"), whole.grad("blocks.1.attn.pattern")[:, [3]])


# Edit


@each(ALL)
def test_an_edit_at_any_site_changes_the_output(name):
    model, ids = built(name), tokens(1, 5)
    with torch.no_grad():
        plain = call(model, ids)
        for site in model.sites():
            if ".0." in site.path and len(set(getattr(model.spec, "decoder", model.spec).blocks)) == 1:
                continue  # layer 1 is the same again
            if site.path.endswith(".chosen"):
                n = next(b.feedforward.n_experts for b in model.spec.blocks)
                change = lambda x, n=n: (x + 1) % n
            else:
                change = noise
            changed = call(model, ids, tap=Edit(site.path, change))
            assert torch.isfinite(changed).all() and (changed - plain).abs().max() > 1e-5, site.path


@each(ALL)
def test_an_edit_that_changes_nothing_changes_nothing(name):
    """The edited way and the fused way are the same function."""
    model, ids = built(name), tokens()
    with torch.no_grad():
        same(call(model, ids, tap=Edit("**", lambda x: x)), call(model, ids))
        same(call(model, ids, tap=Edit("**", lambda x: None)), call(model, ids))


def test_a_head_is_switched_off_by_its_z_or_its_result():
    model, ids = built("llama", F64), tokens()
    with torch.no_grad():
        a = model(ids, tap=Edit("blocks.0.attn.z[1]", torch.zeros_like))
        b = model(ids, tap=Edit("blocks.0.attn.result[1]", torch.zeros_like))
        c = model(ids, tap=Edit("blocks.0.attn.z", lambda z: z.index_fill(2, torch.tensor([1]), 0.0)))
        d = model(ids, tap=Edit("blocks.0.attn.pattern[1]", torch.zeros_like))
    for other in (b, c, d):
        same(other, a)
    assert (a - model(ids)).abs().max() > 1e-3


def test_edited_scores_are_normalised_and_edited_patterns_are_not():
    model, ids = built("llama", F64), tokens()
    tap = Edit("blocks.0.attn.scores", lambda s: s + 1.0) | Record("blocks.0.attn.pattern", "logits")
    with torch.no_grad():
        plain = model(ids)
        same(model(ids, tap=tap), plain)  # soft-max does not see a constant
        flat = Edit("blocks.0.attn.scores", lambda s: torch.where(s.isfinite(), 0.0, s)) | Record("blocks.0.attn.pattern")
        model(ids, tap=flat)
        rows = torch.ones(9, 9, dtype=F64).tril()
        same(flat.taps[1]["blocks.0.attn.pattern"], (rows / rows.sum(-1, keepdim=True)).expand(2, 4, 9, 9))
        doubled = Record("blocks.0.attn.z")
        single = Record("blocks.0.attn.z")
        model(ids, tap=single)
        model(ids, tap=Edit("blocks.0.attn.pattern", lambda a: 2 * a) | doubled)
        same(doubled["blocks.0.attn.z"], 2 * single["blocks.0.attn.z"])


def test_taps_compose_from_left_to_right():
    model, ids = built("llama", F64), tokens()
    before, after = Record("blocks.0.resid_post"), Record("blocks.0.resid_post")
    add, twice = Edit("blocks.0.resid_post", lambda x: x + 1), Edit("blocks.0.resid_post", lambda x: 2 * x)
    with torch.no_grad():
        model(ids, tap=before | add | twice | after)
    same(after["blocks.0.resid_post"], 2 * (before["blocks.0.resid_post"] + 1))


def test_patching_from_one_run_into_another_carries_its_output():
    """A stream put into another run at every position makes the rest of the run its own."""
    model, a, b = built("llama", F64), tokens(seed=1), tokens(seed=2)
    source = Record("blocks.1.resid_pre")
    with torch.no_grad():
        want = model(a, tap=source)
        same(model(b, tap=Edit("blocks.1.resid_pre", lambda _: source["blocks.1.resid_pre"])), want)


def test_edits_are_differentiated_through():
    model, ids = fresh("llama", F64), tokens()
    strength = torch.tensor(0.5, dtype=F64, requires_grad=True)
    model(ids, tap=Edit("blocks.0.attn.pattern[1]", lambda a: a * strength)).square().sum().backward()
    assert strength.grad.abs() > 0


# Steps of a generation


@each(["llama", "gemma2", "t5"])
def test_steps_of_a_generation_have_paths_of_their_own(name):
    model, ids = built(name), tokens(1)
    tap, second = Record("**.z"), Record("step.2.**.z")
    cache = model.cache(capacity=16)
    with torch.no_grad():
        plain = [call(model, ids[:, i : i + 1], cache=(c := model.cache(capacity=16)) if i == 0 else c) for i in range(4)]
        for i in range(4):
            out = call(model, ids[:, i : i + 1], cache=cache, tap=tap | second, path=f"step.{i}")
            assert torch.equal(out, plain[i])
    where = half(model)
    assert f"step.3.{where}blocks.1.attn.z" in tap and tap.find(f"step.{{0,2-3}}.{where}blocks.0.attn.z") == [
        f"step.{i}.{where}blocks.0.attn.z" for i in (0, 2, 3)
    ]
    assert {p.split(".")[1] for p in second.paths} == {"2"}
    assert tap.stack(f"{where}blocks.0.attn.z").shape[0] == 4


# Activation checkpointing


def checkpointed(model: Any) -> Any:
    """Every block forgets its inside and computes it again in the backward pass."""
    for module in model.modules():
        for block in getattr(module, "blocks", ()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


@each(CAUSAL)
def test_checkpointed_blocks_give_the_same_gradients_watched_or_not(name):
    want = fresh(name, F64)
    call(want, tokens()).square().sum().backward()
    site = half(want) + "blocks.0.ffn.post" if "experts" not in name else "blocks.0.experts.router"
    reference = Record(site, grad=True)
    call(fresh(name, F64), tokens(), tap=reference).square().sum().backward()
    for tap in (None, Record("**") | Edit(site, lambda x: x * 1.0), Record(site, grad=True)):
        model = checkpointed(fresh(name, F64))
        call(model, tokens(), tap=tap).square().sum().backward()
        for (n, x), y in zip(model.named_parameters(), want.parameters(), strict=True):
            if not y.requires_grad:
                continue
            scale = y.grad.abs().max().clamp(min=1)
            same(x.grad / scale, y.grad / scale, what=n)
        if isinstance(tap, Record) and tap._grad:
            same(tap.grad(site), reference.grad(site))


# Threads


def test_two_threads_with_two_taps_do_not_meet():
    model = built("llama")
    ids = [tokens(seed=s) for s in (1, 2)]
    with torch.no_grad():
        want = [Record("**"), Record("**")]
        for tap, x in zip(want, ids, strict=True):
            model(x, tap=tap)
    taps, failed = [Record("**"), Record("**")], []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(15):
                    taps[i].clear()
                    model(ids[i], tap=taps[i])
                    for path in taps[i].paths:
                        assert torch.equal(taps[i][path], want[i][path]), path
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed, failed


def test_a_call_leaves_nothing_in_the_model():
    model = built("llama")
    modules = {n: (len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m))) for n, m in model.named_modules()}
    model(tokens(), tap=Record("**", grad=True) | Edit("logits", lambda x: x))
    model(tokens(), cache=model.cache(batch=2))
    assert modules == {n: (len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m))) for n, m in model.named_modules()}
