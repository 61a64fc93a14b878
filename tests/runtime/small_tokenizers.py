"""Tokenizers of every common kind, small enough to be made in a test, and a slow reference for their texts."""

import codecs
import contextlib
import functools
import re

import tokenizers
from medusa_runtime.tokenizer import Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "你好，世界。今天天气很好。",
    "Ça va? Où est la bibliothèque? e\u0301 a\u0308\u0323",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd family \U0001f642\U0001f642",
    "  two  spaces\n\n\tand a tab   ",
]
REPLACEMENT = "\ufffd"
LETTERS = "abcdefghijklmnopqrstuvwxyzT.,"
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level():
    """GPT-2's kind: tokens are bytes, so that a character may span tokens."""
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
    return finished(tokenizer, "byte_level.json")


def metaspace():
    """T5's kind: ▁ for spaces, whole characters only, the first space dropped."""
    words = [*SPECIAL, "▁", "▁The", "▁dog", "▁▁", *sorted(set("".join(SENTENCES)) - {" "})]
    model = models.Unigram([(word, -float(at)) for at, word in enumerate(words)], unk_id=0)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return finished(tokenizer, "metaspace.json")


def byte_fallback():
    """Llama 2's kind: ▁ for spaces, one token per unknown byte, the first space dropped."""
    words = [*SPECIAL, *BYTES, "▁", "▁The", "▁dog", "s", "你", REPLACEMENT, *LETTERS.replace("s", "")]
    model = models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    return llama_like(model, [decoders.Strip(" ", 1, 0)], "byte_fallback.json")


def unigram_with_bytes():
    """Gemma's kind: the same, as a Unigram model, and the first space stays."""
    words = [*SPECIAL, *BYTES, "▁", "▁a", "ab", "▁▁", *LETTERS]
    model = models.Unigram([(word, -float(at)) for at, word in enumerate(words)], unk_id=0, byte_fallback=True)
    return llama_like(model, [], "unigram_with_bytes.json")


def llama_like(model, last, name):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    tokenizer.add_special_tokens(SPECIAL)
    return finished(tokenizer, name)


def word_piece():
    """BERT's kind: a space before each token that is not marked as a continuation, and punctuation cleaned up."""
    words = [*SPECIAL, "the", "dog", "do", "n't", ".", ",", "?", "'s", "do not", "##s", "##.", "##ab", *LETTERS[:5]]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(SPECIAL)
    return finished(tokenizer, "word_piece.json")


def word_ends():
    """The first GPT's kind: a mark at the end of words, which is a space unless the text ends with it."""
    words = [*SPECIAL, "a", "b", "a</w>", "b</w>", "aab</w>", ".</w>"]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(SPECIAL)
    return finished(tokenizer, "word_ends.json")


def without_decoder():
    """No decoder at all: the library joins tokens by spaces, and what looks like a byte is a word."""
    words = [*SPECIAL, *BYTES, "a", "b", "aab"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    return finished(tokenizer, "without_decoder.json")


def finished(tokenizer, name):
    return Tokenizer(tokenizer.to_str().encode(), name)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WITH_BYTES = [byte_fallback, unigram_with_bytes]
KINDS = [byte_level, metaspace, *WITH_BYTES, word_piece, word_ends, without_decoder]


@functools.cache
def one_of_kind(kind):
    """Return a tokenizer that no test changes."""
    return kind()


def id_of(tokenizer, text):
    """Return the id of a token as the vocabulary writes it."""
    token = tokenizer._tokenizer.token_to_id(text)
    assert token is not None, f"{text} is not in the vocabulary"
    return token


def text_of(tokenizer, ids, *, final, skip_special_tokens=True):
    """Return the text of all ids at once, the slow reference: the complete characters, or with `final` all of it.

    It is the library's text, except in runs of byte tokens: there, valid characters stay next to invalid bytes.
    """
    if not tokenizer.has_byte_fallback:
        text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text if final else text.removesuffix(REPLACEMENT)
    text, run = "", b""
    for token in ids:
        word = tokenizer.token(token, skip_special_tokens=skip_special_tokens)
        if re.fullmatch("<0x..>", word):
            run += bytes([int(word[3:5], 16)])
        elif word:
            text, run = text + text_of_bytes(run, final=True) + word.replace("▁", " "), b""
    text += text_of_bytes(run, final=final)
    drops_first_space = tokenizer.decode([id_of(tokenizer, "▁")]) == ""
    return text.removeprefix(" ") if drops_first_space else text


def text_of_bytes(run, *, final):
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(run)
    incomplete = 0 if final else len(decoder.getstate()[0])
    text, run = "", run[: len(run) - incomplete]
    while run:
        for length in (1, 2, 3, 4):
            with contextlib.suppress(UnicodeDecodeError):
                text += run[:length].decode()
                break
        else:
            text, length = text + REPLACEMENT, 1
        run = run[length:]
    return text
