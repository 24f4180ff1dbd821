"""Programs forked from the server of ``tests/warm.py`` are to themselves, and to a test, what they are started from nothing."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import pytest

import warm

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every program starts from nothing")

ITSELF = """
import __main__, atexit, os, sys
print(__name__, globals().get("__file__"), vars(__main__) is globals(), sys.argv, sys.orig_argv[1:], sys.path, os.getcwd(), sys.flags, sep=chr(10))
print([s.encoding + s.errors for s in (sys.stdin, sys.stdout, sys.stderr)], sys.stdout is sys.__stdout__, sys.stdin.isatty(), sys.stdout.seekable())
print([n in sys.modules for n in ("pytest", "_pytest", "warm", "glassformer")], os.environ.get("SAID"), len(sys.stdin.buffer.read()))
atexit.register(print, "at the end")
"""
ENDS = {
    "well": "print('a')",
    "a code": "raise SystemExit(7)",
    "a sentence": "import sys; sys.exit('no: ü')",
    "an error": "1 / 0",
    "nobody catches an interrupt": "import os, signal; print('a'); os.kill(os.getpid(), signal.SIGINT); print('b')",
    "killed": "import os, signal; print('a', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "at exit": "import atexit; atexit.register(print, 'last'); raise SystemExit(2)",
    "threads are waited for": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
}


def both(arguments: list[str], folder: Path, **options: object) -> tuple[tuple[int, str, str], tuple[int, str, str]]:
    """The exit code, the output and the last line of the errors, forked and from nothing."""
    found = []
    for cold in (False, True):
        program = warm.Program(arguments, folder, cold=cold, **options)  # type: ignore[arg-type]
        out, err = program.communicate(60)
        found.append((program.wait(), out, err.strip().rpartition("\n")[2]))
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["a file", "-m", "-c"])
def test_a_program_sees_what_it_sees_from_nothing(kind: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "itself.py").write_text(ITSELF)
    (tmp_path / "itself.py").write_text(ITSELF)
    arguments = {"a file": ["inner/itself.py"], "-m": ["-m", "itself"], "-c": ["-c", ITSELF]}[kind]
    forked, cold = both([*arguments, "one", "-two"], tmp_path, stdin=b"x" * 1_000_000, environment={"SAID": "something"})
    assert forked == cold
    assert forked[0] == 0 and "something 1000000\nat the end\n" in forked[1]


@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS)
def test_a_program_ends_as_it_does_from_nothing(program: str, tmp_path: Path) -> None:
    forked, cold = both(["-c", program], tmp_path)
    assert forked == cold


def test_an_interrupt_that_nobody_catches_is_its_end(tmp_path: Path) -> None:
    program = warm.Program(["-c", "import time; print('begun', flush=True); time.sleep(60)"], tmp_path)
    assert next(program.stdout) == "begun\n"
    program.send_signal(signal.SIGINT)
    assert program.communicate(30)[1].endswith("KeyboardInterrupt\n")
    assert program.returncode == -signal.SIGINT


@LINUX
def test_libraries_are_there_and_random_numbers_are_its_own(tmp_path: Path) -> None:
    source = "import random, sys; there = 'torch' in sys.modules; import numpy; print(there, random.random(), numpy.random.rand())"
    first, second = (warm.Program(["-c", source], tmp_path).communicate(30)[0].split() for _ in range(2))
    assert first[0] == second[0] == "True"
    assert first[1] != second[1] and first[2] != second[2]


def test_from_nothing_the_environment_decides_how_strings_hash(tmp_path: Path) -> None:
    def hashed(seed: str) -> str:
        return warm.Program(["-c", "print(hash('a'))"], tmp_path, environment={"PYTHONHASHSEED": seed}, cold=True).communicate(30)[0]

    assert hashed("1") == hashed("1") != hashed("2")


@pytest.mark.parametrize("cold", [False, True], ids=["forked", "from nothing"])
def test_a_program_that_hangs_is_killed(cold: bool, tmp_path: Path) -> None:
    warm.Program(["-c", ""], tmp_path).communicate()  # the server is there
    for said in ("communicate", "wait"):
        program = warm.Program(["-c", "import sys, time; print('x' * 10, file=sys.stderr, flush=True); time.sleep(60)"], tmp_path, cold=cold)
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match=re.compile(r"still running after 1 s: (x{10})?")):
            getattr(program, said)(1)
        assert time.monotonic() - begun < 20
        assert program.returncode == -signal.SIGKILL
        program.send_signal(signal.SIGTERM)  # to nobody
