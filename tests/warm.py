"""Python programs in processes of their own that need not import torch first.

A server imports the libraries, and nothing of glassformer or of pytest, and forks once per program. To the program that is nearly a fresh interpreter in
which ``import torch`` takes no time: ``__main__``, ``sys.path``, ``sys.argv``, the environment, what it prints, how it ends (``atexit``, exit codes,
signals) are those of any process, and its random numbers are its own::

    process = warm.Program(["file.py", "argument"], cwd=folder)       # subprocess.Popen([sys.executable, "file.py", "argument"], ...) with pipes
    out, err = process.communicate()

What is not fresh: ``sys.modules`` holds ``LIBRARIES``; and what an interpreter or a library reads from the environment when it starts, first of all
``PYTHONHASHSEED``, was read by the server, once for all programs of one process of pytest. Where that matters: ``warm.Program(..., cold=True)``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any, TextIO

LIBRARIES = (
    *("numpy", "torch", "torch._dynamo", "tokenizers", "safetensors.torch", "tiktoken", "jinja2", "yaml"),
    *("typer.main", "rich.console", "rich.table", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LIMIT = 600.0
"""Seconds after which a program is killed, whatever the test waits for."""
NUMBER = struct.Struct("q")


class Program:
    """A program that runs, with what the tests need of ``subprocess.Popen``.

    ``arguments``: a file, ``-m`` and a module, or ``-c`` and the text, and then the program's own. ``environment``: beside the test's.
    ``cold``: from nothing, as ``subprocess`` starts it (so it is everywhere but on Linux: elsewhere system libraries do not survive forking).
    """

    def __init__(
        self, arguments: list[str], cwd: Path | None = None, stdin: bytes = b"", environment: dict[str, str] | None = None, cold: bool = False
    ) -> None:
        read, write = os.pipe()
        self.stdout: TextIO = os.fdopen(read, encoding="utf-8")
        self.stderr: TextIO = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        variables = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | (environment or {})
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            files = (given.fileno(), write, self.stderr.fileno())
            start = _Cold if cold or sys.platform != "linux" else _Forked
            self._process = start(arguments, str(cwd or Path.cwd()), variables, files)
        os.close(write)
        self._limit = threading.Timer(LIMIT, self.send_signal, [getattr(signal, "SIGKILL", signal.SIGTERM)])
        self._limit.daemon = True
        self._limit.start()

    @property
    def returncode(self) -> int | None:
        """The exit code once it was waited for; of a signal, its number below zero."""
        return self._process.returncode

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises :class:`TimeoutError`, and kills the program, if it runs for longer."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._killed(timeout)
        self._limit.cancel()
        return code

    def communicate(self, timeout: float = LIMIT) -> tuple[str, str]:
        """What it printed that is not yet read, and its errors, after it ended. Raises :class:`TimeoutError` as :meth:`wait` does."""
        end, out = time.monotonic() + timeout, []
        reader = threading.Thread(target=lambda: out.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            self._killed(timeout)
        self.wait(max(0.0, end - time.monotonic()))
        self.stdout.close()
        err = self.errors()
        self.stderr.close()
        return out[0], err

    def errors(self) -> str:
        """What it wrote to its standard error so far."""
        self.stderr.seek(0)
        return self.stderr.read()

    def _killed(self, timeout: float | None) -> Any:
        self.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        self._process.wait(10)
        self._limit.cancel()
        raise TimeoutError(f"still running after {timeout} s: {self.errors()}")


class _Cold(subprocess.Popen):  # type: ignore[type-arg]
    """A program that starts from nothing."""

    def __init__(self, arguments: list[str], cwd: str, environment: dict[str, str], files: tuple[int, int, int]) -> None:
        # What runs in the background is often told to ignore interrupts, and would tell its programs.
        command = [sys.executable, *arguments]
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        super().__init__(command, cwd=cwd, env=environment, stdin=files[0], stdout=files[1], stderr=files[2], preexec_fn=listen if os.name == "posix" else None)


class _Forked:
    """A program that the server forks; what became of it comes through a pipe: its id, then its exit code."""

    def __init__(self, arguments: list[str], cwd: str, environment: dict[str, str], files: tuple[int, int, int]) -> None:
        self.returncode: int | None = None
        self._status, write = os.pipe()
        socket.send_fds(_server(), [json.dumps([arguments, cwd, environment]).encode()], [*files, write])
        os.close(write)
        self.pid = self._next()

    def _next(self) -> int:
        said = os.read(self._status, NUMBER.size)
        if not said:
            raise RuntimeError("The server of warm programs has ended: run tests/warm.py to see why.")
        return int(NUMBER.unpack(said)[0])

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and nobody asked yet
                os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a warm program", timeout or 0.0)
            self.returncode = self._next()
            os.close(self._status)
        return self.returncode


@functools.cache
def _server() -> socket.socket:
    """The way to the server; one for each process of pytest. Threads do not survive forking, so it has one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        server = subprocess.Popen(command, env=os.environ | ONE_THREAD, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


# In the server


def _serve(requests: socket.socket) -> tuple[list[str], str]:
    """Fork for every request. Returns in the forked processes only: the program's arguments and its folder."""
    for name in LIBRARIES:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; this ends when they do
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, *_ = socket.recv_fds(requests, 1 << 20, 4)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            _watch(files.pop())
            arguments, cwd, environment = json.loads(request)
            for place, fd in enumerate(files):
                os.dup2(fd, place)
                os.close(fd)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(cwd)
            return arguments, cwd
        for fd in files:
            os.close(fd)


def _watch(status: int) -> None:
    """Fork once more, and return in the new process; this one says what becomes of it, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.close(status)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return
    os.write(status, NUMBER.pack(pid))
    os.closerange(0, status)  # the program alone holds its ends of the pipes
    os.closerange(status + 1, 4096)
    os.write(status, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)


def _be(arguments: list[str], cwd: str) -> None:
    """Be that program, as the interpreter would be."""
    for name, fd, mode, buffering in (("stdin", 0, "r", -1), ("stdout", 1, "w", -1), ("stderr", 2, "w", 1)):
        before = getattr(sys, name)
        stream = open(fd, mode, buffering, encoding=before.encoding, errors=before.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.modules["numpy"].random.seed()  # that of ``random`` is new in every fork, that of torch is a constant
    sys.orig_argv = [sys.executable, *arguments]
    main = sys.modules["__main__"] = sys.modules["__mp_main__"] = types.ModuleType("__main__")  # multiprocessing calls it so too
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    kind, *rest = arguments
    if kind == "-m":
        sys.path.insert(0, cwd)
        sys.argv = ["-m", *rest[1:]]
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = [kind, *rest]
        main.__dict__["__file__"] = str(Path(cwd) / kind)
        exec(compile(Path(kind).read_bytes(), str(Path(cwd) / kind), "exec"), main.__dict__)


def _ended(arguments: list[str], cwd: str) -> int:
    """The program's exit code, its last words said. The interpreter's own way to its end, but for taking all modules apart, which for torch takes a second."""
    code = 0
    try:
        _be(arguments, cwd)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        return 120
    return code


if __name__ == "__main__":
    del sys.path[0]
    ended = _ended(*_serve(socket.socket(fileno=int(sys.argv[1]))))  # in the forked processes alone
    if ended == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    os._exit(ended & 0xFF)
