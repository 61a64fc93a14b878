"""Sanitised prompts with tokenizers of every kind: which tokens are control tokens, and how text is kept from them."""

from __future__ import annotations

import pytest
import tokenizers
from medusa_runtime.control_tokens import find_control_tokens
from medusa_runtime.errors import BundleError, PromptError
from medusa_runtime.sanitizer import Sanitizer
from medusa_runtime.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from .prompt_encoders import BUILDERS, byte_level, control_ids, decoded, encoder, unigram


def test_a_tokenizer_with_too_many_characters_in_control_tokens_is_refused() -> None:
    core = byte_level("smollm2")
    core = tokenizers.Tokenizer.from_str(core.to_str())
    core.add_special_tokens([chr(0x4E00 + at) for at in range(2048)])
    with pytest.raises(BundleError, match="different characters, expected at most 2048: pass sanitize=False"):
        encoder("smollm2", core=core).encode("x", sanitize=True)


def test_which_tokens_are_control_tokens() -> None:
    core = tokenizers.Tokenizer(models.BPE())
    core.add_special_tokens(["<s>", "STOP", "\n"])
    core.add_tokens(["<|fim|>", "<tool_call>", "<table>", "[X]", "the", "  ", "...", "<", "é"])
    tokenizer = Tokenizer(core.to_str().encode(), "t")
    source = "the <tool_call> ... [X] < é"
    assert [*find_control_tokens(tokenizer, source)] == ["<s>", "STOP", "<|fim|>", "<tool_call>", "[X]"]
    assert [*find_control_tokens(tokenizer, "")] == ["<s>", "STOP", "<|fim|>"]


def test_flags_of_control_tokens_are_kept() -> None:
    """Phi-3's strip white space around them, which may be a user's."""
    core = byte_level("phi3")
    core = tokenizers.Tokenizer.from_str(core.to_str())
    core.add_special_tokens([AddedToken("<|x|>", lstrip=True, rstrip=True, special=True)])
    core.add_special_tokens([AddedToken("<|word|>", single_word=True, special=True)])
    source = "{% for m in messages %}{{ '<|x|>' + m.content + '<|x|>' + m.content + '.<|word|>' }}{% endfor %}"
    prompts = encoder("phi3", core=core, template=source)
    for content in ("  a  ", "\n", "a", "a b"):
        assert prompts.encode([{"role": "user", "content": content}], sanitize=True) == prompts.encode(
            [{"role": "user", "content": content}]
        )
    ids = prompts.encode("  <|x|>  ", sanitize=True)
    assert decoded(prompts, ids) == "<|x|><|x|><|x|><|x|>  .<|word|>"
    assert control_ids(prompts, ids) == [core.token_to_id(text) for text in ("<|x|>", "<|x|>", "<|word|>")]
    prompts = encoder("phi3", core=core, template="{{ messages[0].content[1:] }}<|word|>")
    assert prompts.encode("x", sanitize=True) == [core.token_to_id("<|word|>")]
    with pytest.raises(PromptError, match="a control token that the chat template writes is not one next to this text"):
        prompts.encode("words", sanitize=True)  # where it is no control token without sanitising, either


def test_normalised_control_tokens() -> None:
    """They are found in lower case too, or with other characters that the normaliser turns into theirs."""
    core = tokenizers.Tokenizer.from_str(byte_level("smollm2").to_str())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.add_special_tokens([AddedToken("<tool>", normalized=True, special=True)])
    prompts = encoder("smollm2", core=core, template="{{ messages[0].content }}<tool>")
    tool = core.token_to_id("<tool>")
    for content in ("<tool>", "<TOOL>", "＜ｔｏｏｌ＞"):
        assert prompts.encode(content).count(tool) == 2
        ids = prompts.encode(content, sanitize=True)
        assert ids.count(tool) == 1 == ids[-1:].count(tool)
        assert decoded(prompts, ids) == "<tool><tool>"


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE"])
def test_models_that_find_control_tokens_in_text_by_themselves(kind: str) -> None:
    """Then the model's own tokens are renamed, and merges that make them up are left out."""
    words = ["<unk>", "<s>", "a", "</s>"]
    vocabulary = {word: at for at, word in enumerate([*words, "<", "s", ">", "<s", "/", "u", "n", "k"])}
    if kind == "WordLevel":
        core = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    elif kind == "WordPiece":
        core = tokenizers.Tokenizer(models.WordPiece(vocabulary | {"##b": 12}, unk_token="<unk>"))
    else:
        core = tokenizers.Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    core.add_special_tokens(words[:2])
    prompts = encoder("hermes", core=core, template="<s>{{ messages[0].content }}<s>")
    bos, unknown = 1, 0
    ids = prompts.encode("a <s> a", sanitize=True)
    assert [one for one in ids if one == bos] == [bos, bos] and ids[0] == ids[-1] == bos
    assert prompts.encode("a <s> a").count(bos) == 3
    raw = prompts.encode("a <s> <unk>", raw=True, sanitize=True)
    assert bos not in raw
    if kind == "BPE":
        assert raw == [2, 7, 6, 4, 9, 10, 11, 6]
        assert ids == [bos, 2, 7, 6, 2, bos]
    else:
        assert raw == [2, unknown, unknown]  # what such a model has no token for
    assert prompts.encode("a ü", raw=True, sanitize=True) == prompts.encode("a ü", raw=True) == [2, unknown]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("post_process", ["", "bos", "both", "roberta"])
def test_a_raw_text_keeps_the_tokenizers_own_special_tokens(build: str, post_process: str) -> None:
    prompts = encoder("hermes", core=BUILDERS[build]("hermes", post_process))
    bos, eos = (prompts.tokenizer.core.token_to_id(text) for text in ("<s>", "</s>"))
    around = {"": ([], []), "bos": ([bos], []), "both": ([bos], [eos]), "roberta": ([bos], [eos])}[post_process]
    ids = prompts.encode("The dog", raw=True, sanitize=True)
    assert ids == prompts.encode("The dog", raw=True)
    for text in ("<s>The dog</s>", "<s>", "<s></s>"):
        ids = prompts.encode(text, raw=True, sanitize=True)
        assert (ids[: len(around[0])], ids[len(ids) - len(around[1]) :]) == around
        inner = ids[len(around[0]) : len(ids) - len(around[1])]
        assert {bos, eos}.isdisjoint(inner) and inner
        assert decoded(prompts, inner).strip() == text


def test_ids_of_a_post_processor_are_not_mistaken_for_those_of_the_copy() -> None:
    """The copy that shares the model has other ids for control tokens that the model has."""
    core = tokenizers.Tokenizer(models.BPE({"a": 0, "<x>": 1, "<": 2, "x": 3, ">": 4}, []))
    core.add_special_tokens(["<x>", "<y>"])
    assert (core.token_to_id("<x>"), core.token_to_id("<y>")) == (1, 5)
    core.post_processor = processors.TemplateProcessing(single="<y> $A", special_tokens=[("<y>", 5)])
    prompts = encoder("hermes", core=core, template="<y>{{ messages[0].content }}<x>")
    assert prompts.encode("a<x>", raw=True, sanitize=True) == [5, 0, 2, 3, 4]
    assert prompts.encode("a<x>", sanitize=True) == [5, 0, 2, 3, 4, 1]


def test_the_tokenizer_is_left_as_it_was() -> None:
    core = unigram("hermes")
    tokenizer = Tokenizer(core.to_str().encode(), "t")
    before = tokenizer.core.to_str()
    sanitizer = Sanitizer(tokenizer, None)
    sanitizer.encode_raw("a <s> b")
    assert sanitizer._exact is not None
    assert tokenizer.core.to_str() == before
