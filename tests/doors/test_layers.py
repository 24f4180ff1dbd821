"""Imports go down only; the contracts stand in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ROOT / "src" / "glassformer"


def test_import_layers_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_room_stands_in_the_contract_and_on_the_map() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    named = {room.strip(" ()") for level in contract["layers"] for room in level.split("|")} | set(contract["exhaustive_ignores"])
    rooms = {p.name for p in ROOMS.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= named
    the_map = (ROOT / "CONTRIBUTING.md").read_text()
    assert [room for room in sorted(rooms) if f"  {room}/" not in the_map] == []


def test_every_room_says_what_it_is_for() -> None:
    silent = [str(p.parent.relative_to(ROOT)) for p in ROOMS.rglob("__init__.py") if not p.read_text().lstrip().startswith('"""')]
    assert not silent, f"these rooms have no docstring in __init__.py: {silent}"
