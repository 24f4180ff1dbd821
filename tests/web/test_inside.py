"""The inside on request: values of sites, edits, traces. What comes back is what a record of the same model holds."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.look.changes import Add, Scale, Zero
from glassformer.look.edits import Intervention
from glassformer.web import Limits
from glassformer.web.inside import Anatomy, whole_row
from web import serving

PROMPT = "The sea was calm that day"


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.running(serving.loaded(), limits=Limits(site_bytes=200_000)) as made:
        yield made


def ask(server: serving.Running, status: int = 200, path: str = "/v1/completions", **body: Any) -> Any:
    got = httpx.post(server.url + path, json={"prompt": PROMPT, "max_tokens": 4, "temperature": 0} | body, timeout=60)
    assert got.status_code == status, got.text
    return got.json()["choices"][0] if status == 200 else got.json()["error"]


def array(site: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(site["base64"]), "<f4").reshape(site["shape"])


def recorded(*patterns: str, tap: Any = None, **options: Any) -> tuple[Any, Any]:
    what = serving.loaded()
    made = gf.generate(what.model, PROMPT, tokenizer=what.tokenizer, max_new_tokens=4, **({"tap": tap} if tap else {}), **options)
    keep = gf.Record(*patterns)
    what.model(torch.tensor([[*made.prompt_ids, *made.ids[:-1]]]), tap=keep if tap is None else tap | keep)
    return made, keep


def test_values_are_those_of_a_record(server: serving.Running) -> None:
    got = ask(server, return_sites=["blocks.1.resid_post", "blocks.0.attn.pattern[0,2]", "blocks.*.attn.k"])
    made, keep = recorded("blocks.1.resid_post", "blocks.0.attn.pattern", "blocks.*.attn.k")
    assert got["text"] == made.text
    sites = {s["site"]: s for s in got["sites"]}
    assert list(sites) == ["blocks.0.attn.k", "blocks.0.attn.pattern", "blocks.1.attn.k", "blocks.1.resid_post"]
    n = len(made.prompt_ids) + 3
    stream, pattern = sites["blocks.1.resid_post"], sites["blocks.0.attn.pattern"]
    assert (stream["axes"], stream["shape"]) == ("t d", [n, 32])
    assert (pattern["axes"], pattern["shape"], pattern["heads"]) == ("h t s", [2, n, n], [0, 2])
    np.testing.assert_allclose(array(stream), keep["blocks.1.resid_post"][0], atol=1e-5)
    np.testing.assert_allclose(array(pattern), keep["blocks.0.attn.pattern"][0, [0, 2]], atol=1e-5)
    np.testing.assert_allclose(array(sites["blocks.1.attn.k"]), keep["blocks.1.attn.k"][0], atol=1e-5)


def test_values_are_those_of_the_cached_steps(server: serving.Running) -> None:
    got = ask(server, return_sites=["blocks.1.resid_post"])
    tap = gf.Record("blocks.1.resid_post")
    what = serving.loaded()
    gf.generate(what.model, PROMPT, tokenizer=what.tokenizer, max_new_tokens=4, tap=tap)
    steps = torch.cat([tap[f"step.{i}.blocks.1.resid_post"][0] for i in range(4)])
    np.testing.assert_allclose(array(got["sites"][0]), steps, atol=1e-4)


def test_heads_and_positions_are_picked(server: serving.Running) -> None:
    wanted = [{"site": "blocks.0.attn.pattern", "heads": [3], "positions": "1:3"}, {"site": "blocks.0.attn.k", "positions": "0,2"}]
    got = ask(server, return_sites=wanted)
    _, keep = recorded("blocks.0.attn.pattern", "blocks.0.attn.k")
    k, pattern = got["sites"]
    assert (pattern["shape"][:2], pattern["positions"], pattern["heads"]) == ([1, 2], "1:3", [3])
    np.testing.assert_allclose(array(pattern), keep["blocks.0.attn.pattern"][0, [3], 1:3], atol=1e-5)
    np.testing.assert_allclose(array(k), keep["blocks.0.attn.k"][0, [0, 2]], atol=1e-5)


def test_lists_are_plain_numbers_and_what_json_cannot_say_is_null(server: serving.Running) -> None:
    got = ask(server, return_sites=["blocks.0.attn.scores[1]"], sites_format="lists")
    _, keep = recorded("blocks.0.attn.scores")
    rows = got["sites"][0]["values"][0]
    assert rows[0][1:] == [None] * (len(rows) - 1)
    assert rows[0][0] == pytest.approx(keep["blocks.0.attn.scores"][0, 1, 0, 0].item(), abs=1e-5)
    assert "base64" not in got["sites"][0]


def test_every_answer_of_a_request_has_its_own_values(server: serving.Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "seed": 5, "n": 2, "return_sites": ["resid_final"]}
    one, two = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert one["text"] != two["text"]
    assert array(one["sites"][0]).shape == array(two["sites"][0]).shape
    assert not np.allclose(array(one["sites"][0])[-1], array(two["sites"][0])[-1])


def test_a_stream_has_them_at_the_end_of_each_answer(server: serving.Running) -> None:
    whole = ask(server, return_sites=["resid_final"], return_trace=2)
    got = list(server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, stream=True, extra_body={"return_sites": ["resid_final"], "return_trace": 2}
    ))  # fmt: skip
    last = [c.choices[0] for c in got][-1]
    assert last.finish_reason == "length"
    assert last.sites == whole["sites"]
    assert last.trace == whole["trace"]


# Edits


def test_edits_hold_while_the_answer_is_made(server: serving.Running) -> None:
    edits = [{"type": "Zero", "site": "blocks.0.attn.z[1]"}, {"type": "Scale", "site": "blocks.1.ffn.out", "by": -2.0, "positions": "2:"}]
    made = Intervention.from_dict({"format": "glassformer.edits", "version": 1, "name": "x", "edits": edits})
    want, keep = recorded("resid_final", tap=made.tap(serving.loaded().model))
    plain = ask(server)
    for given in (edits, made.to_dict()):
        got = ask(server, edits=given, return_sites=["resid_final"])
        assert got["text"] == want.text != plain["text"]
        np.testing.assert_allclose(array(got["sites"][0]), keep["resid_final"][0], atol=2e-5)
    reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "edits": edits}, timeout=60).json()
    assert reply["edits"] == {"name": "request", "hash": made.hash}
    assert ask(server)["text"] == plain["text"]


def test_edits_of_single_steps_hold_at_the_positions_that_those_read(server: serving.Running) -> None:
    what = serving.loaded()
    made = Intervention(
        "steps", (Zero("blocks.0.ffn.out", steps="0"), Add("blocks.1.resid_post", 0.5, 2.0, steps="2:"), Zero("blocks.0.attn.out", steps="1,3"))
    )
    tap = gf.Record("resid_final")
    gf.generate(what.model, PROMPT, tokenizer=what.tokenizer, max_new_tokens=5, tap=made.tap(what.model) | tap)
    steps = torch.cat([tap[f"step.{i}.resid_final"][0] for i in range(5)])
    got = ask(server, max_tokens=5, edits=made.to_dict(), return_sites=["resid_final"])
    np.testing.assert_allclose(array(got["sites"][0]), steps, atol=1e-4)
    # What no position of the row meets, changes nothing.
    late = Intervention("late", (Zero("resid_final", steps="0", positions="100:"),))
    assert whole_row(late, 5, Anatomy(what.model)).edits[0].to_dict() == {"type": "Scale", "site": "resid_final", "by": 1.0}


def test_a_step_where_nothing_has_positions_is_refused(server: serving.Running) -> None:
    error = ask(server, 400, edits=[{"type": "Scale", "site": "logits", "by": 2.0, "steps": "1:"}], return_sites=["resid_final"])
    assert "cannot be shown beside return_sites" in error["message"]


def test_the_sites_of_the_model_are_listed(server: serving.Running) -> None:
    listed = httpx.get(f"{server.url}/v1/sites").json()["data"]
    assert [site["site"] for site in listed] == [s.path for s in serving.loaded().model.sites()]
    assert next(site for site in listed if site["site"] == "blocks.0.attn.pattern")["axes"] == "b h t s"
    assert "GET /v1/sites lists them all" in ask(server, 400, return_sites=["blocks.0.attn.patern"])["message"]


def test_edits_that_make_numbers_infinite_are_the_request_s_own_mistake(server: serving.Running) -> None:
    error = ask(server, 400, edits=[{"type": "Scale", "site": "blocks.0.ffn.out", "by": 1e38}])
    assert error["param"] == "edits"
    assert "With these edits the model's numbers are no longer finite" in error["message"]


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ([{"type": "Zero", "site": "blocks.9.attn.z"}], "meets no site of this model"),
        ([{"type": "Zero", "site": "blocks.0.attn.z[9]"}], "picks head 9, but 'blocks.0.attn.z' has 4 heads"),
        ([{"type": "Zeroo", "site": "blocks.0.attn.z"}], "there is no edit 'Zeroo'. Did you mean 'Zero'?"),
        ([{"type": "Add", "site": "blocks.0.resid_post", "vector": [1.0, 2.0]}], "vector has shape [2], but at 'blocks.0.resid_post' it must be [32] (d)"),
        ([{"type": "Zero", "site": "blocks.0.attn.z", "path": "/etc/passwd"}], "path"),
        ({"format": "pickle", "edits": []}, "this is no file of edits"),
        ([{"type": "Zero", "site": "blocks.0.attn.z"}] * 65, "65 edits were given, and one request has at most 64"),
    ],
)
def test_edits_that_cannot_be_are_refused(server: serving.Running, edits: Any, says: str) -> None:
    error = ask(server, 400, edits=edits)
    assert says in error["message"]
    assert error["param"] == "edits"


@pytest.mark.parametrize("edits", ["quiet.json", {"path": "/etc/passwd"}, ["quiet.safetensors"]])
def test_no_request_names_a_file(server: serving.Running, edits: Any) -> None:
    assert ask(server, 400, edits=edits)["type"] == "invalid_request_error"


# Traces


def test_a_prompt_is_scored_with_the_edits_at_work_and_its_sites_come_back(server: serving.Running) -> None:
    """With and without an answer behind it, and with edits of single steps: the prompt is what step 0 reads."""
    edits = [{"type": "Scale", "site": "blocks.0.ffn.out", "by": 0.5, "steps": "0"}]
    plain = ask(server, max_tokens=0, echo=True, logprobs=0)["logprobs"]["token_logprobs"]
    scored = ask(server, max_tokens=0, echo=True, logprobs=0, edits=edits, return_sites=["blocks.0.ffn.out"])
    what = serving.loaded()
    ids = what.tokenizer.encode(PROMPT)
    tap = Intervention("half", (Scale("blocks.0.ffn.out", 0.5),)).tap(what.model)
    keep = gf.Record("blocks.0.ffn.out")
    want = what.model(torch.tensor([ids]), tap=tap | keep)[0].log_softmax(-1)
    want = [float(want[i, t]) for i, t in enumerate(ids[1:])]
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(want, abs=1e-4)
    assert plain[1:] != pytest.approx(want, abs=1e-3)
    np.testing.assert_allclose(array(scored["sites"][0]), keep["blocks.0.ffn.out"][0].detach().numpy(), atol=1e-5)
    assert ask(server, echo=True, logprobs=0, edits=edits)["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(want, abs=1e-4)
    assert "there is nothing to trace" in ask(server, 400, max_tokens=0, echo=True, return_trace=True)["message"]


def test_a_trace_is_that_of_generate(server: serving.Running) -> None:
    got = ask(server, return_trace=3, top_k=40, temperature=0.8, seed=7)
    what = serving.loaded()
    want = gf.generate(what.model, PROMPT, tokenizer=what.tokenizer, max_new_tokens=4, temperature=0.8, top_k=40, seed=7, trace=3).trace.to_dict()
    assert got["trace"]["chain"] == want["chain"] == "Temperature(t=0.8) | TopK(k=40) | Draw(seed=7)"
    assert [t["id"] for t in got["trace"]["tokens"]] == [t["id"] for t in want["tokens"]]
    assert got["trace"]["tokens"][0]["stages"][1]["chosen"]["p"] == pytest.approx(want["tokens"][0]["stages"][1]["chosen"]["p"], abs=1e-5)


def test_too_many_candidates_are_refused(server: serving.Running) -> None:
    assert "return_trace is 500, and this server keeps at most 100" in ask(server, 400, return_trace=500)["message"]


# Limits


def test_a_size_is_refused_with_both_numbers_before_anything_runs(server: serving.Running) -> None:
    before = server.served.engine.stats().submitted
    error = ask(server, 413, return_sites=["blocks.*.attn.*", "blocks.*.ffn.*"], max_tokens=100)
    assert "bytes of values, and one request returns at most 200,000" in error["message"]
    assert error["code"] == "sites_too_large"
    assert server.served.engine.stats().submitted == before


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        (["blocks.3.resid_pots"], "meets no site of this model. Did you mean"),
        (["blocks.0.attn.pattern[7]"], "Head 7 was asked for at blocks.0.attn.pattern, which has 4 heads"),
        (["blocks.0.resid_post[1]"], "picks heads, but 'resid_post' has no head axis"),
        ([{"site": "blocks.0.attn.z[1]", "heads": [2]}], "leave one of them out"),
        ([{"site": "blocks.0.attn.z", "positions": "-3:"}], "counted from the beginning of the row"),
        (["step.0.resid_final"], "values are returned for the whole row"),
        ([{"site": "resid_final", "file": "x"}], "no argument"),
    ],
)
def test_sites_that_cannot_be_are_refused(server: serving.Running, sites: Any, says: str) -> None:
    error = ask(server, 400, return_sites=sites)
    assert says in error["message"]
    assert error["param"].startswith("return_sites")


def test_a_server_may_give_nothing_of_the_inside() -> None:
    with serving.running(serving.loaded(), allow_edits=False, allow_sites=False) as server:
        assert "--no-sites" in ask(server, 403, return_sites=["resid_final"])["message"]
        assert "--no-edits" in ask(server, 403, edits=[{"type": "Zero", "site": "blocks.0.attn.z"}])["message"]


def test_the_size_that_is_foretold_is_the_size_that_comes() -> None:
    from glassformer.web.inside import read
    from glassformer.web.schemas import Inside
    from tools import DECODERS, PAIRS, built

    limits = Limits(site_bytes=1 << 40)
    for name in ("llama", "mqa", "alibi", "window", "latent", "experts", "gpt2" if "gpt2" in DECODERS else "opt", "t5"):
        model = built(name)
        anatomy = Anatomy(model)
        wanted = read(Inside(return_sites=["**"]), anatomy, limits)
        prompt, ids = [1, 2, 3, 4], [5, 6, 7]
        start = [0] if name in PAIRS else []
        got = wanted.values(prompt, ids, start)
        row = len(start) + 2 if start else 6
        total = sum(4 * int(np.prod(s["shape"])) for s in got)
        for entry in wanted.entries:
            foretold = {p: anatomy.shape(p, entry, row, 4) for p in anatomy.axes}
            assert {s["site"]: s["shape"] for s in got} == foretold, name
        with pytest.raises(Exception, match="return_sites asks for up to"):
            wanted.check_size([(row, 4)], Limits(site_bytes=total - 1))
        wanted.check_size([(row, 4)], Limits(site_bytes=total))
