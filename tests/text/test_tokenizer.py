"""What a tokenizer promises to whoever uses it."""

from __future__ import annotations

import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings

from corpus_of_tokenizers import ANY_TEXT, END, MIXED, TRICKY_TEXT, shakespeare, trained
from glassformer.core.errors import TokenizerError
from glassformer.text import KINDS, Piece, Tokenizer, train

EXACT = ("bpe", "bytes")


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("texts", [ANY_TEXT, TRICKY_TEXT], ids=["any", "tricky"])
def test_byte_level_tokenizers_give_back_any_text(kind: str, texts: object) -> None:
    @given(texts)
    @settings(max_examples=300, deadline=None)
    def law(text: str) -> None:
        tokenizer = trained(kind)
        for allow in (True, False):
            ids = tokenizer.encode(text, allow_special=allow)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode_bytes(ids) == text.encode()

    law()


@given(ANY_TEXT)
@settings(max_examples=50, deadline=None)
def test_characters_give_back_any_text_they_were_trained_on(text: str) -> None:
    text = text or "x"
    tokenizer = train("characters", texts=[text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "words"])
def test_what_the_other_kinds_lose_is_what_their_documentation_says(kind: str) -> None:
    tokenizer, text = trained(kind), "First Citizen:\nBefore we proceed any further, hear me speak."
    back = tokenizer.decode(tokenizer.encode(text))
    if kind == "unigram":
        assert back == text
        assert tokenizer.decode(tokenizer.encode(" proceed")) == "proceed"
    else:
        assert back == "First Citizen : Before we proceed any further , hear me speak ."


@pytest.mark.parametrize("kind", KINDS)
@given(text=TRICKY_TEXT)
@settings(max_examples=60, deadline=None)
def test_offsets_say_which_characters_each_token_covers(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    for allow in (True, False):
        pieces = tokenizer.offsets(text, allow_special=allow)
        assert [piece.id for piece in pieces] == tokenizer.encode(text, allow_special=allow)
        assert all(0 <= piece.start <= piece.end <= len(text) for piece in pieces)
        assert [piece.start for piece in pieces] == sorted(piece.start for piece in pieces)
        if kind in (*EXACT, "characters"):
            covered = {at for piece in pieces for at in range(piece.start, piece.end)}
            assert covered == set(range(len(text)))
            for piece in pieces:
                if "⟨" not in piece.text and piece.id != tokenizer.unk_id:
                    assert text[piece.start : piece.end] == piece.text


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "words", "characters"])
def test_offsets_agree_with_those_of_the_tokenizers_library(kind: str) -> None:
    tokenizer = trained(kind)
    reference = tokenizer.library.encode(MIXED + END + MIXED, add_special_tokens=False)
    assert [(p.id, p.start, p.end) for p in tokenizer.offsets(MIXED + END + MIXED)] == [
        (id, *span) for id, span in zip(reference.ids, reference.offsets, strict=True)
    ]


def test_parts_of_a_character_cover_all_of_it_and_show_their_bytes() -> None:
    assert trained("bytes").offsets("a😀b") == [
        Piece(0x61, "a", 0, 1),
        Piece(0xF0, "⟨F0⟩", 1, 2),
        Piece(0x9F, "⟨9F⟩", 1, 2),
        Piece(0x98, "⟨98⟩", 1, 2),
        Piece(0x80, "⟨80⟩", 1, 2),
        Piece(0x62, "b", 2, 3),
    ]


def test_wordpiece_offsets_point_into_the_text_before_it_was_lowered() -> None:
    tokenizer = train("wordpiece", texts=["the cafe is red"] * 9, vocab_size=80, lowercase=True)
    text = "The CAFÉ"
    assert [text[p.start : p.end] for p in tokenizer.offsets(text)] == ["The", "CAFÉ"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_do_the_whole_round(kind: str) -> None:
    tokenizer = trained(kind)
    text = shakespeare()[:500]
    ids = tokenizer.encode(text)
    assert ids
    assert max(ids) < tokenizer.vocab_size == len(tokenizer)
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.offsets("") == []
    assert tokenizer.encode_to_array("").tolist() == []
    assert tokenizer.kind == kind
    assert kind in repr(tokenizer)
    array = tokenizer.encode_to_array(text)
    assert array.dtype == np.uint16
    assert array.tolist() == ids
    assert tokenizer.encode_batch([text, "", MIXED]) == [ids, [], tokenizer.encode(MIXED)]
    assert tokenizer.encode_batch([]) == []
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer
    assert again.encode(text) == ids
    assert {tokenizer.piece(id) for id in ids} >= {piece.text for piece in tokenizer.offsets(text)}
    assert tokenizer.special[END] == tokenizer.eos_id


def test_arrays_are_32_bit_where_16_are_too_few() -> None:
    letters = "".join(map(chr, range(0x20000, 0x20000 + 66_000)))
    tokenizer = train("characters", texts=[letters])
    assert tokenizer.encode_to_array(letters[-2:]).dtype == np.uint32
    assert tokenizer.encode(letters[-2:]) == [65_998, 65_999]


@pytest.mark.parametrize("kind", KINDS)
def test_special_spellings_are_tokens_unless_forbidden(kind: str) -> None:
    tokenizer = trained(kind)
    assert tokenizer.encode(f"we{END}hear").count(tokenizer.eos_id) == 1
    assert tokenizer.eos_id not in tokenizer.encode(f"we{END}hear", allow_special=False)
    ids = tokenizer.encode(f"we{END}")
    assert tokenizer.decode(ids).endswith(END)
    assert END not in tokenizer.decode(ids, skip_special=True)


def test_special_tokens_need_not_be_ascii_and_the_longest_wins() -> None:
    special = ["<｜end▁of▁sentence｜>", "é", "<a>", "<a><b>"]
    tokenizer = train("bpe", texts=[MIXED], vocab_size=300, special=special)
    text = "x<｜end▁of▁sentence｜>é <a><b><a>"
    ids = tokenizer.encode(text)
    assert [id for id in ids if id in tokenizer.special.values()] == [tokenizer.special[name] for name in (special[0], "é", "<a><b>", "<a>")]
    assert tokenizer.decode(ids) == text
    assert tokenizer.engine == "tiktoken"
    assert tokenizer.library.encode(text).ids == ids


def test_roles_follow_the_usual_spellings_or_what_was_said() -> None:
    usual = train("bytes", special=["<s>", "</s>", "<pad>", "<mask>", "<unk>"])
    assert (usual.bos_id, usual.eos_id, usual.pad_id, usual.mask_id, usual.unk_id) == (256, 257, 258, 259, 260)
    bert = train("words", texts=["a b"], special=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    assert (bert.pad_id, bert.unk_id, bert.bos_id, bert.eos_id, bert.mask_id, bert.role_id("sep")) == (0, 1, 2, 3, 4, 3)
    given_role = train("bytes", special=["###", "</s>"], roles={"eos": "###"})
    assert given_role.eos_id == 256
    assert train("bytes").eos_id is None
    assert trained("bpe").pad_id is None


def test_what_the_file_puts_around_a_text_is_put_when_asked_for() -> None:
    from tokenizers import processors

    library = train("wordpiece", texts=["the car is red"] * 9, vocab_size=60, special=["[CLS]", "[SEP]"]).library
    cls, sep = library.token_to_id("[CLS]"), library.token_to_id("[SEP]")
    library.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)])
    tokenizer = Tokenizer(library)
    inside = tokenizer.encode("the car")
    assert tokenizer.encode("the car", add_special=True) == [cls, *inside, sep] == library.encode("the car").ids
    assert tokenizer.encode_to_array("the car", add_special=True).tolist() == [cls, *inside, sep]
    assert tokenizer.encode_batch(["", "car"], add_special=True)[0] == [cls, sep]
    assert trained("bpe").encode("the car", add_special=True) == trained("bpe").encode("the car")


def test_truncation_and_padding_of_a_foreign_file_are_off() -> None:
    library = trained("bpe").library
    library.enable_truncation(2)
    library.enable_padding(length=64)
    assert Tokenizer(library).encode("First Citizen: hear me speak") == trained("bpe").encode("First Citizen: hear me speak")
    assert library.truncation is not None, "the caller's own object stays as it was"


def test_the_hash_tells_tokenizers_apart() -> None:
    one, other = trained("bpe"), train("bytes", special=[END])
    assert len(one.hash) == 64
    assert one.hash != other.hash
    assert train("bytes", special=[END]).hash == other.hash
    assert len({one, other, train("bytes", special=[END])}) == 2
    assert one != "a tokenizer"


# ------------------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_refused_with_its_place(kind: str) -> None:
    for call in (trained(kind).encode, trained(kind).encode_to_array, trained(kind).offsets, lambda text: trained(kind).encode_batch(["fine", text])):
        with pytest.raises(TokenizerError, match=r"lone surrogate, U\+D83D at position 3"):
            call("abc\ud83d")


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(TokenizerError, match="encodes str, and this is bytes"):
        trained("bpe").encode(b"abc")  # type: ignore[arg-type]


def test_unknown_characters_and_words_are_named_with_their_place() -> None:
    letters = train("characters", texts=["the car"], special=[END])
    with pytest.raises(TokenizerError, match=r"'€' \(U\+20AC\) at position 16 of the text is none of the 7 characters.*<unk>"):
        letters.encode(f"car{END}€")
    with pytest.raises(TokenizerError, match=r"'q' \(U\+0071\) at position 0"):
        letters.encode_to_array("q")
    words = train("words", texts=["the car is red"])
    with pytest.raises(TokenizerError, match=r"the word 'blue' at position 11 of the text is none of the 4.*<unk>"):
        words.encode("the car is blue")
    with pytest.raises(TokenizerError, match="'blue' at position 0"):
        words.encode_to_array("blue")


def test_unknown_characters_and_words_become_unk_where_there_is_one() -> None:
    for kind in ("characters", "words"):
        tokenizer = train(kind, texts=["t h e"], special=["<unk>"], min_frequency=1)
        ids = tokenizer.encode("t € h")
        assert ids.count(tokenizer.unk_id) == 1
        assert tokenizer.encode("€")[0] == tokenizer.unk_id
        assert [(p.text, p.start, p.end) for p in tokenizer.offsets("t€") if p.id == tokenizer.unk_id][-1][2] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_ids_from_elsewhere_are_refused(kind: str) -> None:
    tokenizer = trained(kind)
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(TokenizerError, match=rf"the id {wrong} is not in this vocabulary of {tokenizer.vocab_size} tokens"):
            tokenizer.decode([0, wrong])
    with pytest.raises(TokenizerError, match="is not in this vocabulary"):
        tokenizer.piece(tokenizer.vocab_size)


def test_the_room_is_light() -> None:
    code = "import sys, glassformer.text; print([m for m in ('torch', 'numpy', 'tokenizers', 'tiktoken', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    code = "import sys; from glassformer.text import train; train('bpe', texts=['a b'], vocab_size=256).encode('a'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_text_in_the_wrong_normal_form_still_comes_back() -> None:
    for form in ("NFC", "NFD", "NFKD"):
        text = unicodedata.normalize(form, MIXED)
        assert trained("bpe").decode(trained("bpe").encode(text)) == text


def test_a_prompt_has_around_it_what_the_file_prescribes():
    from tokenizers import Tokenizer as Library, models, processors

    library = Library(models.WordLevel({"<s>": 0, "a": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    plain = Tokenizer(library)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert Tokenizer(library).prompt("a") == [0, 1] and Tokenizer(library).encode("a") == [1] and plain.prompt("a") == [1]
