"""The two named orders, whole: "hf" against the processors that transformers itself puts together, "llama.cpp" against its rules in NumPy and its samplers."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

from glassformer.infer import Chain, Draw, build_chain
from glassformer.infer.state import uniform
from infer.links_in_numpy import GONE, dynamic_temperature, only, softmax, strongest, top_n_sigma, typical, xtc

V, B = 70, 3


def histories(g, n, symbols):
    return [g.integers(0, symbols, size=n).tolist() for _ in range(B)]


def maybe(g, p, value):
    return value() if g.random() < p else None


# transformers


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    return transformers, transformers.GPT2LMHeadModel(config)


def drawn_settings(g, prompt):
    words = lambda: [g.integers(1, V if g.random() < 0.5 else 5, size=g.integers(1, 4)).tolist() for _ in range(4)]
    return {
        "do_sample": bool(g.random() < 0.85),
        "temperature": maybe(g, 0.7, lambda: float(g.uniform(0.3, 2))),
        "top_h": maybe(g, 0.3, lambda: float(g.uniform(0.2, 0.99))),
        "top_k": maybe(g, 0.5, lambda: int(g.integers(1, 60))),
        "top_p": maybe(g, 0.5, lambda: float(g.uniform(0.3, 0.99))),
        "min_p": maybe(g, 0.4, lambda: float(g.uniform(0.001, 0.3))),
        "typical_p": maybe(g, 0.3, lambda: float(g.uniform(0.3, 0.99))),
        "epsilon_cutoff": maybe(g, 0.3, lambda: float(g.uniform(1e-4, 0.02))),
        "eta_cutoff": maybe(g, 0.3, lambda: float(g.uniform(1e-4, 0.02))),
        "repetition_penalty": maybe(g, 0.6, lambda: float(g.uniform(0.7, 2))),
        "no_repeat_ngram_size": maybe(g, 0.4, lambda: int(g.integers(1, 5))),
        "bad_words_ids": maybe(g, 0.4, words),
        "suppress_tokens": maybe(g, 0.3, lambda: g.integers(5, V, size=3).tolist()),
        "begin_suppress_tokens": maybe(g, 0.3, lambda: g.integers(5, V, size=3).tolist()),
        "min_new_tokens": maybe(g, 0.3, lambda: int(g.integers(1, 6))),
        "forced_bos_token_id": maybe(g, 0.5, lambda: int(g.integers(1, 5))) if prompt == 1 else None,
        "forced_eos_token_id": maybe(g, 0.2, lambda: 0),
    }


@pytest.mark.parametrize("part", range(4))
def test_hf_is_the_chain_of_transformers_token_for_token(reference, part):
    transformers, model = reference
    forced = 0
    for seed in range(part * 80, part * 80 + 80):
        g = np.random.default_rng(seed)
        prompt, new, most = (1 if g.random() < 0.3 else int(g.integers(2, 20))), int(g.integers(0, 8)), 8
        settings = {name: value for name, value in drawn_settings(g, prompt).items() if value is not None}
        bias = {tuple(g.integers(1, 5, size=n).tolist()): float(g.normal() * 3) for n in (1, 2, 3)} if g.random() < 0.3 else None
        history = histories(g, prompt + new, 4 if g.random() < 0.6 else V)
        x = torch.tensor(g.normal(size=(B, V)) * g.uniform(0.5, 4), dtype=torch.float32)

        theirs = {**settings, **({} if "top_k" in settings else {"top_k": 0})}
        config = transformers.GenerationConfig(
            **theirs, sequence_bias=None if bias is None else [[list(k), v] for k, v in bias.items()], eos_token_id=0, max_new_tokens=most
        )
        config.max_length = prompt + most
        model._prepare_special_tokens(config)
        processors = model._get_logits_processor(config, prompt, device="cpu")
        want = processors(torch.tensor(history), x.clone())

        chain = build_chain(**settings, sequence_bias=bias, order="hf", eos_id=0, max_new_tokens=most, seed=5 if settings["do_sample"] else None)
        state = chain.state(B)
        state.steps = [new] * B
        steps = list(chain.steps(x, history, state))
        got = steps[-2].logits if len(steps) > 1 else x
        assert torch.equal(got > GONE, want > GONE), (seed, str(chain))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=f"{seed} {chain}")
        assert chain(x, history, state).tolist() == Chain((chain.final,))(want, None, _at(chain, new)).tolist()
        forced += any(name.startswith("forced") for name in settings)
    assert forced


def _at(chain, step):
    state = Chain((chain.final,)).state(B)
    state.steps = [step] * B
    return state


# llama.cpp


def penalties(x, history, repetition, frequency, presence, window):
    y, recent = x.copy(), history[max(0, len(history) - window) :]
    for token in set(recent):
        y[token] = y[token] * repetition if y[token] <= 0 else y[token] / repetition
        y[token] -= recent.count(token) * frequency + presence
    return y


def dry(x, history, multiplier, base, allowed, window):
    y, h, longest = x.copy(), history[max(0, len(history) - window) :], {}
    for end in range(len(h) - 1):
        length = 0
        while length <= end and h[end - length] == h[len(h) - 1 - length]:
            length += 1
        if length >= allowed:
            longest[h[end + 1]] = max(longest.get(h[end + 1], 0), length)
    for token, length in longest.items():
        y[token] -= multiplier * base ** (length - allowed)
    return y


def top_p(x, p, min_keep=1):
    kept, total, prob = [], 0.0, softmax(x)
    for token in strongest(x):
        if total >= p and len(kept) >= min_keep:
            break
        kept.append(token)
        total += prob[token]
    return only(x, kept)


def llama_settings(g):
    return {
        "repetition_penalty": maybe(g, 0.5, lambda: float(g.uniform(0.8, 1.6))),
        "frequency_penalty": maybe(g, 0.4, lambda: float(g.uniform(-0.5, 1))),
        "presence_penalty": maybe(g, 0.4, lambda: float(g.uniform(-0.5, 1))),
        "dry_multiplier": maybe(g, 0.5, lambda: 0.8),
        "top_n_sigma": maybe(g, 0.3, lambda: float(g.uniform(1, 3))),
        "top_k": maybe(g, 0.5, lambda: int(g.integers(2, 60))),
        "typical_p": maybe(g, 0.3, lambda: float(g.uniform(0.3, 0.99))),
        "top_p": maybe(g, 0.5, lambda: float(g.uniform(0.3, 0.99))),
        "min_p": maybe(g, 0.4, lambda: float(g.uniform(0.001, 0.3))),
        "xtc_probability": maybe(g, 0.5, lambda: float(g.uniform(0.2, 1))),
        "temperature": float(g.uniform(0.3, 2)),
        "dynatemp_range": maybe(g, 0.3, lambda: float(g.uniform(0.1, 1))),
    }


def in_numpy(x, h, s, u):
    if {"repetition_penalty", "frequency_penalty", "presence_penalty"} & set(s):
        x = penalties(x, h, s.get("repetition_penalty", 1), s.get("frequency_penalty", 0), s.get("presence_penalty", 0), 64)
    x = dry(x, h, s["dry_multiplier"], 1.75, 2, 64) if "dry_multiplier" in s else x
    x = top_n_sigma(x, s.get("top_n_sigma", 0))
    x = only(x, strongest(x)[: s.get("top_k", V)])
    x = typical(x, s["typical_p"]) if "typical_p" in s else x
    x = top_p(x, s["top_p"]) if "top_p" in s else x
    x = np.where(x >= x.max() + math.log(s["min_p"]), x, GONE) if "min_p" in s else x
    x = xtc(x, u, s["xtc_probability"]) if "xtc_probability" in s else x
    return dynamic_temperature(x, s["temperature"], s.get("dynatemp_range", 0))


def drawn(x, u):
    total, last = 0.0, 0
    for token, p in enumerate(softmax(x)):
        total += p
        if total > u:
            return token
        last = token if p > 0 else last
    return last


def llama_cases(seeds):
    for seed in seeds:
        g = np.random.default_rng(seed)
        settings = {name: value for name, value in llama_settings(g).items() if value is not None}
        history = histories(g, int(g.integers(0, 120)), 4 if g.random() < 0.6 else V)
        x = torch.tensor(g.normal(size=(B, V)) * g.uniform(0.5, 4), dtype=torch.float32)
        yield seed, settings, history, x, build_chain(**settings, order="llama.cpp", seed=5)


def last_logits(chain, x, history):
    steps = list(chain.steps(x, history, chain.state(B)))
    return steps[-2].logits.numpy() if len(steps) > 1 else x.numpy()


def test_llama_cpp_is_its_rules_token_for_token():
    excluded = 0
    for seed, settings, history, x, chain in llama_cases(range(160)):
        got, tokens = last_logits(chain, x, history), chain(x, history).tolist()
        for row in range(B):
            want = in_numpy(x[row].double().numpy(), history[row], settings, uniform(5, row, 0, "XTC"))
            np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4, err_msg=f"{seed} {chain}")
            assert tokens[row] == drawn(want, uniform(5, row, 0, "Draw")), (seed, chain)
        excluded += "xtc_probability" in settings
    assert excluded > 40


def test_llama_cpp_leaves_what_its_own_samplers_leave():
    llama = pytest.importorskip("llama_cpp.llama_cpp")
    for seed, settings, history, x, _ in llama_cases(range(1000, 1150)):
        s = {name: value for name, value in settings.items() if name not in ("xtc_probability", "dry_multiplier")}  # its own chance; a vocabulary
        if "top_n_sigma" in s:  # its mask leaves tokens of probability 0 in the row, whose entropy is NaN to typical there, and which count for dynatemp
            s = {name: value for name, value in s.items() if name not in ("typical_p", "dynatemp_range")}
        chain = build_chain(**s, order="llama.cpp", seed=5)
        got = last_logits(chain, x, history)
        for row in range(B):
            theirs = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
            add = lambda name, *values, theirs=theirs: llama.llama_sampler_chain_add(theirs, getattr(llama, f"llama_sampler_init_{name}")(*values))
            add("penalties", V, 64, s.get("repetition_penalty", 1.0), s.get("frequency_penalty", 0.0), s.get("presence_penalty", 0.0))
            add("top_n_sigma", s.get("top_n_sigma", -1.0))
            add("top_k", s.get("top_k", 0))
            add("typical", s.get("typical_p", 1.0), 1)
            add("top_p", s.get("top_p", 1.0), 1)
            add("min_p", s.get("min_p", 0.0), 1)
            add("temp_ext", s["temperature"], s.get("dynatemp_range", 0.0), 1.0)
            for token in history[row]:
                llama.llama_sampler_accept(theirs, token)
            data = (llama.llama_token_data * V)(*[llama.llama_token_data(i, l, 0.0) for i, l in enumerate(x[row].tolist())])
            array = llama.llama_token_data_array(data, V, -1, False)
            llama.llama_sampler_apply(theirs, ctypes.byref(array))
            llama.llama_sampler_free(theirs)
            want = np.full(V, -np.inf)
            for i in range(array.size):
                want[array.data[i].id] = array.data[i].logit
            np.testing.assert_allclose(got[row], want, rtol=3e-4, atol=3e-4, err_msg=f"{seed} {chain}")


def test_the_two_orders_give_other_text():
    x = torch.randn(1, V, generator=torch.Generator().manual_seed(0)) * 2
    settings = {"temperature": 1.8, "top_p": 0.8, "min_p": 0.1}
    left = [list(build_chain(**settings, order=order).steps(x))[-2] for order in ("hf", "llama.cpp")]
    assert left[0].support.item() > left[1].support.item()
    assert isinstance(build_chain(**settings).final, Draw)
