"""docs/sites.md is what the table of sites says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_written_from_the_table() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "sites_page.py"), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
