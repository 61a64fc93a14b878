"""Texts to token sequences, as vLLM's SamplingParams.update_from_tokenizer derives them."""

import pytest
from medusa_runtime.errors import ArgumentError, PromptError
from medusa_runtime.sampling import bad_word_ids
from medusa_runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as Core
from tokenizers import models, normalizers, pre_tokenizers


def tokenizer(*tokens):
    """Splits at every character, where it can into the longest of these tokens; "_" is a space."""
    vocabulary = {token.replace("_", "Ġ"): at for at, token in enumerate(dict.fromkeys([*"abcde_", *tokens]))}
    merges = []
    for token in vocabulary:
        for cut in range(1, len(token)):
            if token[:cut] in vocabulary and token[cut:] in vocabulary:
                merges.append((token[:cut], token[cut:]))
                break
    core = Core(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = {at: token.replace("Ġ", "_") for token, at in vocabulary.items()}
    return Tokenizer(core.to_str().encode(), "a test"), names


def sequences(words, *tokens):
    made, names = tokenizer(*tokens)
    return [[names[token] for token in ids] for ids in bad_word_ids(words, made)]


def test_a_word_is_forbidden_at_the_beginning_and_in_the_middle_of_a_text():
    assert sequences(["ab"], "ab", "_ab") == [["ab"], ["_ab"]]
    assert sequences(["abc"], "_a") == [["a", "b", "c"], ["_a", "b", "c"]]


def test_spaces_before_a_word_do_not_count():
    assert sequences(["  ab", "ab"], "ab", "_ab") == [["ab"], ["_ab"]]


def test_a_space_that_is_a_token_of_its_own_adds_no_sequence():
    assert sequences(["ab"], "ab") == [["ab"]]


def test_another_number_of_tokens_behind_a_space_adds_no_sequence():
    """vLLM compares the numbers too."""
    assert sequences(["abc"], "ab", "_a", "_ab", "_abc") == [["ab", "c"]]


def test_several_words_keep_their_order():
    assert sequences(["b", "a b"], "_b") == [["b"], ["_b"], ["a", "_b"]]
    assert sequences([]) == []


@pytest.mark.parametrize("word", ["   ", "\n", "\n\n", "\t \u3000"])
def test_white_space_is_refused_although_it_has_tokens(word):
    made, _ = tokenizer()
    with pytest.raises(
        ArgumentError, match=r"^bad_words holds .* which is white space only.*logit_bias of -100"
    ) as error:
        bad_word_ids(["a", word], made)
    assert f"holds {word!r}, which" in str(error.value)


def test_words_without_tokens_are_refused():
    core = Core(models.BPE({"a": 0}, []))
    core.normalizer = normalizers.Replace("x", "")
    made = Tokenizer(core.to_str().encode(), "a test")
    with pytest.raises(ArgumentError, match=r"^bad_words holds 'xx', which has no tokens; expected a word"):
        bad_word_ids(["a", "xx"], made)
    with pytest.raises(PromptError, match="not valid Unicode"):
        bad_word_ids(["\ud800"], made)
