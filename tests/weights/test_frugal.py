"""Opening reads headers and nothing else; loading holds the model once; exporting holds one shard; hostile files stay within a limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glassformer import weights
from weights import frugal

MB = 1 << 20


@pytest.mark.parametrize("shards", [1, 5])
def test_opening_fourteen_gigabytes_reads_no_tensor(shards, tmp_path, monkeypatch):
    total = frugal.sparse(tmp_path / "model", frugal.LARGE, "BF16", shards)
    assert total > 13e9
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a tensor was read"))
    opened = weights.open(tmp_path / "model")
    plan = opened.plan  # who fills whom is settled without reading either
    assert sum(s.nbytes for s in opened.tensors.values()) == total == sum(s.nbytes for f in plan.fillings for s in f.stored)
    assert "13,476.8 MB BF16" in repr(opened) and opened.spec.build(device="meta").params().total == total // 2


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> Any:
    """What a process of its own measured."""
    folder = tmp_path_factory.mktemp("frugal")
    # A fixed threshold keeps the allocator from raising it, and freed memory goes back to the system: what is measured is what is held.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, frugal.__file__, str(folder)], env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    for file in Path(folder).rglob("*.safetensors"):
        file.unlink()
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_opening_takes_the_memory_of_a_header(said):
    for shards in (1, 5):
        assert said[f"open-{shards}"]["bytes"] > 13e9
        assert said[f"open-{shards}"]["grew"] < 60 * MB


@pytest.mark.slow
def test_loading_holds_the_model_once(said):
    assert said["load"]["bytes"] > 180 * MB
    assert said["load"]["grew"] <= 1.1 * said["load"]["bytes"]
    assert said["half"]["now"] <= 1.15 * said["half"]["bytes"]


@pytest.mark.slow
def test_exporting_holds_one_shard(said):
    export = said["export"]
    assert export["files"] >= 4
    assert export["grew"] <= 1.5 * export["shard"]


@pytest.mark.slow
def test_hostile_files_are_refused_within_a_limit_of_memory(said):
    """Half a gigabyte of addresses more than the process had: a length that was believed would have needed terabytes."""
    assert said["hostile"]["opened"] + said["hostile"]["refused"] == 150
    assert said["hostile"]["refused"] > 75
