"""Links whose rule is llama.cpp's against its own samplers, on the same logits and, for those that remember, on the same drawn tokens."""

from __future__ import annotations

import ctypes
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from glassformer.infer import XTC, AdaptiveP, DynamicTemperature, Mirostat1, Mirostat2, TopNSigma, Typical
from glassformer.infer.state import Own, State

llama = pytest.importorskip("llama_cpp.llama_cpp")

V = 400


def logits(seed, scale=2.5):
    return torch.randn(1, V, generator=torch.Generator().manual_seed(seed)) * scale


class Candidates:
    """llama.cpp's array of candidates."""

    def __init__(self, row):
        self.data = (llama.llama_token_data * len(row))(*[llama.llama_token_data(i, l, 0.0) for i, l in enumerate(row)])
        self.array = llama.llama_token_data_array(self.data, len(row), -1, False)

    def after(self, sampler):
        llama.llama_sampler_apply(sampler, ctypes.byref(self.array))
        return self

    @property
    def logits(self):
        x = np.full(V, -np.inf)
        for i in range(self.array.size):
            x[self.array.data[i].id] = self.array.data[i].logit
        return x

    @property
    def selected(self):
        return self.array.data[self.array.selected].id


@contextmanager
def sampler(name, *settings):
    made = getattr(llama, f"llama_sampler_init_{name}")(*settings)
    try:
        yield made
    finally:
        llama.llama_sampler_free(made)


ALWAYS = [
    (Typical(0.2), "typical", (0.2, 1)),
    (Typical(0.9), "typical", (0.9, 1)),
    (Typical(0.3, min_keep=30), "typical", (0.3, 30)),
    (TopNSigma(0.8), "top_n_sigma", (0.8,)),
    (TopNSigma(1.5), "top_n_sigma", (1.5,)),
    (DynamicTemperature(0.8, 0.5), "temp_ext", (0.8, 0.5, 1.0)),
    (DynamicTemperature(1.0, 0.9, 2.0), "temp_ext", (1.0, 0.9, 2.0)),
    (DynamicTemperature(0.7), "temp_ext", (0.7, 0.0, 1.0)),
    (XTC(1.0, 0.1), "xtc", (1.0, 0.1, 1, 0)),
    (XTC(1.0, 0.01), "xtc", (1.0, 0.01, 1, 0)),
    (XTC(1.0, 0.01, 398), "xtc", (1.0, 0.01, 398, 0)),
]


@pytest.mark.parametrize(("link", "name", "settings"), ALWAYS, ids=[repr(link) for link, *_ in ALWAYS])
def test_a_link_does_what_llama_cpp_does(link, name, settings):
    with sampler(name, *settings) as theirs:
        for seed in range(15):
            x = logits(seed, 1.0 + seed % 4)
            want = Candidates(x[0].tolist()).after(theirs).logits
            got = link.apply(x, None, Own(State(0, [0], [0], []), None, "XTC"))[0].numpy()
            np.testing.assert_allclose(got, want, rtol=2e-4)


@pytest.mark.parametrize(
    ("link", "name", "settings"),
    [
        (Mirostat2(3.0, 0.1), "mirostat_v2", (1, 3.0, 0.1)),
        (Mirostat2(5.0, 0.7), "mirostat_v2", (1, 5.0, 0.7)),
        (Mirostat1(3.0, 0.1), "mirostat", (V, 1, 3.0, 0.1, 100)),
        (Mirostat1(2.0, 0.7, 40), "mirostat", (V, 1, 2.0, 0.7, 40)),
    ],
    ids=repr,
)
def test_mirostat_keeps_what_llama_cpp_keeps_after_the_tokens_that_it_drew(link, name, settings):
    memory = link.start(1, torch.device("cpu"))
    sizes = set()
    with sampler(name, *settings) as theirs:
        for step in range(60):
            x = logits(step, 1.0 + step % 3)
            after = link.apply(x, None, Own(State(0, [0], [step], []), memory, "Mirostat"))
            found = Candidates(x[0].tolist()).after(theirs)
            assert np.array_equal(np.isfinite(after[0].numpy()), np.isfinite(found.logits)), step
            sizes.add(int((after > -math.inf).sum()))
            memory = link.observe(memory, x, after, torch.tensor([found.selected]))
    assert len(sizes) > 10


@pytest.mark.parametrize(("target", "decay"), [(0.3, 0.9), (0.05, 0.99), (0.7, 0.0)])
def test_adaptive_p_bends_as_llama_cpp_does_after_the_tokens_that_it_drew(target, decay):
    link = AdaptiveP(target, decay)
    memory = link.start(1, torch.device("cpu"))
    with sampler("adaptive_p", target, decay, 1) as theirs:
        for step in range(60):
            x = logits(step, 1.0 + step % 4)
            after = link.apply(x, None, Own(State(0, [0], [step], []), memory, "AdaptiveP"))
            found = Candidates(x[0].tolist()).after(theirs)
            np.testing.assert_allclose(after[0].numpy(), found.logits, rtol=2e-3, atol=2e-3)
            llama.llama_sampler_accept(theirs, found.selected)
            memory = link.observe(memory, x, after, torch.tensor([found.selected]))
