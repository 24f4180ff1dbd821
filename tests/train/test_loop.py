from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from glassformer.core.errors import DataError, InputError, SpecError as SpecProblem, TrainingError
from glassformer.tasks import Batch, NextToken
from glassformer.train import AdamW, Constant, Cosine, Muon, TokenData, loop
from glassformer.train.accumulate import gradient
from glassformer.train.speed import COMPILE_COST, COMPILE_GAIN, Compiler, Rate, autocast_dtype, compiling_pays
from train import small


@pytest.mark.parametrize("optimizer", [AdamW(1e-2), Muon(1e-2, rest=AdamW(1e-2))], ids=repr)
def test_it_learns(optimizer):
    trainer = small.trainer(optimizer=optimizer, steps=60, validation=small.data(500), evaluate_every=30)
    steps = list(trainer)
    assert steps[0].loss == pytest.approx(2.565, abs=0.2)  # ln 13: nothing known
    assert sum(s.loss for s in steps[-5:]) / 5 < 1.4
    assert steps[-1].validation.loss < 1.4
    assert trainer.finished
    assert trainer.stopped is None


def test_what_a_step_says():
    trainer = small.trainer(steps=10, clip=None)
    steps = list(trainer)
    assert [s.number for s in steps] == list(range(1, 11))
    assert [s.tokens for s in steps] == [64 * n for n in range(1, 11)]
    assert [s.number for s in steps if s.every(4)] == [4, 8]
    assert [s.lr for s in steps] == pytest.approx([3e-3 * Cosine(warmup=0.1).factor(i, 10) for i in range(10)])
    assert all(s.tokens_per_second > 0 and s.grad_norm > 0 for s in steps)
    assert all(a.elapsed < b.elapsed and a.epoch < b.epoch for a, b in pairwise(steps))
    assert steps[-1].remaining == 0.0
    assert trainer.last == steps[-1]
    assert list(trainer) == []  # the budget is used up


def test_the_loss_of_a_step_is_the_task_s_mean_on_its_batch():
    trainer = small.trainer(steps=1)
    batch = small.trainer()._loader.next()
    assert trainer.run().loss == NextToken().loss(small.model(), batch).mean.item()


def ragged(parts: list[int]) -> list[Batch]:
    """One batch of six rows whose documents make the counts of rows differ, cut into parts."""
    tokens = torch.from_numpy(small.ids(6 * 17)).view(6, 17)
    ends = torch.tensor([[17], [3], [9], [1], [12], [5]])
    documents = (torch.arange(17) >= ends).long() + (torch.arange(17) >= ends + 2).long()
    return [Batch(t, d) for t, d in zip(tokens.split(parts), documents.split(parts), strict=True)]


@pytest.mark.parametrize("parts", [[1] * 6, [2, 4], [5, 1], [1, 2, 3], [3, 3]])
def test_any_split_of_a_batch_gives_the_same_gradient(parts):
    def of(batches):
        model = small.model().double()
        found = gradient(lambda b: NextToken().loss(model, b), batches, list(model.parameters()))
        return found, {n: p.grad * found.scale for n, p in model.named_parameters()}

    (whole, expected), (split, gradients) = of(ragged([6])), of(ragged(parts))
    assert split.mean.item() == pytest.approx(whole.mean.item(), rel=1e-6)
    assert split.norm.item() == pytest.approx(whole.norm.item(), rel=1e-6)
    assert int(split.predicted) == int(whole.predicted)
    for name in expected:
        assert torch.allclose(gradients[name], expected[name], rtol=1e-5, atol=1e-6), name


def test_the_mean_of_means_would_be_another_loss():
    model = small.model()
    with torch.no_grad():
        model.readout.matrix.mul_(100)  # away from the uniform start, where all means agree
    whole, split = (gradient(lambda b: NextToken().loss(model, b), ragged(parts), list(model.parameters())) for parts in ([6], [1] * 6))
    means = [NextToken().loss(model, b).mean.item() for b in ragged([1] * 6)]
    assert split.mean.item() == pytest.approx(whole.mean.item(), rel=1e-6)
    assert abs(sum(means) / 6 - whole.mean.item()) > 0.01


def test_accumulation_is_a_larger_batch():
    big, small_ones = small.trainer(batch=8, steps=8), small.trainer(batch=2, accumulate=4, steps=8)
    assert small.losses(small_ones) == pytest.approx(small.losses(big), rel=1e-4)
    assert small_ones.tokens == big.tokens


def test_clipping_bounds_the_gradient():
    model = small.model()
    seen = []
    trainer = small.trainer(model, clip=0.05, steps=3)
    step = trainer._optimisers.step
    trainer._optimisers.step = lambda: (seen.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()), step())
    steps = list(trainer)
    assert all(s.grad_norm > 0.05 for s in steps)  # as it was before clipping
    assert seen == pytest.approx([0.05] * 3, rel=1e-3)


def test_documents_keep_apart():
    data = TokenData([small.ids()], starts=torch.arange(0, 4000, 7).numpy(), vocab_size=small.VOCABULARY)
    trainer = small.trainer(data=data, documents=True, steps=5)
    steps = list(trainer)
    assert steps[-1].tokens < 5 * 64  # targets across borders are not predicted


def test_a_batch_that_predicts_nothing_moves_nothing():
    nothing = [Batch(b.tokens, torch.arange(17).expand(6, 17)) for b in ragged([6])]
    model = small.model()
    alone = gradient(lambda b: NextToken().loss(model, b), nothing, list(model.parameters()))
    assert alone.numbers()[:2] == (0.0, 0.0)
    together, expected = small.model(), small.model()
    found = gradient(lambda b: NextToken().loss(together, b), nothing + ragged([6]), list(together.parameters()))
    wanted = gradient(lambda b: NextToken().loss(expected, b), ragged([6]), list(expected.parameters()))
    assert found.norm.item() == pytest.approx(wanted.norm.item(), rel=1e-5)
    assert found.mean.item() == pytest.approx(wanted.mean.item(), rel=1e-6)


def test_the_model_is_left_in_the_mode_it_was_in():
    model = small.model().eval()
    modes = [model.training for _ in small.trainer(model, steps=2)]
    assert modes == [True, True]
    assert not model.training


def test_a_budget_of_seconds_ends_in_time_and_follows_the_clock():
    trainer = small.trainer(steps=None, seconds=1.0, schedule=Cosine(warmup=0.1, final=0.1), evaluate_every=None, validation=small.data(300))
    start = time.perf_counter()
    steps = list(trainer)
    assert 1.0 <= time.perf_counter() - start < 2.5
    assert steps[-1].elapsed >= 1.0
    assert len(steps) > 5
    rates = [s.lr for s in steps]
    assert max(rates) > 2.5e-3
    assert rates[-1] < 1e-3
    assert 2 <= sum(s.validation is not None for s in steps) <= 11


def test_the_first_budget_to_end_ends_the_run():
    assert small.trainer(steps=3, seconds=60).run().number == 3


def test_bf16_trains_with_float32_parameters():
    model = small.model()
    found = small.losses(small.trainer(model, dtype="bf16", steps=30, optimizer=AdamW(1e-2)))
    assert found[-1] < 2.0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert found != small.losses(small.trainer(dtype="fp32", steps=30, optimizer=AdamW(1e-2)))


def test_looking_does_not_change_the_run():
    plain = small.losses(small.trainer(small.model(dropout=0.2)))
    trainer = small.trainer(
        small.model(dropout=0.2), validation=small.data(300), evaluate_every=2, sample=lambda m: f"{m.training} {torch.rand(1).item()}", sample_every=3
    )
    steps = list(trainer)
    assert [s.loss for s in steps] == plain
    assert [s.number for s in steps if s.validation is not None] == [2, 4, 6, 8, 10, 12]
    assert [s.number for s in steps if s.sample is not None] == [3, 6, 9, 12]
    assert all(s.sample.startswith("False") for s in steps if s.sample is not None)


class Counting:
    """A source of batches that is not token data."""

    def __init__(self) -> None:
        self.n = 0

    @property
    def epoch(self) -> float:
        return self.n / 10

    def next(self) -> Batch:
        self.n += 1
        return Batch(torch.from_numpy(small.ids(40)).view(2, 20).roll(self.n, 1))

    def state(self) -> dict[str, int]:
        return {"n": self.n}

    def restore(self, state: dict[str, int]) -> None:
        self.n = state["n"]


def test_any_source_of_batches_will_do(tmp_path):
    def run(folder, steps, **more):
        return small.losses(small.trainer(data=Counting(), folder=folder, steps=steps, schedule=Constant(), **more))

    whole = run(tmp_path / "a", 8)
    first = run(tmp_path / "b", 5)
    assert first + run(tmp_path / "b", 8, resume=True) == whole


def test_passages_are_said_twice_in_token_data_only():
    with pytest.raises(
        TrainingError, match=r"repeats=0\.5 is for TokenData, but the data here is of type Counting, which makes its own batches: leave repeats"
    ):
        small.trainer(data=Counting(), repeats=0.5)


class Toy(nn.Module):
    """Not one of ours: no spec, no sites, no taps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(small.VOCABULARY, 16)
        self.out = nn.Linear(16, small.VOCABULARY)

    def forward(self, tokens):
        return self.out(self.table(tokens))


def test_any_module_will_do(tmp_path):
    torch.manual_seed(0)
    trainer = small.trainer(Toy(), steps=40, optimizer=AdamW(2e-2), folder=tmp_path / "run")
    found = small.losses(trainer)
    assert found[-1] < 1.6
    assert (tmp_path / "run/model.safetensors").exists()


# Speed


def test_compiling_pays_by_the_rule():
    cpu = torch.device("cpu")
    once, each = COMPILE_COST["cpu"]
    for layers in (1, 4, 48):
        enough = (once + each * layers) / COMPILE_GAIN["cpu"]
        assert compiling_pays(cpu, enough * 1.01, layers)
        assert not compiling_pays(cpu, enough * 0.99, layers)
    made = [small.trainer(m, compile="auto")._compiler._layers for m in (small.model(), Toy())]
    assert made == [len(small.model().spec.blocks), 4]  # a model without a spec counts as four layers
    assert not compiling_pays(torch.device("meta"), 1e9)


def test_a_short_run_does_not_compile_and_says_so_in_its_record(tmp_path):
    trainer = small.trainer(compile="auto", steps=8, folder=tmp_path / "run")
    trainer.run()
    assert trainer._compiler.decision == {"compile": False, "after": 5}
    assert '"compile": false' in (tmp_path / "run/run.json").read_text()


def test_a_long_run_compiles_after_a_few_steps(monkeypatch):
    calls = []

    def fake_compile(fn, **options):
        calls.append(options)
        return fn

    monkeypatch.setattr(torch, "compile", fake_compile)
    trainer = small.trainer(compile="auto", steps=10**9)
    for step in trainer:
        assert len(calls) == (step.number > 5)
        if step.number == 8:
            break
    assert calls[0]["dynamic"] is False
    assert any("Compiling from step 6 on" in note for note in trainer.notes)


def test_the_products_of_a_compiled_run_are_kept_with_it(monkeypatch, tmp_path):
    """What was measured when the step was compiled goes into the run's record, and a resumed run computes by it."""
    seen = []

    class Split:
        def __init__(self, record):
            seen.append(record)
            self.table = {"512x512x512 rr": 2}

        def recorded(self):
            if len(seen) == 2:
                self.table |= {f"later {len(self.table)}": 1}
            return dict(self.table)

    monkeypatch.setattr("glassformer.train.products.SplitProducts", Split)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    small.trainer(compile=True, steps=4, folder=tmp_path / "run").run()
    assert json.loads((tmp_path / "run/run.json").read_text())["products"] == {"512x512x512 rr": 2}
    small.trainer(compile=True, steps=6, folder=tmp_path / "run", resume=True).run()
    assert seen == [None, {"512x512x512 rr": 2}]
    assert json.loads((tmp_path / "run/run.json").read_text())["products"] == {"512x512x512 rr": 2, "later 1": 1, "later 2": 1}  # each as it came


def test_a_torch_without_these_internals_compiles_all_the_same(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "glassformer.train.products", None)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: calls.append(options) or fn)
    assert len(small.losses(small.trainer(compile=True, steps=2))) == 2
    assert calls == [{"dynamic": False}]


def test_where_nothing_compiles_auto_goes_on_eagerly(monkeypatch):
    def broken(fn, **options):
        def call(*args):
            torch.rand(3)
            raise RuntimeError("no C++ compiler\nlong trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    made = small.model(dropout=0.1)
    trainer = small.trainer(made, compile="auto", steps=10**9, schedule=Constant())
    found = []
    for step in trainer:
        found.append(step.loss)
        if step.number == 12:
            break
    assert "Not compiled: no C++ compiler" in trainer.notes
    assert found == small.losses(small.trainer(small.model(dropout=0.1), schedule=Constant()))
    with pytest.raises(TrainingError, match=r"cannot be compiled here \(no C\+\+ compiler\): train with compile=False"):
        small.trainer(compile=True).run()


def test_an_error_of_the_model_is_not_blamed_on_the_compiler():
    compiler = Compiler(lambda batch: batch, False, torch.device("cpu"))
    with pytest.raises(KeyError, match="mine"):
        compiler.give_up(KeyError("mine"), 3)


@pytest.mark.slow
def test_compiled_and_eager_learn_the_same():
    spec = small.spec()
    spec = spec.replace(blocks=spec.blocks[:1])  # compiled in half the time of two
    eager = small.losses(small.trainer(spec.build(seed=0), steps=6))
    compiled = small.losses(small.trainer(spec.build(seed=0), steps=6, compile=True))
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_dtype_by_name():
    cpu, model = torch.device("cpu"), Toy()
    assert autocast_dtype("fp32", model, cpu) is None
    assert autocast_dtype("bf16", model, cpu) is torch.bfloat16
    assert autocast_dtype("auto", model, cpu) is None  # too small to gain
    with pytest.raises(TrainingError, match="dtype is 'fp32', 'bf16' or 'auto' for training; 'fp8' was given"):
        autocast_dtype("fp8", model, cpu)


def test_the_rate_forgets_the_first_step_and_compilation():
    rate = Rate()
    assert rate.tokens_per_second == 0.0
    for seconds in [9.0] + [0.5] * 20 + [60.0] + [0.5] * 3:
        rate.add(seconds, 100)
    assert rate.tokens_per_second == pytest.approx(200)
    assert rate.step_seconds == pytest.approx(0.5)


# What cannot work is said before the first step


def test_what_makes_no_sense():
    with pytest.raises(TrainingError, match="A run needs a budget: give steps=… or seconds="):
        small.trainer(steps=None)
    with pytest.raises(TrainingError, match="The budget is above zero; steps=0"):
        small.trainer(steps=0)
    with pytest.raises(TrainingError, match="The budget is above zero; steps=None and seconds=nan"):
        small.trainer(steps=None, seconds=float("nan"))
    with pytest.raises(TrainingError, match="accumulate=0 was given"):
        small.trainer(accumulate=0)
    with pytest.raises(SpecProblem, match="A warm-up of 100 steps takes more than half of a run of 12"):
        small.trainer(schedule=Cosine(warmup=100))
    with pytest.raises(DataError, match="vocabulary of 99 tokens, but the model has 13"):
        small.trainer(data=TokenData.from_ids(small.ids(), vocab_size=99))
    with pytest.raises(DataError, match="There is no validation data"):
        small.trainer().evaluate()
    with pytest.raises(TrainingError, match="compile is True, False or 'auto'; 'maybe' was given"):
        small.trainer(compile="maybe")


@pytest.mark.parametrize("name", ["evaluate_every", "sample_every", "save_every", "evaluate_windows", "keep", "batch", "context"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name} is 1 or more; {name}=0 was given"):
        small.trainer(**{name: 0})


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_a_norm_that_is_no_norm_is_refused(clip: float) -> None:
    with pytest.raises(TrainingError, match=f"above zero, or None for no clipping; {clip} was given"):
        small.trainer(clip=clip)


def test_with_a_budget_of_seconds_samples_come_with_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small.trainer(steps=None, seconds=0.5, validation=small.data(), sample=lambda model: "text")
    seen = [(step.validation is not None, step.sample is not None) for step in trainer]
    assert any(looked for looked, _ in seen[:-1])
    assert all(validated == sampled for validated, sampled in seen)


def test_a_sample_that_fails_does_not_end_the_run(tmp_path):
    def sample(model):
        raise InputError("no such letter")

    trainer = small.trainer(sample=sample, sample_every=2, steps=4, folder=tmp_path / "run")
    trainer.run()
    assert trainer.number == 4 and trainer.finished
    assert [note for note in trainer.notes if "No sample text" in note] == [f"No sample text at step {n}: no such letter" for n in (2, 4)]


def test_saving_is_often_where_it_is_cheap(monkeypatch):
    trainer = small.trainer()
    monkeypatch.setattr(loop.time, "monotonic", lambda: 1000.0)
    least, most = loop.SAVE_SECONDS
    for took, wait in ((0.01, least), (2.0, 2.0 / loop.SAVE_SHARE), (60.0, most)):
        trainer._save_took = took
        assert trainer._save_due(1000.0 - wait * 1.01)
        assert not trainer._save_due(1000.0 - wait * 0.99)
