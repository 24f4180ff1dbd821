"""Training a tokenizer: statistics of a text, no model and no gradient.

=============  ==============================================================================================================================
bpe            starts from the 256 bytes; counts which two neighbouring pieces stand together most often within words, makes the pair a new
               piece, and repeats until the vocabulary is full. To encode, the same merges are done in the order in which they were learnt.
               Sennrich et al. 2016 (arXiv 1508.07909); on bytes: Radford et al. 2019
wordpiece      grows like BPE; encodes each word by the longest piece that fits, from left to right; parts within a word begin with ``##``.
               Schuster and Nakajima 2012; Devlin et al. 2018 (arXiv 1810.04805)
unigram        starts from too many pieces, fits p(piece) by expectation maximisation, drops those that the likelihood misses least, and repeats;
               encodes by the most probable cut (Viterbi). Kudo 2018 (arXiv 1804.10959)
bytes          the 256 bytes, nothing to learn
characters     each character of the text
words          each word of the text (letters and digits together, signs apart)
=============  ==============================================================================================================================

All of it is learnt from the counts of the corpus before any model exists, not together with the model; the finished tokenizer
cuts the same text in the same way every time. (The ``tokenizers`` library trains WordPiece by frequency of pairs, as BPE; the original scored
pairs by the likelihood that a merge gains.)
"""

from __future__ import annotations

import codecs
import gzip
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..core.errors import TokenizerError, did_you_mean
from ..core.fields import typed
from .alphabet import CHARACTER_OF_BYTE
from .patterns import PATTERNS
from .special import USUAL
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

KINDS = ("bpe", "wordpiece", "unigram", "bytes", "characters", "words")
CHUNK = 1 << 20
MOST = 10_000_000  # tokens in a vocabulary; the trainers set memory aside for as many as are asked for


@typed(TokenizerError)
def train(
    kind: str,
    files: str | Path | Iterable[str | Path] | None = None,
    *,
    texts: Iterable[str] | None = None,
    vocab_size: int | None = None,
    special: str | Iterable[str] = (),
    roles: Mapping[str, str] | None = None,
    pattern: str = "gpt2",
    lowercase: bool = False,
    min_frequency: int = 2,
) -> Tokenizer:
    """Learn a tokenizer from files (UTF-8, also ``.gz`` and ``.xz``) or from strings.

    ``kind`` is one of :data:`KINDS`. ``vocab_size`` counts special tokens too; by default 32,000 for bpe, wordpiece and unigram and all there are for
    characters and words. ``special`` are spellings such as ``<|endoftext|>``: where they stand in the corpus they separate texts and are not learnt.
    An ``<unk>`` (any usual spelling, or the role ``unk``) makes characters and words that training never saw encodable; wordpiece and unigram
    always have one. ``roles`` names what a special token is for if its spelling does not say it: ``{"eos": "###"}``.
    ``pattern`` (bpe) is how a text is cut into words first, a name in :data:`~glassformer.text.patterns.PATTERNS`. ``lowercase`` is for wordpiece.
    ``min_frequency`` is how often a pair or word must occur to become a piece (bpe, wordpiece, words).

    The same corpus and settings give the same tokenizer, except for wordpiece and unigram, where the library leaves equal counts to chance:
    keep the file. Unigram is slow to learn, about a minute for 10 MB.
    Raises TokenizerError for an unknown kind or pattern, a vocabulary that is too small, and files that are missing, empty or not UTF-8.
    """
    if kind not in KINDS:
        raise TokenizerError(f"there is no tokenizer of kind {kind!r}: the kinds are {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    if vocab_size is not None and not 1 <= vocab_size <= MOST:
        raise TokenizerError(f"vocab_size={vocab_size} is no size that a tokenizer can have: it lies between 1 and {MOST:,}.")
    roles = dict(roles or {})
    special = [special] if isinstance(special, str) else list(dict.fromkeys(special))
    for role, spelling in roles.items():
        if spelling not in special:
            raise TokenizerError(f"the {role} token {spelling!r} is not among the special tokens {special}: add it to special=[…].")
    if "" in special:
        raise TokenizerError("a special token has the empty spelling '': give it letters, such as '<|endoftext|>'.")
    unk = roles.get("unk") or next((name for name in USUAL["unk"] if name in special), None)
    if kind == "bytes":
        return Tokenizer(_bytes(special, vocab_size), roles)
    corpus = _Corpus(files, texts, special)
    if kind == "bpe":
        library = _bpe(corpus, vocab_size or 32_000, special, pattern, min_frequency)
    elif kind == "characters":
        library = _characters(corpus, vocab_size, special, unk)
    elif kind == "words":
        library = _words(corpus, vocab_size, special, unk, min_frequency if vocab_size or unk else 1)
    else:
        unk = unk or {"wordpiece": "[UNK]", "unigram": "<unk>"}[kind]
        special = special if unk in special else [unk, *special]
        learn = _wordpiece if kind == "wordpiece" else _unigram
        library = learn(corpus, vocab_size or 32_000, special, unk, {"lowercase": lowercase, "min_frequency": min_frequency})
    if not corpus.seen:
        raise TokenizerError("there is no text to train on: what was given is empty. Give files or texts with words in them.")
    return Tokenizer(library, roles)


# ---------------------------------------------------------------------------------------------------------------------- the kinds


def _bpe(corpus: _Corpus, vocab_size: int, special: list[str], pattern: str, min_frequency: int) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if pattern not in PATTERNS:
        raise TokenizerError(f"there is no pattern {pattern!r}: the patterns are {', '.join(PATTERNS)}.{did_you_mean(pattern, PATTERNS)}")
    _enough(vocab_size, 256, special, "byte-level BPE starts from the 256 bytes")
    library = tokenizers.Tokenizer(models.BPE())
    if pattern == "gpt2":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern].json), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), min_frequency=min_frequency, initial_alphabet=list(CHARACTER_OF_BYTE), show_progress=False
    )
    _learn(library, corpus, trainer)
    library.add_special_tokens(_declared(special))  # behind the pieces, so that no id depends on how many there are
    return library


def _wordpiece(corpus: _Corpus, vocab_size: int, special: list[str], unk: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.WordPiece(unk_token=unk))
    library.normalizer = normalizers.BertNormalizer(lowercase=settings["lowercase"])
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=False)
    _enough(vocab_size, 1, special, "the vocabulary must hold more than its special tokens")
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, min_frequency=settings["min_frequency"], special_tokens=_declared(special), show_progress=False)
    _learn(library, corpus, trainer)
    return library


def _unigram(corpus: _Corpus, vocab_size: int, special: list[str], unk: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.Unigram())
    # Line feeds and signs stand alone, as in SentencePiece, or most pieces would be a word with the comma behind it (and training five times slower).
    line_feed = pre_tokenizers.Split(tokenizers.Regex(r"\n"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([line_feed, pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()])
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    _enough(vocab_size, 1, special, "the vocabulary must hold more than its special tokens")
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=_declared(special), unk_token=unk, show_progress=False)
    _learn(library, corpus, trainer)
    return library


def _bytes(special: list[str], vocab_size: int | None) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if vocab_size not in (None, 256 + len(special)):
        raise TokenizerError(f"a byte tokenizer has 256 tokens and {len(special)} special ones, not {vocab_size}: leave vocab_size out.")
    library = tokenizers.Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(_declared(special))
    return library


def _characters(corpus: _Corpus, vocab_size: int | None, special: list[str], unk: str | None) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from .engines import EACH_CHARACTER_REGEX

    counts: Counter[str] = Counter()
    for text in corpus:
        counts.update(text)
    kept = [character for character, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if character not in special]
    if vocab_size is not None and vocab_size < len(kept) + len(special):
        if unk is None:
            raise TokenizerError(
                f"the text has {len(kept)} characters and {len(special)} special tokens, more than vocab_size={vocab_size}: "
                f"leave vocab_size out, or give special=['<unk>'] to stand for the rare ones."
            )
        _enough(vocab_size, 1, special, "the vocabulary must hold more than its special tokens")
        kept = kept[: vocab_size - len(special)]
    vocab = {piece: id for id, piece in enumerate([*sorted(kept), *special])}
    library = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token=unk or _NOBODY))
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(EACH_CHARACTER_REGEX), "isolated")
    library.decoder = decoders.Fuse()
    library.add_special_tokens(_declared(special))
    return library


_NOBODY = "<no unknown characters>"
"""The format wants a name for the unknown token even if there is none; one that is not in the vocabulary makes the unknown an error."""


def _words(corpus: _Corpus, vocab_size: int | None, special: list[str], unk: str | None, min_frequency: int) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.WordLevel(unk_token=unk or _NOBODY))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    if vocab_size is not None:
        _enough(vocab_size, 1, special, "the vocabulary must hold more than its special tokens")
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size or 1 << 40, min_frequency=min_frequency, special_tokens=_declared(special), show_progress=False)
    _learn(library, corpus, trainer)
    return library


def _enough(vocab_size: int, least: int, special: list[str], why: str) -> None:
    if vocab_size < least + len(special):
        raise TokenizerError(f"vocab_size={vocab_size} is less than {least} and {len(special)} special tokens: {why}. Take {least + len(special)} or more.")


def _declared(special: list[str]) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(spelling, special=True, normalized=False) for spelling in special]


def _learn(library: tokenizers.Tokenizer, corpus: Iterable[str], trainer: Any) -> None:
    try:
        library.train_from_iterator(corpus, trainer)
    except TokenizerError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # the library's Rust side panics on some tiny corpora
            raise TokenizerError(f"the tokenizers library could not learn from this text: {error}. Give it more text, or another vocab_size.") from None
        raise


# ---------------------------------------------------------------------------------------------------------------------- the corpus


class _Corpus:
    """The texts to learn from, in chunks, without the special tokens that stand in them."""

    def __init__(self, files: str | Path | Iterable[str | Path] | None, texts: Iterable[str] | None, special: list[str]) -> None:
        if (files is None) == (texts is None):
            raise TokenizerError("a tokenizer learns from files or from texts: give one of the two.")
        self._files = [] if files is None else [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
        self._texts = [texts] if isinstance(texts, str) else texts or []
        self._special = re.compile("|".join(re.escape(s) for s in sorted(special, key=len, reverse=True))) if special else None
        for file in self._files:  # before an hour of work, not after
            if not file.is_file():
                if file.is_dir():
                    raise TokenizerError(f"{file} is a folder: give the files in it.")
                raise TokenizerError(f"there is no file {file} to train on: check the path.")
        self.seen = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            yield from self._between(text)
        for file in self._files:
            for chunk in _chunks(file):
                yield from self._between(chunk)

    def _between(self, text: str) -> Iterator[str]:
        for part in self._special.split(text) if self._special else (text,):
            if part:
                self.seen += len(part)
                yield part


def _opened(file: Path) -> IO[bytes]:
    if file.suffix == ".xz":
        return lzma.open(file)
    if file.suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    return file.open("rb")


def _chunks(file: Path) -> Iterator[str]:
    """The text of a file, a megabyte at a time, cut in front of a space so that no word is cut."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    kept, read = "", 0
    try:
        with _opened(file) as stream:
            while block := stream.read(CHUNK):
                text = kept + decoder.decode(block)
                read += len(block)
                cut = text.rfind(" ")
                while cut > 0 and text[cut - 1].isspace():
                    cut = text.rfind(" ", 0, cut)
                if cut > 0:
                    yield text[:cut]
                    kept = text[cut:]
                else:
                    kept = text
            yield kept + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:02X} at about {read + error.start:,}"
        raise TokenizerError(f"{file} is not UTF-8: {byte} is part of no character. Convert the file to UTF-8.") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}. Check its permissions and that it is whole.") from None
