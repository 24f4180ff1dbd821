"""Files that are there whole or not at all, and what to say when one cannot be written.

    draft beside the target ──► flushed to the disk ──► renamed to its place

Whoever reads sees the old file or the new one, never half of one, whatever happens in between.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError
from .fields import described

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def check_place(path: str | os.PathLike[str], what: str, endings: tuple[str, ...], example: str) -> Path:
    """The file that ``what`` ("a trace") is to be written to. Raises :class:`InputError` if its ending says nothing, or its folder is not there."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{what[0].upper()}{what[1:]} is written to a file, but {described(type(path))} was given: name one, such as {example!r}.")
    target = Path(path)
    kind = target.suffix.lower()
    if target.is_dir():
        raise InputError(
            f"{str(path)!r} cannot be written: it is a folder, and {what} is a file. Name one in it, such as {str(target / example)!r}; "
            "what was there before is untouched."
        )
    if kind not in endings:
        said = f"one of {', '.join(endings)}" if len(endings) > 2 else " or ".join(endings)
        raise InputError(f"{target.name!r} {f'ends in {kind!r}' if kind else 'has no ending'}, but the ending says how {what} is written: {said}.")
    if not target.parent.is_dir():
        raise InputError(f"{str(target)!r} cannot be written: the folder {str(target.parent)!r} does not exist; create it or choose another.")
    return target


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turns the system's refusal to write ``target`` into an :class:`InputError` with the remedy."""
    try:
        yield
    except OSError as error:
        reason, todo = trouble(error)
        raise InputError(f"{str(target)!r} cannot be written: {reason}. {todo}; what was there before is untouched.") from error


def save(target: Path, text: str) -> Path:
    """Put ``text`` at ``target`` at once; gives the target. A lone half of a surrogate pair is written as its escape, which JSON reads as that half again."""
    with saving(target):
        replace(target, text.encode("utf-8", "backslashreplace").decode())
    return target


def replace(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8, line ends as they are) at ``path`` at once. Raises :class:`OSError`; what was there before is then untouched."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        flush(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def take_places(draft: Path, folder: Path, last: str) -> list[str]:
    """Move every file of a finished draft to its place in ``folder``, the one named ``last`` at the end; gives their names.

    All are flushed before the first is moved. Raises :class:`OSError`; what was there before is then there again (but where a file cannot have two names).
    """
    written = sorted(draft.iterdir(), key=lambda file: file.name == last)
    for file in written:
        flush(file)
        file.chmod(0o644)  # drafts are made private
    moved: list[tuple[Path, Path, bool]] = []
    try:
        for file in written:
            place, old = folder / file.name, draft / f".old.{file.name}"
            new = not place.exists()
            with suppress(OSError):  # a second name for what is there; some file systems have none
                os.link(place, old)
            file.replace(place)
            moved.append((place, old, new))
    except OSError:
        for place, old, new in reversed(moved):
            if old.exists():
                old.replace(place)
            elif new:
                place.unlink()
        raise
    with suppress(OSError):  # some file systems cannot; the files themselves are on the disk
        flush(folder)
    return [file.name for file in written]


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def trouble(error: BaseException, movable: bool = True) -> tuple[str, str]:
    """Why a file could not be written, and what to do: ``("the disk is full", "Free some space")``. ``movable``: whether another place would do."""
    code = error.errno if isinstance(error, OSError) else None
    if code in FULL or "No space left" in str(error):  # safetensors has no errno
        return "the disk is full", "Free some space"
    if code in FORBIDDEN:
        todo = "Choose a folder that you may write to" if movable else "Make the folder writable"
    elif code in IN_THE_WAY:
        todo = "Move what is in the way" + (", or choose another place" if movable else "")
    else:
        todo = "Choose another place" if movable else "See that the folder is there and can be written"
    return str(getattr(error, "strerror", None) or error), todo
