"""Models of every kind behind the server: what comes back, in ids, is what ``generate`` gives, and its inside comes with it."""

from __future__ import annotations

import httpx
import pytest

import glassformer as gf
from glassformer.weights.own import Loaded
from tools import built
from web import serving


@pytest.mark.parametrize("name", ["opt", "window", "latent", "experts", "alibi", "t5", "bart"])
def test_each_kind_is_served(name: str) -> None:
    model, prompt = built(name), [5, 3, 8, 2]
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 0, "ignore_eos": True, "return_sites": ["**.attn.pattern"]}
    with serving.running(Loaded(model, None, {}), capacity=32) as server:
        got = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert got.status_code == 200, got.text
        choice = got.json()["choices"][0]
        assert httpx.post(f"{server.url}/v1/embeddings", json={"input": prompt}, timeout=60).status_code == 200
        refused = httpx.post(f"{server.url}/v1/completions", json=body | {"prompt": "text"}, timeout=60)
        assert refused.status_code == 400
        assert "without a tokenizer it cannot be read" in refused.json()["error"]["message"]
    want = gf.generate(model, prompt, max_new_tokens=4, eos_id=())
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in want.ids]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(want.logprobs, abs=1e-3)
    own = [s for s in choice["sites"] if not s["site"].startswith("encoder.")]
    rows = 4 if name in ("t5", "bart") else 7
    assert own
    assert all(s["shape"][-2:] == [rows, rows] for s in own)
