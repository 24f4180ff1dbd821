from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from glassformer.core.errors import DataError
from glassformer.tasks import Batch, Loss, NextToken, Task
from glassformer.text import train
from glassformer.train import TokenData, evaluate
from glassformer.train.evaluate import Evaluation, windows
from train import small


def test_the_mean_is_that_of_all_windows_and_the_error_that_of_their_means():
    model, data = small.model(), small.data(1000)
    found = evaluate(model, NextToken(), data, batch=7, context=16)
    rows = [NextToken().loss(model, Batch(torch.from_numpy(data.read(np.array([s]), 17)))).mean.item() for s in range(0, 984, 16)]
    assert found.windows == len(rows) == 62
    assert found.tokens == 62 * 16
    assert found.loss == pytest.approx(np.mean(rows), rel=1e-6)
    assert found.error == pytest.approx(np.std(rows, ddof=1) / math.sqrt(62), rel=1e-4)
    assert found.interval == pytest.approx((found.loss - 1.96 * found.error, found.loss + 1.96 * found.error))
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    class Drawn(Task):
        """Rows of 5 predictions whose losses are normal around 2."""

        def loss(self, model, batch, **kw):
            raise NotImplementedError

        def rows(self, model, batch):
            return batch.sum(1), torch.full((len(batch),), 5)

    draw = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        found = evaluate(nn.Linear(1, 1), Drawn(), [2 + torch.randn(10, 5, generator=draw) for _ in range(4)])
        hits += found.interval[0] < 2 < found.interval[1]
    assert 0.90 < hits / 300 < 0.985


def test_batch_size_changes_nothing():
    model, data = small.model(), small.data(700)
    one, other = (evaluate(model, NextToken(), data, batch=b, context=16) for b in (1, 64))
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.error == pytest.approx(other.error, rel=1e-4)


def test_at_most_so_many_windows_spread_over_the_data():
    data = TokenData.from_ids(np.arange(1001))
    starts = [int(row[0]) for batch in windows(data, 3, 10, most=5) for row in batch.tokens]
    assert starts == [0, 240, 490, 740, 990]
    assert sum(len(b.tokens) for b in windows(data, 3, 10)) == 100
    assert next(windows(TokenData.from_ids([1, 2, 3]), 4, 256)).tokens.tolist() == [[1, 2, 3]]  # shorter than a window


def test_the_model_is_as_it_was():
    model = small.model(dropout=0.5)
    model.train()
    first, second = (evaluate(model, NextToken(), small.data(200), context=16) for _ in range(2))
    assert first == second
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert NextToken().loss(model, Batch(torch.ones(1, 5, dtype=torch.long))).total.requires_grad


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    text = "to be or not to be, that is the question: " * 30
    letters, merges = train("characters", texts=[text]), train("bpe", texts=[text], vocab_size=270)
    one = Evaluation(1.0, 0.1, 2, 9, TokenData.from_text(text, letters).bytes_per_token())
    assert one.bits_per_byte == pytest.approx(1 / math.log(2))
    ratio = TokenData.from_text(text, merges).bytes_per_token()
    assert Evaluation(ratio, 0.1, 2, 9, ratio).bits_per_byte == pytest.approx(one.bits_per_byte)
    assert Evaluation(1.0, 0.1, 2, 9).bits_per_byte is None
    assert str(one) == "loss 1.0000 ± 0.1960 (95 %), perplexity 2.72, 1.4427 bits per byte (2 windows, 9 tokens)"


def test_documents_are_kept_apart():
    data = TokenData([small.ids(400)], starts=np.arange(0, 400, 9))
    apart, mixed = (evaluate(small.model(), NextToken(), data, context=16, documents=d) for d in (True, False))
    assert apart.tokens < mixed.tokens


def test_a_task_without_rows_counts_batches():
    class Plain(Task):
        def loss(self, model, batch, **kw):
            return Loss(batch.sum(), batch.numel(), {})

    found = evaluate(nn.Linear(1, 1), Plain(), [torch.ones(3), 3 * torch.ones(1)])
    assert (found.windows, found.tokens, found.loss) == (2, 4, 1.5)
    assert math.isnan(evaluate(nn.Linear(1, 1), Plain(), [torch.ones(3)]).error)


def test_nothing_to_evaluate():
    with pytest.raises(DataError, match="has 1 tokens, but a prediction needs two"):
        evaluate(small.model(), NextToken(), TokenData.from_ids([1]))
    with pytest.raises(DataError, match="no batch to evaluate on"):
        evaluate(small.model(), NextToken(), [])
    with pytest.raises(DataError, match="every document is a single token"):
        evaluate(small.model(), NextToken(), TokenData([np.arange(5)], starts=np.arange(5)), documents=True)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"context": 0}])
def test_an_evaluation_without_rows_or_tokens_is_refused(sizes: dict[str, int]) -> None:
    data = TokenData.from_ids([1, 2, 3, 1, 2, 3], vocab_size=5)
    with pytest.raises(DataError, match="at least one row of at least one token"):
        list(windows(data, **({"batch": 2, "context": 2} | sizes)))
