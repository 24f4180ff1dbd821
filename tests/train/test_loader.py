from __future__ import annotations

import numpy as np
import pytest
import torch

from glassformer.core.errors import CheckpointError, DataError
from glassformer.train import Loader, TokenData

ROW = TokenData.from_ids(np.arange(1003))


def test_an_epoch_predicts_every_token_behind_its_phase_once():
    loader = Loader(ROW, batch=5, context=10, seed=3)
    windows = len(loader._starts)
    seen = torch.cat([loader.next().tokens for _ in range(windows // 5)])
    assert torch.equal(seen[:, 1:], seen[:, :1] + torch.arange(1, 11))  # windows of consecutive tokens
    targets = seen[:, 1:].flatten()
    assert len(targets.unique()) == len(targets)
    assert len(targets) >= 1003 - 1 - 2 * 10 - 5 * 10
    assert seen.dtype == torch.int64


def test_epochs_differ_in_order_and_phase():
    loader = Loader(ROW, batch=1, context=10)
    first, second = loader._order(0), loader._order(1)
    assert sorted(first % 10) != sorted(second % 10) or list(first) != list(second)
    assert list(first) != sorted(first)
    assert list(loader._order(0)) == list(first)


def test_seeds_differ():
    assert not torch.equal(Loader(ROW, 4, 10, seed=0).next().tokens, Loader(ROW, 4, 10, seed=1).next().tokens)


@pytest.mark.parametrize("when", [0, 1, 7, 19, 20, 21, 55])
def test_a_restored_loader_goes_on_exactly(when):
    loader = Loader(ROW, batch=5, context=10, seed=2, documents=True)
    for _ in range(when):
        loader.next()
    state = loader.state()
    after = [loader.next() for _ in range(30)]
    again = Loader(ROW, batch=5, context=10, seed=2, documents=True)
    again.restore(state)
    for expected in after:
        found = again.next()
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.documents, expected.documents)
    assert again.epoch == loader.epoch


def test_global_generators_are_not_touched():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    loader = Loader(ROW, batch=5, context=10)
    for _ in range(50):
        loader.next()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_a_batch_may_be_larger_than_an_epoch():
    loader = Loader(TokenData.from_ids(np.arange(12)), batch=7, context=5)
    assert loader.next().tokens.shape == (7, 6)
    assert loader.epoch > 3


def test_documents_come_with_their_numbers():
    data = TokenData([np.arange(100)], starts=np.array([0, 30, 60]))
    batch = Loader(data, batch=3, context=20, documents=True).next()
    assert torch.equal(batch.documents, torch.bucketize(batch.tokens, torch.tensor([0, 30, 60]), right=True))
    assert Loader(data, batch=3, context=20).next().documents is None


def test_a_share_of_the_rows_says_a_passage_twice():
    plain, loader = Loader(ROW, batch=10, context=63, seed=4), Loader(ROW, batch=10, context=63, seed=4, repeats=0.5)
    changed = 0
    for _ in range(20):
        before, after = plain.next().tokens, loader.next().tokens
        for old, new in zip(before, after, strict=True):
            places = (old != new).nonzero()[:, 0]
            changed += bool(len(places))
            if len(places):  # every number of ROW is another, so what stands there now stood before, and says how far back
                first, n = int(places[0]), len(places)
                back = int(old[first] - new[first])
                assert n >= 8 and back >= n and torch.equal(places, torch.arange(first, first + n))
                assert torch.equal(new[first : first + n], old[first - back : first - back + n])
    assert 70 <= changed <= 130  # of 200, half: four standard deviations are 28
    assert torch.equal(Loader(ROW, batch=10, context=63, seed=4).next().tokens, Loader(ROW, batch=10, context=63, seed=4, repeats=0.0).next().tokens)


def test_passages_said_twice_are_the_same_after_a_restart():
    loader, again = (Loader(ROW, batch=3, context=40, seed=1, repeats=1.0) for _ in range(2))
    for _ in range(4):
        loader.next()
    again.restore(loader.state())
    assert all(torch.equal(loader.next().tokens, again.next().tokens) for _ in range(12))  # over the end of an epoch


def test_what_cannot_say_a_passage_twice():
    with pytest.raises(DataError, match=r"from 0 to 1; 1\.5 was given"):
        Loader(ROW, batch=1, context=40, repeats=1.5)
    with pytest.raises(DataError, match="copies a passage across documents, and documents=True keeps them apart"):
        Loader(ROW, batch=1, context=40, documents=True, repeats=0.1)
    with pytest.raises(DataError, match="two passages of 8 tokens, but a row of context 14 has 15"):
        Loader(ROW, batch=1, context=14, repeats=0.1)
    assert Loader(ROW, batch=1, context=15, repeats=1.0).next().tokens.shape == (1, 16)


def test_what_cannot_be_loaded():
    with pytest.raises(DataError, match="has 5 tokens, but one window of context 5 needs 6"):
        Loader(TokenData.from_ids(np.arange(5)), batch=1, context=5)
    assert Loader(TokenData.from_ids(np.arange(6)), batch=1, context=5).next().tokens.tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(DataError, match="batch 0 and context 5 were given"):
        Loader(ROW, batch=0, context=5)
    loader = Loader(ROW, batch=5, context=10, seed=2)
    with pytest.raises(CheckpointError, match="data seed 1, but this run has 2"):
        loader.restore({"seed": 1, "epoch": 0, "position": 0})
    with pytest.raises(CheckpointError, match="stands at window 5000 of an epoch that has"):
        loader.restore({"seed": 2, "epoch": 0, "position": 5000})
