"""Tokenizing, and text that grows by tokens: nothing lost, doubled or split."""

import random

import pytest
import tokenizers
from medusa_runtime.errors import BundleError, PromptError
from medusa_runtime.tokenizer import IncrementalDetokenizer, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "你好，世界。今天天气很好。",
    "Ça va? Où est la bibliothèque? e\u0301 a\u0308\u0323",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd family \U0001f642\U0001f642",
    "  two  spaces\n\n\tand a tab   ",
]


def byte_level(folder):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES[:1], trainer)
    tokenizer.add_tokens(["<tool>", "é"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "byte_level.json"))
    return Tokenizer((folder / "byte_level.json").read_bytes(), "byte_level.json")


def metaspace(folder):
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "metaspace.json"))
    return Tokenizer((folder / "metaspace.json").read_bytes(), "metaspace.json")


def byte_fallback(folder):
    """Llama 2's kind: ▁ for spaces, one token per unknown byte, the first space dropped."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁The",
        "▁dog",
        "s",
        "你",
        "\ufffd",
    ]
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyzT.," if letter not in words]
    model = models.BPE({word: at for at, word in enumerate(words + letters)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "byte_fallback.json"))
    return Tokenizer((folder / "byte_fallback.json").read_bytes(), "byte_fallback.json")


@pytest.fixture(scope="module", params=[byte_level, metaspace, byte_fallback])
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def pieces(tokenizer, ids, size):
    stream = IncrementalDetokenizer(tokenizer)
    return [*(stream.push(ids[at : at + size]) for at in range(0, len(ids), size)), stream.flush()]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", [*SENTENCES, " ".join(SENTENCES), "", "a"])
def test_pieces_join_to_the_text(tokenizer, text, size):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, size)) == tokenizer.decode(ids)


def test_pieces_of_random_tokens_join_to_the_text(tokenizer):
    rng = random.Random(0)
    for _ in range(400):
        most = rng.choice([10, 60, 300, 400])
        ids = [rng.randrange(most) for _ in range(rng.randrange(60))]
        size = rng.randrange(1, 6)
        assert "".join(pieces(tokenizer, ids, size)) == tokenizer.decode(ids), ids


def test_repeated_straddling_and_invalid_bytes(tmp_path):
    tokenizer = byte_level(tmp_path)
    letters = {byte: letter for letter, byte in zip_alphabet()}
    for pattern in (b"\x80", b"\xe4\xb8\x80\xe4", b"\xb8\x80\xe4", b"\xf0\x9f", b"\x9f\x99\x82\xf0", b"\xff\x80\xe4A"):
        ids = [tokenizer._tokenizer.token_to_id(letters[byte]) for byte in pattern] * 40
        for size in (1, 2, 3, 5):
            got = pieces(tokenizer, ids, size)
            assert "".join(got) == tokenizer.decode(ids)
            assert max(len(piece) for piece in got) <= size + 3  # nothing piles up


def zip_alphabet():
    """Pair each letter of the byte-level alphabet with its byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [(chr(byte), byte) for byte in printable] + [(chr(256 + at), byte) for at, byte in enumerate(others)]


def test_a_character_comes_out_whole(tmp_path):
    tokenizer = byte_level(tmp_path)
    ids = tokenizer.encode("\U0001f642!", add_special_tokens=False)
    assert len(ids) == 5
    assert pieces(tokenizer, ids, 1) == ["", "", "", "\U0001f642", "!", ""]
    with_special = [*ids[:2], 1, *ids[2:]]
    assert "".join(pieces(tokenizer, with_special, 1)) == "\U0001f642!"
    assert pieces(tokenizer, ids[:3], 1) == ["", "", "", "\ufffd"]


def test_byte_tokens_come_out_when_their_run_ends(tmp_path):
    tokenizer = byte_fallback(tmp_path)
    ids = tokenizer.encode("\U0001f642s", add_special_tokens=False)
    got = pieces(tokenizer, ids, 1)
    assert [piece for piece in got if piece] == ["\U0001f642s"]


def test_no_space_is_lost_between_words(tmp_path):
    tokenizer = metaspace(tmp_path)
    ids = tokenizer.encode("The dog sleeps", add_special_tokens=False)
    got = pieces(tokenizer, ids, 1)
    assert "".join(got) == "The dog sleeps"
    assert sum(bool(piece) for piece in got) > 3


def test_cost_of_a_push_does_not_grow(tmp_path):
    tokenizer = byte_level(tmp_path)
    longest, decode = [], tokenizer.decode
    tokenizer.decode = lambda ids: longest.append(len(ids)) or decode(ids)
    stream = IncrementalDetokenizer(tokenizer)
    for token in [0x80 + 5, 200, 10] * 500:
        stream.push([token])
    assert max(longest) <= 9


def test_a_finished_stream_begins_anew(tmp_path):
    tokenizer = byte_level(tmp_path)
    ids = tokenizer.encode("The dog", add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.push(ids) + stream.flush() for _ in range(2)] == ["The dog"] * 2
    assert stream.push([]) == "" and stream.flush() == ""


def test_encode(tmp_path):
    tokenizer = byte_level(tmp_path)
    plain = tokenizer.encode(SENTENCES[0], add_special_tokens=False)
    assert len(plain) > 3, "truncation in the file must not cut a prompt"
    assert tokenizer.encode(SENTENCES[0], add_special_tokens=True) == [0, *plain]
    assert tokenizer.decode([0, *plain, 1, 10**6]) == SENTENCES[0]
    assert tokenizer.encode("<|end|>", add_special_tokens=False) == [1]
    with pytest.raises(PromptError, match="Unicode"):
        tokenizer.encode("\ud800", add_special_tokens=False)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff"])
def test_bytes_that_are_no_tokenizer(content):
    with pytest.raises(BundleError, match=r"t\.json"):
        Tokenizer(content, "t.json")


def test_a_panic_of_the_library_is_an_error():
    """A pattern that its regular expressions give up on: no Exception, but pyo3's PanicException."""
    core = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    tokenizer = Tokenizer(core.to_str().encode(), "some/tokenizer.json")
    with pytest.raises(PromptError, match=r"cannot be tokenised by the tokenizer of some/tokenizer\.json: .*limit"):
        tokenizer.encode("a" * 60 + "b", add_special_tokens=False)
    assert tokenizer.encode("ab", add_special_tokens=False) == [0, 1]


class Panicking:
    """A tokenizer whose every call panics; the class's module is what tells it from other errors."""

    def __getattr__(self, name):
        def fail(*arguments, **options):
            raise PanicException("it has panicked")

        return fail


PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


def test_every_call_of_the_library_is_guarded(tmp_path, monkeypatch):
    tokenizer = byte_level(tmp_path)
    tokenizer._tokenizer = Panicking()
    for kind, call in (
        (PromptError, lambda: tokenizer.encode("a", add_special_tokens=False)),
        (BundleError, lambda: tokenizer.decode([5])),
        (BundleError, lambda: tokenizer.token(5)),
        (BundleError, lambda: tokenizer.longest_token),
        (BundleError, lambda: IncrementalDetokenizer(tokenizer).push([5])),
        (BundleError, lambda: IncrementalDetokenizer(tokenizer).flush()),
    ):
        with pytest.raises(kind, match="it has panicked"):
            call()
    monkeypatch.setattr("medusa_runtime.tokenizer.tokenizers.Tokenizer", Panicking())
    with pytest.raises(BundleError, match=r"t\.json is not a tokenizer that .*it has panicked"):
        Tokenizer(b"{}", "t.json")


def test_an_interrupt_in_the_library_stays_one(tmp_path):
    tokenizer = byte_level(tmp_path)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    tokenizer._tokenizer = type("Core", (), {"encode": interrupted})
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize("ids", [[-1], [2**40]])
def test_ids_that_are_none(tmp_path, ids):
    with pytest.raises(BundleError, match="cannot be turned into text"):
        byte_level(tmp_path).decode(ids)
