"""Files that are there whole or not at all, and what to say when one cannot be written.

    draft beside the target ──► flushed to the disk ──► renamed to its place

Whoever reads sees the old file or the new one, never half of one, whatever happens in between.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EACCES: "Choose a folder that you may write to",
    errno.EPERM: "Choose a folder that you may write to",
    errno.EROFS: "Choose a folder that you may write to",
    errno.ENOTDIR: "Move the file that is where a folder is needed, or choose another place",
    errno.EEXIST: "Move the file that is where a folder is needed, or choose another place",
    errno.EISDIR: "Choose another name: it is the name of a folder",
    errno.ENOENT: "Check the path",
    errno.ENAMETOOLONG: "Choose a shorter name",
}


def replace(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8, line ends as they are) at ``path`` at once. Raises :class:`OSError`; what was there before is then untouched."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def take_places(draft: Path, folder: Path, last: str) -> list[str]:
    """Move every file of a finished draft to its place in ``folder``, the one named ``last`` at the end; gives their names.

    All are flushed before the first is moved. Raises :class:`OSError`.
    """
    written = sorted(draft.iterdir(), key=lambda file: file.name == last)
    for file in written:
        flush(file)
        file.chmod(0o644)  # drafts are made private
    for file in written:
        file.replace(folder / file.name)
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


def trouble(error: BaseException) -> tuple[str, str]:
    """Why a file could not be written, and what to do: ``("the disk is full", "Free some space")``."""
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOSPC or "No space left" in str(error):  # safetensors has no errno
        return "the disk is full", REMEDIES[errno.ENOSPC]
    return str(getattr(error, "strerror", None) or error), REMEDIES.get(code or 0, "Choose another place")
