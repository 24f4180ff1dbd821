"""The tokenizer: text to numbers and back, with the place of every token in the text.

What comes back from ``decode(encode(text))``:

===========================  ====================================================================================================
bpe (byte-level), bytes      the text itself, whatever it holds
characters                   the text itself, if the tokenizer knows its characters (unknown ones become ``<unk>`` or an error)
words                        words with one space between them: the spaces and line feeds of the text are lost, unknown words too
wordpiece                    the same, and words are put together from their parts; upper case and accents are lost if it was so trained
unigram                      the text, but a space at its very beginning and characters that were never seen in training are lost
===========================  ====================================================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import TokenizerError
from ..core.fields import described, typed
from ..core.files import replace
from .alphabet import bytes_of, readable
from .special import FOR_UNKNOWN, ROLES, roles_in_config, usual_roles

if TYPE_CHECKING:
    import numpy as np
    import tokenizers
    from numpy.typing import NDArray

    from .chat import ChatTemplate
    from .engines import Engine

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


class Piece(NamedTuple):
    """One token of a text: ``text[start:end]`` is what it covers (the whole character, if it is one of several tokens of a character)."""

    id: int
    text: str
    """As :meth:`Tokenizer.piece` shows it."""
    start: int
    end: int


class Tokenizer:
    """Text to token ids and back. Made by :meth:`load` or :func:`~glassformer.text.train`, or around a ``tokenizers.Tokenizer`` of your own.

    The file format is the ``tokenizer.json`` of the ``tokenizers`` library, so ``transformers`` opens what this class saves, and this class
    opens what others saved. Truncation and padding that such a file may ask for are switched off: ``encode`` gives all tokens of
    the text and nothing else. ``roles`` says which special token ends a text and so on: ``{"eos": "<|endoftext|>"}``; where it
    is silent the usual spellings decide. ``chat_template`` is the Jinja source that :meth:`chat` follows; it takes no part in ``==``.

    A Tokenizer does not change once it is made; threads may share it, and it can be pickled.
    """

    def __init__(self, library: tokenizers.Tokenizer, roles: Mapping[str, str] | None = None, *, chat_template: str | None = None) -> None:
        library = type(library).from_str(library.to_str())
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._json = library.to_str()
        config: dict[str, Any] = json.loads(self._json)
        self._vocab: dict[str, int] = library.get_vocab(with_added_tokens=True)
        self._pieces = {id: piece for piece, id in self._vocab.items()}
        self.special: dict[str, int] = {t["content"]: t["id"] for t in sorted(config["added_tokens"], key=lambda t: t["id"]) if t["special"]}
        self.given_roles = _checked(roles or {}, self._vocab)
        self.roles: dict[str, str] = self._roles(config["model"]) | self.given_roles
        self._added: dict[int, str] = {token["id"]: token["content"] for token in config["added_tokens"]}
        self.kind = _kind(config)
        self.chat_template = chat_template

    def _roles(self, model: Mapping[str, Any]) -> dict[str, str]:
        # In a vocabulary of merges "</s>" may be a piece of HTML; elsewhere such a spelling is a control token even if nobody declared it.
        roles = usual_roles(self.special if model["type"] == "BPE" else [*self.special, *self._vocab])
        unk = self._pieces.get(model["unk_id"]) if model.get("unk_id") is not None else model.get("unk_token")
        return roles | {"unk": unk} if unk in self._vocab else roles

    # ------------------------------------------------------------------------------------------------------------------ what it is

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs."""
        return max(self._pieces, default=-1) + 1

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, special={list(self.special)[:6]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.hash == other.hash and self.roles == other.roles

    def __hash__(self) -> int:
        return hash(self.hash)

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[str, dict[str, str], str | None]]:
        return _from_json, (self._json, self.given_roles, self.chat_template)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, in hex: equal for two tokenizers exactly if their files say the same."""
        canonical = json.dumps(json.loads(self._json), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def vocabulary_hash(self, size: int | None = None) -> str:
        """SHA-256 of the pieces and their ids alone (of the ids below ``size``), in hex: equal for two tokenizers whose ids mean the same."""
        pieces = sorted((id, piece) for piece, id in self._vocab.items() if size is None or id < size)
        return hashlib.sha256(json.dumps(pieces, ensure_ascii=False).encode("utf-8")).hexdigest()

    @property
    def library(self) -> tokenizers.Tokenizer:
        """A copy of the ``tokenizers.Tokenizer`` inside, for whatever this class does not offer."""
        return type(self._library).from_str(self._json)

    @cached_property
    def _chosen(self) -> tuple[Engine, str]:
        from .engines import engine_for

        return engine_for(self._library, json.loads(self._json))

    @property
    def engine(self) -> str:
        """What encodes: ``"tiktoken"``, ``"table"``, or ``"tokenizers"`` where neither is sure to give the same ids."""
        return self._chosen[0].name

    @property
    def engine_reason(self) -> str:
        """Why it is this engine, as part of a sentence."""
        return self._chosen[1]

    def role_id(self, role: str) -> int | None:
        """The id of the token with a role (``eos``, ``bos``, ``pad``, ``unk``, ``mask``, ``cls``, ``sep``), or ``None``."""
        return self._vocab.get(self.roles[role]) if role in self.roles else None

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or ``None``."""
        return self.role_id("eos")

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, or ``None``."""
        return self.role_id("bos")

    @property
    def pad_id(self) -> int | None:
        """The token that fills a batch, or ``None``."""
        return self.role_id("pad")

    @property
    def unk_id(self) -> int | None:
        """The token that stands for what the vocabulary lacks, or ``None``."""
        return self.role_id("unk")

    @property
    def mask_id(self) -> int | None:
        """The token that hides another, or ``None``."""
        return self.role_id("mask")

    # ------------------------------------------------------------------------------------------------------------------ text to ids

    def encode(self, text: str, *, allow_special: bool = True, add_special: bool = False) -> list[int]:
        """The ids of a text.

        ``allow_special=True`` reads the spelling of a special token in the text as that token, as ``tokenizers`` does. With ``False``
        it is text like any other: **use it for text that strangers wrote**, or they can end your document and begin another.
        ``add_special=True`` puts around the text what the file prescribes (``[CLS] … [SEP]``, ``<s>``), if it prescribes anything.

        Raises TokenizerError for a lone surrogate, and for an unknown character or word if there is no ``<unk>``.
        """
        return self.encode_batch([text], allow_special=allow_special, add_special=add_special)[0]

    def prompt(self, text: str) -> list[int]:
        """The ids of a text for a model to read: with what the file puts around a text (``<s> …``, ``[CLS] … [SEP]``), if it prescribes anything."""
        return self.encode(text, add_special=True)

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = True, add_special: bool = False) -> list[list[int]]:
        """The ids of each text, on all cores."""
        for text in texts:
            _check_text(text)
        try:
            rows = self._chosen[0].batch(texts, allow_special)
        except TokenizerError:
            raise
        except Exception as error:
            raise self._unknown(texts, error) from None
        if add_special:
            before, after = self._around
            return [[*before, *row, *after] for row in rows]
        return rows

    def encode_to_array(self, text: str, *, allow_special: bool = True, add_special: bool = False) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """The ids of a text as an array [t] of uint16, or of uint32 if the vocabulary needs it; for writing data sets."""
        import numpy as np

        _check_text(text)
        try:
            ids = self._chosen[0].array(text, allow_special)
        except TokenizerError:
            raise
        except Exception as error:
            raise self._unknown([text], error) from None
        if add_special:
            before, after = self._around
            ids = np.concatenate([np.array(before, dtype=ids.dtype), ids, np.array(after, dtype=ids.dtype)])
        return ids.astype(np.uint16) if self.vocab_size <= 1 << 16 else ids

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        known = self._pieces[next(iter(self._pieces))] if self.kind in ("characters", "words") else "a"
        whole = self._library.encode(known, add_special_tokens=True)
        inside = [at for at, added in enumerate(whole.special_tokens_mask) if not added]
        return (whole.ids[: inside[0]], whole.ids[inside[-1] + 1 :]) if inside else (whole.ids, [])

    def _unknown(self, texts: Iterable[str], error: Exception) -> TokenizerError:
        cut = self._library.pre_tokenizer
        for text in texts if cut is not None and self.unk_id is None else ():
            for word, (start, _) in cut.pre_tokenize_str(text):
                if word not in self._vocab:
                    return TokenizerError(
                        f"the word {word!r} at position {start} of the text is none of the {len(self._vocab)} that this tokenizer knows: {FOR_UNKNOWN}."
                    )
        return TokenizerError(f"the tokenizers library could not encode the text: {error}. Check the tokenizer's unk_token.")

    @cached_property
    def _chat(self) -> ChatTemplate:
        from .chat import ChatTemplate

        if self.chat_template is None:
            raise TokenizerError(
                "this tokenizer has no chat template: its model is not made for conversation, or the file is missing. Encode plain text, put the "
                "checkpoint's chat_template.jinja beside tokenizer.json, or give Tokenizer(…, chat_template=…) one."
            )
        return ChatTemplate(self.chat_template, {f"{role}_token": spelling for role, spelling in (self.given_roles or self.roles).items()})

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """The ids of a conversation, as this tokenizer's chat template writes it: :meth:`encode` of :meth:`chat_text`.

        ``messages`` are ``[{"role": "user", "content": "Hi"}]``; :meth:`~glassformer.text.chat.ChatTemplate.render` says what else may be given.
        Special tokens that a message spells out count as such, as everywhere in the field: leave them out of what strangers write.

        Raises TokenizerError if there is no template, and for messages that it refuses.
        """
        return self.encode(self.chat_text(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables))

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """The text of a conversation, special tokens spelled out."""
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)

    # ------------------------------------------------------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids; the table at the top of this module says for which kinds it is the very text that was encoded.

        Bytes that are no whole character become U+FFFD. Special tokens are spelled out unless ``skip_special`` leaves them out.
        Raises TokenizerError for an id that is not in the vocabulary.
        """
        try:
            ids = [int(id) for id in ids]
        except (TypeError, ValueError):
            raise TokenizerError(f"decode takes token ids in one row, such as [5, 3]; {described(type(ids))} of something else was given.") from None
        if self._bytes is not None:
            return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")
        self._check_ids(ids)
        if self.kind == "characters":
            hidden = frozenset(self.special.values()) if skip_special else frozenset()
            return "".join(self._pieces[id] for id in ids if id not in hidden)
        return str(self._library.decode(ids, skip_special_tokens=skip_special))

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The UTF-8 bytes of ids; for byte-level kinds also where they end within a character (a stream cut anywhere)."""
        if self._bytes is None:
            return self.decode(ids, skip_special=skip_special).encode("utf-8")
        hidden = frozenset(self.special.values()) if skip_special else frozenset()
        ids = [id for id in map(int, ids) if id not in hidden]
        try:
            return b"".join([self._bytes[id] for id in ids])
        except KeyError:
            self._check_ids(ids)
            raise

    @cached_property
    def _bytes(self) -> dict[int, bytes] | None:
        """The bytes of each token of a byte-level vocabulary; added tokens are spelled as they are."""
        if self.kind not in ("bpe", "bytes"):
            return None
        table = {id: bytes_of(piece) for piece, id in self._vocab.items()}
        return {id: raw if raw is not None and id not in self._added else self._pieces[id].encode("utf-8") for id, raw in table.items()}

    def piece(self, id: int) -> str:
        """A token as a person reads it: ``" the"``, ``"##ing"``, ``"▁the"``; bytes that are only a part of a character as ``"⟨F0 9F⟩"``."""
        self._check_ids([id])
        return readable(self._bytes[id]) if self._bytes is not None else self._pieces[id]

    def offsets(self, text: str, *, allow_special: bool = True) -> list[Piece]:
        """Every token of a text with the characters that it covers, in the order and with the ids of :meth:`encode`."""
        ids = self.encode(text, allow_special=allow_special)
        spans = self._spans_by_length(text, ids)
        if spans is None:
            from .engines import Library

            encoding = Library(self._library).reading(allow_special).encode(text, add_special_tokens=False)
            ids, spans = encoding.ids, encoding.offsets
        return [Piece(id, self.piece(id), start, end) for id, (start, end) in zip(ids, spans, strict=True)]

    def _spans_by_length(self, text: str, ids: list[int]) -> list[tuple[int, int]] | None:
        """Where tokens lie if they are the text cut up: from their lengths alone; ``None`` if they are not."""
        import numpy as np

        if self._bytes is not None:
            raw = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
            character = np.append(np.cumsum((raw & 0xC0) != 0x80), 0) - 1  # the character that each byte belongs to; the last entry is for an empty text
            lengths = [len(self._bytes[id]) for id in ids]
        elif self.kind == "characters":
            character = np.arange(len(text) + 1)
            lengths = [len(self._pieces[id]) if id in self._added and id != self.unk_id else 1 for id in ids]
        else:
            return None
        ends = np.cumsum(lengths, dtype=np.int64)
        if not ids or int(ends[-1]) != len(character) - 1 or min(lengths) == 0:
            return None if ids else []
        starts = ends - np.array(lengths)
        return list(zip(character[starts].tolist(), (character[ends - 1] + 1).tolist(), strict=True))

    def _check_ids(self, ids: Iterable[int]) -> None:
        for id in ids:
            if id not in self._pieces:
                raise TokenizerError(
                    f"the id {id} is not in this vocabulary of {len(self._pieces)} tokens (0 to {self.vocab_size - 1}): "
                    f"the ids come from another tokenizer, or from a model with a larger output than its vocabulary."
                )

    # ------------------------------------------------------------------------------------------------------------------ files

    @typed(TokenizerError)
    def save(self, path: str | Path) -> Path:
        """Write ``tokenizer.json``, at once or not at all, and return its path.

        ``path`` is a folder, or a file that ends in ``.json``. The roles go into ``tokenizer_config.json`` beside it, where ``transformers``
        looks for them; what else that file says stays. A single file gets this neighbour only if roles were given explicitly.
        A chat template goes into ``chat_template.jinja`` there.
        """
        path = Path(path)
        alone = path.suffix == ".json" and not path.is_dir()
        folder = path.parent if alone else path
        target = path if alone else path / FILE
        folder.mkdir(parents=True, exist_ok=True)
        replace(target, self._library.to_str(pretty=True))
        if self.chat_template is not None:
            replace(folder / TEMPLATE, self.chat_template)
        if self.given_roles or not alone:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **_config_in(folder)}
            if self.chat_template is not None:
                config.pop("chat_template", None)
            config = {key: value for key, value in config.items() if key not in {f"{role}_token" for role in ROLES}}
            replace(folder / CONFIG, json.dumps(config | {f"{role}_token": spelling for role, spelling in self.roles.items()}, indent=2, ensure_ascii=False))
        return target

    @classmethod
    @typed(TokenizerError)
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a ``tokenizer.json``, or the folder that holds one, whoever made it; roles come from ``tokenizer_config.json`` beside it,
        the chat template from ``chat_template.jinja`` or from there.

        Raises TokenizerError if the file is missing, is not JSON, or holds no tokenizer.
        """
        import tokenizers

        path = Path(path)
        file = path / FILE if path.is_dir() else path
        text = _read(file, path)
        try:
            config = json.loads(text)
        except ValueError as error:
            raise TokenizerError(f"{file} is not JSON ({error}): it is damaged or another kind of file; copy it again, or give the {FILE}.") from None
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise TokenizerError(
                f"{file} is JSON but no tokenizer: it has no 'model'. Give the {FILE} of the 'tokenizers' format, not another file of the folder."
            )
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise TokenizerError(f"the tokenizers library {tokenizers.__version__} cannot read {file}: {error}. A newer version of it may.") from None
        vocab = library.get_vocab(with_added_tokens=True)
        beside = _config_in(file.parent)
        return cls(
            library,
            {role: name for role, name in roles_in_config(beside).items() if name in vocab},
            chat_template=_template_in(file.parent, beside),
        )


def _from_json(text: str, roles: Mapping[str, str], chat_template: str | None = None) -> Tokenizer:
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(text), roles, chat_template=chat_template)


def _kind(config: Mapping[str, Any]) -> str:
    from .engines import is_byte_level, is_bytes, is_characters

    if is_bytes(config):
        return "bytes"
    if is_characters(config):
        return "characters"
    if config["model"]["type"] == "BPE":
        return "bpe" if is_byte_level(config) else "bpe (characters)"
    return {"WordPiece": "wordpiece", "Unigram": "unigram", "WordLevel": "words"}[config["model"]["type"]]


def _checked(roles: Mapping[str, str], vocab: Mapping[str, int]) -> dict[str, str]:
    for role, spelling in roles.items():
        if role not in ROLES:
            raise TokenizerError(f"there is no role {role!r} for a special token: the roles are {', '.join(ROLES)}.")
        if spelling not in vocab:
            raise TokenizerError(f"the {role} token {spelling!r} is not in the vocabulary: name it in special=[…] when you train.")
    return dict(roles)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"a tokenizer encodes str, and this is {type(text).__name__}: decode bytes first, join lists or use encode_batch.")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X} at position {error.start}, which is half a character and no text: "
            f"read the file as UTF-8, or repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None


def _read(file: Path, asked: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        older = [name for name in ("tokenizer.model", "vocab.txt", "vocab.json", "merges.txt") if (asked / name).exists()]
        remedy = (
            f"it has {older[0]}, an older format: open it with transformers.AutoTokenizer and call save_pretrained, which writes {FILE}"
            if older
            else "check the path, or train one with 'glassformer tokenizer train'"
        )
        raise TokenizerError(f"there is no tokenizer at {asked}: {file.name} was not found; {remedy}.") from None
    except UnicodeDecodeError:
        raise TokenizerError(f"{file} is not JSON but a binary file: give the {FILE} of the tokenizer.") from None
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error.strerror}. Check the path and its permissions.") from None


def _config_in(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a help, not a must: without it the usual spellings decide
        return {}
    return config if isinstance(config, dict) else {}


MOST_OF_A_TEMPLATE = 4 << 20  # bytes; the longest published ones have some 20 thousand


def _template_in(folder: Path, config: Mapping[str, Any]) -> str | None:
    from .chat import template_in_config

    file = folder / TEMPLATE
    try:
        if file.stat().st_size > MOST_OF_A_TEMPLATE:
            raise TokenizerError(f"{file} has {file.stat().st_size:,} bytes, and a chat template has a few thousand: it is another kind of file.")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return template_in_config(config)
    except UnicodeDecodeError:
        raise TokenizerError(f"{file} is not UTF-8: it is damaged or no chat template; copy it again, or take it away.") from None
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error.strerror}. Check its permissions.") from None
