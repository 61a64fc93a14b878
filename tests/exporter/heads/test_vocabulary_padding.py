"""lm_heads of another length: fitted where padding is all that differs, refused otherwise; padding is never drafted."""

import pytest
import torch
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.storage import load_heads
from medusa_exporter.heads.vocabulary_padding import check_lm_head_rows, is_padding

from .published import H, K, linears, lm_heads, named, write

SMALL, LARGE = 60, 64  # a vocabulary, and the same one rounded up


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (152_064, 151_936, True),  # Qwen 2.5, large and small
        (32_064, 32_001, True),
        (128_256, 128_000, False),  # Llama 3's added tokens: 128,256 is no multiple of 512
        (32_000, 32_002, False),  # Vicuna's added tokens
        (50_304, 50_257, True),
        (2_048, 1_024, False),
        (100, 99, False),
    ],
)
def test_what_rounding_up_explains_is_padding(one, other, expected):
    assert is_padding(one, other) is is_padding(other, one) is expected


@pytest.mark.parametrize(("small", "large"), [(32_000, 32_768), (2, 1_024), (50_000, 50_176)])
def test_heads_that_have_many_more_rows_are_of_another_vocabulary(small, large):
    assert is_padding(small, large)
    assert is_padding(large, small) is (large - small < 256)


def heads_of(folder, rows, token_map=None, lm=None):
    weights = named("{head}.{layer}", linears(1)) | {f"{k}.1.weight": w for k, w in enumerate(lm or lm_heads(rows))}
    return write(folder, weights | ({} if token_map is None else {"token_map": token_map}))


def test_rows_of_padding_are_cut(tmp_path):
    heads = load_heads(heads_of(tmp_path, LARGE), H, SMALL)
    assert (heads.own_lm_head_size, heads.draft_vocabulary) == (SMALL, None)
    for k, rows in enumerate(lm_heads(LARGE)):
        torch.testing.assert_close(heads.own_lm_head[k], rows[:SMALL].float().T)


def test_padding_that_heads_lack_is_never_a_candidate(tmp_path):
    low = [
        -torch.rand(SMALL, H).half() - 1 for _ in range(K)
    ]  # every logit below zero, which a row of zeros would beat
    heads = load_heads(heads_of(tmp_path, SMALL, lm=low), H, LARGE)
    assert (heads.own_lm_head_size, heads.draft_vocabulary) == (SMALL, SMALL)
    heads.weights[0].zero_()
    heads.biases[0].zero_()
    found = heads.propose(torch.ones(5, H), None, lambda rows: rows, SMALL)
    assert sorted(found[0, 0].tolist()) == list(range(SMALL))


def test_a_tokenizer_that_has_more_tokens_than_the_heads_rows_is_another_vocabulary(tmp_path):
    folder = heads_of(tmp_path, SMALL)
    load_heads(folder, H, LARGE, tokens=SMALL)
    with pytest.raises(HeadsError, match=r"lm_head of 60 tokens, but the model's tokenizer has 61"):
        load_heads(folder, H, LARGE, tokens=SMALL + 1)
    check_lm_head_rows(LARGE, SMALL, "heads", tokens=LARGE + 5)  # tokens that the model itself has no row for


def test_other_lengths_are_refused_by_both_numbers(tmp_path):
    folder = heads_of(tmp_path, SMALL)
    for other in (SMALL + 1, SMALL - 1, 2 * LARGE + 1):
        with pytest.raises(HeadsError, match=rf"lm_head of 60 tokens, but the model's vocabulary has {other};"):
            load_heads(folder, H, other)


@pytest.mark.parametrize(("rows", "vocabulary"), [(SMALL, LARGE), (LARGE, SMALL)])
def test_a_token_map_names_rows_that_both_have(tmp_path, rows, vocabulary):
    tokens = torch.tensor([SMALL - 1, 3])
    heads = load_heads(heads_of(tmp_path / "good", rows, tokens), H, vocabulary)
    torch.testing.assert_close(heads.own_lm_head[0], lm_heads(rows)[0][tokens].float().T)
    with pytest.raises(HeadsError, match=f"ids from 3 to {SMALL}, but the model's tokens are numbered from 0 to 59"):
        load_heads(heads_of(tmp_path / "bad", rows, torch.tensor([SMALL, 3])), H, vocabulary)
