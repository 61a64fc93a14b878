"""Tokenising: text to ids, ids to text at once, and files and libraries that fail."""

import pytest
import tokenizers
from medusa_runtime.errors import BundleError, PromptError
from medusa_runtime.tokenizer import Tokenizer
from tokenizers import models, pre_tokenizers

from .small_tokenizers import KINDS, SENTENCES, WITH_BYTES, byte_level, id_of, one_of_kind


def test_encode():
    tokenizer = byte_level()
    plain = tokenizer.encode(SENTENCES[0], add_special_tokens=False)
    assert len(plain) > 3, "truncation in the file must not cut a prompt"
    assert tokenizer.encode(SENTENCES[0], add_special_tokens=True) == [0, *plain]
    assert tokenizer.decode([0, *plain, 1, 10**6]) == SENTENCES[0]
    assert tokenizer.encode("<|end|>", add_special_tokens=False) == [1]
    with pytest.raises(PromptError, match="Unicode"):
        tokenizer.encode("\ud800", add_special_tokens=False)


def test_special_tokens_are_text_on_request():
    tokenizer = byte_level()
    ids = [0, *tokenizer.encode("The", add_special_tokens=False), id_of(tokenizer, "<tool>"), 1, 10**6]
    assert tokenizer.decode(ids) == "The<tool>", "a token that was added need not be special"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>The<tool><|end|>"
    assert [tokenizer.token(token) for token in (0, 1, 10**6)] == ["", "", ""]
    assert [tokenizer.token(token, skip_special_tokens=False) for token in (0, 10**6)] == ["<|start|>", ""]


def test_tokens_that_are_bytes_are_recognised_by_their_text():
    assert [kind for kind in KINDS if one_of_kind(kind).has_byte_fallback] == WITH_BYTES


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


def test_every_call_of_the_library_is_guarded(monkeypatch):
    tokenizer = byte_level()
    tokenizer._tokenizer = Panicking()
    for kind, call in (
        (PromptError, lambda: tokenizer.encode("a", add_special_tokens=False)),
        (BundleError, lambda: tokenizer.decode([5])),
        (BundleError, lambda: tokenizer.token(5)),
        (BundleError, lambda: tokenizer.longest_token),
        (BundleError, lambda: tokenizer.has_byte_fallback),
    ):
        with pytest.raises(kind, match="it has panicked"):
            call()
    monkeypatch.setattr("medusa_runtime.tokenizer.tokenizers.Tokenizer", Panicking())
    with pytest.raises(BundleError, match=r"t\.json is not a tokenizer that .*it has panicked"):
        Tokenizer(b"{}", "t.json")


def test_an_interrupt_in_the_library_stays_one():
    tokenizer = byte_level()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    tokenizer._tokenizer = type("Core", (), {"encode": interrupted})
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize("ids", [[-1], [2**40]])
def test_ids_that_are_none(ids):
    with pytest.raises(BundleError, match="cannot be turned into text"):
        byte_level().decode(ids)
