"""A page that is one file: its looks, its script and its data stand in it, and it asks the network for nothing.

A template has holes, ``{{title}} {{style}} {{script}} {{data}}``, and ``{{style_hash}} {{script_hash}}`` for its content security policy, which
lets run what stands in the page and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from typing import Any


def fill(template: str, title: str, style: str, script: str, data: Any) -> str:
    """The page. ``title`` is text, ``data`` is plain (what JSON can say, without NaN); both may hold any characters."""
    holes = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": as_json(data),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
    }
    # One pass: what is filled in is never searched for further holes.
    return re.sub(r"\{\{(\w+)\}\}", lambda m: holes[m[1]], template)


def as_json(value: Any) -> str:
    """JSON that can stand inside a <script> element: no character of it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
