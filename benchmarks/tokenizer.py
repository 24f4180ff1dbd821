"""How fast text becomes ids, and how long learning a vocabulary takes.

    python benchmarks/tokenizer.py [--data DIR] [--megabytes 16] [--vocab-size 32000] [--rounds 5]

One byte-level BPE is trained on the books of ``DIR`` (``books/train.txt.xz``; by default $GLASSFORMER_DATA, or ``../shared/data`` beside the
repository). Then the same text goes through each contender in turn, round after round, so that a busy moment of the machine hits
all of them; the table has medians and the range over the rounds. Before anything is timed, the ids are compared.
"""

from __future__ import annotations

import argparse
import datetime
import lzma
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from glassformer.text import Tokenizer, train
from glassformer.text.engines import n_threads

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = 20_000
"""Characters of a document where a list of documents is encoded: what a web page or a chapter has."""


def main() -> None:
    given = _arguments()
    text = lzma.decompress((given.data / "books" / "train.txt.xz").read_bytes()).decode("utf-8")
    learnt = text.encode("utf-8")[:50_000_000].decode("utf-8", errors="ignore")
    start = time.perf_counter()
    bpe = train("bpe", texts=_cut(learnt, 1 << 20), vocab_size=given.vocab_size)
    training = time.perf_counter() - start
    sample = text[: given.megabytes * 1_000_000]
    documents = _cut(sample, DOCUMENT)
    size = len(sample.encode("utf-8")) / 1e6
    contenders = _contenders(bpe, sample, documents)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    _print(bpe, training, len(learnt.encode("utf-8")) / 1e6, size, seconds)


def _contenders(bpe: Tokenizer, sample: str, documents: list[str]) -> dict[str, Callable[[], object]]:
    library = bpe.library
    expected = [encoding.ids for encoding in library.encode_batch_fast(documents)]
    assert bpe.engine == "tiktoken", bpe.engine_reason
    assert bpe.encode_batch(documents) == expected, "the ids differ"
    assert bpe.encode(sample) == bpe.encode_to_array(sample).tolist(), "the ids differ"
    characters, raw = train("characters", texts=[sample]), train("bytes")
    assert characters.decode(characters.encode(sample[:100_000])) == sample[:100_000]
    return {
        "glassformer bpe, list of documents": lambda: bpe.encode_batch(documents),
        "tokenizers bpe, encode_batch_fast": lambda: library.encode_batch_fast(documents),
        "tokenizers bpe, encode_batch": lambda: library.encode_batch(documents),
        "glassformer bpe, one long text": lambda: bpe.encode(sample),
        "glassformer bpe, one long text to an array": lambda: bpe.encode_to_array(sample),
        "glassformer characters, to an array": lambda: characters.encode_to_array(sample),
        "glassformer bytes, to an array": lambda: raw.encode_to_array(sample),
    }


def _cut(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def _print(bpe: Tokenizer, training: float, learnt: float, size: float, seconds: dict[str, list[float]]) -> None:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "tiktoken", "numpy"))
    print(f"{datetime.date.today()}, {_processor()}, {n_threads()} cores, Python {platform.python_version()}, {libraries}.")
    print(f"Same ids: yes. Learning {bpe.vocab_size:,} pieces from {learnt:.0f} MB: {training:.1f} s.\n")
    print(f"| encoding {size:.0f} MB of books | MB/s (median) | range |")
    print("| --- | ---: | ---: |")
    for name, times in seconds.items():
        print(f"| {name} | {size / statistics.median(times):.1f} | {size / max(times):.1f} to {size / min(times):.1f} |")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("GLASSFORMER_DATA", ROOT.parent / "shared" / "data")))
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if not (given.data / "books" / "train.txt.xz").exists():
        parser.error(f"there is no books/train.txt.xz in {given.data}: give the folder with --data or GLASSFORMER_DATA")
    return given


if __name__ == "__main__":
    main()
