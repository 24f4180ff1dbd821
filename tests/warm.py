"""Python programs in processes of their own that need not import torch first.

A server with the libraries imported, and nothing of glassformer, forks once per program: to the program it is a fresh interpreter in which
``import torch`` takes no time. What it prints, how it ends and what signals do to it are those of any process::

    process = warm.Program(["file.py", "argument"], cwd=folder)       # subprocess.Popen([sys.executable, "file.py", "argument"], ...) with pipes
    out, err = process.communicate()
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any, TextIO

import pytest

LIBRARIES = (
    *("numpy", "torch", "torch._dynamo", "tokenizers", "safetensors.torch", "tiktoken", "jinja2", "yaml"),
    *("typer.main", "rich.console", "rich.table", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)


@functools.cache
def _server() -> Any:
    """Forked from; one for each process of pytest. Threads do not survive forking, so it has one."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")  # elsewhere system libraries do not survive it either: programs start from nothing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        forkserver.ensure_running()
    return context


class Program:
    """A program that runs, with what the tests need of ``subprocess.Popen``. Its first argument is a file, or ``-m`` and then a module."""

    def __init__(self, arguments: list[str], cwd: Path | None = None, stdin: bytes = b"") -> None:
        self.returncode: int | None = None
        read, write = os.pipe()
        self.stdout: TextIO = os.fdopen(read, encoding="utf-8")
        self.stderr: TextIO = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = _server().Process(target=_run, args=(_Ends(write, self.stderr.fileno()), arguments, str(cwd or Path.cwd()), environment, stdin))
        self._process.start()
        os.close(write)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; of a signal, its number below zero."""
        self._process.join(timeout)
        self.returncode = self._process.exitcode
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.errors()}")
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed that is not yet read, and its errors, after it ended."""
        with self.stdout:
            out = self.stdout.read()
        self.wait(timeout)
        err = self.errors()
        self.stderr.close()
        return out, err

    def errors(self) -> str:
        """What it wrote to its standard error so far."""
        self.stderr.seek(0)
        return self.stderr.read()


class _Ends:
    """The ends of its pipes, on their way into a new process."""

    def __init__(self, *descriptors: int) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> tuple[Any, ...]:
        return _taken, tuple(reduction.DupFd(fd) for fd in self.descriptors)


def _taken(*sent: Any) -> list[int]:
    return [duplicate.detach() for duplicate in sent]


def _run(ends: list[int], arguments: list[str], cwd: str, environment: dict[str, str], stdin: bytes) -> None:
    """In the new process: be that program. ``multiprocessing`` ends the process with the code of the SystemExit."""
    given, fill = os.pipe()
    os.write(fill, stdin)
    os.close(fill)
    for fd, place in zip((given, *ends), (0, 1, 2), strict=True):
        os.dup2(fd, place)
        os.close(fd)
    for name, fd, mode, buffering in (("stdin", 0, "r", -1), ("stdout", 1, "w", -1), ("stderr", 2, "w", 1)):
        setattr(sys, name, open(fd, mode, buffering, encoding="utf-8", closefd=False))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
