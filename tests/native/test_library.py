"""The compiled library: built in the background, kept, shared by processes; whatever goes wrong, the program runs on with torch alone."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from glassformer.core import native

ASK = """
import json, os, pathlib, sys, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    from glassformer.core import native
    from glassformer.parts.linear import Linear
    native.SOURCES = pathlib.Path(os.environ["SOURCES"])
    layer, x = Linear(64, 8).eval(), torch.ones(1, 64)
    with torch.no_grad():
        first = layer(x)
        at_once = native.library() is not None
        ready = native.wait(100)
        then = layer(x)
json.dump({"at_once": at_once, "ready": ready, "same": bool(torch.allclose(first, then, atol=1e-5)), "said": [str(w.message) for w in said]}, sys.stdout)
"""
SMALL = '#include "parallel.h"\nextern "C" void glassformer_linear(const void*) {}\n'


@pytest.fixture
def compiler() -> str:
    found = native._compiler()
    if found is None or not native._is_wanted():
        pytest.skip("no compiler here")
    return found


def environment(folder: Path, **more: str) -> dict[str, str]:
    sources = folder.with_name("few")  # those of products alone: all take longer to build
    sources.mkdir(exist_ok=True)
    for name in ("parallel.h", "products.h", "threads.cpp", "products.cpp"):
        shutil.copy(native.SOURCES / name, sources)
    return {**os.environ, "GLASSFORMER_CACHE": str(folder), "SOURCES": str(sources), "OMP_NUM_THREADS": "1", **more}


def ask(folder: Path, **more: str) -> dict[str, object]:
    import json

    done = subprocess.run([sys.executable, "-c", ASK], env=environment(folder, **more), capture_output=True, text=True, timeout=300, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_built_behind_the_first_call_then_loaded_at_once(tmp_path: Path, compiler: str) -> None:
    folder = tmp_path / "cache"
    first = ask(folder)
    assert first == {"at_once": False, "ready": True, "same": True, "said": []}
    (path,) = folder.glob("native-*.so")
    assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0
    assert ask(folder)["at_once"]
    path.write_bytes(path.read_bytes()[:5000])  # cut short: loading it would end the process
    after = ask(folder)
    assert after["ready"]
    assert not after["at_once"]
    assert after["said"] == []


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, compiler: str) -> None:
    folder = tmp_path / "cache"
    both = [subprocess.Popen([sys.executable, "-c", ASK], env=environment(folder), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        said, _ = process.communicate(timeout=300)
        assert '"ready": true' in said
        assert '"said": []' in said
    assert not list(folder.glob(".*.so"))
    assert ask(folder)["at_once"]


@pytest.mark.slow
def test_a_broken_compiler_is_one_warning(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'error: no room for rent' >&2\nexit 3\n")
    broken.chmod(0o755)
    answer = ask(tmp_path / "cache", CXX=str(broken))
    assert not answer["ready"]
    assert answer["same"]
    (said,) = answer["said"]  # type: ignore[misc]
    assert said == (
        f"The compiled functions for decoding could not be built, so torch's own are used, which are slower: {broken} ended with 3: "
        "error: no room for rent. (GLASSFORMER_NATIVE=0 says not to try.)"
    )
    silent = {"at_once": False, "ready": False, "same": True, "said": []}
    assert ask(tmp_path / "cache", CXX=str(tmp_path / "none")) == silent  # no compiler
    assert ask(tmp_path / "cache", GLASSFORMER_NATIVE="0") == silent


def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[native._State, Path]:
    """A state of its own and sources that compile quickly."""
    sources, folder = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    for name in ("parallel.h", "threads.cpp"):
        (sources / name).write_bytes((native.SOURCES / name).read_bytes())
    (sources / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setenv("GLASSFORMER_CACHE", str(folder))
    state = native._State()
    monkeypatch.setattr(native, "_state", state)
    return state, folder


def test_kept_by_source_and_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str) -> None:
    _, folder = small(monkeypatch, tmp_path)
    assert native.library() is None
    assert native.wait()
    (first,) = folder.glob("native-*.so")
    monkeypatch.setattr(native, "_state", native._State())
    assert native.library() is not None  # at once
    (native.SOURCES / "small.cpp").write_text(SMALL + "// changed\n")
    monkeypatch.setattr(native, "_state", native._State())
    assert native.library() is None
    assert native.wait()
    assert len(list(folder.glob("native-*.so"))) == 2
    first.write_bytes(b"no library")
    assert native._kept(folder, first.stem.split("-")[1]) is None
    assert not first.exists()


@pytest.mark.parametrize("mode", [0o777, 0o500])
def test_a_folder_of_others_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, mode: int) -> None:
    _, folder = small(monkeypatch, tmp_path)
    folder.mkdir()
    folder.chmod(mode)
    if mode == 0o500 and os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert native.wait()
    assert not list(folder.iterdir())
    folder.chmod(0o700)


def test_sources_are_part_of_the_package() -> None:
    assert {p.name for p in native.SOURCES.glob("*.cpp")} >= {"products.cpp", "threads.cpp"}
    assert not (native.SOURCES / "__init__.py").exists()  # native.py is the module
