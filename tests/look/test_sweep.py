"""The engine of interventions: what a batched sweep gives is what one full forward pass per variant gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import glassformer as gf
from glassformer.core.errors import InputError, SiteError
from glassformer.core.tap import Chain, Edit, Tap
from glassformer.look.subject import Subject, feedforward_of, read
from glassformer.look.sweep import Patch, Sweep, layer_of
from look import zoo


class Put(Edit):
    """One patch by an ordinary edit: the slow twin."""

    def __init__(self, subject: Subject, patch: Patch, axes: str):
        def fn(x: Tensor) -> Tensor:
            y, names = x.clone(), axes.split()
            index: list[Any] = [slice(None)] * x.ndim
            if patch.head is not None:
                index[names.index("h" if "h" in names else "g")] = patch.head
            if patch.unit is not None:
                index[-1] = patch.unit
            place = next((a for a in ("t", "s") if a in names), None)
            if patch.positions is None or place is None:
                y[tuple(index)] = patch.value
                return y
            axis = [n for n in names if not (patch.head is not None and n in ("h", "g"))].index(place)  # of what is left when a head is picked
            whole = list(x[tuple(index)].shape)
            whole[axis] = len(patch.positions)
            value = patch.value.expand(whole)
            for i, p in enumerate(patch.positions):  # one by one: no question of how index tensors combine
                y[tuple(index)].select(axis, p).copy_(value.select(axis, i))
            return y

        super().__init__(subject.prefix + patch.site, fn)


def loop(s: Subject, variants: list[Any]) -> Tensor:
    """One full forward pass per variant."""
    axes = {i.path.removeprefix(s.prefix): i.axes for i in s.model.sites()}
    out = []
    for variant in variants:
        patches = (variant,) if isinstance(variant, Patch) else variant
        tap: Tap = Chain(*(Put(s, p, axes[p.site]) for p in patches))
        tap._checked_by = id(s.model)  # type: ignore[attr-defined]
        with torch.no_grad():
            out.append(s.model(*s.inputs, tap=tap)[0])
    return torch.stack(out)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LATENT = gf.Decoder(
    zoo.V,
    zoo.D,
    (zoo.block(attention=gf.LatentAttention(4, kv_lora_rank=6, d_nope=4, d_rope=2, q_lora_rank=5), norm=gf.RMSNorm()),) * 3,
    final_norm=gf.RMSNorm(),
)
WINDOW = gf.Decoder(
    zoo.V,
    zoo.D,
    (zoo.block(attention=gf.Attention(4, n_kv_heads=2, position=gf.Rotary(), mask=gf.Window(3), normaliser=gf.SoftmaxSink())),) * 3,
    final_norm=gf.LayerNorm(),
)
NORMED = gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=gf.Attention(4, position=gf.Rotary(), qk_norm=gf.RMSNorm())),) * 2, final_norm=gf.LayerNorm())
MORE = {"latent": LATENT, "window": WINDOW, "normed": NORMED}
NAMES = [*zoo.SPECS, *MORE]


def made(name: str) -> Any:
    if name in MORE:
        zoo.SPECS[name] = MORE[name]
        try:
            return zoo.model(name).double()
        finally:
            del zoo.SPECS[name]
    return zoo.model(name).double()


def variants_of(s: Subject) -> list[Any]:
    """Patches of every site with rows of numbers, in every layer: whole, at positions, of one head, several at once."""
    d, t, out = zoo.D, len(s), []
    axes = {i.path.removeprefix(s.prefix): i.axes for i in s.model.sites() if i.path.startswith(s.prefix)}
    base = Sweep(s, list(axes)).base
    for n, (path, value) in enumerate(base.items()):
        names = axes[path].split()
        if names[0] != "b" or path == "logits" or not value.is_floating_point() or "router" in path or path.startswith("readout"):
            continue
        if path.startswith("blocks.1.") and path.endswith("scale"):
            continue
        new = value[0] + 0.5 * drawn(*value.shape[1:], seed=n).masked_fill(value[0].isinf(), 0.0)
        place = 1 + next((i for i, a in enumerate(names[1:]) if a in ("t", "s")), 0)
        long = value.shape[place]
        picked = (2, long - 2)
        index: list[Any] = [slice(None)] * new.ndim
        index[place - 1] = torch.tensor(picked)
        out += [Patch(path, new), Patch(path, new[tuple(index)], picked)]
        if "h" in names or "g" in names:
            axis = next(i for i, a in enumerate(names[1:]) if a in ("h", "g"))
            one: list[Any] = [slice(None)] * new.ndim
            one[axis] = 1
            out.append(Patch(path, new[tuple(one)], head=1))
            out.append(
                Patch(path, new[(*one[:axis], 1, *one[axis + 1 :])].select(place - 1 - (axis < place - 1), long - 1)[None], (long - 1,), head=1)
                if axis
                else Patch(path, new[1], head=1)
            )
        if names[-1] == "f":
            out.append(Patch(path, torch.tensor(0.3), unit=5))
    last = s.layers - 1
    out.append((Patch("blocks.0.attn.z", torch.zeros(()), head=0), Patch(f"blocks.{last}.{feedforward_of(s.stack, last)}.out", drawn(d), (t - 1,))))
    out.append(())
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_is_the_loop_of_full_passes(name: str) -> None:
    """Every site of every kind of model, float64: to 1e-10, at one position and at several."""
    s = read(made(name), zoo.ids(7), **({"source": zoo.ids(6, 1)} if name == "t5" else {}))
    variants = variants_of(s)
    assert len(variants) > 40
    sweep = Sweep(s)
    torch.testing.assert_close(sweep.logits, s.model(*s.inputs)[0].detach(), rtol=0, atol=1e-10)
    whole = loop(s, variants)
    for at in ((-1,), (3,), (-1, 4)):
        got, want = sweep.run(variants, lambda logits: logits, at), whole[:, list(at)]
        for i, variant in enumerate(variants):
            where = variant if isinstance(variant, tuple) else (variant.site, variant.positions, variant.head)
            assert torch.allclose(got[i], want[i], rtol=0, atol=1e-10), (where, at, float((got[i] - want[i]).abs().max()))


def test_layer_of() -> None:
    assert [layer_of(p, 5) for p in ("embed", "embed.norm.scale", "blocks.3.attn.z", "resid_final")] == [-1, -1, 3, 5]


def test_float32_agrees_too() -> None:
    s = read(zoo.model("llama"), zoo.ids(9))
    variants = [Patch(f"blocks.{layer}.attn.z", drawn(9, 4, seed=layer).float(), head=h) for layer in range(3) for h in range(4)]
    torch.testing.assert_close(Sweep(s).run(variants, lambda x: x[:, 0]), loop(s, variants)[:, -1], atol=1e-5, rtol=1e-5)


def test_batches_of_any_size_give_the_same() -> None:
    """A memory of one byte runs row by row; the order of the answers is that of the variants."""
    s = read(made("gpt2"), zoo.ids(9))
    variants = [Patch(f"blocks.{layer}.resid_pre", drawn(zoo.D, seed=p), (p,)) for p in (7, 2, 0, 5) for layer in (2, 0, 1)]
    one, all_ = (Sweep(s, memory=m).run(variants, lambda x: x[:, 0]) for m in (1, None))
    torch.testing.assert_close(one, all_, rtol=0, atol=1e-10)
    assert Sweep(s).run([], lambda x: x[:, 0]).shape == (0,)


def test_what_is_the_same_is_computed_once() -> None:
    """Rows times positions that pass each block's feed-forward: only after the patched block, only from the patched position on, at the end only
    what is read."""
    s = read(made("gpt2"), zoo.ids(9))
    sweep, seen = Sweep(s), []
    for block in s.model.blocks:
        block.ffn.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0] * args[0].shape[1]))
    sweep.run([Patch("blocks.1.attn.z", drawn(9, 4, seed=h), head=h) for h in range(4)], lambda x: x[:, 0])
    assert seen == [4 * 9, 4 * 1]
    seen.clear()
    sweep.run([Patch("blocks.0.resid_pre", drawn(zoo.D, seed=p), (p,)) for p in (6, 7)], lambda x: x[:, 0])
    assert seen == [2 * 3, 2 * 3, 2 * 1]


def test_the_model_is_as_it_was() -> None:
    model = made("gpt2").train()
    Sweep(read(model, zoo.ids(5))).run([Patch("blocks.1.attn.z", torch.zeros(()), head=0)], lambda x: x[:, 0])
    assert model.training and all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("patch", "error", "says"),
    [
        (Patch("blocks.0.attn.zz", torch.zeros(())), SiteError, "meets no site of this model"),
        (Patch("logits", torch.zeros(())), InputError, "it belongs to the read-out"),
        (Patch("pos_embed", torch.zeros(())), InputError, "its value has no rows"),
    ],
)
def test_what_cannot_be_patched_is_said(patch: Patch, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Sweep(read(made("gpt2"), zoo.ids(5))).run([patch], lambda x: x[:, 0])
