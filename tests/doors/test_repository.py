"""What is committed names no machine, no package host, and stays small."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 2_000_000

# Written in pieces, so that this file does not find itself.
MACHINE = re.compile("|".join(["/wo" + "rk/", "/ho" + "me/", "/ro" + "ot/", "/Use" + "rs/", "/op" + "t/", r"[A-Z]:\\Use" + r"rs"]))
HOSTS = re.compile("|".join(["py" + r"pi\.org", "python" + "hosted", r"download\.py" + "torch", "index" + "-url", "find" + "-links", r"npm" + r"js\.org"]))


def committed() -> list[Path]:
    """Files that git has or would take; everything but the usual build folders outside a git checkout."""
    try:
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return [ROOT / name for name in listed if (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        skipped = {".venv", ".git", "__pycache__", "build", "dist"}
        return [p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.relative_to(ROOT).parts)]


@pytest.mark.parametrize(("what", "pattern"), [("a machine's path", MACHINE), ("a package host", HOSTS)])
def test_no_committed_file_names_a_machine_or_a_package_host(what: str, pattern: re.Pattern[str]) -> None:
    found = []
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}: {line.strip()[:100]}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert not found, f"these lines name {what}:\n" + "\n".join(found)


def test_no_committed_file_is_large() -> None:
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in committed() if p.stat().st_size > MOST_BYTES}
    assert not large


def test_ci_runs_make_test_and_nothing_else() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test"]


def test_the_set_up_installs_torch_before_what_depends_on_it() -> None:
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert [("$(TORCH)" in line, "-e" in line) for line in lines] == [(True, False), (False, True), (False, True)]
