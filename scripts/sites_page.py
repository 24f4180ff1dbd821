"""Write docs/sites.md from the table in core/sites.py: ``python scripts/sites_page.py [--check]``."""

from __future__ import annotations

import sys
from pathlib import Path

from glassformer.core.sites import TABLE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sites.md"
WHERE = {
    "model": ("The model", ""),
    "block": ("A block", "blocks.{i}."),
    "attention": ("Attention (`attn`, and `cross` in a decoder that reads an encoder)", "blocks.{i}.attn."),
    "latent": ("Latent attention (besides those of attention)", "blocks.{i}.attn."),
    "feedforward": ("Feed-forward", "blocks.{i}.ffn."),
    "experts": ("Mixture of experts (a shared expert has the sites of its feed-forward under `experts.shared`)", "blocks.{i}.experts."),
    "norm": ("Norms (`norm1`, `norm2`, `norm_cross`, `norm1_post`…, `final_norm`, `attn.q_norm`, `attn.k_norm`, `attn.kv_norm`)", "blocks.{i}.norm1."),
}
HEAD = """# Sites

Every value that can be looked at or changed, declared once in `core/sites.py` (this page is written from it by `scripts/sites_page.py`).
`model.sites()` lists those of one model. In an encoder-decoder paths begin with `encoder.` or `decoder.`.

Axes: `b` batch, `t` query position, `s` key position, `h` head, `g` key/value head, `k` head size, `d` model width, `f` feed-forward width,
`v` vocabulary or classes, `e` expert, `c` chosen expert, `r` rank of a latent, `w` width of a factorised embedding, `1` an axis of size one.
"""


def page() -> str:
    """The whole page as Markdown."""
    lines = [HEAD]
    for kind, sites in TABLE.items():
        title, prefix = WHERE[kind]
        lines += [f"## {title}\n", "| path | axes | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{prefix}{s.name}` | `{s.axes}` | {s.meaning} |" for s in sites]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else f"{PAGE.name} is not what core/sites.py says: run python scripts/sites_page.py")
    PAGE.write_text(page(), encoding="utf-8")
