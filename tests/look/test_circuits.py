"""Factored matrices, circuits of heads, composition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer import look
from glassformer.cli.app import main
from glassformer.core.errors import InputError, SiteError
from glassformer.look import extremes, matrices
from glassformer.look.circuits import composition_scores, ov_circuit, qk_circuit
from glassformer.look.factored import FactoredMatrix
from glassformer.look.matrices import weights
from look import zoo


def pair(*leading: int, m: int = 9, r: int = 3, n: int = 9) -> tuple[FactoredMatrix, torch.Tensor]:
    draw = torch.Generator().manual_seed(m + r + n)
    a = torch.randn(*leading, m, r, generator=draw, dtype=torch.float64)
    b = torch.randn(*leading, r, n, generator=draw, dtype=torch.float64)
    return FactoredMatrix(a, b), a @ b


@pytest.mark.parametrize("leading", [(), (2,), (2, 4)])
def test_a_factored_matrix_is_its_product(leading: tuple[int, ...]) -> None:
    f, dense = pair(*leading)
    assert f.shape == dense.shape and f.ndim == dense.ndim and (f.ldim, f.mdim, f.rdim) == (9, 3, 9)
    assert torch.allclose(f.AB, dense) and torch.allclose(f.T.AB, dense.mT)
    assert torch.allclose(f.norm(), torch.linalg.matrix_norm(dense)) and torch.allclose(f.trace(), dense.diagonal(dim1=-2, dim2=-1).sum(-1))
    u, s, v = f.svd()
    assert torch.allclose(u * s[..., None, :] @ v.mT, dense) and torch.allclose(s, torch.linalg.svdvals(dense)[..., :3]) and torch.allclose(f.S, s)
    assert torch.allclose(u.mT @ u, torch.eye(3, dtype=torch.float64).expand(*leading, 3, 3))
    assert torch.allclose(f.U * f.S[..., None, :] @ f.Vh.mT, dense) and torch.allclose(f.make_even().AB, dense)
    assert torch.allclose(f.collapse_l().mT @ f.collapse_l(), dense.mT @ dense) and torch.allclose(f.collapse_r() @ f.collapse_r().mT, dense @ dense.mT)
    ours, theirs = f.eigenvalues.abs().sort(-1).values, torch.linalg.eigvals(dense).abs().sort(-1).values[..., -3:]
    assert torch.allclose(ours, theirs)
    assert torch.allclose(f.eigenvalues.sum(-1).real, f.trace())


def test_products_and_indices() -> None:
    f, dense = pair()
    g, other = pair(m=9, r=2, n=5)
    x, v = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    assert torch.allclose((f @ g).AB, dense @ other) and (f @ g).mdim == 2 and (g.T @ f).mdim == 2
    assert torch.allclose((f @ x).AB, dense @ x) and torch.allclose((x.T @ f).AB, x.T @ dense)
    assert torch.allclose(f @ v, dense @ v) and torch.allclose(v @ f, v @ dense) and torch.allclose((2 * f * 3).AB, 6 * dense)
    assert torch.allclose(f[2:5].AB, dense[2:5]) and torch.allclose(f[:, [1, 3]].AB, dense[:, [1, 3]]) and torch.allclose(f[4, 7].AB, dense[4:5, 7:8])
    h, batch = pair(2, 4)
    assert torch.allclose(h[1, 3].AB, batch[1, 3]) and torch.allclose(h[:, 2, 1:3, -1].AB, batch[:, 2, 1:3, -1:])
    assert torch.allclose(h[..., :3, :3].AB, h.get_corner()) and h.unsqueeze(0).shape == (1, 2, 4, 9, 9) and "rank at most 3" in repr(h)
    with pytest.raises(InputError, match="A has 3 columns and B 9 rows"):
        FactoredMatrix(f.A, f.A)
    with pytest.raises(InputError, match="9 x 5"):
        _ = g.eigenvalues
    with pytest.raises(InputError, match="at least two axes"):
        FactoredMatrix(v, f.B)
    with pytest.raises(InputError, match="at most one index"):
        _ = f[0, 0, 0]
    with pytest.raises(InputError, match="99 was asked for of a factored matrix of 9 x 9"):
        _ = f[99]
    with pytest.raises(InputError, match="cannot be indexed by 'a'"):
        _ = f["a"]
    with pytest.raises(InputError, match="with 9 columns was multiplied by what has 4 rows"):
        _ = f @ x.T
    with pytest.raises(InputError, match="with 9 rows was multiplied from the left by what has 4 columns"):
        _ = x @ f
    with pytest.raises(InputError, match="but a text was given"):
        _ = f @ "x"
    with pytest.raises(InputError, match="by a matrix with @"):
        _ = f * "x"
    with pytest.raises(InputError, match="NaN or infinities"):
        (f * float("nan")).svd()
    half = FactoredMatrix(f.A.bfloat16(), f.B.bfloat16())
    assert half.eigenvalues.dtype == torch.complex64 and torch.allclose(half.S, FactoredMatrix(half.A.float(), half.B.float()).S)


@pytest.mark.parametrize("name", ["gpt2", "llama", "parallel", "experts", "sandwich"])
def test_ov_is_the_product_of_the_folded_matrices(name: str) -> None:
    model = zoo.model(name).double()
    w = weights(model).folded
    dense = w.W_E @ w.W_V[1, 2] @ w.W_O[1, 2] @ w.W_U
    c = ov_circuit(model, 1, 2, k=5)
    assert torch.allclose(c.full.AB, dense) and c.folded
    values = torch.linalg.eigvals(dense)
    assert c.copying == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-6)
    assert c.diagonal == pytest.approx(float((dense.argmax(1) == torch.arange(zoo.V)).double().mean()))
    centred = dense - dense.mean(1, keepdim=True)
    best = centred.max(1)
    rows = best.values.topk(5).indices
    assert [p[2] for p in c.pairs] == pytest.approx(best.values[rows].tolist())
    assert [p[0] for p in c.pairs] == [f"‹{i}›" for i in rows.tolist()] and [p[1] for p in c.pairs] == [f"‹{i}›" for i in best.indices[rows].tolist()]
    assert torch.allclose(c.singular.double(), torch.linalg.svdvals(w.W_V[1, 2] @ w.W_O[1, 2])[: len(c.singular)], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_view_that_is_handed_in_is_read_and_nothing_is_folded_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model(name)
    own = [made(model, 1, h) for made in (ov_circuit, qk_circuit) for h in range(4)]
    composed = composition_scores(model)
    view, plain = weights(model).folded, weights(model)
    folded: list[Any] = []
    monkeypatch.setattr(matrices, "fold", lambda *a, **k: folded.append(a))
    again = [made(view, 1, h) for made in (ov_circuit, qk_circuit) for h in range(4)]
    assert not folded and all(a.folded for a in again)
    for a, b in zip(own, again, strict=True):
        assert a.pairs == b.pairs and a.copying == b.copying and torch.equal(a.singular, b.singular)
    assert torch.equal(composition_scores(view).scores.nan_to_num(9), composed.scores.nan_to_num(9)) and not folded
    assert not ov_circuit(plain, "1.2").folded and torch.equal(ov_circuit(plain, "1.2").singular, ov_circuit(model, "1.2", fold=False).singular)
    with pytest.raises(InputError, match="fold=False was asked for, but the view of the weights that was given has fold_norms=True: leave fold out"):
        qk_circuit(view, 1, 2, fold=False)
    if name == "t5":
        with pytest.raises(InputError, match="self-attention, but a view of cross-attention was given: give weights"):
            qk_circuit(view.cross, 1, 2)


def test_a_view_of_what_was_loaded_names_its_tokens(tmp_path: Path) -> None:
    tokenizer = zoo.words()
    gf.save(gf.Decoder(len(tokenizer), zoo.D, (zoo.block(),) * 2).build(seed=0), tmp_path / "m", tokenizer=tokenizer)
    loaded = gf.load(tmp_path / "m")
    assert ov_circuit(weights(loaded).folded, "1.2").pairs == ov_circuit(loaded, "1.2").pairs
    assert "‹" not in str(ov_circuit(weights(loaded).folded, "1.2", directions=0).pairs)


@pytest.mark.parametrize(("rows", "columns", "rank", "copies"), [(40, 40, 3, False), (60, 60, 12, True), (1, 1, 1, True), (9, 50, 4, False)])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_the_largest_entries_are_those_of_the_whole_matrix(
    rows: int, columns: int, rank: int, copies: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extremes, "AT_ONCE", at_once)
    monkeypatch.setattr(extremes, "FIRST", 2)
    draw = torch.Generator().manual_seed(rows + at_once)
    a = torch.randn(rows, rank, generator=draw, dtype=torch.float64) * (torch.randn(rows, 1, generator=draw, dtype=torch.float64)).exp()
    b = a.T if copies else torch.randn(rank, columns, generator=draw, dtype=torch.float64)
    dense, factored = a @ b, FactoredMatrix(a, b)
    best = (dense - dense.mean(1, keepdim=True)).max(1)
    for k in (1, 7, rows + 3):
        found = extremes.largest_entries(factored, k)
        wanted = best.values.topk(min(k, rows))
        assert [r for r, _, _ in found] == wanted.indices.tolist() and [c for _, c, _ in found] == best.indices[wanted.indices].tolist()
        assert [v for _, _, v in found] == pytest.approx(wanted.values.tolist(), abs=1e-9)
    if rows == columns:
        own = dense.diagonal().clone()
        others = dense.clone().fill_diagonal_(-torch.inf).amax(1)
        assert extremes.share_on_diagonal(factored) == pytest.approx(float((own > others).double().mean()))


def test_a_head_that_writes_nothing_raises_no_token_most() -> None:
    nothing = FactoredMatrix(torch.zeros(8, 2), torch.zeros(2, 8))
    assert extremes.share_on_diagonal(nothing) == 0 and [v for *_, v in extremes.largest_entries(nothing, 3)] == [0, 0, 0]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_in_few_bits_is_read_in_float32(name: str) -> None:
    model = zoo.model(name).to(torch.bfloat16)
    same = zoo.model(name).to(torch.bfloat16).float()
    for made in (ov_circuit, qk_circuit):
        half, full = made(model, 1, 2, fold=False), made(same, 1, 2, fold=False)
        assert half.pairs == full.pairs and torch.allclose(half.singular, full.singular, rtol=1e-4)
        assert half.full.A.dtype == torch.float32 and half.copying == pytest.approx(full.copying, abs=1e-4)
    assert torch.allclose(composition_scores(model, fold=False).scores, composition_scores(same, fold=False).scores, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_qk_equals_the_scores_at_that_distance(distance: int) -> None:
    model = zoo.model("llama").double()
    tokens = torch.tensor([zoo.ids(9)])
    tap = gf.Record("blocks.0.attn.scores", "blocks.0.attn.in")
    with torch.no_grad():
        model(tokens, tap=tap)
    c = qk_circuit(model, 0, 3, distance=distance, fold=False)
    x, t, scale = tap["blocks.0.attn.in"][0], 7, 4**-0.5
    assert float(x[t] @ c.matrix.AB @ x[t - distance]) * scale == pytest.approx(float(tap["blocks.0.attn.scores"][0, 3, t, t - distance]), abs=1e-5)
    plain = x / model.blocks[0].norm1.weight.detach()  # what the folded matrices read
    folded = qk_circuit(model, 0, 3, distance=distance)
    assert float(plain[t] @ folded.matrix.AB @ plain[t - distance]) * scale == pytest.approx(
        float(tap["blocks.0.attn.scores"][0, 3, t, t - distance]), abs=1e-5
    )
    E = weights(model).W_E
    assert torch.allclose(folded.full.AB, scale * E @ folded.matrix.AB @ E.T)


def test_qk_norm_weights_are_in_it() -> None:
    for norm in (gf.RMSNorm(), gf.Joint(gf.RMSNorm())):
        attention = gf.Attention(4, n_kv_heads=2, position=gf.Rotary(), qk_norm=norm)
        model = gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=attention, norm=gf.RMSNorm()),)).build(seed=1).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) if p.ndim > 1 else p + 0.3 * torch.randn_like(p))
        tap = gf.Record("blocks.0.attn.*", "**.scale")
        model(torch.tensor([zoo.ids(6)]), tap=tap)
        x, c = tap["blocks.0.attn.in"][0], qk_circuit(model, 0, 3, distance=2, fold=False)
        q, k = (tap[f"blocks.0.attn.{n}.scale"][0].reshape(6, -1) for n in ("q_norm", "k_norm"))
        q, k = (s[:, h if s.shape[1] > 1 else 0] for s, h in ((q, 3), (k, 1)))
        score = float(x[5] @ c.matrix.AB @ x[3]) * 0.5 / float(q[5] * k[3])
        assert score == pytest.approx(float(tap["blocks.0.attn.scores"][0, 3, 5, 3]), abs=1e-5)
    layer_norm = gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=gf.Attention(4, qk_norm=gf.LayerNorm())),)).build(seed=0)
    with pytest.raises(InputError, match="go through a LayerNormLayer"):
        qk_circuit(layer_norm, 0, 0)


def copier() -> Any:
    """One head hands on what it reads, one hands on its opposite, the others nothing; tokens are nearly orthogonal."""
    model = gf.Decoder(16, 64, (zoo.block(attention=gf.Attention(4), norm=gf.RMSNorm()),), tied=True).build(seed=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_() if p.ndim > 1 else None
        model.embed.weight.copy_(torch.eye(16, 64))
        layer = model.blocks[0].attn
        for head, sign in ((1, 1.0), (2, -1.0)):
            rows = slice(128 + head * 16, 128 + head * 16 + 16)
            layer.qkv.weight[rows, :16] = torch.eye(16)
            layer.out.weight[:16, head * 16 : head * 16 + 16] = sign * torch.eye(16)
    return model


def test_a_planted_copier_is_found_and_nothing_else() -> None:
    found = [ov_circuit(copier(), 0, h) for h in range(4)]
    assert [c.copying for c in found] == pytest.approx([0, 1, -1, 0], abs=1e-6)
    assert found[1].diagonal == 1.0 and found[2].diagonal == 0.0
    assert all(a == b for a, b, _ in found[1].pairs)


def dense_composition(model: Any, distance: int = 0) -> torch.Tensor:
    w = weights(model).folded
    n, d = len(model.blocks), model.spec.d_model
    heads = [(i, h) for i in range(n) for h in range(4)]
    out = torch.full((3, len(heads), len(heads)), float("nan"), dtype=torch.float64)
    for a, first in enumerate(heads):
        ov = w.W_V[first] @ w.W_O[first]
        for b, second in enumerate(heads):
            if second[0] > first[0]:
                qk = qk_circuit(w, *second, distance=distance, k=1, directions=0).matrix.AB
                for kind, m in enumerate((qk, qk.T, w.W_V[second] @ w.W_O[second])):
                    out[kind, a, b] = (ov @ m).norm() / (ov.norm() * m.norm()) - d**-0.5
    return out


@pytest.mark.parametrize(("name", "distance"), [("gpt2", 0), ("llama", 0), ("llama", 2)])
def test_composition_equals_the_dense_products(name: str, distance: int) -> None:
    model = zoo.model(name).double()
    c = composition_scores(model, distance=distance)
    assert torch.allclose(c.scores.double(), dense_composition(model, distance), equal_nan=True, atol=1e-6)
    kind, a, b, value = c.best(1)[0]
    assert value == pytest.approx(float(c.scores.nan_to_num(-9).max())) and float(c[kind][c.heads.index(a), c.heads.index(b)]) == pytest.approx(value)


def test_the_baseline_is_what_a_random_turn_gives() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(24, 4, generator=draw) @ torch.randn(4, 24, generator=draw), torch.randn(24, 3, generator=draw) @ torch.randn(3, 24, generator=draw)
    ratios = torch.stack([(a @ torch.linalg.qr(torch.randn(24, 24, generator=draw))[0] @ b).norm() / (a.norm() * b.norm()) for _ in range(800)])
    assert float(ratios.square().mean().sqrt()) == pytest.approx(24**-0.5, rel=0.02)


def test_an_answer_shows_itself(tmp_path: Path) -> None:
    tokenizer = zoo.words()
    model = gf.Decoder(len(tokenizer), zoo.D, (zoo.block(attention=gf.Attention(4, position=gf.Rotary())),) * 2).build(seed=0)
    answers = (
        look.ov_circuit(model, "1.3", tokenizer=tokenizer),
        look.qk_circuit(model, (1, 3), distance=1, tokenizer=tokenizer),
        look.composition_scores(model),
    )
    for i, answer in enumerate(answers):
        assert i == 0 or answer.plot(dark=i == 1).get_axes()  # the first is drawn for its page, in light and in dark
        assert json.loads(answer.to_json())["title"] == answer.title and answer.title in str(answer)
    assert "direction 0" in answers[0].save(tmp_path / "answer.html").read_text(encoding="utf-8")
    assert "3, QK circuit: query token → key token, 1 back" in look.qk_circuit(model, 1, 3, distance=1).title


def test_what_is_refused() -> None:
    model = zoo.model("llama")
    with pytest.raises(SiteError, match="Head 1.9"):
        ov_circuit(model, "1.9")
    with pytest.raises(SiteError, match="Head 0.-1 was asked for, but layer 0 has 4 heads"):
        ov_circuit(model, 0, -1)
    with pytest.raises(InputError, match="but a text was given"):
        ov_circuit("model", 0, 0)
    with pytest.raises(InputError, match="distance=-1"):
        qk_circuit(model, 0, 0, distance=-1)
    with pytest.raises(InputError, match="1 layer"):
        composition_scores(gf.Decoder(zoo.V, zoo.D, (zoo.block(),)).build(seed=0))
    for wrong in (0, "a", True):
        with pytest.raises(InputError, match=f"k={wrong!r}"):
            ov_circuit(model, 0, 0, k=wrong)
    with pytest.raises(InputError, match="up to 16,777,216"):
        qk_circuit(model, 0, 0, distance=10**30)
    with pytest.raises(InputError, match="has a Dense before it, which is no matrix"):
        ov_circuit(zoo.model("bert"), 0, 0)
    tagger = gf.Encoder(zoo.V, zoo.D, (zoo.block(),), readout=gf.Tagger(3)).build(seed=0)
    with pytest.raises(InputError, match="ends in Tagger"):
        ov_circuit(tagger, 0, 0)
    assert qk_circuit(tagger, 0, 0, distance=-1).distance == -1
    latent = gf.LatentAttention(n_heads=2, kv_lora_rank=4, d_nope=4, d_rope=4)
    with pytest.raises(InputError, match="normed latent"):
        ov_circuit(gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=latent),)).build(seed=0), 0, 0)


@pytest.mark.parametrize("name", zoo.SPECS)
def test_it_holds_for_every_architecture(name: str) -> None:
    model = zoo.model(name)
    assert name == "bert" or ov_circuit(model, 1, 3).eigenvalues.isfinite().all()
    assert qk_circuit(model, 1, 3).singular.isfinite().all()
    assert composition_scores(model).scores[0, 0, -1].isfinite()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = zoo.words()
    model = gf.Decoder(len(tokenizer), zoo.D, (zoo.block(attention=gf.Attention(4, position=gf.Rotary())),) * 2).build(seed=0)
    gf.save(model, tmp_path / "m", tokenizer=tokenizer)
    begin = ["look", "circuits", "--model", str(tmp_path / "m")]
    assert main([*begin, "--head", "1.3"]) == 0 and "OV circuit" in capsys.readouterr().out
    assert main([*begin, "--head", "1.3", "--kind", "qk", "--distance", "2"]) == 0 and "2 back" in capsys.readouterr().out
    assert main([*begin, "--composition", "--out", str(tmp_path / "c.csv")]) == 0 and "Composition" in capsys.readouterr().out
    assert (tmp_path / "c.csv").read_text(encoding="utf-8").startswith("writes,reads,into its,above chance")
    for wrong, text in (([], "One question"), (["--head", "1.3", "--kind", "vo"], "'vo' is no kind"), (["--head", "1.3", "--distance", "2"], "--kind qk")):
        assert main([*begin, *wrong]) == 2
        assert text in capsys.readouterr().err
