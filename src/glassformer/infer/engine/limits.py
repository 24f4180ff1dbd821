"""What fits: checked before anything runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from glassformer.core.errors import InputError

if TYPE_CHECKING:
    from .request import Job

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def check_ids(ids: list[int], model: Any) -> None:
    """Raise :class:`InputError` for a token that the model does not know."""
    spec = model.spec
    size = int(getattr(getattr(spec, "encoder", spec), "vocab_size", 2**63))
    for token in ids:
        if not 0 <= token < size:
            raise InputError(f"The prompt holds token {token}, but the vocabulary has {size} tokens: ids go from 0 to {size - 1}.")


def check_job(job: Job, model: Any, capacity: int) -> None:
    """Raise :class:`InputError` for a job that a slot of ``capacity`` tokens cannot hold, and :class:`SiteError` for a tap that meets nothing."""
    n, new = len(job.ids), job.row.limit
    need = n + new - 1  # the last new token is never read
    if need > capacity:
        raise InputError(
            f"The prompt has {n} tokens, and with {new} new ones {need} have to be held (the last one is not read), but this engine holds {capacity} "
            f"per request: shorten the prompt, ask for at most {max(0, capacity - n + 1)} new tokens, or make the engine with capacity={need}."
        )
    if job.source is not None and len(job.source) > capacity:
        raise InputError(f"The source has {len(job.source)} tokens, but this engine holds {capacity}: shorten it, or make the capacity larger.")
    if job.tap is not None:
        job.tap.check([site.path for site in model.sites()])


def slots_in(memory: str | int, each: int, most: int) -> int:
    """How many slots of ``each`` bytes there is ``memory`` for, at most ``most``. Raises :class:`InputError` if there is none for one."""
    said = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", str(memory))
    if said is None or said[2].upper() not in UNITS:
        raise InputError(f"Engine(memory={memory!r}): a number of bytes, or a text such as '2 GB' or '512 MiB'.")
    room = int(float(said[1]) * UNITS[said[2].upper()])
    if room < each:
        raise InputError(f"One slot takes {each:,} bytes, but memory={memory!r} is {room:,}: give more, or a smaller capacity, or cache_dtype='int8'.")
    return min(most, room // each)
