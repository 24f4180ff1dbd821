"""docs/families.md names every family, with its figures."""

from __future__ import annotations

import re
from pathlib import Path

from glassformer.weights.family import families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def test_the_page_has_a_row_for_every_family_and_no_error_above_the_bound() -> None:
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [^|]+ \| [^|]+ \| [0-9]", line)]
    assert {row[1].strip() for row in rows} == {f.name for f in families().values()}
    kinds = {kind for row in rows for kind in re.findall(r"`(.+?)`", row[2])}
    assert kinds == set(families())
    assert all(float(row[4]) <= 1e-5 and int(row[6]) > 0 and row[7].strip() == "yes" for row in rows)
