"""The home of every page that is written: one file, one look, and nothing asked of the network.

    page.html   the head, the title and the place of the rest
    page.css    the looks that all share: colours in light and dark, letters, tables, tokens, narrow screens
    page.js     what every script begins with: the data, elements made from text, colours, the theme, the address

    scripted(title, data, package, "trace.html", "trace.css", "trace.js")      its own words, looks and script behind the shared ones
    still(title, body, style)                                                  no script at all

The content security policy of a page lets its own style and script run, by their hashes, and nothing else. Data stand as JSON that no character can
leave; texts in HTML go through :func:`escape`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from math import isfinite
from typing import Any

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")
_THEME = '<button id="theme" type="button" class="plain">Theme: system</button>\n'
_SCRIPTS_OFF = "<noscript><p>This page draws what it shows with a script that stands inside it; scripts are switched off in this browser.</p></noscript>\n"


def scripted(title: str, data: Any, package: str, *files: str) -> str:
    """A page that is drawn by its script. ``title`` is text, ``data`` plain (what JSON can say, without NaN); both may hold any characters.

    ``files`` of the ``package``: words (.html, the inside of the body), looks (.css) and scripts (.js), each joined in this order behind the shared ones.
    """
    words, looks, script = ([_file(package, name) for name in files if name.endswith(kind)] for kind in (".html", ".css", ".js"))
    return _whole(title, _SCRIPTS_OFF + "\n".join(words), looks, [_file(__package__, "page.js"), *script], data)


def still(title: str, body: str, style: str = "") -> str:
    """A page without a script. ``body`` is HTML, in which every text went through :func:`escape`."""
    return _whole(title, body, [style], [], None)


def _whole(title: str, body: str, looks: list[str], scripts: list[str], data: Any) -> str:
    style, script = "\n".join([_file(__package__, "page.css"), *looks]), "\n".join(scripts)
    holes = {
        "title": escape(title),
        "allowed": f"style-src '{_hash(style)}'",
        "style": style,
        "theme": "",
        "body": body,
        "scripts": "",
    }
    if scripts:
        holes["allowed"] = f"script-src '{_hash(script)}'; {holes['allowed']}"
        holes["theme"] = _THEME
        holes["scripts"] = f'<script type="application/json" id="data">{as_json(data)}</script>\n<script>{script}</script>\n'
    # One pass: what is filled in is never searched for further holes.
    return re.sub(r"\{\{(\w+)\}\}", lambda m: holes[m[1]], _file(__package__, "page.html"))


def escape(text: str) -> str:
    """A text as HTML, also within an attribute. Characters that cannot be written or that would disturb what stands around them become visible."""
    return html.escape(seen(text), quote=True)


def seen(text: str) -> str:
    """The text with the code points of characters that have no shape, or turn what stands around them, in their place: ``‹U+202E›``."""
    return _UNSEEN.sub(lambda m: f"‹U+{ord(m[0]):04X}›", text)


def as_json(value: Any) -> str:
    """JSON that can stand inside a <script> element: no character of it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def short(x: float | None, digits: int = 4) -> float | None:
    """A number with so many significant digits; None for what JSON has no number for."""
    return float(f"{x:.{digits}g}") if x is not None and isfinite(x) else None


def printed(thing: Any) -> str:
    """What a terminal shows of ``thing``, as a notebook shows it."""
    return f'<pre style="line-height:1.3">{escape(str(thing))}</pre>'


def _file(package: str | None, name: str) -> str:
    return resources.files(package or "").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
