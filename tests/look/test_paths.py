"""Path patching against brute force: every other part frozen by an edit, the receiver's input taken from that run, then put into the base run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.core.tap import Edit, Record, Tap
from glassformer.look import paths
from glassformer.look.paths import all_nodes, edge_attribution, path_patch
from glassformer.look.subject import read
from look import zoo

NAMES = [n for n in zoo.SPECS if n != "experts"]
TARGET = (3, 7)


def pair(name: str) -> tuple[Any, dict[str, Any]]:
    clean, bad = zoo.ids(7, 0), zoo.ids(7, 5)
    return zoo.model(name).double(), {"clean": clean, "corrupted": bad, "target": TARGET} | ({"source": zoo.ids(6, 1)} if name == "t5" else {})


def brute(model: Any, given: dict[str, Any], sender: Any, receiver: Any) -> float:
    """One edge by two runs of the whole model with edits."""
    source = given.get("source")
    base, other = (read(model, given[k], source=source) for k in ("corrupted", "clean"))
    was, _ = base.run("**")
    new, _ = other.run("**")
    pre = base.prefix
    tap: Tap | None = None
    for layer, block in enumerate(base.stack.blocks):
        for kind in block.order:
            path = f"{pre}blocks.{layer}.{kind}.out"
            value = was[path]
            if (sender.layer, sender.kind) == (layer, kind):
                if kind in ("attn", "cross"):
                    z = was[f"{pre}blocks.{layer}.{kind}.z"].clone()
                    z[:, :, sender.head] = new[f"{pre}blocks.{layer}.{kind}.z"][:, :, sender.head]
                    value = getattr(block, kind).out(z.flatten(2))
                else:
                    value = new[path]
            edit = Edit(path, lambda x, v=value: v)
            tap = edit if tap is None else tap | edit
    if sender.kind == "embed":
        tap = Edit(f"{pre}blocks.0.resid_pre", lambda x: new[f"{pre}blocks.0.resid_pre"]) | tap
    with torch.no_grad():
        record = Record("**") if not pre else Record("decoder.**")
        logits = model(*base.inputs, tap=tap | record)
        if receiver.kind != "logits":
            name = receiver.part if receiver.kind in ("attn", "cross") else "in"
            path = f"{pre}blocks.{receiver.layer}.{receiver.kind}.{name}"
            read_in = record[path]

            def put(x: Tensor) -> Tensor:
                if name == "in":
                    return read_in
                y = x.clone()
                head = receiver.head // (getattr(base.stack.blocks[receiver.layer], receiver.kind).n_heads // x.shape[2])
                y[:, :, head] = read_in[:, :, head]
                return y

            logits = model(*base.inputs, tap=Edit(path, put))
    return float(logits[0, -1, TARGET[0]] - logits[0, -1, TARGET[1]])


@pytest.mark.parametrize("name", NAMES)
def test_path_patching_is_brute_force(name: str) -> None:
    """Drawn edges of every kind, float64."""
    model, given = pair(name)
    s = read(model, given["clean"], source=given.get("source"))
    draw = torch.Generator().manual_seed(1)
    sending, receiving = all_nodes(s, False), all_nodes(s, True)
    checked = 0
    for k in torch.randperm(len(sending) * len(receiving), generator=draw).tolist():
        a, b = sending[k // len(receiving)], receiving[k % len(receiving)]
        parallel = name == "parallel" and a.layer == b.layer and b.kind != "logits"
        if parallel or not (a.layer, _place(s, a)) < (b.layer, _place(s, b)):
            continue
        got = path_patch(model, **given, senders=[a.name], receivers=[b.name], normalise=False)
        assert got.values[0].item() == pytest.approx(brute(model, given, a, b), abs=1e-5), (a.name, b.name)
        checked += 1
        if checked == 6:
            break
    assert checked == 6


def _place(s: Any, node: Any) -> int:
    return 0 if node.kind in ("embed", "logits") else s.stack.blocks[node.layer].order.index(node.kind)


def test_a_path_to_everything_is_the_whole_effect() -> None:
    """The last layer's feed-forward has one way on, so its path to the logits is its patch."""
    from glassformer.look.patching import activation_patch

    model, given = pair("gpt2")
    by_path = path_patch(model, **given, senders=["ffn 2", "2.1"], receivers="logits", normalise=False)
    by_patch = activation_patch(model, **given, site="ffn.out", by="layer", normalise=False)
    assert by_path["ffn 2"] == pytest.approx(float(by_patch.values[2]), abs=1e-5)


def test_mixed_receivers_and_the_logits() -> None:
    """Two receivers of which one is the scores themselves, against edits made at once."""
    model, given = pair("llama")
    both = path_patch(model, **given, senders=["0.1"], receivers=["1.0.q", "logits"], normalise=False)
    one, two = (path_patch(model, **given, senders=["0.1"], receivers=[r], normalise=False) for r in ("1.0.q", "logits"))
    assert both["0.1"] not in (one["0.1"], two["0.1"])


@pytest.mark.parametrize("name", NAMES)
def test_edge_attribution_is_the_slope_of_path_patching(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the other run is close to the base run, the estimate of an edge is its exact change."""
    model, given = pair(name)
    with torch.no_grad():
        model.double()
    real = paths.Frozen.__init__

    def near(self: Any, q: Any) -> None:
        real(self, q)
        self.other = {k: self.base[k] + 1e-5 * (v - self.base[k]) for k, v in self.other.items()}

    monkeypatch.setattr(paths.Frozen, "__init__", near)
    found = edge_attribution(model, **given, exact=10, normalise=False)
    assert found.exact is not None and len(found.checked) == 10
    want = torch.tensor([found[e] for e in found.checked])
    torch.testing.assert_close(found.exact, want, rtol=2e-2, atol=1e-8)
    assert found.pearson is not None and found.pearson > 0.999
    assert "Pearson" in str(found)


def test_edge_attribution_leaves_out_what_has_no_way() -> None:
    model, given = pair("gpt2")
    found = edge_attribution(model, **given, exact=30)
    assert torch.isnan(torch.tensor(found["2.1", "1.0.q"])) and not torch.isnan(torch.tensor(found["0.1", "1.0.q"]))
    assert found.pearson is not None and -1 <= found.pearson <= 1
    assert len(found.best(4)) == 4
    assert found.plot() is not None and path_patch(model, **given).plot(dark=True) is not None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("senders", "receivers", "says"),
    [
        (["9.0"], "logits", "Layer 9 was asked for, but the model has 3 layers"),
        (["0.7"], "logits", "Head 0.7 was asked for, but layer 0 has 4 heads"),
        (["0.1.q"], "logits", "is an input; a sender is a head's output: write '0.1'"),
        (["what"], "logits", "'what' is no sender: write '2.0', 'ffn 0' or 'embed'"),
        (["0.1"], ["embed"], "'embed' is no receiver"),
        (["cross 0.1"], "logits", "names cross-attention, which this model has none of"),
    ],
)
def test_wrong_ends_are_named(senders: Any, receivers: Any, says: str) -> None:
    model, given = pair("gpt2")
    with pytest.raises(SiteError, match=says.replace(".", r"\.").replace("(", r"\(")):
        path_patch(model, **given, senders=senders, receivers=receivers)


def test_where_nothing_arrives_the_number_is_exactly_zero() -> None:
    model, given = pair("llama")
    given["clean"] = [*given["corrupted"][:3], given["clean"][3], *given["corrupted"][4:]]  # the last token is the same in both
    found = path_patch(model.float(), **given, senders=["embed", "0.1"], receivers=["logits"])
    assert found.values[0] == 0, "the embedding of the last position is the same, so nothing goes straight to its logits"
    assert found.values[1] != 0


def test_a_path_goes_forward() -> None:
    model, given = pair("llama")
    with pytest.raises(InputError, match="There is no path from 2.0 to 0.1.q: a sender stands before what it writes to."):
        path_patch(model, **given, senders=["2.0"], receivers=["0.1.q"])
