"""Files are there whole or not at all, and what goes wrong is said with what to do."""

import errno
import os

import pytest

from glassformer.core import files


def test_a_text_takes_the_place_of_another_at_once(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.replace(path, "one\r\ntwo ä\n")
    assert path.read_bytes() == "one\r\ntwo ä\n".encode()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, "three")
    assert path.read_bytes() == "one\r\ntwo ä\n".encode() and os.listdir(tmp_path) == ["a.txt"]


def test_a_draft_takes_its_places_with_the_description_last(tmp_path, monkeypatch):
    draft = tmp_path / "draft"
    draft.mkdir()
    for name in ("about.json", "b.bin", "c.bin"):
        (draft / name).write_text(name)
    (tmp_path / "b.bin").write_text("old")
    moved, rename = [], type(draft).replace
    monkeypatch.setattr(type(draft), "replace", lambda self, other: moved.append(self.name) or rename(self, other))
    assert files.take_places(draft, tmp_path, last="about.json") == ["b.bin", "c.bin", "about.json"] == moved
    assert (tmp_path / "b.bin").read_text() == "b.bin" and os.listdir(draft) == [".old.b.bin"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ("the disk is full", "Free some space")),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ("the disk is full", "Free some space")),
        (PermissionError(errno.EACCES, "Permission denied"), ("Permission denied", "Choose a folder that you may write to")),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), ("Not a directory", "Move what is in the way, or choose another place")),
        (OSError("strange"), ("strange", "Choose another place")),
    ],
)
def test_what_cannot_be_written_says_why_and_what_to_do(error, said):
    assert files.trouble(error) == said


def test_a_run_cannot_move():
    assert files.trouble(PermissionError(errno.EACCES, "Permission denied"), movable=False)[1] == "Make the folder writable"
    assert files.trouble(NotADirectoryError(errno.ENOTDIR, "Not a directory"), movable=False)[1] == "Move what is in the way"
    assert files.trouble(OSError(errno.EIO, "I/O error"), movable=False)[1] == "See that the folder is there and can be written"
