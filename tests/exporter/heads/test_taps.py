"""Taps: checked against the decoder's layers, caught while asked for and no longer."""

import pytest
import torch
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.taps import capture_taps, check_taps
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

IDS = torch.tensor([[3, 1, 2]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=10)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_what_layers_read_is_caught_while_the_block_runs(model):
    norms = [layer.input_layernorm for layer in model.base_model.layers]
    with capture_taps(model, (1, 0)) as caught:
        assert caught == {}
        states = model(IDS, output_hidden_states=True).hidden_states
        assert sorted(caught) == [0, 1]
    for layer in (0, 1):
        torch.testing.assert_close(caught[layer], norms[layer](states[layer]))
    assert not any(norm._forward_hooks for norm in norms)


@torch.no_grad()
def test_an_error_in_the_block_takes_the_hooks_off_too(model):
    with pytest.raises(KeyError), capture_taps(model, (1,)):
        raise KeyError
    assert not model.base_model.layers[1].input_layernorm._forward_hooks


@pytest.mark.parametrize(("taps", "wrong"), [((2,), 2), ((0, 5), 5), ((-1,), -1)])
def test_layers_that_the_decoder_lacks_are_refused(model, taps, wrong):
    with pytest.raises(HeadsError, match=rf"no decoder layer {wrong} to tap, the model's are 0 to 1; tap one of"):
        capture_taps(model, taps).__enter__()
    with pytest.raises(HeadsError, match=rf"^some/heads: no decoder layer {wrong} "):
        check_taps(taps, 2, "some/heads")


def test_layers_of_the_decoder_are_let_through():
    check_taps((), 2, "heads")
    check_taps((1, 0), 2, "heads")


def test_layers_without_a_norm_in_front_are_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 10, "pad_token_id": 0}
    model = Olmo2ForCausalLM(Olmo2Config(num_hidden_layers=2, **sizes))
    with pytest.raises(HeadsError, match="layers of Olmo2ForCausalLM read their input without a norm; train or give"):
        capture_taps(model, (1,)).__enter__()
    with capture_taps(model, ()) as caught:
        assert caught == {}
