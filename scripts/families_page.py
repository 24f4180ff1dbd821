"""Write docs/families.md from what the family tests found.

GLASSFORMER_FAMILIES=build/families.jsonl python -m pytest tests/weights/families
python scripts/families_page.py build/families.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from glassformer.weights.families.gguf_fields import architecture_of
from glassformer.weights.family import families

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
HEAD = """# Families

The kinds of published checkpoints that `glassformer.weights.open` opens. Every figure comes from the tests in `tests/weights/families` (this page is
written from their results by `scripts/families_page.py`): tiny random models of odd shapes, made by `transformers` {transformers} with torch {torch},
saved, opened, compared, given back. The error is the largest absolute difference of any logit (or last state) over all variants, in float32; in each
variant the stream after every layer and every attention pattern agree as well, and decoders generate the same 32 tokens with the cache.
Sites: how many values of the tested model can be recorded and edited. Export: written by us, loaded by `from_pretrained`, every tensor equal to the bit.

| family | `model_type` | variants | largest error | of outputs up to | sites | export | GGUF |
| --- | --- | ---: | ---: | ---: | ---: | :---: | :---: |
"""
TAIL = """
GGUF: the architecture's name there, which is read and written; then the largest difference of the outputs after a way through a file in F32, and how many
of the odd variants the format can say (it takes some widths of heads and patterns of windows for granted; `tests/weights/test_gguf_families.py` and
`test_export_gguf.py` hold each architecture in its usual shape, against llama.cpp's own logits where that library is installed).
Quantised types: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS and MXFP4 are read; F32, F16, BF16, Q8_0 and Q4_0 are written.

A family is a file in `src/glassformer/weights/families/`: two functions between config.json and a Spec that undo each other, and one table of rules
between names that is read from both sides. What a config.json says and the family does not understand is an error and not a guess.
"""


def page(lines: list[dict[str, Any]]) -> str:
    """The whole page as Markdown. Raises SystemExit for a family without a result."""
    rows = []
    for family in sorted(set(families().values()), key=lambda f: f.name.lower()):
        mine = [r for r in lines if r["family"] == family.name]
        if not mine:
            raise SystemExit(f"No test has a result for {family.name}: run all of tests/weights/families first.")
        kinds = ", ".join(f"`{k}`" for k in family.model_types)
        error, largest, sites = max(r["error"] for r in mine), max(r["largest"] for r in mine), max(r["sites"] for r in mine)
        through = [r["gguf"] for r in mine if r["gguf"] is not None]
        name = architecture(family)
        gguf = "no" if name is None else f"`{name}`" + (f", {max(through):.0e} ({len(through)} of {len(mine)})" if through else "")
        export = "yes" if all(r["exported"] for r in mine) else "no"
        rows.append(f"| {family.name} | {kinds} | {len({r['test'] for r in mine})} | {error:.1e} | {largest:.1f} | {sites} | {export} | {gguf} |")
    versions = {k: sorted({r[k] for r in lines})[-1] for k in ("transformers", "torch")}
    return HEAD.format(**versions) + "\n".join(rows) + "\n" + TAIL


def architecture(family: Any) -> str | None:
    """What GGUF calls the family, or None if it has no name for it."""
    try:
        return str(architecture_of(family.model_types).name)
    except StopIteration:
        return None


if __name__ == "__main__":
    found = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"wrote {PAGE}")
