"""Compiled code for decoding on a CPU: built once with the user's own compiler, kept in a folder, never waited for.

    core/native/*.cpp ──► c++ -O3 -march=native ──► <cache>/native-<key>-<digest>.so ──► ctypes
                          in the background          a later process loads it at once

``library()`` gives the loaded library, or None: while it is being built, where there is no compiler, on a platform that it
is not written for (it is for x86-64 and arm64, Linux and macOS), and with ``GLASSFORMER_NATIVE=0``. Whoever asks has torch's own operations to
fall back on, which compute the same function with other roundings: ``wait()`` is for those who want one of the two from the first token.

The folder is ``GLASSFORMER_CACHE``, else ``glassformer`` under ``XDG_CACHE_HOME`` or ``~/.cache``. ``<key>`` stands for the sources, the flags,
the compiler and the processor; ``<digest>`` for the file's own bytes: what was cut short or changed is built anew.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

from .errors import GlassformerWarning

SOURCES = Path(__file__).with_name("native")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
"""Arithmetic stays what IEEE 754 says (no ``-ffast-math``): NaN and infinity come out, and sums keep the order in which they are written."""
COMPILERS = ("c++", "g++", "clang++")
LONGEST = 120.0  # seconds for a compilation


class _State:
    """What this process knows of the library: nobody asked yet, it is being built, it is there, or it never will be."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = False
        self.done = threading.Event()
        self.loaded: ctypes.CDLL | None = None
        self.process: subprocess.Popen[str] | None = None


_state = _State()


def _after_fork() -> None:
    """In a child: its threads are gone, those of the pool and one that was compiling. It computes alone, or begins anew."""
    if _state.loaded is not None:
        _state.loaded.glassformer_pool(None)
    elif not _state.done.is_set():
        _state.__init__()  # type: ignore[misc]
    _state.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None: not yet, or not here. The first call loads what an earlier process built, or starts to build."""
    if _state.asked:
        return _state.loaded
    with _state.lock:
        if not _state.asked:
            _begin(_state)
            _state.asked = True
    return _state.loaded


def wait(seconds: float = LONGEST) -> bool:
    """Wait until the library is there or never will be; gives whether it is there."""
    library()
    _state.done.wait(seconds)
    return _state.loaded is not None


def _begin(state: _State) -> None:
    if not _is_wanted():
        state.done.set()
        return
    try:
        compiler = _compiler()
        if compiler is None:
            state.done.set()
            return
        key = _key(compiler, _flags())
        state.loaded = _kept(folder(), key)
    except Exception as error:  # nothing here may end the caller's program
        _warn(error)
        state.done.set()
        return
    if state.loaded is not None:
        state.done.set()
        return
    threading.Thread(target=_build_for, args=(state, compiler, key), name="glassformer-native", daemon=True).start()


def _build_for(state: _State, compiler: str, key: str) -> None:
    try:
        state.loaded = _build(state, compiler, key)
    except Exception as error:
        _warn(error)
    finally:
        state.done.set()


def _warn(error: Exception) -> None:
    text = f"The compiled functions for decoding could not be built, so torch's own are used, which are slower: {error} (GLASSFORMER_NATIVE=0 says not to try.)"
    warnings.warn(text, GlassformerWarning, stacklevel=4)


# With what, for what


def _is_wanted() -> bool:
    return (
        os.environ.get("GLASSFORMER_NATIVE", "1") != "0"
        and sys.platform in ("linux", "darwin")
        and platform.machine() in ("x86_64", "AMD64", "arm64", "aarch64")
        and sys.byteorder == "little"
        and sys.maxsize > 2**32
    )


def _compiler() -> str | None:
    """The user's C++ compiler: ``CXX`` if set, else the first that there is."""
    named = os.environ.get("CXX", "").split()
    if named:
        return shutil.which(named[0])
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _flags() -> tuple[str, ...]:
    # Apple's and older compilers for arm64 know -mcpu only.
    return (*FLAGS, "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    told = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            told.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    real = Path(compiler).resolve()
    about = real.stat()
    told.update(repr((flags, str(real), about.st_size, about.st_mtime_ns, platform.machine(), processor())).encode())
    return told.hexdigest()[:20]


@functools.cache
def processor() -> str:
    """What this processor can do: a library built for another one may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5, check=False)
        return told.stdout
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


# The folder


def folder() -> Path | None:
    """Where libraries are kept, if it belongs to this user and to nobody else."""
    named = os.environ.get("GLASSFORMER_CACHE")
    try:
        place = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glassformer"
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = place.stat()
    except (OSError, RuntimeError):
        return None
    safe = about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(place, os.W_OK)
    return place if safe else None


def _kept(place: Path | None, key: str) -> ctypes.CDLL | None:
    """The library that an earlier process left, if its bytes are those that it was named after."""
    for path in sorted(place.glob(f"native-{key}-*.so")) if place is not None else []:
        try:
            if path.stem.rpartition("-")[2] == _digest(path):
                return _load(path)
        except (OSError, AttributeError):
            continue
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _build(state: _State, compiler: str, key: str) -> ctypes.CDLL:
    kept = folder()
    with tempfile.TemporaryDirectory(prefix="glassformer-", ignore_cleanup_errors=True) as place:
        made = Path(place) / "native.so"
        sources = [str(p) for p in sorted(SOURCES.glob("*.cpp"))]
        extra = os.environ.get("CXX", "").split()[1:]
        state.process = subprocess.Popen(
            [compiler, *extra, *_flags(), *sources, "-o", str(made)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        atexit.register(state.process.kill)  # a program that ends while this goes on does not wait for it
        try:
            said, _ = state.process.communicate(timeout=LONGEST)
        finally:
            state.process.kill()
            atexit.unregister(state.process.kill)
        if state.process.returncode != 0:
            first = next((line for line in said.splitlines() if "error" in line.lower()), said.strip().splitlines()[0] if said.strip() else "")
            raise OSError(f"{compiler} ended with {state.process.returncode}: {first[:300]}.")
        if kept is None:
            return _load(made)  # the file may go once it is in memory
        draft = kept / f".{key}-{os.getpid()}-{threading.get_ident()}.so"
        try:
            shutil.copy(made, draft)
            path = kept / f"native-{key}-{_digest(draft)}.so"
            os.replace(draft, path)  # two processes that build at once: each puts a whole file there
        except OSError:
            draft.unlink(missing_ok=True)
            return _load(made)
        return _load(path)


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.glassformer_pool.argtypes, loaded.glassformer_pool.restype = [ctypes.c_void_p], None
    loaded.glassformer_pool(_pool())
    return loaded


def _pool() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP library that torch has loaded: a second one would fight with it for the cores."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in mapped if len(line.split(maxsplit=5)) == 6)
    inside = [p for p in paths if any(name in Path(p).name for name in ("libgomp", "libiomp5", "libomp"))]
    for path in sorted(inside, key=lambda p: "torch" not in p):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
